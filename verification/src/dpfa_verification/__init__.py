"""What any mechanism, accountant or backend must pass, ours or a third party's."""

__version__ = "0.1.0"

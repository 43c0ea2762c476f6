"""The contract of DP-Flash-Attention. Standard library only."""

__version__ = "0.1.0"

"""What releases cost: events in, epsilon out. The libraries are imported with the accountant that uses them."""

__version__ = "0.1.0"

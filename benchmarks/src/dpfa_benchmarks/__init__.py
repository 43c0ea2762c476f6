"""Benchmarks: one runner, contenders that take turns, records that are only ever appended."""

__version__ = "0.1.0"

"""Answers before any data is touched: what noise a promise needs, what a noise promises, and what both cost."""

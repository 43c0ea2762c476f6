"""Private memory and DP-Forward on real texts that every machine has: the docstrings of installed packages."""

"""Attacks on finished releases: they can show that a claim is false, never that it is true."""

"""A mechanism that depends on dpfa-core alone."""

"""Models for other programs, for `export`."""

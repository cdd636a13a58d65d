"""Studies of the exact games."""

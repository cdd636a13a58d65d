"""Which pairs to label."""

"""A run on disk: checkpoints, metrics, signals, and the loop around a loop."""

"""Ablations: each file lists its values in `sweep()`."""

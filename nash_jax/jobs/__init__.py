"""The jobs of the `nash-jax` command, beside train and fit."""

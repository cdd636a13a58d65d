"""The jobs of the `nash-jax` command, except train and fit."""

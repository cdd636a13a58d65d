"""Gemma: forward pass, decoding, log-probabilities, adapters, shardings."""

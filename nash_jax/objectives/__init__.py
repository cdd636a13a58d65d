"""Losses of arrays, and the table of algorithms that use them."""

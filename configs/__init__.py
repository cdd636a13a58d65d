"""Experiments: each file states its question, command, cost and expected result."""

"""Exact preference games: solvers, theory and studies, apart from all that trains a network."""

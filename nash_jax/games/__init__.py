"""Exact preference games: solvers, theory and studies, apart from all that trains a network.

* preference: what a policy is worth, how far it is from an equilibrium, and the equilibria;
* solvers: every method as a pure step, and `solve`, which runs one;
* zoo: small games with known equilibria, random games, and readers of measured ones;
* contextual: the paper's game, and fair races on it;
* trees, regret, exact: games of imperfect information, methods that learn them from episodes, and
  what policies are worth in them;
* study: the studies of configs/games, from a config to tables and figures.
"""

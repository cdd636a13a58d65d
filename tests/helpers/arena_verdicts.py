"""Made-up verdicts of an arena."""

import numpy as np


def verdicts(n, policies, samples, seed=0):
  """Antisymmetric verdicts [N P S P S] of random strength, the diagonal not valid."""
  k = policies * samples
  logits = np.random.default_rng(seed).normal(size=(n, k, k))
  p = 1 / (1 + np.exp(logits.swapaxes(1, 2) - logits))
  valid = np.broadcast_to(~np.eye(k, dtype=bool), p.shape)
  return (a.reshape(n, policies, samples, policies, samples) for a in (p, valid))

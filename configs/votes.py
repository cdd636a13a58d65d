"""Votes of the bundled population on pairs of the storyteller's own responses.

Question: which of the policy's responses does the population prefer? (The judge is fitted to this.)
Command:  nash-jax collect --config=votes --workdir=runs/votes
"""

from nash_jax import config


def get_config():
  c = config.collect()
  c.steps = 120
  c.sampling.max_tokens = 56
  base = c.model.weights
  c.sources = {
    "base": {"weights": base, "temperature": 0.8},
    "warmer": {"weights": base, "temperature": 1.0},
  }
  return c

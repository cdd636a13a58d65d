"""η: how far may one proximal step go?

Question: how much speed does the weight β/η of KL to the target cost, and does it add stability?
Command:  nash-jax sweep --config=ablations/eta --workdir=runs/eta
          (:strong for the strong short game, :stories for the storyteller, :smoke for seconds)
Cost:     a minute on two CPU cores for a table of the short game; about a minute a run for the
          storyteller, one seed each.
Expected: docs/short_game.md, docs/compare.md
"""

from nash_jax import config
from nash_jax.configs.ablations import kappa

VALUES = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 1e6)


def sweep():
  return [{"algorithm.eta": value} for value in VALUES]


def get_config(game="mild"):
  return config.compare(kappa.base(game), sweep(), **kappa.kinds_and_seeds(game))

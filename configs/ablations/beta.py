"""β: how strongly is the game regularised?

Question: how close does NashMP get to the equilibrium as the pull to the reference falls?
          Each value is another game, with another equilibrium and another SubOpt of the reference.
Command:  nash-jax sweep --config=ablations/beta --workdir=runs/beta
          (:strong for the strong short game, :stories for the storyteller, :gemma3_270m for your
          own Gemma, :smoke for seconds)
Cost:     a minute on two CPU cores for a table of the short game; about a minute a run for the
          storyteller, half an hour for Gemma, one seed each.
Expected: docs/short_game.md, docs/compare.md
"""

from nash_jax import config
from nash_jax.configs.ablations import kappa

VALUES = (0.01, 0.02, 0.05, 0.1, 0.2)
FEW = (0.005, 0.02, 0.1)  # if a run takes half an hour


def sweep(game):
  return [{"algorithm.beta": value} for value in (FEW if game == "gemma3_270m" else VALUES)]


def get_config(game="mild"):
  return config.compare(kappa.base(game), sweep(game), **kappa.kinds_and_seeds(game))

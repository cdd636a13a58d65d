"""κ: how fast should the prox centre follow the policy?

Question: what does NashMP's last iterate lose if its target stands still (κ = 0), follows at once
          (κ = 1, regularised self-play) or averages (10/(k+10))?
Command:  nash-jax sweep --config=ablations/kappa --workdir=runs/kappa
          (:strong for the strong short game, :stories for the storyteller, :gemma3_270m for your
          own Gemma, :smoke for seconds)
Cost:     a minute on two CPU cores for a table of the short game; about a minute a run for the
          storyteller, half an hour for Gemma, one seed each.
Expected: docs/short_game.md, docs/compare.md, docs/real_gemma.md
"""

from nash_jax import config
from nash_jax.configs import gemma3_270m_compare, short_game, stories
from nash_jax.validation import one_of

GAMES = (*short_game.BETA, "stories", "gemma3_270m", "smoke")
VALUES = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)
FEW = (0.0, 0.1, 1.0)  # if a run takes half an hour


def sweep(game):
  if game == "gemma3_270m":
    return [{"algorithm.kappa": value} for value in FEW]
  harmonic = {"label": "kappa = 10/(k+10)", "algorithm.kappa_schedule": "harmonic"}
  return [{"algorithm.kappa": value} for value in VALUES] + [harmonic]


def base(game):
  """Returns the run that an ablation changes, by the game's name, one of GAMES."""
  one_of("the word after the colon", game, GAMES)
  if game == "gemma3_270m":
    return gemma3_270m_compare.base()
  if game == "stories":
    c = stories.get_config()
    c.steps = 40  # as in the comparison of methods
    return c
  c = short_game.get_config("mild" if game == "smoke" else game)
  c.optimizer = config.optimizer(name="sgd", clip_norm=1e9, learning_rate=10.0)
  if game == "smoke":
    c.steps, c.evaluation.every = 20, 10
  return c


def kinds_and_seeds(game):
  """Returns the kinds of policies and the number of seeds of an ablation."""
  if game in ("stories", "gemma3_270m"):
    return {"kinds": ("network",), "seeds": 1}
  return {"kinds": ("tabular",), "seeds": 3}


def get_config(game="mild"):
  return config.compare(base(game), sweep(game), **kinds_and_seeds(game))

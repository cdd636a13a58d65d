"""Comparisons of runs on texts, of made-up records."""

from nash_jax.configs import stories_compare

# Win rate and KL by method and learning rate: at β = .05, nats cost nash_mp its larger rate.
ENDS = {
  ("nash_mp", 1e-4): (0.74, 2.8),
  ("nash_mp", 3e-4): (0.80, 9.0),
  ("reg_self_play", 1e-4): (0.60, 2.0),
  ("reg_self_play", 3e-4): (0.70, 2.5),
}


def config(*names):
  c = stories_compare.get_config("paper")
  c.runs = tuple({"algorithm.name": name} for name in names)
  c.learning_rates = tuple(sorted({rate for _, rate in ENDS}))
  return c


def labelled(*runs):
  c = config()
  c.runs = tuple({"algorithm.name": "nash_mp", **run} for run in runs)
  c.learning_rates = ()
  c.base.optimizer.learning_rate = 1e-4
  return c

"""Does NashMP's theorem hold, for every β and number of actions, and what do other steps do?

    nash-jax games --config=games/theorem --workdir=runs/theorem

Cost: about 4 minutes on 2 cores and 5 GB, nearly all of it the games of 10,000 actions; seconds as
games/theorem:smoke. Expected: theorem_slopes.csv with worst_kl_over_bound ≤ 1 everywhere, both
slopes at or below the promised one, hardly any change from 3 to 10,000 actions; KL rises somewhere
only well above η = 2β.
"""

from ml_collections import config_dict


def get_config(size="full"):
  if size not in ("full", "smoke"):
    raise ValueError(f"size must be full or smoke, got {size!r}.")
  config = config_dict.ConfigDict(
    {
      "job": "games",
      "study": "theorem",
      "seed": 0,
      "contexts": None,  # one game [A A]
      "rank": 4,
      "strength": 2.0,
      "actions": (3, 10, 100, 1_000, 10_000),
      "betas": (0.05, 0.15, 0.45),
      "iterations": 400,
      "iterations_large": 60,  # at 10,000 actions an iteration reads P twice: 1.6 GB
      "actions_steps": 100,  # the size on which other steps are tried
      "eta_multiples": (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0),
      "step_iterations": 40,
    }
  )
  if size == "smoke":
    config.update(
      actions=(3, 8),
      actions_steps=8,
      betas=(0.1, 0.4),
      iterations=80,
      step_iterations=20,
      eta_multiples=(0.5, 1.0),
    )
  config.figures = {"theorem": {"size": (4, 2.7), "panels": (panels(config),)}}
  return config


def panels(config):
  beta, actions = config.betas[0], config.actions_steps
  curves = {"table": "theorem_curves", "x": "k"}
  one_beta, one_size = {"where": {"beta": beta}}, {"where": {"actions": actions}}
  axes = {"yscale": "log", "xlabel": "iteration K", "ylim": (1e-30, None)}
  return (
    {
      "title": f"any number of actions, β = {beta:g}",
      "ylabel": "KL(π*‖π_K), nats",
      **axes,
      "layers": (
        curves | one_beta | {"y": "kl", "by": "actions", "label": "A = {actions:,}"},
        curves
        | {"where": {"beta": beta, "actions": config.actions[0]}}
        | {"y": "bound", "style": "k:", "label": "bound"},
      ),
    },
    {
      "title": f"against the bound (dotted), A = {actions:,}",
      **axes,
      "layers": (
        curves | one_size | {"y": "kl", "by": "beta", "label": "β = {beta:g}"},
        curves | one_size | {"y": "bound", "by": "beta", "style": ":"},
      ),
    },
    {
      "title": f"other steps: KL after {config.step_iterations} iterations",
      "xlabel": "η in units of 2β",
      "xscale": "log",
      "yscale": "log",
      "layers": (
        {
          "table": "theorem_steps",
          "x": "eta_over_2beta",
          "y": "kl",
          "by": "beta",
          "style": "o-",
          "label": "β = {beta:g}",
        },
      ),
    },
  )

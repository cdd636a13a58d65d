"""How many queries of P(·≻π) does each method need, regularised and in the original game?

    nash-jax games --config=games/rates --workdir=runs/rates

Cost: a minute on 2 cores; seconds as games/rates:smoke. Expected: rates.csv, where NashMP's own
step needs tens to a few hundred queries and the steps of the others' theories thousands or never;
tuned, EGPO equals NashMP (they are one iteration) and MMD is close. original_game.csv with NashMP's
slope near 1.
"""

from ml_collections import config_dict


def get_config(size="full"):
  if size not in ("full", "smoke"):
    raise ValueError(f"size must be full or smoke, got {size!r}.")
  config = config_dict.ConfigDict(
    {
      "job": "games",
      "study": "rates",
      "games": 10,
      "contexts": None,  # games [A A]
      "actions": 10,
      "rank": 4,
      "strength": 2.0,
      "betas": (0.02, 0.05, 0.1, 0.2),
      "queries": 20_000,  # everybody's budget
      "methods": (
        *(
          ("proximal", method)
          for method in ("nash_mp", "egpo", "proximal_point", "mmd", "nash_md", "fictitious_play")
        ),
        *(
          ("gradient", method)
          for method in (
            "reg_self_play",
            "online_ipo",
            "online_dpo",
            "nash_md",
            "nash_mp",
            "nash_mp_two_step",
          )
        ),
      ),
      # s of proximal updates; of gradients the rate in units of ∇J
      "steps": (0.03, 0.1, 0.3, 1.0, 2.0, 3.0, 5.0, 10.0, 30.0),
      "targets": (1e-3, 1e-6, 1e-9),
      # (label, method, β): "epsilon" is ε/(2 log A), where SubOpt_β ≤ ε/2 suffices. Theory's steps.
      "original": (
        ("NashMP", "nash_mp", "epsilon"),
        ("MMD", "mmd", "epsilon"),
        ("Nash-MD", "nash_md", "epsilon"),
        ("MPO, β = 0.1", "mpo", 0.1),
        ("OMWU, s = 1/8", "omwu", 0.0),
        ("MWU, mean iterate", "mwu", 0.0),
        ("fictitious play", "fictitious_play", 0.0),
      ),
      "epsilons": (0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001),
      "iterations_original": 30_000,
      "figures": {
        "original_game": {
          "size": (5, 3.6),
          "panels": (
            (
              {
                "title": "the original game",
                "xlabel": "ε",
                "ylabel": "queries to an ε-equilibrium (median)",
                "xscale": "log",
                "yscale": "log",
                "xlim": (0.15, 7e-4),
                "layers": (
                  {
                    "table": "original_game",
                    "x": "epsilon",
                    "y": "median_queries",
                    "by": "method",
                    "style": "o-",
                    "label": "{method}: slope {fitted_slope:.2f}",
                  },
                ),
              },
            ),
          ),
        }
      },
    }
  )
  if size == "smoke":
    config.update(
      games=2,
      actions=4,
      betas=(0.3,),
      queries=120,
      steps=(0.5, 1.0),
      methods=(
        *(("proximal", method) for method in ("nash_mp", "egpo", "mmd")),
        ("gradient", "nash_mp"),
      ),
      targets=(1e-3, 1e-6),
      epsilons=(0.1, 0.03, 0.01),
      iterations_original=2_000,
      original=(("NashMP", "nash_mp", "epsilon"), ("MWU", "mwu", 0.0)),
    )
  return config

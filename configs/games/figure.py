"""The paper's figure: which method ends closest to equilibrium on the contextual game?

    nash-jax games --config=configs/games/figure.py --workdir=runs/figure

Cost: within 10 minutes on 2 cores, the grids included. Expected: among proximal updates NashMP is
exact to rounding; among exact gradients EGPO is (its step is a proximal update in disguise);
sampled, NashMP ends at .0021 after 50,000 steps, Online IPO at .0079. docs/games.md has the rest.

Sizes, β and rates are not published. Every entrant is tuned on games of its own by the same grid of
steps, in units of ∇J; those with a knob more (η, the mixture) try three values of it.
"""

from ml_collections import config_dict


def get_config():
  beta = 0.02
  etas = (2 * beta, 0.1, 0.5)
  gradient = (  # label, method, colour, knobs besides the step
    ("NashMP, κ = 10/(k+10)", "nash_mp_ema", 3, {"eta": etas, "kappa": ("harmonic",)}),
    ("NashMP, κ = 0.1", "nash_mp_ema", 1, {"eta": etas, "kappa": (0.1,)}),
    ("Online IPO", "online_ipo", 0, {}),
    ("Online DPO", "online_dpo", 5, {}),
    ("Nash-MD", "nash_md", 2, {"mixture": (0.01, 0.05, 0.25)}),
    ("MD", "mmd", 7, {}),
    ("EGPO", "egpo", 4, {}),
  )
  proximal = (
    ("NashMP", "nash_mp", 3, {}), ("EGPO (the same iteration)", "egpo", 4, {}),
    ("MD", "mmd", 7, {}), ("Nash-MD", "nash_md", 2, {}),
  )
  return config_dict.ConfigDict({
    "study": "figure",
    "contexts": 10,
    "actions": 20,
    "rank": 4,
    "strength": 2.0,
    "beta": beta,
    "seeds": tuple(range(10)),  # a game and its draws each
    "tuning_seeds": (100, 101),  # other games: no method is tuned on what it is scored by
    "horizons": (1_000, 10_000, 50_000),
    "points": 100,
    "csv_every": 4,
    # version, updates, pairs a context and step (0 is exact), everybody's steps, entrants
    "versions": (
      ("proximal updates", "proximal", 0, (0.03, 0.1, 0.3, 1.0, 2.0, 4.0), proximal),
      ("exact gradients", "gradient", 0, (0.3, 1.0, 3.0, 10.0, 30.0, 100.0), gradient),
      ("sampled, 8 pairs", "gradient", 8, (0.03, 0.1, 0.3, 1.0, 3.0, 10.0), gradient),
    ),
  })

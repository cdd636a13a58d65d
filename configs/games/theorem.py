"""Does NashMP's theorem hold, for every β and number of actions, and what do other steps do?

    nash-jax games --config=configs/games/theorem.py --workdir=runs/theorem

Cost: about 4 minutes on 2 cores and 5 GB, nearly all of it the games of 10,000 actions.
Expected: theorem_slopes.csv with worst_kl_over_bound ≤ 1 everywhere, both slopes at or below the
promised one, hardly any change from 3 to 10,000 actions; KL rises somewhere only well above η = 2β.
"""

from ml_collections import config_dict


def get_config():
  return config_dict.ConfigDict({
    "study": "theorem",
    "seed": 0,
    "rank": 4,
    "strength": 2.0,
    "actions": (3, 10, 100, 1_000, 10_000),
    "betas": (0.05, 0.15, 0.45),
    "iterations": 400,
    "iterations_large": 60,  # at 10,000 actions an iteration reads P twice: 1.6 GB
    "actions_steps": 100,  # the size on which other steps are tried
    "eta_multiples": (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0),
    "step_iterations": 40,
  })

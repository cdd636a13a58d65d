"""Why does a reward fail where preferences cycle?

    nash-jax games --config=configs/games/bradley_terry.py --workdir=runs/bradley_terry

Cost: seconds. Expected: as β falls the reward's policy becomes pure, the equilibrium stays mixed;
one vote among 30 flips the reward's policy and hardly moves the equilibrium; sampling one pair more
often changes the reward's fit and nothing about the preferences.
"""

from ml_collections import config_dict


def get_config():
  return config_dict.ConfigDict({
    "study": "bradley_terry",
    "payoffs": (0.5, 1.0, 0.8),  # of winning with rock, paper, scissors
    "betas": (1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005),
    "beta": 0.01,
    "votes": 30,
    "extra_votes": (-3, -2, -1, 0, 1, 2, 3),
    "law_weights": (0.25, 0.5, 0.8, 1.0, 1.25, 2.0, 4.0, 8.0),
  })

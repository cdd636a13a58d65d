"""How many inner steps T and pairs B does approximate NashMP need for an error in log π?

    nash-jax games --config=configs/games/approximation.py --workdir=runs/approximation

Cost: under a minute. Expected: the error falls geometrically in T and as B^(-1/2), the lemma's
orders.
"""

from ml_collections import config_dict


def get_config():
  return config_dict.ConfigDict({
    "study": "approximation",
    "seed": 0,
    "actions": 10,
    "rank": 4,
    "strength": 2.0,
    "beta": 0.1,
    "warmup": 3,  # exact iterations before the one that is approximated
    "step": 1.0,
    "inner_steps": (1, 10, 30, 60, 100, 150, 200, 300, 400, 600),
    "inner_sampled": 400,
    "step_sampled": 1.0,
    "batches": (4, 16, 64, 256, 1_024, 4_096),
    "repeats": 32,
  })

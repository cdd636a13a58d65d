"""Where does a prox centre help: against self-play, Online IPO and EGPO, and with which κ and η?

    nash-jax games --config=configs/games/map.py --workdir=runs/map

Cost: about 3 minutes on 2 cores. Expected: next to nothing gained while cycles are mild and β is
large; orders of magnitude at strong cycles, small β and large steps; less where noise decides.
"""

from ml_collections import config_dict


def get_config():
  return config_dict.ConfigDict({
    "study": "map",
    "contexts": 5,
    "actions": 20,
    "rank": 4,
    "strength": 2.0,
    "beta": 0.02,
    "seeds": (0, 1, 2),
    "iterations": 2_000,
    "betas": (0.1, 0.03, 0.01),
    "strengths": (0.5, 1.0, 2.0, 4.0),
    "batches": (0, 64, 8),
    "steps": (0.3, 1.0, 3.0, 10.0, 30.0),  # in units of ∇J
    "methods": (  # label, method, knobs; the first is compared with each of the others
      ("NashMP", "nash_mp_ema", {"eta": (0.2,), "kappa": (0.1,)}),
      ("self-play", "reg_self_play", {}),
      ("Online IPO", "online_ipo", {}),
      ("EGPO", "egpo", {}),
    ),
    "kappas": (0.01, 0.1, 0.3, 1.0, "harmonic"),
    "etas": (0.02, 0.1, 0.5, 2.0),
    "corners": (("mild cycles", 0.1, 0.5), ("strong cycles", 0.01, 4.0)),  # name, β, strength
  })

"""How many queries of P(·≻π) does each method need, regularised and in the original game?

    nash-jax games --config=configs/games/rates.py --workdir=runs/rates

Cost: about 4 minutes on 2 cores. Expected: rates.csv, where NashMP's own step needs tens to a few
hundred queries and the steps of the others' theories thousands or never; tuned, EGPO equals NashMP
(they are one iteration) and MMD is close. original_game.csv with NashMP's slope near 1.
"""

from ml_collections import config_dict


def get_config():
  return config_dict.ConfigDict({
    "study": "rates",
    "games": 10,
    "actions": 10,
    "rank": 4,
    "strength": 2.0,
    "betas": (0.02, 0.1),
    "queries": 20_000,  # everybody's budget
    "methods": (
      *(("proximal", method) for method in
        ("nash_mp", "egpo", "proximal_point", "mmd", "nash_md", "fictitious_play")),
      *(("gradient", method) for method in
        ("reg_self_play", "online_ipo", "online_dpo", "nash_md", "nash_mp_ema",
         "nash_mp_approximate")),
    ),
    # s of proximal updates; of gradients the rate in units of ∇J
    "steps": (0.03, 0.1, 0.3, 1.0, 2.0, 3.0, 5.0, 10.0, 30.0),
    "targets": (1e-3, 1e-6, 1e-9),
    # (label, method, β): "epsilon" is ε/(2 log A), where SubOpt_β ≤ ε/2 suffices. Theory's steps.
    "original": (
      ("NashMP", "nash_mp", "epsilon"), ("MMD", "mmd", "epsilon"),
      ("Nash-MD", "nash_md", "epsilon"), ("MPO, β = 0.1", "mpo", 0.1),
      ("OMWU, s = 1/8", "omwu", 0.0), ("MWU, mean iterate", "mwu", 0.0),
      ("fictitious play", "fictitious_play", 0.0),
    ),
    "epsilons": (0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001),
    "iterations_original": 30_000,
  })

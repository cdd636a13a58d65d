"""Where does a prox centre help: against self-play, Online IPO and EGPO, and with which κ and η?

    nash-jax games --config=games/map --workdir=runs/map

Cost: about 2 minutes on 2 cores; seconds as games/map:smoke. Expected: next to nothing gained while
cycles are mild and β is large; orders of magnitude at strong cycles, small β and large steps; less
where noise decides.
"""

from ml_collections import config_dict


def get_config(size="full"):
  if size not in ("full", "smoke"):
    raise ValueError(f"size must be full or smoke, got {size!r}.")
  config = config_dict.ConfigDict(
    {
      "job": "games",
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
        ("NashMP", "nash_mp", {"eta": (0.2,), "kappa": (0.1,)}),
        ("self-play", "reg_self_play", {}),
        ("Online IPO", "online_ipo", {}),
        ("EGPO", "egpo", {}),
      ),
      "kappas": (0.01, 0.1, 0.3, 1.0, "harmonic"),
      "etas": (0.02, 0.1, 0.5, 2.0),
      "corners": (("mild cycles", 0.1, 0.5), ("strong cycles", 0.01, 4.0)),  # name, β, strength
    }
  )
  if size == "smoke":
    config.update(
      contexts=1,
      actions=4,
      seeds=(0,),
      iterations=10,
      betas=(0.1,),
      strengths=(1.0, 4.0),
      batches=(0, 2),
      steps=(0.3, 3.0),
      kappas=(0.1,),
      etas=(0.1,),
      corners=(("mild", 0.1, 0.5),),
    )
  config.figures = {
    "map": {
      "size": (3.2, 2),
      "colorbar": "log10 SubOpt_β of the rival / NashMP",
      "panels": tuple(
        tuple(gain(rival, beta, batch) for batch in config.batches)
        for rival, *_ in config.methods[1:]
        for beta in config.betas
      ),
    },
    "kappa_eta": {
      "size": (3.4, 2.6),
      "panels": tuple(
        tuple(best(*corner, batch) for corner in config.corners) for batch in config.batches
      ),
    },
  }
  return config


def pairs(batch):
  return f"{batch} pairs" if batch else "exact"


def gain(rival, beta, batch):
  return {
    "title": f"vs {rival}, β = {beta:g}, {pairs(batch)}",
    "ylabel": "strength",
    "xlabel": "step (units of ∇J)",
    "layers": (
      {
        "table": "map_gain",
        "where": {"rival": rival, "beta": beta, "batch": batch},
        "x": "step",
        "y": "strength",
        "value": "gain",
        "cmap": "RdBu",
        "vmin": -2,
        "vmax": 2,
      },
    ),
  }


def best(name, beta, strength, batch):
  """log10 SubOpt_β of NashMP at the best of its steps."""
  return {
    "title": f"{name}, {pairs(batch)}",
    "xlabel": "κ",
    "ylabel": "η",
    "layers": (
      {
        "table": "kappa_eta",
        "where": {"beta": beta, "strength": strength, "batch": batch},
        "x": "kappa",
        "y": "eta",
        "value": "log10_subopt",
        "cmap": "viridis_r",
      },
    ),
  }

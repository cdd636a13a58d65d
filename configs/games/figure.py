"""The paper's figure: which method ends closest to equilibrium on the contextual game?

    nash-jax games --config=games/figure --workdir=runs/figure

Cost: 255 CPU seconds, the grids included; seconds as games/figure:smoke. Expected: among proximal
updates NashMP is exact to rounding; among exact gradients EGPO is (its step is a proximal update in
disguise); sampled, NashMP ends at .0021 after 50,000 steps, Online IPO at .0089. docs/games.md has
the rest.

Sizes, β and rates are not published. Every entrant is tuned on games of its own by the same grid of
steps, in units of ∇J; those with a knob more (η, the mixture) try three values of it.
"""

from ml_collections import config_dict


def get_config(size="full"):
  if size not in ("full", "smoke"):
    raise ValueError(f"size must be full or smoke, got {size!r}.")
  beta = 0.02
  etas = (2 * beta, 0.1, 0.5)
  gradient = (  # label, method, knobs besides the step
    ("NashMP, κ = 10/(k+10)", "nash_mp", {"eta": etas, "kappa": ("harmonic",)}),
    ("NashMP, κ = 0.1", "nash_mp", {"eta": etas, "kappa": (0.1,)}),
    ("Online IPO", "online_ipo", {}),
    ("Online DPO", "online_dpo", {}),
    ("Nash-MD", "nash_md", {"mixture": (0.01, 0.05, 0.25)}),
    ("MD", "mmd", {}),
    ("EGPO", "egpo", {}),
  )
  proximal = (
    ("NashMP", "nash_mp", {}),
    ("EGPO (the same iteration)", "egpo", {}),
    ("MD", "mmd", {}),
    ("Nash-MD", "nash_md", {}),
  )
  config = config_dict.ConfigDict(
    {
      "job": "games",
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
      "csv_every": 2,
      # version, updates, pairs a context and step (0 is exact), everybody's steps, entrants
      "versions": (
        ("proximal updates", "proximal", 0, (0.03, 0.1, 0.3, 1.0, 2.0, 4.0), proximal),
        ("exact gradients", "gradient", 0, (0.3, 1.0, 3.0, 10.0, 30.0, 100.0), gradient),
        ("sampled, 8 pairs", "gradient", 8, (0.03, 0.1, 0.3, 1.0, 3.0, 10.0), gradient),
      ),
    }
  )
  if size == "smoke":
    config.update(
      contexts=2,
      actions=4,
      seeds=(0, 1),
      tuning_seeds=(5,),
      horizons=(20, 40),
      points=10,
      csv_every=1,
      versions=tuple((*version, (1.0,), entrants[:1]) for *version, _, entrants in config.versions),
    )
  config.figures = {
    "figure": {
      "size": (3.8, 2.7),
      "panels": tuple(
        tuple(panel(version, horizon, config.horizons) for horizon in config.horizons)
        for version, *_ in config.versions
      ),
    }
  }
  return config


def panel(version, horizon, horizons):
  styles = {
    "NashMP": "C3-",
    "NashMP, κ = 10/(k+10)": "C3-",
    "NashMP, κ = 0.1": "C1--",
    "Online IPO": "C0-",
    "Online DPO": "C5--",
    "Nash-MD": "C2-",
    "MD": "C7--",
    "EGPO": "C4-",
    "EGPO (the same iteration)": "C4--",
  }
  return {
    "title": f"{version}, {horizon:,} steps",
    "xlabel": "step",
    "yscale": "log",
    "ylabel": "SubOpt_β, last iterate" if horizon == horizons[0] else "",
    "ylim": (1e-3, 0.5) if version.startswith("sampled") else (1e-16, 1),  # rounding's realm
    "legend": {"loc": "center left", "bbox_to_anchor": (1, 0.5)},
    "layers": (
      {
        "table": "figure_curves",
        "x": "step",
        "y": "mean",
        "by": "method",
        "where": {"version": version, "horizon": horizon},
        "styles": styles,
        "band": ("low95", "high95"),
        "label": "{method}" if horizon == horizons[-1] else "_",
      },
    ),
  }

"""How fast do methods that learn from episodes alone solve games of imperfect information?

    nash-jax games --config=games/trees --workdir=runs/trees

Needs the extra `games`: pip install 'nash_jax[games]'. games/trees:kuhn_poker studies one game,
games/trees:smoke takes seconds, and the full size about half an hour of one CPU core. Found: slopes
of about -1/2 on logarithmic axes, methods within a factor of two of each other once tuned for the
episodes that they play, and Tweaked FTRL ahead (docs/trees.md). It writes trees.csv, and every
final average policy as policies/GAME_METHOD_SEED.json.
"""

from ml_collections import config_dict

EPISODES = {"kuhn_poker": 10_000_000, "leduc_poker": 10_000_000, "liars_dice": 10_000_000}
METHODS = ("ixomd", "balanced_omd", "balanced_ftrl", "adaptive_ftrl", "tweaked_ftrl")


def get_config(size="full"):
  if size not in ("full", "smoke", *EPISODES):
    raise ValueError(f"size must be full, smoke, or one of {', '.join(EPISODES)}, got {size!r}.")
  games = (size,) if size in EPISODES else tuple(EPISODES)
  config = config_dict.ConfigDict(
    {
      "job": "games",
      "study": "trees",
      "trees": games,  # as OpenSpiel names them
      "episodes": tuple(EPISODES[game] for game in games),
      "methods": METHODS,
      "theory": METHODS[:4],  # drawn at the rates of their bounds, too
      "baselines": ("cfr_plus", "mccfr"),  # OpenSpiel's CFR+ and outcome-sampling MCCFR
      "baseline_episodes": 10_000_000,  # at most
      # of the rates of theory; η is tuned, and γ = η/20
      "multipliers": tuple(float(f"{10 ** (k / 4):.3g}") for k in range(-12, 17)),
      "tuning_episodes": 100_000,
      "tuning_seed": 1000,
      "seeds": (0, 1, 2, 3),
      "points": 50,
      "first_point": 1000,
    }
  )
  if size == "smoke":
    config.update(
      trees=("kuhn_poker",),
      episodes=(20_000,),
      tuning_episodes=5_000,
      multipliers=(0.1, 1.0, 10.0),
      theory=("balanced_ftrl",),
      baseline_episodes=5_000,
      seeds=(0, 1),
      points=6,
    )
  config.figures = {"trees": {"size": (4, 3.2), "panels": (panels(config),)}}
  return config


def panels(config):
  """Returns a panel a game: a line a method, and one at the rates of theory."""
  drawn = (*config.methods, *config.baselines)
  styles = {name: f"C{i}-" for i, name in enumerate(drawn)}
  styles |= {f"theory: {name}": "k:" for name in config.theory[:1]}
  return tuple(
    {
      "title": game,
      "xlabel": "episodes",
      "ylabel": "gap of the average policies",
      "xscale": "log",
      "yscale": "log",
      **({"ylim": (0.03, 1.5)} if game == "liars_dice" else {}),  # two decades, for two labels
      "legend": {"fontsize": 6},
      "layers": tuple(
        {
          "table": "trees_curves",
          "where": {"game": game, "method": method},
          "x": "episodes",
          "y": "mean",
          "style": style,
          "label": "{method}",
          "band": ("low", "high"),
        }
        for method, style in styles.items()
      ),
    }
    for game in config.trees
  )

"""Joins the games of studies, draws trees and trees_end, and writes trees_published.csv.

python docs/games/trees.py --runs FOLDER ... --at-the-end FOLDER ...

FOLDERs are workdirs of `nash-jax games --config=games/trees:GAME`: the first tuned at 100,000
episodes, the second at all of their episodes. Published gaps were read off a plot, to about 10%.
"""

import argparse
import csv
import pathlib

import numpy as np

from nash_jax.configs.games import trees as trees_config
from nash_jax.games import charts

FOLDER = pathlib.Path(__file__).parent
PUBLISHED = {  # Fiegel et al. (2212.12567): gaps at these numbers of episodes
  "kuhn_poker": {
    "ixomd": {1e5: 0.039, 1e6: 0.0050, 1e7: 0.0015},
    "balanced_omd": {1e5: 0.067, 1e6: 0.0085, 1e7: 0.0016},
    "balanced_ftrl": {1e5: 0.065, 1e6: 0.0078, 1e7: 0.0013},
    "adaptive_ftrl": {1e5: 0.065, 1e6: 0.014, 1e7: 0.0024},
    "tweaked_ftrl": {1e5: 0.011, 1e6: 0.0037, 1e7: 0.0009},
  },
  "leduc_poker": {
    "ixomd": {1e6: 0.054, 1e7: 0.014},
    "balanced_omd": {1e6: 0.068, 1e7: 0.016},
    "balanced_ftrl": {1e6: 0.054, 1e7: 0.015},
    "adaptive_ftrl": {1e6: 0.105, 1e7: 0.031},
    "tweaked_ftrl": {1e6: 0.042, 1e7: 0.012},
  },
  "liars_dice": {
    "ixomd": {1e6: 0.29, 1e7: 0.066},
    "balanced_omd": {1e6: 0.30, 1e7: 0.074},
    "balanced_ftrl": {1e6: 0.30, 1e7: 0.072},
    "adaptive_ftrl": {1e6: 0.63, 1e7: 0.25},
    "tweaked_ftrl": {1e6: 0.15, 1e7: 0.041},
  },
}


def read(folders, name):
  rows = []
  for folder in folders:
    with open(pathlib.Path(folder) / f"{name}.csv", encoding="utf-8", newline="") as file:
      rows += list(csv.DictReader(file))
  return rows


def write(name, rows):
  with open(FOLDER / f"{name}.csv", "w", encoding="utf-8", newline="") as file:
    writer = csv.DictWriter(file, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


def at(curves, game, method, episodes, column="mean"):
  """Returns a gap between two measured points, straight on logarithmic axes; "" beyond them."""
  chosen = [row for row in curves if (row["game"], row["method"]) == (game, method)]
  if not chosen or not chosen[0]["episodes"] <= episodes <= 1.001 * chosen[-1]["episodes"]:
    return ""
  t, gap = np.log([(row["episodes"], row[column]) for row in chosen]).T
  return f"{np.exp(np.interp(np.log(episodes), t, gap)):.3g}"


def numbers(rows):
  names = "episodes", "mean", "low", "high"
  return [row | {name: float(row[name]) for name in names} for row in rows]


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--runs", nargs="+", required=True)
parser.add_argument("--at-the-end", nargs="*", default=[])
flags = parser.parse_args()
both = (("1e5", flags.runs), ("the end", flags.at_the_end))
write("trees_curves", read(flags.runs, "trees_curves"))
for name in ("trees_tuned", "trees_grid", "trees_slopes"):
  write(name, [{"tuned_at": when} | row for when, folders in both for row in read(folders, name)])
curves = numbers(read(flags.runs, "trees_curves"))
later = numbers(read(flags.at_the_end, "trees_curves"))
compared = [
  {
    "game": game,
    "method": method,
    "episodes": int(episodes),
    "published": published.get(method, {}).get(episodes, ""),
    "tuned_at_1e5": at(curves, game, method, episodes),
    "low": at(curves, game, method, episodes, "low"),
    "high": at(curves, game, method, episodes, "high"),
    "tuned_at_the_end": at(later, game, method, episodes),
  }
  for game, published in PUBLISHED.items()
  for method in dict.fromkeys(row["method"] for row in curves if row["game"] == game)
  for episodes in (1e5, 1e6, 1e7)
]
write("trees_published", compared)
for row in compared:
  print(*row.values(), sep=" | ")
config = trees_config.get_config()
charts.draw(FOLDER / "trees", {"trees_curves": curves}, **config.figures["trees"])
charts.draw(FOLDER / "trees_end", {"trees_curves": later}, **config.figures["trees"])

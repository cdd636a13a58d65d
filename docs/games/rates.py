"""Draws rates.png and rates.svg from rates.csv, and prints what it draws.

python docs/games/rates.py
"""

import collections
import csv
import math
import pathlib

import matplotlib.pyplot as plt

FOLDER = pathlib.Path(__file__).parent
TARGET = "1e-06"
NAMES = {
  "nash_mp": "NashMP",
  "egpo": "EGPO",
  "mmd": "MMD",
  "nash_md": "Nash-MD",
  "fictitious_play": "fictitious play",
  "proximal_point": "proximal point",
  "reg_self_play": "self-play = Online IPO",
  "nash_mp_ema": "EMA-NashMP",
  "nash_mp_approximate": "approximate NashMP",
}
PROXIMAL = ("nash_mp", "egpo", "mmd", "nash_md", "fictitious_play", "proximal_point")
PANELS = (  # title, updates, step_choice, methods
  ("proximal updates, theory's step", "proximal", "theory", PROXIMAL),
  ("proximal updates, best step", "proximal", "best", ("nash_mp", "mmd", "nash_md")),
  (
    "exact gradients, best step",
    "gradient",
    "best",
    ("reg_self_play", "nash_mp_ema", "nash_mp_approximate"),
  ),
)

with (FOLDER / "rates.csv").open(encoding="utf-8", newline="") as file:
  queries = collections.defaultdict(dict)  # by (updates, choice, method): the median by β
  for row in csv.DictReader(file):
    median = float(row["median_queries"])
    if row["target"] == TARGET and math.isfinite(median):
      key = row["updates"], row["step_choice"], row["method"]
      queries[key][float(row["beta"])] = median

figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), sharey=True, layout="constrained")
for axis, (title, updates, choice, methods) in zip(axes, PANELS, strict=True):
  print(title)
  for method in methods:
    label = NAMES[method]
    if (updates, choice, method) == ("proximal", "best", "nash_mp"):
      label = "NashMP = EGPO"
    betas, medians = zip(*sorted(queries[updates, choice, method].items()), strict=True)
    print(
      f"  {label}:", ", ".join(f"β = {b:g}: {m:,g}" for b, m in zip(betas, medians, strict=True))
    )
    # A method has one colour in all panels.
    axis.plot(betas, medians, "o-", ms=4, label=label, color=f"C{list(NAMES).index(method)}")
  axis.set(title=title, xlabel="β", xscale="log", yscale="log", xlim=(0.23, 0.0175), ylim=(2, 3e4))
  axis.set_xticks([0.2, 0.1, 0.05, 0.02], ["0.2", "0.1", "0.05", "0.02"])
  axis.minorticks_off()
  axis.grid(alpha=0.3)
  axis.legend(fontsize=7.5, ncols=2, loc="lower right")
axes[0].set_ylabel("median queries to SubOpt 1e-6")
for suffix in ("png", "svg"):
  figure.savefig(FOLDER / f"rates.{suffix}", dpi=150)

"""Draws benchmarks.png from ratios.csv and true_size.csv, and prints what it draws.

python docs/benchmarks/draw.py

The two files hold figures of docs/benchmarks.md.
"""

import csv
import pathlib

import matplotlib.pyplot as plt

FOLDER = pathlib.Path(__file__).parent


def read(name):
  with (FOLDER / name).open(encoding="utf-8", newline="") as file:
    return list(csv.DictReader(file))


figure, (left, right) = plt.subplots(1, 2, figsize=(11, 2.8), layout="constrained")

ratios = read("ratios.csv")[::-1]
bars = left.barh(
  [f"{row['work']}\nagainst {row['peer']}" for row in ratios],
  [float(row["times_as_long"]) for row in ratios],
  color="C0",
  height=0.6,
)
left.bar_label(bars, [row["times_as_long"] for row in ratios], padding=3)
left.axvline(1, color="k", lw=1, ls=":")
left.set(title="time of the peer (nash_jax = 1)", xlim=(0, 14))
print("time of the peer (nash_jax = 1)")
for row in ratios[::-1]:
  print(f"  {row['work']}, against {row['peer']}: {row['times_as_long']}")

phases = read("true_size.csv")[::-1]
names = [row["phase"] for row in phases]
measured, best = ([float(row[f"{k}_s"]) for row in phases] for k in ("measured", "at_best"))
right.barh(names, measured, color="C0", alpha=0.4, height=0.6, label="measured")
right.barh(names, best, color="C0", height=0.6, label="at the data sheet's speeds")
right.set(title="an iteration of Gemma-2 2B, 9B judge, H200", xlabel="seconds")
right.legend(loc="upper right", fontsize=8)
right.set_xlim(0, 2.6)
print("an iteration of Gemma-2 2B, 9B judge, H200")
for row in phases[::-1]:
  print(f"  {row['phase']}: {row['measured_s']} s measured, {row['at_best_s']} s at best")

figure.savefig(FOLDER / "benchmarks.png", dpi=150)

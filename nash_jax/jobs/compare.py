"""Runs side by side: methods, each at its own tuned learning rate, or the values of an ablation.

workdir/<policy>/<run>/rate_<r>/seed_<s>   the record of every run
workdir/results.json, compare.md           the results and their tables; figures beside them
workdir/arena/seed_<s>                     who beats whom, where responses are texts
"""

import json
import math
import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from nash_jax import report
from nash_jax.config import describe, resolve
from nash_jax.config.unread import changed
from nash_jax.jobs import arena, sweep
from nash_jax.run.checkpoint import Workdir, differences

SUBOPT, KL_TO_EQUILIBRIUM = "exact/suboptimality", "exact/kl_to_equilibrium"
WIN, KL = "eval/win_rate_vs_reference", "eval/kl_to_reference"

Result = dict[str, Any]  # of a run's seeds: "learning_rate", "beta", "tuning", "seeds"
Setting = tuple[str, float | None, int]  # of a run: name, learning rate, seed
Table = tuple[str, list[str], dict[str, list[str]]]  # title, columns, cells by run


def run(config: ConfigDict, workdir: Workdir, progress: bool = True) -> dict[str, dict[str, Any]]:
  """Tunes, runs and evaluates what `config` (see config.compare) lists; resumes if interrupted.

  Where `learning_rates` names several, each run takes the one that is best with `tuning_seed`: by
  the last SubOpt_β where that is exact, else by the regularised win rate P(π≻π_ref) − β·KL under
  the training judge on the evaluated held-out prompts. Then it is run with every seed.

  Returns:
    What workdir/results.json holds: figures by policy and run, and the tables of the arena.

  Raises:
    ValueError: a bad config, or a workdir that holds runs of another.
  """
  config, folder = resolve(config, "compare"), pathlib.Path(workdir)
  results = {policy: _tune_and_run(config, folder, policy, progress) for policy in config.kinds}
  if config.arena.judges:
    results["arena"] = _run_arenas(config, results["network"], folder / "arena")
  (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
  text = "\n\n".join(_tables(config, results))
  (folder / "compare.md").write_text(text + "\n")
  for policy in config.kinds:
    _figure(config, results[policy], folder / f"curves_{policy}.png")
  print(f"{text}\n\ntables: {folder}/compare.md, figures: {folder}/curves_*.png")
  return results


def label(changes: ConfigDict | dict[str, Any]) -> str:
  """Returns the name of a run: its "label", its algorithm, or its changes."""
  fields: dict[str, Any] = dict(changes)
  values = (f"{k.rpartition('.')[2]} = {v}" for k, v in fields.items() if k != "label")
  return fields.get("label", fields.get("algorithm.name") or ", ".join(values))


def run_config(
  config: ConfigDict, changes: dict[str, Any], rate: float | None, seed: int
) -> ConfigDict:
  """Returns the base config with a run's changes, learning rate and seed."""
  c = changed(config.base, changes)
  c.seed = seed
  if rate is not None:
    c.optimizer.learning_rate = rate
  return c.lock()  # what no run reads is said once, of the whole comparison


def _folder(name: str, rate: float | None, seed: int) -> str:
  rate_folder = "" if rate is None else f"rate_{rate:g}/"
  return f"{name.replace(' ', '').replace(',', '_')}/{rate_folder}seed_{seed}"


def _tune_and_run(config, folder: pathlib.Path, policy: str, progress: bool) -> dict[str, Result]:
  """Returns {run: {"learning_rate", "beta", "tuning": {rate: score}, "seeds": [their records]}}."""
  changes, folder = {label(item): dict(item) for item in config.runs}, folder / policy
  rates, seeds = tuple(config.learning_rates) or (None,), range(config.seeds)

  def run_all(settings: Iterable[Setting]) -> dict[Setting, ConfigDict]:
    configs = {
      (name, rate, seed): run_config(config, changes[name], rate, seed)
      for name, rate, seed in settings
    }
    sweep.run({_folder(*key): c for key, c in configs.items()}, folder, policy, progress)
    return configs

  scores: dict[str, dict[float | None, float]] = {name: {} for name in changes}
  if len(rates) > 1:
    tuned = run_all((name, rate, config.tuning_seed) for name in changes for rate in rates)
    for (name, rate, seed), c in tuned.items():
      scores[name][rate] = _score(c, folder / _folder(name, rate, seed))
  best = {run: max(tried, key=tried.__getitem__, default=rates[0]) for run, tried in scores.items()}
  configs = run_all((name, best[name], seed) for name in changes for seed in seeds)
  return {
    name: {
      "learning_rate": configs[name, rate, 0].optimizer.learning_rate,
      "beta": configs[name, rate, 0].algorithm.beta,
      "tuning": {f"{rate:g}": score for rate, score in scores[name].items()},
      "seeds": [_record(config.base, folder / _folder(name, rate, seed)) for seed in seeds],
    }
    for name, rate in best.items()
  }


def _record(config, folder: pathlib.Path) -> dict[str, Any]:
  """Returns {"steps": …, metric: values} of one run, None from where it was no longer finite."""
  metrics = (SUBOPT, KL_TO_EQUILIBRIUM) if config.evaluation.exact else (WIN, KL)
  series = report.read_metrics(folder)
  steps = sorted({*range(0, config.steps, config.evaluation.every), config.steps})
  by_step = {metric: dict(zip(*series[metric], strict=True)) for metric in metrics}
  values = {metric: [by_step[metric].get(step) for step in steps] for metric in metrics}
  return {"steps": steps, **values, "folder": str(folder)}


def _score(config, folder: pathlib.Path) -> float:
  """Returns what the tuning maximises; -inf for a run that was not finite at its end."""
  result = {"seeds": [_record(config, folder)], "beta": config.algorithm.beta}
  exact = config.evaluation.exact
  score = -_values(result, SUBOPT)[0, -1] if exact else _regularised_win_rate(result)[0]
  return -math.inf if np.isnan(score) else float(score)


def _values(result: Result, metric: str) -> np.ndarray:
  """Returns a metric of every seed at every evaluation, [seeds, evaluations]; NaN for None."""
  return np.array([seed[metric] for seed in result["seeds"]], float)


def _regularised_win_rate(result: Result) -> np.ndarray:
  """Returns the seeds' last P(π≻π_ref) − β·KL(π‖π_ref), [seeds]."""
  return _values(result, WIN)[:, -1] - result["beta"] * _values(result, KL)[:, -1]


def _median_and_range(result: Result, metric: str) -> list[float]:
  """Returns [median, least, greatest] of the seeds' last values; NaN where one is not finite."""
  last = _values(result, metric)[:, -1]
  return [float(summarise(last)) for summarise in (np.median, np.min, np.max)]


def _sorted(results: dict[str, Result], metric: str, sign: int) -> list[tuple[str, Result]]:
  """Returns (run, result) by median, the least first where sign is 1; what diverged is last."""
  medians = {name: sign * _median_and_range(result, metric)[0] for name, result in results.items()}
  return sorted(results.items(), key=lambda item: (np.isnan(medians[item[0]]), medians[item[0]]))


def _scientific(value: float) -> str:
  return "—" if np.isnan(value) else f"{value:.2e}"


def _tables(config, results: dict[str, dict[str, Any]]) -> list[str]:
  make_table = _exact_table if config.base.evaluation.exact else _win_rate_table
  steps_and_seeds = f"Steps: {config.base.steps}, seeds: {config.seeds}."
  out = []
  for policy in config.kinds:
    title, columns, cells_by_run = make_table(results[policy])
    rates = {name: f"{result['learning_rate']:g}" for name, result in results[policy].items()}
    rows = [[name, rates[name], *cells] for name, cells in cells_by_run.items()]
    table = report.markdown_table(["run", "learning rate", *columns], rows)
    out.append(f"## {policy}: {title}\n\n{steps_and_seeds}\n\n{table}")
  for judge, tables in results.get("arena", {}).items():
    for name, cells in tables.items():
      title = f"Arena, judge {judge}: {name.replace('_', ' ')}, mean over seeds of mean ± 3σ"
      out.append(f"## {title}\n\n{report.win_rate_table(cells)}")
  return out


def _exact_table(results: dict[str, Result]) -> Table:
  """Returns the table of the runs by SubOpt_β of their last iterate."""
  starts = {name: result["seeds"][0][SUBOPT][0] for name, result in results.items()}  # depends on β
  ends = " to ".join(dict.fromkeys(f"{end(starts.values()):.2e}" for end in (min, max)))
  cells = {}
  for name, result in _sorted(results, SUBOPT, 1):
    subopt = _median_and_range(result, SUBOPT)
    kl = _median_and_range(result, KL_TO_EQUILIBRIUM)[0]
    share = report.number(subopt[0] / starts[name])
    cells[name] = [*map(_scientific, subopt), share, _scientific(kl)]
  columns = ["SubOpt, median", "least", "greatest", "of reference's", "KL(π*‖π)"]
  return f"SubOpt_β of the last iterate; the reference's is {ends}", columns, cells


def _win_rate_table(results: dict[str, Result]) -> Table:
  """Returns the table of the runs by their last win rate against the reference."""
  cells = {}
  for name, result in _sorted(results, WIN, -1):
    kl = report.number(_median_and_range(result, KL)[0], 2)
    regularised = report.number(float(np.median(_regularised_win_rate(result))))
    win_rates = map(report.number, _median_and_range(result, WIN))
    cells[name] = [*win_rates, kl, regularised]
  columns = ["win rate, median", "least", "greatest", "KL, nats", "win rate − β·KL"]
  return "Against the reference, under the training judge", columns, cells


def _run_arenas(config, results: dict[str, Result], folder: pathlib.Path) -> dict[str, dict]:
  """Holds an arena of all runs and the base for every seed; returns the tables' means by judge."""
  arenas = []
  for seed in range(config.seeds):
    c = config.arena.copy_and_resolve_references().unlock()
    c.seed, c.base = seed, "reference"
    c.policies = {
      name.replace(".", "_"): {"weights": result["seeds"][seed]["folder"], "best_of": 1}
      for name, result in results.items()
    }
    c.policies.reference = {"weights": config.base.model.weights, "best_of": 1}
    path = folder / f"seed_{seed}" / "arena.json"
    previous: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    # One that was held before there were other runs is held again.
    keep = previous and not differences(previous["config"], describe(resolve(c)))
    arenas.append(previous if keep else arena.run(c, path.parent))
  return {
    judge: {
      table: _mean_cells([result["judges"][judge][table] for result in arenas])
      for table in ("win_rate", "length_matched")
    }
    for judge in arenas[0]["judges"]
  }


def _mean_cells(tables: list[report.Cells]) -> report.Cells:
  """Returns the cells' means over seeds; 3σ is the seeds' mean 3σ, for they share their prompts."""

  def mean(row, column):
    cells = [table[row][column] for table in tables]
    if any(cell["mean"] is None or cell["sigma3"] is None for cell in cells):
      return {"mean": None, "sigma3": None, "n": 0, "significant": False}
    m, s = (float(np.mean([cell[name] for cell in cells])) for name in ("mean", "sigma3"))
    n = sum(cell["n"] for cell in cells)
    return {"mean": m, "sigma3": s, "n": n, "significant": abs(m - 0.5) > s}

  return {row: {column: mean(row, column) for column in line} for row, line in tables[0].items()}


def _figure(config, results: dict[str, Result], path: pathlib.Path) -> None:
  """Draws SubOpt_β against steps, or win rate against KL, a line a run: the median of its seeds."""
  import matplotlib
  from matplotlib.figure import Figure

  exact = config.base.evaluation.exact
  figure = Figure(figsize=(7.5, 4.6), layout="constrained")
  axes = figure.subplots()
  colours = matplotlib.colormaps["turbo"](np.linspace(0.05, 0.95, len(results)))
  for colour, (name, result) in zip(colours, results.items(), strict=True):
    width = 2.5 if name == "nash_mp" else 1.2
    style: dict[str, Any] = {"color": colour, "label": name, "linewidth": width}
    if exact:
      steps, values = result["seeds"][0]["steps"], _values(result, SUBOPT)
      axes.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.12, linewidth=0)
      axes.plot(steps, np.median(values, axis=0), **style)
    else:
      kl, win_rate = (np.median(_values(result, metric), axis=0) for metric in (KL, WIN))
      axes.plot(kl, win_rate, marker="o", markersize=3, **style)
  if exact:
    axes.set(yscale="log", xlabel="step", ylabel="SubOpt_β")
  else:
    axes.axhline(0.5, color="0.6", linewidth=1, linestyle="--")
    axes.set(xlabel="KL to the reference (nats a response)", ylabel="win rate, training judge")
  axes.spines[["top", "right"]].set_visible(False)
  axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
  figure.savefig(path, dpi=150)

"""Compares methods, each at its own tuned learning rate, or the values of an ablation.

workdir/<kind>/<run>/rate_<r>/seed_<s>     the record of every run, by kind of policy
workdir/results.json, compare.md           results and tables, with figures beside them
workdir/arena/seed_<s>                     who beats whom, if responses are texts
"""

import functools
import math
import pathlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from nash_jax import report
from nash_jax.config import resolve
from nash_jax.config.comparison import REFERENCE, Run, label, name_runs, rate_name, run_config
from nash_jax.jobs import arena, sweep
from nash_jax.run import files, lock, page
from nash_jax.run.checkpoint import Workdir
from nash_jax.types import ROUNDING
from nash_jax.validation import printable, require

__all__ = ["label", "run", "run_config"]

SUBOPT, KL_TO_EQUILIBRIUM = "exact/suboptimality", "exact/kl_to_equilibrium"
EXACT_WIN, EXACT_KL = "exact/win_rate_vs_reference", "exact/kl_to_reference"
GAP = "exact/gap"  # in the game without β
WIN, KL = "eval/win_rate_vs_reference", "eval/kl_to_reference"

Result = dict[str, Any]  # "learning_rate", "beta", "tuning" and "seeds" of a run
Setting = tuple[str, float | None, int]  # (run, learning rate, seed)
Table = tuple[str, list[str], dict[str, list[str]]]  # (title, columns, {run: cells})


def run(config: ConfigDict, workdir: Workdir, progress: bool = True) -> dict[str, dict[str, Any]]:
  """Tunes, runs and evaluates the runs of `config` (see config.compare); resumes if interrupted.

  If `learning_rates` has several values, each run takes the one that is best with `tuning_seed`.
  The score is the last SubOpt_β if that is exact, or the gap of the game without β if that is
  `tuning_metric`. Otherwise it is the regularised win rate P(π≻π_ref) − β·KL under the training
  judge on the evaluated held-out prompts after `tuning_steps`.
  Then it runs with every seed.

  Returns:
    The content of workdir/results.json: figures by policy and run, and the arena's tables.

  Raises:
    ValueError: a bad config; a workdir in use, with runs of another config, or with damaged ones.
  """
  config, folder = resolve(config, "compare"), files.make_folder(workdir)
  with lock.hold(folder):
    return _run(config, folder, progress)


def _run(config: ConfigDict, folder: pathlib.Path, progress: bool) -> dict[str, dict[str, Any]]:
  results = {policy: _tune_and_run(config, folder, policy, progress) for policy in config.kinds}
  if config.arena.judges:
    results["arena"] = _run_arenas(config, results["network"], folder / "arena")
  files.write_json(folder / "results.json", results)
  text = "\n\n".join(_tables(config, results))
  files.write_text(folder / "compare.md", text + "\n")
  for policy in config.kinds:
    for name, panels in FIGURES[config.base.evaluation.exact].items():
      _figure(results[policy], panels, folder / f"{name}_{policy}.png")
  page.leave(functools.partial(_write_page, config, results), folder)
  arenas = f", arenas: {folder}/arena" if config.arena.judges else ""
  print(f"{text}\n\ntables: {folder}/compare.md, figures: {folder}/*.png{arenas}")
  return files.without_nan(results)


def _folder(run: Run, rate: float | None, seed: int) -> str:
  rate_folder = "" if rate is None else f"rate_{rate_name(rate)}/"
  return f"{run.folder}/{rate_folder}seed_{seed}"


def _tune_and_run(config, folder: pathlib.Path, policy: str, progress: bool) -> dict[str, Result]:
  """Returns {run: {"learning_rate", "beta", "tuning": {rate: score}, "seeds": [records]}}."""
  runs, folder = {run.name: run for run in name_runs(config.runs)}, folder / policy
  rates, seeds = tuple(config.learning_rates) or (None,), range(config.seeds)

  def run_all(settings: Iterable[Setting], steps: int = 0) -> dict[Setting, ConfigDict]:
    configs = {
      (name, rate, seed): resolve(
        run_config(config.base, runs[name].changes, rate, seed, steps), "train"
      )
      for name, rate, seed in settings
    }
    folders = {_folder(runs[name], rate, seed): c for (name, rate, seed), c in configs.items()}
    sweep.run(folders, folder, policy, progress)
    return configs

  def record(name: str, rate: float | None, seed: int, c: ConfigDict) -> dict[str, Any]:
    return _record(c, folder / _folder(runs[name], rate, seed))

  scores: dict[str, dict[float | None, float]] = {name: {} for name in runs}
  if len(rates) > 1:
    pilots = ((name, rate, config.tuning_seed) for name in runs for rate in rates)
    tuned = run_all(pilots, config.tuning_steps)
    for (name, rate, seed), c in tuned.items():
      scores[name][rate] = _score(c, record(name, rate, seed, c), _least(config))
  for name, tried in scores.items():
    if tried and not any(map(math.isfinite, tried.values())):
      logging.warning(
        "run %r diverges at every learning rate, so none is the best", printable(name)
      )
  best = {run: max(tried, key=tried.__getitem__, default=rates[0]) for run, tried in scores.items()}
  configs = run_all((name, best[name], seed) for name in runs for seed in seeds)
  return {
    name: {
      "learning_rate": configs[name, rate, 0].optimizer.learning_rate,
      "beta": configs[name, rate, 0].algorithm.beta,
      "tuning": {rate_name(tried): score for tried, score in scores[name].items() if tried},
      "seeds": [record(name, rate, seed, configs[name, rate, seed]) for seed in seeds],
    }
    for name, rate in best.items()
  }


def _record(config, folder: pathlib.Path) -> dict[str, Any]:
  """Returns {"steps": …, metric: values} of one run, None from where it was no longer finite."""
  exact = (SUBOPT, KL_TO_EQUILIBRIUM, GAP, EXACT_WIN, EXACT_KL)
  metrics = exact if config.evaluation.exact else (WIN, KL)
  rows = {row["step"]: row for row in report.read_rows(folder)}
  steps = sorted({*range(0, config.steps, config.evaluation.every), config.steps})
  absent = [step for step in steps if not rows.get(step, {}).keys() & {*metrics}]
  whole = not absent or sweep.diverged(config, folder)
  fix = "It is damaged: restore it, or move the run's folder away to make it again."
  expected, got = "every evaluation of the run", f"none at {absent}"
  require(whole, f"{folder}/metrics.jsonl", expected, got, fix)
  values = {metric: [rows.get(step, {}).get(metric) for step in steps] for metric in metrics}
  return {"steps": steps, **values, "folder": str(folder)}


def _least(config) -> str:
  """Returns the exact metric that a comparison's best rate, and its first row, has least of."""
  return GAP if config.tuning_metric == "gap" else SUBOPT


def _score(config, record: dict[str, Any], least: str = SUBOPT) -> float:
  """Returns the score that tuning maximises; -inf for a run that is not finite at its end."""
  result = {"seeds": [record], "beta": config.algorithm.beta}
  exact = config.evaluation.exact
  score = -_values(result, least)[0, -1] if exact else _regularised_win_rate(result)[0]
  return -math.inf if np.isnan(score) else float(score)


def _values(result: Result, metric: str) -> np.ndarray:
  """Returns a metric of every seed at every evaluation, [seeds, evaluations]; NaN for None."""
  return np.array([seed[metric] for seed in result["seeds"]], float)


def _regularised_win_rate(result: Result) -> np.ndarray:
  """Returns the seeds' last P(π≻π_ref) − β·KL(π‖π_ref), [seeds]."""
  return _values(result, WIN)[:, -1] - result["beta"] * _values(result, KL)[:, -1]


def _median_and_range(result: Result, metric: str) -> list[float]:
  """Returns [median, least, greatest] of the seeds' last values; NaN if one is not finite."""
  last = _values(result, metric)[:, -1]
  return [float(summarise(last)) for summarise in (np.median, np.min, np.max)]


def _sorted(results: dict[str, Result], metric: str, sign: int) -> list[tuple[str, Result]]:
  """Returns (run, result) sorted by median, ascending if sign is 1; diverged runs come last."""
  medians = {name: sign * _median_and_range(result, metric)[0] for name, result in results.items()}
  return sorted(results.items(), key=lambda item: (np.isnan(medians[item[0]]), medians[item[0]]))


def _scientific(value: float) -> str:
  return "—" if np.isnan(value) else f"{value:.2e}"


def _table_of_runs(config, results: dict[str, Result]) -> tuple[str, list[str], list[list[str]]]:
  """Returns title, header and rows of the table of all runs with a kind of policy."""
  exact = config.base.evaluation.exact
  table = _exact_table(results, _least(config)) if exact else _win_rate_table(results)
  title, columns, cells_by_run = table
  rows = [
    [run, rate_name(results[run]["learning_rate"]), *cells] for run, cells in cells_by_run.items()
  ]
  return title, ["run", "learning rate", *columns], rows


def _tables(config, results: dict[str, dict[str, Any]]) -> list[str]:
  out = []
  for policy in config.kinds:
    title, header, rows = _table_of_runs(config, results[policy])
    table = report.markdown_table(header, [[report.escaped(run), *rest] for run, *rest in rows])
    ends = sorted({result["seeds"][0]["steps"][-1] for result in results[policy].values()})
    steps_and_seeds = f"Steps: {', '.join(map(str, ends))}, seeds: {config.seeds}."
    out.append(f"## {policy}: {title}\n\n{steps_and_seeds}\n\n{table}")
  for judge, tables in results.get("arena", {}).items():
    for name, cells in tables.items():
      title = f"judge {report.escaped(judge)}: {name.replace('_', ' ')}"
      title = f"Arena, {title}, mean over seeds of mean ± 3σ"
      out.append(f"## {title}\n\n{report.win_rate_table(cells)}")
      if absent := results["network"].keys() - cells.keys():
        names = ", ".join(sorted(map(report.escaped, absent)))
        out.append(f"Not in the arena, because a seed's last evaluation is not finite: {names}.")
  return out


def _write_page(config, results: dict[str, dict[str, Any]], folder: pathlib.Path) -> None:
  """Writes report.html: medians by step, the tables, and the texts of every seed's arena."""
  exact = config.base.evaluation.exact
  metrics = {SUBOPT: "SubOpt_β"} if exact else {WIN: "Win rate against the reference",
    KL: "KL to the reference, nats a response"}  # fmt: skip
  curves, tables, texts = [], [], []
  for policy in config.kinds:
    curves += [
      {
        "title": f"{policy}: {label}", "label": "median of the seeds", "log": exact,
        "baseline": 0.5 if metric == WIN else None,
        "series": [
          page.line(name, result["seeds"][0]["steps"], np.median(_values(result, metric), axis=0))
          for name, result in results[policy].items()
        ],
      }
      for metric, label in metrics.items()
    ]  # fmt: skip
    title, header, rows = _table_of_runs(config, results[policy])
    tables.append(page.row_table(f"{policy}: {title}", header, rows))
  for judge, rates_by_table in results.get("arena", {}).items():
    tables += [
      page.rate_table(f"{page.RATES[table]}, judge: {judge}, mean over seeds", cells)
      for table, cells in rates_by_table.items()
    ]
  if results.get("arena"):
    names = {policy: name for name, policy in _policy_names(_ended(results["network"])).items()}
    places = ((seed, folder / "arena" / f"seed_{seed}") for seed in range(config.seeds))
    texts = [
      page.arena_texts(place, files.read_json(place / "arena.json"), f"of seed {seed}", names)
      for seed, place in places
    ]
  facts = [("runs", len(config.runs)), ("seeds", config.seeds)]
  title = f"compare: {'/'.join(folder.resolve().parts[-2:])}"
  path = folder / page.NAME
  page.write(path, title, facts=facts, curves=curves, tables=tables, texts=texts)


def _exact_table(results: dict[str, Result], least: str = SUBOPT) -> Table:
  """Returns the table of runs by SubOpt_β of their last iterate, in the order of `least`."""
  starts = {name: _values(result, SUBOPT)[0, 0] for name, result in results.items()}  # depends on β
  ends = " to ".join(
    dict.fromkeys(_scientific(end([*starts.values()])) for end in (np.min, np.max))
  )
  cells = {}
  for name, result in _sorted(results, least, 1):
    subopt = _median_and_range(result, SUBOPT)
    kl, gap = (_median_and_range(result, metric)[0] for metric in (KL_TO_EQUILIBRIUM, GAP))
    # A reference at the equilibrium has no share, only rounding.
    share = report.number(subopt[0] / starts[name] if starts[name] > ROUNDING else math.nan)
    won, far = (report.number(_median_and_range(result, x)[0]) for x in (EXACT_WIN, EXACT_KL))
    cells[name] = [*map(_scientific, subopt), share, *map(_scientific, (kl, gap)), won, far]
  columns = ["SubOpt, median", "least", "greatest", "of reference's", "KL(π*‖π)", "gap"]
  columns += ["P(π≻π_ref)", "KL(π‖π_ref)"]
  return f"SubOpt_β of the last iterate; the reference's is {ends}", columns, cells


def _win_rate_table(results: dict[str, Result]) -> Table:
  """Returns the table of runs by their last win rate against the reference."""
  cells = {}
  for name, result in _sorted(results, WIN, -1):
    kl = report.number(_median_and_range(result, KL)[0], 2)
    regularised = report.number(float(np.median(_regularised_win_rate(result))))
    win_rates = map(report.number, _median_and_range(result, WIN))
    cells[name] = [*win_rates, kl, regularised]
  columns = ["win rate, median", "least", "greatest", "KL, nats", "win rate − β·KL"]
  return "Against the reference, under the training judge", columns, cells


def _run_arenas(config, results: dict[str, Result], folder: pathlib.Path) -> dict[str, dict]:
  """Plays an arena for every seed, between the base and the runs that ended finite.

  Returns:
    {judge: the tables' mean over seeds}.
  """
  ended = _ended(results)
  policies = _policy_names(ended)
  arenas = []
  for seed in range(config.seeds if ended else 0):
    c = config.arena.copy_and_resolve_references().unlock()
    c.seed, c.base, c.policies = seed, REFERENCE, {}
    for name in ended:
      end = results[name]["seeds"][seed]
      # With its last step, so that no other checkpoint can take its place.
      weights = f"{end['folder']}@params:{end['steps'][-1]}"
      c.policies[policies[name]] = {"weights": weights, "best_of": 1}
    c.policies[REFERENCE] = {"weights": config.base.model.weights, "best_of": 1}
    place = folder / f"seed_{seed}"
    arenas.append(arena.recorded_result(resolve(c), place) or arena.run(c, place, show=False))
  names = {policy: name for name, policy in policies.items()} | {REFERENCE: REFERENCE}
  return {
    judge: {
      table: _mean_cells([_renamed(result["judges"][judge][table], names) for result in arenas])
      for table in ("win_rate", "length_matched")
    }
    for judge in (arenas[0]["judges"] if arenas else ())
  }


def _ended(results: dict[str, Result]) -> list[str]:
  """Returns the runs whose last evaluation is finite with every seed."""
  return [name for name, r in results.items() if np.isfinite(_values(r, WIN)[:, -1]).all()]


def _policy_names(names: list[str]) -> dict[str, str]:
  """Returns {run: its name in an arena's config, which may not have dots}."""
  policies = {name: name for name in names if "." not in name}
  for name in names:
    policy = name.replace(".", "_")
    while name not in policies and policy in {*policies.values(), REFERENCE}:
      policy += "_"
    policies.setdefault(name, policy)
  return policies


def _renamed(cells: report.Cells, names: dict[str, str]) -> report.Cells:
  return {names[row]: {names[c]: cell for c, cell in line.items()} for row, line in cells.items()}


def _mean_cells(tables: list[report.Cells]) -> report.Cells:
  """Returns the cells' means over seeds, also of 3σ and the interval, since seeds share prompts.

  `n` is the least number of prompts over seeds.
  """

  def mean(row, column):
    cells = [table[row][column] for table in tables]
    fields = ("mean", "sigma3", "low", "high")
    n = min(cell["n"] for cell in cells)
    if any(cell[field] is None for cell in cells for field in fields):
      return {**dict.fromkeys(fields), "n": 0, "significant": False}
    means = {field: float(np.mean([cell[field] for cell in cells])) for field in fields}
    return {**means, "n": n, "significant": means["low"] > 0.5 or means["high"] < 0.5}

  return {row: {column: mean(row, column) for column in line} for row, line in tables[0].items()}


class Panel(NamedTuple):
  """A part of a figure: a metric against another, or against steps where that is ""."""

  metric: str
  label: str
  over: str = ""
  over_label: str = "step"
  scale: str = "linear"


_NATS = "KL to the reference (nats a response)"
# By whether metrics are exact: the figures of a kind of policies, by the name of their file.
FIGURES = {
  True: {
    "curves": [Panel(SUBOPT, "SubOpt_β", scale="log")],
    "over_kl": [
      Panel(EXACT_WIN, "P(π≻π_ref)", EXACT_KL, _NATS),
      Panel(SUBOPT, "SubOpt_β", EXACT_KL, _NATS, "log"),
    ],
  },
  False: {"curves": [Panel(WIN, "win rate, training judge", KL, _NATS)]},
}


def _figure(results: dict[str, Result], panels: list[Panel], path: pathlib.Path) -> None:
  """Draws a line a run, the median of its seeds."""
  import matplotlib
  from matplotlib.figure import Figure

  figure = Figure(figsize=(2.5 + 5 * len(panels), 4.6), layout="constrained")
  columns = np.atleast_1d(figure.subplots(ncols=len(panels)))
  colours = matplotlib.colormaps["turbo"](np.linspace(0.05, 0.95, len(results)))
  for axes, panel in zip(columns, panels, strict=True):
    lines = []
    for colour, (name, result) in zip(colours, results.items(), strict=True):
      style: dict[str, Any] = {"color": colour, "linewidth": 2.5 if name == "nash_mp" else 1.2}
      steps, values = result["seeds"][0]["steps"], _values(result, panel.metric)
      if panel.over:
        over, style = np.median(_values(result, panel.over), axis=0), style | {"marker": "o"}
        lines += axes.plot(over, np.median(values, axis=0), markersize=3, **style)
      else:
        band: dict[str, Any] = {"color": colour, "alpha": 0.12, "linewidth": 0}
        axes.fill_between(steps, values.min(0), values.max(0), **band)
        lines += axes.plot(steps, np.median(values, axis=0), **style)
    if panel.metric in (WIN, EXACT_WIN):
      axes.axhline(0.5, color="0.6", linewidth=1, linestyle="--")
    axes.set(yscale=panel.scale, xlabel=panel.over_label, ylabel=panel.label)
    axes.spines[["top", "right"]].set_visible(False)
  labels = report.figure_labels(results)
  place: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1, 0.5)}
  # Texts are set afterwards, because the legend omits labels that start with _ and reads $ as TeX.
  legend = axes.legend(lines, [""] * len(lines), frameon=False, fontsize=7, **place)
  for text, name in zip(legend.get_texts(), labels, strict=True):
    text.set(text=name, parse_math=False)
  report.save(figure, path)

"""Runs side by side: methods, each at its own tuned learning rate, or the values of an ablation.

workdir/<policy>/<run>/rate_<r>/seed_<s>   every run's own record
workdir/results.json, compare.md           the results and their tables; figures beside them
workdir/arena/seed_<s>                     who beats whom, where responses are texts
"""

import json
import math
import pathlib

import numpy as np

from nash_jax import report
from nash_jax.config import describe, resolve
from nash_jax.jobs import arena, sweep
from nash_jax.run.checkpoint import differences

SUBOPT = "exact/suboptimality"
WIN, KL = "eval/win_rate_vs_reference", "eval/kl_to_reference"


def run(config, workdir, progress: bool = True) -> dict:
  """Tunes, runs and evaluates what `config` (see config.compare) names; continues if interrupted.

  Where `learning_rates` names several, each run takes the one that is best with `tuning_seed`: by
  the last SubOpt_β where that is exact, else by the regularised win rate P(π≻π_ref) − β·KL under
  the training judge on the evaluated held-out prompts. Then it is run with every seed.

  Returns:
    What workdir/results.json holds: figures by policy and run, and the tables of the arena.

  Raises:
    ValueError: a bad config, or a workdir that holds runs of another.
  """
  config, folder = resolve(config, "compare"), pathlib.Path(workdir)
  changes = {label(item): dict(item) for item in config.runs}
  results = {
    policy: _tune_and_run(config, changes, folder, policy, progress) for policy in config.kinds
  }
  if config.arena.judges:
    results["arena"] = _arena(config, results["network"], folder)
  (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
  text = "\n\n".join(_tables(config, results))
  (folder / "compare.md").write_text(text + "\n")
  for policy in config.kinds:
    _figure(config, results[policy], folder / f"curves_{policy}.png")
  print(f"{text}\n\ntables: {folder}/compare.md, figures: {folder}/curves_*.png")
  return results


def label(changes) -> str:
  """Returns the name of a run: its "label", its algorithm, or its changes."""
  others = {k: v for k, v in dict(changes).items() if k != "label"}
  name = others.get("algorithm.name") or ", ".join(
    f"{key.rpartition('.')[2]} = {value}" for key, value in others.items()
  )
  return dict(changes).get("label", name)


def changed(config, changes: dict, rate: float | None, seed: int):
  """Returns the base config with a run's changes, learning rate and seed."""
  c = config.base.copy_and_resolve_references().unlock()
  c.update_from_flattened_dict({k: v for k, v in changes.items() if k != "label"})
  c.seed = seed
  if rate is not None:
    c.optimizer.learning_rate = rate
  return c


def _folder(name: str, rate, seed: int) -> str:
  rate = "" if rate is None else f"rate_{rate:g}/"
  return f"{name.replace(' ', '').replace(',', '_')}/{rate}seed_{seed}"


def _tune_and_run(
  config, changes: dict[str, dict], folder, policy: str, progress
) -> dict[str, dict]:
  """Returns {run: {"learning_rate", "tuning": {rate: score}, "seeds": [a record each]}}."""
  rates = tuple(config.learning_rates) or (None,)
  base, folder = config.base, folder / policy

  def run_all(wanted):
    configs = {_folder(*item): changed(config, changes[item[0]], *item[1:]) for item in wanted}
    sweep.run(configs, folder, policy, progress)

  tuning = [(name, rate, config.tuning_seed) for name in changes for rate in rates]
  scores: dict[str, dict] = {name: {} for name in changes}
  if len(rates) > 1:
    run_all(tuning)
    for name, rate, seed in tuning:
      c = changed(config, changes[name], rate, seed)
      scores[name][rate] = _score(c, folder / _folder(name, rate, seed))
  best = {
    name: max(rates, key=lambda rate, own=own: own.get(rate, 0)) for name, own in scores.items()
  }
  run_all([(name, best[name], seed) for name in changes for seed in range(config.seeds)])
  chosen = {name: changed(config, changes[name], best[name], 0) for name in changes}
  return {
    name: {
      "learning_rate": chosen[name].optimizer.learning_rate,
      "beta": chosen[name].algorithm.beta,
      "tuning": {f"{rate:g}": score for rate, score in scores[name].items()},
      "seeds": [
        _record(base, folder / _folder(name, best[name], seed)) for seed in range(config.seeds)
      ],
    }
    for name in changes
  }


def _record(config, folder) -> dict[str, list]:
  """Returns {"steps": …, metric: values} of one run, None where it was not finite any more."""
  metrics = (SUBOPT, "exact/kl_to_equilibrium") if config.evaluation.exact else (WIN, KL)
  series = report.read_metrics(folder)
  steps = sorted({*range(0, config.steps, config.evaluation.every), config.steps})
  found = {name: dict(zip(*series[name], strict=True)) for name in metrics}
  values = {name: [at.get(step) for step in steps] for name, at in found.items()}
  return {"steps": steps, **values, "folder": str(folder)}


def _score(config, folder) -> float:
  """Returns what the tuning maximises; -inf of a run that ended in nothing finite."""
  result = {"seeds": [_record(config, folder)], "beta": config.algorithm.beta}
  score = -_last(result, SUBOPT) if config.evaluation.exact else _regularised(result)
  return -math.inf if np.isnan(score[0]) else float(score[0])


def _last(result: dict, metric: str) -> np.ndarray:
  """Returns the seeds' last values of a metric, [seeds]; NaN where one is not finite."""
  return _values(result, metric)[:, -1]


def _regularised(result: dict) -> np.ndarray:
  """Returns the seeds' last P(π≻π_ref) − β·KL(π‖π_ref), [seeds]."""
  return _last(result, WIN) - result["beta"] * _last(result, KL)


def _values(result: dict, metric: str) -> np.ndarray:
  """Returns a metric of every seed at every evaluation, [seeds, evaluations]; NaN for None."""
  return np.array([seed[metric] for seed in result["seeds"]], float)


def _median_and_range(result: dict, metric: str) -> list[float]:
  """Returns [median, least, greatest] of the seeds' last values; NaN where one is not finite."""
  return [float(pick(_last(result, metric))) for pick in (np.median, np.min, np.max)]


def _sorted(results: dict[str, dict], metric: str, sign: int) -> list[tuple[str, dict]]:
  """Returns (run, result) by median, the least first where sign is 1; what diverged is last."""
  medians = {name: sign * _median_and_range(result, metric)[0] for name, result in results.items()}
  return sorted(results.items(), key=lambda item: (np.isnan(medians[item[0]]), medians[item[0]]))


def _tiny(value: float) -> str:
  return "—" if np.isnan(value) else f"{value:.2e}"


def _tables(config, results) -> list[str]:
  table = _exact_table if config.base.evaluation.exact else _win_rate_table
  out = []
  for policy in config.kinds:
    title, header, lines = table(results[policy])
    out.append(
      f"## {policy}: {title}\n\nSteps: {config.base.steps}, seeds: {config.seeds}.\n\n"
      + report.markdown_table(header, lines)
    )
  for name, tables in results.get("arena", {}).items():
    for kind, cells in tables.items():
      out.append(
        f"## Arena, judge {name}: {kind.replace('_', ' ')}, mean over seeds of mean ± 3σ\n\n"
        + report.win_rate_table(cells)
      )
  return out


def _exact_table(results: dict[str, dict]) -> tuple[str, list[str], list[list[str]]]:
  """Returns title, header and lines of the runs by SubOpt_β of their last iterate."""
  starts = {name: result["seeds"][0][SUBOPT][0] for name, result in results.items()}  # β moves it
  ends = " to ".join(dict.fromkeys(f"{pick(starts.values()):.2e}" for pick in (min, max)))
  lines = [
    [
      name,
      f"{result['learning_rate']:g}",
      *map(_tiny, _median_and_range(result, SUBOPT)),
      report.number(_median_and_range(result, SUBOPT)[0] / starts[name]),
      _tiny(_median_and_range(result, "exact/kl_to_equilibrium")[0]),
    ]
    for name, result in _sorted(results, SUBOPT, 1)
  ]
  header = ["run", "learning rate", "SubOpt, median", "least", "greatest", "of reference's"]
  title = f"SubOpt_β of the last iterate; the reference's is {ends}"
  return title, [*header, "KL(π*‖π)"], lines


def _win_rate_table(results: dict[str, dict]) -> tuple[str, list[str], list[list[str]]]:
  """Returns title, header and lines of the runs by their last win rate against the reference."""
  lines = [
    [
      name,
      f"{result['learning_rate']:g}",
      *map(report.number, _median_and_range(result, WIN)),
      report.number(_median_and_range(result, KL)[0], 2),
      report.number(float(np.median(_regularised(result)))),
    ]
    for name, result in _sorted(results, WIN, -1)
  ]
  header = ["run", "learning rate", "win rate, median", "least", "greatest", "KL, nats"]
  return "Against the reference, under the training judge", [*header, "win rate − β·KL"], lines


def _arena(config, results: dict[str, dict], folder) -> dict:
  """Holds an arena of all runs and the base for every seed; returns the tables' means."""
  arenas = []
  for seed in range(config.seeds):
    c = config.arena.copy_and_resolve_references().unlock()
    c.seed = seed
    c.policies = {
      name.replace(".", "_"): {"weights": result["seeds"][seed]["folder"], "best_of": 1}
      for name, result in results.items()
    }
    c.policies.reference = {"weights": config.base.model.weights, "best_of": 1}
    c.base = "reference"
    path = folder / "arena" / f"seed_{seed}"
    file, wanted = path / "arena.json", describe(resolve(c))
    finished = json.loads(file.read_text()) if file.is_file() else {"config": {}}
    # One that was held before there were other runs is held again.
    same = finished["config"] and not differences(finished["config"], wanted)
    arenas.append(finished if same else arena.run(c, path))
  return {
    judge: {
      kind: _mean_cells([one["judges"][judge][kind] for one in arenas])
      for kind in ("win_rate", "length_matched")
    }
    for judge in arenas[0]["judges"]
  }


def _mean_cells(tables: list[dict]) -> dict:
  """Returns the cells' means over seeds; 3σ is the seeds' mean 3σ, for they share their prompts."""

  def mean(row, column):
    cells = [table[row][column] for table in tables]
    if any(cell["mean"] is None or cell["sigma3"] is None for cell in cells):
      return {"mean": None, "sigma3": None, "n": 0, "significant": False}
    m, s = (float(np.mean([cell[name] for cell in cells])) for name in ("mean", "sigma3"))
    return {
      "mean": m,
      "sigma3": s,
      "n": sum(c["n"] for c in cells),
      "significant": abs(m - 0.5) > s,
    }

  return {row: {column: mean(row, column) for column in line} for row, line in tables[0].items()}


def _figure(config, results: dict[str, dict], path) -> None:
  """Draws SubOpt_β against steps, or win rate against KL, a line a run: the median of its seeds."""
  import matplotlib
  from matplotlib.figure import Figure

  exact = config.base.evaluation.exact
  figure = Figure(figsize=(7.5, 4.6), layout="constrained")
  axes = figure.subplots()
  colours = matplotlib.colormaps["turbo"](np.linspace(0.05, 0.95, len(results)))
  for colour, (name, result) in zip(colours, results.items(), strict=True):
    own = {"color": colour, "label": name, "linewidth": 2.5 if name == "nash_mp" else 1.2}
    steps = result["seeds"][0]["steps"]
    values = {m: np.median(_values(result, m), axis=0) for m in ((SUBOPT,) if exact else (KL, WIN))}
    if exact:
      spread = _values(result, SUBOPT)
      axes.fill_between(steps, spread.min(0), spread.max(0), color=colour, alpha=0.12, linewidth=0)
    axes.plot(
      steps if exact else values[KL],
      values[SUBOPT if exact else WIN],
      marker=None if exact else "o",
      markersize=3,
      **own,
    )
  if exact:
    axes.set(yscale="log", xlabel="step", ylabel="SubOpt_β")
  else:
    axes.axhline(0.5, color="0.6", linewidth=1, linestyle="--")
    axes.set(xlabel="KL to the reference (nats a response)", ylabel="win rate, training judge")
  axes.spines[["top", "right"]].set_visible(False)
  axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
  figure.savefig(path, dpi=150)

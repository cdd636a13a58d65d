"""Studies of the exact games: a config in; CSV tables, PNG and SVG figures out.

A study returns tables by name, each a list of rows, dicts with the same keys. What is drawn of them
is written in the config: see `charts.draw`.
"""

import csv
import io
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from nash_jax.games import charts, checks, comparison, convergence, tree_study
from nash_jax.games.charts import Rows, Tables
from nash_jax.games.convergence import StudyConfig
from nash_jax.validation import file_name, require

STUDIES: dict[str, Callable[[StudyConfig], Tables]] = {
  "theorem": convergence.theorem,
  "rates": convergence.rates,
  "figure": comparison.figure,
  "map": comparison.prox_map,
  "approximation": convergence.approximation,
  "bradley_terry": comparison.bradley_terry,
  "trees": tree_study.learn,
}
_COUNTS = {  # fields of the studies whose values are whole numbers
  "actions", "actions_steps", "baseline_episodes", "batches", "contexts", "csv_every", "episodes",
  "first_point", "games", "horizons", "inner_sampled", "inner_steps", "iterations",
  "iterations_large", "iterations_original", "points", "queries", "rank", "repeats", "seed",
  "seeds", "step_iterations", "tuning_episodes", "tuning_seed", "tuning_seeds", "warmup",
}  # fmt: skip
_POSITIVE = {  # fields of which they are positive numbers
  "beta", "betas", "epsilons", "eta_multiples", "etas", "kappas", "law_weights", "multipliers",
  "payoffs", "step", "step_sampled", "steps", "strength", "strengths", "targets", "votes",
}  # fmt: skip
_LEAST = dict.fromkeys(("batches", "seed", "seeds", "tuning_seed", "tuning_seeds", "warmup"), 0)
_LEAST |= {"actions": 2, "actions_steps": 2}  # one action is no game


def check(config: StudyConfig) -> None:
  """Checks every number of a study's config.

  Examples:
    >>> from nash_jax.configs.games import rates
    >>> from nash_jax.games import study
    >>> study.check(rates.get_config("smoke"))

  Raises:
    ValueError: the field that is out of its range.
  """
  for name, given in config.items():
    values = given if isinstance(given, tuple | list) else (given,)
    if name in _COUNTS | _POSITIVE:
      require(len(values) > 0, name, "at least one value", given, "Give one.")
    for value in values:
      if name in _COUNTS and not (name == "contexts" and value is None):
        checks.count(name, value, least=_LEAST.get(name, 1))
      elif name in _POSITIVE and not (name == "kappas" and value == "harmonic"):
        checks.number(name, value, at_most=1.0 if name == "kappas" else np.inf)
  if config.study == "figure":
    many, expected = len(config.seeds) > 1, "at least two, for an interval"
    require(many, "seeds", expected, config.seeds, "Give more seeds.")
  if config.study == "trees":
    tree_study.check(config)


def run(config: StudyConfig, workdir: str | os.PathLike[str]) -> None:
  """Runs config.study in float64, and writes its tables and figures under workdir.

  Examples:
    >>> import tempfile
    >>> from nash_jax.configs.games import bradley_terry
    >>> from nash_jax.games import study
    >>> config = bradley_terry.get_config("smoke")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   study.run(config, folder)
    wrote the tables bradley_terry and figures bradley_terry to ...

  Args:
    config: one of configs/games.
    workdir: made where it does not exist.

  Raises:
    ValueError: an unknown study, a field out of its range, or a folder that cannot be written.
  """
  if config.study not in STUDIES:
    raise ValueError(f"unknown study {config.study!r}; choices: {', '.join(STUDIES)}.")
  check(config)
  folder = pathlib.Path(workdir)
  folder.mkdir(parents=True, exist_ok=True)
  with jax.enable_x64(True):
    tables = STUDIES[config.study](config)
  try:
    _write_all(config, tables, folder)
  except OSError as error:  # that of a full disk names no file
    raise ValueError(f"{folder}: expected a folder that can be written: {error}") from error
  print(f"wrote the tables {', '.join(tables)} and figures {', '.join(config.figures)} to {folder}")


def _write_all(config: StudyConfig, tables: Tables, folder: pathlib.Path) -> None:
  for row in tables.pop("policies", []):
    (folder / "policies").mkdir(exist_ok=True)
    path = folder / "policies" / f"{file_name('{game}_{method}_{seed}'.format(**row))}.json"
    path.write_text(json.dumps(row["policy"], indent=1) + "\n", encoding="utf-8")
  for name, rows in tables.items():
    (folder / f"{file_name(name)}.csv").write_text(as_csv(rows), encoding="utf-8")
  for name, settings in config.figures.items():
    charts.draw(folder / file_name(name), tables, **settings)


def as_csv(rows: Rows) -> str:
  """Returns rows as CSV under a header of their columns, with six digits of each float.

  Examples:
    >>> from nash_jax.games import study
    >>> study.as_csv([{"k": 1, "gap": 1 / 3}]).splitlines()
    ['k,gap', '1,0.333333']
  """

  def cell(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float | np.floating | jax.Array) else value

  text = io.StringIO()
  writer = csv.DictWriter(text, rows[0] if rows else [], lineterminator="\n")
  writer.writeheader()
  writer.writerows({key: cell(value) for key, value in row.items()} for row in rows)
  return text.getvalue()

"""Compares designs, which pairs to label: in a simulation, and on a policy's own responses."""

import itertools
import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict

from nash_jax import judges, report
from nash_jax.config import resolve
from nash_jax.data.prompts import load_prompts
from nash_jax.design import rounds, simulation
from nash_jax.games import charts, study
from nash_jax.games.charts import Rows
from nash_jax.jobs import collect
from nash_jax.policy import tokenizer_and_model
from nash_jax.run import files, lock
from nash_jax.validation import one_of, require

# {study: (columns that tell groups of rows apart, columns of numbers)}
STUDIES = {
  "simulation": (("prompts", "design", "labels"), ("worst", "mean")),
  "collection": (("design", "labels"), ("accuracy",)),
}
EVERYTHING = "every pair"  # what is fitted to P of all pairs, to which no budget comes closer


def run(config: ConfigDict, workdir: str | os.PathLike[str]) -> Rows:
  """Buys labels by each design, and fits linear rewards to them; returns means with intervals.

  Writes design.csv, a row for each seed; design_means.csv and design.md; and the config's figures.

  Args:
    config: `study`, "simulation" or "collection"; `designs`; `budgets`, numbers of labels; `seeds`,
      how many; and `simulation`, see simulation.world, or `collection`, a config of the job
      collect, of whose held-out prompts the responses are compared.

  Raises:
    ValueError: a bad config, data or weights; a workdir in use.
  """
  config = config.copy_and_resolve_references().unlock()
  check(config)
  folder = files.make_folder(workdir)
  with lock.hold(folder):
    if config.study == "simulation":
      rows = simulation.simulate(config.simulation, config.designs, config.budgets, config.seeds)
    else:
      rows = _on_responses(config)
    by, values = STUDIES[config.study]
    means = simulation.summary(rows, by, values)
    files.write_text(folder / "design.csv", study.as_csv(rows))
    files.write_text(folder / "design_means.csv", study.as_csv(means))
    files.write_text(folder / "design.md", table := _table(means, by, values))
    for name, settings in config.figures.items():
      charts.draw(folder / name, {"means": means}, **settings)
  print(table)
  return means


def check(config: ConfigDict) -> None:
  """Checks a config; that of a collection is completed and checked as the job collect does.

  Raises:
    ValueError: what, expected, got and how to fix it.
  """
  one_of("study", config.study, STUDIES)
  require(len(config.designs) > 0, "designs", "at least one", config.designs, "Give some.")
  for name in config.designs:
    one_of("designs", name, rounds.DESIGNS)
  for name, values, least in (("budgets", config.budgets, 1), ("seeds", (config.seeds,), 2)):
    good = all(isinstance(value, int) and value >= least for value in values) and len(values) > 0
    require(good, name, f"whole numbers of at least {least}", values, "Raise it.")
  if config.study == "simulation":
    simulation.check(config.simulation)
    return
  c = config.collection
  c.design, c.budget = "greedy", max(config.budgets)
  config.collection = resolve(c, "collect")


def _on_responses(config: ConfigDict) -> Rows:
  """Returns a row for each design, budget and seed: accuracy on pairs of held-out prompts."""
  c = config.collection.copy_and_resolve_references().unlock()
  tokenizer, _ = tokenizer_and_model(c.model)
  data, held_out = load_prompts(c.prompts, tokenizer, c.seed)
  fix = "Set collection.prompts.held_out."
  require(len(held_out) > 0, "held-out prompts", "at least one", len(held_out), fix)
  judge, parts = judges.make(c.judge, tokenizer), []
  fix = "Set population, or another that is a model or a table."
  at_once = judge.server is None
  require(at_once, "collection.judge.name", "a judge that answers at once", c.judge.name, fix)
  for examples in (data, held_out):
    if examples is held_out:
      c.steps = math.ceil(len(held_out) / c.prompts.batch_size) * len(c.sources)
    pool = collect.make_pool(c, tokenizer, examples)
    p_win = collect.ask(judge, pool, np.arange(len(pool.pairs)), c.prompts.batch_size)
    read = ~np.isnan(p_win)
    require(bool(read.any()), "collection.judge", "a verdict on some pair", "none", "Check it.")
    parts.append((pool.arms[read], p_win[read]))
  (arms, p_win), others = parts
  every, rows = rounds.fit(arms, p_win, rounds.penalty(arms)), []
  names = *config.designs, EVERYTHING
  for seed, name, budget in itertools.product(range(config.seeds), names, config.budgets):
    labels = simulation.sampled(p_win, seed)
    theta = every if name == EVERYTHING else simulation.buy(name, arms, budget, labels, seed)
    found = {"design": name, "labels": budget, "seed": seed}
    rows.append({**found, "accuracy": accuracy(theta, *others)})
  return rows


def accuracy(
  theta: Float[np.ndarray, "D"], arms: Float[np.ndarray, "N D"], p_win: Float[np.ndarray, "N"]
) -> float:
  """Returns the share of pairs with P ≠ 1/2 whose winner ⟨θ, b⟩ predicts; 0 is half correct."""
  counted = p_win != 0.5
  right = 0.5 + 0.5 * np.sign(arms @ theta) * np.sign(p_win - 0.5)
  return float(right[counted].mean())


def _table(means: Rows, by: tuple[str, ...], values: tuple[str, ...]) -> str:
  """Returns a Markdown table with a row for each design, and a column for each number of labels."""

  def cell(row: Mapping[str, Any], name: str) -> str:
    mean, low, high = (report.number(row[f"{name}{end}"]) for end in ("", "_low", "_high"))
    return f"{mean} ({low} to {high})"

  groups = itertools.groupby(means, lambda row: [row[name] for name in by[:-1]])
  members = [(group, [*rows]) for group, rows in groups]
  lines = [
    [*group, name, *(cell(row, name) for row in rows)] for name in values for group, rows in members
  ]
  budgets = [f"{row['labels']} labels" for row in members[0][1]]
  header = [*by[:-1], "mean over seeds (95% interval)", *budgets]
  return report.markdown_table(header, lines) + "\n"

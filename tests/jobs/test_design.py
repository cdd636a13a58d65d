"""The job that compares designs: tables, a figure, and what it refuses."""

import csv
import pathlib

import numpy as np
import pytest

from nash_jax.configs import design as configs
from nash_jax.design import rounds
from nash_jax.jobs import collect, design


def read(path: pathlib.Path) -> list[dict[str, str]]:
  with path.open() as file:
    return list(csv.DictReader(file))


def test_the_simulation_leaves_rows_means_a_table_and_a_figure(tmp_path, capsys):
  means = design.run(configs.get_config("simulation,smoke"), tmp_path)
  assert {file.name for file in tmp_path.iterdir()} == {
    "design.csv", "design_means.csv", "design.md", "design.png", "design.svg", ".lock",
  }  # fmt: skip
  rows = read(tmp_path / "design.csv")
  assert len(rows) == 2 * 4 * 2 * 2  # kinds of prompts, designs, budgets, seeds
  assert len(means) == 2 * 4 * 2
  for mean in means:
    group = [row for row in rows if all(row[k] == str(mean[k]) for k in ("prompts", "design"))]
    worst = [float(row["worst"]) for row in group if row["labels"] == str(mean["labels"])]
    assert np.mean(worst) == pytest.approx(mean["worst"], abs=1e-5)
  table = (tmp_path / "design.md").read_text()
  assert table in capsys.readouterr().out
  assert all(f"| {name}" in table for name in rounds.DESIGNS)


def test_accuracy_counts_pairs_with_a_winner_and_halves_a_draw():
  arms, p_win = np.array([[1.0], [1.0], [-1.0], [0.0]]), np.array([0.9, 0.5, 0.7, 0.1])
  assert design.accuracy(np.array([2.0]), arms, p_win) == 0.5  # right, tie, wrong, draw
  assert design.accuracy(np.array([2.0]), arms[:2], p_win[:2]) == 1


def test_on_responses_every_design_meets_the_same_held_out_pairs(tmp_path, monkeypatch):
  """Where features tell all, labels of every pair leave no error, and each design is on the way."""
  config = configs.get_config("stories,smoke")
  rng, truth = np.random.default_rng(0), np.array([3.0, -2.0, 1.0])

  def make_pool(settings, tokenizer, examples):
    arms = rounds.scaled(rng.standard_normal((300, 3)))
    return collect.Pool(None, None, np.zeros((300, 3), int), arms)

  monkeypatch.setattr(design, "load_prompts", lambda *args: ([0], [0]))
  monkeypatch.setattr(collect, "make_pool", make_pool)
  monkeypatch.setattr(
    collect, "ask", lambda judge, pool, pairs, size: 1 / (1 + np.exp(-3 * pool.arms @ truth))
  )
  means = {(row["design"], row["labels"]): row["accuracy"] for row in design.run(config, tmp_path)}
  assert {name for name, _ in means} == {*rounds.DESIGNS, design.EVERYTHING}
  assert means[design.EVERYTHING, 32] > 0.97
  assert all(0.75 < means[name, 32] <= 1 for name in rounds.DESIGNS)


@pytest.mark.slow
def test_the_storyteller_s_smoke_run_ends_within_a_minute(tmp_path):
  means = design.run(configs.get_config("stories,smoke"), tmp_path)
  assert all(0 <= row["accuracy"] <= 1 for row in means)
  assert (tmp_path / "design.png").exists()


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"study": "best"}, "study: got 'best', expected one of collection, simulation"),
    ({"designs": ("odpo", "best")}, "designs: got 'best', expected one of"),
    ({"designs": ()}, "designs: expected at least one"),
    ({"budgets": (0, 16)}, "budgets: expected whole numbers of at least 1, got"),
    ({"seeds": 1}, "seeds: expected whole numbers of at least 2, got"),
    ({"simulation.common": 99}, "simulation.common: expected fewer than simulation.dimension"),
    (
      {"study": "collection", "budgets": (10**6,)},
      "budget: expected at most 96, the pairs of 16 prompts, got 1000000",
    ),
    (
      {"study": "collection", "collection.features.name": "gpm"},
      "features.name: got 'gpm', expected one of bradley_terry, gemma",
    ),
  ],
)
def test_a_comparison_is_checked_before_it_starts(changes, message, tmp_path, monkeypatch):
  monkeypatch.setattr(design, "load_prompts", None)
  config = configs.get_config("stories,smoke")
  config.study = "simulation"
  config.update_from_flattened_dict(changes)
  with pytest.raises(ValueError, match=message):
    design.run(config, tmp_path)


def test_people_are_no_judge_of_a_comparison(tmp_path):
  config = configs.get_config("stories,smoke")
  config.collection.judge.update(name="human", votes=str(tmp_path / "votes"))
  with pytest.raises(ValueError, match=r"collection.judge.name: expected a judge that answers at"):
    design.run(config, tmp_path / "run")

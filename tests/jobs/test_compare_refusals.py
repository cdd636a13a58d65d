"""Comparisons that cannot be made are refused before their first run."""

import json

import pytest
from comparisons import config, labelled

from nash_jax import train
from nash_jax.config import describe, resolve
from nash_jax.configs import stories_compare
from nash_jax.jobs import compare


@pytest.mark.parametrize(
  ("runs", "message"),
  [
    (({}, {}), "run 2, 'nash_mp': expected a unique name.* run 1, 'nash_mp' has it"),
    (
      ({"label": "a"}, {"label": "a", "algorithm.kappa": 0.9}),
      "run 2, 'a': expected a unique name.* run 1, 'a' has it",
    ),
    (({"label": "a"}, {"label": "b"}), "runs 'a' and 'b': expected runs that differ"),
    (({"label": "a", "algorithm.kappa": 0.1}, {}), "runs 'a' and 'nash_mp': expected .* differ"),
    (({"label": "reference"},), "run's label: expected one other than 'reference'"),
    (({"label": ""},), "run 1: label: expected text, got ''"),
    (({"label": 7},), "run 1: label: expected text, got 7"),
    (
      ({"algorithm.mixtur": 0.1},),
      "run 'nash_mp': config field algorithm.mixtur.*did you mean 'mixture'",
    ),
    (({"algoritm.mixture": 0.1},), "run 'nash_mp': .*did you mean 'algorithm'"),
    (({"algorithm.mixture": "x"},), "run 'nash_mp': .*expected a value like 0.25, got 'x'"),
    (({"algorithm.kappa": True},), "run 'nash_mp': .*expected a value like 0.1, got True"),
    (({"algorithm": {"kappa": 0.2}},), "run 'nash_mp': .*algorithm: expected one field"),
    (({"algorithm.name.x": 1},), "run 'nash_mp': .*algorithm.name is a value, not a group"),
    (
      ({"algorithm.beta": -1.0},),
      "run 'nash_mp': algorithm.beta: expected a number in \\[1e-9, 1e6\\], got -1",
    ),
    (({"job": "fit"},), "run 'nash_mp': job: expected no change"),
    (({"seed": 3},), "run 'nash_mp': seed: expected no change, got 3"),
    (({"workdir": "/etc"},), "run 'nash_mp': config field workdir"),
    (({"evaluation.exact": True},), "run 'nash_mp': evaluation.exact: expected the base's"),
    (({"model.preset": "tiny"},), "run 'nash_mp': model.preset: expected arena.model.preset"),
  ],
)
def test_runs_that_cannot_be_compared_are_refused_by_name(runs, message):
  with pytest.raises(ValueError, match=message):
    resolve(labelled(*runs))


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("learning_rates", (0.1, 0.1), "learning_rates: expected different numbers"),
    ("learning_rates", (0.1, float("nan")), "learning_rates: expected numbers in"),
    ("tuning_seed", 1, "tuning_seed: expected a seed outside 0 to"),
    ("tuning_metric", "gap", "tuning_metric: expected regularised, unless base.evaluation.exact"),
    ("seeds", 0, "seeds: expected a whole number in"),
    ("kinds", (), "kinds: expected at least one"),
    ("kinds", ("tabular",), "kinds: expected only network"),
    ("arena.select_judge", "popultion", "arena: select_judge: got 'popultion'.*did you mean"),
    ("arena.samples", 0, "arena.samples: expected a whole number in"),
    (
      "arena.policies",
      {"mine": {"weights": "runs/mine", "best_of": 1}},
      r"arena.policies: expected none, got \['mine'\]",
    ),
  ],
)
def test_a_comparison_is_checked_before_its_first_run(field, value, message):
  c = config("nash_mp")
  c.update_from_flattened_dict({field: value})
  with pytest.raises(ValueError, match=message):
    resolve(c)


def test_a_rate_of_its_own_beside_learning_rates_is_refused():
  c = labelled({"optimizer.learning_rate": 1.0})
  resolve(c)
  c.learning_rates = (1e-4, 1e-3)
  with pytest.raises(ValueError, match=r"optimizer.learning_rate: expected no change, got 1.0"):
    resolve(c)


def test_a_run_that_diverged_is_a_result_and_is_not_made_again(tmp_path, monkeypatch):
  """What is looked for is its config as it was resolved, with the defaults of the method."""
  folders = []

  def diverge(config, workdir, progress):
    folders.append(workdir)
    workdir.mkdir(parents=True)
    (workdir / "config.json").write_text(json.dumps(describe(config)))
    line = {"step": 0, compare.WIN: 0.5, compare.KL: 0.0}
    (workdir / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    raise FloatingPointError("metric 'loss' is nan at step 1")

  monkeypatch.setattr(train, "run", diverge)
  c = stories_compare.get_config("smoke")
  c.runs, c.arena.judges = ({"algorithm.name": "sppo"},), {}
  for _ in range(2):
    result = compare.run(c, tmp_path, progress=False)
    assert result["network"]["sppo"]["seeds"][0][compare.WIN] == [0.5, None]
  assert len(folders) == 1


def test_a_file_that_is_still_to_be_made_is_looked_for_before_the_first_run(tmp_path, monkeypatch):
  monkeypatch.setattr(train, "run", lambda *_, **__: pytest.fail("a run starts"))
  c = stories_compare.get_config("smoke")
  rewards = {"algorithm.name": "rlhf", "judge.name": "bradley_terry"}
  paths = [str(tmp_path / name) for name in ("one.safetensors", "two.safetensors")]
  runs = [{**rewards, "judge.model.weights": path} for path in paths]
  c.runs = ({}, *({**run, "label": run["judge.model.weights"]} for run in runs))
  resolve(c)
  with pytest.raises(ValueError, match=r"judge.model.weights: expected a file .*one.safetensors"):
    compare.run(c, tmp_path / "work", progress=False)

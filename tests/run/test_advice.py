"""Advice from the metrics of a run: histories that must bring up each line, and that must not."""

import types

import pytest

import nash_jax
from nash_jax.run import advice

# Of the bundled storyteller's 80 steps, which went well.
GOOD = {
  "p_win": [0.5] * 12,
  "valid": [1.0] * 12,
  "flip_rate": [0.094, 0.125, 0.094, 0.125, 0.031, 0.156, 0.094, 0.188, 0.094, 0.125, 0.062, 0.9],
  "tie_mass": [0.125, 0.156, 0.094, 0.188, 0.125, 0.188, 0.062, 0.125, 0.094, 0.188, 0.219, 1.0],
  "kl_to_reference": [0.0, 0.348, 0.847, 1.541, 2.083, 2.048, 2.617, 3.72, 2.956, 3.324, 3.2, 3.1],
  "gradient_norm": [25.3, 23.0, 23.5, 22.9, 22.9, 24.9, 20.9, 30.9, 25.4, 26.9, 27.6, 24.4],
  "eval/win_rate_vs_reference": [0.492, 0.684, 0.728, 0.725, 0.759],
}


def prefixes(history):
  longest = max(map(len, history.values()))
  return [
    {name: values[:n] for name, values in history.items() if values[:n]}
    for n in range(1, longest + 1)
  ]


def test_a_run_that_goes_well_is_told_nothing():
  for history in prefixes(GOOD):
    assert advice.recommend(history, kl_bound=10) == {}


@pytest.mark.parametrize(
  ("values", "name", "line"),
  [
    (
      {"flip_rate": [0.5, 0.95, 1.0, 1.0], "tie_mass": [0.4, 1, 1, 1]},
      "judge",
      "flip_rate is 0.98",
    ),
    ({"flip_rate": [0.1] * 4, "tie_mass": [0.2, 1.0, 0.95, 1.0]}, "judge", "tie_mass is 0.98"),
    ({"valid": [1.0, 0.0]}, "verdicts", "no verdict could be read, so nothing is learned"),
    ({"kl_to_reference": [2, 9, 11, 12, 14]}, "kl", "kl_to_reference is 14.0 nats a response"),
    (
      {"p_win": [0.5], "gradient_norm": [41, 50, 60, 180, 344, 300]},
      "gradient",
      "risen from 50 to 300",
    ),
    (
      {"eval/win_rate_vs_reference": [0.525, 0.513, 0.506, 0.493]},
      "win rate",
      "fallen from 0.525 to 0.493",
    ),
    (
      {"eval/win_rate_vs_reference": [0.5, 0.7, 0.75, 0.6, 0.64]},
      "win rate",
      "fallen from 0.750 to 0.640",
    ),
    ({"eval/accuracy": [0.417, 0.333]}, "accuracy", "eval/accuracy is 0.333, no better"),
  ],
)
def test_a_run_that_goes_wrong_is_told_what(values, name, line):
  before, whole = prefixes(values)[-2], prefixes(values)[-1]
  assert name not in advice.recommend(before, kl_bound=10)
  found = advice.recommend(whole, kl_bound=10)
  assert list(found) == [name]
  assert line in found[name]


@pytest.mark.parametrize(
  "values",
  [
    {"flip_rate": [1.0, 1.0, 0.4, 1.0, 1.0], "tie_mass": [1.0, 1.0, 0.3, 1.0, 1.0]},
    {"valid": [0.0, 0.5]},
    {"kl_to_reference": [14.0, 13.0, 12.5, 12.0, 11.0, 10.5]},  # high, but it comes down
    {"kl_to_reference": [2.0, 30.0, 4.0, 30.0, 5.0, 6.0]},
    {"p_win": [0.5], "gradient_norm": [50, 40, 45, 200, 190, 60, 300, 50]},
    {"gradient_norm": [0.1, 0.2, 0.3, 5.0, 6.0, 7.0]},  # of a fit, whose warm-up begins small
    {"p_win": [0.5], "gradient_norm": [0.0, 0.0, 0.0, 5.0, 6.0, 7.0]},  # after steps of no verdict
    {"eval/win_rate_vs_reference": [0.75, 0.749, 0.748, 0.747, 0.745]},
    {"eval/win_rate_vs_reference": [0.5, 0.75, 0.64, 0.74]},
    {"eval/accuracy": [0.4, 0.52, 0.49]},
  ],
)
def test_what_is_noise_or_mends_itself_is_told_nothing(values):
  for history in prefixes(values)[1 if "valid" in values else 0 :]:
    assert advice.recommend(history, kl_bound=10) == {}


def test_the_bound_of_the_kl_is_that_of_the_regularisation():
  config = nash_jax.config.train()
  for beta, bound in ((0.1, 10), (0.01, 100), (1.0, 10)):
    config.algorithm.beta = beta
    assert advice.kl_bound(config) == bound
  assert advice.kl_bound(nash_jax.config.fit()) == float("inf")
  assert advice.recommend({"kl_to_reference": [50.0, 60.0, 70.0]}, kl_bound=100) == {}


@pytest.mark.parametrize(("warmup", "steps", "said"), [(100, 120, 1), (10, 20, 0), (0, 1, 0)])
def test_a_warm_up_of_most_of_the_steps_is_told_before_the_first(warmup, steps, said):
  optimizer = types.SimpleNamespace(warmup_steps=warmup)
  lines = advice.of_config(types.SimpleNamespace(optimizer=optimizer, steps=steps))
  assert len(lines) == said
  assert all(f"warmup_steps={warmup}" in line for line in lines)

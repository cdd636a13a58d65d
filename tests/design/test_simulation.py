"""The simulation of which labels to buy: what it measures, and what the designs gain in it."""

import numpy as np
import pytest

from nash_jax.design import optimal, rounds, simulation

CONFIG = {
  "prompts": 200, "responses": 6, "dimension": 12, "common": 4, "rare": 0.05, "norm": 6.0,
}  # fmt: skip
SMALL = {**CONFIG, "prompts": 20, "responses": 3, "dimension": 4, "common": 2, "rare": 0.1}


def test_prompts_are_mostly_alike_and_features_lie_in_the_ball():
  world = simulation.world(CONFIG, True, seed=0)
  lengths = np.linalg.norm(world.features, axis=2)
  np.testing.assert_allclose([lengths.max(), np.linalg.norm(world.theta)], [1, 6])
  varies = np.ptp(world.features, axis=1) > 0
  assert (varies.sum(axis=1) == np.where(np.arange(200) < 10, 8, 4)).all()
  assert not (varies[:10].any(axis=0) & varies[10:].any(axis=0)).any()
  assert simulation.world(CONFIG, False, seed=0).features.all()


def test_regret_is_zero_for_the_truth_and_the_same_in_turned_coordinates():
  world = simulation.world(SMALL, False, seed=1)
  np.testing.assert_array_equal(world.regrets(world.theta), 0)
  rng = np.random.default_rng(0)
  theta, turn = rng.standard_normal(4), np.linalg.qr(rng.standard_normal((4, 4)))[0]
  turned = simulation.World(world.features @ turn, world.theta @ turn)
  regrets = world.regrets(theta)
  assert regrets.max() > 0.1
  np.testing.assert_allclose(turned.regrets(theta @ turn), regrets, atol=1e-12)
  rewards = world.features @ world.theta
  np.testing.assert_allclose(
    world.regrets(-world.theta), rewards.max(axis=1) - rewards.min(axis=1), atol=1e-12
  )


def test_odpo_s_worst_prompt_has_at_most_half_the_regret_of_uniform_pairs():
  """At 256 labels, over ten seeds, with 95% intervals apart."""
  rows = simulation.simulate(CONFIG, ("uniform", "odpo", "greedy"), (256,), seeds=10)
  found = {
    (row["prompts"], row["design"]): row
    for row in simulation.summary(rows, ("prompts", "design"), ("worst", "mean"))
  }
  uniform, odpo, greedy = (found["mostly alike", name] for name in ("uniform", "odpo", "greedy"))
  assert odpo["worst"] <= uniform["worst"] / 2
  assert odpo["worst_high"] < uniform["worst_low"]
  assert greedy["worst"] < 0.6 * uniform["worst"]
  # Where all prompts are alike there is less to gain.
  assert found["isotropic", "odpo"]["worst"] > 0.6 * found["isotropic", "uniform"]["worst"]


def test_the_largest_error_of_the_log_odds_falls_with_the_root_of_the_labels():
  """As the bound says; regret falls faster once most best responses are found."""
  errors = []
  for budget in (4096, 65_536):
    found = []
    for seed in range(8):
      world = simulation.world(SMALL, False, seed)
      arms = rounds.scaled(world.pairs())
      truth = world.theta * np.linalg.norm(world.pairs(), axis=1).max()
      p_win = 1 / (1 + np.exp(-arms @ truth))
      theta = simulation.buy("odpo", arms, budget, simulation.sampled(p_win, seed), seed)
      found.append(np.abs(arms @ (theta - truth)).max())
    errors.append(np.sqrt(np.mean(np.square(found))))
  assert errors[0] / errors[1] == pytest.approx(4, rel=0.35)


def test_the_design_of_the_simulation_reaches_the_dimension_and_keeps_it_when_rounded():
  arms = rounds.scaled(simulation.world(CONFIG, True, seed=0).pairs())
  design = optimal.optimal(arms, 0.01)
  assert design.rank == 12
  assert design.worst <= 1.01 * 12 * (1 + 1e-9)
  for labels in (256, 1024):
    counts = optimal.counts(design.weights, labels).astype(float)
    assert labels * optimal.leverages(arms, counts).max() <= 1.14 * 12
  # A twentieth of the prompts gets two thirds of the labels: they have 8 of 12 directions.
  np.testing.assert_allclose(design.weights[: 10 * 15].sum(), 8 / 12, atol=0.01)


def test_a_summary_has_the_mean_of_each_group_and_student_s_interval():
  rows = [{"d": d, "seed": s, "x": x} for d, xs in (("a", (1, 3)), ("b", (2, 2))) for s, x in
          enumerate(xs)]  # fmt: skip
  a, b = simulation.summary(rows, ("d",), ("x",))
  assert a == pytest.approx({"d": "a", "x": 2, "x_low": -10.7062, "x_high": 14.7062}, abs=1e-4)
  assert b == {"d": "b", "x": 2, "x_low": 2, "x_high": 2}


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("prompts", 1, "simulation.prompts: expected a whole number of at least 2, got 1"),
    ("common", 12, "simulation.common: expected fewer than simulation.dimension, got 12"),
    ("rare", 0.001, "simulation.rare: expected a share in .*, got 0.001"),
    ("norm", 0.0, "simulation.norm: expected a positive number, got 0.0"),
  ],
)
def test_a_simulation_is_checked_before_it_starts(field, value, message):
  with pytest.raises(ValueError, match=message):
    simulation.simulate({**CONFIG, field: value}, ("uniform",), (16,), 2)

"""Optimal designs against the equivalence theorem, and against what can be worked by hand."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from nash_jax.design import optimal


def random_arms(seed: int, count: int, size: int, rank: int | None = None) -> np.ndarray:
  """Returns arms of a random span, whose directions have very different lengths."""
  rng = np.random.default_rng(seed)
  rank = rank or size
  spread = rng.standard_normal((count, rank)) * np.geomspace(1, 0.01, rank)
  return spread @ rng.standard_normal((rank, size))


CASES = strategies.tuples(
  strategies.integers(0, 1000), strategies.integers(12, 60), strategies.integers(1, 6),
  strategies.integers(0, 3),
)  # fmt: skip


@hypothesis.given(CASES)
@hypothesis.settings(max_examples=25)
def test_the_largest_variance_reaches_the_rank(case):
  seed, count, rank, more = case
  arms = random_arms(seed, count, rank + more, rank)
  design = optimal.optimal(arms, tolerance=0.01)
  assert design.rank == rank
  variances = optimal.leverages(arms, design.weights)
  # Of any weights the mean variance is the rank, so none has a smaller largest one.
  np.testing.assert_allclose(design.weights @ variances, rank, rtol=1e-9)
  assert rank * (1 - 1e-9) <= design.worst <= 1.01 * rank * (1 + 1e-9)
  np.testing.assert_allclose(variances.max(), design.worst, rtol=1e-9)
  assert design.weights.min() >= 0
  np.testing.assert_allclose(design.weights.sum(), 1, rtol=1e-12)


@hypothesis.given(CASES)
@hypothesis.settings(max_examples=10)
def test_every_step_raises_log_det_and_the_last_is_that_of_the_weights(case):
  seed, count, rank, _ = case
  arms = random_arms(seed, count, rank)
  design = optimal.optimal(arms, tolerance=0.001)
  assert (np.diff(design.log_det) >= 0).all()
  one, last = (
    np.linalg.slogdet((arms.T * weights) @ arms)[1]
    for weights in (np.full(count, 1 / count), design.weights)
  )
  np.testing.assert_allclose(design.log_det[-1], last - one, atol=1e-8)


def test_a_step_is_the_best_along_its_line():
  arms = random_arms(0, 30, 4)
  weights = np.full(30, 1 / 30)
  variances = optimal.leverages(arms, weights)
  best, g = int(np.argmax(variances)), float(variances.max())

  def gain(step):
    moved = (1 - step) * weights + step * np.eye(30)[best]
    return np.linalg.slogdet((arms.T * moved) @ arms)[1]

  step = (g / 4 - 1) / (g - 1)
  assert gain(step) > max(gain(step - 1e-3), gain(step + 1e-3))


def test_orthonormal_arms_have_equal_weights_to_begin_with():
  arms = np.linalg.qr(np.random.default_rng(0).standard_normal((7, 7)))[0]
  design = optimal.optimal(arms)
  np.testing.assert_allclose(design.weights, 1 / 7, rtol=1e-9)
  assert len(design.log_det) == 1
  np.testing.assert_array_equal(optimal.counts(design.weights, 21), 3)


def test_the_design_does_not_change_with_the_coordinates():
  """Any invertible map, of which rotations are some; and all arms scaled by one number."""
  rng = np.random.default_rng(1)
  arms = random_arms(1, 40, 5)
  turn = np.linalg.qr(rng.standard_normal((5, 5)))[0]
  stretch = rng.standard_normal((5, 5)) + 3 * np.eye(5)
  weights = optimal.optimal(arms, 1e-3).weights
  for mapped in (arms @ turn, arms @ stretch, 1e-3 * arms):
    np.testing.assert_allclose(optimal.optimal(mapped, 1e-3).weights, weights, atol=1e-9)
  picks = optimal.greedy(arms, 20, 0.1)
  np.testing.assert_array_equal(optimal.greedy(arms @ turn, 20, 0.1), picks)


@pytest.mark.parametrize("labels", [1, 64, 256, 1024])
def test_rounded_weights_sum_to_the_labels_and_stay_near_the_optimum(labels):
  arms = random_arms(2, 3000, 12)
  design = optimal.optimal(arms, 0.01)
  counts = optimal.counts(design.weights, labels)
  assert counts.sum() == labels
  assert counts.min() >= 0
  assert (np.abs(counts - labels * design.weights) < 2).all()
  if labels > 100:
    assert labels * optimal.leverages(arms, counts.astype(float)).max() <= 1.14 * 12


def test_equal_weights_of_more_arms_than_labels_still_give_all_labels():
  """Each of them is below the least weight that is kept."""
  counts = optimal.counts(np.full(3000, 1 / 3000), 64)
  assert counts.sum() == 64
  assert counts.max() == 1


def test_greedy_picks_are_those_of_fresh_inverses_and_never_twice():
  arms, ridge, taken = random_arms(3, 50, 4), 0.05, np.array([4, 7])
  picks = optimal.greedy(arms, 48, ridge, taken)
  assert sorted([*picks, *taken]) == [*range(50)]
  seen = [*taken]
  for pick in picks[:30]:
    matrix = ridge * np.eye(4) + arms[seen].T @ arms[seen]
    variance = np.sum(arms * np.linalg.solve(matrix, arms.T).T, axis=1)
    others = np.setdiff1d(np.arange(50), seen)
    assert variance[pick] >= variance[others].max() * (1 - 1e-9)
    seen.append(pick)
  again = optimal.greedy(arms, 20, ridge, np.concatenate([taken, picks[:10]]))
  np.testing.assert_array_equal(again, picks[10:30])


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: optimal.optimal(np.zeros((3, 2))), "arms: expected one that is not 0, got"),
    (lambda: optimal.optimal(np.ones((0, 2))), r"arms: expected an array \[N D\], N ≥ 1, got"),
    (lambda: optimal.optimal(np.array([[np.nan]])), "arms: expected finite numbers"),
    (lambda: optimal.optimal(np.eye(2), 0.0), "tolerance: expected at least 1e-6, got 0.0"),
    (lambda: optimal.counts(np.ones(1), 0), "labels: expected at least 1, got 0"),
    (
      lambda: optimal.greedy(np.eye(3), 3, 1.0, np.array([0])),
      "labels: expected at most 2, one for each pair that has none, got 3. Buy fewer",
    ),
    (
      lambda: optimal.leverages(np.eye(3), np.array([1.0, 1.0, 0.0])),
      "arms with weight: expected rank 3, that of all arms, got 2",
    ),
  ],
)
def test_what_is_no_design_is_refused(call, message):
  with pytest.raises(ValueError, match=message):
    call()

"""Choosing pairs in rounds, and fitting rewards to their labels."""

import numpy as np
import pytest
from scipy import special

from nash_jax.design import optimal, rounds

NONE, UNLABELLED = np.zeros(0, int), np.zeros(0)


def some_arms(seed=0, count=120, size=5):
  rng = np.random.default_rng(seed)
  spread = rng.standard_normal((count, size)) * np.geomspace(1, 0.1, size)
  return rounds.scaled(spread)


def test_the_fit_is_where_the_gradient_vanishes_and_finds_the_truth():
  arms, truth = some_arms(count=4000), np.array([1.0, -2.0, 3.0, 0.5, -1.0])
  p_win = special.expit(arms @ truth)
  theta = rounds.fit(arms, p_win, 1e-6)
  np.testing.assert_allclose(theta, truth, rtol=1e-3)
  theta = rounds.fit(arms, p_win, 0.2)
  slope = arms.T @ (special.expit(arms @ theta) - p_win) + 0.2 * theta
  np.testing.assert_allclose(slope, 0, atol=1e-5)
  # A pair read from its other side is the same label.
  other = rounds.fit(-arms, 1 - p_win, 0.2)
  np.testing.assert_allclose(other, theta, atol=1e-6)


def buy(name, budget, arms, truth, seed=0):
  """Returns the sizes of the rounds, the pairs that are labelled, and their labels."""
  rng, chosen, p_win, sizes = np.random.default_rng(seed), NONE, UNLABELLED, []
  while len(new := rounds.choose(name, arms, budget, chosen, p_win, seed)):
    sizes.append(len(new))
    chosen = np.concatenate([chosen, new])
    p_win = np.concatenate([p_win, rng.binomial(1, special.expit(arms[new] @ truth))])
  return sizes, chosen, p_win


@pytest.mark.parametrize("name", rounds.DESIGNS)
def test_every_design_buys_its_budget_and_then_stops(name):
  sizes, chosen, _ = buy(name, 100, some_arms(), np.full(5, 2.0))
  assert sizes == ([16, 16, 32, 36] if name == "active" else [100])
  assert chosen.min() >= 0
  assert name == "odpo" or len({*chosen}) == 100


def test_the_first_round_of_active_is_the_beginning_of_greedy_and_later_ones_weigh_uncertainty():
  arms, truth = some_arms(), 30 * np.eye(5)[0]
  _, greedy, _ = buy("greedy", 64, arms, truth)
  _, active, p_win = buy("active", 64, arms, truth)
  np.testing.assert_array_equal(active[:16], greedy[:16])
  chosen = active[:32]
  p = special.expit(arms @ rounds.fit(arms[chosen], p_win[:32], rounds.penalty(arms)))
  weighted = arms * np.sqrt(p * (1 - p))[:, None]
  expected = optimal.greedy(weighted, 32, rounds.penalty(arms), chosen)
  np.testing.assert_array_equal(active[32:], expected)
  # A pair whose winner is all but certain says little.
  margins = np.abs(arms @ truth)
  assert margins[active[16:]].mean() < margins[greedy[16:]].mean()


def test_odpo_of_orthonormal_pairs_is_uniform():
  arms = np.linalg.qr(np.random.default_rng(0).standard_normal((6, 6)))[0]
  odpo = rounds.choose("odpo", arms, 30, NONE, UNLABELLED)
  np.testing.assert_array_equal(np.bincount(odpo), 5)
  uniform = rounds.choose("uniform", arms, 6, NONE, UNLABELLED)
  np.testing.assert_array_equal(np.sort(uniform), odpo[::5])


def test_seeds_decide_uniform_alone():
  arms = some_arms()
  for name in rounds.DESIGNS:
    one, two = (rounds.choose(name, arms, 16, NONE, UNLABELLED, seed) for seed in (0, 1))
    assert np.array_equal(one, two) == (name != "uniform")


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: rounds.choose("best", np.eye(2), 1, NONE, UNLABELLED), "design: got 'best', expected"),
    (
      lambda: rounds.choose("active", np.eye(2), 3, NONE, UNLABELLED),
      "budget: expected at most 2, the number of pairs, got 3. Buy fewer labels, draw more",
    ),
    (lambda: rounds.scaled(np.zeros((4, 2))), "pairs: expected one of two different responses"),
  ],
)
def test_what_cannot_be_chosen_is_refused(call, message):
  with pytest.raises(ValueError, match=message):
    call()

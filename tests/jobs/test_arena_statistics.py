"""The arena's statistics, as functions of arrays."""

import jax
import numpy as np
import pytest
import scipy
from arena_verdicts import verdicts

from nash_jax.jobs import arena
from nash_jax.jobs.rates import TAIL


def test_self_cells_are_one_half_and_the_table_is_antisymmetric():
  rates = arena.win_rates(*verdicts(30, 3, 2))
  np.testing.assert_allclose(np.diag(rates["mean"]), 0.5, atol=1e-12)
  assert not np.diag(rates["significant"]).any()
  np.testing.assert_allclose(rates["mean"] + rates["mean"].T, 1, atol=1e-12)
  np.testing.assert_allclose(rates["sigma3"], rates["sigma3"].T, atol=1e-12)
  np.testing.assert_allclose(rates["low"] + rates["high"].T, 1, atol=1e-12)


def test_sigma_of_coin_flips_is_the_binomial_one():
  n, wins = 20, 15
  p = np.zeros((n, 1, 1, 1, 1))
  p[:wins] = 1
  rates = arena.win_rates(p, np.ones(p.shape, bool))
  assert rates["mean"].item() == wins / n
  expected = 3 * np.sqrt(wins * (n - wins) / n**2 / (n - 1))
  np.testing.assert_allclose(rates["sigma3"].item(), expected, rtol=1e-12)
  assert rates["significant"].item() == (wins / n - expected > 0.5)


def test_more_samples_of_the_same_prompt_are_no_more_prompts():
  p, valid = verdicts(12, 2, 2)
  once = arena.win_rates(p[:, :1, :, 1:], valid[:, :1, :, 1:])
  again = arena.win_rates(*(a[:, :1, :, 1:].repeat(5, axis=2) for a in (p, valid)))
  np.testing.assert_allclose(again["sigma3"], once["sigma3"], rtol=1e-12)
  np.testing.assert_allclose(again["mean"], once["mean"], rtol=1e-12)
  assert again["n"].item() == once["n"].item() == 12


def test_the_bootstrap_agrees_with_three_sigma():
  rates = arena.win_rates(*verdicts(400, 2, 2))
  for ends in (("low", "high"), ("bootstrap_low", "bootstrap_high")):
    low, high = (rates[end][0, 1] for end in ends)
    np.testing.assert_allclose((high - low) / 2, rates["sigma3"][0, 1], rtol=0.15)


def test_what_is_not_valid_does_not_count():
  p, valid = verdicts(10, 2, 2)
  valid = valid.copy()
  valid[:4, 0, :, 1] = valid[:4, 1, :, 0] = False  # four prompts without a pair of the two
  valid[5, 0, 0, 1, 0] = valid[5, 1, 0, 0, 0] = False
  rates = arena.win_rates(np.where(valid, p, np.nan), valid)
  assert rates["n"].tolist() == [[10, 6], [6, 10]]
  only = arena.win_rates(p[4:], valid[4:])
  np.testing.assert_allclose(rates["mean"][0, 1], only["mean"][0, 1])
  nothing = arena.win_rates(p, np.zeros_like(valid))
  assert np.isnan(nothing["mean"]).all()
  assert not nothing["significant"].any()
  assert np.isnan(nothing["low"]).all()


def test_one_prompt_is_never_significant():
  p, valid = verdicts(1, 2, 2)
  rates = arena.win_rates(p, valid)
  assert np.isnan(rates["sigma3"]).all()
  assert not rates["significant"].any()


def test_lengths_match_within_two_tokens_or_a_tenth():
  pairs = {(3, 5): True, (3, 6): False, (100, 110): True, (100, 112): False, (0, 2): True}
  lengths = np.array(list(pairs))[:, :, None]
  matched = arena.length_matched(lengths)[:, 0, 0, 1, 0]
  assert matched.tolist() == list(pairs.values())
  turned = arena.length_matched(lengths[:, ::-1])[:, 0, 0, 1, 0]
  np.testing.assert_array_equal(turned, matched)


def test_distinct_bigrams_by_hand_and_past_the_end():
  tokens = np.array([[1, 2, 1, 2, 9], [2, 1, 7, 7, 7]])
  lengths = np.array([4, 3])  # 12 21 12 | 21 17
  assert arena.distinct_bigrams(tokens, lengths) == 3 / 5
  assert arena.distinct_bigrams(np.pad(tokens, [(0, 0), (0, 3)]), lengths) == 3 / 5
  assert arena.distinct_bigrams(tokens, np.array([4, 1])) == 2 / 3
  assert np.isnan(arena.distinct_bigrams(tokens, np.array([1, 0])))


def test_the_best_response_wins_most_of_the_comparisons_that_count():
  strength = np.random.default_rng(0).normal(size=(5, 4))
  p = 1 / (1 + np.exp(strength[:, None, :] - strength[:, :, None]))
  valid = np.broadcast_to(~np.eye(4, dtype=bool), p.shape)
  choose = jax.jit(arena.choose_best)
  np.testing.assert_array_equal(choose(p, valid), strength.argmax(1))
  # Its diagonal, and what a judge could not read, may hold anything.
  best = strength.argmax(1)
  valid = valid.copy()
  valid[np.arange(5), best] = valid[np.arange(5), :, best] = False
  second = np.argsort(strength)[:, -2]
  np.testing.assert_array_equal(choose(np.where(valid, p, 1.0), valid), second)


def rates_of(*values):
  """The cell of one pair of policies, given its prompts' means."""
  p = np.array(values, float)[:, None, None, None, None]
  return {name: table.item() for name, table in arena.win_rates(p, p >= 0).items()}


@pytest.mark.parametrize(
  "values",
  [
    [1] * 5, [0] * 5, [1] * 9, [1, 1, 1, 1, 0.999], [0.51] * 2, [0.51, 0.51001], [0.9] * 3,
    [1] * 9 + [0], [1] * 11 + [0], [0.5] * 2, [0.5] * 40, [0.5 + 6e-8, 0.5] * 20, [1, 0] * 20,
  ],
)  # fmt: skip
def test_what_so_few_or_such_prompts_cannot_show_is_not_significant(values):
  """Fewer than ten never are: 2 / 2^9 > .003; nor are ties, nor what rounding tells apart."""
  cell = rates_of(*values)
  assert not cell["significant"]
  assert cell["low"] <= 0.5 <= cell["high"]
  assert 0 <= cell["low"] <= cell["mean"] <= cell["high"] <= 1
  assert cell["high"] - cell["low"] > 0.1
  assert cell["sigma3"] > 0.1


def test_a_win_rate_over_no_prompt_is_refused():
  with pytest.raises(ValueError, match="p_win: expected verdicts on at least one prompt, got 0"):
    arena.win_rates(np.ones((0, 2, 1, 2, 1)), np.ones((0, 2, 1, 2, 1), bool))


@pytest.mark.parametrize("n", [10, 20, 96])
def test_unanimous_prompts_have_the_exact_interval(n):
  """A rate p is possible while n wins of n are: p^n is the tail (Clopper and Pearson)."""
  won, lost = rates_of(*[1] * n), rates_of(*[0] * n)
  np.testing.assert_allclose(won["low"] ** n, TAIL, rtol=1e-6)
  np.testing.assert_allclose([lost["low"], lost["high"]], [0, 1 - won["low"]], atol=1e-9)
  assert won["high"] == 1
  assert won["significant"]
  assert lost["significant"]
  np.testing.assert_allclose(won["sigma3"], 1 - won["low"])
  # A judge whose certainty is not quite 1 knows no more.
  nearly = rates_of(*np.linspace(0.9999, 1, n))
  np.testing.assert_allclose(nearly["low"], won["low"], atol=1e-3)
  assert nearly["sigma3"] > 2.9 / (n + 1)


@pytest.mark.parametrize("n", [2, 5, 9, 10, 12, 15, 30])
def test_the_interval_covers_the_rate_of_every_coin(n):
  """By enumeration: 99.7% of all draws of n coins, whatever their rate."""
  cells = [rates_of(*[1] * wins, *[0] * (n - wins)) for wins in range(n + 1)]
  low, high = (np.array([cell[end] for cell in cells]) for end in ("low", "high"))
  for rate in np.linspace(0.02, 0.98, 49):
    covered = (low <= rate) & (rate <= high)
    chance = scipy.stats.binom.pmf(np.arange(n + 1), n, rate)
    assert chance[covered].sum() > 0.997
  significant = np.array([cell["significant"] for cell in cells])
  assert scipy.stats.binom.pmf(np.arange(n + 1), n, 0.5)[significant].sum() < 0.003


def test_a_spread_that_was_seen_is_three_sigma_as_ever():
  values = np.random.default_rng(0).normal(0.758, 0.13, 96).clip(0, 1)
  cell = rates_of(*values)
  np.testing.assert_allclose(cell["sigma3"], 3 * values.std(ddof=1) / np.sqrt(96))
  np.testing.assert_allclose(cell["mean"] - cell["low"], cell["sigma3"], rtol=0.1)


def test_what_is_no_probability_does_not_count():
  p, valid = (a.copy() for a in verdicts(12, 2, 1))
  p[:3, 0, 0, 1, 0] = [np.nan, np.inf, 1.5]
  rates = arena.win_rates(p, valid)
  assert rates["n"][0, 1] == 9
  assert rates["mean"][0, 1] == pytest.approx(p[3:, 0, 0, 1, 0].mean())


def test_no_response_that_could_not_be_compared_is_the_best():
  """Not even against one that lost every comparison."""
  p_win = np.array([[[0.5, 0.5, 0.5], [0.5, 0.5, 0.0], [0.5, 1.0, 0.5]]], np.float32)
  valid = np.zeros((1, 3, 3), bool)
  valid[0, 1, 2] = True  # as where the other order could not be read
  assert jax.jit(arena.choose_best)(p_win, valid).item() == 1


@pytest.mark.parametrize(
  ("count", "most", "expected"), [(96, 8, 12), (3, 2, 3), (25, 8, 5), (97, 16, 7), (5, 8, 1)]
)
def test_batches_are_equal_where_that_takes_at_most_twice_as_many(count, most, expected):
  assert arena._num_batches(count, most) == expected

"""Length-controlled win rates: identities, what they recover, and where there are none."""

import numpy as np
import pytest
from scipy import optimize, special

from nash_jax import report
from nash_jax.jobs import arena
from nash_jax.jobs.rates import LEAST_PROMPTS, _at_equal_length, length_controlled


def judged(p, longer_by):
  """Verdicts [N 2 1 2 1] on one response each of two policies, and lengths; a is longer by d."""
  p, d = np.asarray(p, float), np.asarray(longer_by)
  p_win = np.full((len(p), 2, 1, 2, 1), 0.5)
  p_win[:, 0, 0, 1, 0], p_win[:, 1, 0, 0, 0] = p, 1 - p
  valid = np.zeros(p_win.shape, bool)
  valid[:, 0, 0, 1, 0] = valid[:, 1, 0, 0, 0] = True
  return p_win, valid, np.stack([np.maximum(d, 0), np.maximum(-d, 0)], 1)[..., None]


def cell_of(p, longer_by, **options):
  tables = length_controlled(*judged(p, longer_by), **options)
  return {name: table[0, 1] for name, table in tables.items()}


def scaled(d):
  return np.tanh(d / np.sqrt(np.mean(np.square(d))))


def of_samples(n=60, policies=3, samples=2, seed=0):
  """Antisymmetric verdicts between all samples, that like longer ones, and lengths."""
  rng, k = np.random.default_rng(seed), policies * samples
  lengths = rng.integers(5, 60, (n, k)) + 4 * np.arange(k) // samples
  strength = rng.normal(size=(n, k)) + 0.02 * lengths
  p = special.expit(strength[:, :, None] - strength[:, None, :])
  valid = np.broadcast_to(~np.eye(k, dtype=bool), p.shape)
  shape = (n, policies, samples, policies, samples)
  return p.reshape(shape), valid.reshape(shape), lengths.reshape(n, policies, samples)


def test_two_sides_of_a_pair_add_to_one_and_a_policy_against_itself_is_one_half():
  tables = length_controlled(*of_samples())
  assert (tables["refused"] == "").all()
  np.testing.assert_allclose(np.diag(tables["mean"]), 0.5, atol=1e-9)
  different = ~np.eye(3, dtype=bool)
  assert (tables["mean"] + tables["mean"].T == 1)[different].all()
  assert tables["mean"][0, 1] != pytest.approx(0.5, abs=1e-3)
  np.testing.assert_allclose(tables["low"] + tables["high"].T, 1, atol=1e-12)
  for name in ("sigma3", "overlap", "explained", "n"):
    np.testing.assert_allclose(tables[name], tables[name].T, atol=1e-12)


def test_swapping_policies_gives_one_minus_the_rate():
  p, valid, lengths = of_samples(policies=2)
  one = length_controlled(p, valid, lengths)
  two = length_controlled(p[:, ::-1, :, ::-1], valid[:, ::-1, :, ::-1], lengths[:, ::-1])
  np.testing.assert_allclose(one["mean"][0, 1], 1 - two["mean"][0, 1], atol=1e-9)
  np.testing.assert_allclose(one["sigma3"][0, 1], two["sigma3"][0, 1], rtol=1e-6)


def test_identical_policies_are_one_half_raw_and_controlled():
  p, valid, lengths = of_samples(policies=1)
  twice = [np.concatenate([a, a], axis=1) for a in (p, valid)]
  p, valid = (np.concatenate([a, a], axis=3) for a in twice)
  lengths = np.concatenate([lengths, lengths], axis=1)
  rates, tables = arena.win_rates(p, valid), length_controlled(p, valid, lengths)
  np.testing.assert_allclose(rates["mean"], 0.5, atol=1e-12)
  np.testing.assert_allclose(tables["mean"], 0.5, atol=1e-9)
  assert not tables["significant"].any()


def test_responses_of_equal_length_have_the_raw_rates_and_intervals():
  p, valid, lengths = of_samples()
  raw = arena.win_rates(p, valid)
  tables = length_controlled(p, valid, np.full_like(lengths, 7))
  for name in ("mean", "sigma3", "low", "high", "n", "significant"):
    np.testing.assert_allclose(tables[name], raw[name], atol=1e-9)
  np.testing.assert_allclose(tables["overlap"], 1)
  assert (tables["explained"] == 0).all()


def test_an_endless_penalty_leaves_the_raw_rates():
  p, valid, lengths = of_samples()
  tables = length_controlled(p, valid, lengths, penalty=1e12)
  np.testing.assert_allclose(tables["mean"], arena.win_rates(p, valid)["mean"], atol=1e-9)


def test_a_judge_that_is_blind_to_length_leaves_the_raw_rate():
  rng = np.random.default_rng(0)
  p = special.expit(rng.normal(0.5, 1, 805))
  cell, raw = cell_of(p, rng.normal(20, 25, 805).astype(int)), np.mean(p)
  assert abs(cell["mean"] - raw) < cell["sigma3"] / 3
  assert cell["explained"] < 0.2
  assert cell["low"] < raw < cell["high"]


@pytest.mark.parametrize(("theta", "phi"), [(0.3, 1.0), (-0.5, -2.0), (1.5, 4.0)])
def test_what_follows_the_regression_is_recovered(theta, phi):
  d = np.random.default_rng(0).integers(-30, 60, 200)
  cell = cell_of(special.expit(theta + phi * scaled(d)), d, penalty=0.0)
  assert cell["mean"] == pytest.approx(special.expit(theta), abs=1e-8)
  assert cell["sigma3"] < 0.2


@pytest.mark.parametrize("hard", [False, True])
def test_a_true_rate_is_recovered_where_the_raw_one_is_biased(hard):
  """True LC .535, the model longer by .8 std, prompts with N(0, 1.5²) of logit noise.

  The raw rate is .605. 300 such runs of soft verdicts have LC of mean .536 and std .038 at 100
  prompts, .537 and .012 at 805; of hard ones the std is .067 and .022. The 95% interval holds the
  true rate in .93 and .96 of them.
  """
  rng, runs, raw = np.random.default_rng(int(hard)), 150, []
  expected = {100: (0.536, 0.067 if hard else 0.038), 805: (0.537, 0.022 if hard else 0.012)}
  for n, (mean, std) in expected.items():
    cells = []
    for _ in range(runs):
      d = np.round(rng.normal(0.8, 1, n) * 100)
      p = special.expit(LOGIT + 1.0 * scaled(d) + 1.5 * rng.normal(size=n))
      raw.append(p.mean())
      cells.append(cell_of(p > rng.random(n) if hard else p, d))
    cells = [cell for cell in cells if not cell["refused"]]
    assert len(cells) > 0.98 * runs, "an overlap of .21 is rarely below .1 by chance"
    found, sigma3 = (np.array([cell[name] for cell in cells]) for name in ("mean", "sigma3"))
    assert found.mean() == pytest.approx(mean, abs=4 * std / np.sqrt(runs))
    assert found.std() == pytest.approx(std, rel=0.25)
    covered = np.mean(np.abs(found - 0.535) < 1.96 * sigma3 / 3)
    assert 0.85 < covered < 0.99
  assert np.mean(raw) == pytest.approx(0.605, abs=0.01)


# A prompt's noise pulls a rate to one half: the logit whose rate is .535 with it.
NOISE = 1.5 * special.ndtri((np.arange(2000) + 0.5) / 2000)
LOGIT = optimize.brentq(lambda logit: np.mean(special.expit(logit + NOISE)) - 0.535, -3, 3)


@pytest.mark.parametrize(
  ("n", "p", "longer_by", "refused"),
  [
    (LEAST_PROMPTS - 1, lambda d: 0.5 + 0.3 * np.sin(d), lambda i: i % 21 - 10, "few"),
    (LEAST_PROMPTS, lambda d: 0.5 + 0.3 * np.sin(d), lambda i: i % 21 - 10, ""),
    (80, lambda d: d % 12 > 0, lambda i: i % 40 + 1, "overlap"),  # one-sided
    (80, lambda d: d % 12 > 0, lambda i: np.where(i < 7, -1, i), "overlap"),
    (80, lambda d: d % 12 > 0, lambda i: np.where(i < 9, -1, i), ""),
    (80, lambda d: d % 12 > 0, lambda i: np.where(i < 9, 0, i), ""),  # seen at equal length
    (80, lambda d: d > 0, lambda i: i % 21 - 10.5, "length"),  # the longer response always wins
    (80, lambda d: d < 0, lambda i: i % 21 - 10.5, "length"),
    (80, lambda d: np.where(d > 0, 0.98, 0.02), lambda i: i % 21 - 10.5, "length"),
    (80, lambda d: np.where(d > 0, 0.7, 0.2), lambda i: i % 3 - 1, ""),
    (80, lambda d: d < 99, lambda i: i % 21 - 10, ""),  # nor does length tell what is always so
  ],
)
def test_no_rate_is_given_where_equal_length_was_not_seen(n, p, longer_by, refused):
  d = np.asarray(longer_by(np.arange(n)))
  for sign in (1, -1):
    cell = cell_of(p(d) if sign > 0 else 1 - p(d).astype(float), sign * d)
    assert cell["refused"] == refused
    figures = np.array([cell[name] for name in ("mean", "sigma3", "low", "high")])
    assert np.isnan(figures).all() if refused else np.isfinite(figures).all()
    assert cell["n"] == n
    assert not (refused and cell["significant"])
  assert refused in ("", *report.REFUSED)


def test_one_sided_prompts_leave_the_rate_to_the_penalty_and_separated_ones_at_one_half():
  d = np.arange(40) + 1
  p = np.where(d % 14 == 1, 0.0, 1.0)  # 37 of 40
  valid = np.ones((40, 1, 1), bool)
  rates = [
    _at_equal_length(p[:, None, None], valid, d[:, None, None], penalty)[0]
    for penalty in (0, 1e-3, 1e-2, 0.1, 1e9)
  ]
  assert p.mean() == pytest.approx(rates[-1]) == 0.925
  assert np.ptp(rates) > 0.05
  d = d - 20.5
  rate = _at_equal_length((d > 0)[:, None, None] * 1.0, valid, d[:, None, None], 1e-3)[0]
  assert rate == pytest.approx(0.5, abs=1e-6)


def test_unanimous_verdicts_keep_the_interval_of_so_many_prompts():
  d = np.arange(100) % 21 - 10
  cell, (p, valid, _) = cell_of(np.ones(100), d), judged(np.ones(100), d)
  raw = {name: table[0, 1] for name, table in arena.win_rates(p, valid).items()}
  for name in ("mean", "sigma3", "low", "high", "significant"):
    assert cell[name] == pytest.approx(raw[name])


def test_what_is_not_valid_and_pairs_of_one_prompt_do_not_count_more():
  p, valid, lengths = of_samples(policies=2)
  again = length_controlled(
    *(a.repeat(3, axis=2).repeat(3, axis=4) for a in (p, valid)), lengths.repeat(3, axis=2)
  )
  once = length_controlled(p, valid, lengths)
  for name in ("mean", "sigma3", "overlap", "n"):
    np.testing.assert_allclose(again[name][0, 1], once[name][0, 1], rtol=1e-6)
  fewer, valid = np.where(np.arange(60)[:, None, None, None, None] < 8, np.nan, p), valid.copy()
  found = length_controlled(fewer, valid, lengths)
  only = length_controlled(p[8:], valid[8:], lengths[8:])
  for name in ("mean", "sigma3", "overlap", "n"):
    np.testing.assert_allclose(found[name][0, 1], only[name][0, 1], rtol=1e-6)

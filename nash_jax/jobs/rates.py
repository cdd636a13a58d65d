"""Win rates from an arena's verdicts, with intervals."""

import itertools
import math

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import optimize, special

from nash_jax import report
from nash_jax.validation import require

TAIL = 0.0015  # probability beyond each end of an interval: 99.7% are within 3σ
AGREE = 1e-6  # with a standard error below this, prompts differ only by rounding
PENALTY = 1e-3  # λ of a length-controlled win rate
LEAST_PROMPTS = 50  # for a length-controlled win rate; with fewer its intervals are too narrow
LEAST_OVERLAP = 0.1  # below this, equal length would be extrapolation
MOST_EXPLAINED = 0.9  # above this, verdicts show nothing but length


def interval(
  mean: Float[np.ndarray, "*p"], error: Float[np.ndarray, "*p"], n: Float[np.ndarray, "*p"]
) -> tuple[Float[np.ndarray, "*p"], Float[np.ndarray, "*p"]]:
  """Returns the ends of the 99.7% intervals of means of n values in [0, 1]; NaN where n = 0.

  It is Clopper and Pearson's interval for n*·mean wins in n* trials. n* is Korn and Graubard's
  (1998) effective number, mean·(1 − mean) / error² with Student's t for the normal quantile. With
  fewer prompts than report.FEW, or if all agree, the error says nothing, and n* is n. As in the
  "rule of three", a share u = 1 − TAIL^(1/n) of all prompts may differ from the n that were seen.
  The interval includes the mean if that share went the other way, so with fewer than ten prompts
  it always includes one half.

  Args:
    error: the standard error of the mean; NaN where n = 1.
  """

  def lower(mean, trials):
    wins = mean * trials
    return np.where(wins > 0, special.betaincinv(wins, trials - wins + 1, TAIL), 0.0)

  with np.errstate(all="ignore"):
    shrink = special.ndtri(TAIL) / special.stdtrit(np.maximum(n - 1, 1), TAIL)
    effective = mean * (1 - mean) * (shrink / error) ** 2
    trials = np.where((n >= report.FEW) & (error > AGREE), effective, n)
    turned = mean + (1 - TAIL ** (1 / n)) * (1 - 2 * mean)
    low = np.minimum(lower(mean, trials), turned)
    high = np.maximum(1 - lower(1 - mean, trials), turned)
  return np.where(n > 0, low, np.nan), np.where(n > 0, high, np.nan)


def ratio(
  totals: Float[np.ndarray, "N"], weights: Float[np.ndarray, "N"]
) -> tuple[float, float, float]:
  """Returns Σ totals / Σ weights and the ends of its interval, for N prompts, N ≥ 1.

  Prompts are independent but the counts within a prompt are not, so the error is that of a ratio of
  sums over prompts.
  """
  n, pairs = len(totals), weights.sum()
  mean = totals.sum() / pairs
  spread = math.fsum((totals - mean * weights) ** 2)
  error = math.sqrt(spread * n / (n - 1)) / pairs if n > 1 else math.nan
  low, high = interval(np.array(mean), np.array(error), np.array(n))
  return float(mean), float(low), float(high)


def win_rates(
  p_win: Float[np.ndarray, "N P S P S"],
  valid: Bool[np.ndarray, "N P S P S"],
  resamples: int = 2000,
  seed: int = 0,
) -> dict[str, np.ndarray]:
  """Returns tables of win rates and their intervals, [P P], for N prompts and P policies.

  - `mean` over prompts, `n` prompts that count, and the interval `low` to `high` (see `interval`).
  - `significant`: whether the interval excludes one half.
  - `sigma3`: 3 std of the prompts' means / sqrt(n), or its value after one more prompt that goes
    the other way, if that is larger. With fewer prompts than report.FEW, or if all agree, the
    distance to the farther end of the interval. NaN if n = 1.
  - `bootstrap_low`, `bootstrap_high`: 99.7% interval of a bootstrap over prompts, if there are
    enough.

  Entries are NaN where nothing counts.

  Args:
    p_win: the probability that one sample beats another, for every pair of samples.
    valid: which pairs count; a pair whose p_win is no probability never counts.
  """
  require(len(p_win) > 0, "p_win", "verdicts on at least one prompt", 0, "Hold out some.")
  valid = valid & (p_win >= 0) & (p_win <= 1)
  pairs = valid.sum(axis=(2, 4))
  total = np.sum(p_win, axis=(2, 4), where=valid, dtype=np.float64)
  values, present = total / np.maximum(pairs, 1), (pairs > 0).astype(float)  # [N P P']
  n, prompts = present.sum(axis=0), len(values)
  times = np.random.default_rng(seed).multinomial(prompts, [1 / prompts] * prompts, resamples)
  with np.errstate(invalid="ignore", divide="ignore"):
    mean = values.sum(axis=0) / n
    error = np.sqrt((present * (values - mean[None]) ** 2).sum(axis=0) / (n - 1) / n)
    means = np.tensordot(times, values, 1) / np.tensordot(times, present, 1)
  enough = n >= report.FEW
  ends = np.nanquantile(np.where(enough, means, 0), [TAIL, 1 - TAIL], axis=0)
  bootstrap = zip(("bootstrap_low", "bootstrap_high"), np.where(enough, ends, np.nan), strict=True)
  return {**_with_interval(mean, error, n), **dict(bootstrap)}


def _with_interval(mean, error, n: Float[np.ndarray, "P P"]) -> dict[str, np.ndarray]:
  """Returns means with their intervals and significance, given their standard errors."""
  low, high = interval(mean, error, n)
  with np.errstate(invalid="ignore", divide="ignore"):
    one_other_way = np.abs(2 * mean - 1) / np.sqrt(n * (n + 1))
  farther = np.where(n > 1, np.maximum(mean - low, high - mean), np.nan)
  spread = (n >= report.FEW) & (error > AGREE)
  return {
    "mean": mean, "sigma3": np.where(spread, 3 * np.maximum(error, one_other_way), farther),
    "n": n.astype(int), "low": low, "high": high,
    "significant": (low > 0.5) | (high < 0.5),  # False for NaN
  }  # fmt: skip


def length_matched(lengths: Int[np.ndarray, "N P S"]) -> Bool[np.ndarray, "N P S P S"]:
  """Returns which pairs of responses differ by at most 2 tokens or 10% of the longer."""
  a, b = lengths[:, :, :, None, None], lengths[:, None, None, :, :]
  return np.abs(a - b) <= np.maximum(2, 0.1 * np.maximum(a, b))


def length_controlled(
  p_win: Float[np.ndarray, "N P S P S"],
  valid: Bool[np.ndarray, "N P S P S"],
  lengths: Int[np.ndarray, "N P S"],
  penalty: float = PENALTY,
) -> dict[str, np.ndarray]:
  """Returns tables of win rates at equal length and their intervals, [P P].

  LC(a, b) = σ(θ) in the logistic regression P = σ(θ + φx) over the pairs of their responses, with
  equal weights for prompts. Here x = tanh(d / √mean d²), and d is how much longer a's response is.
  If all d are 0, LC is the mean; LC(a, b) + LC(b, a) = 1. `mean`, `sigma3`, `n`, `low`, `high` and
  `significant` are as in `win_rates`, with an error that is robust to correlation within prompts.

  - `overlap`: the smaller of the shares of pairs with d ≥ 0 and with d ≤ 0, by weight.
  - `explained`: the share of the verdicts' variance that length alone explains, when always the
    longer response wins, or always the shorter.
  - `refused`: why there is no such win rate (the mean is NaN): "few", "overlap" or "length", see
    report.REFUSED; otherwise "".

  Args:
    penalty: λ of the penalty ½λφ², added to the mean cross-entropy; θ is not penalised.
  """
  valid = valid & (p_win >= 0) & (p_win <= 1)
  policies = p_win.shape[1]
  cells = np.full((5, policies, policies), np.nan)
  for a, b in itertools.combinations_with_replacement(range(policies), 2):
    longer_by = lengths[:, a, :, None] - lengths[:, b, None, :]
    cell = _at_equal_length(p_win[:, a, :, b], valid[:, a, :, b], longer_by, penalty)
    cells[:, b, a], cells[:, a, b] = (1 - cell[0], *cell[1:]), cell
  mean, error, n, overlap, explained = cells
  enough = n >= LEAST_PROMPTS
  reasons = [~enough, overlap < LEAST_OVERLAP, explained >= MOST_EXPLAINED]
  refused = np.select(reasons, ["few", "overlap", "length"], "")
  rates = _with_interval(np.where(refused == "", mean, np.nan), error, n)
  return {**rates, "overlap": overlap, "explained": explained, "refused": refused}


def _at_equal_length(
  p_win: Float[np.ndarray, "N S S"],
  valid: Bool[np.ndarray, "N S S"],
  longer_by: Int[np.ndarray, "N S S"],
  penalty: float,
) -> tuple[float, float, int, float, float]:
  """Returns LC, its standard error, the number of prompts that count, overlap and explained."""
  pairs = valid.sum(axis=(1, 2), keepdims=True)
  n = int((pairs > 0).sum())
  if not n:
    return np.nan, np.nan, 0, np.nan, np.nan
  weight = (valid / np.maximum(pairs, 1) / n).ravel()
  p, d = np.where(valid, p_win, 0.5).ravel().astype(np.float64), longer_by.ravel()
  x = np.tanh(d / (np.sqrt(np.sum(weight * d**2)) or 1.0))
  overlap, explained = _overlap_and_explained(p, np.sign(d), weight)
  if np.ptp(p[weight > 0]) == 0:  # the regression may have no finite parameters
    return p[weight > 0][0], 0.0, n, overlap, explained
  theta, residuals, hessian = _regress(p, np.stack([np.ones_like(x), x]), weight, penalty)
  by_prompt = residuals.reshape(2, len(p_win), -1).sum(axis=-1)
  with np.errstate(divide="ignore", invalid="ignore"):
    spread = np.divide(n, n - 1) * by_prompt @ by_prompt.T
  inverse, rate = np.linalg.inv(hessian), special.expit(theta)
  error = rate * (1 - rate) * np.sqrt((inverse @ spread @ inverse)[0, 0])
  return rate, error, n, overlap, explained


def _regress(
  p: Float[np.ndarray, "R"],
  features: Float[np.ndarray, "2 R"],
  weight: Float[np.ndarray, "R"],
  penalty: float,
) -> tuple[float, Float[np.ndarray, "2 R"], Float[np.ndarray, "2 2"]]:
  """Returns θ, the gradient of each row's loss, and the Hessian of the sum, at the minimum."""
  ridge = np.array([0.0, penalty])

  def loss(b):
    z = b @ features
    return np.sum(weight * (np.logaddexp(0, z) - p * z)) + 0.5 * np.sum(ridge * b**2)

  def by_row(b):
    return features * weight * (special.expit(b @ features) - p)

  def gradient(b):
    return by_row(b).sum(axis=-1) + ridge * b

  def hessian(b):
    m = special.expit(b @ features)
    return (features * weight * m * (1 - m)) @ features.T + np.diag(ridge)

  start = np.array([special.logit(np.clip(np.sum(weight * p), AGREE, 1 - AGREE)), 0.0])
  found = optimize.minimize(
    loss, start, method="trust-exact", jac=gradient, hess=hessian, options={"gtol": 1e-10}
  )
  return found.x[0], by_row(found.x), hessian(found.x)


def _overlap_and_explained(p, sign, weight: Float[np.ndarray, "R"]) -> tuple[float, float]:
  overlap = min(weight[sign >= 0].sum(), weight[sign <= 0].sum())
  variance = np.sum(weight * (p - np.sum(weight * p)) ** 2)
  left = min(np.sum(weight * (p - 0.5 - side * sign / 2) ** 2) for side in (1, -1))
  return overlap, max(0.0, 1 - left / variance) if variance > AGREE**2 else 0.0

"""Rounds: choose pairs, have them labelled, and fit linear rewards to the labels."""

import numpy as np
from jaxtyping import Float, Int
from scipy import optimize, special

from nash_jax.design import optimal
from nash_jax.validation import one_of, require

DESIGNS = ("uniform", "odpo", "greedy", "active")
FIRST = 16  # labels of the first round of `active`; each round doubles them
TOLERANCE = 0.05  # of Frank-Wolfe; rounding to whole labels loses more


def fit(
  arms: Float[np.ndarray, "N D"], p_win: Float[np.ndarray, "N"], penalty: float
) -> Float[np.ndarray, "D"]:
  """Returns θ with the least cross-entropy of σ(⟨θ, b⟩) against labels, plus penalty·‖θ‖²/2.

  Args:
    p_win: labels in [0, 1]; P(first response of the pair wins), or 1 and 0.
  """

  def loss(theta):
    ahead = arms @ theta
    nats = np.logaddexp(0, ahead).sum() - p_win @ ahead
    slope = arms.T @ (special.expit(ahead) - p_win)
    return nats + penalty * theta @ theta / 2, slope + penalty * theta

  start, options = np.zeros(arms.shape[1]), {"gtol": 1e-8, "ftol": 1e-15, "maxiter": 10_000}
  return optimize.minimize(loss, start, jac=True, method="L-BFGS-B", options=options).x


def penalty(arms: Float[np.ndarray, "N D"]) -> float:
  """Returns λ = 1/d for arms of norm at most 1; see `scaled`."""
  return 1 / arms.shape[1]


def scaled(arms: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N D"]:
  """Returns arms divided by the largest norm, so that all lie in the unit ball."""
  largest = np.linalg.norm(arms, axis=1).max(initial=0.0)
  require(largest > 0, "pairs", "one of two different responses", "none", "Draw more responses.")
  return arms / largest


def choose(
  name: str,
  arms: Float[np.ndarray, "N D"],
  budget: int,
  chosen: Int[np.ndarray, "M"],
  p_win: Float[np.ndarray, "M"],
  seed: int = 0,
) -> Int[np.ndarray, "P"]:
  """Returns the pairs to label next; none once `budget` of them are labelled.

  - `uniform`: any, none twice.
  - `odpo`: the optimal design, rounded; a pair may come several times, once for each label.
  - `greedy`: one after another, each where the labels before it say least; none twice.
  - `active`: in rounds of FIRST, then as many again as there are: greedy with arms √(p(1−p))·b, the
    information of a label, where p is the fit to the labels of earlier rounds.

  Only `active` has more than one round. Arms are `scaled`.

  Args:
    chosen: the pairs of earlier rounds.
    p_win: their labels, NaN where there is none.

  Raises:
    ValueError: an unknown design, or more labels than pairs where none comes twice.
  """
  one_of("design", name, DESIGNS)
  left = budget - len(chosen)
  fix = "Buy fewer labels, draw more responses, or choose odpo, which labels pairs several times."
  enough = name == "odpo" or budget <= len(arms)
  require(enough, "budget", f"at most {len(arms)}, the number of pairs", budget, fix)
  if name == "uniform":
    others = np.setdiff1d(np.arange(len(arms)), chosen)
    return np.random.default_rng(seed).choice(others, left, replace=False)
  if name == "odpo":
    labels = optimal.counts(optimal.optimal(arms, TOLERANCE).weights, budget)
    return np.repeat(np.arange(len(arms)), labels)[len(chosen) :]
  p = np.full(len(arms), 0.5)
  if name == "active":
    left = min(left, max(FIRST, len(chosen)))
    if len(chosen):
      read = ~np.isnan(p_win)
      p = special.expit(arms @ fit(arms[chosen[read]], p_win[read], penalty(arms)))
  # A label's information is p(1 − p) b bᵀ, and the fit's prior adds its penalty.
  return optimal.greedy(arms * np.sqrt(p * (1 - p))[:, None], left, penalty(arms), chosen)

"""Optimal designs: how a number of labels is best spread over pairs, before any label exists.

An arm b is the features of a pair, in which the log-odds of its label are linear. Labels spread by
the weights w have the design matrix V(w) = Σ_b w_b b bᵀ. The largest variance of a prediction is
g(w) = max_b bᵀV(w)⁻¹b, and by Kiefer and Wolfowitz the weights with the largest log det V(w) have
the least g, which is the rank of the arms. Scheid et al. 2410.17055 (ODPO).
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from nash_jax.validation import require


class Design(NamedTuple):
  """Weights of arms, which sum to 1.

  Attributes:
    worst: g(w), at most (1 + tolerance)·rank.
    rank: of the arms.
    log_det: of V(w) before each step and after the last, less that of equal weights.
  """

  weights: Float[np.ndarray, "N"]
  worst: float
  rank: int
  log_det: Float[np.ndarray, "S"]


def leverages(
  arms: Float[np.ndarray, "N D"], weights: Float[np.ndarray, "N"]
) -> Float[np.ndarray, "N"]:
  """Returns bᵀV(w)⁻¹b of every arm, within the span of the arms; Σ_b w_b bᵀV⁻¹b is its dimension.

  Args:
    weights: they need not sum to 1: with counts of labels, these are variances.

  Raises:
    ValueError: arms with weight do not span what all arms span.
  """
  basis = _whitened(arms)
  rank, found = basis.shape[1], int(np.linalg.matrix_rank(basis[weights > 0]))
  fix = "Give more arms a weight, or more labels."
  require(found == rank, "arms with weight", f"rank {rank}, that of all arms", found, fix)
  matrix = (basis.T * weights) @ basis
  return np.sum(basis.T * np.linalg.solve(matrix, basis.T), axis=0)


def _whitened(arms: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N R"]:
  """Returns arms as coordinates in which V of equal weights is the identity, R their rank.

  Variances of predictions are the same in any coordinates.
  """
  good = arms.ndim == 2 and len(arms) > 0
  require(good, "arms", "an array [N D], N ≥ 1", arms.shape, "Add some.")
  require(bool(np.isfinite(arms).all()), "arms", "finite numbers", "others", "Check the features.")
  left, lengths, _ = np.linalg.svd(np.asarray(arms, np.float64), full_matrices=False)
  least = max(arms.shape) * np.finfo(arms.dtype).eps * lengths[0]  # as matrix_rank
  rank = int(np.sum(lengths > least))
  require(rank > 0, "arms", "one that is not 0", "zeros", "Leave out pairs of equal responses.")
  return left[:, :rank] * np.sqrt(len(arms))


def optimal(arms: Float[np.ndarray, "N D"], tolerance: float = 0.01) -> Design:
  """Returns the D-optimal weights by Frank-Wolfe, from equal weights to g ≤ (1 + tolerance)·rank.

  A step moves the weight s = (g/R - 1)/(g - 1) to the arm of the largest variance, R the rank: the
  line search for log det V in closed form. It costs O(N R).

  Examples:
    >>> import numpy as np
    >>> from nash_jax.design import optimal
    >>> design = optimal.optimal(np.array([[1.0, 0.0], [0.0, 1.0], [0.1, 0.1]]))
    >>> np.round(design.weights, 1)
    array([0.5, 0.5, 0. ])

  Raises:
    ValueError: no arms, or all are 0, or one is not finite.
  """
  require(tolerance >= 1e-6, "tolerance", "at least 1e-6", tolerance, "The default is 0.01.")
  basis = _whitened(arms)
  count, rank = basis.shape
  weights, inverse, variance = np.full(count, 1 / count), np.eye(rank), np.sum(basis**2, axis=1)
  log_det = [0.0]
  while (worst := variance[best := int(np.argmax(variance))]) > (1 + tolerance) * rank:
    if rank == 1:  # the longest arm alone
      weights = np.eye(count)[best]
      log_det.append(float(np.log(worst)))
      break
    step = (worst / rank - 1) / (worst - 1)
    towards = inverse @ basis[best]
    ratio = step / (1 - step)
    less = ratio / (1 + ratio * worst)  # V⁻¹ by Sherman and Morrison
    inverse = (inverse - less * np.outer(towards, towards)) / (1 - step)
    variance = (variance - less * (basis @ towards) ** 2) / (1 - step)
    weights *= 1 - step
    weights[best] += step
    log_det.append(log_det[-1] + rank * np.log1p(-step) + np.log1p(ratio * worst))
  return Design(weights, float(leverages(basis, weights).max()), rank, np.array(log_det))


def counts(weights: Float[np.ndarray, "N"], labels: int) -> Int[np.ndarray, "N"]:
  """Returns how many of the labels each arm gets: w·labels, rounded by largest remainders.

  Weights below 1/(10·labels) are dropped first, of which Frank-Wolfe leaves one for every arm.
  """
  require(labels > 0, "labels", "at least 1", labels, "Buy one.")
  kept = np.sort(weights)[::-1][: labels + 1]
  least = min(0.1 / labels, kept[min(labels, len(kept)) - 1])  # or else few of them might be left
  shares = np.where(weights >= least, weights, 0.0)
  shares *= labels / shares.sum()
  whole = np.floor(shares).astype(int)
  rest = np.argsort(whole - shares, kind="stable")[: labels - whole.sum()]
  whole[rest] += 1
  return whole


def greedy(
  arms: Float[np.ndarray, "N D"],
  picks: int,
  ridge: float,
  taken: Int[np.ndarray, "M"] | None = None,
) -> Int[np.ndarray, "P"]:
  """Returns arms to label next, none twice: each has the largest variance given those before.

  A pick i is argmax bᵀH⁻¹b, where H = ridge·I + Σ b bᵀ over arms that are taken and picked (Kveton
  et al. 2503.01076). It costs O(N D).

  Args:
    picks: how many; at most as many as there are other arms.
    taken: arms that have their label.
  """
  taken = np.zeros(0, int) if taken is None else taken
  left = len(arms) - len(np.unique(taken))
  fix = "Buy fewer labels, or draw more responses."
  require(picks <= left, "labels", f"at most {left}, one for each pair that has none", picks, fix)
  matrix = ridge * np.eye(arms.shape[1]) + arms[taken].T @ arms[taken]
  inverse = np.linalg.inv(matrix)
  variance = np.sum((arms @ inverse) * arms, axis=1)
  variance[taken] = -np.inf
  found = np.zeros(picks, int)
  for n in range(picks):
    found[n] = best = int(np.argmax(variance))
    towards = inverse @ arms[best]
    scale = 1 + variance[best]
    inverse -= np.outer(towards, towards) / scale
    variance -= (arms @ towards) ** 2 / scale
    variance[best] = -np.inf
  return found

"""The compiled loop of `regret`: episodes, and the update along each one's trajectory.

Numba compiles it, since a step touches a few entries of large arrays. It is imported where it is
used: numba is of the extra `games`.
"""

import typing
from typing import Any

import numba
import numpy as np
from jaxtyping import Float

from nash_jax.games.trees import CHANCE, TERMINAL

Vector = Float[np.ndarray, "X"]
Table = Float[np.ndarray, "X A"]


@numba.njit(cache=True, nogil=True)
@typing.no_type_check
def chance_slot(start: int, count: int, chance: Float[np.ndarray, "N"], draw: float) -> int:
  """Returns which of the children at `start` a draw of [0, 1) falls on."""
  total = 0.0
  for b in range(count):
    total += chance[start + b]
    if draw < total:
      return b
  return count - 1  # where the chances sum to a little less than 1


@numba.njit(cache=True, nogil=True)
@typing.no_type_check
def visit(x: int, top: float, logp: Table, total: Table, count: int, draw: float) -> int:
  """Brings the average of set x up to date, and returns the action that a draw selects."""
  lag = top
  for b in range(count):
    lag -= total[x, b]
  chosen = 0
  below = 0.0
  for b in range(count):
    weight = np.exp(logp[x, b])
    total[x, b] += lag * weight
    if weight > 0 and draw >= below:
      chosen = b
    below += weight
  return chosen


@numba.njit(cache=True, nogil=True)
@typing.no_type_check
def move(
  x: int, action: int, loss: float, change: float, eta: float, logp: Table, base: Table, count: int
) -> float:
  """Moves the policy of set x, in place; returns the change of its value, negated.

  Args:
    loss: the estimated loss at (x, action), less what this function returned for the next set.
    change: η after this episode over η before it.
    eta: η after this episode.
  """
  most = -np.inf
  for b in range(count):
    logp[x, b] = change * logp[x, b] + (1 - change) * base[x, b]
    if b == action:
      logp[x, b] -= eta * loss
    most = max(most, logp[x, b])
  normaliser = 0.0
  for b in range(count):
    normaliser += np.exp(logp[x, b] - most)
  normaliser = most + np.log(normaliser)
  for b in range(count):
    logp[x, b] -= normaliser
  return normaliser / eta


@numba.njit(cache=True, nogil=True)
@typing.no_type_check
def run(
  tree: tuple[Any, ...],
  rule: tuple[Vector, Vector, Table, float],
  state: tuple[Table, Table, Vector, Table],
  start: int,
  draws: Float[np.ndarray, "T steps"],
) -> None:
  """Runs an episode for each row of draws, in place.

  Args:
    tree: (player, infoset, first, children, chance, loss of the first player [N],
      before, choice, actions).
    rule: (η [X], γ [X], base [X A], power).
    state: (log-policy [X A], P̃ [X A], its maximum below [X], sums of plans [X A]).
    start: episodes so far.
    draws: uniform on [0, 1), a row an episode.
  """
  player, infoset, first, children, chance, loss, before, choice, actions = tree
  etas, gammas, base, power = rule
  logp, seen, most, total = state
  steps = draws.shape[1]
  lengths = np.zeros(2, np.int64)
  sets = np.zeros((2, steps), np.int64)
  taken = np.zeros((2, steps), np.int64)
  plans = np.zeros((2, steps))  # logarithms
  for e in range(draws.shape[0]):
    node = 0
    step = 0
    lengths[:] = 0
    while player[node] != TERMINAL:
      count = children[node]
      p = player[node]
      if p == CHANCE:
        slot = chance_slot(first[node], count, chance, draws[e, step])
      else:
        x = infoset[node]
        top = start + e + 1.0 if before[x] < 0 else total[before[x], choice[x]]
        slot = visit(x, top, logp, total, count, draws[e, step])
        h = lengths[p]
        sets[p, h] = x
        taken[p, h] = slot
        plans[p, h] = logp[x, slot] + (plans[p, h - 1] if h else 0.0)
        lengths[p] += 1
      node = first[node] + slot
      step += 1
    for p in range(2):
      value = 0.0
      below = 0.0
      last = lengths[p] - 1
      for h in range(last, -1, -1):
        x = sets[p, h]
        a = taken[p, h]
        count = actions[x]
        explored = 1 / (np.exp(plans[p, h]) + gammas[x] * (1 + seen[x, a]) ** -power)
        lost = 0.0
        if h == last:
          lost = explored * (loss[node] if p == 0 else 1 - loss[node])
        old = etas[x] * (1 + most[x]) ** -power
        seen[x, a] += explored
        mean = 0.0
        for b in range(count):
          mean += seen[x, b] / count
        below = max(most[x], below, mean)
        most[x] = below
        new = etas[x] * (1 + below) ** -power
        value = move(x, a, lost - value, new / old, new, logp, base, count)

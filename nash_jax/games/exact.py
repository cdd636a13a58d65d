"""What policies of a game of imperfect information are worth, exactly, without OpenSpiel.

Losses are scaled to [0, 1]: (high - return)/(high - low) for the first player, and one minus that
for the second. Axes as in `trees`.
"""

from typing import Any, NamedTuple

import numpy as np
import scipy.optimize
import scipy.sparse
from jaxtyping import Float

from nash_jax.games import trees
from nash_jax.games.trees import TERMINAL, Tree
from nash_jax.validation import one_of


def _edges(tree: Tree, policy: Float[np.ndarray, "X A"], player: int) -> Float[np.ndarray, "N"]:
  """Returns a player's probability of the step into each node; 1 where others decide."""
  edge = np.ones(len(tree.player))
  own = np.flatnonzero(tree.player[tree.parent] == player)  # the root's, -1, is a leaf
  edge[own] = policy[tree.infoset[tree.parent[own]], tree.slot[own]]
  return edge


def value(tree: Tree, policy: Any) -> float:
  """Returns what the first player wins in expectation.

  Examples:
    >>> from nash_jax.games import exact, trees
    >>> kuhn = trees.load("kuhn_poker")
    >>> round(exact.value(kuhn, trees.uniform(kuhn)), 6)
    0.125

  Args:
    policy: of both players, [X A].

  Raises:
    ValueError: not policies of this game.
  """
  probabilities = trees.policy(tree, policy)
  edge = tree.chance * _edges(tree, probabilities, 0) * _edges(tree, probabilities, 1)
  return float(trees.reached(tree, edge) @ tree.returns)


def losses(tree: Tree, policy: Any, player: int) -> tuple[Float[np.ndarray, "X A"], float]:
  """Returns a player's expected losses ℓ^ν [X A], and the loss where they never decide.

  ℓ^ν(x, a) is the loss of the leaves of which (x, a) is the player's last decision, times the
  probability that chance and the opponent lead there. A plan's loss is linear in it.

  Examples:
    >>> from nash_jax.games import exact, trees
    >>> kuhn = trees.load("kuhn_poker")
    >>> loss, constant = exact.losses(kuhn, trees.uniform(kuhn), 0)
    >>> loss.shape, constant
    ((12, 2), 0.0)

  Arguments and errors are those of `best_response`.
  """
  probabilities = trees.policy(tree, policy)
  one_of("player", str(player), ("0", "1"))
  reach = trees.reached(tree, tree.chance * _edges(tree, probabilities, 1 - player))
  loss = (tree.high - tree.returns) / (tree.high - tree.low)
  weight = reach * (loss if player == 0 else 1 - loss)
  leaves = np.flatnonzero(tree.player == TERMINAL)
  last = trees.last_decisions(tree, player)[leaves]
  sums = np.bincount(last + 1, weight[leaves], minlength=probabilities.size + 1)  # 0: no decision
  return sums[1:].reshape(probabilities.shape), float(sums[0])


class Response(NamedTuple):
  """A best response, and its loss.

  Examples:
    >>> from nash_jax.games import exact, trees
    >>> kuhn = trees.load("kuhn_poker")
    >>> round(exact.best_response(kuhn, trees.uniform(kuhn), 0).loss, 4)
    0.375

  Attributes:
    policy: a row for each set; those of the opponent are as they were.
    loss: the least scaled loss.
  """

  policy: Float[np.ndarray, "X A"]
  loss: float


def best_response(tree: Tree, policy: Any, player: int) -> Response:
  """Returns a player's best response to the other's policy.

  Examples:
    >>> from nash_jax.games import exact, trees
    >>> kuhn = trees.load("kuhn_poker")
    >>> best = exact.best_response(kuhn, trees.uniform(kuhn), 0)
    >>> round(exact.value(kuhn, best.policy), 6)
    0.5

  Args:
    policy: of both players; the player's own is not read.
    player: 0 or 1.

  Raises:
    ValueError: not policies of this game, or another player.
  """
  costs, least = losses(tree, policy, player)
  costs[~trees.legal(tree)] = np.inf
  response = np.array(trees.policy(tree, policy))
  own = tree.owner == player
  for sets in reversed(trees.levels(tree.depth)):
    sets = sets[own[sets]]
    chosen = costs[sets].argmin(1)
    response[sets] = np.arange(costs.shape[1]) == chosen[:, None]
    best, inner = costs[sets, chosen], tree.before[sets] >= 0
    parents = sets[inner]
    np.add.at(costs, (tree.before[parents], tree.choice[parents]), best[inner])
    least += float(best[~inner].sum())
  return Response(response, least)


def gap(tree: Tree, policy: Any) -> float:
  """Returns the exploitability gap: what both players' best responses win together, scaled.

  It is max_μ V(μ, ν) - min_ν V(μ, ν) with returns scaled to [0, 1]: nash_conv/(high - low).

  Examples:
    >>> from nash_jax.games import exact, trees
    >>> kuhn = trees.load("kuhn_poker")
    >>> round(exact.gap(kuhn, trees.uniform(kuhn)), 4)
    0.2292

  Args:
    policy: of both players, [X A].

  Raises:
    ValueError: not policies of this game.
  """
  return 1 - sum(best_response(tree, policy, player).loss for player in (0, 1))


class Equilibrium(NamedTuple):
  """An equilibrium of a game.

  Examples:
    >>> from nash_jax.games import exact, trees
    >>> round(exact.solve(trees.load("kuhn_poker")).value * -18, 7)
    1.0

  Attributes:
    policy: of both players.
    value: what the first player wins with it.
  """

  policy: Float[np.ndarray, "X A"]
  value: float


def solve(tree: Tree) -> Equilibrium:
  """Returns an equilibrium by linear programming over plans (HiGHS).

  Examples:
    >>> from nash_jax.games import exact, trees
    >>> kuhn = trees.load("kuhn_poker")
    >>> abs(exact.gap(kuhn, exact.solve(kuhn).policy)) < 1e-9
    True

  Raises:
    RuntimeError: the solver fails.
  """
  width, leaves = int(tree.actions.max()), np.flatnonzero(tree.player == TERMINAL)
  chances = trees.reached(tree, tree.chance)[leaves]
  ends = [trees.last_decisions(tree, player)[leaves] + 1 for player in (0, 1)]
  size = len(tree.actions) * width + 1  # plans of both players' (set, action), after an empty one
  payoff = scipy.sparse.coo_array((chances * tree.returns[leaves], ends), shape=(size, size))
  # A plan's probabilities at a set sum to the plan of what led there: E x = e.
  sets, (rows, slots) = np.arange(len(tree.actions)), np.nonzero(trees.legal(tree))
  before = np.where(tree.before < 0, 0, tree.before * width + tree.choice + 1)
  entries = np.r_[0, sets + 1, rows + 1], np.r_[0, before, rows * width + slots + 1]
  signs = np.r_[1.0, -np.ones(len(sets)), np.ones(len(rows))]
  flow = scipy.sparse.csr_array((signs, entries), shape=(len(sets) + 1, size))
  flows = [flow[np.r_[0, sets[tree.owner == player] + 1]] for player in (0, 1)]
  first, second = (np.eye(1, flow.shape[0]).ravel() for flow in flows)
  # max q₀ over plans x ≥ 0 and q with E x = e and Fᵀ q ≤ Uᵀ x; y is the multiplier of the latter.
  system = scipy.sparse.block_array([[-payoff.T, flows[1].T], [flows[0], None]], format="csr")
  answers = scipy.optimize.linprog(
    np.r_[np.zeros(size), -second],
    A_ub=system[:size], b_ub=np.zeros(size), A_eq=system[size:], b_eq=first,
    bounds=[(0, None)] * size + [(None, None)] * len(second),
  )  # fmt: skip
  if answers.status != 0:
    raise RuntimeError(f"{tree.name}: the linear program has no solution: {answers.message}")
  plans = [answers.x[1:size], -answers.ineqlin.marginals[1:]]
  mixed = np.where(tree.owner[:, None] == 0, *(plan.reshape(-1, width) for plan in plans))
  mixed = np.maximum(mixed, 0) * trees.legal(tree)
  sums = mixed.sum(1, keepdims=True)
  policy = np.divide(mixed, sums, out=trees.uniform(tree), where=sums > 0)
  return Equilibrium(policy, float(-answers.fun))

"""What the balanced methods of `regret` know of a game: how many actions lie where.

Axes as in `trees`: X information sets of both players, A the most actions of a set. Sources: p* and
its entropy are Fiegel et al.'s (2212.12567), the balanced plan is Bai et al.'s (2202.01752).
"""

import numpy as np
import scipy.special
from jaxtyping import Float, Int

from nash_jax.games import trees
from nash_jax.games.trees import Tree


def _below(tree: Tree, count: Int[np.ndarray, "X"]) -> Float[np.ndarray, "X"]:
  """Returns the sum of `count` over each set and all sets below it; S_x, if it counts actions."""
  total = count.astype(float)
  for x in range(len(total) - 1, -1, -1):
    if tree.before[x] >= 0:
      total[tree.before[x]] += total[x]
  return total


def _below_actions(tree: Tree, count: Float[np.ndarray, "X"]) -> Float[np.ndarray, "X A"]:
  """Returns the sum of `count` over the sets that each action may lead to next."""
  later = np.zeros(trees.legal(tree).shape)
  inner = tree.before >= 0
  np.add.at(later, (tree.before[inner], tree.choice[inner]), count[inner])
  return later


def transition(tree: Tree) -> Float[np.ndarray, "X"]:
  """Returns p*(x): chances that favour sets in proportion to the actions below them.

  Examples:
    >>> from nash_jax.games import balance, trees
    >>> balance.transition(trees.load("kuhn_poker"))[:3].round(3).tolist()
    [0.333, 0.333, 0.333]
  """
  count = _below(tree, tree.actions)
  later = _below_actions(tree, count)
  whole = np.bincount(tree.owner, tree.actions)
  chances = count / whole[tree.owner]
  for x in map(int, np.flatnonzero(tree.before >= 0)):  # parents first
    chances[x] = chances[tree.before[x]] * count[x] / later[tree.before[x], tree.choice[x]]
  return chances


def plan(tree: Tree) -> Float[np.ndarray, "X"]:
  """Returns b(x): the plan that favours actions in proportion to those of x's depth below them.

  Examples:
    >>> from nash_jax.games import balance, trees
    >>> balance.plan(trees.load("kuhn_poker"))[:3].tolist()
    [0.5, 0.5, 0.5]
  """
  balanced = np.ones(len(tree.actions))
  for depth in range(int(tree.depth.max()) + 1):
    here = tree.depth == depth
    later = _below_actions(tree, _below(tree, np.where(here, tree.actions, 0)))
    share = later / np.maximum(later.sum(1, keepdims=True), 1)
    reach = np.ones(len(balanced))
    for x in map(int, np.flatnonzero(tree.before >= 0)):
      reach[x] = reach[tree.before[x]] * share[tree.before[x], tree.choice[x]]
    balanced[here] = reach[here] / tree.actions[here]
  return balanced


def shares(tree: Tree) -> Float[np.ndarray, "X A"]:
  """Returns the policies that choose in proportion to an action and all those below it.

  Examples:
    >>> from nash_jax.games import balance, trees
    >>> balance.shares(trees.load("kuhn_poker"))[0].tolist()
    [0.75, 0.25]
  """
  count = _below(tree, tree.actions)
  inside = trees.legal(tree) * (1 + _below_actions(tree, count))
  return inside / count[:, None]


def decisions_left(tree: Tree) -> Int[np.ndarray, "X"]:
  """Returns how many decisions a player has from each set on, itself included, at the most.

  Examples:
    >>> from nash_jax.games import balance, trees
    >>> balance.decisions_left(trees.load("kuhn_poker"))[:3].tolist()
    [2, 2, 2]
  """
  decisions = np.array([tree.depth[tree.owner == player].max() + 1 for player in (0, 1)])
  return decisions[tree.owner] - tree.depth


def entropy_base(tree: Tree) -> Float[np.ndarray, "X A"]:
  """Returns the policies of the greatest entropy -Σ q log q, with q(x, a) = p*(x) μ(x, a).

  That sum is over all (x, a), and μ(x, a) is the plan. The policies have it where all histories
  are equally long; the same recursion gives those of other games.

  Examples:
    >>> from nash_jax.games import balance, trees
    >>> balance.entropy_base(trees.load("kuhn_poker"))[0].round(3).tolist()
    [0.71, 0.29]
  """
  chances = transition(tree)
  weight = chances * decisions_left(tree)  # 1/η(x), at η = 1
  costs = np.where(trees.legal(tree), (chances * np.log(chances))[:, None], np.inf)
  policy = np.zeros(costs.shape)
  for sets in reversed(trees.levels(tree.depth)):
    logits = -costs[sets] / weight[sets, None]
    total = scipy.special.logsumexp(logits, axis=1)
    policy[sets] = np.exp(logits - total[:, None])
    inner = tree.before[sets] >= 0
    parents = tree.before[sets[inner]], tree.choice[sets[inner]]
    np.add.at(costs, parents, -(weight[sets] * total)[inner])
  return policy

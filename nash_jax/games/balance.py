"""What the balanced methods of `regret` know of a game: how many actions lie where.

Axes as in `trees`: X information sets of both players, A the most actions of a set. Sources: p* and
its entropy are Fiegel et al.'s (2212.12567), the balanced plan is Bai et al.'s (2202.01752).
"""

import numpy as np
import scipy.special
from jaxtyping import Float, Int

from nash_jax.games import trees
from nash_jax.games.trees import Tree


def _below(tree: Tree, count: Int[np.ndarray, "X"]) -> Float[np.ndarray, "X A"]:
  """Returns the sum of `count` over all sets below each action."""
  later = np.zeros(trees.legal(tree).shape)
  for sets in reversed(trees.levels(tree.depth)[1:]):
    parents = tree.before[sets], tree.choice[sets]
    np.add.at(later, parents, count[sets] + later[sets].sum(1))
  return later


def transition(tree: Tree) -> Float[np.ndarray, "X"]:
  """Returns p*(x): chances that favour sets in proportion to the actions below them.

  Examples:
    >>> from nash_jax.games import balance, trees
    >>> balance.transition(trees.load("kuhn_poker"))[:3].round(3).tolist()
    [0.333, 0.333, 0.333]
  """
  later = _below(tree, tree.actions)
  count = tree.actions + later.sum(1)
  chances = count / np.bincount(tree.owner, tree.actions)[tree.owner]
  for sets in trees.levels(tree.depth)[1:]:
    before, choice = tree.before[sets], tree.choice[sets]
    chances[sets] = chances[before] * count[sets] / later[before, choice]
  return chances


def plan(tree: Tree) -> Float[np.ndarray, "X"]:
  """Returns b(x): the plan that favours actions in proportion to those of x's depth below them.

  Examples:
    >>> from nash_jax.games import balance, trees
    >>> balance.plan(trees.load("kuhn_poker"))[:3].tolist()
    [0.5, 0.5, 0.5]
  """
  balanced = np.ones(len(tree.actions))
  levels = trees.levels(tree.depth)
  for depth, here in enumerate(levels):
    later = _below(tree, np.where(tree.depth == depth, tree.actions, 0))
    share = later / np.maximum(later.sum(1, keepdims=True), 1)
    reach = np.ones(len(balanced))
    for sets in levels[1 : depth + 1]:
      reach[sets] = reach[tree.before[sets]] * share[tree.before[sets], tree.choice[sets]]
    balanced[here] = reach[here] / tree.actions[here]
  return balanced


def shares(tree: Tree) -> Float[np.ndarray, "X A"]:
  """Returns the policies that choose in proportion to an action and all those below it.

  Examples:
    >>> from nash_jax.games import balance, trees
    >>> balance.shares(trees.load("kuhn_poker"))[0].tolist()
    [0.75, 0.25]
  """
  inside = trees.legal(tree) * (1 + _below(tree, tree.actions))
  return inside / inside.sum(1, keepdims=True)


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

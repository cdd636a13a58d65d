"""A game of imperfect information as arrays, and the walk from its root that builds them.

A game has two players, is zero-sum, and has perfect recall: at an information set, its player knows
every own decision that led there.

Axes: N nodes, in breadth-first order, so that a node's children are consecutive; X information sets
of both players, parents before their children; A the most actions of a set.
"""

import collections
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from nash_jax.games import checks
from nash_jax.validation import require

CHANCE, TERMINAL = 2, 3  # who decides at a node, where no player (0 or 1) does
MOST_NODES = 5_000_000  # the walk of so many takes a minute or two, and 2 GB


class Tree(NamedTuple):
  """A game as arrays.

  Examples:
    >>> from nash_jax.games import trees
    >>> kuhn = trees.load("kuhn_poker")
    >>> len(kuhn.player), len(kuhn.labels), int(kuhn.actions.sum())
    (58, 12, 24)

  Attributes:
    name: as OpenSpiel has it, or as the file does.
    player: who decides at a node: 0, 1, CHANCE or TERMINAL.
    infoset: the information set of a node; -1 where no player decides.
    first: a node's first child; the others follow it.
    children: how many children a node has.
    parent: a node's parent; -1 at the root.
    slot: which of its parent's children a node is, from 0.
    chance: the probability with which chance chooses a node; 1 where a player does.
    returns: what the first player wins at a terminal node; 0 elsewhere.
    owner: the player of an information set, 0 or 1.
    depth: the player's own decisions before it.
    before: the player's information set before it; -1 where it is their first.
    choice: the action, as a slot, that they took there; 0 where it is their first.
    actions: how many actions a set has.
    labels: information states, as OpenSpiel or the file writes them.
    names: what the actions of each set are called.
    low: the least that the first player can win.
    high: the most.
  """

  name: str
  player: Int[np.ndarray, "N"]
  infoset: Int[np.ndarray, "N"]
  first: Int[np.ndarray, "N"]
  children: Int[np.ndarray, "N"]
  parent: Int[np.ndarray, "N"]
  slot: Int[np.ndarray, "N"]
  chance: Float[np.ndarray, "N"]
  returns: Float[np.ndarray, "N"]
  owner: Int[np.ndarray, "X"]
  depth: Int[np.ndarray, "X"]
  before: Int[np.ndarray, "X"]
  choice: Int[np.ndarray, "X"]
  actions: Int[np.ndarray, "X"]
  labels: tuple[str, ...]
  names: tuple[tuple[Any, ...], ...]
  low: float
  high: float


class Node(NamedTuple):
  """A node as a walk finds it.

  Examples:
    >>> from nash_jax.games import trees
    >>> trees.Node(trees.TERMINAL, returns=1.0).children
    ()

  Attributes:
    player: 0, 1, CHANCE or TERMINAL.
    returns: what the first player wins, at a terminal node.
    label: the information state, where a player decides.
    names: of the actions.
    chances: probabilities of the children, where chance decides.
    children: whatever the walk expands next.
  """

  player: int
  returns: float = 0.0
  label: str = ""
  names: tuple[Any, ...] = ()
  chances: tuple[float, ...] = ()
  children: tuple[Any, ...] = ()


class _Sets:
  """Information sets, as a walk finds them; checks that their player never forgets."""

  def __init__(self) -> None:
    self.index: dict[tuple[int, str], int] = {}
    self.rows: list[tuple[int, int, int, int, int]] = []  # owner, depth, before, choice, actions
    self.names: list[tuple[Any, ...]] = []

  def add(self, node: Node, last: tuple[int, int]) -> int:
    """Returns the set of a node, of which `last` is the player's (set, action) before it."""
    key, before = (node.player, node.label), last[0]
    if key not in self.index:
      self.index[key] = len(self.rows)
      depth = 0 if before < 0 else self.rows[before][1] + 1
      self.rows.append((node.player, depth, *last, len(node.names)))
      self.names.append(node.names)
    found = self.index[key]
    what = f"information set {node.label!r} of player {node.player + 1}"
    if self.names[found] != node.names:
      expected = "the same actions at all of its nodes"
      fix = "Nodes that a player can tell apart are different information sets."
      require(False, what, expected, f"{self.names[found]} and {node.names}", fix)
    if self.rows[found][2:4] != last:  # in words, which are slow to find
      decisions = f"{self._decision(*self.rows[found][2:4])} and {self._decision(*last)}"
      expected = "perfect recall: one own decision that leads to it"
      require(False, what, expected, decisions, "Let players remember what they did.")
    return found

  def _decision(self, before: int, choice: int) -> str:
    """Returns a player's decision in words."""
    if before < 0:
      return "none"
    label = next(key[1] for key, found in self.index.items() if found == before)
    return f"{self.names[before][choice]!r} at {label!r}"


def build(
  name: str,
  root: Any,
  expand: Callable[[Any], Node],
  bounds: tuple[float, float] | None = None,
  most_nodes: int = MOST_NODES,
) -> Tree:
  """Returns the game that a walk from its root finds.

  Examples:
    >>> from nash_jax.games import trees
    >>> leaves = {"heads": 1.0, "tails": -1.0}
    >>> def expand(node):
    ...   if node in leaves:
    ...     return trees.Node(trees.TERMINAL, returns=leaves[node])
    ...   player = 0 if node == "root" else 1
    ...   children = ("left", "right") if node == "root" else ("heads", "tails")
    ...   return trees.Node(player, label=node, names=("a", "b"), children=children)
    >>> trees.build("coins", "root", expand).labels
    ('root', 'left', 'right')

  Args:
    name: what tables and files call the game.
    root: what `expand` is called with first.
    expand: from a child, or the root, to a node.
    bounds: the least and the most that the first player can win, by which losses are scaled; those
      of the leaves without.
    most_nodes: more are refused, before memory runs out.

  Raises:
    ValueError: no perfect recall, a player who never acts, chances that do not sum to 1, returns
      that are all the same, or too many nodes.
  """
  checks.count("most_nodes", most_nodes)
  sets, rows = _Sets(), list[tuple[Any, ...]]()
  # (what to expand, parent, slot, chance, each player's last (set, action))
  queue = collections.deque[Any]([(root, -1, 0, 1.0, ((-1, 0), (-1, 0)))])
  while queue:
    thing, parent, slot, chance, last = queue.popleft()
    node, found, index = expand(thing), -1, len(rows)
    first = index + len(queue) + 1
    expected = f"at most {most_nodes:,} nodes, for memory"
    fix = "Choose a smaller game, or set most_nodes: 1,000,000 nodes take about 0.4 GB."
    require(first + len(node.children) <= most_nodes + 1, name, expected, "more", fix)
    if node.player < CHANCE:
      found = sets.add(node, last[node.player])
    if node.player == CHANCE:
      good = min(node.chances, default=-1.0) >= 0 and abs(math.fsum(node.chances) - 1) < 1e-9
      expected, fix = "probabilities that sum to 1", "Give one for each child."
      require(good, f"{name}: chances", expected, node.chances, fix)
    rows.append((node.player, found, first, len(node.children), parent, slot, chance, node.returns))
    chances = node.chances or (1.0,) * len(node.children)
    for s, (child, p) in enumerate(zip(node.children, chances, strict=True)):
      after = list(last)
      if found >= 0:
        after[node.player] = (found, s)
      queue.append((child, index, s, p, tuple(after)))
  return _assemble(name, rows, sets, bounds)


def _assemble(
  name: str, rows: list[tuple[Any, ...]], sets: _Sets, bounds: tuple[float, float] | None
) -> Tree:
  """Returns the arrays of a walk's rows, once the game as a whole is right."""
  columns = [np.array(column) for column in zip(*rows, strict=True)]
  player, found, first, children, parent, slot = (column.astype(np.int32) for column in columns[:6])
  chance, returns = (column.astype(np.float64) for column in columns[6:])
  owners = {row[0] for row in sets.rows}
  for mover in (0, 1):
    fix = "Give both players a decision; one action is enough."
    require(mover in owners, name, f"player {mover + 1} to decide somewhere", "never", fix)
  leaves = returns[player == TERMINAL]
  low, high = bounds or (float(leaves.min()), float(leaves.max()))
  require(low < high, name, "returns that differ", f"{low:g} at every leaf", "Nothing is at stake.")
  inside = bool(leaves.min() >= low and leaves.max() <= high)
  got, fix = f"{leaves.min():g} to {leaves.max():g}", "Losses are scaled by these bounds."
  require(inside, name, f"returns between {low:g} and {high:g}", got, fix)
  owner, depth, before, choice, actions = (
    np.array(x, np.int32) for x in zip(*sets.rows, strict=True)
  )
  labels = tuple(label for _, label in sets.index)
  return Tree(
    name, player, found, first, children, parent, slot, chance, returns,
    owner, depth, before, choice, actions, labels, tuple(sets.names), float(low), float(high),
  )  # fmt: skip

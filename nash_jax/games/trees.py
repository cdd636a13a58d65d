"""Games of imperfect information as arrays: from OpenSpiel, from a file, or from any walk.

A game has two players, is zero-sum, and has perfect recall: at an information set, its player knows
every own decision that led there. A policy is [X A], with zeros beyond a set's own actions.

Axes: N nodes, in breadth-first order, so that a node's children are consecutive; X information sets
of both players, parents before their children; A the most actions of a set.
"""

import collections
import math
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from nash_jax.games import checks, files
from nash_jax.validation import did_you_mean, require

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
    found = self.index.setdefault((node.player, node.label), len(self.rows))
    if found == len(self.rows):
      depth = self.rows[last[0]][1] + 1 if last[0] >= 0 else 0
      self.rows.append((node.player, depth, *last, len(node.names)))
      self.names.append(node.names)
    what, names = f"information set {node.label!r} of player {node.player + 1}", self.names[found]
    if names != node.names:
      expected, got = "the same actions at all of its nodes", f"{names} and {node.names}"
      fix = "Nodes that a player can tell apart are different information sets."
      require(False, what, expected, got, fix)
    if (earlier := self.rows[found][2:4]) != last:
      labels, both = [label for _, label in self.index], (earlier, last)
      words = (f"{self.names[x][a]!r} at {labels[x]!r}" if x >= 0 else "none" for x, a in both)
      expected = "perfect recall: one own decision that leads to it"
      require(False, what, expected, " and ".join(words), "Let players remember what they did.")
    return found


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
    first, count = index + len(queue) + 1, len(node.children)
    expected = f"at most {most_nodes:,} nodes, for memory"
    fix = "Choose a smaller game, or set most_nodes: 1,000,000 nodes take about 0.4 GB."
    require(first + count <= most_nodes + 1, name, expected, "more", fix)
    if node.player < CHANCE:
      found = sets.add(node, last[node.player])
    if node.player == CHANCE:
      good = min(node.chances, default=-1.0) >= 0 and abs(math.fsum(node.chances) - 1) < 1e-9
      expected, fix = "probabilities that sum to 1", "Give one for each child."
      require(good, f"{name}: chances", expected, node.chances, fix)
    rows.append((node.player, found, first, count, parent, slot, chance, node.returns))
    for s, (child, p) in enumerate(zip(node.children, node.chances or (1.0,) * count, strict=True)):
      after = list(last)
      if found >= 0:
        after[node.player] = (found, s)
      queue.append((child, index, s, p, tuple(after)))
  return _assemble(name, rows, sets, bounds)


def _assemble(
  name: str, rows: list[tuple[Any, ...]], sets: _Sets, bounds: tuple[float, float] | None
) -> Tree:
  """Returns the arrays of a walk's rows, from `player` to `returns`, if the game is right."""
  owners, fix = {row[0] for row in sets.rows}, "Give both players a decision; one action is enough."
  for mover in (0, 1):
    require(mover in owners, name, f"player {mover + 1} to decide somewhere", "never", fix)
  columns = [*zip(*rows, strict=True)]
  integers = [np.array(x, np.int32) for x in (*columns[:6], *zip(*sets.rows, strict=True))]
  chance, returns = np.array(columns[6:], float)
  leaves = returns[integers[0] == TERMINAL]
  least, most = float(leaves.min()), float(leaves.max())
  low, high = map(float, bounds or (least, most))
  require(low < high, name, "returns that differ", f"{low:g} at every leaf", "Nothing is at stake.")
  expected, fix = f"returns between {low:g} and {high:g}", "Losses are scaled by these bounds."
  require(low <= least and most <= high, name, expected, f"{least:g} to {most:g}", fix)
  texts = tuple(label for _, label in sets.index), tuple(sets.names)
  # In the order of Tree's fields.
  return Tree._make((name, *integers[:6], chance, returns, *integers[6:], *texts, low, high))


def openspiel() -> Any:
  """Returns OpenSpiel's module `pyspiel`.

  Examples:
    >>> from nash_jax.games import trees
    >>> trees.openspiel().load_game("kuhn_poker").num_players()
    2

  Raises:
    ValueError: it is not installed.
  """
  try:
    import pyspiel
  except ImportError as error:
    fix = "Install it by `pip install 'nash_jax[games]'`, or give the game as a file (load_json)."
    raise ValueError(f"open_spiel: expected this package, got {error}. {fix}") from error
  return pyspiel


def load(name: str, most_nodes: int = MOST_NODES) -> Tree:
  """Returns a game of OpenSpiel by its name, with parameters if it has any.

  Examples:
    >>> from nash_jax.games import trees
    >>> leduc = trees.load("leduc_poker")
    >>> len(leduc.player), len(leduc.labels)
    (9457, 936)
    >>> trees.load("liars_dice(dice_sides=2)").high
    1.0

  Args:
    name: such as "kuhn_poker".
    most_nodes: more are refused.

  Raises:
    ValueError: OpenSpiel is not installed or has no such game, or the game is not one of two
      players, zero-sum, in turns, with known chances and perfect recall.
  """
  spiel = openspiel()
  short, known = name.partition("(")[0], spiel.registered_names()
  fix = f"pyspiel.registered_names() lists them{did_you_mean(short, known)}."
  require(short in known, "game", "a name of OpenSpiel's", name, fix)
  try:
    game = spiel.load_game(name)
  except spiel.SpielError as error:
    message = str(error).strip().splitlines()[0]
    raise ValueError(f"game {name!r}: OpenSpiel refuses it: {message}") from error
  kind, fix = game.get_type(), "Kuhn poker, Leduc poker and liar's dice are such games."
  turned = f"Load turn_based_simultaneous_game(game={name})."
  for good, expected, got, remedy in (
    (game.num_players() == 2, "two players", game.num_players(), fix),
    (kind.dynamics.name == "SEQUENTIAL", "players who move in turns", "simultaneous moves", turned),
    (kind.utility.name == "ZERO_SUM", "a zero-sum game", kind.utility.name, fix),
    (kind.chance_mode.name != "SAMPLED_STOCHASTIC", "known chances", "sampled ones", fix),
    (kind.provides_information_state_string, "information states as text", "none", fix),
  ):
    require(good, name, expected, got, remedy)
  bounds = game.min_utility(), game.max_utility()
  return build(name, game.new_initial_state(), _expand_openspiel, bounds, most_nodes)


def _expand_openspiel(state: Any) -> Node:
  """Returns the node of an OpenSpiel state."""
  if state.is_terminal():
    return Node(TERMINAL, returns=float(state.returns()[0]))
  if state.is_chance_node():
    actions, chances = zip(*state.chance_outcomes(), strict=True)
    return Node(CHANCE, chances=chances, children=tuple(state.child(a) for a in actions))
  player, actions = state.current_player(), tuple(state.legal_actions())
  label = state.information_state_string(player)
  return Node(player, label=label, names=actions, children=tuple(state.child(a) for a in actions))


def load_json(path: str | os.PathLike[str], most_nodes: int = MOST_NODES) -> Tree:
  """Reads a game from {"name", "tree"}. OpenSpiel is not needed.

  A tree is a number, what the first player wins at this leaf; or {"chance": [[p, tree], ...]}; or
  {"player": 1 or 2, "sees": text, "actions": {name: tree, ...}}. Nodes of one player with the same
  "sees" are one information set.

  Examples:
    >>> import json, pathlib, tempfile
    >>> from nash_jax.games import trees
    >>> guess = {"player": 2, "sees": "nothing", "actions": {"heads": -1, "tails": 1}}
    >>> other = guess | {"actions": {"heads": 1, "tails": -1}}
    >>> tree = {"player": 1, "sees": "", "actions": {"heads": guess, "tails": other}}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   path = pathlib.Path(folder) / "pennies.json"
    ...   _ = path.write_text(json.dumps({"name": "pennies", "tree": tree}))
    ...   trees.load_json(path).labels
    ('', 'nothing')

  Args:
    most_nodes: more are refused.

  Raises:
    ValueError: the file, and what in it is no such game; see `build`.
  """

  def make(data: Any) -> Tree:
    expected, fix = 'an object with "name" and "tree"', "See docs/trees.md for an example."
    good = isinstance(data, dict) and isinstance(data.get("name"), str) and "tree" in data
    require(good, "the file", expected, type(data).__name__, fix)
    return build(data["name"], data["tree"], _expand_json, most_nodes=most_nodes)

  return files.read_json(path, make)


def _expand_json(tree: Any) -> Node:
  """Returns the node of a tree of `load_json`."""
  if isinstance(tree, int | float) and not isinstance(tree, bool):
    require(math.isfinite(tree), "a leaf", "a finite number", tree, "Replace it.")
    return Node(TERMINAL, returns=float(tree))
  expected = 'a number, {"chance"}, or {"player", "sees", "actions"}'
  keys = set(tree) if isinstance(tree, dict) else set()
  fits = keys in ({"chance"}, {"player", "sees", "actions"})
  got = sorted(keys) if keys else str(tree)[:80]
  require(fits, "a tree", expected, got, "See docs/trees.md for an example.")
  if "chance" in tree:
    return _expand_chance(tree["chance"])
  player, sees, actions = tree["player"], tree["sees"], tree["actions"]
  right = player in (1, 2) and not isinstance(player, bool)
  require(right, "player", "1 or 2", player, "Players are numbered from 1.")
  require(isinstance(sees, str), "sees", "a string", sees, "Put it in quotes.")
  some = isinstance(actions, dict) and len(actions) > 0
  require(some, f"actions at {sees!r}", "at least one, by name", actions, "Add a tree for each.")
  return Node(int(player) - 1, 0.0, sees, tuple(actions), children=tuple(actions.values()))


def _expand_chance(outcomes: Any) -> Node:
  """Returns the node of chance that a file describes by [[p, tree], ...]."""
  pairs = isinstance(outcomes, list) and all(isinstance(o, list) and len(o) == 2 for o in outcomes)
  fix = "Give the probability and the tree of each outcome."
  require(pairs and len(outcomes) > 0, "chance", "[[p, tree], ...]", str(outcomes)[:80], fix)
  given = checks.finite("chance", [p for p, _ in outcomes], ndim=1)
  good = bool((given > 0).all() and abs(given.sum() - 1) < 1e-9)
  expected = "positive probabilities that sum to 1"
  require(good, "chance", expected, given.tolist(), "Leave out what cannot happen.")
  chances = tuple((given / given.sum()).tolist())
  return Node(CHANCE, chances=chances, children=tuple(tree for _, tree in outcomes))


def legal(tree: Tree) -> Bool[np.ndarray, "X A"]:
  """Returns which slots of each information set are actions.

  Examples:
    >>> from nash_jax.games import trees
    >>> trees.legal(trees.load("kuhn_poker")).shape
    (12, 2)
  """
  return np.arange(tree.actions.max()) < tree.actions[:, None]


def uniform(tree: Tree) -> Float[np.ndarray, "X A"]:
  """Returns the policies with which both players choose every action equally often.

  Examples:
    >>> from nash_jax.games import trees
    >>> trees.uniform(trees.load("kuhn_poker"))[0].tolist()
    [0.5, 0.5]
  """
  return np.where(legal(tree), 1 / tree.actions[:, None], 0)


def policy(tree: Tree, probabilities: Any) -> Float[np.ndarray, "X A"]:
  """Returns probabilities as a float64 array, if they are policies of both players.

  Examples:
    >>> from nash_jax.games import trees
    >>> kuhn = trees.load("kuhn_poker")
    >>> trees.policy(kuhn, trees.uniform(kuhn)).shape
    (12, 2)

  Args:
    probabilities: [X A], zero beyond a set's own actions.

  Raises:
    ValueError: another shape, or not probabilities.
  """
  array, possible = checks.finite("policy", probabilities, ndim=2), legal(tree)
  expected = f"shape {possible.shape}, a row for each information set of {tree.name}"
  require(array.shape == possible.shape, "policy", expected, array.shape, "See trees.uniform.")
  checks.distribution("policy", array)
  worst = float(np.abs(array[~possible]).max(initial=0))
  fix = "Only a set's first `actions` slots are its own."
  require(worst == 0, "policy", "zeros beyond a set's own actions", worst, fix)
  return array


def by_label(tree: Tree, probabilities: Any) -> dict[str, list[float]]:
  """Returns a policy as {information state: [probability of each legal action]}.

  Examples:
    >>> from nash_jax.games import trees
    >>> kuhn = trees.load("kuhn_poker")
    >>> trees.by_label(kuhn, trees.uniform(kuhn))["0pb"]
    [0.5, 0.5]

  Args:
    probabilities: [X A].

  Raises:
    ValueError: not policies of the game, or players share an information state's text.
  """
  rows, different = policy(tree, probabilities), len(set(tree.labels)) == len(tree.labels)
  fix = "Let what players see name the player."
  require(different, tree.name, "different information states", "one of both players", fix)
  pairs = zip(tree.labels, rows, tree.actions, strict=True)
  return {label: row[:count].tolist() for label, row, count in pairs}


def levels(values: Int[np.ndarray, "n"]) -> list[Int[np.ndarray, "m"]]:
  """Returns the indices where values are 0, those where they are 1, and so on.

  Examples:
    >>> import numpy as np
    >>> from nash_jax.games import trees
    >>> [level.tolist() for level in trees.levels(np.array([0, 1, 0]))]
    [[0, 2], [1]]
  """
  return [np.flatnonzero(values == level) for level in range(values.max(initial=0) + 1)]


def _generations(tree: Tree) -> Iterator[slice]:
  """Yields where the nodes one step from the root lie, those two steps from it, and so on."""
  start, stop = 0, 1
  while stop < len(tree.player):
    start, stop = stop, stop + int(tree.children[start:stop].sum())
    yield slice(start, stop)


def reached(tree: Tree, edge: Float[np.ndarray, "N"]) -> Float[np.ndarray, "N"]:
  """Returns the product of `edge` along the path from the root to each node.

  Examples:
    >>> import numpy as np
    >>> from nash_jax.games import trees
    >>> kuhn = trees.load("kuhn_poker")
    >>> round(float(trees.reached(kuhn, kuhn.chance)[-1]), 4)  # both cards are dealt
    0.1667

  Args:
    edge: a number for the step into each node.
  """
  product = np.array(edge, float)
  for nodes in _generations(tree):
    product[nodes] *= product[tree.parent[nodes]]
  return product


def last_decisions(tree: Tree, player: int) -> Int[np.ndarray, "N"]:
  """Returns a player's last (set, action) before each node as set·A + action; -1 without one.

  Examples:
    >>> from nash_jax.games import trees
    >>> kuhn = trees.load("kuhn_poker")
    >>> int(trees.last_decisions(kuhn, 0)[0])
    -1

  Args:
    player: 0 or 1.
  """
  last = np.full(len(tree.player), -1, np.int64)
  for nodes in _generations(tree):
    parent = tree.parent[nodes]
    decision = tree.infoset[parent] * np.int64(tree.actions.max()) + tree.slot[nodes]
    last[nodes] = np.where(tree.player[parent] == player, decision, last[parent])
  return last


def longest(tree: Tree) -> int:
  """Returns the most steps of an episode, those of chance included.

  Examples:
    >>> from nash_jax.games import trees
    >>> trees.longest(trees.load("kuhn_poker"))
    5
  """
  return len([*_generations(tree)])

"""Games of imperfect information: read from OpenSpiel or from a file, and their policies.

`Tree` holds a game as arrays, and `build` makes one of any game that can be walked (walk.py, which
has the axes). A policy is [X A], with zeros beyond a set's own actions.
"""

import math
import os
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from nash_jax.games import checks, files
from nash_jax.games.walk import CHANCE, MOST_NODES, TERMINAL, Node, Tree, build
from nash_jax.validation import did_you_mean, require

__all__ = [
  "CHANCE",
  "MOST_NODES",
  "TERMINAL",
  "Node",
  "Tree",
  "build",
  "by_label",
  "last_decisions",
  "legal",
  "levels",
  "load",
  "load_json",
  "longest",
  "openspiel",
  "policy",
  "reached",
  "uniform",
]


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
  kind = game.get_type()
  fix = "Kuhn poker, Leduc poker and liar's dice are such games."
  require(game.num_players() == 2, name, "two players", game.num_players(), fix)
  turns = kind.dynamics == spiel.GameType.Dynamics.SEQUENTIAL
  turned = f"Load turn_based_simultaneous_game(game={name})."
  require(turns, name, "players who move in turns", "simultaneous moves", turned)
  zero_sum = kind.utility == spiel.GameType.Utility.ZERO_SUM
  require(zero_sum, name, "a zero-sum game", kind.utility.name, fix)
  known_chances = kind.chance_mode != spiel.GameType.ChanceMode.SAMPLED_STOCHASTIC
  require(known_chances, name, "known chances", "sampled ones", fix)
  states = kind.provides_information_state_string
  require(states, name, "information states as text", "none", fix)
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
  order = np.argsort(values, kind="stable")
  return np.split(order, np.searchsorted(values[order], np.arange(1, values.max(initial=0) + 1)))


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
  start, stop = 0, 1
  while stop < len(product):  # a generation at a time, which breadth-first order keeps together
    start, stop = stop, stop + int(tree.children[start:stop].sum())
    product[start:stop] *= product[tree.parent[start:stop]]
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
  width = int(tree.actions.max())
  last = np.full(len(tree.player), -1, np.int64)
  start, stop = 0, 1
  while stop < len(last):
    start, stop = stop, stop + int(tree.children[start:stop].sum())
    parent = tree.parent[start:stop]
    own = tree.player[parent] == player
    decision = tree.infoset[parent].astype(np.int64) * width + tree.slot[start:stop]
    last[start:stop] = np.where(own, decision, last[parent])
  return last


def longest(tree: Tree) -> int:
  """Returns the most steps of an episode, those of chance included.

  Examples:
    >>> from nash_jax.games import trees
    >>> trees.longest(trees.load("kuhn_poker"))
    5
  """
  count, start, stop = 0, 0, 1
  while stop < len(tree.player):
    start, stop, count = stop, stop + int(tree.children[start:stop].sum()), count + 1
  return count

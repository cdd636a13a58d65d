"""Measured games from files: a payoff in JSON, or votes in CSV; and how games in JSON are read."""

import csv
import io
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from nash_jax.games import checks
from nash_jax.games.base import ZooGame
from nash_jax.validation import decode, require

_Path = str | os.PathLike[str]


def _read(path: _Path) -> str:
  """Returns the text of a file without its byte-order mark; its lines end as they do."""
  return decode(str(path), pathlib.Path(path).read_bytes()).removeprefix("\ufeff")


def read_json[T](path: _Path, make: Callable[[Any], T]) -> T:
  """Returns what `make` makes of the value in a JSON file.

  Examples:
    >>> import pathlib, tempfile
    >>> from nash_jax.games import files
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   path = pathlib.Path(folder) / "sizes.json"
    ...   _ = path.write_text("[2, 3]")
    ...   files.read_json(path, sum)
    5

  Args:
    make: raises a ValueError for what is no such game.

  Raises:
    ValueError: the file, and what in it is no JSON or none that `make` takes.
  """

  def no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")

  text = _read(path)
  try:
    return make(json.loads(text, parse_constant=no_number))
  except json.JSONDecodeError as error:
    raise ValueError(f"{path}:{error.lineno}: no JSON: {error.msg}.") from error
  except RecursionError as error:
    raise ValueError(f"{path}: nested too deeply for a game.") from error
  except (ValueError, OverflowError) as error:
    raise ValueError(f"{path}: {error}") from error


def load_json(path: _Path) -> ZooGame:
  """Reads a game from {"name", "labels", "payoff_antisymmetric"}, a payoff [A A] in [-1, 1].

  A payoff that was rounded is made antisymmetric. Three more keys are read where they are present:
  "nash_example", a known equilibrium; "stats" and "notes", which become the note; and "votes"
  [A A], the comparisons behind each entry.

  Examples:
    >>> import json, pathlib, tempfile
    >>> from nash_jax.games import zoo
    >>> game = {"name": "coin", "labels": ["a", "b"], "payoff_antisymmetric": [[0, 0.5], [-0.5, 0]]}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   path = pathlib.Path(folder) / "coin.json"
    ...   _ = path.write_text(json.dumps(game))
    ...   zoo.load_json(path).p_win.tolist()
    [[0.5, 0.75], [0.25, 0.5]]

  Raises:
    ValueError: the file, and what in it is no such game.
  """
  return read_json(path, _from_json)


def _from_json(data: Any) -> ZooGame:
  need = "name", "labels", "payoff_antisymmetric"
  fix = f"Give {', '.join(need)}."
  require(isinstance(data, dict), "the file", "a JSON object", type(data).__name__, fix)
  for key in need:
    require(key in data, key, "a value", "none", "Add it.")
  name, labels = data["name"], data["labels"]
  require(isinstance(name, str), "name", "a string", name, "Put it in quotes.")
  p_win = checks.from_payoff(data["payoff_antisymmetric"])
  fix = "Give one a file."
  require(p_win.ndim == 2, "payoff_antisymmetric", "one matrix", p_win.shape, fix)
  good = isinstance(labels, list) and all(
    isinstance(label, str | int) and not isinstance(label, bool) for label in labels
  )
  expected = f"{len(p_win)} different strings or whole numbers, one for each row of the payoff"
  got = f"{len(labels)} of them" if good else labels
  unique = good and len(set(labels)) == len(labels) == len(p_win)
  require(unique, "labels", expected, got, "Name each action once.")
  nash = data.get("nash_example")
  nash = None if nash is None else _known_equilibrium(nash, p_win)
  votes = data.get("votes")
  if votes is not None:
    checks.finite("votes", votes, ndim=2)
    votes = np.asarray(votes)
    fix = "Give the number of comparisons of each pair."
    require(votes.shape == p_win.shape, "votes", f"shape {p_win.shape}", votes.shape, fix)
    checks.number("votes", votes, zero=True, array=True)
  note = " ".join(str(data.get(key) or "") for key in ("notes", "stats")).strip()
  return ZooGame(name, p_win, tuple(labels), nash, note, votes)


def _known_equilibrium(given: Any, p_win: np.ndarray) -> np.ndarray:
  """Returns a file's "nash_example" as probabilities, if nobody gains against it."""
  nash = np.maximum(checks.finite("nash_example", given, ndim=1), 0)
  good = bool(len(nash) == len(p_win) and abs(nash.sum() - 1) < 0.01)
  got = f"{len(nash)} with the sum {nash.sum():.6g}"
  fix = "Give one for each label, or leave it out."
  require(good, "nash_example", f"{len(p_win)} probabilities", got, fix)
  nash = nash / nash.sum()
  gain = (p_win @ nash).max() - 0.5
  expected, got = "an equilibrium, against which nobody gains", f"a gain of {gain:.3g}"
  fix = "Leave it out: nash_equilibrium finds one."
  require(bool(gain < 1e-3), "nash_example", expected, got, fix)
  return nash


def load_votes(path: _Path, prior: checks.Number = 0.0) -> ZooGame:
  """Reads a game from a CSV of votes, with the columns left, right and winner.

  left and right are who was compared; winner is left, right or tie. The game is
  P = (wins + ties/2 + prior/2)/(votes + prior), and ½ for pairs that never met.

  Examples:
    >>> import pathlib, tempfile
    >>> from nash_jax.games import zoo
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   path = pathlib.Path(folder) / "votes.csv"
    ...   _ = path.write_text("left,right,winner\\na,b,left\\nb,a,tie\\n")
    ...   zoo.load_votes(path).p_win.tolist()
    [[0.5, 0.75], [0.25, 0.5]]

  Args:
    path: other columns are ignored.
    prior: votes that every pair gets, half for either side.

  Raises:
    ValueError: file and line of what is no such vote, or a prior < 0, NaN or infinite.
  """
  extra = checks.number("prior", prior, zero=True)
  votes = _votes(path)
  labels = tuple(sorted({label for vote in votes for label in vote[:2]}))
  expected, fix = "at most 20,000 different answers", "Name the columns of who was compared."
  require(len(labels) <= 20_000, f"{path}: left and right", expected, len(labels), fix)
  place = {label: i for i, label in enumerate(labels)}
  wins = np.zeros((len(labels), len(labels)))
  for left, right, share in votes:
    i, j = place[left], place[right]
    wins[i, j] += share
    wins[j, i] += 1 - share
  total = wins + wins.T
  met = total > 0
  p_win = np.where(met, (wins + extra / 2) / np.maximum(total + extra, 1e-300), 0.5)
  np.fill_diagonal(p_win, 0.5)
  checks.validate(p_win)
  return ZooGame("votes", p_win, labels, None, "measured", total)


def _votes(path: _Path) -> list[tuple[str, str, float]]:
  """Returns (left, right, the share of the vote that left gets) of every row of a CSV."""
  share, columns = {"left": 1.0, "right": 0.0, "tie": 0.5}, ("left", "right", "winner")
  reader = csv.DictReader(io.StringIO(_read(path), newline=""), strict=True)
  votes = []
  try:
    header = list(reader.fieldnames or [])
    named = all(header.count(name) == 1 for name in columns)
    expected = f"a header with one column each of {', '.join(columns)}"
    require(named, f"{path}:1", expected, ",".join(header)[:200], "Name the columns.")
    for row in reader:
      line = f"{path}:{reader.line_num}"
      left, right, winner = (row[name] for name in columns)
      whole = None not in row and None not in row.values()
      fix = "Quote cells that hold commas."
      require(whole, line, f"{len(header)} cells", "another number of them", fix)
      expected, fix = "who was compared, left and right", "Leave the row out."
      require("" not in (left, right), line, expected, "an empty cell", fix)
      one_of = f"one of {', '.join(share)}"
      require(winner in share, f"{line}: winner", one_of, winner, "Rename it.")
      votes.append((left, right, share[winner]))
  except csv.Error as error:
    raise ValueError(f"{path}:{reader.line_num}: no CSV: {error}.") from error
  require(bool(votes), str(path), "at least one vote", "none", "Add rows under the header.")
  return votes

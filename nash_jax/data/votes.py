"""People's votes on pairs of responses, in an SQLite file that several processes may use at once.

An acknowledged vote is on disk, whatever happens to the process. A key of the table ensures that an
annotator has one vote on a pair. This module also decides who judges which pair next.
"""

import collections
import contextlib
import hashlib
import json
import os
import pathlib
import sqlite3
import threading
import time
import unicodedata
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from nash_jax.validation import one_of, printable, require

FILE = "votes.sqlite3"  # in a workdir
CHOICES = ("left", "right", "tie", "skip")
CLAIM = 300  # seconds for which a pair is reserved for the annotator who sees it
_GOLDEN = (5**0.5 - 1) / 2  # the fractional parts of its multiples cover [0, 1) evenly
_VERSION = 1
_SCHEMA = """
CREATE TABLE prompts (id INTEGER PRIMARY KEY, value TEXT NOT NULL UNIQUE, ids TEXT);
CREATE TABLE responses (
  id INTEGER PRIMARY KEY, prompt INTEGER NOT NULL REFERENCES prompts, text TEXT NOT NULL, ids TEXT,
  UNIQUE (prompt, text));
CREATE TABLE policies (
  response INTEGER NOT NULL REFERENCES responses, name TEXT NOT NULL, PRIMARY KEY (response, name)
) WITHOUT ROWID;
CREATE TABLE pairs (
  id INTEGER PRIMARY KEY, a INTEGER NOT NULL REFERENCES responses,
  b INTEGER NOT NULL REFERENCES responses, place INTEGER NOT NULL UNIQUE, draw REAL NOT NULL,
  votes INTEGER NOT NULL DEFAULT 0, UNIQUE (a, b), CHECK (a < b));
CREATE INDEX pairs_by_votes ON pairs (votes, place);
CREATE TABLE annotators (
  id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE COLLATE NOCASE, kind TEXT NOT NULL DEFAULT '');
CREATE TABLE votes (
  serial INTEGER PRIMARY KEY AUTOINCREMENT, annotator INTEGER NOT NULL REFERENCES annotators,
  pair INTEGER NOT NULL REFERENCES pairs, winner TEXT CHECK (winner IN ('a', 'b', 'tie', 'skip')),
  shown_left TEXT CHECK (shown_left IN ('a', 'b')), at REAL NOT NULL, UNIQUE (annotator, pair));
CREATE TABLE claims (
  annotator INTEGER PRIMARY KEY REFERENCES annotators, pair INTEGER NOT NULL, at REAL NOT NULL);
CREATE TRIGGER vote_counts AFTER INSERT ON votes WHEN new.winner <> 'skip'
  BEGIN UPDATE pairs SET votes = votes + 1 WHERE id = new.pair; END;
CREATE TRIGGER vote_counts_no_more AFTER DELETE ON votes WHEN old.winner <> 'skip'
  BEGIN UPDATE pairs SET votes = votes - 1 WHERE id = old.pair; END;
"""

Prompt = str | list[dict[str, Any]]  # a text, or messages


class Answer(NamedTuple):
  """A response: its text, and its policy and tokens if they are known."""

  text: str
  policy: str = ""
  ids: list[int] | None = None


class Pair(NamedTuple):
  """Two responses to a prompt; `ids` are the prompt's tokens if they are known."""

  prompt: Prompt
  a: Answer
  b: Answer
  ids: list[int] | None = None


class Question(NamedTuple):
  """A pair as an annotator sees it; `left_id` and `right_id` are the numbers of its responses."""

  pair: int
  prompt: Prompt
  left: str
  right: str
  left_id: int
  right_id: int


class Vote(NamedTuple):
  """A vote, except a skip.

  Attributes:
    pair, prompt, a, b: numbers of the pair, its prompt and its responses.
    wins: 1 if a is preferred, 0 if b is, 1/2 for a tie.
    left_won: 1 if the response on the left won, 0 if it lost, 1/2 for a tie.
  """

  pair: int
  prompt: int
  a: int
  b: int
  annotator: str
  kind: str
  wins: float
  left_won: float


class Conflict(ValueError):
  """A second vote of an annotator on a pair that differs from the first."""


class Store:
  """The pairs and votes in a file; safe for several threads and processes."""

  def __init__(
    self,
    path: str | os.PathLike[str],
    share: float = 0.1,
    votes: int = 1,
    seed: int = 0,
    create: bool = True,
  ):
    """Opens a store.

    Args:
      share: the share of pairs that all annotators judge.
      votes: how many votes each other pair needs.
      seed: determines the sides of responses and the order of pairs.
      create: create the file if there is none.

    Raises:
      ValueError: no such file, no file of votes, or one of a newer version.
    """
    self.path, self.share, self.votes, self.seed = pathlib.Path(path), share, votes, seed
    fix = "Give the workdir of `nash-jax vote`."
    require(create or self.path.exists(), "votes", "a file of votes", str(path), fix)
    self._lock = threading.RLock()
    try:
      # `_writing` makes the transactions, not Python.
      self._db = sqlite3.connect(self.path, 30, isolation_level=None, check_same_thread=False)
      self._db.execute("PRAGMA journal_mode = WAL")
      # Otherwise the last commit could be lost in a power failure.
      self._db.execute("PRAGMA synchronous = FULL")
      self._db.execute("PRAGMA foreign_keys = ON")
      with self._writing() as db:
        (version,) = db.execute("PRAGMA user_version").fetchone()
        (tables,) = db.execute("SELECT count(*) FROM sqlite_schema").fetchone()
        if not version and not tables:
          for statement in _statements(_SCHEMA):
            db.execute(statement)
          db.execute(f"PRAGMA user_version = {_VERSION}")
          version = _VERSION
    except sqlite3.Error as error:
      raise ValueError(f"{path}: not a file of votes that can be used: {error}") from error
    got = f"version {version}"
    fix = "Use another workdir, or the version of nash_jax that made it."
    require(version == _VERSION, f"{path}", f"a file of votes, version {_VERSION}", got, fix)

  def close(self) -> None:
    """Closes the file, which already has all acknowledged votes."""
    with self._lock:
      self._db.close()

  @contextlib.contextmanager
  def _writing(self) -> Iterator[sqlite3.Connection]:
    """Yields the database in a transaction that is on disk when this returns."""
    with self._lock:
      self._db.execute("BEGIN IMMEDIATE")
      try:
        yield self._db
      except BaseException:
        self._db.execute("ROLLBACK")
        raise
      self._db.execute("COMMIT")

  def _all(self, query: str, *values: Any) -> list[tuple]:
    with self._lock:
      return self._db.execute(query, values).fetchall()

  def add(self, pairs: Iterable[Pair]) -> int:
    """Adds new pairs in an order that mixes policies, and returns their number.

    Two equal texts are no pair.
    """
    with self._writing() as db:
      new: dict[tuple[int, int], tuple[str, str]] = {}
      for pair in pairs:
        if pair.a.text == pair.b.text:
          continue
        prompt = _number(db, "prompts", {"value": _written(pair.prompt)}, pair.ids)
        ids = [_response(db, prompt, answer) for answer in (pair.a, pair.b)]
        low, high = sorted(ids)
        first, second = sorted((pair.a.policy, pair.b.policy))
        new.setdefault((low, high), (first, second))
      there = {*db.execute("SELECT a, b FROM pairs")}
      new = {pair: policies for pair, policies in new.items() if pair not in there}
      (place,) = db.execute("SELECT coalesce(max(place), -1) + 1 FROM pairs").fetchone()
      rows = self._arranged(new, place)
      db.executemany("INSERT INTO pairs (a, b, place, draw) VALUES (?, ?, ?, ?)", rows)
    return len(rows)

  def _arranged(
    self, policies: dict[tuple[int, int], tuple[str, str]], first: int
  ) -> list[tuple[int, int, int, float]]:
    """Returns (a, b, place, draw) of pairs, with places from `first` on and draws in [0, 1).

    All annotators judge the pairs whose draw is below the share. Among the first places, every two
    policies have equally many pairs, and their draws cover [0, 1) evenly.
    """
    shuffled = sorted(policies, key=lambda pair: self._uniform("place", *pair))
    count: collections.Counter[tuple[str, str]] = collections.Counter()
    ranked = []
    for a, b in shuffled:
      rank, start = count[policies[a, b]], self._uniform("draw", first, policies[a, b])
      ranked.append((rank, a, b, (start + rank * _GOLDEN) % 1))
      count[policies[a, b]] += 1
    ranked.sort(key=lambda row: row[0])  # stable, so pairs of one rank stay shuffled
    return [(a, b, first + i, draw) for i, (_, a, b, draw) in enumerate(ranked)]

  def _uniform(self, *what: Any) -> float:
    """Returns a number in [0, 1) that depends on the seed and its purpose."""
    digest = hashlib.sha256(json.dumps([self.seed, *what]).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48

  def sign_in(self, name: str, kind: str = "") -> int:
    """Returns an annotator's number; names are not case-sensitive.

    Args:
      kind: the annotator's group; "" keeps the current one.
    """
    name, kind = (" ".join(unicodedata.normalize("NFC", x).split()) for x in (name, kind))
    for what, text, least in (("name", name, 1), ("group", kind, 0)):
      fine = least <= len(text) <= 40 and printable(text) == text
      require(fine, what, f"{least} to 40 characters", text[:60], "Choose another one.")
    known = self._all("SELECT id, kind FROM annotators WHERE name = ?", name)
    if known and kind in ("", known[0][1]):
      return known[0][0]
    with self._writing() as db:
      db.execute("INSERT OR IGNORE INTO annotators (name) VALUES (?)", (name,))
      if kind:
        db.execute("UPDATE annotators SET kind = ? WHERE name = ?", (kind, name))
      (number,) = db.execute("SELECT id FROM annotators WHERE name = ?", (name,)).fetchone()
    return number

  def question(self, annotator: int) -> Question | None:
    """Returns and reserves the next pair for an annotator; None if there is none.

    Until the annotator votes, it is the same pair. Pairs that all judge come as often as their
    share, in the same order for all. Among the others, those with the fewest votes that nobody else
    is looking at come first.
    """
    with self._writing() as db:
      pair = self._claimed(db, annotator) or self._next(db, annotator)
      if pair is None:
        db.execute("DELETE FROM claims WHERE annotator = ?", (annotator,))
        return None
      db.execute("REPLACE INTO claims VALUES (?, ?, ?)", (annotator, pair, time.time()))
      return self._shown(db, annotator, pair)

  def _claimed(self, db: sqlite3.Connection, annotator: int) -> int | None:
    row = db.execute(
      "SELECT pair FROM claims c WHERE annotator = ? AND NOT EXISTS"
      " (SELECT 1 FROM votes v WHERE v.annotator = c.annotator AND v.pair = c.pair)",
      (annotator,),
    ).fetchone()
    return row and row[0]

  def _next(self, db: sqlite3.Connection, annotator: int) -> int | None:
    known = {"me": annotator, "share": self.share, "votes": self.votes}
    known["since"] = time.time() - CLAIM
    mine = "NOT EXISTS (SELECT 1 FROM votes v WHERE v.annotator = :me AND v.pair = p.id)"
    others = (
      "SELECT count(*) FROM claims c WHERE c.pair = p.id AND c.annotator <> :me AND c.at > :since"
    )
    of_all = f"SELECT id FROM pairs p WHERE draw < :share AND {mine} ORDER BY place LIMIT 1"
    of_one = (
      f"SELECT id FROM pairs p WHERE votes < :votes AND draw >= :share AND {mine}"
      f" AND votes + ({others}) < :votes ORDER BY votes, place LIMIT 1"
    )
    total, common = db.execute(
      "SELECT count(*), coalesce(sum(draw < :share), 0) FROM votes JOIN pairs p ON p.id = pair"
      " WHERE annotator = :me",
      known,
    ).fetchone()
    queries = (of_all, of_one) if common < self.share * (total + 1) else (of_one, of_all)
    found = (db.execute(query, known).fetchone() for query in queries)
    return next((row[0] for row in found if row), None)

  def _shown(self, db: sqlite3.Connection, annotator: int, pair: int) -> Question:
    query = (
      "SELECT p.value, r.id, r.text, s.id, s.text FROM pairs JOIN responses r ON r.id = pairs.a"
      " JOIN responses s ON s.id = pairs.b JOIN prompts p ON p.id = r.prompt WHERE pairs.id = ?"
    )
    prompt, a_id, a, b_id, b = db.execute(query, (pair,)).fetchone()
    if self._uniform("side", annotator, pair) < 0.5:
      a_id, a, b_id, b = b_id, b, a_id, a
    return Question(pair, json.loads(prompt), a, b, a_id, b_id)

  def vote(self, annotator: int, pair: int, left_id: int, choice: str) -> None:
    """Records a vote; repeating the same vote changes nothing.

    Args:
      left_id: the response that was shown on the left.
      choice: one of CHOICES.

    Raises:
      Conflict: the annotator has cast another vote on this pair.
      ValueError: no such pair, response or choice.
    """
    one_of("choice", choice, CHOICES)
    with self._writing() as db:
      sides = db.execute("SELECT a, b FROM pairs WHERE id = ?", (pair,)).fetchone()
      require(sides is not None, "pair", "one that was shown", pair, "Reload the page.")
      require(left_id in sides, "left", "a response of this pair", left_id, "Reload the page.")
      left, right = ("a", "b") if left_id == sides[0] else ("b", "a")
      winner = {"left": left, "right": right}.get(choice, choice)
      known = (annotator, pair)
      query = "SELECT winner FROM votes WHERE annotator = ? AND pair = ?"
      there = db.execute(query, known).fetchone()
      if there is not None and there[0] != winner:
        raise Conflict("you have already cast another vote on this pair: undo that first")
      if there is None:
        insert = (
          "INSERT INTO votes (annotator, pair, winner, shown_left, at) VALUES (?, ?, ?, ?, ?)"
        )
        db.execute(insert, (*known, winner, left, time.time()))
      db.execute("DELETE FROM claims WHERE annotator = ? AND pair = ?", known)

  def undo(self, annotator: int, pair: int) -> None:
    """Removes an annotator's vote on a pair, which becomes their next question."""
    with self._writing() as db:
      known = (annotator, pair)
      done = db.execute("DELETE FROM votes WHERE annotator = ? AND pair = ?", known)
      if done.rowcount:
        db.execute("REPLACE INTO claims VALUES (?, ?, ?)", (*known, time.time()))

  def last(self, annotator: int) -> int | None:
    """Returns the pair of an annotator's last vote, including skips."""
    query = "SELECT pair FROM votes WHERE annotator = ? ORDER BY serial DESC LIMIT 1"
    rows = self._all(query, annotator)
    return rows[0][0] if rows else None

  def progress(self, annotator: int | None = None) -> dict[str, int]:
    """Counts all `pairs`, those `judged` often enough, `votes`, and an annotator's `mine`."""
    ((pairs, judged),) = self._all(
      "SELECT count(*), coalesce(sum(votes >= ?), 0) FROM pairs", self.votes
    )
    ((votes, mine),) = self._all(
      "SELECT coalesce(sum(winner <> 'skip'), 0), coalesce(sum(annotator = ?), 0) FROM votes",
      annotator,
    )
    return {"pairs": pairs, "judged": judged, "votes": votes, "mine": mine}

  def version(self) -> tuple:
    """Returns a value that changes with the votes, pairs or annotators."""
    (row,) = self._all(
      "SELECT (SELECT max(serial) FROM votes), (SELECT count(*) FROM votes),"
      " (SELECT count(*) FROM pairs), (SELECT group_concat(kind) FROM annotators)"
    )
    return row

  def annotators(self) -> list[tuple[str, str, int]]:
    """Returns (name, group, number of skips) of everybody who signed in."""
    return self._all(
      "SELECT name, kind, (SELECT count(*) FROM votes v WHERE v.annotator = a.id"
      " AND winner = 'skip') FROM annotators a ORDER BY name"
    )

  def all_votes(self) -> list[Vote]:
    """Returns all votes except skips, in the order in which they were cast."""
    rows = self._all(
      "SELECT p.id, r.prompt, p.a, p.b, n.name, n.kind, winner, shown_left FROM votes v"
      " JOIN pairs p ON p.id = v.pair JOIN responses r ON r.id = p.a"
      " JOIN annotators n ON n.id = v.annotator WHERE winner <> 'skip' ORDER BY serial"
    )
    wins = {"a": 1.0, "b": 0.0, "tie": 0.5}
    return [
      Vote._make((*row, wins[winner], 0.5 if winner == "tie" else float(winner == left)))
      for *row, winner, left in rows
    ]

  def policies(self) -> dict[int, list[str]]:
    """Returns {number of a response: names of the policies that gave it}."""
    found: dict[int, list[str]] = {}
    for response, name in self._all("SELECT response, name FROM policies ORDER BY name"):
      found.setdefault(response, []).append(name)
    return found

  def pairs(self) -> dict[int, Pair]:
    """Returns {number: pair}, without policies."""
    rows = self._all(
      "SELECT p.id, q.value, q.ids, r.text, r.ids, s.text, s.ids FROM pairs p"
      " JOIN responses r ON r.id = p.a JOIN responses s ON s.id = p.b"
      " JOIN prompts q ON q.id = r.prompt ORDER BY p.id"
    )
    loads = lambda ids: ids and json.loads(ids)  # noqa: E731
    return {
      number: Pair(
        json.loads(prompt), Answer(a, "", loads(a_ids)), Answer(b, "", loads(b_ids)), loads(ids)
      )
      for number, prompt, ids, a, a_ids, b, b_ids in rows
    }

  def p_win(self, prompt: Prompt, a: str, b: str) -> tuple[float, int]:
    """Returns the share of votes for a against b, with ties as halves, and the number of votes."""
    rows = self._all(
      "SELECT r.text, winner FROM prompts q"
      " JOIN responses r ON r.prompt = q.id AND r.text IN (?, ?)"
      " JOIN responses s ON s.prompt = q.id AND s.text IN (?, ?) AND s.id > r.id"
      " JOIN pairs p ON p.a = r.id AND p.b = s.id JOIN votes v ON v.pair = p.id"
      " WHERE q.value = ? AND winner <> 'skip'",
      a, b, a, b, _written(prompt),
    )  # fmt: skip
    wins = [
      0.5 if winner == "tie" else float((winner == "a") == (text == a)) for text, winner in rows
    ]
    return (sum(wins) / len(wins), len(wins)) if wins else (0.5, 0)


def _statements(script: str) -> list[str]:
  """Returns the statements of a script, because executescript would end the transaction."""
  found, statement = [], ""
  for line in script.splitlines(keepends=True):
    statement += line
    if sqlite3.complete_statement(statement):
      found.append(statement)
      statement = ""
  return found


def _written(prompt: Prompt) -> str:
  return json.dumps(prompt, ensure_ascii=False, sort_keys=True)


def _number(
  db: sqlite3.Connection, table: str, columns: dict[str, Any], ids: list[int] | None
) -> int:
  """Returns the number of a prompt or response, and adds it if it is new."""
  where = " AND ".join(f"{name} = ?" for name in columns)
  row = db.execute(f"SELECT id FROM {table} WHERE {where}", (*columns.values(),)).fetchone()
  written = None if ids is None else json.dumps([*map(int, ids)])
  if row is not None and written is not None:
    db.execute(f"UPDATE {table} SET ids = ? WHERE id = ? AND ids IS NULL", (written, row[0]))
  if row is None:
    marks = ", ".join("?" * (len(columns) + 1))
    insert = f"INSERT INTO {table} ({', '.join(columns)}, ids) VALUES ({marks}) RETURNING id"
    row = db.execute(insert, (*columns.values(), written)).fetchone()
  return row[0]


def _response(db: sqlite3.Connection, prompt: int, answer: Answer) -> int:
  number = _number(db, "responses", {"prompt": prompt, "text": answer.text}, answer.ids)
  if answer.policy:
    db.execute("INSERT OR IGNORE INTO policies VALUES (?, ?)", (number, answer.policy))
  return number

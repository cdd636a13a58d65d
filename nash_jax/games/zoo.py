"""Small preference games, each with what is known of its equilibrium; readers of measured ones."""

import csv
import io
import itertools
import json
import math
import pathlib
from typing import NamedTuple

import numpy as np

from nash_jax.games import preference
from nash_jax.validation import decode, require

EFRON = {"A": (4, 4, 4, 4, 0, 0), "B": (3,) * 6, "C": (6, 6, 2, 2, 2, 2), "D": (5, 5, 5, 1, 1, 1)}
MIWIN = {"III": (1, 2, 5, 6, 7, 9), "IV": (1, 3, 4, 5, 8, 9), "V": (2, 3, 4, 6, 7, 8)}
GRIME = {"red": (4, 4, 4, 4, 4, 9), "blue": (2, 2, 2, 7, 7, 7), "olive": (0, 5, 5, 5, 5, 5),
         "yellow": (3, 3, 3, 3, 8, 8), "magenta": (1, 1, 6, 6, 6, 6)}


class ZooGame(NamedTuple):
  """p_win [A A] (or [X A A]) float64; nash: a known equilibrium of the original game, or None."""

  name: str
  p_win: np.ndarray
  labels: tuple
  nash: np.ndarray | None
  note: str
  votes: np.ndarray | None = None  # comparisons behind each entry, where it was measured


def _uniform(actions):
  return np.full(actions, 1 / actions)


def rock_paper_scissors(rock=1.0, paper=1.0, scissors=1.0):
  """Payoffs in [0, 1] of winning with each; the equilibrium is ∝ (scissors, rock, paper).

  Rock wins `rock` from scissors, paper wins `paper` from rock, scissors wins `scissors` from paper.
  """
  for what, payoff in (("rock", rock), ("paper", paper), ("scissors", scissors)):
    preference.number(what, payoff, zero=True, at_most=1.0)
  worth = preference.number("rock + paper + scissors", rock + paper + scissors)
  payoff = [[0, -paper, rock], [paper, 0, -scissors], [-rock, scissors, 0]]
  nash = np.array([scissors, rock, paper]) / worth
  note = "unique" if min(rock, paper, scissors) > 0 else "not unique"
  return ZooGame("rock_paper_scissors", preference.from_payoff(payoff), ("R", "P", "S"), nash,
                 f"{note}: each is played as often as the win it does not take part in is worth")


def condorcet_cycle(actions=3, p_cycle=2 / 3):
  """Odd `actions` on a circle; each beats the (A-1)/2 that follow with probability p_cycle.

  Raises:
    ValueError: an even number of actions, which leaves opposite ones without a winner.
  """
  preference.count("actions", actions)
  preference.number("p_cycle", p_cycle, zero=True, at_most=1.0)
  if actions % 2 == 0:
    raise ValueError(f"a Condorcet cycle needs an odd number of actions, got {actions}.")
  ahead = (np.arange(actions)[None] - np.arange(actions)[:, None]) % actions
  p_win = np.where(ahead == 0, 0.5, np.where(ahead <= actions // 2, p_cycle, 1 - p_cycle))
  return ZooGame(f"condorcet_{actions}", p_win, tuple(range(actions)), _uniform(actions),
                 "unique and uniform by symmetry; every Bradley-Terry score is equal")


def dice(faces, name="dice", nash=None, note=""):
  """Two dice of {label: faces} are thrown; the higher face wins, ties count one half."""
  require(len(faces) > 0, "faces", "at least one die", faces, "Give {label: faces}.")
  throws = [_finite(f"the faces of {label}", f, ndim=1) for label, f in faces.items()]
  p_win = [[(np.sign(a[:, None] - b[None]).mean() + 1) / 2 for b in throws] for a in throws]
  return ZooGame(name, preference.validate(np.array(p_win)), tuple(faces), nash, note)


def population(utilities, weights=None, name="population"):
  """P(y≻y') = Σ ν(type)·1{u(y) > u(y')}, ties one half; utilities [types A], weights ν [types]."""
  utilities = _finite("utilities", utilities, ndim=2)
  weights = _uniform(len(utilities)) if weights is None else _finite("weights", weights, ndim=1)
  require(len(weights) == len(utilities), "weights", f"one for each of {len(utilities)} types",
          weights.shape, "Give one a type.")
  preference.number("weights", weights, zero=True, array=True)
  preference.number("the sum of weights", weights.sum())
  sign = np.sign(utilities[:, :, None] - utilities[:, None, :])
  p_win = 0.5 + 0.5 * np.einsum("z,zab->ab", weights / weights.sum(), sign)
  return ZooGame(name, preference.validate(p_win), tuple(range(utilities.shape[1])), None,
                 "a mean of orders: three types with rotated orders cycle at 2/3")


def majority(utilities):
  """The deterministic rule "better on most of the criteria" over utilities [criteria A]."""
  votes = np.sign(population(utilities).p_win - 0.5)
  return ZooGame("majority", 0.5 + votes / 2, tuple(range(votes.shape[0])), None,
                 "another judge than a population: its cycles have P = 1")


def blotto(soldiers=5, fields=3):
  """Colonel Blotto: whoever holds more fields wins; all ordered allocations are the actions."""
  preference.count("soldiers", soldiers)
  preference.count("fields", fields)
  size = math.comb(soldiers + fields - 1, fields - 1)
  require(size <= 10_000, "soldiers and fields", "at most 10,000 allocations", size,
          "Give fewer of them.")
  plans = np.array([plan for plan in itertools.product(range(soldiers + 1), repeat=fields)
                    if sum(plan) == soldiers])
  held = np.sign(plans[:, None] - plans[None]).sum(-1)
  return ZooGame(f"blotto_{soldiers}_{fields}", 0.5 + np.sign(held) / 2, tuple(map(tuple, plans)),
                 None, "value 1/2; some equilibrium is invariant under permutations of the fields")


def random_game(seed, actions, rank=4, cyclicity=1.0, strength=1.0, contexts=None):
  """P = σ(strength·[(1-c)(R_y - R_y') + c(A - Aᵀ)]), A = UΘ_xVᵀ/√rank, all entries N(0, 1).

  cyclicity c = 0 is a Bradley-Terry game whose best answer is argmax R; c = 1 is the paper's game.
  contexts: None for one game [A A], or X for [X A A] with U, V and R shared and Θ_x drawn for each.
  """
  preference.count("seed", seed, least=0)
  for what, size in (("actions", actions), ("rank", rank), ("contexts", contexts or 1)):
    preference.count(what, size)
  preference.number("cyclicity", cyclicity, zero=True, at_most=1.0)
  preference.number("strength", strength, zero=True)
  rng = np.random.default_rng(seed)
  left, right = rng.normal(size=(2, actions, rank))
  theta = rng.normal(size=(contexts or 1, rank, rank))
  reward = rng.normal(size=actions)
  cyclic = np.einsum("ai,xij,bj->xab", left, theta, right, optimize=True) / np.sqrt(rank)
  margin = (1 - cyclicity) * (reward[:, None] - reward[None])
  margin = strength * (margin + cyclicity * (cyclic - cyclic.swapaxes(1, 2)))
  with np.errstate(over="ignore"):  # a certain win
    p_win = 1 / (1 + np.exp(-margin))
  nash = np.eye(actions)[reward.argmax()] if cyclicity == 0 else None
  if contexts is None:
    p_win = p_win[0]
  elif nash is not None:
    nash = np.broadcast_to(nash, p_win.shape[:-1])
  return ZooGame(f"random_{actions}_rank{rank}_cyc{cyclicity:g}", p_win, tuple(range(actions)),
                 nash, "no known equilibrium" if nash is None else "Bradley-Terry: pure")


def planted(seed, nash):
  """A random game with the given equilibrium of full support: its payoff M satisfies M·nash = 0.

  The only one when actions are odd: an antisymmetric matrix of even size has an even null space.
  """
  preference.count("seed", seed, least=0)
  nash = np.asarray(preference.distribution("nash", nash, full_support=True), float)
  require(nash.ndim == 1, "nash", "one policy [A]", nash.shape, "Plant one at a time.")
  noise = np.random.default_rng(seed).normal(size=(len(nash), len(nash)))
  off = np.eye(len(nash)) - np.outer(nash, nash) / (nash @ nash)
  payoff = off @ (noise - noise.T) @ off
  largest = np.abs(payoff).max() if len(nash) > 2 else np.inf  # of two actions both win one half
  return ZooGame(f"planted_{len(nash)}", preference.from_payoff(payoff / largest),
                 tuple(range(len(nash))), nash,
                 "unique, full support" if len(nash) % 2 else "not unique")


def _finite(what, values, ndim):
  array = np.asarray(preference.numbers(what, values), float)
  require(array.ndim == ndim and array.size > 0, what, f"numbers on {ndim} axes", array.shape,
          "Give at least one on each.")
  require(bool(np.isfinite(array).all()), what, "finite numbers", "NaN or infinity", "Replace it.")
  return array


def _read(path):
  """The text of a file without its byte-order mark; its lines end as they do."""
  return decode(path, pathlib.Path(path).read_bytes()).removeprefix("\ufeff")


def load_json(path):
  """A game from {"name", "labels", "payoff_antisymmetric"} with a payoff [A A] in [-1, 1].

  Rounding is made antisymmetric; "nash_example" is kept as known, "stats" and "notes" as the note,
  "votes" [A A] where present.

  Raises:
    ValueError: the file, and what of it is no such game.
  """
  def no_number(name):
    raise ValueError(f"{name} is no number of JSON")

  text = _read(path)
  try:
    data = json.loads(text, parse_constant=no_number)
    return _from_json(data)
  except json.JSONDecodeError as error:
    raise ValueError(f"{path}:{error.lineno}: no JSON: {error.msg}.") from error
  except RecursionError as error:
    raise ValueError(f"{path}: nested too deeply for a game.") from error
  except (ValueError, OverflowError) as error:
    raise ValueError(f"{path}: {error}") from error


def _from_json(data):
  need = "name", "labels", "payoff_antisymmetric"
  require(isinstance(data, dict), "the file", "a JSON object", type(data).__name__,
          f"Give {', '.join(need)}.")
  for key in need:
    require(key in data, key, "a value", "none", "Add it.")
  name, labels = data["name"], data["labels"]
  require(isinstance(name, str), "name", "a string", name, "Put it in quotes.")
  p_win = preference.from_payoff(data["payoff_antisymmetric"])
  require(p_win.ndim == 2, "payoff_antisymmetric", "one matrix", p_win.shape, "Give one a file.")
  good = isinstance(labels, list) and all(
    isinstance(label, (str, int)) and not isinstance(label, bool) for label in labels)
  require(good and len(set(labels)) == len(labels) == len(p_win), "labels",
          f"{len(p_win)} different strings or whole numbers, one for each row of the payoff",
          f"{len(labels)} of them" if good else labels, "Name each action once.")
  nash, votes = data.get("nash_example"), data.get("votes")
  if nash is not None:
    nash = np.maximum(_finite("nash_example", nash, ndim=1), 0)
    require(len(nash) == len(p_win) and abs(nash.sum() - 1) < 0.01, "nash_example",
            f"{len(p_win)} probabilities", f"{len(nash)} with the sum {nash.sum():.6g}",
            "Give one for each label, or leave it out.")
    nash = nash / nash.sum()
    gain = (p_win @ nash).max() - 0.5
    require(gain < 1e-3, "nash_example", "an equilibrium, against which nobody gains",
            f"a gain of {gain:.3g}", "Leave it out: nash_equilibrium finds one.")
  if votes is not None:
    _finite("votes", votes, ndim=2)
    votes = np.asarray(votes)
    require(votes.shape == p_win.shape, "votes", f"shape {p_win.shape}", votes.shape,
            "Give the number of comparisons of each pair.")
    preference.number("votes", votes, zero=True, array=True)
  note = " ".join(str(data.get(key) or "") for key in ("notes", "stats")).strip()
  return ZooGame(name, p_win, tuple(labels), nash, note, votes)


def load_votes(path, prior=0.0):
  """A game from a CSV of votes: columns left, right (who was compared) and winner.

  winner is left, right or tie. P = (wins + ties/2 + prior/2)/(votes + prior); unseen pairs are 1/2.

  Raises:
    ValueError: file and line of what is no such vote, or a prior that is no number ≥ 0.
  """
  preference.number("prior", prior, zero=True)
  votes = _votes(path)
  labels = tuple(sorted({label for vote in votes for label in vote[:2]}))
  require(len(labels) <= 20_000, f"{path}: left and right", "at most 20,000 different answers",
          len(labels), "Name the columns of who was compared.")
  place = {label: i for i, label in enumerate(labels)}
  wins = np.zeros((len(labels), len(labels)))
  for left, right, share in votes:
    i, j = place[left], place[right]
    wins[i, j] += share
    wins[j, i] += 1 - share
  votes = wins + wins.T
  p_win = np.where(votes > 0, (wins + prior / 2) / np.maximum(votes + prior, 1e-300), 0.5)
  np.fill_diagonal(p_win, 0.5)
  return ZooGame("votes", preference.validate(p_win), labels, None, "measured", votes)


def _votes(path):
  """[(left, right, the share of the vote that left gets)] of a CSV."""
  share, columns = {"left": 1.0, "right": 0.0, "tie": 0.5}, ("left", "right", "winner")
  reader = csv.DictReader(io.StringIO(_read(path), newline=""), strict=True)
  votes = []
  try:
    header = reader.fieldnames or []
    require(all(header.count(name) == 1 for name in columns), f"{path}:1",
            f"a header with one column each of {', '.join(columns)}", ",".join(header)[:200],
            "Name the columns.")
    for row in reader:
      at = f"{path}:{reader.line_num}"
      cells = [row[name] for name in columns]
      require(None not in row and None not in row.values(), at, f"{len(header)} cells",
              "another number of them", "Quote cells that hold commas.")
      require("" not in cells[:2], at, "who was compared, left and right", "an empty cell",
              "Leave the row out.")
      require(cells[2] in share, f"{at}: winner", f"one of {', '.join(share)}", cells[2],
              "Rename it.")
      votes.append((*cells[:2], share[cells[2]]))
  except csv.Error as error:
    raise ValueError(f"{path}:{reader.line_num}: no CSV: {error}.") from error
  require(bool(votes), str(path), "at least one vote", "none", "Add rows under the header.")
  return votes


def menagerie():
  """The built-in games, small enough to solve all in a test."""
  rotated = [np.roll(np.arange(3), k) for k in range(3)]
  return [
    rock_paper_scissors(), rock_paper_scissors(0.2, 1.0, 0.6)._replace(name="biased_rps"),
    condorcet_cycle(), condorcet_cycle(7, 0.9),
    dice(EFRON, "efron", np.array([3, 1, 3, 0]) / 7, "not unique"),
    dice(MIWIN, "miwin", _uniform(3), "unique: a cycle at 17 to 16"),
    dice(GRIME, "grime", np.array([15, 23, 15, 6, 6]) / 65, "unique, full support"),
    population(rotated, name="rotated_orders")._replace(nash=_uniform(3), note="cycles at 2/3"),
    majority(rotated)._replace(nash=_uniform(3)), blotto(),
    random_game(0, 6, cyclicity=0.0), random_game(1, 8, rank=3, cyclicity=0.5, strength=2.0),
    planted(2, [0.1, 0.2, 0.3, 0.25, 0.15]),
  ]

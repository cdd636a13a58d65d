"""Small preference games, each with what is known of its equilibrium.

Measured games are read by `load_json` and `load_votes` (files.py). Games are float64.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float

from nash_jax.games import checks
from nash_jax.games.base import ZooGame
from nash_jax.games.checks import Number, Numbers
from nash_jax.games.files import load_json, load_votes
from nash_jax.validation import one_of, require

__all__ = [
  "EFRON",
  "GRIME",
  "MIWIN",
  "ZooGame",
  "blotto",
  "condorcet_cycle",
  "dice",
  "load_json",
  "load_votes",
  "majority",
  "menagerie",
  "planted",
  "population",
  "random_game",
  "rock_paper_scissors",
]

EFRON = {"A": (4, 4, 4, 4, 0, 0), "B": (3,) * 6, "C": (6, 6, 2, 2, 2, 2), "D": (5, 5, 5, 1, 1, 1)}
MIWIN = {"III": (1, 2, 5, 6, 7, 9), "IV": (1, 3, 4, 5, 8, 9), "V": (2, 3, 4, 6, 7, 8)}
GRIME = {
  "red": (4, 4, 4, 4, 4, 9),
  "blue": (2, 2, 2, 7, 7, 7),
  "olive": (0, 5, 5, 5, 5, 5),
  "yellow": (3, 3, 3, 3, 8, 8),
  "magenta": (1, 1, 6, 6, 6, 6),
}


def _uniform(actions: int) -> Float[np.ndarray, "A"]:
  return np.full(actions, 1 / actions)


def rock_paper_scissors(rock: Number = 1.0, paper: Number = 1.0, scissors: Number = 1.0) -> ZooGame:
  """Returns a biased rock-paper-scissors; its equilibrium is ∝ (scissors, rock, paper).

  Examples:
    >>> from nash_jax.games import zoo
    >>> zoo.rock_paper_scissors(0.5, 1.0, 0.5).nash.tolist()
    [0.25, 0.25, 0.5]

  Args:
    rock: what rock wins from scissors, a payoff in [0, 1].
    paper: what paper wins from rock.
    scissors: what scissors wins from paper.

  Raises:
    ValueError: a payoff outside [0, 1], or all of them 0.
  """
  for what, one in (("rock", rock), ("paper", paper), ("scissors", scissors)):
    checks.number(what, one, zero=True, at_most=1.0)
  worth = checks.number("rock + paper + scissors", rock + paper + scissors)
  payoff = [[0, -paper, rock], [paper, 0, -scissors], [-rock, scissors, 0]]
  nash = np.array([scissors, rock, paper]) / worth
  note = "unique" if min(rock, paper, scissors) > 0 else "not unique"
  note += ": each is played as often as the win it does not take part in is worth"
  game = checks.from_payoff(payoff)
  return ZooGame("rock_paper_scissors", game, ("R", "P", "S"), nash, note)


def condorcet_cycle(actions: int = 3, p_cycle: Number = 2 / 3) -> ZooGame:
  """Returns a circle of actions, of which each beats the (A-1)/2 that follow it.

  Examples:
    >>> from nash_jax.games import zoo
    >>> zoo.condorcet_cycle(3, 0.75).p_win[0].tolist()
    [0.5, 0.75, 0.25]

  Args:
    actions: A, an odd number.
    p_cycle: the probability with which one beats those that follow.

  Raises:
    ValueError: a probability outside [0, 1], or an even number of actions, which leaves opposite
      ones without a winner.
  """
  checks.count("actions", actions)
  checks.number("p_cycle", p_cycle, zero=True, at_most=1.0)
  if actions % 2 == 0:
    raise ValueError(f"a Condorcet cycle needs an odd number of actions, got {actions}.")
  ahead = (np.arange(actions)[None] - np.arange(actions)[:, None]) % actions
  p_win = np.where(ahead == 0, 0.5, np.where(ahead <= actions // 2, p_cycle, 1 - p_cycle))
  note = "unique and uniform by symmetry; every Bradley-Terry score is equal"
  labels = tuple(range(actions))
  return ZooGame(f"condorcet_{actions}", p_win, labels, _uniform(actions), note)


def dice(
  faces: Mapping[str, Sequence[float]],
  name: str = "dice",
  nash: Float[np.ndarray, "A"] | None = None,
  note: str = "",
) -> ZooGame:
  """Returns the game in which two dice are thrown: the higher face wins, ties count one half.

  Examples:
    >>> from nash_jax.games import zoo
    >>> zoo.dice({"fair": (1, 2, 3), "loaded": (3, 3, 3)}).p_win[0].round(3).tolist()
    [0.5, 0.167]

  Args:
    faces: of each die, by its label.
    name: of the game.
    nash: a known equilibrium.
    note: what is known of it.

  Raises:
    ValueError: no die, a die without faces, or a face that is not a finite number.
  """
  require(len(faces) > 0, "faces", "at least one die", faces, "Give {label: faces}.")
  throws = [checks.finite(f"the faces of {label}", f, ndim=1) for label, f in faces.items()]
  sign = [[np.sign(a[:, None] - b[None]).mean() for b in throws] for a in throws]
  p_win = (np.array(sign) + 1) / 2
  checks.validate(p_win)
  return ZooGame(name, p_win, tuple(faces), nash, note)


def population(
  utilities: Numbers, weights: Numbers | None = None, name: str = "population"
) -> ZooGame:
  """Returns P(y≻y') = Σ ν(type)·1{u(y) > u(y')} of types of annotators; ties count one half.

  Examples:
    >>> from nash_jax.games import zoo
    >>> zoo.population([[2, 1, 0], [0, 2, 1], [1, 0, 2]]).p_win[0].round(3).tolist()
    [0.5, 0.667, 0.333]

  Args:
    utilities: u(y) of each type, [types A].
    weights: ν, [types], of any sum; by default all alike.
    name: of the game.

  Raises:
    ValueError: utilities that are not finite, or weights that are negative, 0 in sum or not one a
      type.
  """
  u = checks.finite("utilities", utilities, ndim=2)
  w = _uniform(len(u)) if weights is None else checks.finite("weights", weights, ndim=1)
  expected = f"one for each of {len(u)} types"
  require(len(w) == len(u), "weights", expected, w.shape, "Give one a type.")
  checks.number("weights", w, zero=True, array=True)
  checks.number("the sum of weights", w.sum())
  sign = np.sign(u[:, :, None] - u[:, None, :])
  p_win = 0.5 + 0.5 * np.einsum("z,zab->ab", w / w.sum(), sign)
  checks.validate(p_win)
  note = "a mean of orders: three types with rotated orders cycle at 2/3"
  return ZooGame(name, p_win, tuple(range(u.shape[1])), None, note)


def majority(utilities: Numbers) -> ZooGame:
  """Returns the deterministic rule "better on most of the criteria".

  Examples:
    >>> from nash_jax.games import zoo
    >>> zoo.majority([[2, 1, 0], [0, 2, 1], [1, 0, 2]]).p_win[0].tolist()
    [0.5, 1.0, 0.0]

  Args:
    utilities: of each criterion, [criteria A].

  Raises:
    ValueError: utilities that are not finite.
  """
  votes = np.sign(population(utilities).p_win - 0.5)
  note = "another judge than a population: its cycles have P = 1"
  return ZooGame("majority", 0.5 + votes / 2, tuple(range(votes.shape[0])), None, note)


def blotto(soldiers: int = 5, fields: int = 3) -> ZooGame:
  """Returns Colonel Blotto: whoever holds more fields wins. The actions are ordered allocations.

  Examples:
    >>> from nash_jax.games import zoo
    >>> game = zoo.blotto(soldiers=2, fields=2)
    >>> game.labels, game.p_win[1].tolist()
    (((0, 2), (1, 1), (2, 0)), [0.5, 0.5, 0.5])

  Args:
    soldiers: of each player.
    fields: on which they are spread.

  Raises:
    ValueError: not whole numbers ≥ 1, or more than 10,000 allocations.
  """
  checks.count("soldiers", soldiers)
  checks.count("fields", fields)
  places = soldiers + fields - 1
  size = math.comb(places, fields - 1)
  most, fix = "at most 10,000 allocations", "Give fewer of them."
  require(size <= 10_000, "soldiers and fields", most, size, fix)
  # soldiers in a row, and bars that part them into fields
  bars = np.array(list(itertools.combinations(range(places), fields - 1)), int)
  plans = np.diff(bars, prepend=-1, append=places) - 1
  held = sum(np.sign(np.subtract.outer(field, field)) for field in plans.T)
  labels = tuple(tuple(plan) for plan in plans.tolist())
  note = "value 1/2; some equilibrium is invariant under permutations of the fields"
  return ZooGame(f"blotto_{soldiers}_{fields}", 0.5 + np.sign(held) / 2, labels, None, note)


def random_game(
  seed: int,
  actions: int,
  rank: int = 4,
  cyclicity: Number = 1.0,
  strength: Number = 1.0,
  contexts: int | None = None,
  normalisation: Literal["sqrt_rank", "rank"] = "sqrt_rank",
) -> ZooGame:
  """Returns P = σ(strength·[(1-c)(R_y - R_y') + c(A - Aᵀ)]), A = UΘ_xVᵀ/√rank, entries N(0, 1).

  Cyclicity c = 0 is a Bradley-Terry game, whose best answer is argmax R; c = 1 is the paper's game
  (2505.19731). Strength multiplies the log-odds, whatever A is divided by.

  Examples:
    >>> from nash_jax.games import zoo
    >>> game = zoo.random_game(0, actions=3, contexts=2)
    >>> game.p_win.shape
    (2, 3, 3)
    >>> by_rank = zoo.random_game(0, actions=3, contexts=2, strength=2.0, normalisation="rank")
    >>> bool(np.allclose(by_rank.p_win, game.p_win))  # 2/4 = 1/√4
    True

  Args:
    seed: of numpy's default generator.
    actions: A.
    rank: of A, and of the cyclic part up to twice that.
    cyclicity: c in [0, 1].
    strength: ≥ 0, a factor of the log-odds.
    contexts: None for one game [A A], or X for [X A A], with U, V and R shared and Θ_x drawn for
      each.
    normalisation: what UΘ_xVᵀ is divided by. "sqrt_rank" leaves entries of standard deviation √rank
      in A, "rank" entries of standard deviation 1, as in the games of `nash-jax short_game`.

  Raises:
    ValueError: a number outside its range, or another normalisation.
  """
  checks.count("seed", seed, least=0)
  for what, size in (("actions", actions), ("rank", rank), ("contexts", contexts or 1)):
    checks.count(what, size)
  checks.number("cyclicity", cyclicity, zero=True, at_most=1.0)
  checks.number("strength", strength, zero=True)
  one_of("normalisation", normalisation, ("sqrt_rank", "rank"))
  rng = np.random.default_rng(seed)
  left, right = rng.normal(size=(2, actions, rank))
  theta = rng.normal(size=(contexts or 1, rank, rank))
  reward = rng.normal(size=actions)
  divisor = np.sqrt(rank) if normalisation == "sqrt_rank" else rank
  cyclic = np.einsum("ai,xij,bj->xab", left, theta, right, optimize=True) / divisor
  margin = (1 - cyclicity) * (reward[:, None] - reward[None])
  margin = strength * (margin + cyclicity * (cyclic - cyclic.swapaxes(1, 2)))
  with np.errstate(over="ignore"):  # a certain win
    p_win = 1 / (1 + np.exp(-margin))
  nash = np.eye(actions)[reward.argmax()] if cyclicity == 0 else None
  if contexts is None:
    p_win = p_win[0]
  elif nash is not None:
    nash = np.broadcast_to(nash, p_win.shape[:-1])
  name = f"random_{actions}_rank{rank}_cyc{cyclicity:g}"
  note = "no known equilibrium" if nash is None else "Bradley-Terry: pure"
  return ZooGame(name, p_win, tuple(range(actions)), nash, note)


def planted(seed: int, nash: Numbers) -> ZooGame:
  """Returns a random game with the given equilibrium: its payoff M satisfies M·nash = 0.

  The equilibrium is the only one where actions are odd: an antisymmetric matrix of even size has an
  even null space.

  Examples:
    >>> import numpy as np
    >>> from nash_jax.games import preference, zoo
    >>> game = zoo.planted(0, [0.2, 0.3, 0.5])
    >>> np.asarray(preference.nash_equilibrium(game.p_win)).round(6).tolist()
    [0.2, 0.3, 0.5]

  Args:
    seed: of numpy's default generator.
    nash: probabilities [A] of full support.

  Raises:
    ValueError: not such probabilities.
  """
  checks.count("seed", seed, least=0)
  planned = np.asarray(checks.distribution("nash", nash, full_support=True), float)
  require(planned.ndim == 1, "nash", "one policy [A]", planned.shape, "Plant one at a time.")
  actions = len(planned)
  noise = np.random.default_rng(seed).normal(size=(actions, actions))
  off = np.eye(actions) - np.outer(planned, planned) / (planned @ planned)
  payoff = off @ (noise - noise.T) @ off
  largest = np.abs(payoff).max() if actions > 2 else np.inf  # of two actions both win one half
  game, labels = checks.from_payoff(payoff / largest), tuple(range(actions))
  note = "unique, full support" if actions % 2 else "not unique"
  return ZooGame(f"planted_{actions}", game, labels, planned, note)


def menagerie() -> list[ZooGame]:
  """Returns the built-in games, small enough to solve them all in a test.

  Examples:
    >>> from nash_jax.games import zoo
    >>> len(zoo.menagerie())
    13
  """
  rotated = [np.roll(np.arange(3), k) for k in range(3)]
  return [
    rock_paper_scissors(),
    rock_paper_scissors(0.2, 1.0, 0.6)._replace(name="biased_rps"),
    condorcet_cycle(),
    condorcet_cycle(7, 0.9),
    dice(EFRON, "efron", np.array([3, 1, 3, 0]) / 7, "not unique"),
    dice(MIWIN, "miwin", _uniform(3), "unique: a cycle at 17 to 16"),
    dice(GRIME, "grime", np.array([15, 23, 15, 6, 6]) / 65, "unique, full support"),
    population(rotated, name="rotated_orders")._replace(nash=_uniform(3), note="cycles at 2/3"),
    majority(rotated)._replace(nash=_uniform(3)),
    blotto(),
    random_game(0, 6, cyclicity=0.0),
    random_game(1, 8, rank=3, cyclicity=0.5, strength=2.0),
    planted(2, [0.1, 0.2, 0.3, 0.25, 0.15]),
  ]

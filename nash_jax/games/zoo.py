"""Small preference games, each with what is known of its equilibrium; readers of measured ones."""

import csv
import itertools
import json
from typing import NamedTuple

import numpy as np

from nash_jax.games import preference

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
  payoff = [[0, -paper, rock], [paper, 0, -scissors], [-rock, scissors, 0]]
  nash = np.array([scissors, rock, paper]) / (rock + paper + scissors)
  return ZooGame("rock_paper_scissors", preference.from_payoff(payoff), ("R", "P", "S"), nash,
                 "unique: each is played as often as the win it does not take part in is worth")


def condorcet_cycle(actions=3, p_cycle=2 / 3):
  """Odd `actions` on a circle; each beats the (A-1)/2 that follow with probability p_cycle.

  Raises:
    ValueError: an even number of actions, which leaves opposite ones without a winner.
  """
  if actions % 2 == 0:
    raise ValueError(f"a Condorcet cycle needs an odd number of actions, got {actions}.")
  ahead = (np.arange(actions)[None] - np.arange(actions)[:, None]) % actions
  p_win = np.where(ahead == 0, 0.5, np.where(ahead <= actions // 2, p_cycle, 1 - p_cycle))
  return ZooGame(f"condorcet_{actions}", p_win, tuple(range(actions)), _uniform(actions),
                 "unique and uniform by symmetry; every Bradley-Terry score is equal")


def dice(faces, name="dice", nash=None, note=""):
  """Two dice of {label: faces} are thrown; the higher face wins, ties count one half."""
  throws = [np.asarray(f, float) for f in faces.values()]
  p_win = [[(np.sign(a[:, None] - b[None]).mean() + 1) / 2 for b in throws] for a in throws]
  return ZooGame(name, preference.validate(np.array(p_win)), tuple(faces), nash, note)


def population(utilities, weights=None, name="population"):
  """P(y≻y') = Σ ν(type)·1{u(y) > u(y')}, ties one half; utilities [types A], weights ν [types]."""
  utilities = np.asarray(utilities, float)
  weights = _uniform(len(utilities)) if weights is None else np.asarray(weights, float)
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
  rng = np.random.default_rng(seed)
  left, right = rng.normal(size=(2, actions, rank))
  theta = rng.normal(size=(contexts or 1, rank, rank))
  reward = rng.normal(size=actions)
  cyclic = np.einsum("ai,xij,bj->xab", left, theta, right, optimize=True) / np.sqrt(rank)
  margin = (1 - cyclicity) * (reward[:, None] - reward[None])
  margin = strength * (margin + cyclicity * (cyclic - cyclic.swapaxes(1, 2)))
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
  nash = np.asarray(nash, float)
  noise = np.random.default_rng(seed).normal(size=(len(nash), len(nash)))
  off = np.eye(len(nash)) - np.outer(nash, nash) / (nash @ nash)
  payoff = off @ (noise - noise.T) @ off
  return ZooGame(f"planted_{len(nash)}", preference.from_payoff(payoff / np.abs(payoff).max()),
                 tuple(range(len(nash))), nash,
                 "unique, full support" if len(nash) % 2 else "not unique")


def load_json(path):
  """A game from {"name", "labels", "payoff_antisymmetric"} with a payoff [A A] in [-1, 1].

  Rounding is made antisymmetric; "nash_example" is kept as known, "stats" and "notes" as the note,
  "votes" [A A] where present.
  """
  with open(path) as f:
    data = json.load(f)
  nash = np.maximum(data["nash_example"], 0) if "nash_example" in data else None
  votes = np.asarray(data["votes"]) if "votes" in data else None
  return ZooGame(data["name"], preference.from_payoff(data["payoff_antisymmetric"]),
                 tuple(data["labels"]), None if nash is None else nash / nash.sum(),
                 f"{data.get('notes', '')} {data.get('stats', '')}".strip(), votes)


def load_votes(path, prior=0.0):
  """A game from a CSV of votes: columns left, right (who was compared) and winner.

  winner is left, right or tie. P = (wins + ties/2 + prior/2)/(votes + prior); unseen pairs are 1/2.

  Raises:
    ValueError: a winner that is none of the three.
  """
  with open(path, newline="") as f:
    rows = list(csv.DictReader(f))
  labels = tuple(sorted({row[side] for row in rows for side in ("left", "right")}))
  place = {label: i for i, label in enumerate(labels)}
  wins = np.zeros((len(labels), len(labels)))
  share = {"left": 1.0, "right": 0.0, "tie": 0.5}
  for row in rows:
    if row["winner"] not in share:
      raise ValueError(f"{path}: winner must be one of {', '.join(share)}, got {row['winner']!r}.")
    i, j = place[row["left"]], place[row["right"]]
    wins[i, j] += share[row["winner"]]
    wins[j, i] += 1 - share[row["winner"]]
  votes = wins + wins.T
  p_win = np.where(votes > 0, (wins + prior / 2) / np.maximum(votes + prior, 1e-300), 0.5)
  np.fill_diagonal(p_win, 0.5)
  return ZooGame("votes", preference.validate(p_win), labels, None, "measured", votes)


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

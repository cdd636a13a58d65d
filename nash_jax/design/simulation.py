"""Simulated labels of linear rewards: what each design's labels are worth.

Most prompts are alike: their responses differ in a few directions of the features, and a few rare
prompts differ in the others. Random pairs hardly ever come from those.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy import special, stats

from nash_jax.design import rounds
from nash_jax.validation import require

Labels = Callable[[Int[np.ndarray, "P"]], Float[np.ndarray, "P"]]


class World(NamedTuple):
  """Features of K responses to each of N prompts, in the unit ball, and the true θ*."""

  features: Float[np.ndarray, "N K D"]
  theta: Float[np.ndarray, "D"]

  def pairs(self) -> Float[np.ndarray, "P D"]:
    """Returns the differences of every two responses to a prompt."""
    i, j = np.triu_indices(self.features.shape[1], 1)
    return (self.features[:, i] - self.features[:, j]).reshape(-1, self.features.shape[2])

  def regrets(self, theta: Float[np.ndarray, "D"]) -> Float[np.ndarray, "N"]:
    """Returns for each prompt what the best response by θ has less than the truly best one."""
    rewards = self.features @ self.theta
    picked = np.argmax(self.features @ theta, axis=1)
    return rewards.max(axis=1) - np.take_along_axis(rewards, picked[:, None], axis=1)[:, 0]


def world(config: Mapping[str, Any], alike: bool, seed: int) -> World:
  """Returns random features and rewards.

  Args:
    config: `prompts` N, `responses` K, `dimension` d and `norm` ‖θ*‖; and if `alike`, `common`, how
      many directions most prompts differ in, and `rare`, the share of the others.
    alike: whether prompts are mostly alike; otherwise all differ in all directions.
  """
  rng, common = np.random.default_rng(seed), config["common"]
  shape = (config["prompts"], config["responses"], config["dimension"])
  features = rng.standard_normal(shape)
  if alike:
    rare = round(config["rare"] * shape[0])
    features[rare:, :, common:] = 0
    features[:rare, :, :common] = 0
  theta = rng.standard_normal(shape[2])
  largest = np.linalg.norm(features, axis=2).max()
  return World(features / largest, config["norm"] * theta / np.linalg.norm(theta))


def buy(
  name: str, arms: Float[np.ndarray, "N D"], budget: int, labels: Labels, seed: int
) -> Float[np.ndarray, "D"]:
  """Returns the rewards fitted to the labels that a design buys, round by round.

  Args:
    arms: scaled; see rounds.scaled.
    labels: pairs -> a label of each, P(first wins) or 1 and 0.
  """
  chosen, p_win = np.zeros(0, int), np.zeros(0)
  while len(new := rounds.choose(name, arms, budget, chosen, p_win, seed)):
    chosen, p_win = np.concatenate([chosen, new]), np.concatenate([p_win, labels(new)])
  return rounds.fit(arms[chosen], p_win, rounds.penalty(arms))


def sampled(p_win: Float[np.ndarray, "N"], seed: int) -> Labels:
  """Returns labels that are 1 with the pair's probability, and 0 else."""
  rng = np.random.default_rng((seed, 1))
  return lambda pairs: rng.binomial(1, p_win[pairs]).astype(np.float64)


def simulate(
  config: Mapping[str, Any], designs: Sequence[str], budgets: Sequence[int], seeds: int
) -> list[dict[str, Any]]:
  """Returns a row for each kind of prompts, design, budget and seed: worst and mean regret.

  Args:
    config: see `world`.

  Raises:
    ValueError: a field out of its range.
  """
  check(config)
  rows, kinds = [], (("mostly alike", True), ("isotropic", False))
  for (kind, alike), seed in itertools.product(kinds, range(seeds)):
    truth = world(config, alike, seed)
    pairs = truth.pairs()
    arms, p_win = rounds.scaled(pairs), special.expit(pairs @ truth.theta)
    for name, budget in itertools.product(designs, budgets):
      regrets = truth.regrets(buy(name, arms, budget, sampled(p_win, seed), seed))
      found = {"worst": float(regrets.max()), "mean": float(regrets.mean())}
      rows.append({"prompts": kind, "design": name, "labels": budget, "seed": seed, **found})
  return rows


def check(config: Mapping[str, Any]) -> None:
  """Checks the numbers of a simulation; see `world`.

  Raises:
    ValueError: what, expected, got and how to fix it.
  """
  for name, least in (("prompts", 2), ("responses", 2), ("dimension", 2), ("common", 1)):
    value = config[name]
    good = isinstance(value, int) and value >= least
    require(good, f"simulation.{name}", f"a whole number of at least {least}", value, "Raise it.")
  few, expected = config["common"] < config["dimension"], "fewer than simulation.dimension"
  require(few, "simulation.common", expected, config["common"], "Lower it.")
  some = 0 < config["rare"] < 1 and round(config["rare"] * config["prompts"]) > 0
  expected = "a share in (0, 1) that is one of simulation.prompts or more"
  require(some, "simulation.rare", expected, config["rare"], "Raise it.")
  positive = 0 < config["norm"] < np.inf
  require(positive, "simulation.norm", "a positive number", config["norm"], "Try 6.")


def summary(
  rows: Iterable[Mapping[str, Any]], by: Sequence[str], values: Sequence[str]
) -> list[dict[str, Any]]:
  """Returns the mean over seeds of each value, with the ends of its 95% interval (Student's t).

  Args:
    by: columns that tell groups of rows apart.
    values: columns of numbers; `worst` becomes `worst`, `worst_low` and `worst_high`.
  """
  groups: dict[tuple, list[Mapping[str, Any]]] = {}
  for row in rows:
    groups.setdefault(tuple(row[name] for name in by), []).append(row)
  found = []
  for group, members in groups.items():
    line: dict[str, Any] = dict(zip(by, group, strict=True))
    for name in values:
      numbers = np.array([row[name] for row in members])
      mean, degrees = float(numbers.mean()), len(numbers) - 1
      wide = float(stats.t.ppf(0.975, degrees) * stats.sem(numbers))
      line |= {name: mean, f"{name}_low": mean - wide, f"{name}_high": mean + wide}
    found.append(line)
  return found

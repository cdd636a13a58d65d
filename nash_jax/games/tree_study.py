"""The study of games of imperfect information: gaps of average policies against episodes.

It takes a config (configs/games/trees.py) and returns tables by name.
"""

import concurrent.futures
import functools
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from nash_jax.games import exact, regret, trees
from nash_jax.games.charts import Rows, Tables
from nash_jax.games.convergence import StudyConfig, bar
from nash_jax.validation import one_of, require

THEORY = "theory: "  # before the name of a method at the rates of its bound


BASELINES = ("cfr_plus", "mccfr")


def check(config: StudyConfig) -> None:
  """Checks the names of a study's games, methods and baselines.

  Examples:
    >>> from nash_jax.configs.games import trees as config
    >>> from nash_jax.games import tree_study
    >>> tree_study.check(config.get_config())

  Raises:
    ValueError: an unknown name, or not one number of episodes for each game.
  """
  for what, choices in (("methods", regret.METHODS), ("theory", regret.METHODS)):
    for name in config[what]:
      one_of(what, name, choices)
  for name in config.baselines:
    one_of("baselines", name, BASELINES)
  fix = "Give one for each of `trees`."
  same = len(config.episodes) == len(config.trees)
  require(same, "episodes", f"{len(config.trees)} numbers", config.episodes, fix)


def learn(config: StudyConfig) -> Tables:
  """Measures every method in every game, each at the best of its tuned rates.

  Examples:
    >>> from nash_jax.configs.games import trees as config
    >>> from nash_jax.games import tree_study
    >>> small = config.get_config("smoke")
    >>> small.update(methods=("ixomd",), multipliers=(3.0, 10.0), seeds=(0,), baselines=())
    >>> tables = tree_study.learn(small)
    >>> tables["trees"][-1]["gap"] < tables["trees"][0]["gap"]
    True

  Args:
    config: as configs/games/trees.py.

  Returns:
    trees: the gap by game, method, seed and episodes;
    trees_curves: its mean and range over seeds;
    trees_slopes: of that mean in its last two decades of episodes, on logarithmic axes;
    trees_tuned: the chosen multiplier of each method's rate;
    trees_grid: all that were tried;
    policies: the average policies at the end, which `study.run` writes as JSON.
  """
  tables: Tables = {name: [] for name in ("trees", "trees_curves", "trees_tuned", "trees_grid")}
  tables["policies"] = []
  for name, episodes in zip(config.trees, config.episodes, strict=True):
    tree = trees.load(name)
    grid, tuned = _tune(config, tree)
    tables["trees_grid"] += grid
    tables["trees_tuned"] += tuned
    points = _points(config, episodes)
    tasks = [(row["method"], row["multiplier"], seed) for row in tuned for seed in config.seeds]
    tasks += [(THEORY + m, 1.0, seed) for m in config.theory for seed in config.seeds]
    run = functools.partial(_curve, tree, points)
    for (method, _, seed), (gaps, policy) in zip(tasks, _parallel(run, tasks, name), strict=True):
      case = {"game": name, "method": method, "seed": seed}
      pairs = zip(points, gaps, strict=True)
      tables["trees"] += [case | {"episodes": int(t), "gap": gap} for t, gap in pairs]
      if not method.startswith(THEORY):
        tables["policies"].append(case | {"policy": trees.by_label(tree, policy)})
    tables["trees"] += [row for b in config.baselines for row in _baseline(config, tree, b, points)]
  tables["trees_curves"] = _bands(tables["trees"])
  tables["trees_slopes"] = _slopes(tables["trees_curves"])
  return tables


def _points(config: StudyConfig, episodes: int) -> Int[np.ndarray, "n"]:
  """Returns the episodes at which gaps are measured, evenly spaced in logarithms."""
  first = min(config.first_point, episodes)
  return np.unique(np.geomspace(first, episodes, config.points).round().astype(int))


def _parallel(run: Any, tasks: list[tuple[Any, ...]], what: str) -> Iterator[Any]:
  """Yields run(*task) in order, a thread a core: the compiled loop leaves Python's lock alone."""
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    jobs = [pool.submit(run, *task) for task in tasks]
    for job in bar(jobs, what):
      yield job.result()


def _curve(
  tree: trees.Tree, points: Int[np.ndarray, "n"], method: str, multiplier: float, seed: int
) -> tuple[list[float], Float[np.ndarray, "X A"]]:
  """Returns the gaps of the average policies at some numbers of episodes, and the last of them."""
  name = method.removeprefix(THEORY)
  eta, gamma = regret.theory(tree, name, int(points[-1]))
  rule = regret.rule(tree, name, multiplier * eta, gamma if method.startswith(THEORY) else None)
  state, gaps = regret.init(tree, rule, seed), []
  for t in points:
    state = regret.learn(tree, rule, state, int(t) - state.episodes)
    policy = regret.average(tree, state)
    gaps.append(exact.gap(tree, policy))
  return gaps, policy


def _tune(config: StudyConfig, tree: trees.Tree) -> tuple[Rows, Rows]:
  """Returns the gap of every multiplier after the tuning's episodes, and each method's best."""
  points = np.array([config.tuning_episodes])
  tasks = [
    (method, multiplier, config.tuning_seed)
    for method in config.methods
    for multiplier in config.multipliers
  ]
  results = _parallel(functools.partial(_curve, tree, points), tasks, f"{tree.name}: rates")
  grid = [
    {"game": tree.name, "method": method, "multiplier": multiplier, "gap": gaps[0]}
    for (method, multiplier, _), (gaps, _) in zip(tasks, results, strict=True)
  ]
  tuned = [
    min((row for row in grid if row["method"] == method), key=lambda row: row["gap"])
    for method in config.methods
  ]
  return grid, tuned


def _bands(rows: Rows) -> Rows:
  """Returns the mean and the range over seeds at every point."""
  groups: dict[tuple[Any, ...], list[float]] = {}
  for row in rows:
    groups.setdefault((row["game"], row["method"], row["episodes"]), []).append(row["gap"])
  names = "game", "method", "episodes"
  return [
    dict(zip(names, key, strict=True)) | {"mean": np.mean(x), "low": min(x), "high": max(x)}
    for key, x in groups.items()
  ]


def _slopes(curves: Rows) -> Rows:
  """Returns the slope of log(mean gap) against log(episodes) over the last two decades."""
  groups: dict[tuple[str, str], list[tuple[int, float]]] = {}
  for row in curves:
    groups.setdefault((row["game"], row["method"]), []).append((row["episodes"], row["mean"]))
  rows = []
  for (game, method), points in groups.items():
    last = np.log([(t, gap) for t, gap in points if t >= points[-1][0] / 100])
    slope = np.polyfit(last[:, 0], last[:, 1], 1)[0] if len(last) > 1 else np.nan
    rows.append({"game": game, "method": method, "points": len(last), "slope": slope})
  return rows


def _baseline(
  config: StudyConfig, tree: trees.Tree, baseline: str, points: Int[np.ndarray, "n"]
) -> Rows:
  """Returns the rows of a solver of OpenSpiel, measured as ours are.

  An iteration of outcome-sampling MCCFR is two episodes, one a player. One of CFR+ walks the whole
  tree, and counts as many episodes as there are leaves.
  """
  spiel = trees.openspiel()
  game, seeds, cost = spiel.load_game(tree.name), config.seeds, 2
  if baseline == "cfr_plus":
    seeds, cost = config.seeds[:1], int((tree.player == trees.TERMINAL).sum())
  states, rows = _states(tree, game), []
  for seed in seeds:
    if baseline == "cfr_plus":
      solver = spiel.CFRPlusSolver(game)
      step = solver.evaluate_and_update_policy
    else:
      solver = spiel.OutcomeSamplingMCCFRSolver(game, epsilon=0.6, seed=int(seed) + 1)
      step = solver.run_iteration
    done, most = 0, min(int(points[-1]), config.baseline_episodes)
    for t in points[(points >= cost) & (points <= most)]:
      for _ in range(int(t) // cost - done):
        step()
      done = int(t) // cost
      gap = exact.gap(tree, _policy(tree, solver.average_policy(), states))
      row = {"game": tree.name, "method": baseline, "seed": seed}
      rows.append(row | {"episodes": done * cost, "gap": gap})
  return rows


def _states(tree: trees.Tree, game: Any) -> list[Any]:
  """Returns a state of OpenSpiel in each information set."""
  _, nodes = np.unique(tree.infoset, return_index=True)
  states = []
  for node in nodes[-len(tree.labels) :]:
    path = [int(node)]
    while tree.parent[path[0]] >= 0:
      path.insert(0, int(tree.parent[path[0]]))
    state = game.new_initial_state()
    for child in path[1:]:
      actions = [a for a, _ in state.chance_outcomes()] if state.is_chance_node() else None
      state.apply_action((actions or state.legal_actions())[int(tree.slot[child])])
    states.append(state)
  return states


def _policy(tree: trees.Tree, theirs: Any, states: list[Any]) -> Float[np.ndarray, "X A"]:
  """Returns a policy of OpenSpiel as ours."""
  policy = trees.uniform(tree)
  for x, state in enumerate(states):
    chances = theirs.action_probabilities(state)
    row = np.array([chances.get(action, 0.0) for action in tree.names[x]])
    policy[x, : len(row)] = row / row.sum() if row.sum() > 0 else 1 / len(row)
  return policy

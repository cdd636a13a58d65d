"""The study of games of imperfect information: gaps of average policies against episodes.

It takes a config (configs/games/trees.py) and returns tables by name.
"""

import concurrent.futures
import functools
import itertools
import operator
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
  for what in ("methods", "theory", "baselines"):
    for name in config[what]:
      one_of(what, name, BASELINES if what == "baselines" else regret.METHODS)
  same, fix = len(config.episodes) == len(config.trees), "Give one for each of `trees`."
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
  names = "trees", "trees_curves", "trees_tuned", "trees_grid", "policies"
  tables: Tables = {name: [] for name in names}
  for name, episodes in zip(config.trees, config.episodes, strict=True):
    tree, first = trees.load(name), min(config.first_point, episodes)
    points = np.unique(np.geomspace(first, episodes, config.points).round().astype(int))
    grid, tuned = _tune(config, tree)
    tables["trees_grid"] += grid
    tables["trees_tuned"] += tuned
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
  tasks = [*itertools.product(config.methods, config.multipliers, [config.tuning_seed])]
  run = functools.partial(_curve, tree, np.array([config.tuning_episodes]))
  results = _parallel(run, tasks, f"{tree.name}: rates")
  grid = [
    {"game": tree.name, "method": method, "multiplier": multiplier, "gap": gaps[0]}
    for (method, multiplier, _), (gaps, _) in zip(tasks, results, strict=True)
  ]
  methods = itertools.groupby(grid, operator.itemgetter("method"))
  return grid, [min(rows, key=operator.itemgetter("gap")) for _, rows in methods]


def _bands(rows: Rows) -> Rows:
  """Returns the mean and the range over seeds at every point."""
  names, groups = ("game", "method", "episodes"), dict[tuple[Any, ...], list[float]]()
  for row in rows:
    groups.setdefault(tuple(row[name] for name in names), []).append(row["gap"])
  return [
    dict(zip(names, key, strict=True)) | {"mean": np.mean(x), "low": min(x), "high": max(x)}
    for key, x in groups.items()
  ]


def _slopes(curves: Rows) -> Rows:
  """Returns the slope of log(mean gap) against log(episodes) over the last two decades."""
  rows = []
  for (game, method), curve in itertools.groupby(curves, operator.itemgetter("game", "method")):
    points = np.array([(row["episodes"], row["mean"]) for row in curve])
    last = np.log(points[points[:, 0] >= points[-1, 0] / 100])
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
  spiel, plus = trees.openspiel(), baseline == "cfr_plus"
  game = spiel.load_game(tree.name)
  cost = int((tree.player == trees.TERMINAL).sum()) if plus else 2
  states, most, rows = _states(tree, game), min(points[-1], config.baseline_episodes), []
  for seed in config.seeds[: 1 if plus else None]:
    if plus:
      solver = spiel.CFRPlusSolver(game)
      step = solver.evaluate_and_update_policy
    else:
      solver = spiel.OutcomeSamplingMCCFRSolver(game, epsilon=0.6, seed=int(seed) + 1)
      step = solver.run_iteration
    done = 0
    for t in points[(points >= cost) & (points <= most)].tolist():
      for _ in range(done, t // cost):
        step()
      done = t // cost
      gap = exact.gap(tree, _policy(tree, solver.average_policy(), states))
      row = {"game": tree.name, "method": baseline, "seed": seed}
      rows.append(row | {"episodes": done * cost, "gap": gap})
  return rows


def _states(tree: trees.Tree, game: Any) -> list[Any]:
  """Returns a state of OpenSpiel in each information set."""
  _, nodes = np.unique(tree.infoset, return_index=True)
  states = []
  for node in nodes[-len(tree.labels) :]:
    path = [node]
    while tree.parent[path[-1]] >= 0:
      path.append(tree.parent[path[-1]])
    states.append(game.new_initial_state())
    for child in path[-2::-1]:
      states[-1].apply_action(states[-1].legal_actions()[tree.slot[child]])
  return states


def _policy(tree: trees.Tree, theirs: Any, states: list[Any]) -> Float[np.ndarray, "X A"]:
  """Returns a policy of OpenSpiel as ours."""
  policy = trees.uniform(tree)
  for x, state in enumerate(states):
    chances = theirs.action_probabilities(state)
    row = np.array([chances.get(action, 0.0) for action in tree.names[x]])
    policy[x, : len(row)] = row / row.sum() if row.sum() > 0 else 1 / len(row)
  return policy

"""Studies that compare methods: the paper's figure, where a prox centre helps, why a reward fails.

A study takes a config (configs/games) and returns tables by name.
"""

import itertools
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from nash_jax.games import contextual, preference, zoo
from nash_jax.games.charts import Rows, Tables
from nash_jax.games.convergence import StudyConfig, bar, games_of


def _band(values: Float[np.ndarray, "S *n"]) -> dict[str, Any]:
  """Returns mean, low95 and high95 over seeds; NaN has diverged."""
  shown = contextual.interval(np.where(np.isnan(values), np.inf, values))
  return dict(zip(("mean", "low95", "high95"), shown, strict=True))


def figure(config: StudyConfig) -> Tables:
  """Plays the paper's figure in versions that are not mixed: proximal, exact gradients, sampled.

  Examples:
    >>> from nash_jax.configs.games import figure
    >>> from nash_jax.games import comparison
    >>> config = figure.get_config("smoke")
    >>> config.update(contexts=1, versions=config.versions[:1], horizons=(20,))
    >>> tables = comparison.figure(config)
    >>> [row["method"] for row in tables["figure_finals"]]
    ['', 'NashMP']

  Args:
    config: as configs/games/figure.py.

  Returns:
    figure_tuned: the settings chosen; figure_grid: all that were tried; figure_finals: SubOpt_β of
    the last iterates with 95% intervals; figure_curves: those of every point.
  """
  tuning, games = games_of(config, config.tuning_seeds), games_of(config, config.seeds)
  start = contextual.reference_gap(games)
  blank = dict.fromkeys(("step", "eta", "kappa", "mixture"), "")
  tuned: Rows = []
  tried: Rows = []
  lines: Rows = []
  finals: Rows = [{"version": "reference", "method": "", "horizon": 0, **_band(start)}]
  runs = [(version, entrant) for version in config.versions for entrant in version[-1]]
  for (version, updates, batch, steps, _), (label, method, knobs) in bar(runs, "figure"):
    entrant = contextual.Entrant(label, method, updates, dict(knobs), batch)
    outcomes = contextual.race(
      entrant, tuning, games, steps=steps, horizons=config.horizons, points=config.points
    )
    for horizon, (best, grid, curves) in zip(config.horizons, outcomes, strict=True):
      what = {"version": version, "horizon": horizon, "method": label}
      tuned.append(what | blank | best)
      tried += [what | blank | one | {"mean_log10_final": score} for one, score in grid]
      finals.append(what | _band(curves[:, -1]))
      every = horizon // config.points * config.csv_every
      values = _band(np.c_[start, curves][:, :: config.csv_every])
      lines += [
        what | {"step": i * every} | dict(zip(values, point, strict=True))
        for i, point in enumerate(zip(*values.values(), strict=True))
      ]
  return {
    "figure_tuned": tuned,
    "figure_grid": tried,
    "figure_finals": finals,
    "figure_curves": lines,
  }


def _map_cell(
  config: StudyConfig,
  method: str,
  knobs: dict[str, Any],
  *,
  batch: int,
  beta: float,
  strength: float,
) -> Rows:
  """Returns rows of a grid on one cell's games: settings and mean log10 of final SubOpt_β."""
  games = games_of(config, config.seeds, beta=beta, strength=strength)
  entrant = contextual.Entrant(method, method, "gradient", dict(knobs), batch)
  settings, _, (scores,) = contextual.tune(
    entrant, games, steps=config.steps, horizons=[config.iterations], key=jax.random.key(7)
  )
  return [one | {"log10_subopt": score} for one, score in zip(settings, scores, strict=True)]


def prox_map(config: StudyConfig) -> Tables:
  """Plays NashMP and its rivals over β × strength × step × batch; then NashMP over κ × η.

  Examples:
    >>> from nash_jax.configs.games import map as study
    >>> from nash_jax.games import comparison
    >>> config = study.get_config("smoke")
    >>> config.update(methods=config.methods[:2], strengths=(1.0,), batches=(0,), corners=())
    >>> tables = comparison.prox_map(config)
    >>> [row["step"] for row in tables["map_gain"]]
    [0.3, 3.0, 'best']

  Args:
    config: as configs/games/map.py.

  Returns:
    map: log10 of the final SubOpt_β of every run; map_gain: by how much each rival's is larger than
    the first method's; kappa_eta: the first method's at other κ and η.
  """
  cells: Rows = []
  gains: Rows = []
  kappa_eta: Rows = []
  (own, *_), *rivals = config.methods
  cases = itertools.product(config.batches, config.betas, config.strengths)
  for batch, beta, strength in bar(cases, "map"):
    cell: dict[str, Any] = {"batch": batch, "beta": beta, "strength": strength}
    final: dict[str, dict[Any, float]] = {}
    for label, method, knobs in config.methods:
      rows = _map_cell(config, method, knobs, **cell)
      final[label] = {row["step"]: row["log10_subopt"] for row in rows}
      final[label]["best"] = min(final[label].values())
      cells += [
        cell | {"method": label, "step": row["step"], "log10_subopt": row["log10_subopt"]}
        for row in rows
      ]
    gains += [
      cell | {"rival": rival, "step": step, "gain": final[rival][step] - ours}
      for rival, *_ in rivals
      for step, ours in final[own].items()
    ]
  tried = {"kappa": config.kappas, "eta": config.etas}
  corners = itertools.product(config.batches, config.corners)
  for batch, (_, beta, strength) in bar(corners, "κ and η"):
    cell = {"batch": batch, "beta": beta, "strength": strength}
    kappa_eta += [cell | row for row in _map_cell(config, "nash_mp", tried, **cell)]
  return {"map": cells, "map_gain": gains, "kappa_eta": kappa_eta}


def bradley_terry(config: StudyConfig) -> Tables:
  """Shows three ways in which a reward fails where preferences cycle: purity, one datum, sampling.

  Examples:
    >>> from nash_jax.configs.games import bradley_terry
    >>> from nash_jax.games import comparison
    >>> config = bradley_terry.get_config("smoke")
    >>> config.update(betas=(0.01,), extra_votes=(), law_weights=())
    >>> (row,) = comparison.bradley_terry(config)["bradley_terry"]
    >>> round(float(row["reward_2"]), 2), round(float(row["equilibrium_2"]), 2)
    (1.0, 0.44)

  Args:
    config: as configs/games/bradley_terry.py.

  Returns:
    bradley_terry: the policy of the Bradley-Terry reward, and the regularised equilibrium.
  """
  cycle, ref = zoo.condorcet_cycle().p_win, np.full(3, 1 / 3)
  pair = np.outer([1, 0, 0], [0, 1, 0])  # 0 against 1
  biased = zoo.rock_paper_scissors(*config.payoffs).p_win
  cases: list[tuple[str, float, np.ndarray, float, np.ndarray | None]]
  cases = [("beta", beta, biased, beta, None) for beta in config.betas]
  for extra in config.extra_votes:  # votes a pair: config.votes, and some more for 0 against 1
    wins = cycle * config.votes + max(extra, 0) * pair + max(-extra, 0) * pair.T
    votes = wins + wins.T
    cases.append(("extra_votes", extra, wins / votes, config.beta, votes))
  for weight in config.law_weights:  # how often 0 meets 1, the other pairs once each
    cases.append(("law", weight, cycle, config.beta, 1 + (weight - 1) * (pair + pair.T)))
  rows: Rows = []
  for study, value, p_win, beta, weights in bar(cases, "rewards"):
    reward = jax.nn.softmax(np.log(ref) + preference.bradley_terry(p_win, weights) / beta)
    star = preference.equilibrium(p_win, ref, beta)
    policies = {f"reward_{y}": reward[y] for y in range(3)}
    policies |= {f"equilibrium_{y}": star[y] for y in range(3)}
    rows.append({"study": study, "value": value, **policies})
  return {"bradley_terry": rows}

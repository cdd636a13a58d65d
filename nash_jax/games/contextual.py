"""The paper's contextual game, P(y≻y'|x) = σ(A_{yy'} - A_{y'y}) with A = UΘ_xVᵀ, and races on it.

A race is fair when every entrant is tuned by one grid of steps. Rates of gradient methods differ
in unit (a loss with 1/β² in it wants a rate of another size), so a grid's steps are in units of ∇J,
the gradient of regularised self-play: solvers.unit turns them into each loss's own rate.
"""

import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nash_jax.games import preference, solvers, zoo
from nash_jax.validation import require


class Entrant(NamedTuple):
  """A method in a race: its name in solvers, the kind of updates, its knobs besides the step.

  knobs maps eta, kappa or mixture to the values its grid tries; kappa's may be "harmonic".
  """

  label: str
  method: str
  updates: str
  knobs: dict
  batch: int = 0


def make_games(seeds, *, contexts, actions, rank, strength, beta, cyclicity=1.0):
  """Games [S X A A], or [S A A] where contexts is None: a Game whose leaves lead with S.

  One game a seed; the reference is uniform.
  """
  seeds = list(seeds)
  require(bool(seeds), "seeds", "at least one", seeds, "Give a seed for every game.")
  preference.number("beta", beta, zero=True)
  p_win = np.stack([
    zoo.random_game(seed, actions, rank, cyclicity, strength, contexts).p_win for seed in seeds])
  log_ref = np.full(p_win.shape[:-1], -np.log(actions))
  return solvers.Game(jnp.asarray(p_win), jnp.asarray(log_ref), jnp.full(len(seeds), beta))


def grid(entrant, steps, beta, iterations):
  """(list of settings, Knobs whose leaves lead with G): every step with every other knob.

  Raises:
    ValueError: an unknown method, updates or knob, no value of one, or a value out of its range.
  """
  solvers.check_method(entrant.method, entrant.updates)
  preference.number("beta", beta, zero=True)
  names = list(entrant.knobs)
  if set(names) - {"eta", "kappa", "mixture"}:
    raise ValueError(f"{entrant.label} has knobs {names}; choices: eta, kappa, mixture.")
  for name, values in {"step": steps, **entrant.knobs}.items():
    require(len(values) > 0, name, "at least one value to try", values, "Give one.")
    for value in values:
      if not (name == "kappa" and isinstance(value, str) and value == "harmonic"):
        preference.number(name, value, zero=name in ("kappa", "mixture"), infinite=name == "eta")
        solvers.check_knob(name, value)
  settings = [dict(zip(["step", *names], values, strict=True))
              for values in itertools.product(steps, *entrant.knobs.values())]
  schedules = {"harmonic": solvers.harmonic(iterations)}
  unset = {"eta": 2 * beta, "kappa": 0.0, "mixture": 0.25}

  def leaf(name):
    column = [schedules.get(v, v) for v in ((unset | one)[name] for one in settings)]
    return jnp.asarray(np.stack(np.broadcast_arrays(*column)), float)

  knobs = solvers.Knobs(*map(leaf, solvers.Knobs._fields))
  return settings, knobs._replace(
    step=knobs.step * solvers.unit(entrant.method, entrant.updates, beta))


def curves(method, updates, games, knobs, keys, *, points, every, batch=0,
           measure=solvers.suboptimality):
  """Measures [G S points] of a grid on games, each seed with its own draws, shared by the grid.

  Raises:
    ValueError: an unknown method or updates, games or knobs that are none, too short a schedule.
  """
  solvers.check_method(method, updates)
  solvers.check(games, knobs)
  points, every = preference.count("points", points), preference.count("every", every)
  for name, knob in knobs._asdict().items():
    enough = np.ndim(knob) > 0 and (np.ndim(knob) < 2 or np.shape(knob)[1] >= points * every)
    require(enough, name, f"[G] numbers or schedules [G iterations] of at least {points * every}",
            np.shape(knob), "See grid.")
  return _curves(method, updates, games, knobs, keys, points=points, every=every,
                 batch=preference.count("batch", batch, least=0), measure=measure)


@functools.partial(jax.jit, static_argnames=("method", "updates", "points", "batch", "measure"))
def _curves(method, updates, games, knobs, keys, *, points, every, batch, measure):
  def one(knob, game, key):
    return solvers.run(method, updates, game, knob, key, points=points, every=every, batch=batch,
                       measure=measure)[1]

  over_games = jax.vmap(one, (None, 0, 0))
  return jax.vmap(over_games, (0, None, None))(knobs, games, keys)


def score(values):
  """The number a setting is judged by: mean log10 of SubOpt_β over seeds, the last axis.

  Rounding counts as 1e-30, and what diverged as 1e3.
  """
  final = np.asarray(preference.numbers("values", values), float)
  require(final.ndim > 0 and final.size > 0, "values", "SubOpt_β of at least one seed", final.shape,
          "Give the last axis to seeds.")
  return np.log10(np.where(np.isfinite(final), np.clip(final, 1e-30, 1e3), 1e3)).mean(-1)


def _play(entrant, games, knobs, key, points, every):
  if entrant.batch:  # draws are far noisier than float32 rounds
    knobs, games = jax.tree.map(lambda v: v.astype(jnp.float32), (knobs, games))
  keys = jax.random.split(key, len(games.beta))
  return np.asarray(curves(entrant.method, entrant.updates, games, knobs, keys, points=points,
                           every=every, batch=entrant.batch))


def tune(entrant, games, *, steps, horizons, key):
  """Runs the grid once, to the longest horizon.

  Returns:
    (settings, their Knobs, scores [horizons G] of the last iterate at each horizon).

  Raises:
    ValueError: as grid, or a horizon that is no positive whole number.
  """
  require(len(horizons) > 0, "horizons", "at least one", horizons, "Give one.")
  horizons = [preference.count("horizons", horizon) for horizon in horizons]
  settings, knobs = grid(entrant, steps, float(games.beta[0]), max(horizons))
  every = math.gcd(*horizons)
  values = _play(entrant, games, knobs, key, max(horizons) // every, every)
  return settings, knobs, [score(values[:, :, h // every - 1]) for h in horizons]


def race(entrant, tuning, games, *, steps, horizons, points=100):
  """Tunes on the tuning games for each horizon, then runs the chosen knobs on the others.

  Returns:
    a tuple for each horizon: (chosen setting, [(setting, score)] of the whole grid, SubOpt_β
    [S points] on `games`, of each multiple of horizon/points steps).

  Raises:
    ValueError: as tune, or a horizon that is no multiple of points.
  """
  preference.count("points", points)
  for horizon in horizons:
    require(horizon > 0 and horizon % points == 0, "horizons", f"multiples of points = {points}",
            horizon, "Set the two together.")
  key = jax.random.key(0)
  settings, knobs, scores = tune(entrant, tuning, steps=steps, horizons=horizons,
                                 key=jax.random.fold_in(key, 0))
  outcomes = []
  for horizon, row in zip(horizons, scores, strict=True):
    best = int(np.argmin(row))
    chosen = jax.tree.map(lambda knob, best=best: knob[best : best + 1], knobs)
    lines = _play(entrant, games, chosen, jax.random.fold_in(key, 1), points, horizon // points)
    outcomes.append((settings[best], list(zip(settings, row.tolist(), strict=True)), lines[0]))
  return outcomes


def interval(values, level_z=1.96):
  """Geometric mean and 95% interval over seeds (axis 0) of values ≥ 0: (mean, low, high).

  Values below 1e-32, which is rounding, count as that. All three are infinite where a value is.

  Raises:
    ValueError: fewer than two seeds, which have no spread, or a value that is negative or NaN.
  """
  values = np.asarray(preference.numbers("values", values))
  require(values.ndim > 0 and len(values) > 1, "values", "at least two seeds on axis 0",
          values.shape, "Play more seeds.")
  preference.number("values", values, zero=True, infinite=True, array=True)
  preference.number("level_z", level_z)
  diverged = np.isinf(values).any(0)
  logs = np.log10(np.clip(np.where(diverged, 1.0, values), 1e-32, None))
  mean, error = logs.mean(0), logs.std(0, ddof=1) / np.sqrt(len(logs))
  mean = np.where(diverged, np.inf, mean)[()]
  return 10**mean, 10 ** (mean - level_z * error), 10 ** (mean + level_z * error)


def reference_gap(games):
  """SubOpt_β of the reference on each game, [S]: where every curve starts."""
  solvers.check(games)
  gaps = jax.vmap(preference.gap)(games.p_win, games.log_ref, games.log_ref, games.beta)
  return np.asarray(gaps.mean(-1))

"""The paper's contextual game, P(y≻y'|x) = σ(A_{yy'} - A_{y'y}) with A = UΘ_xVᵀ, and races on it.

A race is fair when every entrant is tuned by one grid of steps. Rates of gradient methods differ in
unit (a loss with 1/β² in it wants a rate of another size). So a grid's steps are in units of ∇J,
the gradient of regularised self-play, and solvers.unit turns them into each loss's own rate.

Axes: S seeds, each a game; G settings of a grid; K iterations of a schedule.
"""

import functools
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from nash_jax.games import checks, preference, solvers, zoo
from nash_jax.validation import require

Setting = dict[str, Any]  # a value of the step, and of each other knob that the grid tries


class Entrant(NamedTuple):
  """A method in a race.

  Examples:
    >>> from nash_jax.games import contextual
    >>> nash_mp = contextual.Entrant("NashMP", "nash_mp", "gradient", {"kappa": ("harmonic", 0.1)})

  Attributes:
    label: what tables call it.
    method: its name in solvers.
    updates: "proximal" or "gradient".
    knobs: the values that its grid tries of eta, kappa or mixture; kappa's may be "harmonic".
    batch: sampled pairs a context and gradient step; 0 takes exact gradients.
  """

  label: str
  method: str
  updates: str
  knobs: Mapping[str, Sequence[Any]]
  batch: int = 0


class Outcome(NamedTuple):
  """What a race says of an entrant at one horizon.

  Examples:
    >>> import numpy as np
    >>> from nash_jax.games import contextual
    >>> outcome = contextual.Outcome({"step": 1.0}, [({"step": 1.0}, -3.0)], np.full((2, 5), 1e-3))
    >>> best, grid, curves = outcome

  Attributes:
    best: the setting that was chosen on the tuning games.
    grid: every setting with its score there.
    curves: SubOpt_β on the other games after each of the points.
  """

  best: Setting
  grid: list[tuple[Setting, float]]
  curves: Float[np.ndarray, "S points"]


def make_games(
  seeds: Iterable[int],
  *,
  contexts: int | None,
  actions: int,
  rank: int,
  strength: float,
  beta: checks.Number,
  cyclicity: float = 1.0,
) -> solvers.Game:
  """Returns one random game a seed, with a uniform reference: a Game whose leaves lead with S.

  Examples:
    >>> from nash_jax.games import contextual
    >>> games = contextual.make_games(
    ...   [0, 1], contexts=None, actions=3, rank=2, strength=2.0, beta=0.1)
    >>> games.p_win.shape, games.beta.shape
    ((2, 3, 3), (2,))

  Args:
    contexts: X of games [S X A A], or None for games [S A A].
    actions: A.
    rank: as `zoo.random_game`; so are strength and cyclicity.
    beta: KL weight in nats, ≥ 0.

  Raises:
    ValueError: no seed, β out of its range, or what `zoo.random_game` refuses.
  """
  seeds = list(seeds)
  require(bool(seeds), "seeds", "at least one", seeds, "Give a seed for every game.")
  checks.number("beta", beta, zero=True)
  games = [
    zoo.random_game(seed, actions, rank, cyclicity, strength, contexts).p_win for seed in seeds
  ]
  p_win = np.stack(games)
  log_ref = np.full(p_win.shape[:-1], -np.log(actions))
  return solvers.Game(jnp.asarray(p_win), jnp.asarray(log_ref), jnp.full(len(seeds), beta))


def grid(
  entrant: Entrant, steps: Sequence[float], beta: checks.Number, iterations: int
) -> tuple[list[Setting], solvers.Knobs]:
  """Returns every step with every other knob: (settings, Knobs whose leaves lead with G).

  Examples:
    >>> from nash_jax.games import contextual
    >>> entrant = contextual.Entrant("NashMP", "nash_mp", "gradient", {"eta": (0.1, 1.0)})
    >>> settings, knobs = contextual.grid(entrant, [0.3, 3.0], beta=0.1, iterations=10)
    >>> settings[0], knobs.step.shape
    ({'step': 0.3, 'eta': 0.1}, (4,))

  Args:
    steps: in units of ∇J for gradient updates.
    beta: KL weight in nats, ≥ 0.
    iterations: K of the schedule that "harmonic" stands for.

  Raises:
    ValueError: an unknown method, updates or knob, no value of one, or a value out of its range.
  """
  solvers.check_method(entrant.method, entrant.updates)
  checks.number("beta", beta, zero=True)
  names = list(entrant.knobs)
  if set(names) - {"eta", "kappa", "mixture"}:
    raise ValueError(f"{entrant.label} has knobs {names}; choices: eta, kappa, mixture.")
  for name, values in {"step": steps, **entrant.knobs}.items():
    require(len(values) > 0, name, "at least one value to try", values, "Give one.")
    for value in values:
      if not (name == "kappa" and isinstance(value, str) and value == "harmonic"):
        checks.number(name, value, zero=name in ("kappa", "mixture"), infinite=name == "eta")
        solvers.check_knob(name, value)
  settings = [
    dict(zip(["step", *names], values, strict=True))
    for values in itertools.product(steps, *entrant.knobs.values())
  ]
  schedules = {"harmonic": solvers.harmonic(iterations)}
  unset: Setting = {"eta": 2 * beta, "kappa": 0.0, "mixture": 0.25}

  def leaf(name: str) -> Array:
    column = [schedules.get(v, v) for v in ((unset | one)[name] for one in settings)]
    return jnp.asarray(np.stack(np.broadcast_arrays(*column)), float)

  knobs = solvers.Knobs(*map(leaf, solvers.Knobs._fields))
  rate = solvers.unit(entrant.method, entrant.updates, beta)
  return settings, knobs._replace(step=knobs.step * rate)


def curves(
  method: str,
  updates: str,
  games: solvers.Game,
  knobs: solvers.Knobs,
  keys: Key[Array, "S"],
  *,
  points: int,
  every: int,
  batch: int = 0,
  measure: solvers.Measure = solvers.suboptimality,
) -> Any:
  """Returns measures [G S points] of a grid on games; the grid shares each seed's draws.

  Examples:
    >>> import jax
    >>> from nash_jax.games import contextual
    >>> games = contextual.make_games(
    ...   [0, 1], contexts=None, actions=3, rank=2, strength=2.0, beta=0.1)
    >>> entrant = contextual.Entrant("NashMP", "nash_mp", "proximal", {})
    >>> _, knobs = contextual.grid(entrant, [0.5, 1.0, 2.0], beta=0.1, iterations=20)
    >>> keys = jax.random.split(jax.random.key(0), 2)
    >>> contextual.curves("nash_mp", "proximal", games, knobs, keys, points=4, every=5).shape
    (3, 2, 4)

  Args:
    games: leaves lead with S; see `make_games`.
    knobs: leaves [G], or schedules [G K]; see `grid`.
    keys: one a seed.
    points: measures of a curve.
    every: iterations from one measure to the next.
    batch: sampled pairs a context and gradient step.
    measure: (game, state) -> what is recorded, a pytree of numbers.

  Raises:
    ValueError: an unknown method or updates, not games, knobs out of range, or a short schedule.
  """
  solvers.check_method(method, updates)
  solvers.check(games, knobs)
  points, every = checks.count("points", points), checks.count("every", every)
  for name, knob in knobs._asdict().items():
    shape = np.shape(knob)
    enough = len(shape) > 0 and (len(shape) < 2 or shape[1] >= points * every)
    expected = f"[G] numbers or schedules [G iterations] of at least {points * every}"
    require(enough, name, expected, shape, "See grid.")
  batch = checks.count("batch", batch, least=0)
  return _curves(
    method, updates, games, knobs, keys, points=points, every=every, batch=batch, measure=measure
  )


@functools.partial(jax.jit, static_argnames=("method", "updates", "points", "batch", "measure"))
def _curves(
  method: str,
  updates: str,
  games: solvers.Game,
  knobs: solvers.Knobs,
  keys: Array,
  *,
  points: int,
  every: checks.Count,
  batch: int,
  measure: solvers.Measure,
) -> Any:
  def one(knob: solvers.Knobs, game: solvers.Game, key: Array) -> Any:
    run = functools.partial(solvers.run, points=points, every=every, batch=batch, measure=measure)
    return run(method, updates, game, knob, key)[1]

  over_games = jax.vmap(one, (None, 0, 0))
  return jax.vmap(over_games, (0, None, None))(knobs, games, keys)


def score(values: checks.Numbers) -> Float[np.ndarray, "..."]:
  """Returns what a setting is judged by: mean log10 of SubOpt_β over seeds, the last axis.

  Rounding counts as 1e-30, and what diverged as 1e3.

  Examples:
    >>> from nash_jax.games import contextual
    >>> contextual.score([[1e-3, 1e-5], [float("nan"), 1e-9]]).tolist()
    [-4.0, -3.0]

  Args:
    values: SubOpt_β [... S].

  Raises:
    ValueError: no seed.
  """
  final = np.asarray(checks.numbers("values", values), float)
  expected, fix = "SubOpt_β of at least one seed", "Give the last axis to seeds."
  require(final.ndim > 0 and final.size > 0, "values", expected, final.shape, fix)
  kept = np.where(np.isfinite(final), np.clip(final, 1e-30, 1e3), 1e3)
  return np.asarray(np.log10(kept).mean(-1))


def _trajectories(
  entrant: Entrant, games: solvers.Game, knobs: solvers.Knobs, key: Array, points: int, every: int
) -> Float[np.ndarray, "G S points"]:
  if entrant.batch:  # draws are far noisier than float32 rounds
    knobs, games = jax.tree.map(lambda v: v.astype(jnp.float32), (knobs, games))
  keys = jax.random.split(key, np.size(games.beta))
  run = functools.partial(curves, points=points, every=every, batch=entrant.batch)
  return np.asarray(run(entrant.method, entrant.updates, games, knobs, keys))


def tune(
  entrant: Entrant,
  games: solvers.Game,
  *,
  steps: Sequence[float],
  horizons: Sequence[int],
  key: Key[Array, ""],
) -> tuple[list[Setting], solvers.Knobs, list[Float[np.ndarray, "G"]]]:
  """Runs the grid once, to the longest horizon.

  Examples:
    >>> import jax
    >>> from nash_jax.games import contextual
    >>> games = contextual.make_games(
    ...   [0, 1], contexts=None, actions=3, rank=2, strength=2.0, beta=0.1)
    >>> entrant = contextual.Entrant("NashMP", "nash_mp", "proximal", {})
    >>> settings, knobs, (early, late) = contextual.tune(
    ...   entrant, games, steps=[0.5, 1.0, 2.0], horizons=[5, 20], key=jax.random.key(0))
    >>> settings[late.argmin()]
    {'step': 2.0}

  Args:
    steps: in units of ∇J for gradient updates.
    horizons: iterations after which the last iterate is scored.

  Returns:
    (settings, their Knobs, `score`s of the last iterate at each horizon).

  Raises:
    ValueError: as `grid`, or a horizon that is not a positive whole number.
  """
  require(len(horizons) > 0, "horizons", "at least one", horizons, "Give one.")
  horizons = [checks.count("horizons", horizon) for horizon in horizons]
  beta = float(np.ravel(games.beta)[0])
  settings, knobs = grid(entrant, steps, beta, max(horizons))
  every = math.gcd(*horizons)
  values = _trajectories(entrant, games, knobs, key, max(horizons) // every, every)
  return settings, knobs, [score(values[:, :, h // every - 1]) for h in horizons]


def race(
  entrant: Entrant,
  tuning: solvers.Game,
  games: solvers.Game,
  *,
  steps: Sequence[float],
  horizons: Sequence[int],
  points: int = 100,
) -> list[Outcome]:
  """Tunes on the tuning games for each horizon, then runs the chosen knobs on the others.

  Examples:
    >>> from nash_jax.games import contextual
    >>> sizes = {"contexts": None, "actions": 3, "rank": 2, "strength": 2.0, "beta": 0.1}
    >>> tuning, games = (contextual.make_games(seeds, **sizes) for seeds in ([9, 8], [0, 1]))
    >>> entrant = contextual.Entrant("NashMP", "nash_mp", "proximal", {})
    >>> (outcome,) = contextual.race(
    ...   entrant, tuning, games, steps=[0.5, 1.0, 2.0], horizons=[20], points=4)
    >>> outcome.best, outcome.curves.shape
    ({'step': 2.0}, (2, 4))

  Args:
    steps: in units of ∇J for gradient updates.
    horizons: iterations of a run, multiples of `points`.
    points: of each curve.

  Returns:
    an Outcome for each horizon.

  Raises:
    ValueError: as `tune`, or a horizon that is not a multiple of points.
  """
  checks.count("points", points)
  for horizon in horizons:
    good, expected = horizon > 0 and horizon % points == 0, f"multiples of points = {points}"
    require(good, "horizons", expected, horizon, "Set the two together.")
  key = jax.random.key(0)
  settings, knobs, scores = tune(
    entrant, tuning, steps=steps, horizons=horizons, key=jax.random.fold_in(key, 0)
  )
  outcomes = []
  for horizon, row in zip(horizons, scores, strict=True):
    best = int(np.argmin(row))
    chosen = jax.tree.map(lambda knob, best=best: knob[best : best + 1], knobs)
    again = jax.random.fold_in(key, 1)
    lines = _trajectories(entrant, games, chosen, again, points, horizon // points)
    tried = list(zip(settings, row.tolist(), strict=True))
    outcomes.append(Outcome(settings[best], tried, lines[0]))
  return outcomes


def interval(
  values: checks.Numbers, level_z: float = 1.96
) -> tuple[checks.Values, checks.Values, checks.Values]:
  """Returns geometric mean and interval over seeds, axis 0: (mean, low, high).

  Values below 1e-32, which is rounding, count as that. All three are infinite where a value is.

  Examples:
    >>> from nash_jax.games import contextual
    >>> [round(float(bound), 6) for bound in contextual.interval([1e-3, 1e-3, 1e-3])]
    [0.001, 0.001, 0.001]

  Args:
    values: [S ...], ≥ 0.
    level_z: half the interval's width in standard errors: 1.96 is 95%.

  Raises:
    ValueError: fewer than two seeds, which have no spread, or a value that is negative or NaN.
  """
  given = np.asarray(checks.numbers("values", values))
  many = given.ndim > 0 and len(given) > 1
  require(many, "values", "at least two seeds on axis 0", given.shape, "Play more seeds.")
  checks.number("values", given, zero=True, infinite=True, array=True)
  checks.number("level_z", level_z)
  diverged = np.isinf(given).any(0)
  logs = np.log10(np.clip(np.where(diverged, 1.0, given), 1e-32, None))
  mean, error = logs.mean(0), logs.std(0, ddof=1) / np.sqrt(len(logs))
  mean = np.where(diverged, np.inf, mean)[()]
  return 10**mean, 10 ** (mean - level_z * error), 10 ** (mean + level_z * error)


def reference_gap(games: solvers.Game) -> Float[np.ndarray, "S"]:
  """Returns SubOpt_β of the reference on each game: where every curve starts.

  Examples:
    >>> from nash_jax.games import contextual
    >>> games = contextual.make_games([0, 1], contexts=2, actions=3, rank=2, strength=2.0, beta=0.1)
    >>> contextual.reference_gap(games).shape
    (2,)

  Args:
    games: leaves lead with S; see `make_games`.

  Raises:
    ValueError: not games.
  """
  solvers.check(games)
  gaps = jax.vmap(preference.gap)(games.p_win, games.log_ref, games.log_ref, games.beta)
  return np.asarray(gaps.reshape(len(gaps), -1).mean(-1))

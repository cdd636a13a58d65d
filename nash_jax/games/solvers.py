"""Runs every solver of a preference game as one pure step, scanned; vmap it over games and knobs.

There are two kinds of updates, which no comparison should mix without saying so:

* "proximal": exact updates in closed form (proximal.py);
* "gradient": SGD steps on logits of a population loss, exact or sampled (gradients.py). Methods
  have the names that they have in training.

A policy is log-probabilities [A] or [X A]; p_win is [A A] or [X A A].
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from nash_jax.games import checks, gradients, preference
from nash_jax.games.base import (
  Draws,
  Game,
  Knobs,
  State,
  check,
  check_knob,
  harmonic,
  init,
  periodic,
)
from nash_jax.games.checks import GameLike, PolicyLike
from nash_jax.games.gradients import GRADIENT, LOSSES, gradient, nash_mp_two_step
from nash_jax.games.methods import UPDATES, canonical, check_method, choose, theory, unit
from nash_jax.games.proximal import (
  PROXIMAL,
  fictitious_play,
  mmd,
  mpo,
  mwu,
  nash_md,
  nash_mp,
  omwu,
  proximal_point,
)
from nash_jax.validation import require

__all__ = [
  "GRADIENT",
  "LOSSES",
  "PROXIMAL",
  "UPDATES",
  "Draws",
  "Game",
  "Knobs",
  "State",
  "check",
  "check_knob",
  "check_method",
  "fictitious_play",
  "gradient",
  "harmonic",
  "init",
  "mmd",
  "mpo",
  "mwu",
  "nash_md",
  "nash_mp",
  "nash_mp_approximate",
  "nash_mp_ema",
  "nash_mp_two_step",
  "omwu",
  "periodic",
  "proximal_point",
  "run",
  "solve",
  "suboptimality",
  "theory",
  "unit",
]

# Other names of gradient steps.
nash_mp_ema, nash_mp_approximate = gradients.nash_mp, gradients.nash_mp_two_step

Measure = Callable[[Game, State], Any]


def suboptimality(game: Game, state: State) -> Float[Array, ""]:
  """Returns SubOpt_β of the iterate, averaged over contexts.

  Examples:
    >>> import numpy as np
    >>> from nash_jax.games import solvers
    >>> log_ref = np.log([0.5, 0.5])
    >>> game = solvers.Game(np.array([[0.5, 0.75], [0.25, 0.5]]), log_ref, beta=0.1)
    >>> round(float(solvers.suboptimality(game, solvers.init(log_ref))), 4)
    0.0636
  """
  return jnp.mean(preference.gap(game.p_win, state.logp, game.log_ref, game.beta))


def run(
  method: str,
  updates: str,
  game: Game,
  knobs: Knobs,
  key: PRNGKeyArray | None,
  *,
  points: int,
  every: checks.Count = 1,
  batch: int = 0,
  inner: int = 10,
  measure: Measure = suboptimality,
) -> tuple[State, Any]:
  """Iterates points·every times from the reference; returns (State, measures [points, ...]).

  Pure and vmappable over game, knobs and key. `every` is not a constant of the compiled program.

  Examples:
    >>> import jax, numpy as np
    >>> from nash_jax.games import solvers, zoo
    >>> p_win, log_ref = zoo.rock_paper_scissors(0.5, 1.0, 0.8).p_win, np.log(np.full(3, 1 / 3))
    >>> steps = np.array([0.5, 1.0, 2.0])  # three runs in one program
    >>> def curve(step):
    ...   game, knobs = solvers.Game(p_win, log_ref, 0.1), solvers.Knobs(step, 0.2, 0.0, 0.0)
    ...   return solvers.run("nash_mp", "proximal", game, knobs, None, points=4, every=5)[1]
    >>> jax.vmap(curve)(steps).shape
    (3, 4)

  Args:
    method: a name of PROXIMAL or GRADIENT, as `updates` says.
    key: what pairs are sampled with; None without sampling.
    every: iterations from one measure to the next.
    batch: sampled pairs a context and gradient step; 0 takes the exact gradient.
    inner: gradient steps a half of nash_mp_two_step.
    measure: (game, state) -> what is recorded; by default SubOpt_β of the iterate.

  Raises:
    ValueError: an unknown method or updates, not a game, or knobs out of range or too short.
  """
  check_method(method, updates)
  check(game, knobs)
  points, every = checks.count("points", points), checks.count("every", every)
  batch = checks.count("batch", batch, least=0)
  inner = checks.count("inner", inner)
  for name, knob in knobs._asdict().items():
    if np.ndim(knob) and checks.concrete(every):
      expected = f"a number, or one for each of {points * every} iterations"
      enough = bool(len(knob) >= points * every)
      require(enough, name, expected, np.shape(knob), "Give a longer schedule.")
  if updates == "gradient":
    method = canonical(method)
    key = jax.random.key(0) if key is None else key
  return _run(
    method,
    updates,
    game,
    knobs,
    key,
    points=points,
    every=every,
    batch=batch,
    inner=inner,
    measure=measure,
  )


@functools.partial(
  jax.jit, static_argnames=("method", "updates", "points", "batch", "inner", "measure")
)
def _run(
  method: str,
  updates: str,
  game: Game,
  knobs: Knobs,
  key: PRNGKeyArray | None,
  *,
  points: int,
  every: checks.Count,
  batch: int,
  inner: int,
  measure: Measure,
) -> tuple[State, Any]:
  def one(_: Array, state: State) -> State:
    now = jax.tree.map(lambda knob: knob[state.k] if np.ndim(knob) else knob, knobs)
    if updates == "proximal":
      logp, other = PROXIMAL[method](state, game, now)
    else:
      assert key is not None
      draws = Draws(jax.random.fold_in(key, state.k), batch, inner)
      logp, other = GRADIENT[method](state, game, now, draws)
    return State(logp, other, state.k + 1)

  def stretch(state: State, _: None) -> tuple[State, Any]:
    state = jax.lax.fori_loop(0, every, one, state)
    return state, measure(game, state)

  return jax.lax.scan(stretch, init(game.log_ref), length=points)


def solve(
  method: str,
  p_win: GameLike,
  ref: PolicyLike,
  *,
  beta: checks.Number,
  iterations: int,
  step: checks.Numbers | None = None,
  updates: str | None = None,
  eta: checks.Numbers | None = None,
  kappa: checks.Numbers | None = None,
  mixture: checks.Numbers | None = None,
  batch: int = 0,
  key: PRNGKeyArray | None = None,
  every: int = 1,
  inner: int | None = None,
) -> tuple[Float[Array, "*X A"], Float[Array, "points"]]:
  """Runs one method from the reference.

  "nash_mp" is the exact method. With updates="gradient" it is the method of training: gradient
  steps, and a target that follows by κ. With `inner` too, it is the two-step form,
  "nash_mp_two_step": both halves by that many gradient steps, against frozen copies.

  Examples:
    >>> import numpy as np
    >>> from nash_jax.games import solvers, zoo
    >>> game, ref = zoo.rock_paper_scissors(0.5, 1.0, 0.8), np.full(3, 1 / 3)
    >>> logp, curve = solvers.solve("nash_mp", game.p_win, ref, beta=0.1, iterations=100)
    >>> np.asarray(np.exp(logp)).round(3).tolist()  # the equilibrium
    [0.298, 0.253, 0.449]
    >>> options = {"updates": "gradient", "step": 4.0, "kappa": 0.1}
    >>> _, curve = solvers.solve("nash_mp", game.p_win, ref, beta=0.1, iterations=100, **options)
    >>> bool(curve[-1] < curve[0])
    True

  Args:
    method: a name of PROXIMAL or GRADIENT.
    p_win: the game, [A A] or [X A A].
    ref: probabilities of full support, [A], shared by the contexts, or [X A].
    beta: KL weight in nats; 0 is the original game, for methods that have a step there.
    iterations: a multiple of `every`.
    step: a number or schedule [iterations], like eta, kappa and mixture, which `Knobs` explains;
      None is what the method's theory allows.
    updates: "proximal" or "gradient"; by default proximal where the method has such an update.
    batch: sampled pairs a context and gradient step; 0 takes the exact gradient.
    key: what they are sampled with; jax.random.key(0) by default.
    every: iterations from one entry of the curve to the next.
    inner: gradient steps a half of NashMP's two-step form; 10 by default.

  Returns:
    (log-probabilities of the last iterate, SubOpt_β after each `every` iterations).

  Raises:
    ValueError: an unknown method or updates, not a game or a reference, knobs that do not fit or
      lie outside their range, or a step so large that the iterate is no policy.
  """
  batch = checks.count("batch", batch, least=0)
  method, updates = choose(method, updates, batch, inner)
  given = {"step": step, "eta": eta, "kappa": kappa, "mixture": mixture}
  game, knobs = _set_up(method, updates, p_win, ref, beta, (iterations, every), given)
  sizes: dict[str, Any] = {"points": iterations // every, "every": every, "batch": batch}
  inner = 10 if inner is None else inner
  state, curve = run(method, updates, game, knobs, key, **sizes, inner=inner)
  _check_finite(method, state, curve, knobs)
  return jnp.asarray(state.logp), curve


def _set_up(
  method: str,
  updates: str,
  p_win: GameLike,
  ref: PolicyLike,
  beta: checks.Number,
  times: tuple[int, int],
  given: dict[str, checks.Numbers | None],
) -> tuple[Game, Knobs]:
  """Returns the game and the knobs of a run; `times` is its iterations, and of them `every`."""
  iterations, every = (
    checks.count(what, time) for what, time in zip(("iterations", "every"), times, strict=True)
  )
  if iterations % every:
    raise ValueError(f"iterations must be a positive multiple of every={every}, got {iterations}.")
  checks.number("beta", beta, zero=True)
  games = jnp.asarray(checks.validate(p_win), float)
  log_ref = jnp.asarray(np.log(checks.reference(ref, games.shape[:-1])), float)
  knobs = _knobs(method, updates, beta, games.shape[-1], iterations, given)
  return Game(games, log_ref, jnp.asarray(beta, float)), knobs


def _check_finite(method: str, state: State, curve: Array, knobs: Knobs) -> None:
  """Checks that the last iterate is a policy."""
  finite = bool(jnp.isfinite(curve).all() & ~jnp.isnan(state.logp).any())
  expected = f"one at which {method} stays a policy in {curve.dtype}"
  require(finite, "step", expected, float(jnp.max(knobs.step)), "Lower it, or raise beta.")


def _knobs(
  method: str,
  updates: str,
  beta: checks.Number,
  actions: int,
  iterations: int,
  given: dict[str, checks.Numbers | None],
) -> Knobs:
  """Returns the given knobs, and theory's where None is, as arrays whose ranges are checked."""
  for name, knob in given.items():
    if knob is not None:
      check_knob(name, knob)
      if name in ("step", "eta"):
        checks.number(name, knob, infinite=name == "eta", array=True)
  default = theory(method, updates, beta, actions, iterations, given["eta"])._asdict()
  arrays: dict[str, Array] = {
    name: jnp.asarray(default[name] if knob is None else knob, float)
    for name, knob in given.items()
  }
  for name, array in arrays.items():
    if array.ndim > 1 or (array.ndim and len(array) != iterations):
      raise ValueError(f"{name} must be a number or [iterations={iterations}], got {array.shape}.")
  _check_theory(method, updates, float(beta), **arrays)
  return Knobs(**arrays)


def _check_theory(
  method: str, updates: str, beta: float, *, step: Array, eta: Array, kappa: Array, mixture: Array
) -> None:
  """Checks what a method divides by, and that a proximal step is one."""
  if not jnp.all(step > 0):
    raise ValueError(f"{method} has no step of its theory at beta={beta}: give step > 0.")
  if updates == "gradient":
    divided = method in ("online_ipo", "online_dpo", "mmd", "egpo")
    expected, fix = "a number > 0", "Take a method of the original game, such as omwu or mpo."
    require(beta > 0 or not divided, "beta", f"{expected}, by which {method} divides", beta, fix)
    centred = method in ("nash_mp", "nash_mp_two_step")
    good = bool(jnp.all(eta > 0)) or not centred
    require(good, "eta", expected, 2 * beta, "Give eta: its default is 2·beta.")
  elif method in ("nash_mp", "egpo", "proximal_point", "mmd", "mpo", "nash_md"):
    largest = float(jnp.max(step))
    expected = f"a number in (0, 1 / beta = {1 / beta if beta > 0 else np.inf:g}]"
    require(largest * beta <= 1 + 1e-6, "step", expected, largest, "Lower it, or beta.")

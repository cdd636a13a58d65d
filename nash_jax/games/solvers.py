"""Every solver of a preference game as one pure step, scanned; vmap it over games, seeds and knobs.

Two kinds, never to be mixed in one comparison unsaid:

* PROXIMAL, exact updates in closed form: θ⁺ = (1 - sβ)·θ_base + sβ·θ_ref + s·P(·≻opponent);
* GRADIENT, SGD steps on logits of a population loss, its expectation over pairs (y, y') summed over
  all of them (batch = 0) or sampled (batch > 0 pairs a context and step, soft labels P).

A policy is log-probabilities [A] or [X A]; p_win is [A A] or [X A A]. Choices of ours:
1. Logits are renormalised after each step: a change of gauge only.
2. The EMA of nash_mp_ema is over logits, the parameters of a tabular policy, after the step; the
   target, used in differences alone, is not renormalised.
3. Gradient egpo and mmd draw y, y' uniformly, as EGPO's theory does; their exact gradient steps are
   then the proximal updates with sβ = 4·step/A. mmd is egpo without its half step.
4. fictitious_play's iterate is the mean of its past best responses: soft ones at β > 0, where that
   mean converges to π*, hard ones at β = 0.
5. mpo's magnet is the reference only until its first reset, so it solves the original game.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nash_jax.games import preference
from nash_jax.validation import one_of, require


class Game(NamedTuple):
  """What a step may use: p_win [... A A], log_ref [... A], beta a number ≥ 0."""

  p_win: jax.Array
  log_ref: jax.Array
  beta: jax.Array


class Knobs(NamedTuple):
  """Hyperparameters, each a number or a schedule [iterations] read at the iteration's index.

  step: s of a proximal update, or SGD's rate; eta: η of a prox centre (β/η weighs KL to it); kappa:
  rate at which a target (nash_mp_ema) or magnet (mpo) moves; mixture: weight of the reference in
  Nash-MD's opponent when steps are gradients.
  """

  step: jax.Array | float
  eta: jax.Array | float
  kappa: jax.Array | float
  mixture: jax.Array | float


class State(NamedTuple):
  """logp: the iterate; other: a second policy (half iterate, target, magnet, mean, auxiliary)."""

  logp: jax.Array
  other: jax.Array
  k: jax.Array


def init(log_ref):
  """Everybody starts from the reference."""
  return State(log_ref, log_ref, jnp.zeros((), jnp.int32))


def harmonic(iterations):
  """κ_k = 10/(k+10), k completed steps from 0: the paper's games."""
  return 10 / (jnp.arange(preference.count("iterations", iterations)) + 10.0)


def periodic(period, iterations):
  """κ that copies after every `period` steps and stands still between them."""
  steps = jnp.arange(preference.count("iterations", iterations)) + 1
  return (steps % preference.count("period", period) == 0).astype(float)


def check(game, knobs=None, state=None):
  """Raises ValueError where a Game, Knobs or State holds what a step has no meaning for.

  What is traced is checked by its shape alone, as in preference.
  """
  p_win = preference.numbers("p_win", game.p_win)
  preference.validate(p_win if p_win.ndim < 4 else p_win.reshape(-1, *p_win.shape[-2:]))
  preference.number("beta", game.beta, zero=True, array=True)
  policy = p_win.shape[:-1]
  preference.log_distribution("log_ref", game.log_ref, policy, full_support=True)
  if state is not None:
    preference.log_distribution("logp", state.logp, policy)
    require(np.shape(state.other) in (policy, policy[-1:]), "other", f"a policy {list(policy)}",
            np.shape(state.other), "Begin with init(log_ref).")
  for name, knob in () if knobs is None else knobs._asdict().items():
    check_knob(name, knob)


def check_knob(name, value):
  """Raises ValueError unless a knob lies in its range; η = inf is no prox term, 0 stands for unset.

  The theory of a method that has no step at β = 0 says so by a step of 0.
  """
  most = {"step": np.inf, "eta": np.inf, "kappa": 1.0, "mixture": 1.0}
  one_of("knob", name, most)
  preference.number(name, value, zero=True, at_most=most[name], infinite=name == "eta", array=True)


def _checked(step):
  """A step whose arguments are checked where it is called outside of jit."""
  @functools.wraps(step)
  def checked(state, game, knobs, *others, **options):
    check(game, knobs, state)
    return step(state, game, knobs, *others, **options)

  return checked


def _prox(game, step, log_base, log_opponent):
  """The maximiser of <π, P o> - β KL(π‖ref) - (1/s - β) KL(π‖base)."""
  wins = preference.win_rates(game.p_win, jnp.exp(log_opponent))
  shrink = step * game.beta
  return jax.nn.log_softmax((1 - shrink) * log_base + shrink * game.log_ref + step * wins)


# Proximal updates: (state, game, knobs) -> (logp, other).


@_checked
def nash_mp(state, game, knobs):
  """NashMP and EGPO alike: a half step, then the step against it (2505.19731; 2503.08942)."""
  half = _prox(game, knobs.step, state.logp, state.logp)
  return _prox(game, knobs.step, state.logp, half), half


@_checked
def proximal_point(state, game, knobs, inner=60):
  """The ideal method, opponent π_{k+1} itself, by `inner` rounds that contract for s < 2."""
  new = jax.lax.fori_loop(
    0, inner, lambda _, guess: _prox(game, knobs.step, state.logp, guess), state.logp)
  return new, state.logp


@_checked
def mmd(state, game, knobs):
  """Magnetic mirror descent, also MD and INPO (Sokota et al.; 2407.00617)."""
  return _prox(game, knobs.step, state.logp, state.logp), state.other


@_checked
def mpo(state, game, knobs):
  """MMD to a magnet that moves to the iterate every M steps: κ = periodic(M) (2410.16714)."""
  new = _prox(game._replace(log_ref=state.other), knobs.step, state.logp, state.logp)
  return new, jnp.where(knobs.kappa > 0, new, state.other)


def _mixture(state, game, weight):
  return jax.nn.log_softmax((1 - weight) * state.logp + weight * game.log_ref)


@_checked
def nash_md(state, game, knobs):
  """Against the geometric mixture π^{1-sβ} ref^{sβ} (2312.00886)."""
  opponent = _mixture(state, game, knobs.step * game.beta)
  return _prox(game, knobs.step, state.logp, opponent), opponent


@_checked
def mwu(state, game, knobs):
  """Multiplicative weights, SPPO's population form; β plays no part (2405.00675).

  `other` is the mean of the iterates so far, which converges where the last one circles.
  """
  mean = jnp.exp(state.other) + (jnp.exp(state.logp) - jnp.exp(state.other)) / (state.k + 1)
  return _prox(game._replace(beta=0.0), knobs.step, state.logp, state.logp), jnp.log(mean)


@_checked
def omwu(state, game, knobs):
  """Optimistic MWU, ONPO's population form; β plays no part: `other` is the auxiliary iterate."""
  free = game._replace(beta=0.0)
  auxiliary = _prox(free, knobs.step, state.other, state.logp)
  return _prox(free, knobs.step, auxiliary, state.logp), auxiliary


@_checked
def fictitious_play(state, game, knobs):
  """Best response to the mean of past policies; the iterate is that mean."""
  del knobs
  wins = preference.win_rates(game.p_win, jnp.exp(state.logp))
  positive = game.beta >= jnp.finfo(wins.dtype).tiny  # wins can be divided by it
  soft = jax.nn.softmax(game.log_ref + wins / jnp.where(positive, game.beta, 1))
  hard = jax.nn.one_hot(jnp.argmax(wins, -1), wins.shape[-1], dtype=wins.dtype)
  best = jnp.where(positive, soft, hard)
  mean = jnp.exp(state.logp) + (best - jnp.exp(state.logp)) / (state.k + 2)
  return jnp.log(mean), jnp.log(best)


PROXIMAL: dict[str, Callable] = {
  "nash_mp": nash_mp, "egpo": nash_mp, "proximal_point": proximal_point, "mmd": mmd, "mpo": mpo,
  "nash_md": nash_md, "mwu": mwu, "omwu": omwu, "fictitious_play": fictitious_play,
}


# Gradient steps. A loss is sg[a]·log π(y) in expectation over y and y'; its coefficient a depends
# on P(y≻y') and each answer's pull, the log-ratio to the reference plus 1/η of that to the prox
# centre. Where y and y' have one law, a sample takes the mean of both arms, which in expectation
# are equal: NashMP's estimator, halved so that its mean is ∇J.


def _play(p, own, other, beta):  # of -P(π≻y') + β KL(π‖ref) + β/η KL(π‖centre)
  del other
  return 0.5 - p + beta * own


def _regression(p, own, other, beta):  # of (Δ - (P - ½)/β)²
  return 4 * (own - other - (p - 0.5) / beta)


def _logistic(p, own, other, beta):  # of -P log σ(βΔ) - (1-P) log σ(-βΔ)
  return 2 * beta * (jax.nn.sigmoid(beta * (own - other)) - p)


class Draws(NamedTuple):
  """How gradients are taken: `batch` pairs a context from `key`, or all of them where it is 0.

  inner: gradient steps a half of nash_mp_approximate.
  """

  key: jax.Array
  batch: int = 0
  inner: int = 10


def gradient(loss, game, logp, draws, opponent=None, judge=None, centre=None, eta=1.0):
  """Gradient on logits [... A] of a loss, expected or sampled; policies are log-probabilities.

  Args:
    loss: _play, _regression or _logistic.
    opponent: plays y'; by default y and y' come from the policy itself.
    judge: plays y'', whose comparisons with y and y' replace P(y≻y') by ½ + P(y≻y'') - P(y'≻y''),
      EGPO's label; y and y' are then uniform, its behaviour law.
    centre, eta: the prox centre and its η, for methods that have one.
  """
  check(game)
  preference.log_distribution("logp", logp, np.shape(game.p_win)[:-1])
  check_knob("eta", eta)
  one_of("loss", getattr(loss, "__name__", str(loss)), ("_play", "_regression", "_logistic"))
  preference.count("batch", draws.batch, least=0)
  pull = logp - game.log_ref
  if centre is not None:
    pull = pull + (logp - centre) / eta
  law = logp if judge is None else jnp.full_like(logp, -jnp.log(logp.shape[-1]))
  expected = functools.partial(_sampled, draws) if draws.batch else _enumerated
  total = expected(loss, game, pull, law, opponent, judge)
  return total - jnp.exp(logp) * jnp.sum(total, -1, keepdims=True)


def _enumerated(loss, game, pull, law, opponent, judge):
  others = jnp.exp(law if opponent is None else opponent)
  if loss is _logistic:
    each = loss(game.p_win, pull[..., :, None], pull[..., None, :], game.beta)
    return jnp.exp(law) * preference.win_rates(each, others)

  def mean(values):
    return jnp.sum(others * values, -1, keepdims=True)

  wins = preference.win_rates(game.p_win, others if judge is None else jnp.exp(judge))
  if judge is not None:
    wins = 0.5 + wins - mean(wins)
  # affine in what y' brings, so that its mean over y' is its value at the means
  return jnp.exp(law) * loss(wins, pull, mean(pull), game.beta)


def _sampled(draws, loss, game, pull, law, opponent, judge):
  actions = pull.shape[-1]
  laws = [law, law if opponent is None else opponent] + ([] if judge is None else [judge])
  uniform = jax.random.uniform(draws.key, (len(laws), *pull.shape[:-1], draws.batch), jnp.float32)
  y, other, *third = (_draw(law, u) for law, u in zip(laws, uniform, strict=True))
  flat = game.p_win.reshape(*pull.shape[:-1], actions**2)

  def against(a, b):
    return jnp.take_along_axis(flat, a * actions + b, -1)

  p = 0.5 + against(y, *third) - against(other, *third) if third else against(y, other)
  pulls = [jnp.take_along_axis(pull, i, -1) for i in (y, other)]
  arms = [(y, loss(p, *pulls, game.beta))]
  if opponent is None:
    arms.append((other, loss(1 - p, *pulls[::-1], game.beta)))
  return sum(jnp.sum(jax.nn.one_hot(i, actions, dtype=a.dtype) * a[..., None], -2)
             for i, a in arms) / (draws.batch * len(arms))


def _draw(law, uniform):
  """Actions of log-probabilities [... A] by inverse cdf of uniform [... batch]: [... batch]."""
  cdf = jnp.cumsum(jnp.exp(law), -1)
  index = jnp.sum(uniform[..., None] * cdf[..., None, -1:] >= cdf[..., None, :], -1)
  return jnp.minimum(index, law.shape[-1] - 1)


def _descend(loss, game, logp, step, draws, **roles):
  return jax.nn.log_softmax(logp - step * gradient(loss, game, logp, draws, **roles))


# Gradient steps: (state, game, knobs, draws) -> (logp, other).


def _self_play(loss, state, game, knobs, draws):
  return _descend(loss, game, state.logp, knobs.step, draws), state.other


@_checked
def nash_mp_ema(state, game, knobs, draws):
  """Regularised self-play with a KL to a target that follows by κ (2505.19731, section 5)."""
  new = _descend(_play, game, state.logp, knobs.step, draws, centre=state.other, eta=knobs.eta)
  return new, knobs.kappa * new + (1 - knobs.kappa) * state.other


@_checked
def nash_mp_approximate(state, game, knobs, draws):
  """Both halves of NashMP by gradient steps, `inner` each, against frozen copies (2505.19731)."""
  def half(opponent, key):
    def body(i, logp):
      return _descend(_play, game, logp, knobs.step,
                      draws._replace(key=jax.random.fold_in(key, i)),
                      opponent=opponent, centre=state.logp, eta=knobs.eta)

    new = jax.lax.fori_loop(0, draws.inner, body, opponent)
    return new, new

  new, (middle, _) = jax.lax.scan(half, state.logp, jax.random.split(draws.key))
  return new, middle


@_checked
def nash_md_pg(state, game, knobs, draws):
  """Nash-MD-PG: against the geometric mixture with weight m of the reference (2312.00886)."""
  mixed = _mixture(state, game, knobs.mixture)
  return _descend(_play, game, state.logp, knobs.step, draws, opponent=mixed), mixed


@_checked
def mmd_regression(state, game, knobs, draws):
  """Mirror descent by regression on uniform pairs, labelled by a third draw from π_t."""
  new = _descend(_regression, game, state.logp, knobs.step, draws, judge=state.logp)
  return new, state.other


@_checked
def egpo_regression(state, game, knobs, draws):
  """EGPO by regression on uniform pairs: both halves start at θ_t (2503.08942)."""
  first, second = jax.random.split(draws.key)
  half, _ = mmd_regression(state, game, knobs, draws._replace(key=first))
  return _descend(_regression, game, state.logp, knobs.step, draws._replace(key=second),
                  judge=half), half


GRADIENT: dict[str, Callable] = {
  "reg_self_play": functools.partial(_self_play, _play),
  "online_ipo": functools.partial(_self_play, _regression),
  "online_dpo": functools.partial(_self_play, _logistic),
  "nash_md": nash_md_pg, "mmd": mmd_regression, "egpo": egpo_regression,
  "nash_mp_ema": nash_mp_ema, "nash_mp_approximate": nash_mp_approximate,
}
UPDATES: dict[str, dict[str, Callable]] = {"proximal": PROXIMAL, "gradient": GRADIENT}


def unit(method, updates, beta):
  """The rate at which a method's SGD moves, near the reference, as far as at rate 1 along ∇J does.

  Online IPO's exact gradient is 4/β times ∇J, Online DPO's about 2β times (its logistic slope is
  1/4), and on uniform pairs EGPO's and MMD's regressions are scaled as Online IPO's.
  """
  check_method(method, updates)
  preference.number("beta", beta, zero=True)
  if updates == "proximal":
    return 1.0
  if method == "online_dpo":
    return 1 / (2 * preference.number("beta", beta))
  return beta / 4 if method in ("online_ipo", "egpo", "mmd") else 1.0


def check_method(method, updates):
  """Raises ValueError that lists the choices, unless a method has such updates."""
  one_of("updates", updates, UPDATES)
  one_of(f"method with {updates} updates", method, UPDATES[updates])


def theory(method, updates, beta, actions, iterations, eta=None):
  """Knobs a method's own theory allows; docs/games.md gives each with its source.

  SGD has theory for none of these losses: its steps are 1/(β + β/η + ½) in units of ∇J, a bound on
  the curvature of J's surrogate, and EGPO's and MMD's proximal steps in units of their regression.
  A step of 0 says that the theory needs a β > 0.

  Raises:
    ValueError: an unknown method or updates, β < 0, NaN or infinite, η ≤ 0 or NaN, no actions.
  """
  check_method(method, updates)
  beta = float(preference.number("beta", beta, zero=True))
  actions = preference.count("actions", actions)
  iterations = preference.count("iterations", iterations)
  if eta is not None:
    preference.number("eta", eta, infinite=True, array=True)
  magnetic = beta / (1 + beta**2) if beta < 1e150 else 1 / beta
  kappa = harmonic(iterations)
  if method == "mpo":  # a period beyond the last step never ends
    often = magnetic * beta * iterations > 1
    kappa = periodic(int(2 / (magnetic * beta)) if often else iterations + 1, iterations)
    kappa = kappa if beta > 0 else periodic(1, iterations)
  eta = 2 * beta if eta is None else eta  # the natural one, whose step has a limit at β = 0
  prox = 2 / (1 + 2 * beta) if np.all(eta == 2 * beta) else _prox_step(beta, eta)
  steps = {
    "nash_mp": prox, "proximal_point": prox, "egpo": 1 / (1 + beta + 2 * actions),
    "mmd": magnetic, "mpo": magnetic, "omwu": 1 / 8, "fictitious_play": 1.0,
    "mwu": (8 * jnp.log(actions) / iterations) ** 0.5,
    "nash_md": 2 / (beta * (jnp.arange(iterations) + 2.0)) if beta > 0 else 0.0,
  }
  if updates == "proximal":
    step = steps[method]
  elif not beta > 0:
    step = 0.0
  elif method in ("egpo", "mmd"):
    step = steps[method] * actions * unit(method, updates, beta)
  else:
    step = unit(method, updates, beta) / (beta + beta / eta + 0.5)
  return Knobs(step, eta, kappa, 0.25)


def _prox_step(beta, eta):
  """s of a prox term of weight β/η: 1/β without one, 0 where β = 0 leaves only the prox term."""
  if not beta > 0:
    return 0.0
  finite = np.where(np.isinf(eta), 1, eta)
  return np.where(np.isinf(eta), 1 / beta, finite / (beta * (1 + finite)))


def suboptimality(game, state):
  """SubOpt_β of the iterate, averaged over contexts."""
  return jnp.mean(preference.gap(game.p_win, state.logp, game.log_ref, game.beta))


def run(method, updates, game, knobs, key, *, points, every=1, batch=0, inner=10,
        measure=suboptimality):
  """Iterates points·every times from the reference; returns (State, measures [points, ...]).

  measure(game, state) is taken after every `every` steps: by default SubOpt_β of the iterate.
  Pure and vmappable over game, knobs and key; `every` is no constant of the compiled program.
  batch, inner: as in Draws. Schedules in knobs must be long enough.

  Raises:
    ValueError: an unknown method or updates, no game, knobs out of range or too short.
  """
  check_method(method, updates)
  check(game, knobs)
  points, every = preference.count("points", points), preference.count("every", every)
  batch = preference.count("batch", batch, least=0)
  inner = preference.count("inner", inner)
  for name, knob in knobs._asdict().items():
    if np.ndim(knob) and preference.concrete(every):
      require(len(knob) >= points * every, name, f"a number, or one for each of {points * every} "
              "iterations", np.shape(knob), "Give a longer schedule.")
  return _run(method, updates, game, knobs, key, points=points, every=every, batch=batch,
              inner=inner, measure=measure)


@functools.partial(
  jax.jit, static_argnames=("method", "updates", "points", "batch", "inner", "measure"))
def _run(method, updates, game, knobs, key, *, points, every, batch, inner, measure):
  def one(_, state):
    now = jax.tree.map(lambda knob: knob[state.k] if np.ndim(knob) else knob, knobs)
    if updates == "proximal":
      logp, other = PROXIMAL[method](state, game, now)
    else:
      draws = Draws(jax.random.fold_in(key, state.k), batch, inner)
      logp, other = GRADIENT[method](state, game, now, draws)
    return State(logp, other, state.k + 1)

  def stretch(state, _):
    state = jax.lax.fori_loop(0, every, one, state)
    return state, measure(game, state)

  return jax.lax.scan(stretch, init(game.log_ref), length=points)


def solve(method, p_win, ref, *, beta, iterations, step=None, updates=None, eta=None, kappa=None,
          mixture=None, batch=0, key=None, every=1, inner=10):
  """Runs one method from the reference on a game [A A] or [X A A].

  Args:
    method: a name of PROXIMAL or GRADIENT.
    ref: probabilities [A], shared by the contexts, or [X A]; full support.
    beta: KL weight in nats; 0 is the original game, for methods that have a step there.
    step, eta, kappa, mixture: numbers or schedules [iterations]; None is the method's theory.
    updates: "proximal" or "gradient"; by default proximal where the method has such an update.
    batch: pairs a context and gradient step; 0 takes the exact gradient.
    every: iterations between two entries of the curve.

  Returns:
    (log-probabilities of the last iterate, SubOpt_β after each `every` iterations).

  Raises:
    ValueError: an unknown method or updates, no valid game or reference, knobs that do not fit or
      lie outside of their range, or a step so large that the iterate is no policy.
  """
  have = [kind for kind in UPDATES if method in UPDATES[kind]]
  if not have:
    choices = ", ".join(sorted(PROXIMAL | GRADIENT))
    raise ValueError(f"unknown method {method!r}; choices: {choices}.")
  batch = preference.count("batch", batch, least=0)
  updates = updates or ("gradient" if batch else have[0])
  if updates not in have or (batch and updates == "proximal"):
    raise ValueError(f"{method} has no updates={updates!r} with batch={batch}; choices: "
                     f"{', '.join(have)}, of which proximal is exact: batch=0.")
  iterations, every = preference.count("iterations", iterations), preference.count("every", every)
  if iterations % every:
    raise ValueError(f"iterations must be a positive multiple of every={every}, got {iterations}.")
  preference.number("beta", beta, zero=True)
  p_win = jnp.asarray(preference.validate(p_win), float)
  log_ref = jnp.asarray(np.log(preference.reference(ref, p_win.shape[:-1])), float)
  knobs = _knobs(method, updates, beta, p_win.shape[-1], iterations,
                 Knobs(step, eta, kappa, mixture))
  game = Game(p_win, log_ref, jnp.asarray(beta, float))
  key = jax.random.key(0) if key is None else key
  state, curve = run(method, updates, game, knobs, key, points=iterations // every, every=every,
                     batch=batch, inner=inner)
  finite = bool(jnp.isfinite(curve).all() & ~jnp.isnan(state.logp).any())
  require(finite, "step", f"one at which {method} stays a policy in {p_win.dtype}",
          float(jnp.max(knobs.step)), "Lower it, or raise beta.")
  return state.logp, curve


def _knobs(method, updates, beta, actions, iterations, given):
  """The given knobs, and theory's where None is, as arrays whose ranges are checked."""
  for name, knob in given._asdict().items():
    if knob is not None:
      check_knob(name, knob)
      if name in ("step", "eta"):
        preference.number(name, knob, infinite=name == "eta", array=True)
  default = theory(method, updates, beta, actions, iterations, given.eta)
  knobs = Knobs(*(jnp.asarray(d if g is None else g, float)
                  for g, d in zip(given, default, strict=True)))
  for name, knob in knobs._asdict().items():
    if knob.ndim > 1 or (knob.ndim and len(knob) != iterations):
      raise ValueError(f"{name} must be a number or [iterations={iterations}], got {knob.shape}.")
  if not jnp.all(knobs.step > 0):
    raise ValueError(f"{method} has no step of its theory at beta={beta}: give step > 0.")
  if updates == "gradient":
    divided = method in ("online_ipo", "online_dpo", "mmd", "egpo")
    require(beta > 0 or not divided, "beta", f"a number > 0, by which {method} divides", beta,
            "Take a method of the original game, such as omwu or mpo.")
    centred = method in ("nash_mp_ema", "nash_mp_approximate")
    require(bool(jnp.all(knobs.eta > 0)) or not centred, "eta", "a number > 0", float(beta) * 2,
            "Give eta: its default is 2·beta.")
  elif method in ("nash_mp", "egpo", "proximal_point", "mmd", "mpo", "nash_md"):
    largest = float(jnp.max(knobs.step))
    require(largest * beta <= 1 + 1e-6, "step",
            f"a number in (0, 1 / beta = {1 / beta if beta > 0 else np.inf:g}]", largest,
            "Lower it, or beta.")
  return knobs

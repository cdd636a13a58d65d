"""Every solver of a preference game as one pure step, scanned; vmap it over games, seeds and knobs.

Two kinds, never to be mixed in one comparison unsaid:

* PROXIMAL, exact updates in closed form: θ⁺ = (1 - sβ)·θ_base + sβ·θ_ref + s·P(·≻opponent);
* GRADIENT, SGD steps on logits of a population loss, its expectation over pairs (y, y') summed over
  all of them (batch = 0) or sampled (batch > 0 pairs a context and step, soft labels P).

A policy is log-probabilities [A] or [X A]; p_win is [A A] or [X A A]. Choices of ours:
1. Logits are renormalised after each step: a change of gauge only.
2. The EMA of nash_mp_ema is over logits, the parameters of a tabular policy, after the step.
3. Gradient egpo and mmd draw y, y' uniformly, as EGPO's theory does; their exact gradient steps are
   then the proximal updates with sβ = 4·step/A. mmd is egpo without its half step.
4. fictitious_play's iterate is the mean of its past best responses: soft ones at β > 0, where that
   mean converges to π*, hard ones at β = 0.
5. mpo's magnet is the reference only until its first reset, so it solves the original game.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nash_jax.games import preference


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

  step: jax.Array
  eta: jax.Array
  kappa: jax.Array
  mixture: jax.Array


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
  return 10 / (jnp.arange(iterations) + 10.0)


def periodic(period, iterations):
  """κ that copies after every `period` steps and stands still between them."""
  return ((jnp.arange(iterations) + 1) % period == 0).astype(float)


def _prox(game, step, log_base, log_opponent):
  """The maximiser of <π, P o> - β KL(π‖ref) - (1/s - β) KL(π‖base)."""
  wins = preference.win_rates(game.p_win, jnp.exp(log_opponent))
  shrink = step * game.beta
  return jax.nn.log_softmax((1 - shrink) * log_base + shrink * game.log_ref + step * wins)


# Proximal updates: (state, game, knobs) -> (logp, other).


def nash_mp(state, game, knobs):
  """NashMP and EGPO alike: a half step, then the step against it (2505.19731; 2503.08942)."""
  half = _prox(game, knobs.step, state.logp, state.logp)
  return _prox(game, knobs.step, state.logp, half), half


def proximal_point(state, game, knobs, inner=60):
  """The ideal method, opponent π_{k+1} itself, by `inner` rounds that contract for s < 2."""
  new = jax.lax.fori_loop(
    0, inner, lambda _, guess: _prox(game, knobs.step, state.logp, guess), state.logp)
  return new, state.logp


def mmd(state, game, knobs):
  """Magnetic mirror descent, also MD and INPO (Sokota et al.; 2407.00617)."""
  return _prox(game, knobs.step, state.logp, state.logp), state.other


def mpo(state, game, knobs):
  """MMD to a magnet that moves to the iterate every M steps: κ = periodic(M) (2410.16714)."""
  new = _prox(game._replace(log_ref=state.other), knobs.step, state.logp, state.logp)
  return new, jnp.where(knobs.kappa > 0, new, state.other)


def nash_md(state, game, knobs):
  """Against the geometric mixture π^{1-sβ} ref^{sβ} (2312.00886)."""
  shrink = knobs.step * game.beta
  opponent = jax.nn.log_softmax((1 - shrink) * state.logp + shrink * game.log_ref)
  return _prox(game, knobs.step, state.logp, opponent), opponent


def mwu(state, game, knobs):
  """Multiplicative weights, SPPO's population form; β plays no part (2405.00675).

  `other` is the mean of the iterates so far, which converges where the last one circles.
  """
  mean = jnp.exp(state.other) + (jnp.exp(state.logp) - jnp.exp(state.other)) / (state.k + 1)
  return _prox(game._replace(beta=0.0), knobs.step, state.logp, state.logp), jnp.log(mean)


def omwu(state, game, knobs):
  """Optimistic MWU, ONPO's population form; β plays no part: `other` is the auxiliary iterate."""
  free = game._replace(beta=0.0)
  auxiliary = _prox(free, knobs.step, state.other, state.logp)
  return _prox(free, knobs.step, auxiliary, state.logp), auxiliary


def fictitious_play(state, game, knobs):
  """Best response to the mean of past policies; the iterate is that mean."""
  del knobs
  wins = preference.win_rates(game.p_win, jnp.exp(state.logp))
  soft = jax.nn.softmax(game.log_ref + wins / jnp.where(game.beta > 0, game.beta, 1))
  hard = jax.nn.one_hot(jnp.argmax(wins, -1), wins.shape[-1], dtype=wins.dtype)
  best = jnp.where(game.beta > 0, soft, hard)
  mean = jnp.exp(state.logp) + (best - jnp.exp(state.logp)) / (state.k + 2)
  return jnp.log(mean), jnp.log(best)


PROXIMAL = {
  "nash_mp": nash_mp, "egpo": nash_mp, "proximal_point": proximal_point, "mmd": mmd, "mpo": mpo,
  "nash_md": nash_md, "mwu": mwu, "omwu": omwu, "fictitious_play": fictitious_play,
}


# Gradient steps. A loss is Σ_arms sg[a]·log π(y) in expectation over pairs (y, y'); coefficients
# (a, a' or None) are functions of P(y≻y'), log-ratios r to the reference and t to the prox centre:
# the same for draws and for all pairs at once, so sampled and exact gradients cannot differ.


def _both_arms(p, r, t, beta, eta):  # half of NashMP's estimator, so that its expectation is ∇J
  pull = [beta * r[i] + beta / eta * t[i] for i in range(2)]
  return (0.5 - p + pull[0]) / 2, (p - 0.5 + pull[1]) / 2


def _one_arm(p, r, t, beta, eta):
  return 0.5 - p + beta * r[0] + beta / eta * t[0], None


def _regression(p, r, t, beta, eta):  # of (Δ - (P - ½)/β)²
  slope = 2 * (r[0] - r[1] - (p - 0.5) / beta)
  return slope, -slope


def _logistic(p, r, t, beta, eta):  # of -P log σ(βΔ) - (1-P) log σ(-βΔ)
  slope = beta * (jax.nn.sigmoid(beta * (r[0] - r[1])) - p)
  return slope, -slope


def _draw(law, uniform):
  """Actions of log-probabilities [... A] by inverse cdf of uniform [... batch]: [... batch]."""
  cdf = jnp.cumsum(jnp.exp(law), -1)
  index = jnp.sum(uniform[..., None] * cdf[..., None, -1:] >= cdf[..., None, :], -1)
  return jnp.minimum(index, law.shape[-1] - 1)


def gradient(coefficients, game, logp, laws, key, batch, centre=None, eta=1.0, judge=None):
  """Gradient on logits [... A] of the loss with these coefficients, expected or sampled.

  laws: log-probabilities that y and y' come from. centre: the prox centre (the policy itself where
  a method has none, so t = 0). judge: log-probabilities of y'', whose comparisons with y and y'
  replace P(y≻y') by ½ + P(y≻y'') - P(y'≻y''), EGPO's label.
  """
  r, t = logp - game.log_ref, logp - (logp if centre is None else centre)
  actions = logp.shape[-1]
  if batch:
    shape = (2 if judge is None else 3, *logp.shape[:-1], batch)
    uniform = jax.random.uniform(key, shape, jnp.float32)
    y = [_draw(law, u) for law, u in zip(laws, uniform[:2], strict=True)]
    flat = game.p_win.reshape(*logp.shape[:-1], actions**2)

    def against(a, b):
      return jnp.take_along_axis(flat, a * actions + b, -1)

    if judge is None:
      p = against(y[0], y[1])
    else:
      third = _draw(judge, uniform[2])
      p = 0.5 + against(y[0], third) - against(y[1], third)
    ratios = [[jnp.take_along_axis(ratio, i, -1) for i in y] for ratio in (r, t)]
    arms = coefficients(p, *ratios, game.beta, eta)
    total = sum(jnp.sum(jax.nn.one_hot(i, actions, dtype=a.dtype) * a[..., None], -2) / batch
                for i, a in zip(y, arms, strict=True) if a is not None)
  else:
    p = game.p_win
    if judge is not None:
      wins = preference.win_rates(p, jnp.exp(judge))
      p = 0.5 + wins[..., :, None] - wins[..., None, :]
    ratios = [(ratio[..., :, None], ratio[..., None, :]) for ratio in (r, t)]
    first, second = coefficients(p, *ratios, game.beta, eta)
    total = jnp.exp(laws[0]) * jnp.sum(jnp.exp(laws[1])[..., None, :] * first, -1)
    if second is not None:  # both arms come from one law and mirror each other: they add the same
      total = 2 * total
  return total - jnp.exp(logp) * jnp.sum(total, -1, keepdims=True)


def _descend(logp, step, grad):
  return jax.nn.log_softmax(logp - step * grad)


# Gradient steps: (state, game, knobs, key, batch, inner) -> (logp, other).


def _self_play(coefficients, state, game, knobs, key, batch, inner):
  del inner
  grad = gradient(coefficients, game, state.logp, (state.logp, state.logp), key, batch)
  return _descend(state.logp, knobs.step, grad), state.other


def nash_mp_ema(state, game, knobs, key, batch, inner):
  """Regularised self-play with a KL to a target that follows by κ (2505.19731, section 5)."""
  del inner
  laws = (state.logp, state.logp)
  grad = gradient(_both_arms, game, state.logp, laws, key, batch, state.other, knobs.eta)
  new = _descend(state.logp, knobs.step, grad)
  return new, jax.nn.log_softmax(knobs.kappa * new + (1 - knobs.kappa) * state.other)


def nash_mp_approximate(state, game, knobs, key, batch, inner):
  """Both halves of NashMP by `inner` gradient steps each against frozen copies (2505.19731)."""
  def half(start, opponent, key):
    def body(i, logp):
      grad = gradient(_one_arm, game, logp, (logp, opponent), jax.random.fold_in(key, i), batch,
                      state.logp, knobs.eta)
      return _descend(logp, knobs.step, grad)

    return jax.lax.fori_loop(0, inner, body, start)

  first, second = jax.random.split(key)
  middle = half(state.logp, state.logp, first)
  return half(middle, middle, second), middle


def nash_md_pg(state, game, knobs, key, batch, inner):
  """Nash-MD-PG: one arm against the geometric mixture of weight m (2312.00886)."""
  del inner
  mixed = jax.nn.log_softmax((1 - knobs.mixture) * state.logp + knobs.mixture * game.log_ref)
  grad = gradient(_one_arm, game, state.logp, (state.logp, mixed), key, batch)
  return _descend(state.logp, knobs.step, grad), state.other


def _regress(state, game, knobs, key, batch, judge):
  uniform = jnp.full_like(state.logp, -jnp.log(state.logp.shape[-1]))
  grad = gradient(_regression, game, state.logp, (uniform, uniform), key, batch, judge=judge)
  return _descend(state.logp, knobs.step, grad)


def mmd_regression(state, game, knobs, key, batch, inner):
  """Mirror descent by regression on uniform pairs, labelled by a third draw from π_t."""
  del inner
  return _regress(state, game, knobs, key, batch, state.logp), state.other


def egpo_regression(state, game, knobs, key, batch, inner):
  """EGPO by regression on uniform pairs: both halves start at θ_t (2503.08942)."""
  del inner
  first, second = jax.random.split(key)
  half = _regress(state, game, knobs, first, batch, state.logp)
  return _regress(state, game, knobs, second, batch, half), half


GRADIENT = {
  "reg_self_play": functools.partial(_self_play, _both_arms),
  "online_ipo": functools.partial(_self_play, _regression),
  "online_dpo": functools.partial(_self_play, _logistic),
  "nash_md": nash_md_pg, "mmd": mmd_regression, "egpo": egpo_regression,
  "nash_mp_ema": nash_mp_ema, "nash_mp_approximate": nash_mp_approximate,
}


def theory(method, updates, beta, actions, iterations, eta=None):
  """Knobs a method's own theory allows; docs/games.md gives each with its source.

  SGD has theory for none of these losses: its steps are 1/(β + β/η + ½) in units of ∇J, a bound on
  the curvature of J's surrogate, and EGPO's and MMD's proximal steps in units of their regression.
  """
  eta = 2 * beta if eta is None else eta
  prox = 2 / (1 + 2 * beta) if eta == 2 * beta else eta / (beta * (1 + eta))
  magnetic = beta / (1 + beta**2)
  proximal = {
    "nash_mp": prox, "proximal_point": prox, "egpo": 1 / (1 + beta + 2 * actions),
    "mmd": magnetic, "mpo": magnetic, "omwu": 1 / 8, "fictitious_play": 1.0,
    "mwu": (8 * jnp.log(actions) / iterations) ** 0.5,
    "nash_md": 2 / (beta * (jnp.arange(iterations) + 2.0)) if beta > 0 else 0.0,
  }
  descent = 1 / (beta + (beta / eta if eta else 0.5) + 0.5)
  units = {"online_ipo": beta / 4, "online_dpo": 1 / (2 * beta) if beta > 0 else 0.0}
  if updates == "proximal":
    step = proximal[method]
  elif method in ("egpo", "mmd"):
    step = proximal[method] * actions * beta / 4
  else:
    step = descent * units.get(method, 1.0)
  if method != "mpo":
    kappa = harmonic(iterations)
  else:
    kappa = periodic(int(2 / (magnetic * beta)) if beta > 0 else 1, iterations)
  return Knobs(step, eta, kappa, 0.25)


@functools.partial(
  jax.jit, static_argnames=("method", "updates", "points", "batch", "inner", "measure"))
def run(method, updates, game, knobs, key, *, points, every=1, batch=0, inner=10, measure=None):
  """Iterates points·every times from the reference; returns (State, measures [points, ...]).

  measure(state) is taken after every `every` steps: SubOpt_β averaged over contexts unless given.
  Pure and vmappable over game, knobs and key; `every` is no constant of the compiled program.
  inner: gradient steps a half of nash_mp_approximate. Schedules in knobs must be long enough.
  """
  if measure is None:
    def measure(state):
      return jnp.mean(preference.gap(game.p_win, state.logp, game.log_ref, game.beta))

  def one(_, state):
    now = jax.tree.map(lambda knob: knob[state.k] if jnp.ndim(knob) else knob, knobs)
    if updates == "proximal":
      logp, other = PROXIMAL[method](state, game, now)
    else:
      noise = jax.random.fold_in(key, state.k)
      logp, other = GRADIENT[method](state, game, now, noise, batch, inner)
    return State(logp, other, state.k + 1)

  def stretch(state, _):
    state = jax.lax.fori_loop(0, every, one, state)
    return state, measure(state)

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
    ValueError: an unknown method or updates, no valid game or reference, knobs that do not fit.
  """
  if method not in PROXIMAL | GRADIENT:
    choices = ", ".join(sorted(PROXIMAL | GRADIENT))
    raise ValueError(f"unknown method {method!r}; choices: {choices}.")
  kinds = {"proximal": PROXIMAL, "gradient": GRADIENT}
  if updates is None:
    updates = "proximal" if method in PROXIMAL and not batch else "gradient"
  if updates not in kinds or method not in kinds[updates]:
    have = [kind for kind in kinds if method in kinds[kind]]
    raise ValueError(f"{method} has no updates={updates!r}; choices: {', '.join(have)}"
                     + ("; batch > 0 samples gradient steps only." if batch else "."))
  if updates == "proximal" and batch:
    raise ValueError(f"batch={batch} samples gradient steps; proximal updates are exact: batch=0.")
  if iterations < 1 or iterations % every:
    raise ValueError(f"iterations must be a positive multiple of every={every}, got {iterations}.")
  p_win = jnp.asarray(preference.validate(p_win), float)
  ref = jnp.broadcast_to(jnp.asarray(ref, float), p_win.shape[:-1])
  if not jnp.all(ref > 0):
    raise ValueError(f"ref must have full support, got a least probability of {ref.min():.3g}.")
  default = theory(method, updates, beta, p_win.shape[-1], iterations, eta)
  given = Knobs(step, eta, kappa, mixture)
  knobs = Knobs(*(jnp.asarray(d if g is None else g, float)
                  for g, d in zip(given, default, strict=True)))
  for name, knob in knobs._asdict().items():
    if knob.ndim > 1 or (knob.ndim and len(knob) != iterations):
      raise ValueError(f"{name} must be a number or [iterations={iterations}], got {knob.shape}.")
  if not jnp.all(knobs.step > 0):
    raise ValueError(f"{method} has no step of its theory at beta={beta}: give step > 0.")
  game = Game(p_win, jnp.log(ref), jnp.asarray(beta, float))
  key = jax.random.key(0) if key is None else key
  state, curve = run(method, updates, game, knobs, key, points=iterations // every, every=every,
                     batch=batch, inner=inner)
  return state.logp, curve

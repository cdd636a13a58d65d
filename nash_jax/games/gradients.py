"""Gradient steps: SGD on logits of a population loss, exact or sampled.

A loss is sg[a]·log π(y) in expectation over y and y'. Its coefficient a depends on P(y≻y') and on
each answer's pull, the log-ratio to the reference plus 1/η of that to the prox centre. The
expectation is summed over all pairs (Draws.batch = 0), or sampled with soft labels P.

Each method is a pure step (state, game, knobs, draws) -> (logp, other), as in `proximal`. GRADIENT
has them by the names that training uses too (objectives/algorithms.py), and mmd, which training
knows as inpo.

Choices where sources are silent:

1. nash_mp's EMA is over logits, the parameters of a tabular policy, after the step. The target is
   used in differences alone, and is not renormalised.
2. egpo and mmd draw y and y' uniformly, as EGPO's theory does. Their exact gradient steps are then
   the proximal updates with sβ = 4·step/A. mmd is egpo without its half step.
3. Where y and y' have one distribution, a sample takes the mean of both arms, which are equal in
   expectation: NashMP's estimator, halved so that its mean is ∇J.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from nash_jax.games import checks, preference
from nash_jax.games.base import Draws, Game, Knobs, Policies, State, check, check_knob
from nash_jax.games.checks import AnyArray, Values
from nash_jax.games.proximal import mixture
from nash_jax.validation import one_of

_LogPolicy = Float[AnyArray, "*#X A"]
Step = Callable[[State, Game, Knobs, Draws], Policies]
# (P, pull of y, pull of y', β) -> coefficient of log π(y)
Loss = Callable[[Array, Array, Array, Values], AnyArray]


def _policy_gradient(p: Array, own: Array, other: Array, beta: Values) -> AnyArray:
  """Of -P(π≻y') + β KL(π‖ref) + β/η KL(π‖centre)."""
  return 0.5 - p + beta * own


def _regression(p: Array, own: Array, other: Array, beta: Values) -> AnyArray:
  """Of (Δ - (P - ½)/β)², with Δ = pull(y) - pull(y')."""
  return 4 * (own - other - (p - 0.5) / beta)


def _logistic(p: Array, own: Array, other: Array, beta: Values) -> AnyArray:
  """Of -P log σ(βΔ) - (1-P) log σ(-βΔ)."""
  return 2 * beta * (jax.nn.sigmoid(beta * (own - other)) - p)


LOSSES: dict[str, Loss] = {
  "policy_gradient": _policy_gradient,
  "regression": _regression,
  "logistic": _logistic,
}


def gradient(
  loss: str,
  game: Game,
  logp: _LogPolicy,
  draws: Draws,
  opponent: _LogPolicy | None = None,
  judge: _LogPolicy | None = None,
  centre: _LogPolicy | None = None,
  eta: Values = 1.0,
) -> Float[Array, "*X A"]:
  """Returns the gradient on logits of a loss, expected or sampled.

  Examples:
    >>> import numpy as np
    >>> from nash_jax.games import solvers
    >>> game = solvers.Game(np.array([[0.5, 0.75], [0.25, 0.5]]), np.log([0.5, 0.5]), beta=0.1)
    >>> exact = solvers.gradient("policy_gradient", game, game.log_ref, solvers.Draws(None))
    >>> exact.tolist()  # downhill is towards the first action
    [-0.0625, 0.0625]

  Args:
    loss: a name of LOSSES: policy_gradient, regression or logistic.
    logp: log-probabilities of the policy; all policies here are that, in nats.
    opponent: plays y'; by default y and y' come from the policy itself.
    judge: plays y'', whose comparisons with y and y' replace P(y≻y') by ½ + P(y≻y'') - P(y'≻y''),
      EGPO's label; y and y' are then uniform.
    centre: the prox centre, for methods that have one.
    eta: its η.

  Raises:
    ValueError: another loss, what `base.check` refuses, η out of its range, or a negative batch.
  """
  check(game)
  checks.log_distribution("logp", logp, np.shape(game.p_win)[:-1])
  check_knob("eta", eta)
  one_of("loss", loss, LOSSES)
  checks.count("batch", draws.batch, least=0)
  pull = jnp.asarray(logp - game.log_ref)
  if centre is not None:
    pull = pull + (logp - centre) / eta
  first = jnp.asarray(logp)
  if judge is not None:  # uniform
    first = jnp.full_like(first, -jnp.log(logp.shape[-1]))
  expected = functools.partial(_sampled, draws) if draws.batch else _enumerated
  total = expected(LOSSES[loss], game, pull, first, opponent, judge)
  return total - jnp.exp(logp) * jnp.sum(total, -1, keepdims=True)


def _enumerated(
  loss: Loss,
  game: Game,
  pull: Array,
  first: Array,
  opponent: _LogPolicy | None,
  judge: _LogPolicy | None,
) -> Float[Array, "*X A"]:
  """Returns the sum over all pairs, for every y; `first` is who plays it."""
  others = jnp.exp(first if opponent is None else opponent)
  if loss is _logistic:
    p_win = jnp.asarray(game.p_win)
    each = loss(p_win, pull[..., :, None], pull[..., None, :], game.beta)
    return jnp.exp(first) * jnp.einsum("...ab,...b->...a", each, others)

  def mean(values: Array) -> Array:
    return jnp.sum(others * values, -1, keepdims=True)

  wins = preference.win_rates(game.p_win, others if judge is None else jnp.exp(judge))
  if judge is not None:
    wins = 0.5 + wins - mean(wins)
  # affine in what y' brings, so that its mean over y' is its value at the means
  return jnp.exp(first) * loss(wins, pull, mean(pull), game.beta)


def _sampled(
  draws: Draws,
  loss: Loss,
  game: Game,
  pull: Array,
  first: Array,
  opponent: _LogPolicy | None,
  judge: _LogPolicy | None,
) -> Float[Array, "*X A"]:
  """Returns the mean over sampled pairs, at the actions that were drawn."""
  actions = pull.shape[-1]
  players = [first, first if opponent is None else opponent, *([] if judge is None else [judge])]
  shape = (len(players), *pull.shape[:-1], draws.batch)
  uniform = jax.random.uniform(_key(draws), shape, jnp.float32)
  y, other, *third = (_draw(player, u) for player, u in zip(players, uniform, strict=True))
  flat = game.p_win.reshape(*pull.shape[:-1], actions**2)

  def wins(a: Array, b: Array) -> Array:
    return jnp.take_along_axis(flat, a * actions + b, -1)

  p = 0.5 + wins(y, *third) - wins(other, *third) if third else wins(y, other)
  own_pull, other_pull = (jnp.take_along_axis(pull, i, -1) for i in (y, other))
  arms = [(y, loss(p, own_pull, other_pull, game.beta))]
  if opponent is None:
    arms.append((other, loss(1 - p, other_pull, own_pull, game.beta)))
  totals = [jnp.sum(jax.nn.one_hot(i, actions, dtype=a.dtype) * a[..., None], -2) for i, a in arms]
  return sum(totals[1:], totals[0]) / (draws.batch * len(arms))


def _key(draws: Draws) -> Array:
  if draws.key is None:
    raise ValueError("draws.key: expected a key, got None. Give jax.random.key(0).")
  return draws.key


def _draw(log_p: _LogPolicy, uniform: Float[Array, "... batch"]) -> Array:
  """Returns actions [... batch] of log-probabilities [... A], by inverse cdf of uniform."""
  cdf = jnp.cumsum(jnp.exp(log_p), -1)
  index = jnp.sum(uniform[..., None] * cdf[..., None, -1:] >= cdf[..., None, :], -1)
  return jnp.minimum(index, log_p.shape[-1] - 1)


def _descend(
  loss: str,
  game: Game,
  logp: _LogPolicy,
  step: Values,
  draws: Draws,
  opponent: _LogPolicy | None = None,
  judge: _LogPolicy | None = None,
  centre: _LogPolicy | None = None,
  eta: Values = 1.0,
) -> Float[Array, "*X A"]:
  slope = gradient(loss, game, logp, draws, opponent, judge, centre, eta)
  return jax.nn.log_softmax(logp - step * slope)


def _self_play(loss: str, state: State, game: Game, knobs: Knobs, draws: Draws) -> Policies:
  check(game, knobs, state)
  return _descend(loss, game, state.logp, knobs.step, draws), state.other


def nash_mp(state: State, game: Game, knobs: Knobs, draws: Draws) -> Policies:
  """Regularised self-play with a KL to a target that follows by κ (2505.19731, section 5).

  This is the method that trains language models as `nash_mp`. `other` is the target.

  Examples:
    >>> import numpy as np
    >>> from nash_jax.games import gradients, solvers
    >>> game = solvers.Game(np.array([[0.5, 0.75], [0.25, 0.5]]), np.log([0.5, 0.5]), beta=0.1)
    >>> state, knobs = solvers.init(game.log_ref), solvers.Knobs(1.0, 0.2, kappa=0.1, mixture=0.0)
    >>> logp, target = gradients.nash_mp(state, game, knobs, solvers.Draws(None))
    >>> np.asarray(np.exp(logp)).round(3).tolist()
    [0.531, 0.469]
  """
  check(game, knobs, state)
  new = _descend(
    "policy_gradient", game, state.logp, knobs.step, draws, centre=state.other, eta=knobs.eta
  )
  return new, knobs.kappa * new + (1 - knobs.kappa) * state.other


def nash_mp_two_step(state: State, game: Game, knobs: Knobs, draws: Draws) -> Policies:
  """Both halves of NashMP by `inner` gradient steps each, against frozen copies (2505.19731).

  `other` becomes the half iterate.

  Examples:
    >>> import jax, numpy as np
    >>> from nash_jax.games import gradients, solvers
    >>> game = solvers.Game(np.array([[0.5, 0.75], [0.25, 0.5]]), np.log([0.5, 0.5]), beta=0.1)
    >>> state, knobs = solvers.init(game.log_ref), solvers.Knobs(1.0, 0.2, 0.0, 0.0)
    >>> draws = solvers.Draws(jax.random.key(0), inner=100)  # exact: the key draws nothing
    >>> logp, half = gradients.nash_mp_two_step(state, game, knobs, draws)
    >>> np.asarray(np.exp(half)).round(3).tolist()  # as the closed half step, s = η/(β(1+η))
    [0.603, 0.397]
  """
  check(game, knobs, state)

  def half(opponent: Array, key: Array) -> tuple[Array, Array]:
    def body(i: Array, logp: Array) -> Array:
      now = draws._replace(key=jax.random.fold_in(key, i))
      return _descend(
        "policy_gradient",
        game,
        logp,
        knobs.step,
        now,
        opponent=opponent,
        centre=state.logp,
        eta=knobs.eta,
      )

    new = jax.lax.fori_loop(0, draws.inner, body, opponent)
    return new, new

  new, (middle, _) = jax.lax.scan(half, jnp.asarray(state.logp), jax.random.split(_key(draws)))
  return new, middle


def nash_md(state: State, game: Game, knobs: Knobs, draws: Draws) -> Policies:
  """Nash-MD-PG: against the geometric mixture with weight m of the reference (2312.00886).

  `other` becomes that mixture.

  Examples:
    >>> import numpy as np
    >>> from nash_jax.games import gradients, solvers
    >>> game = solvers.Game(np.array([[0.5, 0.75], [0.25, 0.5]]), np.log([0.5, 0.5]), beta=0.1)
    >>> state, knobs = solvers.init(game.log_ref), solvers.Knobs(1.0, 0.2, 0.0, mixture=0.25)
    >>> logp, mixed = gradients.nash_md(state, game, knobs, solvers.Draws(None))
    >>> np.asarray(np.exp(logp)).round(3).tolist()
    [0.531, 0.469]
  """
  check(game, knobs, state)
  mixed = mixture(state, game, knobs.mixture)
  return _descend("policy_gradient", game, state.logp, knobs.step, draws, opponent=mixed), mixed


def mmd(state: State, game: Game, knobs: Knobs, draws: Draws) -> Policies:
  """Mirror descent by regression on uniform pairs, labelled by a third draw from π_t (2503.08942).

  Examples:
    >>> import numpy as np
    >>> from nash_jax.games import gradients, solvers
    >>> game = solvers.Game(np.array([[0.5, 0.75], [0.25, 0.5]]), np.log([0.5, 0.5]), beta=0.1)
    >>> state, knobs = solvers.init(game.log_ref), solvers.Knobs(0.05, 0.2, 0.0, 0.0)
    >>> logp, _ = gradients.mmd(state, game, knobs, solvers.Draws(None))
    >>> np.asarray(np.exp(logp)).round(3).tolist()  # the closed step with s = 4·step/(Aβ) = 1
    [0.562, 0.438]
  """
  check(game, knobs, state)
  return _descend("regression", game, state.logp, knobs.step, draws, judge=state.logp), state.other


def egpo(state: State, game: Game, knobs: Knobs, draws: Draws) -> Policies:
  """EGPO by regression on uniform pairs: both halves start at θ_t (2503.08942).

  `other` becomes the half iterate.

  Examples:
    >>> import jax, numpy as np
    >>> from nash_jax.games import gradients, solvers
    >>> game = solvers.Game(np.array([[0.5, 0.75], [0.25, 0.5]]), np.log([0.5, 0.5]), beta=0.1)
    >>> state, knobs = solvers.init(game.log_ref), solvers.Knobs(0.05, 0.2, 0.0, 0.0)
    >>> draws = solvers.Draws(jax.random.key(0))  # exact gradients: the key draws nothing
    >>> logp, half = gradients.egpo(state, game, knobs, draws)
    >>> np.asarray(np.exp(half)).round(3).tolist()
    [0.562, 0.438]
  """
  check(game, knobs, state)
  first, second = jax.random.split(_key(draws))
  half, _ = mmd(state, game, knobs, draws._replace(key=first))
  now = draws._replace(key=second)
  return _descend("regression", game, state.logp, knobs.step, now, judge=half), half


GRADIENT: dict[str, Step] = {
  "reg_self_play": functools.partial(_self_play, "policy_gradient"),
  "online_ipo": functools.partial(_self_play, "regression"),
  "online_dpo": functools.partial(_self_play, "logistic"),
  "nash_md": nash_md,
  "mmd": mmd,
  "egpo": egpo,
  "nash_mp": nash_mp,
  "nash_mp_two_step": nash_mp_two_step,
}

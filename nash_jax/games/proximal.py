"""Proximal updates: exact steps in closed form, θ⁺ = (1 - sβ)·θ_base + sβ·θ_ref + s·P(·≻opponent).

Each is a pure step (state, game, knobs) -> (logp, other), the next iterate and the second policy of
the state, as log-probabilities. Steps run under jit and vmap. They raise ValueError, outside jit,
for what `base.check` refuses.

Choices where sources are silent:

1. Logits are renormalised after each step, which only changes their gauge.
2. fictitious_play's iterate is the mean of its past best responses: soft ones at β > 0, where that
   mean converges to π*, hard ones at β = 0.
3. mpo's magnet is the reference only until its first reset, so it solves the original game.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nash_jax.games import preference
from nash_jax.games.base import Game, Knobs, Policies, State, check
from nash_jax.games.checks import AnyArray, Values

_LogPolicy = Float[AnyArray, "*#X A"]
Step = Callable[[State, Game, Knobs], Policies]


def prox(
  game: Game, step: Values, log_base: _LogPolicy, log_opponent: _LogPolicy
) -> Float[Array, "*X A"]:
  """Returns the maximiser of <π, P o> - β KL(π‖ref) - (1/s - β) KL(π‖base), as log-probabilities.

  Examples:
    >>> import numpy as np
    >>> from nash_jax.games import proximal, solvers
    >>> log_ref = np.log([0.5, 0.5])
    >>> game = solvers.Game(np.array([[0.5, 0.75], [0.25, 0.5]]), log_ref, beta=0.1)
    >>> np.asarray(np.exp(proximal.prox(game, 1.0, log_ref, log_ref))).round(3).tolist()
    [0.562, 0.438]

  Args:
    step: s, in (0, 1/β].
    log_base: the prox centre.
    log_opponent: o, whom the actions are compared with.
  """
  wins = preference.win_rates(game.p_win, jnp.exp(log_opponent))
  shrink = step * game.beta
  return jax.nn.log_softmax((1 - shrink) * log_base + shrink * game.log_ref + step * wins)


def mixture(state: State, game: Game, weight: Values) -> Float[Array, "*X A"]:
  """Returns the geometric mixture π^{1-m} ref^m, as log-probabilities.

  Examples:
    >>> import numpy as np
    >>> from nash_jax.games import proximal, solvers
    >>> game = solvers.Game(np.full((2, 2), 0.5), np.log([0.5, 0.5]), beta=0.1)
    >>> state = solvers.init(np.log([0.2, 0.8]))
    >>> np.asarray(np.exp(proximal.mixture(state, game, 0.5))).round(3).tolist()
    [0.333, 0.667]

  Args:
    weight: m in [0, 1], of the reference.
  """
  return jax.nn.log_softmax((1 - weight) * state.logp + weight * game.log_ref)


def nash_mp(state: State, game: Game, knobs: Knobs) -> Policies:
  """NashMP, and EGPO alike: a half step, then the step against it (2505.19731; 2503.08942).

  `other` becomes the half iterate π_{k+1/2}.

  Examples:
    >>> import numpy as np
    >>> from nash_jax.games import solvers
    >>> game = solvers.Game(np.array([[0.5, 0.75], [0.25, 0.5]]), np.log([0.5, 0.5]), beta=0.1)
    >>> state, knobs = solvers.init(game.log_ref), solvers.Knobs(1.0, 0.2, 0.0, 0.0)
    >>> logp, half = solvers.nash_mp(state, game, knobs)
    >>> np.asarray(np.exp(logp)).round(3).tolist()
    [0.562, 0.438]
  """
  check(game, knobs, state)
  half = prox(game, knobs.step, state.logp, state.logp)
  return prox(game, knobs.step, state.logp, half), half


def proximal_point(state: State, game: Game, knobs: Knobs, inner: int = 60) -> Policies:
  """The ideal method, whose opponent is π_{k+1} itself (2505.19731).

  Examples:
    >>> import numpy as np
    >>> from nash_jax.games import solvers
    >>> game = solvers.Game(np.array([[0.5, 0.75], [0.25, 0.5]]), np.log([0.5, 0.5]), beta=0.1)
    >>> state, knobs = solvers.init(game.log_ref), solvers.Knobs(1.0, 0.2, 0.0, 0.0)
    >>> logp, _ = solvers.proximal_point(state, game, knobs)
    >>> np.asarray(np.exp(logp)).round(3).tolist()
    [0.562, 0.438]

  Args:
    inner: rounds by which π_{k+1} is found; they contract for s < 2.
  """
  check(game, knobs, state)

  def round_of(_: Array, guess: Array) -> Array:
    return prox(game, knobs.step, state.logp, guess)

  return jax.lax.fori_loop(0, inner, round_of, jnp.asarray(state.logp)), state.logp


def mmd(state: State, game: Game, knobs: Knobs) -> Policies:
  """Magnetic mirror descent, also known as MD and INPO (2206.05825; 2407.00617).

  Examples:
    >>> import numpy as np
    >>> from nash_jax.games import solvers
    >>> game = solvers.Game(np.array([[0.5, 0.75], [0.25, 0.5]]), np.log([0.5, 0.5]), beta=0.1)
    >>> state, knobs = solvers.init(game.log_ref), solvers.Knobs(1.0, 0.2, 0.0, 0.0)
    >>> logp, _ = solvers.mmd(state, game, knobs)
    >>> np.asarray(np.exp(logp)).round(3).tolist()
    [0.562, 0.438]
  """
  check(game, knobs, state)
  return prox(game, knobs.step, state.logp, state.logp), state.other


def mpo(state: State, game: Game, knobs: Knobs) -> Policies:
  """MMD to a magnet that moves to the iterate every M steps: κ = periodic(M) (2410.16714).

  `other` is the magnet.

  Examples:
    >>> import numpy as np
    >>> from nash_jax.games import solvers
    >>> game = solvers.Game(np.array([[0.5, 0.75], [0.25, 0.5]]), np.log([0.5, 0.5]), beta=0.1)
    >>> state, knobs = solvers.init(game.log_ref), solvers.Knobs(1.0, 0.2, 1.0, 0.0)
    >>> logp, magnet = solvers.mpo(state, game, knobs)
    >>> bool((magnet == logp).all())
    True
  """
  check(game, knobs, state)
  new = prox(game._replace(log_ref=state.other), knobs.step, state.logp, state.logp)
  return new, jnp.where(knobs.kappa > 0, new, state.other)


def nash_md(state: State, game: Game, knobs: Knobs) -> Policies:
  """Nash-MD: against the geometric mixture π^{1-sβ} ref^{sβ} (2312.00886).

  `other` becomes that mixture.

  Examples:
    >>> import numpy as np
    >>> from nash_jax.games import solvers
    >>> game = solvers.Game(np.array([[0.5, 0.75], [0.25, 0.5]]), np.log([0.5, 0.5]), beta=0.1)
    >>> state, knobs = solvers.init(game.log_ref), solvers.Knobs(1.0, 0.2, 0.0, 0.0)
    >>> logp, opponent = solvers.nash_md(state, game, knobs)
    >>> np.asarray(np.exp(opponent)).round(3).tolist()
    [0.5, 0.5]
  """
  check(game, knobs, state)
  opponent = mixture(state, game, knobs.step * game.beta)
  return prox(game, knobs.step, state.logp, opponent), opponent


def mwu(state: State, game: Game, knobs: Knobs) -> Policies:
  """Multiplicative weights, SPPO's population form; β plays no part (2405.00675).

  `other` is the mean of the iterates so far, which converges where the last one circles.

  Examples:
    >>> import numpy as np
    >>> from nash_jax.games import solvers
    >>> game = solvers.Game(np.array([[0.5, 0.75], [0.25, 0.5]]), np.log([0.5, 0.5]), beta=0.0)
    >>> state, knobs = solvers.init(game.log_ref), solvers.Knobs(1.0, 0.2, 0.0, 0.0)
    >>> logp, mean = solvers.mwu(state, game, knobs)
    >>> np.asarray(np.exp(mean)).round(3).tolist()
    [0.5, 0.5]
  """
  check(game, knobs, state)
  mean = jnp.exp(state.other) + (jnp.exp(state.logp) - jnp.exp(state.other)) / (state.k + 1)
  return prox(game._replace(beta=0.0), knobs.step, state.logp, state.logp), jnp.log(mean)


def omwu(state: State, game: Game, knobs: Knobs) -> Policies:
  """Optimistic MWU, ONPO's population form; β plays no part (2006.09517; 2502.16852).

  `other` is the auxiliary iterate.

  Examples:
    >>> import numpy as np
    >>> from nash_jax.games import solvers
    >>> game = solvers.Game(np.array([[0.5, 0.75], [0.25, 0.5]]), np.log([0.5, 0.5]), beta=0.0)
    >>> state, knobs = solvers.init(game.log_ref), solvers.Knobs(1.0, 0.2, 0.0, 0.0)
    >>> logp, auxiliary = solvers.omwu(state, game, knobs)
    >>> np.asarray(np.exp(auxiliary)).round(3).tolist()
    [0.562, 0.438]
  """
  check(game, knobs, state)
  free = game._replace(beta=0.0)
  auxiliary = prox(free, knobs.step, state.other, state.logp)
  return prox(free, knobs.step, auxiliary, state.logp), auxiliary


def fictitious_play(state: State, game: Game, knobs: Knobs) -> Policies:
  """Best response to the mean of past policies; the iterate is that mean, `other` the response.

  It has a step of its own, 1/(t+2), and reads no knobs.

  Examples:
    >>> import numpy as np
    >>> from nash_jax.games import solvers
    >>> game = solvers.Game(np.array([[0.5, 0.75], [0.25, 0.5]]), np.log([0.5, 0.5]), beta=0.1)
    >>> state, knobs = solvers.init(game.log_ref), solvers.Knobs(1.0, 0.2, 0.0, 0.0)
    >>> logp, best = solvers.fictitious_play(state, game, knobs)
    >>> np.asarray(np.exp(best)).round(3).tolist()
    [0.924, 0.076]
  """
  check(game, knobs, state)
  wins = preference.win_rates(game.p_win, jnp.exp(state.logp))
  positive = game.beta >= jnp.finfo(wins.dtype).tiny  # wins can be divided by it
  soft = jax.nn.softmax(game.log_ref + wins / jnp.where(positive, game.beta, 1))
  hard = jax.nn.one_hot(jnp.argmax(wins, -1), wins.shape[-1], dtype=wins.dtype)
  best = jnp.where(positive, soft, hard)
  mean = jnp.exp(state.logp) + (best - jnp.exp(state.logp)) / (state.k + 2)
  return jnp.log(mean), jnp.log(best)


PROXIMAL: dict[str, Step] = {
  "nash_mp": nash_mp,
  "egpo": nash_mp,
  "proximal_point": proximal_point,
  "mmd": mmd,
  "mpo": mpo,
  "nash_md": nash_md,
  "mwu": mwu,
  "omwu": omwu,
  "fictitious_play": fictitious_play,
}

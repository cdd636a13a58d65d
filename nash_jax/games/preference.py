"""Preference games as arrays: what a policy is worth, and how far it is from which equilibrium.

A game is p_win[..., y, y'] = P(y ≻ y'), of shape [A A], or [X A A] with contexts first. A policy is
probabilities [A] or [X A]. Logarithms are natural (nats).

This module is the face of the games: it also offers `validate`, `from_payoff`, the two equilibrium
solvers and the Bradley-Terry fit. All but those run under jit and vmap, in their inputs' precision.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from nash_jax.games import checks
from nash_jax.games.checks import (
  GameLike,
  LogPolicyLike,
  PolicyLike,
  distribution,
  from_payoff,
  log_distribution,
  reference,
  validate,
)
from nash_jax.games.equilibria import equilibrium, nash_equilibrium
from nash_jax.games.rewards import bradley_terry, cyclic_energy, intransitive_residue

__all__ = [
  "best_response",
  "bradley_terry",
  "cyclic_energy",
  "distribution",
  "equilibrium",
  "exploitability",
  "from_payoff",
  "gap",
  "intransitive_residue",
  "kl",
  "log_distribution",
  "nash_equilibrium",
  "reference",
  "span",
  "suboptimality",
  "validate",
  "value",
  "win_rates",
]


def win_rates(p_win: GameLike, opponent: PolicyLike) -> Float[Array, "*X A"]:
  """Returns P(y ≻ opponent) of every action y.

  Examples:
    >>> from nash_jax.games import preference
    >>> p_win = [[0.5, 0.75], [0.25, 0.5]]
    >>> preference.win_rates(p_win, [0.0, 1.0]).tolist()
    [0.75, 0.5]

  Args:
    p_win: the game, [A A] or [X A A].
    opponent: probabilities, of the same contexts as the game.

  Raises:
    ValueError: not a game, or not probabilities of its actions.
  """
  checks.actions_and_policies(p_win, opponent=opponent)
  return _win_rates(jnp.asarray(p_win), jnp.asarray(opponent))


def _win_rates(p_win: Array, opponent: Array) -> Array:
  return jnp.einsum("...ab,...b->...a", p_win, opponent)


def value(p_win: GameLike, policy: PolicyLike, opponent: PolicyLike) -> Float[Array, "*X"]:
  """Returns P(policy ≻ opponent), one number a context.

  Examples:
    >>> from nash_jax.games import preference
    >>> p_win = [[0.5, 0.75], [0.25, 0.5]]
    >>> float(preference.value(p_win, [1.0, 0.0], [0.5, 0.5]))
    0.625

  Args:
    p_win: the game, [A A] or [X A A].
    policy: probabilities, of the same contexts as the game.
    opponent: likewise.

  Raises:
    ValueError: not a game, or not probabilities of its actions.
  """
  checks.actions_and_policies(p_win, policy=policy, opponent=opponent)
  wins = _win_rates(jnp.asarray(p_win), jnp.asarray(opponent))
  return jnp.sum(jnp.asarray(policy) * wins, -1)


def kl(log_p: LogPolicyLike, log_q: LogPolicyLike) -> Float[Array, "*X"]:
  """Returns KL(p‖q) in nats, one number a context, accurate also where it is tiny.

  Every summand is p·(δ + e^{-δ} - 1) ≥ 0 with δ = log p - log q: none cancels another.

  Examples:
    >>> import numpy as np
    >>> from nash_jax.games import preference
    >>> round(float(preference.kl(np.log([0.5, 0.5]), np.log([0.25, 0.75]))), 4)
    0.1438

  Args:
    log_p: log-probabilities in nats; -inf is an action that p never plays.
    log_q: likewise.

  Raises:
    ValueError: not log-probabilities, or of different actions.
  """
  log_p, log_q = checks.log_pair(log_p, log_q)
  p = jnp.exp(log_p)
  delta = jnp.where(p > 0, log_p - log_q, 0)
  rare = delta < -80  # e^{-δ} overflows soon, where p·e^{-δ} = q is a number like any other
  near = jnp.where(rare, 0, delta)
  unlikely = p * delta + jnp.exp(log_q) - p
  summand = jnp.where(rare, unlikely, p * jnp.maximum(near + jnp.expm1(-near), 0))
  return jnp.sum(jnp.where(p > 0, summand, jnp.exp(log_q)), -1)


def span(log_p: LogPolicyLike, log_q: LogPolicyLike) -> Float[Array, "*X"]:
  """Returns the span seminorm, max - min over actions of log p - log q in nats, for each context.

  Examples:
    >>> import numpy as np
    >>> from nash_jax.games import preference
    >>> round(float(preference.span(np.log([0.5, 0.5]), np.log([0.2, 0.8]))), 4)  # log 4
    1.3863

  Args:
    log_p: finite log-probabilities in nats.
    log_q: likewise.

  Raises:
    ValueError: not log-probabilities, one that is -inf, or of different actions.
  """
  log_p, log_q = checks.log_pair(log_p, log_q, full_support=True)
  delta = log_p - log_q
  return jnp.max(delta, -1) - jnp.min(delta, -1)


def best_response(
  p_win: GameLike, policy: PolicyLike, ref: PolicyLike, beta: checks.Number
) -> Float[Array, "*X A"]:
  """Returns the policy that maximises P(·≻policy) - β KL(·‖ref), as probabilities.

  It is ref·exp(P(·≻policy)/β), normalised.

  Examples:
    >>> import numpy as np
    >>> from nash_jax.games import preference
    >>> p_win = [[0.5, 0.75], [0.25, 0.5]]
    >>> best = preference.best_response(p_win, [0.5, 0.5], ref=[0.5, 0.5], beta=0.25)
    >>> np.asarray(best).round(3).tolist()
    [0.731, 0.269]

  Args:
    p_win: the game, [A A] or [X A A].
    policy: probabilities, of the same contexts as the game.
    ref: likewise, with full support.
    beta: KL weight in nats, > 0.

  Raises:
    ValueError: not a game, not probabilities, or β ≤ 0, NaN or infinite.
  """
  checks.number("beta", beta)
  checks.actions_and_policies(p_win, policy=policy, ref=ref)
  wins = _win_rates(jnp.asarray(p_win), jnp.asarray(policy))
  wins = wins - jnp.max(wins, -1, keepdims=True)  # so that a tiny β makes -inf of them, never inf
  weight = jnp.where(beta > 0, jnp.maximum(beta, jnp.finfo(wins.dtype).tiny), jnp.nan)
  return jax.nn.softmax(jnp.log(jnp.asarray(ref)) + wins / weight)


def gap(
  p_win: GameLike, log_policy: LogPolicyLike, log_ref: LogPolicyLike, beta: checks.Values
) -> Float[Array, "*X"]:
  """Returns SubOpt_β = max_{π'} P_β(π'≻π) - ½ of a policy given by its logarithms, a context each.

  It is computed as β·KL(π‖best response to π), which is equal and keeps its relative accuracy near
  0. At β = 0, and below what win rates can be divided by, it is max_y P(y≻π) - ½, the
  exploitability in the original game. Under jit, a β that is NaN or negative gives NaN.

  Examples:
    >>> import numpy as np
    >>> from nash_jax.games import preference, zoo
    >>> p_win, uniform = zoo.rock_paper_scissors(0.5, 1.0, 0.8).p_win, np.log(np.full(3, 1 / 3))
    >>> round(float(preference.gap(p_win, uniform, uniform, 0.1)), 4)
    0.0148

  Args:
    p_win: the game, [A A] or [X A A].
    log_policy: log-probabilities in nats.
    log_ref: finite log-probabilities in nats.
    beta: KL weight in nats, ≥ 0: one number, or one for each context.

  Raises:
    ValueError: not a game, not log-probabilities of its actions, or β < 0, NaN or infinite.
  """
  checks.number("beta", beta, zero=True, array=True)
  checks.actions_and_policies(p_win)
  for what, log in (("log_policy", log_policy), ("log_ref", log_ref)):
    checks.log_distribution(what, log, full_support=what == "log_ref")
    checks.same_actions(what, log, np.shape(p_win)[-1])
  return _gap(jnp.asarray(p_win), jnp.asarray(log_policy), jnp.asarray(log_ref), beta)


def _gap(p_win: Array, log_policy: Array, log_ref: Array, beta: checks.Values) -> Array:
  wins = _win_rates(p_win, jnp.exp(log_policy))
  positive = beta >= jnp.finfo(wins.dtype).tiny
  log_best = jax.nn.log_softmax(log_ref + wins / jnp.where(positive, beta, 1))
  original = jnp.where(beta >= 0, jnp.max(wins, -1) - 0.5, jnp.nan)
  return jnp.where(positive, beta * kl(log_policy, log_best), original)


def suboptimality(
  p_win: GameLike, policy: PolicyLike, ref: PolicyLike, beta: checks.Number
) -> Float[Array, ""]:
  """Returns SubOpt_β of a policy, averaged over contexts: 0 at the regularised equilibrium only.

  What other code calls the duality gap is twice this.

  Examples:
    >>> import numpy as np
    >>> from nash_jax.games import preference, zoo
    >>> p_win, ref = zoo.rock_paper_scissors(0.5, 1.0, 0.8).p_win, np.full(3, 1 / 3)
    >>> round(float(preference.suboptimality(p_win, ref, ref, beta=0.1)), 4)
    0.0148
    >>> star = preference.equilibrium(p_win, ref, beta=0.1)
    >>> bool(preference.suboptimality(p_win, star, ref, beta=0.1) < 1e-9)
    True

  Args:
    p_win: the game, [A A] or [X A A].
    policy: probabilities [A], shared by the contexts, or [X A].
    ref: likewise, with full support.
    beta: KL weight in nats, ≥ 0.

  Raises:
    ValueError: not a game, not probabilities, a reference without full support, or β < 0, NaN or
      infinite.
  """
  checks.number("beta", beta, zero=True)
  checks.game_and_policies(p_win, policy=policy, ref=ref)
  shape = np.shape(p_win)[:-1]
  log_policy, log_ref = (jnp.broadcast_to(jnp.log(jnp.asarray(p)), shape) for p in (policy, ref))
  return jnp.mean(_gap(jnp.asarray(p_win), log_policy, log_ref, beta))


def exploitability(p_win: GameLike, policy: PolicyLike) -> Float[Array, ""]:
  """Returns max_y P(y≻policy) - ½ in the original game, averaged over contexts.

  Examples:
    >>> from nash_jax.games import preference
    >>> p_win = [[0.5, 0.75], [0.25, 0.5]]
    >>> float(preference.exploitability(p_win, [0.0, 1.0]))
    0.25

  Args:
    p_win: the game, [A A] or [X A A].
    policy: probabilities [A], shared by the contexts, or [X A].

  Raises:
    ValueError: not a game, or not probabilities of its actions.
  """
  checks.game_and_policies(p_win, policy=policy)
  wins = _win_rates(jnp.asarray(p_win), jnp.asarray(policy))  # of a policy shared by contexts too
  return jnp.mean(jnp.max(wins, -1) - 0.5)

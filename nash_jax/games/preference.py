"""Preference games as arrays: what a policy is worth and how far it is from which equilibrium.

A game is p_win[..., y, y'] = P(y ≻ y'), shape [A A], or [X A A] with contexts first; a policy is
probabilities [A] or [X A]; logarithms are natural (nats). All but the two equilibrium solvers and
the Bradley-Terry fit is jax and runs under jit and vmap, in the precision of its inputs.
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from scipy.sparse.linalg import LinearOperator, gmres
from scipy.special import expit, softmax

_DENSE_LIMIT = 1500  # above it Newton's linear systems are solved by GMRES, which never forms them


def validate(p_win, atol=1e-5):
  """Returns p_win, [A A] or [X A A], if it is a preference game.

  Raises:
    ValueError: wrong shape, or an entry outside [0, 1], not finite, or whose mirror image does not
      complete it to 1 within atol; the message names the worst entry.
  """
  if p_win.ndim not in (2, 3) or p_win.shape[-1] != p_win.shape[-2] or p_win.size == 0:
    raise ValueError(f"p_win must be [A A] or [X A A], got shape {p_win.shape}.")
  games = np.asarray(p_win).reshape(-1, *p_win.shape[-2:])
  worst, x, i, j = 0.0, 0, 0, 0
  for context, start in itertools.product(range(len(games)), range(0, games.shape[-1], 1024)):
    block = slice(start, start + 1024)  # of rows: a large game is never copied whole
    rows = games[context, block]
    fault = np.maximum(np.abs(rows + games[context, :, block].T - 1), np.abs(rows - 0.5) - 0.5)
    fault = np.where(np.isfinite(fault), fault, np.inf)
    if fault.max() > worst:
      worst, x = fault.max(), context
      i, j = map(int, np.unravel_index(fault.argmax(), fault.shape))
      i += start
  if worst > atol:
    of = f"{x}, " if p_win.ndim == 3 else ""
    raise ValueError(
      "p_win must hold probabilities with P + Pᵀ = 1 (and ½ on the diagonal); worst entry: "
      f"p_win[{of}{i}, {j}] = {games[x, i, j]:.6g} against p_win[{of}{j}, {i}] = "
      f"{games[x, j, i]:.6g}. A payoff M = -Mᵀ in [-1, 1] becomes a game by from_payoff(M).")
  return p_win


def from_payoff(payoff):
  """The game (1 + M)/2 of a payoff in [-1, 1], made exactly antisymmetric against rounded input."""
  payoff = np.asarray(payoff, np.float64)
  return validate(0.5 + (payoff - payoff.swapaxes(-1, -2)) / 4)


def win_rates(p_win, opponent):
  """P(y ≻ opponent) of every action, [... A]."""
  return jnp.einsum("...ab,...b->...a", p_win, opponent)


def value(p_win, policy, opponent):
  """P(policy ≻ opponent), a number a context."""
  return jnp.sum(policy * win_rates(p_win, opponent), -1)


def kl(log_p, log_q):
  """KL(p‖q) in nats of log-probabilities [... A], one number a context, accurate also when tiny.

  Every summand is p·(δ + e^{-δ} - 1) ≥ 0 with δ = log p - log q: none cancels another.
  """
  p = jnp.exp(log_p)
  delta = jnp.where(p > 0, log_p - log_q, 0)
  summand = p * jnp.maximum(delta + jnp.expm1(-delta), 0)
  return jnp.sum(jnp.where(p > 0, summand, jnp.exp(log_q)), -1)


def span(log_p, log_q):
  """max - min over actions of log p - log q (nats), the span seminorm; one number a context."""
  delta = log_p - log_q
  return jnp.max(delta, -1) - jnp.min(delta, -1)


def best_response(p_win, policy, ref, beta):
  """The policy maximising P(·≻policy) - β KL(·‖ref), probabilities [... A], for β > 0."""
  return jax.nn.softmax(jnp.log(ref) + win_rates(p_win, policy) / beta)


def gap(p_win, log_policy, log_ref, beta):
  """SubOpt_β of a policy given by its logarithms, one number a context.

  max_{π'} P_β(π'≻π) - 1/2, computed as β·KL(π‖best response to π), which is equal and keeps its
  relative accuracy near 0; at β = 0 the exploitability max_y P(y≻π) - 1/2 of the original game.
  """
  wins = win_rates(p_win, jnp.exp(log_policy))
  log_best = jax.nn.log_softmax(log_ref + wins / jnp.where(beta > 0, beta, 1))
  return jnp.where(beta > 0, beta * kl(log_policy, log_best), jnp.max(wins, -1) - 0.5)


def suboptimality(p_win, policy, ref, beta):
  """SubOpt_β of probabilities [A] or [X A] against ref, averaged over contexts: a number ≥ 0.

  0 at the regularised equilibrium only; algorithms.md's "duality gap" of other code is twice this.
  """
  log_ref = jnp.broadcast_to(jnp.log(jnp.asarray(ref)), jnp.shape(policy))
  return jnp.mean(gap(jnp.asarray(p_win), jnp.log(jnp.asarray(policy)), log_ref, beta))


def exploitability(p_win, policy):
  """max_y P(y≻policy) - 1/2 in the original game, averaged over contexts."""
  return jnp.mean(jnp.max(win_rates(jnp.asarray(p_win), jnp.asarray(policy)), -1) - 0.5)


def reference(ref, shape):
  """ref, [A] shared by contexts or [X A], as float64 probabilities of a policy's shape.

  Raises:
    ValueError: it is no distribution of full support.
  """
  ref = np.broadcast_to(np.asarray(ref, np.float64), shape)
  if np.any(ref <= 0) or np.any(np.abs(ref.sum(-1) - 1) > 1e-4):
    raise ValueError("ref must be positive probabilities (full support) summing to 1, got least "
                     f"{ref.min():.3g}, sums {ref.sum(-1).min():.6g} to {ref.sum(-1).max():.6g}.")
  return ref


def equilibrium(p_win, ref, beta):
  """The regularised equilibrium π* ∝ ref·exp(P(·≻π*)/β), probabilities [A] or [X A], to 1e-12.

  Damped Newton on the fixed point, following π* from large β down, in float64 whatever jax
  uses. Its Jacobian I - P(diag π - ππᵀ)/β has eigenvalues 1 + iμ for an antisymmetric payoff: it is
  never singular and the path never branches. ref is [A], shared by contexts, or [X A].

  Raises:
    ValueError: not a game, β ≤ 0, or a reference that is no distribution of full support.
    RuntimeError: the fixed point was not reached to 1e-12.
  """
  validate(p_win)
  if not beta > 0:
    raise ValueError(f"beta must be > 0, got {beta}; the original game is nash_equilibrium's.")
  p_win = np.asarray(p_win, np.float64)
  log_ref = np.log(reference(ref, p_win.shape[:-1]))
  if p_win.ndim == 2:
    return jnp.asarray(_equilibrium(p_win, log_ref, float(beta)))
  return jnp.stack([_equilibrium(*game, float(beta)) for game in zip(p_win, log_ref, strict=True)])


def _equilibrium(p_win, log_ref, beta):
  theta = log_ref
  for b in beta * 2.0 ** np.arange(max(0, math.ceil(-math.log2(beta))), -1, -1):
    theta = log_ref + p_win @ softmax(theta) / b  # the win rates hardly move with β; the logits do

    def residual(t, b=b):
      return t - log_ref - p_win @ softmax(t) / b

    r, enough = residual(theta), 1e-13 if b == beta else 1e-3  # the path only has to lead there
    for _ in range(200):
      if np.abs(r).max() < enough:
        break
      direction, damping = _newton_direction(p_win, softmax(theta), b, r), 1.0
      while damping > 1e-8 and not (
        np.linalg.norm(new := residual(theta + damping * direction)) < np.linalg.norm(r)
      ):
        damping /= 2
      if damping <= 1e-8:  # rounding is reached
        break
      theta, r = theta + damping * direction, new
  pi = softmax(theta)
  error = np.abs(pi - softmax(log_ref + p_win @ pi / beta)).max()
  if not error < 1e-12:
    raise RuntimeError(f"equilibrium stopped {error:.2g} away from its fixed point at beta={beta}, "
                       "wanted 1e-12: a smaller beta than float64 resolves for this game.")
  return pi


def _newton_direction(p_win, pi, beta, residual):
  if len(pi) <= _DENSE_LIMIT:
    jacobian = np.eye(len(pi)) - (p_win - (p_win @ pi)[:, None]) * pi / beta
    return np.linalg.solve(jacobian, -residual)
  operator = LinearOperator(
    p_win.shape, lambda v: v - p_win @ (pi * (v - pi @ v)) / beta, dtype=np.float64)
  return gmres(operator, -residual, rtol=1e-8, restart=60, maxiter=20)[0]


def nash_equilibrium(p_win):
  """One symmetric equilibrium of the original game by linear programming, [A] or [X A].

  Where several exist (a tie among best mixtures) it is a vertex of their set.
  """
  validate(p_win)
  games = np.asarray(p_win, np.float64)
  if games.ndim == 3:
    return jnp.stack([nash_equilibrium(game) for game in games])
  actions = len(games)
  result = scipy.optimize.linprog(  # maximise v with Σ_y π(y) P(y≻y') ≥ v for every y'
    np.r_[np.zeros(actions), -1.0],
    A_ub=np.c_[-games.T, np.ones(actions)], b_ub=np.zeros(actions),
    A_eq=np.r_[np.ones(actions), 0.0][None], b_eq=[1.0],
    bounds=[(0, None)] * actions + [(None, None)], method="highs",
  )
  if not result.success:
    raise RuntimeError(f"the linear program failed: {result.message}")
  pi = np.maximum(result.x[:actions], 0)
  return jnp.asarray(pi / pi.sum())


def bradley_terry(p_win, weights=None, ridge=1e-9):
  """Scores R [A], mean 0, minimising Σ w·cross-entropy(P(y≻y'), σ(R(y) - R(y'))) over pairs.

  Args:
    weights: how often each pair is compared, [A A], symmetrised here; all pairs alike by default.
    ridge: weight of ΣR²; keeps scores finite when a pair is decided for certain.
  """
  p_win = np.asarray(validate(p_win), np.float64)
  if p_win.ndim != 2:
    raise ValueError(f"bradley_terry fits one game [A A], got shape {p_win.shape}.")
  weights = np.ones_like(p_win) if weights is None else np.asarray(weights, np.float64)
  weights = (weights + weights.T) / 2
  weights = weights / weights.sum()

  def loss(scores):
    margin = scores[:, None] - scores
    return (weights * (np.logaddexp(0, margin) - p_win * margin)).sum() + ridge * scores @ scores

  def gradient(scores):
    return 2 * (weights * (expit(scores[:, None] - scores) - p_win)).sum(1) + 2 * ridge * scores

  def hessian(scores):
    fit = expit(scores[:, None] - scores)
    slope = fit * (1 - fit) * weights * 2
    return np.diag(slope.sum(1) + 2 * ridge) - slope

  fit = scipy.optimize.minimize(loss, np.zeros(len(p_win)), jac=gradient, hess=hessian,
                                method="trust-exact", options={"gtol": 1e-12, "maxiter": 500})
  return jnp.asarray(fit.x - fit.x.mean())


def intransitive_residue(p_win, weights=None):
  """P - σ(R(y) - R(y')) [A A] at the Bradley-Terry fit: what no reward can express."""
  scores = bradley_terry(p_win, weights)
  return jnp.asarray(p_win) - jax.nn.sigmoid(scores[:, None] - scores[None, :])


def cyclic_energy(p_win):
  """Share in [0, 1] of Σ (P - ½)² that no differences of row means explain (Hodge's curl part)."""
  payoff = jnp.asarray(p_win) - 0.5
  mean = payoff.mean(-1)
  curl = payoff - (mean[..., :, None] - mean[..., None, :])
  return jnp.sum(curl**2, (-1, -2)) / jnp.sum(payoff**2, (-1, -2))

"""Preference games as arrays: what a policy is worth and how far it is from which equilibrium.

A game is p_win[..., y, y'] = P(y ≻ y'), shape [A A], or [X A A] with contexts first; a policy is
probabilities [A] or [X A]; logarithms are natural (nats). All but the two equilibrium solvers and
the Bradley-Terry fit is jax and runs under jit and vmap, in the precision of its inputs.
"""

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
import scipy.sparse.linalg
import scipy.special

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
  worst = (0.0, None)
  for x, game in enumerate(games):
    for start in range(0, len(game), 1024):  # by blocks of rows: a large game is never copied whole
      rows = game[start : start + 1024]
      outside = np.maximum(np.maximum(-rows, rows - 1), 0)
      fault = np.maximum(np.abs(rows + game[:, start : start + 1024].T - 1), outside)
      fault = np.where(np.isfinite(fault), fault, np.inf)
      i, j = np.unravel_index(np.argmax(fault), fault.shape)
      if fault[i, j] > worst[0]:
        worst = (fault[i, j], (x, start + i, j))
  if worst[0] > atol:
    x, i, j = worst[1]
    context = f"{x}, " if p_win.ndim == 3 else ""
    where, mirror = f"{context}{i}, {j}", f"{context}{j}, {i}"
    raise ValueError(
      f"p_win must hold probabilities with P + Pᵀ = 1 (and ½ on the diagonal); worst entry: "
      f"p_win[{where}] = {games[x, i, j]:.6g} against p_win[{mirror}] = {games[x, j, i]:.6g}. "
      "A payoff M = -Mᵀ in [-1, 1] becomes a game by preference.from_payoff(M)."
    )
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
  p, q = jnp.exp(log_p), jnp.exp(log_q)
  delta = jnp.where(p > 0, log_p - log_q, 0)
  near = jnp.abs(delta) < 1
  close = p * jnp.maximum(delta + jnp.expm1(-jnp.where(near, delta, 0)), 0)
  far = jnp.where(p > 0, p * delta, 0) + q - p
  return jnp.sum(jnp.where(near & (p > 0), close, far), -1)


def span(log_p, log_q):
  """max - min over actions of log p - log q (nats), the span seminorm; one number a context."""
  delta = log_p - log_q
  return jnp.max(delta, -1) - jnp.min(delta, -1)


def log_best_response(p_win, log_policy, log_ref, beta):
  """log of π_ref·exp(P(·≻π)/β)/Z, [... A], for β > 0."""
  return jax.nn.log_softmax(log_ref + win_rates(p_win, jnp.exp(log_policy)) / beta)


def best_response(p_win, policy, ref, beta):
  """The policy maximising P(·≻policy) - β KL(·‖ref), probabilities [... A], for β > 0."""
  return jnp.exp(log_best_response(p_win, jnp.log(policy), jnp.log(ref), beta))


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


def equilibrium(p_win, ref, beta):
  """The regularised equilibrium π* ∝ ref·exp(P(·≻π*)/β), probabilities [A] or [X A], to 1e-12.

  Damped Newton on the fixed point, following π* from large β down, in float64 whatever jax uses.
  Its Jacobian I - P(diag π - ππᵀ)/β has eigenvalues 1 + iμ for an antisymmetric payoff: it is never
  singular and the path never branches. ref is [A], shared by contexts, or [X A], all positive.

  Raises:
    ValueError: not a game, β ≤ 0, or a reference that is no distribution of full support.
    RuntimeError: the fixed point was not reached to 1e-12.
  """
  validate(p_win)
  if not beta > 0:
    raise ValueError(f"beta must be > 0, got {beta}; the original game is nash_equilibrium's.")
  games = np.asarray(p_win, np.float64)
  refs = np.broadcast_to(np.asarray(ref, np.float64), games.shape[:-1])
  if np.any(refs <= 0) or np.any(np.abs(refs.sum(-1) - 1) > 1e-4):
    raise ValueError(f"ref must be positive probabilities summing to 1, got least {refs.min():.3g} "
                     f"and sums in [{refs.sum(-1).min():.6g}, {refs.sum(-1).max():.6g}].")
  shape = refs.shape
  games, refs = games.reshape(-1, *games.shape[-2:]), refs.reshape(-1, shape[-1])
  solved = [_equilibrium(game, np.log(r), float(beta)) for game, r in zip(games, refs, strict=True)]
  return jnp.asarray(np.reshape(solved, shape))


def _softmax(theta):
  weights = np.exp(theta - theta.max())
  return weights / weights.sum()


def _newton_direction(p_win, pi, beta, residual):
  def jacobian(v):  # (I - P(diag π - ππᵀ)/β) v
    return v - p_win @ (pi * (v - pi @ v)) / beta

  if len(pi) <= _DENSE_LIMIT:
    covariance_rows = (p_win - (p_win @ pi)[:, None]) * pi / beta
    return np.linalg.solve(np.eye(len(pi)) - covariance_rows, -residual)
  operator = scipy.sparse.linalg.LinearOperator((len(pi), len(pi)), jacobian, dtype=np.float64)
  return scipy.sparse.linalg.gmres(operator, -residual, rtol=1e-8, restart=60, maxiter=20)[0]


def _equilibrium(p_win, log_ref, beta):
  path = [beta]
  while path[-1] < 1:
    path.append(path[-1] * 2)
  theta = log_ref + p_win @ np.exp(log_ref) / path[-1]
  for b in reversed(path):
    theta = log_ref + p_win @ _softmax(theta) / b  # the win rates hardly move with β; the logits do

    def residual(t, b=b):
      return t - log_ref - p_win @ _softmax(t) / b

    r, enough = residual(theta), 1e-13 if b == beta else 1e-3  # the path only has to lead there
    for _ in range(200):
      if np.abs(r).max() < enough:
        break
      direction, damping = _newton_direction(p_win, _softmax(theta), b, r), 1.0
      while damping > 1e-8 and not (
        np.linalg.norm(new := residual(theta + damping * direction)) < np.linalg.norm(r)
      ):
        damping /= 2
      if damping <= 1e-8:  # rounding is reached
        break
      theta, r = theta + damping * direction, new
  pi = _softmax(theta)
  error = np.abs(pi - _softmax(log_ref + p_win @ pi / beta)).max()
  if not error < 1e-12:
    raise RuntimeError(f"equilibrium stopped {error:.2g} away from its fixed point at beta={beta}, "
                       "wanted 1e-12: a smaller beta than float64 resolves for this game.")
  return pi


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
    margin = scores[:, None] - scores[None]
    fit = scipy.special.expit(margin)
    slope = fit * (1 - fit) * weights * 2
    hessian = np.diag(slope.sum(1)) - slope
    gradient = 2 * (weights * (fit - p_win)).sum(1)
    return ((weights * (np.logaddexp(0, margin) - p_win * margin)).sum() + ridge * scores @ scores,
            gradient + 2 * ridge * scores, hessian + 2 * ridge * np.eye(len(scores)))

  result = scipy.optimize.minimize(
    lambda s: loss(s)[:2], np.zeros(len(p_win)), jac=True, hess=lambda s: loss(s)[2],
    method="trust-exact", options={"gtol": 1e-12, "maxiter": 500})
  return jnp.asarray(result.x - result.x.mean())


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

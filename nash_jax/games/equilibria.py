"""The equilibrium of a game: regularised by Newton's method, original by linear programming.

Both run in numpy and scipy, in float64 whatever jax uses, and not under jit.
"""

import math

import jax.numpy as jnp
import numpy as np
import scipy.optimize
from jaxtyping import Array, Float
from scipy.sparse.linalg import LinearOperator, gmres
from scipy.special import logsumexp, softmax

from nash_jax.games import checks
from nash_jax.games.checks import GameLike, PolicyLike
from nash_jax.validation import require

Matrix = Float[np.ndarray, "A A"]
Vector = Float[np.ndarray, "A"]

DENSE_LIMIT = 1500  # above it Newton's linear systems are solved by GMRES, which never forms them
_ROWS = 1024  # of a game that are copied at once


def equilibrium(p_win: GameLike, ref: PolicyLike, beta: checks.Number) -> Float[Array, "*X A"]:
  """Returns the regularised equilibrium π* ∝ ref·exp(P(·≻π*)/β), as probabilities.

  The 1e-12 that it promises bounds the distance of every probability to π*, as Newton's last step
  measures it with win rates summed in twice float64's precision. π is its own best response to
  1e-12 as well, down to β = 1e-4; below, float64's own rounding of π, some 1e-16, is a larger part
  of it times 1/β.

  Damped Newton on the fixed point follows π* from large β down. The Jacobian
  I - P(diag π - ππᵀ)/β has eigenvalues 1 + iμ for an antisymmetric payoff: it is never singular,
  and the path never branches.

  Examples:
    >>> import numpy as np
    >>> from nash_jax.games import preference, zoo
    >>> game = zoo.rock_paper_scissors(0.5, 1.0, 0.8)
    >>> star = preference.equilibrium(game.p_win, np.full(3, 1 / 3), beta=0.1)
    >>> np.asarray(star).round(3).tolist()
    [0.298, 0.253, 0.449]

  Args:
    p_win: the game, [A A] or [X A A].
    ref: probabilities of full support, [A], shared by the contexts, or [X A].
    beta: KL weight in nats, from 1e-15 of the largest payoff on.

  Raises:
    ValueError: not a game, β outside its range, or not a reference of full support.
    RuntimeError: π* was not reached to 1e-12.
  """
  weight = float(checks.number("beta", beta, fix="The original game is nash_equilibrium's."))
  games = np.asarray(checks.validate(p_win), np.float64)
  log_ref = np.log(checks.reference(ref, games.shape[:-1]))
  if games.ndim == 2:
    return jnp.asarray(_equilibrium(games, log_ref, weight))
  return jnp.stack([_equilibrium(*game, weight) for game in zip(games, log_ref, strict=True)])


def _equilibrium(p_win: Matrix, log_ref: Vector, beta: float) -> Vector:
  payoff = max(p_win.max() - 0.5, 0.5 - p_win.min())
  if payoff == 0 or beta > 1e17 * payoff:  # nothing to win, or nothing beside the price of it
    return softmax(log_ref)
  least = f"at least 1e-15 of the largest payoff, {payoff:.3g}"
  fix = "The original game is nash_equilibrium's."
  require(bool(beta >= 1e-15 * payoff), "beta", least, beta, fix)
  scale = 2.0 ** np.floor(-np.log2(2 * payoff)) if payoff < 0.25 else 1.0
  if scale > 1:  # a power of 2, which rounds nothing: near ½ floats hold small payoffs exactly
    p_win = 0.5 + scale * (p_win - 0.5)
  pi, error, shift = _newton(p_win, log_ref, scale * beta)
  if not (error < 1e-12 and shift < max(1e-12, 1e-15 / (scale * beta))):
    raise RuntimeError(
      f"equilibrium stopped {max(error, shift):.2g} away from its fixed point at beta={beta}, "
      "wanted 1e-12: a smaller beta than float64 resolves for this game; nash_equilibrium solves "
      "the original one."
    )
  return pi


def _newton(p_win: Matrix, log_ref: Vector, beta: float) -> tuple[Vector, float, float]:
  """Returns π and what is known of its error, as _refine gives them."""
  try:
    return _refine(p_win, log_ref, beta, _follow(p_win, log_ref, beta))
  except np.linalg.LinAlgError:  # float64 cannot tell the Jacobian from a singular matrix
    return softmax(log_ref), math.inf, math.inf


def _follow(p_win: Matrix, log_ref: Vector, beta: float) -> Vector:
  """Returns logits of the equilibrium in plain float64, along a path of halved β."""
  theta = log_ref
  for b in beta * 2.0 ** np.arange(max(0, math.ceil(-math.log2(beta))), -1, -1):

    def residual(t: Vector, b: float = b) -> Vector:
      return t - log_ref - p_win @ softmax(t) / b

    # While β is large the win rates hardly move with it, though the logits do. Later an action's
    # logit hardly moves while it is played, and the others are won by the first step.
    guess = log_ref + p_win @ softmax(theta) / b
    theta = guess if np.abs(residual(guess)).max() < 16 else theta
    r, enough = residual(theta), 1e-13 if b == beta else 1e-3  # the path only has to lead there
    for _ in range(200):
      if np.abs(r).max() < enough:
        break
      direction, damping = _newton_direction(p_win, softmax(theta), b, r), 1.0
      new = residual(theta + damping * direction)
      while damping > 1e-8 and not np.linalg.norm(new) < np.linalg.norm(r):
        damping /= 2
        new = residual(theta + damping * direction)
      if damping <= 1e-8:  # rounding is reached
        break
      theta, r = theta + damping * direction, new
  return theta


def _refine(
  p_win: Matrix, log_ref: Vector, beta: float, theta: Vector
) -> tuple[Vector, float, float]:
  """Ends Newton's method with a residual that rounding spares, where plain float64 left one.

  Returns:
    (π, how far Newton's next step would move it, and how far its best response is from it).
  """
  best = (softmax(theta), math.inf, math.inf)
  for _ in range(8):  # more only draw lots among the roundings of π
    pi = softmax(theta)
    logits = log_ref + precise_win_rates(p_win, pi) / beta
    shift = float(np.abs(softmax(logits) - pi).max())
    # π is known exactly, so that its logarithm is too, unless it underflowed
    log_pi = np.where(pi > 1e-290, np.log(np.maximum(pi, 1e-290)), theta - logsumexp(theta))
    residual = log_pi - logits
    theta = log_pi + _newton_direction(p_win, pi, beta, residual - pi @ residual)
    error = float(np.abs(softmax(theta) - pi).max())
    if not shift >= best[2]:
      best = (pi, error, shift)
    if shift < 1e-13:
      break
  return best


def precise_win_rates(p_win: Matrix, pi: Vector) -> Vector:
  """Returns P(·≻π) - ½ Σπ of float64 input, to float64's relative rounding, near ½ too.

  Both are split after 26 bits. The leading parts are whole multiples of 2⁻²⁶ whose products sum up
  without rounding; what is left is 2⁻²⁶ as large, and so is its rounding.

  Examples:
    >>> import numpy as np
    >>> from nash_jax.games import equilibria
    >>> p_win = np.array([[0.5, 0.5 + 2**-40], [0.5 - 2**-40, 0.5]])
    >>> equilibria.precise_win_rates(p_win, np.array([0.3, 0.7])) * 2**40
    array([ 0.7, -0.3])
  """

  def leading(x: np.ndarray) -> np.ndarray:
    return np.round(x * 2.0**26) / 2.0**26

  lead, wins = leading(pi), np.empty_like(pi)
  for start in range(0, len(pi), _ROWS):
    rows = p_win[start : start + _ROWS]
    high = leading(rows)
    small = high @ (pi - lead) + (rows - high) @ pi
    wins[start : start + _ROWS] = (high - 0.5) @ lead + (small - 0.5 * np.sum(pi - lead))
  return wins


def _newton_direction(p_win: Matrix, pi: Vector, beta: float, residual: Vector) -> Vector:
  if len(pi) <= DENSE_LIMIT:
    jacobian = np.eye(len(pi)) - (p_win - (p_win @ pi)[:, None]) * pi / beta
    return np.linalg.solve(jacobian, -residual)

  def product(v: np.ndarray) -> np.ndarray:
    return v - p_win @ (pi * (v - pi @ v)) / beta

  operator = LinearOperator(p_win.shape, product, dtype=np.float64)
  return gmres(operator, -residual, rtol=1e-8, restart=60, maxiter=20)[0]


def nash_equilibrium(p_win: GameLike) -> Float[Array, "*X A"]:
  """Returns one symmetric equilibrium of the original game, as probabilities.

  Nobody wins more against it than 1e-9 of the game's largest payoff. Where several equilibria exist
  (a tie among best mixtures) it is a vertex of their set. Solved by linear programming (HiGHS).

  Examples:
    >>> import numpy as np
    >>> from nash_jax.games import preference, zoo
    >>> game = zoo.rock_paper_scissors(0.5, 1.0, 0.8)
    >>> np.asarray(preference.nash_equilibrium(game.p_win)).round(3).tolist()
    [0.348, 0.217, 0.435]

  Args:
    p_win: the game, [A A] or [X A A].

  Raises:
    ValueError: not a game.
    RuntimeError: the linear program was not solved to that.
  """
  games = np.asarray(checks.validate(p_win), np.float64)
  if games.ndim == 3:
    return jnp.stack([nash_equilibrium(game) for game in games])
  actions, payoff = len(games), (games - games.T) / 2
  payoff = payoff / (np.abs(payoff).max() or 1.0)  # the solver's tolerances are absolute
  result = scipy.optimize.linprog(  # maximise v with Σ_y π(y) M(y, y') ≥ v for every y'
    np.r_[np.zeros(actions), -1.0],
    A_ub=np.c_[-payoff.T, np.ones(actions)],
    b_ub=np.zeros(actions),
    A_eq=np.r_[np.ones(actions), 0.0][None],
    b_eq=[1.0],
    bounds=[(0, None)] * actions + [(None, None)],
    method="highs",
    options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
  )
  if not result.success:
    raise RuntimeError(f"the linear program failed: {result.message}")
  pi = np.maximum(result.x[:actions], 0)
  pi = pi / pi.sum()
  if not (gain := (payoff @ pi).max()) <= 1e-9:
    raise RuntimeError(
      f"the linear program left a gain of {gain:.2g} of the largest payoff, wanted 1e-9: payoffs "
      "of too many sizes in one game."
    )
  return jnp.asarray(pi)

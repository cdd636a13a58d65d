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
from scipy.special import expit, logsumexp, softmax

from nash_jax.validation import require

_DENSE_LIMIT = 1500  # above it Newton's linear systems are solved by GMRES, which never forms them
_ROWS = 1024  # of a game that are copied at once


# What every public function of games/ checks of what it is given. Shapes are checked always; values
# where they can be read, which under jit and vmap and across processes they cannot.


def concrete(x):
  """Whether the values of x can be read: it is not traced and lies on this process."""
  return not isinstance(x, jax.core.Tracer) and getattr(x, "is_fully_addressable", True)


def numbers(what, x):
  """x as an array of numbers, on the host where it is not a jax array; values are not checked.

  Raises:
    ValueError: ragged, or of another type, such as bool, str, complex or object.
  """
  fix = "Give floats, as a list or an array."
  array: jax.Array | np.ndarray
  if isinstance(x, jax.Array):
    array = x
  else:
    try:
      array = np.asarray(x)
    except (ValueError, TypeError):  # rows of several lengths, or no sequence
      require(False, what, "an array of numbers", f"a {type(x).__name__} that is no array", fix)
  real = any(jnp.issubdtype(array.dtype, kind) for kind in (np.floating, np.integer))
  require(real, what, "real numbers", f"dtype {array.dtype}", fix)
  return array


def number(what, value, *, zero=False, at_most=math.inf, infinite=False, array=False,
           fix="Give one in this interval."):
  """Returns value, a number in (0, at_most], or [0, at_most] with zero=True, or an array of them.

  NaN is never one, infinity only with infinite=True, an array only with array=True.
  """
  values = numbers(what, value)
  require(array or values.ndim == 0, what, "one number", f"shape {values.shape}", fix)
  if concrete(values):
    values = np.asarray(values, np.float64).ravel()
    good = ((values >= 0) if zero else (values > 0)) & (values <= at_most)
    good &= infinite | np.isfinite(values)
    closed = infinite or at_most < math.inf
    interval = f"a number in {'[' if zero else '('}0, {at_most:g}{']' if closed else ')'}"
    worst = float(values[~good][0]) if not good.all() else None
    require(good.all(), what, interval, worst, fix)
  return value


def count(what, value, *, least=1):
  """Returns value, a whole number from least to 2³¹ - 1, as an int; what is traced as it is."""
  if not concrete(value):
    return value
  whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
  if isinstance(value, (np.ndarray, jax.Array)) and value.ndim == 0:
    whole = jnp.issubdtype(value.dtype, np.integer)
  require(whole and least <= value < 2**31, what, f"a whole number of at least {least}", value,
          "Give an int.")
  return int(value)


def validate(p_win, atol=1e-5):
  """Returns p_win, [A A] or [X A A], if it is a preference game; of a list, the array.

  Raises:
    ValueError: wrong shape, no floats, or an entry outside [0, 1], not finite, or whose mirror
      image does not complete it to 1 within atol; the message names the worst entry.
  """
  p_win = numbers("p_win", p_win)
  if p_win.ndim not in (2, 3) or p_win.shape[-1] != p_win.shape[-2] or p_win.size == 0:
    raise ValueError(f"p_win must be [A A] or [X A A], got shape {p_win.shape}.")
  if not concrete(p_win):
    return p_win
  games = np.asarray(p_win).reshape(-1, *p_win.shape[-2:])
  (x, i, j), worst = _worst(games, lambda a, b: np.maximum(abs(a + b - 1), abs(a - 0.5) - 0.5))
  if worst > atol:
    of = f"{x}, " if p_win.ndim == 3 else ""
    raise ValueError(
      "p_win must hold probabilities with P + Pᵀ = 1 (and ½ on the diagonal); worst entry: "
      f"p_win[{of}{i}, {j}] = {games[x, i, j]:.6g} against p_win[{of}{j}, {i}] = "
      f"{games[x, j, i]:.6g}. A payoff M = -Mᵀ in [-1, 1] becomes a game by from_payoff(M).")
  return p_win


def _worst(games, fault):
  """(context, i, j) of the largest fault(g[i, j], g[j, i]) of games [X A A], and that fault."""
  worst, at = 0.0, (0, 0, 0)
  for x, start in itertools.product(range(len(games)), range(0, games.shape[-1], _ROWS)):
    block = slice(start, start + _ROWS)  # of rows: a large game is never copied whole
    rows, mirrored = (np.asarray(part, np.float64)
                      for part in (games[x, block], games[x, :, block].T))
    with np.errstate(invalid="ignore", over="ignore"):  # infinities, which are found here
      faults = fault(rows, mirrored)
    faults = np.where(np.isfinite(faults), faults, np.inf)
    if faults.max() > worst:
      i, j = map(int, np.unravel_index(faults.argmax(), faults.shape))
      worst, at = faults.max(), (x, start + i, j)
  return at, worst


def from_payoff(payoff):
  """The game (1 + M)/2 of a payoff M = -Mᵀ in [-1, 1], exactly antisymmetric where M is rounded.

  Rounded is within 1e-5, and within 1e-4 of the largest payoff where all of them are small.

  Raises:
    ValueError: no payoff of a symmetric zero-sum game; the message names the worst pair.
  """
  payoff = np.asarray(numbers("payoff", payoff), np.float64)
  square = payoff.ndim in (2, 3) and payoff.shape[-1] == payoff.shape[-2] and payoff.size > 0
  require(square, "payoff", "[A A] or [X A A]", payoff.shape, "Give a row for every action.")
  games = payoff.reshape(-1, *payoff.shape[-2:])
  bound = min(1e-5, 1e-4 * np.abs(payoff).max()) if np.isfinite(payoff).all() else 1e-5
  rules = (("entries in [-1, 1]", 1e-5, lambda a, b: abs(a) - 1,
            "Divide by the largest, and β with it."),
           ("M = -Mᵀ, a symmetric zero-sum game", bound, lambda a, b: abs(a + b),
            "A matrix of win probabilities is a game already: give it as it is."))
  for expected, atol, fault, fix in rules:
    (x, i, j), worst = _worst(games, fault)
    of = f"{x}, " if payoff.ndim == 3 else ""
    pair = (f"worst pair: payoff[{of}{i}, {j}] = {games[x, i, j]:.6g} against "
            f"payoff[{of}{j}, {i}] = {games[x, j, i]:.6g}")
    require(worst <= atol, "payoff", expected, pair, fix)
  return validate(0.5 + (payoff - payoff.swapaxes(-1, -2)) / 4)


def distribution(what, p, shape=None, *, full_support=False):
  """Returns p, probabilities [... A] that sum to 1 within 1e-4, if it is one.

  Args:
    shape: of a policy for the game at hand; p may be [A], shared by the contexts.
    full_support: every probability is positive, in the precision that p is used in.
  """
  array = numbers(what, p)
  fits = array.ndim > 0 and array.size > 0
  if shape is not None:
    fits = fits and array.shape in (tuple(shape), tuple(shape)[-1:])
  require(fits, what, f"probabilities of shape {list(shape or ['... A'])}, or [A] for all contexts",
          array.shape, "Give a probability for every action.")
  if concrete(array):
    host = np.asarray(array, np.float64)
    sums, least = host.sum(-1), host.min()
    positive = least > 0 if full_support else least >= 0
    good = positive and bool(np.all(np.abs(sums - 1) <= 1e-4))
    kind = "positive probabilities (full support)" if full_support else "probabilities"
    require(good, what, f"{kind} summing to 1",
            f"least {least:.3g}, sums {sums.min():.6g} to {sums.max():.6g}",
            "Divide by the sum" + (", and leave out what has none." if full_support else "."))
  return p


def log_distribution(what, log_p, shape=None, *, full_support=False):
  """As distribution, of log-probabilities [... A] in nats."""
  array = numbers(what, log_p)
  if concrete(array):
    with np.errstate(over="ignore"):
      p = np.exp(np.asarray(array, np.float64))
    if full_support:  # what exp rounds to 0 has support nevertheless
      p = np.where(np.isneginf(array), 0, np.maximum(p, np.finfo(float).tiny))
    distribution(f"exp({what})", p, shape, full_support=full_support)
  else:
    distribution(f"exp({what})", array, shape)
  return log_p


def reference(ref, shape):
  """ref, [A] shared by contexts or [X A], as float64 probabilities of a policy's shape.

  Raises:
    ValueError: it is no distribution of full support.
  """
  ref = np.asarray(distribution("ref", ref, shape, full_support=True), np.float64)
  return np.broadcast_to(ref, shape)


def _check_policies(p_win, **policies):
  """Checks a game and probabilities of its actions; `ref` has full support as jax reads it."""
  shape = np.shape(validate(p_win))[:-1]
  for what, policy in policies.items():
    distribution(what, policy, shape)
    if what == "ref" and concrete(policy):
      ref = jnp.asarray(policy)
      require(bool(jnp.isfinite(jnp.log(ref)).all()), "ref",
              f"positive probabilities (full support) that {ref.dtype} can hold",
              f"least {np.asarray(policy).min():.3g}", "Leave out what the reference never does.")


# Quantities.


def win_rates(p_win, opponent):
  """P(y ≻ opponent) of every action, [... A]."""
  _check_actions(p_win, opponent=opponent)
  return _win_rates(jnp.asarray(p_win), jnp.asarray(opponent))


def _win_rates(p_win, opponent):
  return jnp.einsum("...ab,...b->...a", p_win, opponent)


def value(p_win, policy, opponent):
  """P(policy ≻ opponent), a number a context."""
  _check_actions(p_win, policy=policy, opponent=opponent)
  wins = _win_rates(jnp.asarray(p_win), jnp.asarray(opponent))
  return jnp.sum(jnp.asarray(policy) * wins, -1)


def kl(log_p, log_q):
  """KL(p‖q) in nats of log-probabilities [... A], one number a context, accurate also when tiny.

  Every summand is p·(δ + e^{-δ} - 1) ≥ 0 with δ = log p - log q: none cancels another.
  """
  log_p, log_q = _check_pair(log_p, log_q)
  p = jnp.exp(log_p)
  delta = jnp.where(p > 0, log_p - log_q, 0)
  rare = delta < -80  # e^{-δ} overflows soon, where p·e^{-δ} = q is a number like any other
  near = jnp.where(rare, 0, delta)
  summand = jnp.where(rare, p * delta + jnp.exp(log_q) - p,
                      p * jnp.maximum(near + jnp.expm1(-near), 0))
  return jnp.sum(jnp.where(p > 0, summand, jnp.exp(log_q)), -1)


def span(log_p, log_q):
  """max - min over actions of log p - log q (nats), the span seminorm; one number a context."""
  log_p, log_q = _check_pair(log_p, log_q, full_support=True)
  delta = log_p - log_q
  return jnp.max(delta, -1) - jnp.min(delta, -1)


def best_response(p_win, policy, ref, beta):
  """The policy maximising P(·≻policy) - β KL(·‖ref), probabilities [... A], for β > 0."""
  number("beta", beta)
  _check_actions(p_win, policy=policy, ref=ref)
  wins = _win_rates(jnp.asarray(p_win), jnp.asarray(policy))
  wins = wins - jnp.max(wins, -1, keepdims=True)  # so that a tiny β makes -inf of them, never inf
  beta = jnp.where(beta > 0, jnp.maximum(beta, jnp.finfo(wins.dtype).tiny), jnp.nan)
  return jax.nn.softmax(jnp.log(jnp.asarray(ref)) + wins / beta)


def gap(p_win, log_policy, log_ref, beta):
  """SubOpt_β of a policy given by its logarithms, one number a context.

  max_{π'} P_β(π'≻π) - 1/2, computed as β·KL(π‖best response to π), which is equal and keeps its
  relative accuracy near 0; at β = 0, and below what wins can be divided by, the exploitability
  max_y P(y≻π) - 1/2 of the original game. NaN where β is traced and no number ≥ 0.
  """
  number("beta", beta, zero=True, array=True)
  _check_actions(p_win)
  for what, log in (("log_policy", log_policy), ("log_ref", log_ref)):
    log_distribution(what, log, full_support=what == "log_ref")
    _check_size(what, log, np.shape(p_win)[-1])
  return _gap(jnp.asarray(p_win), jnp.asarray(log_policy), jnp.asarray(log_ref), beta)


def _gap(p_win, log_policy, log_ref, beta):
  wins = _win_rates(p_win, jnp.exp(log_policy))
  positive = beta >= jnp.finfo(wins.dtype).tiny
  log_best = jax.nn.log_softmax(log_ref + wins / jnp.where(positive, beta, 1))
  original = jnp.where(beta >= 0, jnp.max(wins, -1) - 0.5, jnp.nan)
  return jnp.where(positive, beta * kl(log_policy, log_best), original)


def _check_actions(p_win, **policies):
  """Checks a game [... A A] and probabilities [... A]; see distribution."""
  game = numbers("p_win", p_win)
  square = game.ndim >= 2 and game.shape[-1] == game.shape[-2]
  require(square, "p_win", "[... A A]", game.shape, "Give P(y≻y') of every pair of actions.")
  if game.ndim > 3:
    game = game.reshape(-1, *game.shape[-2:])
  validate(game)
  for what, policy in policies.items():
    distribution(what, policy, full_support=what == "ref")
    _check_size(what, policy, game.shape[-1])


def _check_size(what, policy, actions):
  require(np.shape(policy)[-1] == actions, what, f"one number for each of {actions} actions",
          np.shape(policy), "Give a probability for every action.")


def _check_pair(log_p, log_q, full_support=False):
  """The two as jax arrays, checked to be log-probabilities of the same actions."""
  for what, log in (("log_p", log_p), ("log_q", log_q)):
    log_distribution(what, log, full_support=full_support)
  _check_size("log_q", log_q, np.shape(log_p)[-1])
  return jnp.asarray(log_p), jnp.asarray(log_q)


def suboptimality(p_win, policy, ref, beta):
  """SubOpt_β of probabilities [A] or [X A] against ref, averaged over contexts: a number ≥ 0.

  0 at the regularised equilibrium only; algorithms.md's "duality gap" of other code is twice this.

  Raises:
    ValueError: not a game, no probabilities, a reference without full support, β < 0, NaN or inf.
  """
  number("beta", beta, zero=True)
  _check_policies(p_win, policy=policy, ref=ref)
  log_policy, log_ref = (jnp.broadcast_to(jnp.log(jnp.asarray(p)), np.shape(p_win)[:-1])
                         for p in (policy, ref))
  return jnp.mean(_gap(jnp.asarray(p_win), log_policy, log_ref, beta))


def exploitability(p_win, policy):
  """max_y P(y≻policy) - 1/2 in the original game, averaged over contexts."""
  _check_policies(p_win, policy=policy)
  wins = _win_rates(jnp.asarray(p_win), jnp.asarray(policy))  # of a policy shared by contexts too
  return jnp.mean(jnp.max(wins, -1) - 0.5)


def equilibrium(p_win, ref, beta):
  """The regularised equilibrium π* ∝ ref·exp(P(·≻π*)/β), probabilities [A] or [X A], to 1e-12.

  Damped Newton on the fixed point, following π* from large β down, in float64 whatever jax
  uses. Its Jacobian I - P(diag π - ππᵀ)/β has eigenvalues 1 + iμ for an antisymmetric payoff: it is
  never singular and the path never branches. ref is [A], shared by contexts, or [X A].

  The 1e-12 bounds the distance of every probability to π*, as Newton's last step measures it with
  win rates summed in twice float64's precision. π is its own best response to 1e-12 as well, down
  to β = 1e-4; below, float64's own rounding of π, some 1e-16, is a larger part of it times 1/β.

  Raises:
    ValueError: not a game, β no finite number > 0 or below 1e-15 of the largest payoff, or a
      reference that is no distribution of full support.
    RuntimeError: π* was not reached to 1e-12.
  """
  beta = float(number("beta", beta, fix="The original game is nash_equilibrium's."))
  p_win = np.asarray(validate(p_win), np.float64)
  ref = reference(ref, p_win.shape[:-1])
  if p_win.ndim == 2:
    return jnp.asarray(_equilibrium(p_win, np.log(ref), beta))
  return jnp.stack([_equilibrium(*game, beta) for game in zip(p_win, np.log(ref), strict=True)])


def _equilibrium(p_win, log_ref, beta):
  payoff = max(p_win.max() - 0.5, 0.5 - p_win.min())
  if payoff == 0 or beta > 1e17 * payoff:  # nothing to win, or nothing beside the price of it
    return softmax(log_ref)
  require(beta >= 1e-15 * payoff, "beta", f"at least 1e-15 of the largest payoff, {payoff:.3g}",
          beta, "The original game is nash_equilibrium's.")
  scale = 2.0 ** np.floor(-np.log2(2 * payoff)) if payoff < 0.25 else 1.0
  if scale > 1:  # a power of 2, which rounds nothing: near ½ floats hold small payoffs exactly
    p_win = 0.5 + scale * (p_win - 0.5)
  pi, error, shift = _newton(p_win, log_ref, scale * beta)
  if not (error < 1e-12 and shift < max(1e-12, 1e-15 / (scale * beta))):
    raise RuntimeError(f"equilibrium stopped {max(error, shift):.2g} away from its fixed point at "
                       f"beta={beta}, wanted 1e-12: a smaller beta than float64 resolves for this "
                       "game; nash_equilibrium solves the original one.")
  return pi


def _newton(p_win, log_ref, beta):
  """π and what is known of its error, as _refine gives them."""
  try:
    return _refine(p_win, log_ref, beta, _follow(p_win, log_ref, beta))
  except np.linalg.LinAlgError:  # float64 cannot tell the Jacobian from a singular matrix
    return softmax(log_ref), math.inf, math.inf


def _follow(p_win, log_ref, beta):
  """Logits of the equilibrium in plain float64, along a path of halved β."""
  theta = log_ref
  for b in beta * 2.0 ** np.arange(max(0, math.ceil(-math.log2(beta))), -1, -1):

    def residual(t, b=b):
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
      while damping > 1e-8 and not (
        np.linalg.norm(new := residual(theta + damping * direction)) < np.linalg.norm(r)
      ):
        damping /= 2
      if damping <= 1e-8:  # rounding is reached
        break
      theta, r = theta + damping * direction, new
  return theta


def _refine(p_win, log_ref, beta, theta):
  """Ends Newton's method with a residual that rounding spares, where plain float64 left one.

  Returns:
    (π, how far Newton's next step would move it, and how far its best response is from it).
  """
  best = (softmax(theta), math.inf, math.inf)
  for _ in range(8):  # more only draw lots among the roundings of π
    pi = softmax(theta)
    logits = log_ref + _precise_win_rates(p_win, pi) / beta
    shift = np.abs(softmax(logits) - pi).max()
    # π is known exactly, so that its logarithm is too, unless it underflowed
    log_pi = np.where(pi > 1e-290, np.log(np.maximum(pi, 1e-290)), theta - logsumexp(theta))
    residual = log_pi - logits
    theta = log_pi + _newton_direction(p_win, pi, beta, residual - pi @ residual)
    error = np.abs(softmax(theta) - pi).max()
    if not shift >= best[2]:
      best = (pi, error, shift)
    if shift < 1e-13:
      break
  return best


def _precise_win_rates(p_win, pi):
  """P(·≻π) - ½ Σπ of float64 input, to float64's relative rounding, near ½ too.

  Both are split after 26 bits. The leading parts are whole multiples of 2⁻²⁶ whose products sum up
  without rounding; what is left is 2⁻²⁶ as large, and so is its rounding.
  """
  def leading(x):
    return np.round(x * 2.0**26) / 2.0**26

  lead, wins = leading(pi), np.empty_like(pi)
  for start in range(0, len(pi), _ROWS):
    rows = p_win[start : start + _ROWS]
    high = leading(rows)
    small = high @ (pi - lead) + (rows - high) @ pi
    wins[start : start + _ROWS] = (high - 0.5) @ lead + (small - 0.5 * np.sum(pi - lead))
  return wins


def _newton_direction(p_win, pi, beta, residual):
  if len(pi) <= _DENSE_LIMIT:
    jacobian = np.eye(len(pi)) - (p_win - (p_win @ pi)[:, None]) * pi / beta
    return np.linalg.solve(jacobian, -residual)
  operator = LinearOperator(
    p_win.shape, lambda v: v - p_win @ (pi * (v - pi @ v)) / beta, dtype=np.float64)
  return gmres(operator, -residual, rtol=1e-8, restart=60, maxiter=20)[0]


def nash_equilibrium(p_win):
  """One symmetric equilibrium of the original game by linear programming, [A] or [X A].

  Nobody wins more against it than 1e-9 of the game's largest payoff. Where several exist (a tie
  among best mixtures) it is a vertex of their set.

  Raises:
    ValueError: not a game.
    RuntimeError: the linear program was not solved to that.
  """
  games = np.asarray(validate(p_win), np.float64)
  if games.ndim == 3:
    return jnp.stack([nash_equilibrium(game) for game in games])
  actions, payoff = len(games), (games - games.T) / 2
  payoff = payoff / (np.abs(payoff).max() or 1.0)  # the solver's tolerances are absolute
  result = scipy.optimize.linprog(  # maximise v with Σ_y π(y) M(y, y') ≥ v for every y'
    np.r_[np.zeros(actions), -1.0],
    A_ub=np.c_[-payoff.T, np.ones(actions)], b_ub=np.zeros(actions),
    A_eq=np.r_[np.ones(actions), 0.0][None], b_eq=[1.0],
    bounds=[(0, None)] * actions + [(None, None)], method="highs",
    options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
  )
  if not result.success:
    raise RuntimeError(f"the linear program failed: {result.message}")
  pi = np.maximum(result.x[:actions], 0)
  pi = pi / pi.sum()
  if not (gain := (payoff @ pi).max()) <= 1e-9:
    raise RuntimeError(f"the linear program left a gain of {gain:.2g} of the largest payoff, "
                       "wanted 1e-9: payoffs of too many sizes in one game.")
  return jnp.asarray(pi)


def bradley_terry(p_win, weights=None, ridge=1e-9):
  """Scores R [A], mean 0, minimising Σ w·cross-entropy(P(y≻y'), σ(R(y) - R(y'))) over pairs.

  Args:
    weights: how often each pair is compared, [A A], symmetrised here; all pairs alike by default.
    ridge: weight of ΣR²; keeps scores finite when a pair is decided for certain.

  Raises:
    ValueError: not one game, weights that are none or compare no pair, a ridge ≤ 0.
    RuntimeError: the minimum was not reached.
  """
  p_win = np.asarray(validate(p_win), np.float64)
  if p_win.ndim != 2:
    raise ValueError(f"bradley_terry fits one game [A A], got shape {p_win.shape}.")
  number("ridge", ridge)
  weights = np.asarray(np.ones_like(p_win) if weights is None else numbers("weights", weights),
                       np.float64)
  require(weights.shape == p_win.shape, "weights", f"the game's shape {p_win.shape}", weights.shape,
          "Give a weight for every pair.")
  number("weights", weights, zero=True, array=True)
  with np.errstate(over="ignore"):
    weights = (weights + weights.T) / 2
    total = number("the sum of weights", weights.sum())
  compared = len(p_win) == 1 or np.trace(weights) < total
  require(bool(compared), "weights", "a pair that is compared", "the diagonal alone",
          "Give a positive weight beside it.")
  weights = weights / total

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
  if not (slope := np.abs(fit.jac).max()) < 1e-8:
    raise RuntimeError(f"bradley_terry stopped at a slope of {slope:.2g}, wanted 1e-8: "
                       f"{fit.message}")
  return jnp.asarray(fit.x - fit.x.mean())


def intransitive_residue(p_win, weights=None):
  """P - σ(R(y) - R(y')) [A A] at the Bradley-Terry fit: what no reward can express."""
  scores = bradley_terry(p_win, weights)
  return jnp.asarray(p_win) - jax.nn.sigmoid(scores[:, None] - scores[None, :])


def cyclic_energy(p_win):
  """Share in [0, 1] of Σ (P - ½)² that no differences of row means explain (Hodge's curl part).

  0 where every P is ½ and there is nothing to explain.
  """
  _check_actions(p_win)
  payoff = jnp.asarray(p_win) - 0.5
  mean = payoff.mean(-1)
  curl = payoff - (mean[..., :, None] - mean[..., None, :])
  total = jnp.sum(payoff**2, (-1, -2))
  return jnp.sum(curl**2, (-1, -2)) / jnp.where(total > 0, total, 1)

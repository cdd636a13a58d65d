"""What a scalar reward can say of a game: its Bradley-Terry fit, and the cycles that it misses."""

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from jaxtyping import Array, Float
from scipy.special import expit

from nash_jax.games import checks
from nash_jax.games.checks import GameLike
from nash_jax.validation import require

PairWeights = Float[np.ndarray, "A A"]


def bradley_terry(
  p_win: GameLike, weights: checks.Numbers | None = None, ridge: checks.Number = 1e-9
) -> Float[Array, "A"]:
  """Returns the scores R with mean 0 for which σ(R(y) - R(y')) fits P(y≻y') best.

  They minimise Σ w·cross-entropy(P(y≻y'), σ(R(y) - R(y'))) over pairs.

  Examples:
    >>> import numpy as np
    >>> from nash_jax.games import preference
    >>> p_win = np.array([[0.5, 0.8], [0.2, 0.5]])
    >>> np.asarray(preference.bradley_terry(p_win)).round(3).tolist()  # their difference is log 4
    [0.693, -0.693]

  Args:
    p_win: one game, [A A].
    weights: how often each pair is compared, [A A], made symmetric here; by default all alike.
    ridge: weight of ΣR², which keeps scores finite where a pair is decided for certain.

  Raises:
    ValueError: not one game, weights that are negative or compare no pair, or a ridge ≤ 0.
    RuntimeError: the minimum was not reached.
  """
  game = np.asarray(checks.validate(p_win), np.float64)
  if game.ndim != 2:
    raise ValueError(f"bradley_terry fits one game [A A], got shape {game.shape}.")
  penalty = checks.number("ridge", ridge)
  w = _pair_weights(np.ones_like(game) if weights is None else weights, game.shape)

  def loss(scores: np.ndarray) -> float:
    margin = scores[:, None] - scores
    return (w * (np.logaddexp(0, margin) - game * margin)).sum() + penalty * scores @ scores

  def gradient(scores: np.ndarray) -> np.ndarray:
    return 2 * (w * (expit(scores[:, None] - scores) - game)).sum(1) + 2 * penalty * scores

  def hessian(scores: np.ndarray) -> np.ndarray:
    fit = expit(scores[:, None] - scores)
    slope = fit * (1 - fit) * w * 2
    return np.diag(slope.sum(1) + 2 * penalty) - slope

  fit = scipy.optimize.minimize(
    loss,
    np.zeros(len(game)),
    jac=gradient,
    hess=hessian,
    method="trust-exact",
    options={"gtol": 1e-12, "maxiter": 500},
  )
  if not (slope := np.abs(fit.jac).max()) < 1e-8:
    raise RuntimeError(
      f"bradley_terry stopped at a slope of {slope:.2g}, wanted 1e-8: {fit.message}"
    )
  return jnp.asarray(fit.x - fit.x.mean())


def _pair_weights(weights: checks.Numbers, shape: tuple[int, ...]) -> PairWeights:
  """Returns weights as symmetric ones that sum to 1."""
  given = np.asarray(checks.numbers("weights", weights), np.float64)
  fix = "Give a weight for every pair."
  require(given.shape == shape, "weights", f"the game's shape {shape}", given.shape, fix)
  checks.number("weights", given, zero=True, array=True)
  with np.errstate(over="ignore"):
    symmetric = (given + given.T) / 2
    total = checks.number("the sum of weights", symmetric.sum())
  compared = bool(len(given) == 1 or np.trace(symmetric) < total)
  got, fix = "the diagonal alone", "Give a positive weight beside it."
  require(compared, "weights", "a pair that is compared", got, fix)
  return symmetric / total


def intransitive_residue(
  p_win: GameLike, weights: checks.Numbers | None = None
) -> Float[Array, "A A"]:
  """Returns P - σ(R(y) - R(y')) at the Bradley-Terry fit: what no reward can express.

  Examples:
    >>> import numpy as np
    >>> from nash_jax.games import preference, zoo
    >>> cycle = zoo.condorcet_cycle(3, 0.9).p_win  # a perfect cycle, of which R explains nothing
    >>> np.asarray(preference.intransitive_residue(cycle)).round(3)[0].tolist()
    [0.0, 0.4, -0.4]

  Args:
    p_win: one game, [A A].
    weights: as of `bradley_terry`.

  Raises:
    ValueError: as `bradley_terry`.
  """
  scores = bradley_terry(p_win, weights)
  return jnp.asarray(p_win) - jax.nn.sigmoid(scores[:, None] - scores[None, :])


def cyclic_energy(p_win: GameLike) -> Float[Array, "*X"]:
  """Returns the share in [0, 1] of Σ (P - ½)² that no differences of row means explain.

  This is the curl part of the Hodge decomposition. It is 0 where every P is ½ and there is nothing
  to explain.

  Examples:
    >>> from nash_jax.games import preference, zoo
    >>> round(float(preference.cyclic_energy(zoo.condorcet_cycle(3, 0.9).p_win)), 6)
    1.0

  Args:
    p_win: the game, [A A] or [X A A].

  Raises:
    ValueError: not a game.
  """
  checks.actions_and_policies(p_win)
  payoff = jnp.asarray(p_win) - 0.5
  mean = payoff.mean(-1)
  curl = payoff - (mean[..., :, None] - mean[..., None, :])
  total = jnp.sum(payoff**2, (-1, -2))
  return jnp.sum(curl**2, (-1, -2)) / jnp.where(total > 0, total, 1)

"""What the functions of games/ accept, and the checks that every one of them shares.

Shapes are always checked. Values are checked where they can be read: not under jit or vmap, and not
in an array that is spread over several processes.

Axes: A actions, X contexts. `*X` stands for no context axis, for [X], or for more of them; `*#X`
also lets one policy be shared by all contexts.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Real

from nash_jax.validation import require

AnyArray = Array | np.ndarray
Nested = Sequence[Any]  # lists of numbers, nested as deeply as the array has axes
Number = float | np.floating | np.integer | Real[AnyArray, ""]
Count = int | np.integer | Int[AnyArray, ""]  # traced, where it is an array
Values = Number | Real[AnyArray, "..."]  # one number, or an array of them
Numbers = Values | Nested
GameLike = Real[AnyArray, "*X A A"] | Nested  # P(y ≻ y') of every pair of actions
PolicyLike = Real[AnyArray, "*#X A"] | Nested  # probabilities
LogPolicy = Float[Array, "*X A"] | Float[np.ndarray, "*X A"]
LogPolicyLike = Real[AnyArray, "*#X A"] | Nested  # log-probabilities in nats

_ROWS = 1024  # of a game that are copied at once
_Fault = Callable[[np.ndarray, np.ndarray], np.ndarray]  # of entries and their mirror images


def concrete(x: Any) -> bool:
  """Returns whether the values of x can be read: it is not traced and lies on this process.

  Examples:
    >>> import jax
    >>> from nash_jax.games import checks
    >>> checks.concrete(0.5), jax.jit(lambda x: checks.concrete(x))(0.5).item()
    (True, False)
  """
  return not isinstance(x, jax.core.Tracer) and getattr(x, "is_fully_addressable", True)


def numbers(what: str, x: Any) -> Real[AnyArray, "..."]:
  """Returns x as an array of numbers, on the host unless it is a jax array.

  Values are not checked: NaN and infinity pass.

  Examples:
    >>> from nash_jax.games import checks
    >>> checks.numbers("steps", [0.1, 0.3])
    array([0.1, 0.3])

  Args:
    what: the name that an error gives to x.

  Raises:
    ValueError: x is ragged, or its type is not real, such as bool, str, complex or object.
  """
  fix = "Give floats, as a list or an array."
  array: jax.Array | np.ndarray
  if isinstance(x, jax.Array):
    array = x
  else:
    try:
      array = np.asarray(x)
    except (ValueError, TypeError):  # rows of several lengths, or not a sequence
      require(False, what, "an array of numbers", f"a {type(x).__name__} that is no array", fix)
  real = any(jnp.issubdtype(array.dtype, kind) for kind in (np.floating, np.integer))
  require(real, what, "real numbers", f"dtype {array.dtype}", fix)
  return array


def finite(what: str, values: Any, ndim: int) -> Float[np.ndarray, "..."]:
  """Returns values as a float64 array, if they are finite numbers on so many axes.

  Examples:
    >>> from nash_jax.games import checks
    >>> checks.finite("faces", [1, 2], ndim=1)
    array([1., 2.])

  Args:
    what: the name that an error gives to values.

  Raises:
    ValueError: another number of axes, no value at all, another type, NaN or infinity.
  """
  array = np.asarray(numbers(what, values), float)
  fits, fix = array.ndim == ndim and array.size > 0, "Give at least one on each."
  require(fits, what, f"numbers on {ndim} axes", array.shape, fix)
  require(bool(np.isfinite(array).all()), what, "finite numbers", "NaN or infinity", "Replace it.")
  return array


def number[T](
  what: str,
  value: T,
  *,
  zero: bool = False,
  at_most: float = math.inf,
  infinite: bool = False,
  array: bool = False,
  fix: str = "Give one in this interval.",
) -> T:
  """Returns value, unchanged, if it is a number in (0, at_most]. NaN never is.

  Examples:
    >>> from nash_jax.games import checks
    >>> checks.number("beta", 0.1)
    0.1
    >>> checks.number("beta", -0.1)
    Traceback (most recent call last):
    ValueError: beta: expected a number in (0, inf), got -0.1. Give one in this interval.

  Args:
    what: the name that an error gives to value.
    zero: whether 0 is allowed too.
    infinite: whether infinity is.
    array: whether an array of such numbers is.
    fix: what an error tells the reader to do.

  Raises:
    ValueError: another type, a number outside the interval, or an array where one number is wanted.
  """
  values = numbers(what, value)
  require(array or values.ndim == 0, what, "one number", f"shape {values.shape}", fix)
  if concrete(values):
    host = np.asarray(values, np.float64).ravel()
    good = ((host >= 0) if zero else (host > 0)) & (host <= at_most)
    good &= infinite | np.isfinite(host)
    closed = infinite or at_most < math.inf
    interval = f"a number in {'[' if zero else '('}0, {at_most:g}{']' if closed else ')'}"
    worst = None if good.all() else float(host[~good][0])
    require(bool(good.all()), what, interval, worst, fix)
  return value


def count(what: str, value: Any, *, least: int = 1) -> Any:
  """Returns value as an int if it is a whole number from `least` to 2³¹ - 1.

  A traced value is returned as it is.

  Examples:
    >>> from nash_jax.games import checks
    >>> checks.count("iterations", 100)
    100
    >>> checks.count("iterations", 1.5)
    Traceback (most recent call last):
    ValueError: iterations: expected a whole number of at least 1, got 1.5. Give an int.

  Raises:
    ValueError: a float, a bool, another type, or a whole number outside the range.
  """
  if not concrete(value):
    return value
  whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
  if isinstance(value, np.ndarray | jax.Array) and value.ndim == 0:
    whole = jnp.issubdtype(value.dtype, np.integer)
  good = bool(whole and least <= value < 2**31)
  require(good, what, f"a whole number of at least {least}", value, "Give an int.")
  return int(value)


def validate(
  p_win: GameLike, atol: float = 1e-5, *, outside: float | None = None
) -> Real[AnyArray, "*X A A"]:
  """Returns p_win as an array if it is a preference game: P + Pᵀ = 1, so ½ on the diagonal.

  This is the one check of a game in the package; the table judge uses it too.

  Examples:
    >>> from nash_jax.games import preference
    >>> preference.validate([[0.5, 0.8], [0.2, 0.5]])
    array([[0.5, 0.8],
           [0.2, 0.5]])

  Args:
    p_win: P(y ≻ y'), [A A], or [X A A] with contexts first.
    atol: by how much an entry may fail to complete its mirror image to 1, or leave [0, 1].
    outside: by how much it may leave [0, 1], where that is less.

  Raises:
    ValueError: another shape or type, or an entry that is wrong; the message names the worst.
  """
  array = numbers("p_win", p_win)
  square = array.ndim in (2, 3) and array.shape[-1] == array.shape[-2] and array.size > 0
  if not square:
    raise ValueError(f"p_win must be [A A] or [X A A], got shape {array.shape}.")
  if not concrete(array):
    return array
  games = np.asarray(array).reshape(-1, *array.shape[-2:])
  (x, i, j), worst = _worst(games, _not_a_game)
  if worst > atol:
    context = f"{x}, " if array.ndim == 3 else ""
    raise ValueError(
      "p_win must hold probabilities with P + Pᵀ = 1 (and ½ on the diagonal); worst entry: "
      f"p_win[{context}{i}, {j}] = {games[x, i, j]:.6g} against p_win[{context}{j}, {i}] = "
      f"{games[x, j, i]:.6g}. A payoff M = -Mᵀ in [-1, 1] becomes a game by from_payoff(M)."
    )
  if outside is not None and (games.min() < -outside or games.max() > 1 + outside):
    raise ValueError(f"p_win must hold probabilities, got {games.min()} to {games.max()}")
  return array


def _worst(games: Real[np.ndarray, "X A A"], fault: _Fault) -> tuple[tuple[int, int, int], float]:
  """Returns (context, i, j) of the largest fault(g[i, j], g[j, i]), and that fault."""
  worst, place = 0.0, (0, 0, 0)
  for x, start in itertools.product(range(len(games)), range(0, games.shape[-1], _ROWS)):
    block = slice(start, start + _ROWS)  # of rows: a large game is never copied whole
    rows = np.asarray(games[x, block], np.float64)
    mirrored = np.asarray(games[x, :, block].T, np.float64)
    with np.errstate(invalid="ignore", over="ignore"):  # infinities, which are found here
      faults = fault(rows, mirrored)
    faults = np.where(np.isfinite(faults), faults, np.inf)
    if faults.max() > worst:
      i, j = map(int, np.unravel_index(faults.argmax(), faults.shape))
      worst, place = float(faults.max()), (x, start + i, j)
  return place, worst


def _not_a_game(p: np.ndarray, mirror: np.ndarray) -> np.ndarray:
  return np.maximum(abs(p + mirror - 1), abs(p - 0.5) - 0.5)


def _beyond_one(payoff: np.ndarray, mirror: np.ndarray) -> np.ndarray:
  return abs(payoff) - 1


def _asymmetry(payoff: np.ndarray, mirror: np.ndarray) -> np.ndarray:
  return abs(payoff + mirror)


def from_payoff(payoff: GameLike) -> Float[np.ndarray, "*X A A"]:
  """Returns the game P = (1 + M)/2 of a symmetric zero-sum payoff M = -Mᵀ in [-1, 1].

  A payoff that was rounded is made antisymmetric: it may miss -Mᵀ by 1e-5, or by 1e-4 of the
  largest payoff where all payoffs are small.

  Examples:
    >>> from nash_jax.games import preference
    >>> preference.from_payoff([[0, 0.5], [-0.5, 0]])
    array([[0.5 , 0.75],
           [0.25, 0.5 ]])

  Args:
    payoff: M, [A A] or [X A A]: what the row player wins.

  Raises:
    ValueError: not such a payoff; the message names the worst pair.
  """
  matrix = np.asarray(numbers("payoff", payoff), np.float64)
  square = matrix.ndim in (2, 3) and matrix.shape[-1] == matrix.shape[-2] and matrix.size > 0
  require(square, "payoff", "[A A] or [X A A]", matrix.shape, "Give a row for every action.")
  games = matrix.reshape(-1, *matrix.shape[-2:])
  bound = min(1e-5, 1e-4 * np.abs(matrix).max()) if np.isfinite(matrix).all() else 1e-5
  fix = "A matrix of win probabilities is a game already: give it as it is."
  rules = (
    ("entries in [-1, 1]", 1e-5, _beyond_one, "Divide by the largest, and β with it."),
    ("M = -Mᵀ, a symmetric zero-sum game", bound, _asymmetry, fix),
  )
  for expected, atol, fault, fix in rules:
    (x, i, j), worst = _worst(games, fault)
    context = f"{x}, " if matrix.ndim == 3 else ""
    pair = (
      f"worst pair: payoff[{context}{i}, {j}] = {games[x, i, j]:.6g} against "
      f"payoff[{context}{j}, {i}] = {games[x, j, i]:.6g}"
    )
    require(worst <= atol, "payoff", expected, pair, fix)
  game = 0.5 + (matrix - matrix.swapaxes(-1, -2)) / 4
  validate(game)
  return game


def distribution[T](
  what: str, p: T, shape: Sequence[int] | None = None, *, full_support: bool = False
) -> T:
  """Returns p, unchanged, if it holds probabilities [... A] that sum to 1 within 1e-4.

  Examples:
    >>> from nash_jax.games import checks
    >>> checks.distribution("policy", [0.25, 0.75])
    [0.25, 0.75]

  Args:
    what: the name that an error gives to p.
    shape: a policy's shape in the game at hand, [A] or [X A]; p may also be [A], shared by the
      contexts.
    full_support: whether every probability must be positive.

  Raises:
    ValueError: another shape or type, or not probabilities.
  """
  array = numbers(what, p)
  fits = array.ndim > 0 and array.size > 0
  axes = ["... A"] if shape is None else list(shape)
  if shape is not None:
    fits = fits and array.shape in (tuple(shape), tuple(shape)[-1:])
  expected = f"probabilities of shape {axes}, or [A] for all contexts"
  require(fits, what, expected, array.shape, "Give a probability for every action.")
  if concrete(array):
    host = np.asarray(array, np.float64)
    sums, least = host.sum(-1), host.min()
    positive = least > 0 if full_support else least >= 0
    good = bool(positive and np.all(np.abs(sums - 1) <= 1e-4))
    kind = "positive probabilities (full support)" if full_support else "probabilities"
    got = f"least {least:.3g}, sums {sums.min():.6g} to {sums.max():.6g}"
    fix = "Divide by the sum" + (", and leave out what has none." if full_support else ".")
    require(good, what, f"{kind} summing to 1", got, fix)
  return p


def log_distribution[T](
  what: str, log_p: T, shape: Sequence[int] | None = None, *, full_support: bool = False
) -> T:
  """Returns log_p, unchanged, if it holds log-probabilities [... A] in nats; see `distribution`.

  With `full_support` every logarithm must be finite, even where its exponential rounds to 0.

  Examples:
    >>> import numpy as np
    >>> from nash_jax.games import checks
    >>> checks.log_distribution("logp", np.log([0.25, 0.75])).shape
    (2,)

  Raises:
    ValueError: another shape or type, or not log-probabilities.
  """
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


def reference(ref: PolicyLike, shape: Sequence[int]) -> Float[np.ndarray, "*X A"]:
  """Returns a reference policy as float64 probabilities, one row a context.

  Examples:
    >>> from nash_jax.games import preference
    >>> preference.reference([0.25, 0.75], (2, 2))
    array([[0.25, 0.75],
           [0.25, 0.75]])

  Args:
    ref: probabilities [A], shared by the contexts, or [X A].
    shape: of a policy in the game: [A] or [X A].

  Raises:
    ValueError: not a distribution of full support.
  """
  probabilities = np.asarray(distribution("ref", ref, shape, full_support=True), np.float64)
  return np.broadcast_to(probabilities, shape)


def game_and_policies(p_win: GameLike, **policies: PolicyLike) -> None:
  """Checks a game and policies of it, by name; `ref` needs full support in jax's precision.

  Examples:
    >>> from nash_jax.games import checks
    >>> checks.game_and_policies([[0.5, 0.8], [0.2, 0.5]], policy=[0.5, 0.5])

  Args:
    p_win: [A A] or [X A A].
    **policies: probabilities [A], shared by the contexts, or [X A].

  Raises:
    ValueError: not a game, not probabilities, or a reference that rounds to 0.
  """
  shape = validate(p_win).shape[:-1]
  for what, policy in policies.items():
    distribution(what, policy, shape)
    if what == "ref" and concrete(policy):
      ref = jnp.asarray(policy)
      held: Bool[Array, ""] = jnp.isfinite(jnp.log(ref)).all()
      expected = f"positive probabilities (full support) that {ref.dtype} can hold"
      least = f"least {np.asarray(policy).min():.3g}"
      require(bool(held), "ref", expected, least, "Leave out what the reference never does.")


def actions_and_policies(p_win: GameLike, **policies: PolicyLike) -> None:
  """Checks a game [... A A] of any number of context axes, and probabilities [... A] by name.

  Examples:
    >>> from nash_jax.games import checks
    >>> checks.actions_and_policies([[0.5, 0.8], [0.2, 0.5]], opponent=[1, 0])

  Raises:
    ValueError: not a game, or a policy that is not probabilities of its actions.
  """
  game = numbers("p_win", p_win)
  square = game.ndim >= 2 and game.shape[-1] == game.shape[-2]
  require(square, "p_win", "[... A A]", game.shape, "Give P(y≻y') of every pair of actions.")
  if game.ndim > 3:
    game = game.reshape(-1, *game.shape[-2:])
  validate(game)
  for what, policy in policies.items():
    distribution(what, policy, full_support=what == "ref")
    same_actions(what, policy, game.shape[-1])


def same_actions(what: str, policy: PolicyLike, actions: int) -> None:
  """Checks that the last axis of a policy [... A] has one number for each action.

  Examples:
    >>> from nash_jax.games import checks
    >>> checks.same_actions("policy", [0.5, 0.5], 2)

  Raises:
    ValueError: it has another length.
  """
  expected, shape = f"one number for each of {actions} actions", np.shape(policy)
  require(shape[-1] == actions, what, expected, shape, "Give a probability for every action.")


def log_pair(
  log_p: LogPolicyLike, log_q: LogPolicyLike, *, full_support: bool = False
) -> tuple[Float[Array, "*#X A"], Float[Array, "*#X A"]]:
  """Returns two policies as jax arrays of log-probabilities of the same actions, in nats.

  Examples:
    >>> import numpy as np
    >>> from nash_jax.games import checks
    >>> log_p, log_q = checks.log_pair(np.log([0.5, 0.5]), np.log([0.25, 0.75]))

  Raises:
    ValueError: not log-probabilities, or of different actions.
  """
  for what, log in (("log_p", log_p), ("log_q", log_q)):
    log_distribution(what, log, full_support=full_support)
  same_actions("log_q", log_q, np.shape(log_p)[-1])
  return jnp.asarray(log_p), jnp.asarray(log_q)

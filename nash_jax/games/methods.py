"""The methods by name, and the steps that each one's own theory allows."""

from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np

from nash_jax.games import checks, gradients, proximal
from nash_jax.games.base import Knob, Knobs, Policies, harmonic, periodic
from nash_jax.games.checks import Values
from nash_jax.validation import one_of

UPDATES: dict[str, Mapping[str, Callable[..., Policies]]] = {
  "proximal": proximal.PROXIMAL,
  "gradient": gradients.GRADIENT,
}
# Names by which methods of gradient updates are known too.
ALIASES = {"nash_mp_ema": "nash_mp", "nash_mp_approximate": "nash_mp_two_step"}


def canonical(method: str) -> str:
  """Returns a method's own name, also of the other names that it is known by.

  Examples:
    >>> from nash_jax.games import methods
    >>> methods.canonical("nash_mp_ema"), methods.canonical("egpo")
    ('nash_mp', 'egpo')
  """
  return ALIASES.get(method, method)


def choose(
  method: str, updates: str | None = None, batch: int = 0, inner: int | None = None
) -> tuple[str, str]:
  """Returns the name and the kind of updates of the method that `solve` is asked for.

  Examples:
    >>> from nash_jax.games import methods
    >>> methods.choose("nash_mp")  # exact
    ('nash_mp', 'proximal')
    >>> methods.choose("nash_mp", "gradient")  # one gradient step, with an EMA target
    ('nash_mp', 'gradient')
    >>> methods.choose("nash_mp", "gradient", inner=10)  # two halves of ten gradient steps
    ('nash_mp_two_step', 'gradient')

  Args:
    method: a name of PROXIMAL or GRADIENT, or of ALIASES.
    updates: "proximal" or "gradient"; by default proximal where the method has such an update and
      nothing is sampled.
    batch: sampled pairs; only gradient updates have any.
    inner: gradient steps a half, which make nash_mp's gradient updates the two-step form.

  Raises:
    ValueError: an unknown method or updates that it does not have, with the choices; or inner < 1.
  """
  name = canonical(method)
  have = [kind for kind in UPDATES if name in UPDATES[kind]]
  if name != method:
    have = ["gradient"]
  if not have:
    choices = ", ".join(sorted({*proximal.PROXIMAL, *gradients.GRADIENT}))
    raise ValueError(f"unknown method {method!r}; choices: {choices}.")
  kind = updates or ("gradient" if batch else have[0])
  if kind not in have or (batch and kind == "proximal"):
    raise ValueError(
      f"{method} has no updates={kind!r} with batch={batch}; choices: {', '.join(have)}, of which "
      "proximal is exact: batch=0."
    )
  if inner is not None:
    checks.count("inner", inner)
  if (method, kind) == ("nash_mp", "gradient") and inner is not None:
    name = "nash_mp_two_step"
  return name, kind


def check_method(method: str, updates: str) -> None:
  """Checks that a method has such updates.

  Examples:
    >>> from nash_jax.games import solvers
    >>> solvers.check_method("nash_mp", "proximal")

  Raises:
    ValueError: an unknown method or updates; it lists the choices.
  """
  one_of("updates", updates, UPDATES)
  name = method if updates == "proximal" else canonical(method)
  one_of(f"method with {updates} updates", name, UPDATES[updates])


def unit(method: str, updates: str, beta: checks.Number) -> float:
  """Returns the rate at which a method's SGD moves, near the reference, as far as rate 1 along ∇J.

  ∇J is the gradient of regularised self-play. Online IPO's exact gradient is 4/β times that, Online
  DPO's about 2β times (its logistic slope is 1/4), and on uniform pairs EGPO's and MMD's
  regressions are scaled as Online IPO's. The unit of proximal updates is 1.

  Examples:
    >>> from nash_jax.games import solvers
    >>> solvers.unit("online_ipo", "gradient", beta=0.1)
    0.025

  Args:
    beta: KL weight in nats, ≥ 0.

  Raises:
    ValueError: an unknown method or updates, β < 0, NaN or infinite, or β = 0 of online_dpo.
  """
  check_method(method, updates)
  weight = float(checks.number("beta", beta, zero=True))
  if updates == "proximal":
    return 1.0
  if method == "online_dpo":
    return 1 / (2 * checks.number("beta", weight))
  return weight / 4 if method in ("online_ipo", "egpo", "mmd") else 1.0


def theory(
  method: str,
  updates: str,
  beta: checks.Number,
  actions: int,
  iterations: int,
  eta: checks.Numbers | None = None,
) -> Knobs:
  """Returns the knobs that a method's own theory allows; docs/games.md gives each with its source.

  SGD has theory for none of these losses. Its steps are 1/(β + β/η + ½) in units of ∇J, a bound on
  the curvature of J's surrogate; EGPO's and MMD's are their proximal steps in units of their
  regression. A step of 0 says that the theory needs a β > 0.

  Examples:
    >>> from nash_jax.games import solvers
    >>> knobs = solvers.theory("nash_mp", "proximal", beta=0.25, actions=3, iterations=10)
    >>> round(float(knobs.step), 4), knobs.eta  # s = 2/(1+2β), η = 2β
    (1.3333, 0.5)

  Args:
    beta: KL weight in nats, ≥ 0.
    actions: A, which EGPO's and MWU's theories read.
    iterations: K, the length of schedules.
    eta: η of a prox centre; by default 2β, the natural one.

  Raises:
    ValueError: an unknown method or updates, β < 0, NaN or infinite, η ≤ 0 or NaN, no actions.
  """
  check_method(method, updates)
  weight = float(checks.number("beta", beta, zero=True))
  actions = checks.count("actions", actions)
  iterations = checks.count("iterations", iterations)
  if eta is not None:
    checks.number("eta", eta, infinite=True, array=True)
  magnetic = weight / (1 + weight**2) if weight < 1e150 else 1 / weight
  kappa = harmonic(iterations)
  if method == "mpo":  # a period beyond the last step never ends
    often = magnetic * weight * iterations > 1
    kappa = periodic(int(2 / (magnetic * weight)) if often else iterations + 1, iterations)
    kappa = kappa if weight > 0 else periodic(1, iterations)
  natural = 2 * weight  # whose step has a limit at β = 0
  centre: Knob = natural if eta is None else np.asarray(eta)[()]
  prox = 2 / (1 + 2 * weight) if np.all(centre == natural) else _prox_step(weight, centre)
  steps: dict[str, Knob] = {
    "nash_mp": prox,
    "proximal_point": prox,
    "egpo": 1 / (1 + weight + 2 * actions),
    "mmd": magnetic,
    "mpo": magnetic,
    "omwu": 1 / 8,
    "fictitious_play": 1.0,
    "mwu": (8 * jnp.log(actions) / iterations) ** 0.5,
    "nash_md": 2 / (weight * (jnp.arange(iterations) + 2.0)) if weight > 0 else 0.0,
  }
  if updates == "proximal":
    step = steps[method]
  elif not weight > 0:
    step = 0.0
  elif method in ("egpo", "mmd"):
    step = steps[method] * actions * unit(method, updates, weight)
  else:
    step = unit(method, updates, weight) / (weight + weight / centre + 0.5)
  return Knobs(step, centre, kappa, 0.25)


def _prox_step(beta: float, eta: Values) -> Values:
  """Returns s of a prox term of weight β/η: 1/β without one, 0 where β = 0 leaves only the term."""
  if not beta > 0:
    return 0.0
  finite = np.where(np.isinf(eta), 1, eta)
  return np.where(np.isinf(eta), 1 / beta, finite / (beta * (1 + finite)))

"""What the solvers share: the game they play, their hyperparameters, their state and schedules.

Axes: A actions, X contexts; `*X` stands for no context axis, for [X], or for more of them. K is the
number of iterations of a schedule.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, Real

from nash_jax.games import checks
from nash_jax.games.checks import AnyArray
from nash_jax.validation import one_of, require

Knob = checks.Values  # a number, or a schedule [K] of them


class Game(NamedTuple):
  """A regularised game, as the solvers read it.

  Examples:
    >>> import numpy as np
    >>> from nash_jax.games import solvers
    >>> p_win = np.array([[0.5, 0.75], [0.25, 0.5]])
    >>> game = solvers.Game(p_win, log_ref=np.log([0.5, 0.5]), beta=0.1)

  Attributes:
    p_win: P(y ≻ y').
    log_ref: log-probabilities of the reference in nats, finite, one row a context.
    beta: KL weight in nats, ≥ 0; [S] where a leading axis of games is mapped over.
  """

  p_win: Float[AnyArray, "*X A A"]
  log_ref: Float[AnyArray, "*X A"]
  beta: checks.Values


class ZooGame(NamedTuple):
  """A game and what is known of it.

  Examples:
    >>> from nash_jax.games import zoo
    >>> zoo.rock_paper_scissors().labels
    ('R', 'P', 'S')

  Attributes:
    name: what tables call it.
    p_win: P(y ≻ y'), float64.
    labels: a name for each action.
    nash: an equilibrium of the original game, or None where none is known.
    note: what is known of it.
    votes: comparisons behind each entry of a measured game.
  """

  name: str
  p_win: Float[np.ndarray, "*X A A"]
  labels: tuple[Any, ...]
  nash: Float[np.ndarray, "*X A"] | None
  note: str
  votes: Real[np.ndarray, "A A"] | None = None


class Knobs(NamedTuple):
  """Hyperparameters, each a number, or a schedule that is read at the iteration's index.

  Examples:
    >>> from nash_jax.games import solvers
    >>> knobs = solvers.Knobs(step=1.0, eta=0.2, kappa=solvers.harmonic(100), mixture=0.25)

  Attributes:
    step: s of a proximal update, or the learning rate of a gradient step.
    eta: η of a prox centre: β/η weighs the KL to it.
    kappa: κ in [0, 1], the rate at which nash_mp's target or mpo's magnet moves to the iterate.
    mixture: weight in [0, 1] of the reference in nash_md's opponent, under gradient updates.
  """

  step: Knob
  eta: Knob
  kappa: Knob
  mixture: Knob


class State(NamedTuple):
  """Where a solver is.

  Examples:
    >>> import numpy as np
    >>> from nash_jax.games import solvers
    >>> int(solvers.init(np.log([0.5, 0.5])).k)
    0

  Attributes:
    logp: log-probabilities of the iterate.
    other: a second policy, by its logits: half iterate, target, magnet, mean or auxiliary iterate.
    k: completed iterations.
  """

  logp: Float[AnyArray, "*X A"]
  other: Float[AnyArray, "*#X A"]
  k: Int[AnyArray, ""] | int


class Draws(NamedTuple):
  """How gradients are taken.

  Examples:
    >>> import jax
    >>> from nash_jax.games import solvers
    >>> sampled = solvers.Draws(jax.random.key(0), batch=8)

  Attributes:
    key: what pairs are sampled with; None where batch is 0.
    batch: sampled pairs a context and step; 0 sums over all pairs, which is the exact gradient.
    inner: gradient steps of each half of nash_mp_two_step.
  """

  key: PRNGKeyArray | None
  batch: int = 0
  inner: checks.Count = 10


Policies = tuple[
  Float[AnyArray, "*X A"], Float[AnyArray, "*#X A"]
]  # what a step returns: (logp, other)


def init(log_ref: Float[AnyArray, "*X A"]) -> State:
  """Returns the state in which every solver starts: at the reference.

  Examples:
    >>> import numpy as np
    >>> from nash_jax.games import solvers
    >>> solvers.init(np.log([0.25, 0.75])).logp.shape
    (2,)

  Args:
    log_ref: log-probabilities in nats.
  """
  return State(log_ref, log_ref, jnp.zeros((), jnp.int32))


def harmonic(iterations: int) -> Float[Array, "K"]:
  """Returns κ_k = 10/(k+10) after k completed steps from 0, the schedule of the paper's games.

  It is κ's `harmonic` schedule of training, with `kappa_offset` 10 (2505.19731).

  Examples:
    >>> from nash_jax.games import solvers
    >>> solvers.harmonic(11)[::10].tolist()
    [1.0, 0.5]

  Args:
    iterations: the schedule's length K.

  Raises:
    ValueError: iterations is not a whole number ≥ 1.
  """
  return 10 / (jnp.arange(checks.count("iterations", iterations)) + 10.0)


def periodic(period: int, iterations: int) -> Float[Array, "K"]:
  """Returns the κ that copies after every `period` steps, and stands still between them.

  Examples:
    >>> from nash_jax.games import solvers
    >>> solvers.periodic(2, 5).tolist()
    [0.0, 1.0, 0.0, 1.0, 0.0]

  Args:
    period: steps from one copy to the next.
    iterations: the schedule's length K.

  Raises:
    ValueError: either is not a whole number ≥ 1.
  """
  steps = jnp.arange(checks.count("iterations", iterations)) + 1
  return (steps % checks.count("period", period) == 0).astype(float)


def check(game: Game, knobs: Knobs | None = None, state: State | None = None) -> None:
  """Checks what a step is given. What is traced is checked by its shape alone.

  Examples:
    >>> import numpy as np
    >>> from nash_jax.games import solvers
    >>> solvers.check(solvers.Game(np.full((2, 2), 0.5), np.log([0.5, 0.5]), beta=0.1))

  Raises:
    ValueError: not a game, a reference without full support, β < 0, a knob outside its range, or a
      state that holds no policies of this game.
  """
  checks.actions_and_policies(game.p_win)
  checks.number("beta", game.beta, zero=True, array=True)
  policy = np.shape(game.p_win)[:-1]
  checks.log_distribution("log_ref", game.log_ref, policy, full_support=True)
  if state is not None:
    checks.log_distribution("logp", state.logp, policy)
    shape, fix = np.shape(state.other), "Begin with init(log_ref)."
    require(shape in (policy, policy[-1:]), "other", f"a policy {list(policy)}", shape, fix)
  for name, knob in () if knobs is None else knobs._asdict().items():
    check_knob(name, knob)


def check_knob(name: str, value: checks.Numbers) -> None:
  """Checks that a knob lies in its range. η = inf is no prox term; 0 stands for unset.

  Examples:
    >>> from nash_jax.games import solvers
    >>> solvers.check_knob("kappa", 1.5)
    Traceback (most recent call last):
    ValueError: kappa: expected a number in [0, 1], got 1.5. Give one in this interval.

  Args:
    name: a field of Knobs.
    value: a number, or an array of any shape.

  Raises:
    ValueError: another name, a negative number, NaN, κ or mixture > 1, or a step that is infinite.
  """
  most = {"step": np.inf, "eta": np.inf, "kappa": 1.0, "mixture": 1.0}
  one_of("knob", name, most)
  checks.number(name, value, zero=True, at_most=most[name], infinite=name == "eta", array=True)

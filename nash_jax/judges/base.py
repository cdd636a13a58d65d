"""The judge interface: parameters and a pure function, and how responses are paired for it.

A bundled judge reads each response once (`read`) and compares two readings (`compare`); `pairwise`
makes its function of these two. To add a judge, add a module here and an entry to judges.JUDGES.
"""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import flax.struct
import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, Bool, Float

from nash_jax.types import Answers, Mean, Params, Prompts, Verdict, is_probability

MODELS = ("gemma", "gemma_text", "bradley_terry", "gpm")  # judges that have a model
TIE = 0.05  # a pair with |p - 1/2| below this counts as a tie, only in metrics

JudgeFn = Callable[..., Verdict]  # (params, prompts, responses, opponents=None)


class Server(Protocol):
  """What a judge has besides its `fn` if it asks a server."""

  def keep_answers(self, folder: pathlib.Path) -> None:
    """Stores answers in a file of this folder, so that the same questions are not asked again."""

  def finish(self) -> None:
    """Logs lost answers after the last comparison; raises ValueError if none could be read."""


@flax.struct.dataclass
class Judge:
  """Parameters and a jittable `fn(params, prompts, responses, opponents or None) -> Verdict`.

  With opponents, p_win [B K J] compares every response with every opponent's. Without, every pair
  of responses is compared once: p_win [B K K] has p_ji = 1 - p_ij, and the diagonal is 1/2 and
  invalid.

  Attributes:
    server: set if the judge asks a server. Call the `fn` of such a judge outside jit, so that its
      ValueErrors and Ctrl-C reach the caller.
  """

  params: Params
  fn: JudgeFn = flax.struct.field(pytree_node=False)
  server: Server | None = flax.struct.field(pytree_node=False, default=None)


class Comparison(NamedTuple):
  """A judge's result for N pairs: P(a ≻ b), whether it is valid, and its metrics.

  Attributes:
    p_first: P(a ≻ b) with a shown first, if the judge reads both orders.
  """

  p: Float[Array, "N"]
  valid: Bool[Array, "N"]
  metrics: dict[str, Mean]
  p_first: Float[Array, "N"] | None = None


Compare = Callable[[Params, Prompts, Any, Any], Comparison]
Read = Callable[[Params, Prompts, Answers], Any]


def _unread(params: Params, prompts: Prompts, answers: Answers) -> Answers:
  return answers


def pairwise(compare: Compare, read: Read = _unread, scalar: bool = False) -> JudgeFn:
  """Returns a judge's `fn`, given how it reads one response and compares one pair.

  Adds the metric `tie_mass`. A P outside [0, 1] is invalid.

  Args:
    compare: (params, prompts of N pairs, readings of a, readings of b) -> Comparison, whose last
      field is optional.
    read: (params, N prompts, Answers) -> readings, arrays with leading axis N; runs once per
      response.
    scalar: whether readings are rewards, which the verdict then includes. Comparisons with a reward
      that is not finite are invalid.
  """

  def read_all(params, prompts, responses):
    batch, samples = responses.stopped.shape
    answers = Answers(responses.tokens, responses.mask, responses.stopped)
    readings = read(params, _repeat(prompts, samples), jax.tree.map(_flatten, answers))
    return jax.tree.map(lambda leaf: leaf.reshape(batch, samples, *leaf.shape[1:]), readings)

  def fn(params, prompts, responses, opponents=None) -> Verdict:
    batch, samples = responses.stopped.shape
    a = read_all(params, prompts, responses)
    if opponents is None:
      b, num_opponents, (i, j) = a, samples, np.triu_indices(samples, 1)
      if not len(i):
        raise ValueError("comparing responses with each other takes at least two per prompt, got 1")
    else:
      b, num_opponents = read_all(params, prompts, opponents), opponents.stopped.shape[1]
      i, j = np.indices((samples, num_opponents)).reshape(2, -1)
    firsts = jax.tree.map(lambda leaf: _flatten(leaf[:, i]), a)
    seconds = jax.tree.map(lambda leaf: _flatten(leaf[:, j]), b)
    p, valid, metrics, p_first = Comparison(
      *compare(params, _repeat(prompts, len(i)), firsts, seconds)
    )
    if scalar:
      valid = valid & jnp.isfinite(firsts) & jnp.isfinite(seconds)
    valid = valid & is_probability(p)
    metrics = {**metrics, "tie_mass": Mean.from_values(jnp.abs(p - 0.5) < TIE, valid)}

    def place(pairs: Array, fill: Any, turned: Array) -> Array:
      """Returns values of all pairs as [B K J]; `turned` has those of (b, a)."""
      table = jnp.full((batch, samples, num_opponents), fill, pairs.dtype)
      table = table.at[:, i, j].set(pairs.reshape(batch, -1))
      return table if opponents is not None else table.at[:, j, i].set(turned.reshape(batch, -1))

    p_win, compared = place(p, 0.5, 1 - p), place(valid, False, valid)
    # p is the mean of both orders, so 2p - p_first is the P with b shown first.
    first = None if p_first is None else place(p_first, 0.5, 1 - (2 * p - p_first))
    return Verdict(p_win, compared, a if scalar else None, metrics, first).checked()

  return fn


def compare_rewards(params, prompts, a: Array, b: Array) -> Comparison:
  """Returns P(a ≻ b) = σ(a - b) of rewards a and b, for `pairwise` with scalar=True."""
  return Comparison(jax.nn.sigmoid(a - b), jnp.ones(a.shape, bool), {})


def labels(fn: JudgeFn, form: str, params, prompts, responses, opponents, key: Array) -> Verdict:
  """Returns fn's verdict; with form="sampled", each probability is replaced by a Bernoulli draw."""
  verdict = fn(params, prompts, responses, opponents).checked()
  verdict = dataclasses.replace(verdict, p_win_first=None)  # no loss reads it
  if form == "soft":
    return verdict
  wins = jax.random.bernoulli(key, verdict.p_win).astype(verdict.p_win.dtype)
  if opponents is None:  # both sides of a pair share one label
    upper = jnp.triu(wins, 1)
    wins = upper + jnp.tril(1 - jnp.swapaxes(upper, 1, 2), -1)
  return dataclasses.replace(verdict, p_win=wins)


def accuracy(ahead: Float[Array, "N"], p_win: Float[Array, "N"], counted: Bool[Array, "N"]) -> Mean:
  """Returns the share of correct predictions over pairs with a winner; a draw is half correct.

  Args:
    ahead: the prediction: positive if a wins, negative if b wins.
  """
  right = 0.5 + 0.5 * jnp.sign(ahead) * jnp.sign(p_win - 0.5)
  return Mean.from_values(right, counted & (p_win != 0.5))


def _flatten(array: Array) -> Array:
  return array.reshape(-1, *array.shape[2:])


def _repeat(prompts: Prompts, times: int) -> Prompts:
  return jax.tree.map(lambda leaf: jnp.repeat(leaf, times, axis=0), prompts)

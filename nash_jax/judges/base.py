"""The judge interface: parameters and a pure function, and how responses are paired for it.

A bundled judge reads each response once (`read`) and compares two readings (`compare`); `pairwise`
makes its function from these two. A new judge is a module here and an entry of judges.JUDGES.
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
TIE = 0.05  # |p - 1/2| below which a pair counts as a tie, in metrics only

JudgeFn = Callable[..., Verdict]  # (params, prompts, responses, opponents=None)


class Server(Protocol):
  """What a judge has beside its `fn` if it asks a server."""

  def keep_answers(self, folder: pathlib.Path) -> None:
    """Keeps answers in a file of this folder: another run of the same questions asks nothing."""

  def finish(self) -> None:
    """Says what was lost, after the last comparison; ValueError where nothing could be read."""


@flax.struct.dataclass
class Judge:
  """Parameters and `fn(params, prompts, responses, opponents or None) -> Verdict`, jittable.

  With opponents, p_win [B K J] compares every response with every opponent's. Without, the
  responses are compared with each other: every pair once, p_win [B K K] with p_ji = 1 - p_ij; the
  diagonal is 1/2 and not valid.

  Attributes:
    server: of a judge that asks one. Call the `fn` of such a judge outside jit: its ValueErrors
      and Ctrl-C then reach the caller; jit would bury them.
  """

  params: Params
  fn: JudgeFn = flax.struct.field(pytree_node=False)
  server: Server | None = flax.struct.field(pytree_node=False, default=None)


class Comparison(NamedTuple):
  """What a judge says of N pairs: P(a ≻ b), whether it is valid, and its metrics.

  Attributes:
    p_first: P(a ≻ b) where a is shown first, of a judge that is shown both orders.
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
  """Returns a judge's `fn`, given how it reads a single response and compares a single pair.

  Args:
    compare: (params, prompts of N pairs, readings of a, readings of b) -> Comparison, whose last
      field may be left out. The metric `tie_mass` is added. A P that is not in [0, 1] is not valid.
    read: (params, N prompts, Answers) -> readings, arrays with leading axis N; runs once for each
      response.
    scalar: readings are rewards, which the verdict then holds too; comparisons of one that is not
      finite are not valid.
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
        raise ValueError("comparing responses with each other takes at least two a prompt, got 1")
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
      """Returns values of all pairs as [B K J], `turned` being those of (b, a)."""
      table = jnp.full((batch, samples, num_opponents), fill, pairs.dtype)
      table = table.at[:, i, j].set(pairs.reshape(batch, -1))
      return table if opponents is not None else table.at[:, j, i].set(turned.reshape(batch, -1))

    p_win, compared = place(p, 0.5, 1 - p), place(valid, False, valid)
    # p is the mean of both orders; that in which b is shown first tells the other side's P.
    first = None if p_first is None else place(p_first, 0.5, 1 - (2 * p - p_first))
    return Verdict(p_win, compared, a if scalar else None, metrics, first).checked()

  return fn


def compare_rewards(params, prompts, a: Array, b: Array) -> Comparison:
  """Returns P(a ≻ b) = σ(a - b) of rewards a and b; see `pairwise`, with scalar=True."""
  return Comparison(jax.nn.sigmoid(a - b), jnp.ones(a.shape, bool), {})


def labels(fn: JudgeFn, form: str, params, prompts, responses, opponents, key: Array) -> Verdict:
  """Returns fn's verdict; with form="sampled", each probability is replaced by a Bernoulli draw."""
  verdict = fn(params, prompts, responses, opponents).checked()
  verdict = dataclasses.replace(verdict, p_win_first=None)  # which no loss reads
  if form == "soft":
    return verdict
  wins = jax.random.bernoulli(key, verdict.p_win).astype(verdict.p_win.dtype)
  if opponents is None:  # each pair has one label, seen from both sides
    upper = jnp.triu(wins, 1)
    wins = upper + jnp.tril(1 - jnp.swapaxes(upper, 1, 2), -1)
  return dataclasses.replace(verdict, p_win=wins)


def accuracy(ahead: Float[Array, "N"], p_win: Float[Array, "N"], counted: Bool[Array, "N"]) -> Mean:
  """Returns the share of pairs told right, of those that have a winner; a draw is half right.

  Args:
    ahead: positive where a is said to win, negative where b is.
  """
  right = 0.5 + 0.5 * jnp.sign(ahead) * jnp.sign(p_win - 0.5)
  return Mean.from_values(right, counted & (p_win != 0.5))


def _flatten(array: Array) -> Array:
  return array.reshape(-1, *array.shape[2:])


def _repeat(prompts: Prompts, times: int) -> Prompts:
  return jax.tree.map(lambda leaf: jnp.repeat(leaf, times, axis=0), prompts)

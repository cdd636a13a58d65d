"""Judges: which of two responses to a prompt is preferred, and with what probability.

A judge is any pair of parameters and a pure function. The bookkeeping of pairs is here, once; a
bundled judge reads each response (`read`) and compares two readings (`compare`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, Bool, Int

from nash_jax.config import JUDGES, choose
from nash_jax.models import partition
from nash_jax.types import Mean, Params, Prompts, Responses, Verdict

TIE = 0.05  # |p - 1/2| below which a pair counts as a tie, in metrics only


@flax.struct.dataclass
class Judge:
  """Parameters and `fn(params, prompts, y, y2 or None) -> Verdict`, pure and jittable.

  With y2, p_win [B K J] compares every y_k with every y2_j. Without, y is compared with itself:
  every pair once, p_win [B K K] with p_ji = 1 - p_ij, and the diagonal 1/2 and not valid.
  """

  params: Params
  fn: Callable[..., Verdict] = flax.struct.field(pytree_node=False)


class Answers(NamedTuple):
  """N responses, one to each of N prompts; the fields are those of Responses."""

  tokens: Int[Array, "N L"]
  mask: Bool[Array, "N L"]
  stopped: Bool[Array, "N"] | None = None


def make(config, tokenizer, params: Params | None = None, mesh=None) -> Judge:
  """Builds the judge that `config` (the `judge` part of a run's config) names.

  Args:
    tokenizer: the policy's, in whose tokens prompts and responses come.
    params: of a gemma or bradley_terry judge, where they are loaded already; else they come from
      `config.model.weights`, and are random where that is "".
    mesh: on which the parameters are laid out as they load; default the first device.

  Raises:
    ValueError: an unknown judge, weights or a tokenizer that do not fit, a table that is no game.
  """
  from nash_jax.judges import bradley_terry, gemma, http, population, table, text

  choose("judge.name", config.name, JUDGES)
  if config.name == "http":
    return http.make(config, tokenizer)
  if config.name.startswith("table") or config.name == "population":
    small = table.make(config, tokenizer) if "table" in config.name else population.make(tokenizer)
    return small if mesh is None else small.replace(params=partition.place(small.params, mesh))
  module = {"gemma": gemma, "gemma_text": text, "bradley_terry": bradley_terry}[config.name]
  return module.make(config, tokenizer, params, mesh)


def pairwise(
  compare: Callable[[Params, Prompts, Any, Any], tuple[Array, Array, dict[str, Mean]]],
  read: Callable[[Params, Prompts, Answers], Any] = lambda params, prompts, answers: answers,
  scalar: bool = False,
) -> Callable[..., Verdict]:
  """Returns a judge's `fn` from what it says of single responses and of single pairs.

  Args:
    compare: from (params, prompts of N pairs, readings of a, readings of b) to (P(a ≻ b) [N],
      valid [N], metrics). The metric `tie_mass` is added.
    read: from N prompts and Answers to readings, arrays with leading axis N; runs once a response.
    scalar: readings are rewards, to appear as the verdict's scores.
  """

  def fn(params, prompts: Prompts, y: Responses, y2: Responses | None = None) -> Verdict:
    def readings(responses):
      batch, samples = responses.stopped.shape
      answers = Answers(responses.tokens, responses.mask, responses.stopped)
      out = read(params, _repeat(prompts, samples), jax.tree.map(_rows, answers))
      return jax.tree.map(lambda x: x.reshape(batch, samples, *x.shape[1:]), out)

    batch, samples = y.stopped.shape
    a = readings(y)
    if y2 is None:
      b, (i, j) = a, np.triu_indices(samples, 1)
      if not len(i):
        raise ValueError("y against itself needs at least two responses a prompt, got 1")
    else:
      b, (i, j) = readings(y2), np.indices((samples, y2.stopped.shape[1])).reshape(2, -1)
    p, valid, metrics = compare(
      params,
      _repeat(prompts, len(i)),
      jax.tree.map(lambda x: _rows(x[:, i]), a),
      jax.tree.map(lambda x: _rows(x[:, j]), b),
    )
    metrics = {**metrics, "tie_mass": Mean.of(jnp.abs(p - 0.5) < TIE, valid)}
    shape = (batch, samples, samples if y2 is None else y2.stopped.shape[1])
    p, valid = p.reshape(batch, -1), valid.reshape(batch, -1)
    p_win = jnp.full(shape, 0.5, p.dtype).at[:, i, j].set(p)
    known = jnp.zeros(shape, bool).at[:, i, j].set(valid)
    if y2 is None:
      p_win, known = p_win.at[:, j, i].set(1 - p), known.at[:, j, i].set(valid)
    return Verdict(p_win, known, a if scalar else None, metrics)

  return fn


def labels(fn: Callable[..., Verdict], kind: str, params, prompts, y, y2, key) -> Verdict:
  """Returns fn's verdict, with "sampled" labels drawn with its probabilities instead of them."""
  verdict = fn(params, prompts, y, y2)
  if kind == "soft":
    return verdict
  won = jax.random.bernoulli(key, verdict.p_win).astype(verdict.p_win.dtype)
  if y2 is None:  # each pair has one label, seen from both sides
    upper = jnp.triu(won, 1)
    won = upper + jnp.tril(1 - jnp.swapaxes(upper, 1, 2), -1)
  return verdict.replace(p_win=won)


def _rows(x):
  return x.reshape(-1, *x.shape[2:])


def _repeat(prompts: Prompts, times: int) -> Prompts:
  return jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), prompts)

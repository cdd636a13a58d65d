"""Sequence log-probabilities without an array of shape [batch, length, vocabulary]."""

import functools
from collections.abc import Callable

import jax
from jax import numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from nash_jax.models import gemma, sharding
from nash_jax.types import Params, Prompts

_VOCABULARY = ("fsdp", "tensor")  # mesh axes that split the vocabulary when logits are computed


def entropy(log_p: Float[Array, "N S V"], labels: Int[Array, "N S"]) -> Float[Array, "N S"]:
  """Returns the entropy of distributions, in nats; constant."""
  frozen = jax.lax.stop_gradient(log_p)
  return -jnp.sum(jnp.exp(frozen) * frozen, axis=-1)


def likelier(log_p: Float[Array, "N S V"], labels: Int[Array, "N S"]) -> Float[Array, "N S"]:
  """Returns the probability of all ids together that are likelier than the label.

  If it is p or more, top-p leaves the label out.
  """
  labels, ids = labels[..., None], jax.lax.broadcasted_iota(labels.dtype, log_p.shape, 2)
  # Fused in two ways, the label's own probability may be rounded in two ways.
  above = (log_p > jnp.take_along_axis(log_p, labels, axis=-1)) & (ids != labels)
  return jnp.sum(jnp.where(above, jnp.exp(log_p), 0.0), axis=-1)


def token_logprobs(
  params: Params,
  model_config: gemma.GemmaConfig,
  tokens: Int[Array, "N T"],
  mask: Bool[Array, "N T"],
  first: int = 1,
  *,
  forbidden: Bool[Array, "V"] | None = None,
  temperature: float = 1.0,
  dtype: DTypeLike = jnp.float32,
  remat: bool = False,
  chunk: int = 32,
  mixture: float | Float[Array, ""] | Float[Array, "M"] | None = None,
  measure: Callable[[Array, Array], Array] = entropy,
  normaliser: bool = False,
) -> tuple[Float[Array, "N S"], ...]:
  """Returns log-probability and entropy (nats) of tokens[:, first:], each given those before it.

  Args:
    params: of the model, or with `mixture` of several.
    mask: False on padding, which is never attended to and gets 0.
    first: column of the first evaluated token, at least 1; S = T - first.
    forbidden: ids of probability 0.
    temperature: divides the logits.
    chunk: number of columns whose logits exist at the same time.
    mixture: as in sampler.make_sampler, whose distribution this is.
    measure: (log-probabilities of all ids, the tokens) -> what is returned in place of entropy.
    normaliser: return the log of the sum of the exponentiated logits as well.
  """
  input_mask, inputs = mask[:, :-1], tokens[:, :-1]
  positions, visible = gemma.positions_of(input_mask), gemma.causal_mask(input_mask)
  models = (params,) if mixture is None else tuple(params)
  outputs = [
    gemma.forward(p, model_config, inputs, positions, visible, dtype=dtype, remat=remat)[0]
    for p in models
  ]
  hidden, labels = [x[:, first - 1 :] for x in outputs], tokens[:, first:]
  num_labels = labels.shape[1]
  size = min(chunk, num_labels)

  @functools.partial(jax.checkpoint, prevent_cse=False)
  def chunk_logprobs(embedders, hidden, labels):
    each = [
      gemma.logits({"embedder": embedder}, model_config, x, forbidden)
      for embedder, x in zip(embedders, hidden, strict=True)
    ]
    logits = gemma.mixed(each, mixture) / temperature
    logits = sharding.constrain(logits, "data", None, _VOCABULARY)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    logp = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0] - log_z
    found = logp, measure(logits - log_z[..., None], labels)
    return (*found, log_z) if normaliser else found

  def split(a):  # [N, S, ...] -> [chunks, N, size, ...], the last chunk filled with zeros
    a = jnp.pad(a, [(0, 0), (0, -num_labels % size)] + [(0, 0)] * (a.ndim - 2))
    return jnp.moveaxis(a.reshape(a.shape[0], -1, size, *a.shape[2:]), 1, 0)

  # Each device holds its part of the vocabulary for all rows, so the table is never gathered.
  tables = [sharding.constrain(p["embedder"]["input_embedding"], _VOCABULARY) for p in models]
  embedders = [{"input_embedding": table} for table in tables]
  # With a scan, only one chunk's logits exist at a time.
  chunks = ([split(x) for x in hidden], split(labels))
  _, out = jax.lax.scan(lambda none, xs: (none, chunk_logprobs(embedders, *xs)), None, chunks)
  return tuple(
    jnp.where(mask[:, first:], jnp.moveaxis(a, 0, 1).reshape(len(tokens), -1)[:, :num_labels], 0.0)
    for a in out  # [chunks, N, size] -> [N, S]
  )


def response_logprobs(
  params: Params,
  model_config: gemma.GemmaConfig,
  prompts: Prompts,
  tokens: Int[Array, "B K L"],
  mask: Bool[Array, "B K L"],
  **options,
) -> tuple[Float[Array, "B K L"], ...]:
  """Returns log-probability and entropy (nats) of every response token given its prompt.

  Prompts are padded on the left, so all responses start at the same column. `options` are those of
  `token_logprobs`.
  """
  shape, first = tokens.shape, prompts.tokens.shape[1]

  def join(left, right):
    left = jnp.repeat(left, shape[1], axis=0)
    return jnp.concatenate([left, right.reshape(-1, shape[2])], axis=1)

  sequences, masks = join(prompts.tokens, tokens), join(prompts.mask, mask)
  found = token_logprobs(params, model_config, sequences, masks, first, **options)
  return tuple(x.reshape(shape) for x in found)

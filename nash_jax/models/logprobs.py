"""Sequence log-probabilities without an array of shape [batch, length, vocabulary]."""

import functools

import jax
from jax import numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from nash_jax.models import gemma, sharding
from nash_jax.types import Params, Prompts

_VOCABULARY = ("fsdp", "tensor")  # mesh axes that split the vocabulary when logits are computed


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
) -> tuple[Float[Array, "N S"], Float[Array, "N S"]]:
  """Returns log-probability and entropy (nats) of tokens[:, first:], each given those before it.

  Args:
    mask: False on padding, which is never attended to and gets 0.
    first: column of the first evaluated token, at least 1; S = T - first.
    forbidden: ids of probability 0.
    temperature: divides the logits.
    chunk: number of columns whose logits exist at the same time.
  """
  input_mask, inputs = mask[:, :-1], tokens[:, :-1]
  positions, visible = gemma.positions_of(input_mask), gemma.causal_mask(input_mask)
  x, _ = gemma.forward(params, model_config, inputs, positions, visible, dtype=dtype, remat=remat)
  x, labels = x[:, first - 1 :], tokens[:, first:]
  num_labels = labels.shape[1]
  size = min(chunk, num_labels)

  @functools.partial(jax.checkpoint, prevent_cse=False)
  def chunk_logprobs(embedder, x, labels):
    logits = gemma.logits({"embedder": embedder}, model_config, x, forbidden) / temperature
    logits = sharding.constrain(logits, "data", None, _VOCABULARY)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    logp = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0] - log_z
    frozen = jax.lax.stop_gradient(logits - log_z[..., None])
    return logp, -jnp.sum(jnp.exp(frozen) * frozen, axis=-1)

  def split(a):  # [N, S, ...] -> [chunks, N, size, ...], the last chunk filled with zeros
    a = jnp.pad(a, [(0, 0), (0, -num_labels % size)] + [(0, 0)] * (a.ndim - 2))
    return jnp.moveaxis(a.reshape(a.shape[0], -1, size, *a.shape[2:]), 1, 0)

  # Each device holds its part of the vocabulary for all rows, so the table is never gathered.
  table = sharding.constrain(params["embedder"]["input_embedding"], _VOCABULARY)
  embedder = {"input_embedding": table}
  # With a scan, only one chunk's logits exist at a time.
  _, out = jax.lax.scan(
    lambda none, xs: (none, chunk_logprobs(embedder, *xs)), None, (split(x), split(labels))
  )
  logp, entropy = (
    jnp.where(mask[:, first:], jnp.moveaxis(a, 0, 1).reshape(len(tokens), -1)[:, :num_labels], 0.0)
    for a in out  # [chunks, N, size] -> [N, S]
  )
  return logp, entropy


def response_logprobs(
  params: Params,
  model_config: gemma.GemmaConfig,
  prompts: Prompts,
  tokens: Int[Array, "B K L"],
  mask: Bool[Array, "B K L"],
  **options,
) -> tuple[Float[Array, "B K L"], Float[Array, "B K L"]]:
  """Returns log-probability and entropy (nats) of every response token given its prompt.

  Prompts are padded on the left, so all responses start at the same column. `options` are those of
  `token_logprobs`.
  """
  shape, first = tokens.shape, prompts.tokens.shape[1]

  def join(left, right):
    left = jnp.repeat(left, shape[1], axis=0)
    return jnp.concatenate([left, right.reshape(-1, shape[2])], axis=1)

  sequences, masks = join(prompts.tokens, tokens), join(prompts.mask, mask)
  logp, entropy = token_logprobs(params, model_config, sequences, masks, first, **options)
  return logp.reshape(shape), entropy.reshape(shape)

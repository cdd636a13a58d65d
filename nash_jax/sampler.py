"""Samples responses on the device: one prefill per prompt, then a while_loop over a KV cache.

A decoding step runs on N = B * K rows; the K rows of a prompt are adjacent.
"""

from collections.abc import Callable

import jax
from jax import numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from nash_jax.models import decoding, gemma, lora, sharding
from nash_jax.types import Params, Prompts, Responses
from nash_jax.validation import require

Sample = Callable[[Params, Prompts, Array], Responses]
MOST_AT_ONCE = 4096  # a larger vocabulary is sampled in two levels: first a chunk, then an id
CHUNK = 512


def make_sampler(
  model_config: gemma.GemmaConfig,
  *,
  max_tokens: int,
  samples: int,
  stop_ids: tuple[int, ...],
  pad_id: int,
  forbidden: Bool[Array, "V"] | None = None,
  temperature: float = 1.0,
  top_k: int = 0,
  top_p: float = 1.0,
  dtype: DTypeLike = jnp.float32,
  mixture: float | Float[Array, ""] | Float[Array, "M"] | None = None,
  behaviour_temperature: float = 1.0,
) -> Sample:
  """Returns `sample(params, prompts, key) -> Responses`, pure and jittable.

  With `mixture` m, `params` is the pair (policy, reference), and each token is drawn from the
  token-wise geometric mixture: logits (1 - m)·policy + m·reference, after soft-cap and forbidden
  ids, before temperature, renormalised (Munos et al. 2312.00886, section 7). m < 0 extrapolates
  from the reference: decoding-time realignment with λ = 1 - m. With M numbers, `params` are M + 1
  models, and the logits (1 - Σm)·first + Σ m_i·the others: from a reference towards M policies.

  A row's tokens depend on the key, its position in the batch and its prompt. They do not depend on
  the batch size or on other rows.

  Args:
    max_tokens: L; a response without a stop token ends here, with `stopped` False.
    samples: K, responses per prompt.
    stop_ids: ids that end a response and are part of it; with none, every row decodes L tokens.
    pad_id: fills the tokens after the stop token.
    forbidden: ids that are never sampled.
    temperature: positive; divides the logits and is part of the trained distribution (`logp`).
    top_k: sample only among the k likeliest ids; 0 for all. Affects `logp_sampling`, not `logp`.
    top_p: then only among the fewest of these k that hold this share of their probability.
    dtype: of weights, activations and cache while decoding; logits are float32.
    mixture: m, the weight of the reference, or of M further models; None for a single model.
    behaviour_temperature: also divides the logits, but only to sample: a flatter distribution, for
      losses that need no samples of the trained one. Affects `logp_sampling`, not `logp`.

  Raises:
    ValueError: options that define no distribution.
  """
  temperatures = (temperature, behaviour_temperature)
  _check(model_config.num_embed, max_tokens, samples, temperatures, top_k, top_p, forbidden)
  # With a large vocabulary logits are [V, N]: on a CPU their product, half of the work, is a third
  # faster.
  ids_first = model_config.num_embed > MOST_AT_ONCE
  ids_axis = 0 if ids_first else -1

  def next_logits(policies, hidden) -> Float[Array, "..."]:
    """Returns unnormalised logits of the next token's trained distribution: [N, V] or [V, N]."""
    outputs = [
      gemma.logits(p, model_config, x, forbidden, ids_first)
      for p, x in zip(policies, hidden, strict=True)
    ]
    return jnp.divide(gemma.mixed(outputs, mixture), temperature)

  def draw(key, logits) -> tuple[Int[Array, "N"], Float[Array, "N"], Float[Array, "N"]]:
    """Returns a token per row, and its log-probability as trained and as sampled."""
    log_z = jax.nn.logsumexp(logits, axis=ids_axis)

    def pick(values, place, axis=-1):
      return jnp.take_along_axis(values, jnp.expand_dims(place, axis), axis).squeeze(axis)

    if top_k == 0:
      flatter = logits / behaviour_temperature
      token = _two_levels(key, flatter) if ids_first else _categorical(key, flatter)
      logp = pick(logits, token, ids_axis) - log_z
      if behaviour_temperature == 1:
        return token, logp, logp
      return token, logp, pick(jax.nn.log_softmax(flatter, ids_axis), token, ids_axis)
    best, ids = jax.lax.top_k(logits.T if ids_first else logits, top_k)
    share = jax.nn.softmax(best / behaviour_temperature)
    # The likeliest id always stays: the share before it is 0.
    kept = jnp.cumsum(share, axis=-1) - share < top_p
    narrowed = jax.nn.log_softmax(jnp.where(kept, best / behaviour_temperature, -jnp.inf))
    place = _categorical(key, narrowed)
    return pick(ids, place), pick(best, place) - log_z, pick(narrowed, place)

  def prefill(params, prompts) -> tuple[Float[Array, "N D"], gemma.Cache]:
    """Returns the last column's hidden state and a cache with room for responses, K times each."""
    batch, length = prompts.tokens.shape
    positions, visible = gemma.positions_of(prompts.mask), gemma.causal_mask(prompts.mask)
    empty = gemma.init_cache(model_config, batch, length, dtype)
    x, cache = gemma.forward(
      params, model_config, prompts.tokens, positions, visible, cache=empty, dtype=dtype
    )
    assert cache is not None
    return jnp.repeat(x[:, -1], samples, axis=0), decoding.grow(cache, max_tokens, samples)

  def sample(params: Params, prompts: Prompts, key: Array) -> Responses:
    models = (params,) if mixture is None else tuple(params)
    hidden, caches = zip(*(prefill(p, prompts) for p in models), strict=True)
    policies = [_decoding_weights(p, model_config, dtype) for p in models]
    prompt_mask = jnp.repeat(prompts.mask, samples, axis=0)
    prompt_length = jnp.sum(prompt_mask, axis=-1)
    rows, prompt_columns = prompt_mask.shape
    column = jnp.arange(max_tokens)

    def append(state, t, hidden):
      """Draws token t of every row that has not stopped."""
      token, logp, logp_sampling = draw(jax.random.fold_in(key, t), next_logits(policies, hidden))
      active = ~state["stopped"]
      new = {
        "tokens": jnp.where(active, token, pad_id),
        "mask": active,
        "logp": jnp.where(active, logp, 0.0),
        "logp_sampling": jnp.where(active, logp_sampling, 0.0),
      }
      written = {
        name: jax.lax.dynamic_update_index_in_dim(state[name], value, t, axis=1)
        for name, value in new.items()
      }
      stops = jnp.isin(token, jnp.array(stop_ids, jnp.int32))
      return {**written, "stopped": state["stopped"] | stops, "last": new["tokens"]}

    def unfinished(carry):
      t, state, _ = carry
      return (t < max_tokens) & ~jnp.all(state["stopped"])

    def step(carry):
      t, state, caches = carry
      decoded = jnp.broadcast_to(column < t, (rows, max_tokens))
      visible = jnp.concatenate([prompt_mask, decoded], axis=1)
      position = prompt_length + t - 1
      outputs = [
        decoding.forward(policy, model_config, state["last"], position, visible, cache, dtype)
        for policy, cache in zip(policies, caches, strict=True)
      ]
      hidden, caches = zip(*outputs, strict=True)
      return t + 1, append(state, t, hidden), caches

    # A write past the end of the cache would silently go to its last column.
    assert all(c["v"].shape[2] >= prompt_columns + max_tokens for cs in caches for c in cs)
    state = {
      "tokens": jnp.full((rows, max_tokens), pad_id, jnp.int32),
      "mask": jnp.zeros((rows, max_tokens), bool), "logp": jnp.zeros((rows, max_tokens)),
      "logp_sampling": jnp.zeros((rows, max_tokens)), "stopped": jnp.zeros(rows, bool),
    }  # fmt: skip
    first = (jnp.int32(1), append(state, 0, hidden), caches)
    _, state, _ = jax.lax.while_loop(unfinished, step, first)
    del state["last"]
    shape = (prompts.tokens.shape[0], samples)
    return Responses(**{name: a.reshape(*shape, *a.shape[1:]) for name, a in state.items()})

  return sample


def truncates(sampling) -> bool:
  """Returns whether a config's `sampling` excludes part of the trained distribution."""
  return sampling.top_k > 0 or sampling.top_p < 1


def _decoding_weights(params: Params, model_config: gemma.GemmaConfig, dtype: DTypeLike) -> Params:
  """Returns the weights that decoding reads: cast, unstacked and gathered once, before its loop."""
  # A table of inputs by layer stays as it is: rows are read from it where they lie, then cast.
  read, table_by_layer = lora.split(params)
  # Merged while stacked: layer by layer, a TPU compiler keeps the gathered weights in two layouts.
  merged = gemma.cast(lora.merge(read), dtype)
  plain = gemma.unstack(merged, model_config, library_gating=False)
  # Split by rows first: gathered by columns, the table would be in memory twice while transposed.
  table = sharding.constrain(plain["embedder"]["input_embedding"], ("fsdp", "tensor"))
  embedder = {**plain["embedder"], "input_embedding": table}
  gathered = sharding.gather_weights({**plain, "embedder": embedder})
  # The barrier keeps XLA from moving a gather of weights that two samplers share into a loop.
  once = jax.lax.optimization_barrier(decoding.inputs_first(gathered))
  return lora.rejoin(once, table_by_layer)


def _categorical(key: Array, logits: Float[Array, "N V"]) -> Int[Array, "N"]:
  """Draws an id per row from softmax(logits) by the Gumbel trick, in two levels if V is large."""
  if logits.shape[-1] > MOST_AT_ONCE:
    return _two_levels(key, logits.T)
  return _argmax(logits + jax.random.gumbel(key, logits.shape))


def _two_levels(key: Array, logits: Float[Array, "V N"]) -> Int[Array, "N"]:
  """Draws an id per column from softmax(logits): first a chunk of ids, then an id of that chunk.

  A chunk's logit is the log-sum-exp of its ids, so the distribution is the same. A column takes
  V / CHUNK + CHUNK random numbers instead of V, which would cost as much as the model. They have
  twice the bits, so that ids with probabilities below 1e-7 are drawn too.
  """

  def draw(key, logits):
    return _argmax(logits.T + jax.random.gumbel(key, logits.T.shape, mode="high"))

  chunk_key, id_key = jax.random.split(key)
  first = draw(chunk_key, chunk_logits(logits)) * CHUNK
  ids = first[None] + jnp.arange(CHUNK)[:, None]
  inside = jnp.take_along_axis(logits, ids, axis=0, mode="fill", fill_value=-jnp.inf)
  # NaN logits must not give an id beyond the last.
  return jnp.minimum(first + draw(id_key, inside), len(logits) - 1)


def chunk_logits(logits: Float[Array, "V N"]) -> Float[Array, "C N"]:
  """Returns the log-sum-exp of each chunk of CHUNK ids; the last chunk may be shorter."""
  vocabulary, columns = logits.shape
  padded = jnp.pad(logits, ((0, -vocabulary % CHUNK), (0, 0)), constant_values=-jnp.inf)
  return jax.nn.logsumexp(padded.reshape(-1, CHUNK, columns), axis=1)


def _argmax(x: Float[Array, "N V"]) -> Int[Array, "N"]:
  """jnp.argmax as two plain reductions.

  XLA's argmax reduces over pairs, which is not vectorised on a CPU and takes a tenth of a step.
  """
  best = jnp.max(x, axis=-1, keepdims=True)
  ids = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
  return jnp.min(jnp.where(x == best, ids, x.shape[-1] - 1), axis=-1)


def _check(vocabulary: int, max_tokens, samples, temperatures, top_k, top_p, forbidden) -> None:
  counts, expected = (samples, max_tokens), "at least one sample of one token"
  require(min(counts) > 0, "sampler.samples, max_tokens", expected, counts, "Raise them.")
  good, field = all(t > 0 for t in temperatures), "sampler.temperature, behaviour_temperature"
  require(good, field, "positive numbers", temperatures, "For nearly greedy decoding set top_k=1.")
  expected = f"0 (all ids) to {vocabulary} (the vocabulary)"
  require(0 <= top_k <= vocabulary, "sampler.top_k", expected, top_k, "Set 0.")
  require(0 < top_p <= 1, "sampler.top_p", "a share in (0, 1]", top_p, "Set 1.")
  fix = "Try top_k=64: without it every token would sort the whole vocabulary."
  require(top_p == 1 or top_k > 0, "sampler.top_p", "1, as less needs top_k", top_p, fix)
  if forbidden is not None:
    good, expected = forbidden.shape == (vocabulary,), f"shape ({vocabulary},), the model's rows"
    require(good, "sampler.forbidden", expected, forbidden.shape, "Pad it to the model's rows.")

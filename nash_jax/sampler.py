"""Sampling responses on the device: prefill once a prompt, then a while_loop over a KV cache."""

from collections.abc import Callable

import jax
from jax import numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from nash_jax.models import decoding, gemma, lora, sharding
from nash_jax.types import Params, Prompts, Responses

Sample = Callable[[Params, Prompts, Array], Responses]


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
  dtype=jnp.float32,
  mixture: float | Float[Array, ""] | None = None,
  behaviour_temperature: float = 1.0,
) -> Sample:
  """Returns `sample(params, prompts, key) -> Responses`, pure and jittable.

  With `mixture` m, `params` is the pair (policy, reference) and the law of each next token is
  the token-wise geometric mixture: logits (1 - m)·policy + m·reference, after soft-cap and
  forbidden ids, before temperature, renormalised (Munos et al. 2312.00886, section 7). m < 0
  extrapolates from the reference: decoding-time realignment with λ = 1 - m.

  A row's draws depend on the key, its place in the batch and its own text, not on the batch's
  size, its neighbours or when they stop.

  Args:
    max_tokens: L; responses without a stop token end there, `stopped` False.
    samples: K responses to each prompt.
    stop_ids: ids that end a response and belong to it; none decodes L tokens for every row.
    pad_id: fills the tokens after the stop.
    forbidden: ids never drawn.
    temperature: positive; divides the logits, and so belongs to the trained law `logp`.
    top_k: draws among the k likeliest ids only; 0 for all. In `logp_sampling`, not in `logp`.
    top_p: then among the fewest of these k that hold this share of their probability.
    dtype: of the weights, activations and cache while decoding; logits are float32.
    mixture: m, the weight of the reference; None for one model.
    behaviour_temperature: divides only the logits of draws: flatter ones, for losses that do not
      need draws of the trained law. In `logp_sampling`, not in `logp`.

  Raises:
    ValueError: for a law that cannot be sampled from.
  """
  _check(
    model_config, max_tokens, samples, temperature, behaviour_temperature, top_k, top_p, forbidden
  )
  weights = (1.0,) if mixture is None else (1.0 - mixture, mixture)

  def next_logits(policies, hidden) -> Float[Array, "N V"]:
    """The trained law of the next token, not yet normalised."""
    outputs = [
      gemma.logits(p, model_config, x, forbidden) for p, x in zip(policies, hidden, strict=True)
    ]
    return sum(w * logits for w, logits in zip(weights, outputs, strict=True)) / temperature

  def draw(key, logits) -> tuple[Int[Array, "N"], Float[Array, "N"], Float[Array, "N"]]:
    """One token a row, with its log-probability under the trained and the sampling law."""
    log_z = jax.nn.logsumexp(logits, axis=-1)

    def pick(values, place):
      return jnp.take_along_axis(values, place[:, None], axis=-1)[:, 0]

    if top_k == 0:
      token = _categorical(key, logits / behaviour_temperature)
      logp = pick(logits, token) - log_z
      flat = (
        logp
        if behaviour_temperature == 1
        else pick(jax.nn.log_softmax(logits / behaviour_temperature), token)
      )
      return token, logp, flat
    best, ids = jax.lax.top_k(logits, top_k)
    share = jax.nn.softmax(best / behaviour_temperature)
    # The likeliest id always stays: nothing lies above it.
    kept = jnp.cumsum(share, axis=-1) - share < top_p
    narrowed = jax.nn.log_softmax(jnp.where(kept, best / behaviour_temperature, -jnp.inf))
    place = _categorical(key, narrowed)
    return pick(ids, place), pick(best, place) - log_z, pick(narrowed, place)

  def sample(params: Params, prompts: Prompts, key: Array) -> Responses:
    policies = (params,) if mixture is None else tuple(params)
    hidden, caches = zip(
      *(_prefill(p, model_config, prompts, samples, max_tokens, dtype) for p in policies),
      strict=True,
    )
    policies = [_weights(p, model_config, dtype) for p in policies]
    prompt_mask = jnp.repeat(prompts.mask, samples, axis=0)
    prompt_length = jnp.sum(prompt_mask, axis=-1)
    rows, prompt_columns = prompt_mask.shape
    column = jnp.arange(max_tokens)

    def put(state, t, hidden):
      """Draws token t of every row that has not stopped."""
      token, logp, logp_sampling = draw(jax.random.fold_in(key, t), next_logits(policies, hidden))
      going = ~state["stopped"]
      new = {
        "tokens": jnp.where(going, token, pad_id),
        "mask": going,
        "logp": jnp.where(going, logp, 0.0),
        "logp_sampling": jnp.where(going, logp_sampling, 0.0),
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
      visible = jnp.concatenate(
        [prompt_mask, jnp.broadcast_to(column < t, (rows, max_tokens))], axis=1
      )
      position = prompt_length + t - 1
      hidden, caches = zip(
        *(
          decoding.forward(policy, model_config, state["last"], position, visible, cache, dtype)
          for policy, cache in zip(policies, caches, strict=True)
        ),
        strict=True,
      )
      return t + 1, put(state, t, hidden), caches

    # A write past the end of the cache would land in its last column, in silence.
    assert all(c["v"].shape[2] >= prompt_columns + max_tokens for cs in caches for c in cs)
    state = {
      "tokens": jnp.full((rows, max_tokens), pad_id, jnp.int32),
      "mask": jnp.zeros((rows, max_tokens), bool),
      "logp": jnp.zeros((rows, max_tokens)),
      "logp_sampling": jnp.zeros((rows, max_tokens)),
      "stopped": jnp.zeros(rows, bool),
    }
    first = (jnp.int32(1), put(state, 0, hidden), caches)
    _, state, _ = jax.lax.while_loop(unfinished, step, first)
    del state["last"]
    shape = (prompts.tokens.shape[0], samples)
    return Responses(**{name: a.reshape(*shape, *a.shape[1:]) for name, a in state.items()})

  return sample


def _weights(params, model_config, dtype):
  """Returns what decoding reads: cast, unstacked and gathered once, so that its loop does not."""
  # Merged while stacked: layer by layer, a TPU's compiler held the gathered weights in two layouts.
  merged = gemma.cast(lora.merge(params), dtype)
  plain = gemma.unstack(merged, model_config, library_gating=False)
  # By rows first: gathered by columns, the table would be held a second time while it is turned.
  rows = sharding.constrain(plain["embedder"]["input_embedding"], ("fsdp", "tensor"))
  whole = sharding.gather_weights({**plain, "embedder": {"input_embedding": rows}})
  # The barrier keeps XLA from moving a gather of the two samplers' common weights into a loop.
  return jax.lax.optimization_barrier(decoding.inputs_first(whole))


def _prefill(params, model_config, prompts, samples, max_tokens, dtype):
  """Returns the last column's hidden state and a cache with room for the response, K a prompt."""
  batch, length = prompts.tokens.shape
  x, cache = gemma.forward(
    params,
    model_config,
    prompts.tokens,
    gemma.positions_of(prompts.mask),
    gemma.causal_mask(prompts.mask),
    cache=gemma.init_cache(model_config, batch, length, dtype),
    dtype=dtype,
  )

  cache = decoding.grow(cache, max_tokens, samples)
  return jnp.repeat(x[:, -1], samples, axis=0), cache


def _categorical(key, logits):
  """jax.random.categorical by the Gumbel trick, its argmax as two plain reductions.

  XLA's argmax is one reduction over pairs, which a CPU does not vectorise: a tenth of a step.
  """
  noisy = logits + jax.random.gumbel(key, logits.shape)
  best = jnp.max(noisy, axis=-1, keepdims=True)
  ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
  return jnp.min(jnp.where(noisy == best, ids, logits.shape[-1] - 1), axis=-1)


def _check(
  model_config, max_tokens, samples, temperature, behaviour_temperature, top_k, top_p, forbidden
):
  rows = model_config.num_embed
  if max_tokens < 1 or samples < 1:
    raise ValueError(
      f"sampler: expected at least one sample of one token, got samples={samples}, "
      f"max_tokens={max_tokens}"
    )
  if not (temperature > 0 and behaviour_temperature > 0):
    raise ValueError(
      "sampler.temperature, behaviour_temperature: expected positive numbers, got "
      f"{temperature}, {behaviour_temperature}; for nearly greedy decoding set top_k=1"
    )
  if not 0 <= top_k <= rows:
    raise ValueError(f"sampler.top_k: expected 0 (all ids) to {rows} (the vocabulary), got {top_k}")
  if not 0 < top_p <= 1:
    raise ValueError(f"sampler.top_p: expected a share in (0, 1], got {top_p}")
  if top_p < 1 and top_k == 0:
    raise ValueError(
      f"sampler.top_p: {top_p} needs top_k, for example 64: without it every token would "
      "sort the whole vocabulary"
    )
  if forbidden is not None and forbidden.shape != (rows,):
    raise ValueError(
      f"sampler.forbidden: expected one entry for each of the model's {rows} rows, "
      f"got shape {forbidden.shape}"
    )

"""Decodes one token over a cache, with cache and weights laid out as the matrix products need them.

gm.nn.Attention keeps keys and values as [rows, columns, heads, head_dim], but its two products need
keys as [rows, heads, head_dim, columns] and values as [rows, heads, columns, head_dim]. On a CPU
each decoding step would transpose the whole cache, which costs more than the attention itself, and
every weight whose inputs are not its first axes. Everything else is the library's.
"""

import functools
import importlib.metadata

import jax
from flax import linen as nn
from flax import traverse_util
from gemma import gm
from gemma.gm.nn.gemma4 import _modules as gemma4
from jax import numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from nash_jax.models import gemma, lora, sharding
from nash_jax.types import Params

_ATTENTION = (gm.nn.Attention, gemma4.Attention)
_HEADS = (sharding.BATCH, "tensor?")
# Mesh axes that split the leading axes of a cache from `grow`.
CACHE = {"k": _HEADS, "v": _HEADS, "positions": (sharding.BATCH,), "end_index": ()}


def grow(cache: gemma.Cache, columns: int, copies: int) -> gemma.Cache:
  """Lays a prefilled cache out by heads, with `columns` more columns and `copies` of each row."""

  def grow_layer(layer):
    def pad(name, axis):
      leaf = jnp.moveaxis(layer[name], 1, axis)
      return jnp.pad(leaf, [(0, columns * (i == axis)) for i in range(leaf.ndim)])

    layer = {**layer, "k": pad("k", 3), "v": pad("v", 2), "positions": pad("positions", 1)}
    layer = jax.tree.map(lambda leaf: jnp.repeat(leaf, copies, axis=0), layer)
    return {name: sharding.constrain(leaf, *CACHE[name]) for name, leaf in layer.items()}

  return tuple(grow_layer(layer) for layer in cache)


def inputs_first(params: Params) -> Params:
  """Returns unstacked weights with the summed axes of each product first."""
  flat = traverse_util.flatten_dict(params, sep="/")
  for path, weight in flat.items():
    _, _, name = path.partition("/")
    if name in lora.FACTORS:
      a, b, axes = lora.FACTORS[name]
      flat[path] = jnp.einsum(f"{axes}->{a[:-1]}{b[1:]}", weight)
  return traverse_util.unflatten_dict(flat, sep="/")


def _intercept(call, args, kwargs, context):
  """Replaces the library's attention and products; every other method runs unchanged."""
  if context.method_name == "__call__" and isinstance(context.module, _ATTENTION):
    return _attend(context.module, *args)
  if context.method_name == "__call__" and isinstance(context.module, lora.EINSUMS):
    return _einsum(context.module, *args)
  return call(*args, **kwargs)


def _einsum(module: nn.Module, equation: str, x: Array) -> Array:
  """The library's Einsum over a weight from `inputs_first`; transposes only the small result."""
  operands, out = equation.split("->")
  inputs, axes = operands.split(",")
  # The summed axes are the last of the inputs and the first of the weight.
  num_summed = sum(axis not in out for axis in axes)
  product = jnp.tensordot(x, module.get_variable("params", module.weight_name), num_summed)
  product_axes = inputs[:-num_summed] + "".join(axis for axis in axes if axis in out)
  return jnp.einsum(f"{product_axes}->{out}", product)


def _qk_norms(attn: gm.nn.Attention) -> tuple[nn.Module, nn.Module]:
  """Returns the norms of queries and keys, which are private; tested with gemma 4.0.1."""
  try:
    return attn._query_norm, attn._key_norm
  except AttributeError as error:
    version = importlib.metadata.version("gemma")
    lacks = f"gm.nn.Attention of gemma {version} has no _query_norm or _key_norm"
    raise RuntimeError(f"{lacks}, gemma 4.0.1 has both") from error


def _project(attn, x, shared: bool) -> tuple[Array, ...]:
  """Returns queries, and keys and values unless they are another layer's; all normed."""
  if isinstance(attn, gemma4.Attention):
    q = attn.query_norm(attn.q_einsum("BTD,NDH->BTNH", x))
    if shared:
      return (q,)
    if attn.k_eq_v:
      k = v = attn.k_einsum("BTD,KDH->BTKH", x)
    else:
      k, v = attn.kv_einsum("BTD,CKDH->CBTKH", x)
    return q, attn.key_norm(k), attn.value_norm(v)
  if attn.use_qkv_einsum:
    q, k, v = attn.qkv_einsum("BTD,SNDH->SBTNH", x)
  else:
    q = attn.q_einsum("BTD,NDH->BTNH", x)
    k, v = attn.kv_einsum("BTD,CKDH->CBTKH", x)
  if attn.use_qk_norm:
    query_norm, key_norm = _qk_norms(attn)
    q, k = query_norm(q), key_norm(k)
  return q, k, v


def _attend(attn, x, positions, cache, visible, shared=None):
  """The library's attention of one token over a cache from `grow`, its own or a `shared` one."""
  q, *own = _project(attn, x, shared is not None)
  rope = functools.partial(
    gm.math.apply_rope,
    positions=positions,
    base_frequency=attn.rope_base_frequency,
    scale_factor=attn.rope_scale_factor,
    rope_proportion=getattr(attn, "rope_proportion", 1.0),
  )
  q = rope(q) * getattr(attn, "query_pre_attn_scalar", 1.0)
  if shared is None:
    k, v = own
    write = functools.partial(
      jax.lax.dynamic_update_slice_in_dim, start_index=cache["end_index"][0]
    )
    cache = {
      "k": write(cache["k"], jnp.moveaxis(rope(k), 1, 3), axis=3),
      "v": write(cache["v"], jnp.moveaxis(v, 1, 2), axis=2),
      "positions": write(cache["positions"], positions, axis=1),
      "end_index": cache["end_index"] + 1,
    }
  read = cache if shared is None else shared
  if attn.attn_type.name == gemma.LOCAL.name:  # the library has two of these types
    visible &= read["positions"][:, None] > positions[..., None] - attn.sliding_window_size
  rows, _, heads, size = q.shape
  q = q.reshape(rows, attn.num_kv_heads, -1, size)
  logits = jnp.einsum("BKGH,BKHS->BKGS", q, read["k"])
  if attn.attn_logits_soft_cap is not None:
    logits = jnp.tanh(logits / attn.attn_logits_soft_cap) * attn.attn_logits_soft_cap
  # In the compute dtype, as in the library, so that sampler and trainer round identically.
  weights = jax.nn.softmax(jnp.where(visible[:, None], logits, -2e38), axis=-1)
  attended = jnp.einsum("BKGS,BKSH->BKGH", weights, read["v"])
  return cache, attn.attn_vec_einsum("BTNH,NHD->BTD", attended.reshape(rows, 1, heads, size))


def forward(
  params: Params,
  model_config: gemma.GemmaConfig,
  token: Int[Array, "N"],
  position: Int[Array, "N"],
  visible: Bool[Array, "N S"],
  cache: gemma.Cache,
  dtype: DTypeLike,
) -> tuple[Float[Array, "N D"], gemma.Cache]:
  """Runs one token of every row: `gemma.forward` with T = 1 over a cache from `grow`.

  Args:
    params: from `inputs_first` of `gemma.unstack(..., library_gating=False)`.
    position: the token's position in its own sequence.
    visible: the columns the token may attend to, including its own.

  Returns:
    Hidden states, and the cache with one more column.
  """
  tokens, positions, attn_mask = token[:, None], position[:, None], visible[:, None]
  with nn.intercept_methods(_intercept):
    x, new_cache = gemma.forward(
      params, model_config, tokens, positions, attn_mask, cache=cache, dtype=dtype
    )
  assert new_cache is not None
  return x[:, 0], new_cache

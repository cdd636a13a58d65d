"""One new token over a cache and weights held as the products want them.

gm.nn.Attention keeps keys and values as [rows, columns, heads, head_dim]; its two products want
keys as [rows, heads, head_dim, columns] and values as [rows, heads, columns, head_dim]. On a CPU
each decoding step then transposes the whole cache, which costs more than the attention itself, and
every weight whose inputs are not its first axes. Everything else is the library's own.
"""

import functools

import jax
from flax import linen as nn
from flax import traverse_util
from gemma import gm
from jax import numpy as jnp

from nash_jax.models import gemma, lora, sharding
from nash_jax.types import Params

_HEADS = (sharding.BATCH, "tensor?")
CACHE = {"k": _HEADS, "v": _HEADS, "positions": (sharding.BATCH,), "end_index": ()}  # its layout


def grow(cache: gemma.Cache, columns: int, copies: int) -> gemma.Cache:
  """Turns a prefilled cache head by head, with `columns` more and every row `copies` times."""

  def one(layer):
    def pad(name, axis):
      leaf = jnp.moveaxis(layer[name], 1, axis)
      return jnp.pad(leaf, [(0, columns * (i == axis)) for i in range(leaf.ndim)])

    layer = {**layer, "k": pad("k", 3), "v": pad("v", 2), "positions": pad("positions", 1)}
    layer = jax.tree.map(lambda leaf: jnp.repeat(leaf, copies, axis=0), layer)
    return {name: sharding.constrain(leaf, *CACHE[name]) for name, leaf in layer.items()}

  return tuple(one(layer) for layer in cache)


def inputs_first(params: Params) -> Params:
  """Returns unstacked weights with the axes that a product sums over first."""
  flat = traverse_util.flatten_dict(params, sep="/")
  for path, w in flat.items():
    _, _, name = path.partition("/")
    if name in lora.FACTORS:
      a, b, axes = lora.FACTORS[name]
      flat[path] = jnp.einsum(f"{axes}->{a[:-1]}{b[1:]}", w)
  return traverse_util.unflatten_dict(flat, sep="/")


def _stand_in(call, args, kwargs, context):
  """Stands in for the library's attention and products; every other method goes through."""
  if context.method_name == "__call__" and isinstance(context.module, gm.nn.Attention):
    return _attend(context.module, *args)
  if context.method_name == "__call__" and isinstance(context.module, gm.nn.Einsum):
    return _product(context.module, *args)
  return call(*args, **kwargs)


def _product(einsum, equation, x):
  """gm.nn.Einsum over a weight from `inputs_first`; only the small result is ever turned."""
  terms, out = equation.split("->")
  inputs, axes = terms.split(",")
  summed = sum(axis not in out for axis in axes)  # the last of the inputs, the first of the weight
  y = jnp.tensordot(x, einsum.get_variable("params", einsum.weight_name), summed)
  found = inputs[:-summed] + "".join(axis for axis in axes if axis in out)
  return jnp.einsum(f"{found}->{out}", y)


def _attend(attn, x, positions, cache, visible):
  """gm.nn.Attention of one token over a cache from `grow`."""
  if attn.use_qkv_einsum:
    q, k, v = attn.qkv_einsum("BTD,SNDH->SBTNH", x)
  else:
    q = attn.q_einsum("BTD,NDH->BTNH", x)
    k, v = attn.kv_einsum("BTD,CKDH->CBTKH", x)
  if attn.use_qk_norm:
    q, k = attn._query_norm(q), attn._key_norm(k)
  rope = functools.partial(
    gm.math.apply_rope,
    positions=positions,
    base_frequency=attn.rope_base_frequency,
    scale_factor=attn.rope_scale_factor,
  )
  q, k = rope(q) * attn.query_pre_attn_scalar, rope(k)

  column = cache["end_index"][0]
  put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=column)
  cache = {
    "k": put(cache["k"], jnp.moveaxis(k, 1, 3), axis=3),
    "v": put(cache["v"], jnp.moveaxis(v, 1, 2), axis=2),
    "positions": put(cache["positions"], positions, axis=1),
    "end_index": cache["end_index"] + 1,
  }
  if attn.attn_type == gm.nn.AttentionType.LOCAL_SLIDING:
    visible &= cache["positions"][:, None] > positions[..., None] - attn.sliding_window_size

  rows, _, heads, size = q.shape
  q = q.reshape(rows, attn.num_kv_heads, -1, size)
  logits = jnp.einsum("BKGH,BKHS->BKGS", q, cache["k"])
  if attn.attn_logits_soft_cap is not None:
    logits = jnp.tanh(logits / attn.attn_logits_soft_cap) * attn.attn_logits_soft_cap
  # In the compute dtype, as the library does, so that sampler and trainer round alike.
  share = jax.nn.softmax(jnp.where(visible[:, None], logits, -2e38), axis=-1)
  seen = jnp.einsum("BKGS,BKSH->BKGH", share, cache["v"])
  return cache, attn.attn_vec_einsum("BTNH,NHD->BTD", seen.reshape(rows, 1, heads, size))


def forward(params, model_config, token, position, visible, cache, dtype):
  """Runs one token of every row: `gemma.forward` with T = 1 over a cache from `grow`.

  Args:
    params: from `inputs_first` of `gemma.unstack(..., library_gating=False)`.
    token: i32[N]; `position` i32[N] is its place in its own sequence.
    visible: bool[N S], the columns it may see, its own included.

  Returns:
    Hidden states [N D], and the cache with one more column.
  """
  with nn.intercept_methods(_stand_in):
    x, cache = gemma.forward(
      params,
      model_config,
      token[:, None],
      position[:, None],
      visible[:, None],
      cache=cache,
      dtype=dtype,
    )
  return x[:, 0], cache

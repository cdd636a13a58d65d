"""Gemma assembled from the gemma library's own blocks.

Two layouts of one parameter tree:

* stacked, for training, judging and prefill: `layers/<i>` holds the blocks at place i of the
  pattern with a leading repeat axis, scanned; `tail/<i>` the layers left over. Where local and
  global layers differ in their window alone (Gemma 2), the pattern is one layer;
* unstacked, for decoding and for checkpoints: `layer_<n>` as in the library.

Both gating layouts of the published checkpoints become [2, features, hidden] when stacked.
"""

import dataclasses
import functools
import importlib.machinery
import sys
import types

import jax
from gemma import gm
from jax import numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from nash_jax.models import lora, sharding
from nash_jax.types import Params
from nash_jax.validation import one_of

_LOCAL, _GLOBAL = gm.nn.AttentionType.LOCAL_SLIDING, gm.nn.AttentionType.GLOBAL
Cache = tuple[dict[str, Array], ...]  # one leaf set a layer, as gm.nn.Block wants it


@dataclasses.dataclass(frozen=True)
class GemmaConfig:
  """An architecture: the fields of the library's TransformerConfig that text models differ in.

  The library's own class would bring TensorFlow (10 to 20 s) at import, before a config is checked.
  """

  num_embed: int  # vocabulary rows V
  embed_dim: int
  hidden_dim: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  attention_types: tuple[gm.nn.AttentionType, ...]
  sliding_window_size: int
  final_logit_softcap: float | None = 30.0
  attn_logits_soft_cap: float | None = 50.0
  use_qk_norm: bool = False
  transpose_gating_einsum: bool = False  # in the published checkpoints; never here
  local_base_frequency: int = 10_000
  global_base_frequency: int = 10_000
  local_scale_factor: float = 1.0
  global_scale_factor: float = 1.0

  @property
  def num_layers(self) -> int:
    return len(self.attention_types)


def _gemma2(layers, width, hidden, heads, kv_heads, head_dim=256, vocabulary=256_128, **changes):
  fields = {"attention_types": ((_LOCAL, _GLOBAL) * layers)[:layers], "sliding_window_size": 4096}
  return GemmaConfig(vocabulary, width, hidden, heads, kv_heads, head_dim, **{**fields, **changes})


def _gemma3(layers, width, hidden, heads, kv_heads, window, vocabulary=262_144, **changes):
  return _gemma2(
    layers,
    width,
    hidden,
    heads,
    kv_heads,
    vocabulary=vocabulary,
    attention_types=(((_LOCAL,) * 5 + (_GLOBAL,)) * layers)[:layers],
    sliding_window_size=window,
    final_logit_softcap=None,
    attn_logits_soft_cap=None,
    use_qk_norm=True,
    transpose_gating_einsum=True,
    global_base_frequency=1_000_000,
    **changes,
  )


PRESETS = {
  "stories": lambda: _gemma2(
    4, 128, 512, 4, 2, head_dim=32, vocabulary=1024, sliding_window_size=128
  ),
  "tiny": lambda: _gemma2(2, 16, 32, 2, 1, head_dim=8, vocabulary=64, sliding_window_size=8),
  "gemma2_2b": lambda: _gemma2(26, 2304, 9216, 8, 4),
  "gemma2_9b": lambda: _gemma2(42, 3584, 14_336, 16, 8, transpose_gating_einsum=True),
  "gemma3_270m": lambda: _gemma3(18, 640, 2048, 4, 1, 512),
  "gemma3_1b": lambda: _gemma3(26, 1152, 6912, 4, 1, 512),
  "gemma3_4b": lambda: _gemma3(34, 2560, 10_240, 8, 4, 1024, global_scale_factor=8.0),
}


def preset(name: str, **changes) -> GemmaConfig:
  """Returns the architecture called `name`, with single fields replaced by `changes`.

  `num_layers` among these keeps the first so many layers.
  """
  one_of("model.preset", name, PRESETS)
  fields = [field.name for field in dataclasses.fields(GemmaConfig)]
  for change in changes:
    one_of("model.changes", change, [*fields, "num_layers"])
  base, layers = PRESETS[name](), changes.pop("num_layers", None)
  cut = dataclasses.replace(base, attention_types=base.attention_types[:layers])
  return dataclasses.replace(cut, **changes)


def alike(model_config) -> bool:
  """Whether local and global layers differ in their window alone, so that one block serves both.

  A compiler then sees one layer instead of a whole pattern: half the time for Gemma 2.
  """
  return (model_config.local_base_frequency, model_config.local_scale_factor) == (
    model_config.global_base_frequency,
    model_config.global_scale_factor,
  )


def pattern(model_config: GemmaConfig) -> tuple[int, int, int]:
  """Returns (period of the pattern of layers, whole repeats of it, layers left over)."""
  kinds = tuple(model_config.attention_types)
  if alike(model_config):
    return 1, len(kinds), 0
  period = next(
    p for p in range(1, len(kinds) + 1) if all(a == kinds[i % p] for i, a in enumerate(kinds))
  )
  return period, len(kinds) // period, len(kinds) % period


@functools.cache
def _import_annotations():
  """Imports what the library's blocks are annotated with, but not TensorFlow, which they name.

  A single type, tf.Tensor, occurs in these annotations, and no text model ever meets one. Tested
  with gemma 4.0.1 and kauldron 1.4.4; a test fails where these would import TensorFlow after all.
  """
  absent = "tensorflow" not in sys.modules
  if absent:
    stand_in = types.ModuleType("tensorflow")
    stand_in.Tensor = type("Tensor", (), {})
    stand_in.__spec__ = importlib.machinery.ModuleSpec("tensorflow", None)
    sys.modules["tensorflow"] = stand_in
  try:
    import kauldron.typing  # noqa: F401
  finally:
    if absent:
      del sys.modules["tensorflow"]


def block(model_config: GemmaConfig, attn_type, transpose_gating=False) -> gm.nn.Block:
  """Returns the library's block for one layer; gating is [2, features, hidden] by default."""
  _import_annotations()  # the block's call would import TensorFlow for them
  local = attn_type == _LOCAL
  return gm.nn.Block(
    num_heads=model_config.num_heads,
    num_kv_heads=model_config.num_kv_heads,
    embed_dim=model_config.embed_dim,
    head_dim=model_config.head_dim,
    hidden_dim=model_config.hidden_dim,
    sliding_window_size=model_config.sliding_window_size,
    use_post_attn_norm=True,
    use_post_ffw_norm=True,
    attn_logits_soft_cap=model_config.attn_logits_soft_cap,
    attn_type=attn_type,
    query_pre_attn_scalar=model_config.head_dim**-0.5,
    transpose_gating_einsum=transpose_gating,
    use_qk_norm=model_config.use_qk_norm,
    rope_base_frequency=model_config.local_base_frequency
    if local
    else model_config.global_base_frequency,
    rope_scale_factor=model_config.local_scale_factor
    if local
    else model_config.global_scale_factor,
  )


def init(key: Array, model_config: GemmaConfig) -> Params:
  """Returns random float32 parameters in the stacked layout."""
  inputs = (
    jnp.zeros((1, 1, model_config.embed_dim)),
    jnp.zeros((1, 1), jnp.int32),
    None,
    jnp.ones((1, 1, 1), bool),
  )
  period, repeats, _ = pattern(model_config)

  def layer(n, count):
    keys = jax.random.split(jax.random.fold_in(key, n), count)
    make = block(model_config, model_config.attention_types[n])
    return jax.vmap(lambda k: make.init(k, *inputs)["params"])(keys)

  layers = {str(i): layer(i, repeats) for i in range(period)}
  tail = {
    str(i): jax.tree.map(lambda x: x[0], layer(period * repeats + i, 1))
    for i in range(pattern(model_config)[2])
  }
  embedding = gm.nn.Embedder(model_config.num_embed, model_config.embed_dim).init(
    jax.random.fold_in(key, model_config.num_layers), jnp.zeros((1, 1), jnp.int32), method="encode"
  )
  return {
    "embedder": embedding["params"],
    "final_norm": {"scale": jnp.zeros((model_config.embed_dim,))},
    "layers": layers,
    **({"tail": tail} if tail else {}),
  }


def shapes(model_config: GemmaConfig) -> Params:
  """Returns the stacked tree of `jax.ShapeDtypeStruct`s; allocates nothing."""
  return jax.eval_shape(functools.partial(init, model_config=model_config), jax.random.key(0))


def _swap_gating(model_config, layer):
  if not model_config.transpose_gating_einsum:
    return layer
  gating = jnp.swapaxes(layer["mlp"]["gating_einsum"], -1, -2)
  return {**layer, "mlp": {**layer["mlp"], "gating_einsum": gating}}


def unstack(params: Params, model_config: GemmaConfig, library_gating: bool = True) -> Params:
  """Returns the `layer_<n>` view, with the library's names and shapes.

  Args:
    library_gating: False keeps gating as [2, features, hidden], for decoding here.
  """
  period, repeats, _ = pattern(model_config)
  out = {"embedder": params["embedder"], "final_norm": params["final_norm"]}
  for n in range(model_config.num_layers):
    repeat, place = divmod(n, period)
    if repeat < repeats:
      layer = jax.tree.map(lambda x, r=repeat: x[r], params["layers"][str(place)])
    else:
      layer = params["tail"][str(place)]
    out[f"layer_{n}"] = _swap_gating(model_config, layer) if library_gating else layer
  return out


def cast(params: Params, dtype) -> Params:
  """Casts a whole tree, norms too: one float32 scale would turn every later activation float32."""
  return jax.tree.map(lambda x: x.astype(dtype), params)


def init_cache(model_config: GemmaConfig, batch: int, length: int, dtype) -> Cache:
  """Returns an empty cache of `length` columns for every layer."""
  make = functools.partial(
    gm.nn.Attention.init_cache,
    length,
    model_config.num_kv_heads,
    model_config.head_dim,
    batch,
    dtype,
  )
  return tuple(make() for _ in range(model_config.num_layers))


def _near(model_config, positions, cache) -> Bool[Array, "N T S"]:
  """Returns which columns lie within the window, as gm.nn.Attention has it for local layers."""
  columns = positions
  if cache:
    start = (0, cache[0]["end_index"][0])
    columns = jax.lax.dynamic_update_slice(cache[0]["positions"], positions, start)
  return jnp.abs(columns[:, None] - positions[:, :, None]) < model_config.sliding_window_size


def _stack(*trees):
  return jax.tree.map(lambda *xs: jnp.stack(xs), *trees)


def forward(
  params: Params,
  model_config: GemmaConfig,
  tokens: Int[Array, "N T"],
  positions: Int[Array, "N T"],
  attn_mask: Bool[Array, "N #T S"],
  *,
  cache: Cache | None = None,
  dtype=jnp.float32,
  remat: bool = False,
) -> tuple[Float[Array, "N T D"], Cache | None]:
  """Runs the blocks and the final norm.

  Args:
    params: stacked or unstacked (gating [2, features, hidden]), with or without adapters
      (lora.join); cast to `dtype` where used, and stacked ones gathered there.
    positions: of each token in its own sequence, padding not counted.
    attn_mask: what each token may see among S columns: the cache's where there is one.
    cache: written at its end index, which is the same for all rows.
    remat: recompute each scanned group of layers in the backward pass.

  Returns:
    Hidden states, and the cache with the new columns.
  """
  embedding = params["embedder"]["input_embedding"]
  x = sharding.constrain(embedding.astype(dtype)[tokens], sharding.BATCH)
  x *= jnp.sqrt(model_config.embed_dim).astype(dtype)

  def apply(layer, kind, x, layer_cache, visible=attn_mask):
    x = sharding.constrain(x, sharding.BATCH)
    return lora.apply(block(model_config, kind), layer, x, positions, layer_cache, visible)

  if "layers" in params:
    x, new_cache = _stacked_layers(
      params, model_config, x, positions, attn_mask, cache, apply, dtype, remat
    )
  else:
    new_cache = []
    for n, kind in enumerate(model_config.attention_types):
      layer = cast(params[f"layer_{n}"], dtype)
      layer_cache, x = apply(layer, kind, x, cache and cache[n])
      new_cache.append(layer_cache)
  norm = {"params": cast(params["final_norm"], dtype)}
  return gm.nn.RMSNorm().apply(norm, x), cache and tuple(new_cache)


def _stacked_layers(
  params, model_config, x, positions, attn_mask, cache, apply, dtype, remat
) -> tuple[Float[Array, "N T D"], list]:
  """Scans the stacked layers, then runs those left over; see `forward`."""
  kinds = tuple(model_config.attention_types)
  period, repeats, rest = pattern(model_config)
  num_scanned, near = period * repeats, _near(model_config, positions, cache)

  def gathered(layer):
    return sharding.gather_weights(cast(layer, dtype))

  def group(x, scanned):
    layers, local, caches = scanned
    out = []
    for place in range(period):
      kind, visible = kinds[place], attn_mask
      if alike(model_config):
        kind, visible = _GLOBAL, attn_mask & (near | ~local)
      layer_cache, x = apply(
        gathered(layers[str(place)]), kind, x, caches and caches[place], visible
      )
      out.append(layer_cache)
    return x, tuple(out)

  local = jnp.array([kind == _LOCAL for kind in kinds[:num_scanned:period]])
  caches = cache and tuple(_stack(*cache[i:num_scanned:period]) for i in range(period))
  x, caches = jax.lax.scan(
    jax.checkpoint(group) if remat else group, x, (params["layers"], local, caches)
  )
  new_cache = [
    cache and jax.tree.map(lambda leaf, r=n // period: leaf[r], caches[n % period])
    for n in range(num_scanned)
  ]
  for i in range(rest):
    n = num_scanned + i
    layer = gathered(params["tail"][str(i)])
    layer_cache, x = apply(layer, kinds[n], x, cache and cache[n])
    new_cache.append(layer_cache)
  return x, new_cache


def logits(
  params: Params,
  model_config: GemmaConfig,
  x: Float[Array, "... D"],
  forbidden: Bool[Array, "V"] | None = None,
) -> Float[Array, "... V"]:
  """Returns float32 next-token logits: soft-capped, then -inf-like where `forbidden`."""
  embedding = params["embedder"]["input_embedding"].astype(x.dtype)
  out = jnp.einsum("...D,VD->...V", x, embedding, preferred_element_type=jnp.float32)
  if model_config.final_logit_softcap is not None:
    out = jnp.tanh(out / model_config.final_logit_softcap) * model_config.final_logit_softcap
  if forbidden is not None:
    out = jnp.where(jnp.expand_dims(forbidden, range(out.ndim - 1)), -1e30, out)
  return out


def positions_of(mask: Bool[Array, "N T"]) -> Int[Array, "N T"]:
  """Returns each token's place among the unmasked ones; 0 on padding before them."""
  return jnp.maximum(jnp.cumsum(mask, axis=-1) - 1, 0)


def causal_mask(mask: Bool[Array, "N T"]) -> Bool[Array, "N T T"]:
  """Returns what each token may see: unmasked tokens up to itself."""
  length = mask.shape[-1]
  return jnp.tril(jnp.ones((1, length, length), bool)) & mask[:, None, :]

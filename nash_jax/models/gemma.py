"""Gemma assembled from the gemma library's own blocks.

Two layouts of one parameter tree:

* stacked, for training, judging and prefill: `layers/<i>` holds all blocks at position i of the
  pattern, with a leading repeat axis that is scanned over; `tail/<i>` holds the remaining layers.
  If local and global layers differ only in their window (Gemma 2), the pattern is one layer;
* unstacked, for decoding and checkpoints: `layer_<n>` as in the library.

Both gating layouts of the published checkpoints become [2, features, hidden] when stacked.
"""

import dataclasses
import functools
import importlib.machinery
import sys
import types
from collections.abc import Sequence
from typing import Any

import jax
from gemma import gm
from jax import numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from nash_jax.models import lora, sharding
from nash_jax.types import Params
from nash_jax.validation import one_of, require

LOCAL, GLOBAL = gm.nn.AttentionType.LOCAL_SLIDING, gm.nn.AttentionType.GLOBAL
Cache = tuple[dict[str, Array], ...]  # for each layer, what gm.nn.Block reads and returns


@dataclasses.dataclass(frozen=True)
class GemmaConfig:
  """An architecture: the fields of the library's TransformerConfig in which text models differ.

  The library's own class would import TensorFlow (10 to 20 s) before a config is checked.
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
  transpose_gating_einsum: bool = False  # in published checkpoints; never in the stacked layout
  local_base_frequency: int = 10_000
  global_base_frequency: int = 10_000
  local_scale_factor: float = 1.0
  global_scale_factor: float = 1.0
  query_pre_attn_scalar: int | None = None  # queries are divided by its square root; None: head_dim

  @property
  def query_scale(self) -> float:
    return (self.query_pre_attn_scalar or self.head_dim) ** -0.5

  @property
  def num_layers(self) -> int:
    return len(self.attention_types)

  @property
  def one_rope(self) -> bool:
    """Whether local and global layers differ only in their window, so that one block serves both.

    The compiler then sees one layer instead of a pattern, which halves its time for Gemma 2.
    """
    local = (self.local_base_frequency, self.local_scale_factor)
    return local == (self.global_base_frequency, self.global_scale_factor)


_PAIR, _SIX = (LOCAL, GLOBAL), (LOCAL,) * 5 + (GLOBAL,)  # the patterns of Gemma 2 and Gemma 3
_GEMMA3: dict[str, Any] = {
  "final_logit_softcap": None, "attn_logits_soft_cap": None, "use_qk_norm": True,
  "transpose_gating_einsum": True, "global_base_frequency": 1_000_000,
}  # fmt: skip
PRESETS = {  # positional: from num_embed to sliding_window_size
  "stories": GemmaConfig(1024, 128, 512, 4, 2, 32, _PAIR * 2, 128),
  "tiny": GemmaConfig(64, 16, 32, 2, 1, 8, _PAIR, 8),
  "gemma2_2b": GemmaConfig(256_128, 2304, 9216, 8, 4, 256, _PAIR * 13, 4096),
  "gemma2_9b": GemmaConfig(
    256_128, 3584, 14_336, 16, 8, 256, _PAIR * 21, 4096, transpose_gating_einsum=True
  ),
  "gemma3_270m": GemmaConfig(262_144, 640, 2048, 4, 1, 256, _SIX * 3, 512, **_GEMMA3),
  "gemma3_1b": GemmaConfig(262_144, 1152, 6912, 4, 1, 256, (_SIX * 5)[:26], 512, **_GEMMA3),
  "gemma3_4b": GemmaConfig(
    262_144, 2560, 10_240, 8, 4, 256, (_SIX * 6)[:34], 1024, global_scale_factor=8.0, **_GEMMA3
  ),
  "gemma3_12b": GemmaConfig(
    262_144, 3840, 15_360, 16, 8, 256, _SIX * 8, 1024, global_scale_factor=8.0, **_GEMMA3
  ),
  "gemma3_27b": GemmaConfig(
    262_144,
    5376,
    21_504,
    32,
    16,
    128,
    (_SIX * 11)[:62],
    1024,
    global_scale_factor=8.0,
    **_GEMMA3,
    query_pre_attn_scalar=168,
  ),
}


def preset(name: str, **changes: Any) -> GemmaConfig:
  """Returns the architecture called `name`, with fields replaced by `changes`.

  A change of `num_layers` keeps only the first layers.
  """
  one_of("model.preset", name, PRESETS)
  fields = [field.name for field in dataclasses.fields(GemmaConfig)]
  for change in changes:
    one_of("model.changes", change, [*fields, "num_layers"])
  base, layers = PRESETS[name], changes.pop("num_layers", None)
  shortened = dataclasses.replace(base, attention_types=base.attention_types[:layers])
  return dataclasses.replace(shortened, **changes)


def pattern(model_config: GemmaConfig) -> tuple[int, int, int]:
  """Returns (period of the layer pattern, full repeats, remaining layers)."""
  layers, length, period = tuple(model_config.attention_types), model_config.num_layers, 1
  while not model_config.one_rope and (layers[:period] * length)[:length] != layers:
    period += 1
  return period, length // period, length % period


@functools.cache
def _import_annotations() -> None:
  """Imports the types in the annotations of the library's blocks, without TensorFlow.

  They only need the name tf.Tensor, which no text model uses. Tested with gemma 4.0.1 and
  kauldron 1.4.4; a test fails if these import TensorFlow after all.
  """
  absent = "tensorflow" not in sys.modules
  if absent:
    stand_in = types.ModuleType("tensorflow")
    vars(stand_in)["Tensor"] = type("Tensor", (), {})
    stand_in.__spec__ = importlib.machinery.ModuleSpec("tensorflow", None)
    sys.modules["tensorflow"] = stand_in
  try:
    import kauldron.typing  # noqa: F401
  finally:
    if absent:
      del sys.modules["tensorflow"]


def block(
  model_config: GemmaConfig, attn_type: gm.nn.AttentionType, transpose_gating: bool = False
) -> gm.nn.Block:
  """Returns the library's block for one layer; gating is [2, features, hidden] by default."""
  _import_annotations()  # otherwise the block's call imports TensorFlow
  if attn_type == LOCAL:
    frequency, scale = model_config.local_base_frequency, model_config.local_scale_factor
  else:
    frequency, scale = model_config.global_base_frequency, model_config.global_scale_factor
  return gm.nn.Block(
    num_heads=model_config.num_heads, num_kv_heads=model_config.num_kv_heads,
    embed_dim=model_config.embed_dim, head_dim=model_config.head_dim,
    hidden_dim=model_config.hidden_dim, sliding_window_size=model_config.sliding_window_size,
    use_post_attn_norm=True, use_post_ffw_norm=True,
    attn_logits_soft_cap=model_config.attn_logits_soft_cap, attn_type=attn_type,
    query_pre_attn_scalar=model_config.query_scale, transpose_gating_einsum=transpose_gating,
    use_qk_norm=model_config.use_qk_norm, rope_base_frequency=frequency, rope_scale_factor=scale,
  )  # fmt: skip


def init(key: Array, model_config: GemmaConfig) -> Params:
  """Returns random float32 parameters in the stacked layout."""
  period, repeats, rest = pattern(model_config)
  x, visible = jnp.zeros((1, 1, model_config.embed_dim)), jnp.ones((1, 1, 1), bool)
  positions = jnp.zeros((1, 1), jnp.int32)

  def stacked(n: int, count: int) -> Params:
    """Returns `count` layers of the type of layer n."""
    keys = jax.random.split(jax.random.fold_in(key, n), count)
    layer = block(model_config, model_config.attention_types[n])
    return jax.vmap(lambda key: layer.init(key, x, positions, None, visible)["params"])(keys)

  last = [stacked(period * repeats + i, 1) for i in range(rest)]
  tail = {str(i): jax.tree.map(lambda leaf: leaf[0], layer) for i, layer in enumerate(last)}
  embedder = gm.nn.Embedder(model_config.num_embed, model_config.embed_dim)
  embedder_key = jax.random.fold_in(key, model_config.num_layers)
  return {
    "embedder": embedder.init(embedder_key, positions, method="encode")["params"],
    "final_norm": {"scale": jnp.zeros((model_config.embed_dim,))},
    "layers": {str(i): stacked(i, repeats) for i in range(period)},
    **({"tail": tail} if tail else {}),
  }


def shapes(model_config: GemmaConfig) -> Params:
  """Returns the stacked tree as `jax.ShapeDtypeStruct`s; allocates nothing."""
  return jax.eval_shape(functools.partial(init, model_config=model_config), jax.random.key(0))


def unstack(params: Params, model_config: GemmaConfig, library_gating: bool = True) -> Params:
  """Returns the `layer_<n>` view, with the library's names and shapes.

  Args:
    library_gating: False keeps gating as [2, features, hidden], for `decoding`.
  """
  period, repeats, _ = pattern(model_config)
  out = {"embedder": params["embedder"], "final_norm": params["final_norm"]}
  for n in range(model_config.num_layers):
    repeat, place = divmod(n, period)
    if repeat < repeats:
      layer = jax.tree.map(lambda leaf, r=repeat: leaf[r], params["layers"][str(place)])
    else:
      layer = params["tail"][str(place)]
    if library_gating and model_config.transpose_gating_einsum:
      gating = jnp.swapaxes(layer["mlp"]["gating_einsum"], -1, -2)
      layer = {**layer, "mlp": {**layer["mlp"], "gating_einsum": gating}}
    out[f"layer_{n}"] = layer
  return out


def cast(params: Params, dtype: DTypeLike) -> Params:
  """Casts a whole tree, norms included: one float32 scale would make later activations float32."""
  return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def init_cache(model_config: GemmaConfig, batch: int, length: int, dtype: DTypeLike) -> Cache:
  """Returns an empty cache of `length` columns for every layer."""
  heads, size = model_config.num_kv_heads, model_config.head_dim
  return tuple(
    gm.nn.Attention.init_cache(length, heads, size, batch, dtype)
    for _ in model_config.attention_types
  )


def _within_window(
  model_config: GemmaConfig, positions: Int[Array, "N T"], cache: Cache | None
) -> Bool[Array, "N T S"]:
  """Returns which columns are within the window of a local layer, as in gm.nn.Attention."""
  columns = positions
  if cache:
    start = (0, cache[0]["end_index"][0])
    columns = jax.lax.dynamic_update_slice(cache[0]["positions"], positions, start)
  return jnp.abs(columns[:, None] - positions[:, :, None]) < model_config.sliding_window_size


def forward(
  params: Params,
  model_config: GemmaConfig,
  tokens: Int[Array, "N T"],
  positions: Int[Array, "N T"],
  attn_mask: Bool[Array, "N #T S"],
  *,
  cache: Cache | None = None,
  dtype: DTypeLike = jnp.float32,
  remat: bool = False,
) -> tuple[Float[Array, "N T D"], Cache | None]:
  """Runs the blocks and the final norm.

  Args:
    params: stacked or unstacked (gating [2, features, hidden]), with or without adapters
      (lora.join). Each layer is cast to `dtype` when it runs; stacked layers are also gathered.
    positions: position of each token in its own sequence, without padding.
    attn_mask: which of S columns each token may attend to; with a cache, S counts its columns.
    cache: written at its end index, which is the same for all rows.
    remat: recompute each scanned group of layers in the backward pass.

  Returns:
    Hidden states, and the cache with the new columns.

  Raises:
    ValueError: dtype float16, in which the mask of a padding row gives NaN.
  """
  fix = "float16 is only for files: Gemma's activations and masks overflow it."
  require(jnp.dtype(dtype) != jnp.float16, "dtype", "float32 or bfloat16", "float16", fix)
  embedding = params["embedder"]["input_embedding"]
  x = sharding.constrain(embedding.astype(dtype)[tokens], sharding.BATCH)
  x *= jnp.sqrt(model_config.embed_dim).astype(dtype)

  def run_layer(layer, attn_type, x, layer_cache, visible=attn_mask):
    x = sharding.constrain(x, sharding.BATCH)
    return lora.apply(block(model_config, attn_type), layer, x, positions, layer_cache, visible)

  if "layers" in params:
    in_window = _within_window(model_config, positions, cache)
    x, new_cache = _stacked_layers(
      params, model_config, x, attn_mask, in_window, cache, run_layer, dtype, remat
    )
  else:
    new_cache = []
    for n, attn_type in enumerate(model_config.attention_types):
      layer = cast(params[f"layer_{n}"], dtype)
      layer_cache, x = run_layer(layer, attn_type, x, cache and cache[n])
      new_cache.append(layer_cache)
  norm = {"params": cast(params["final_norm"], dtype)}
  return gm.nn.RMSNorm().apply(norm, x), cache and tuple(new_cache)


def _stacked_layers(
  params, model_config, x, attn_mask, in_window, cache, run_layer, dtype, remat
) -> tuple[Float[Array, "N T D"], list]:
  """Scans the stacked layers, then runs the remaining ones; see `forward`."""
  attention_types = tuple(model_config.attention_types)
  period, repeats, _ = pattern(model_config)
  num_scanned = period * repeats

  def gathered(layer):
    return sharding.gather_weights(cast(layer, dtype))

  def run_group(x, scanned):
    layers, local, caches = scanned
    new_caches = []
    for place in range(period):
      attn_type, visible = attention_types[place], attn_mask
      if model_config.one_rope:
        attn_type, visible = GLOBAL, attn_mask & (in_window | ~local)
      layer = gathered(layers[str(place)])
      layer_cache, x = run_layer(layer, attn_type, x, caches and caches[place], visible)
      new_caches.append(layer_cache)
    return x, tuple(new_caches)

  def stacked(caches):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *caches)

  local = jnp.array([attn_type == LOCAL for attn_type in attention_types[:num_scanned:period]])
  caches = cache and tuple(stacked(cache[i:num_scanned:period]) for i in range(period))
  scanned = (params["layers"], local, caches)
  x, caches = jax.lax.scan(jax.checkpoint(run_group) if remat else run_group, x, scanned)
  new_cache = [
    cache and jax.tree.map(lambda leaf, r=n // period: leaf[r], caches[n % period])
    for n in range(num_scanned)
  ]
  for n in range(num_scanned, len(attention_types)):
    layer = gathered(params["tail"][str(n - num_scanned)])
    layer_cache, x = run_layer(layer, attention_types[n], x, cache and cache[n])
    new_cache.append(layer_cache)
  return x, new_cache


def logits(
  params: Params,
  model_config: GemmaConfig,
  x: Float[Array, "... D"],
  forbidden: Bool[Array, "V"] | None = None,
  ids_first: bool = False,
) -> Float[Array, "..."]:
  """Returns float32 next-token logits: soft-capped, then hugely negative where `forbidden`.

  The shape is [..., V], or [V, ...] with `ids_first`.
  """
  embedding = params["embedder"]["input_embedding"].astype(x.dtype)
  operands, axes = (
    ((embedding, x), "VD,...D->V...") if ids_first else ((x, embedding), "...D,VD->...V")
  )
  out = jnp.einsum(axes, *operands, preferred_element_type=jnp.float32)
  if model_config.final_logit_softcap is not None:
    out = jnp.tanh(out / model_config.final_logit_softcap) * model_config.final_logit_softcap
  if forbidden is not None:
    others = range(1, out.ndim) if ids_first else range(out.ndim - 1)
    out = jnp.where(jnp.expand_dims(forbidden, others), -1e30, out)
  return out


def mixed(
  outputs: Sequence[Float[Array, "..."]],
  mixture: float | Float[Array, ""] | Float[Array, "M"] | None,
) -> Float[Array, "..."]:
  """Returns (1 - Σm)·first + Σ m_i·the further ones: logits of a geometric mixture of models.

  Args:
    mixture: m of one further model, or of M of them; None where there is none.
  """
  if mixture is None:
    return outputs[0]
  first, *others = outputs
  further = [mixture] if jnp.ndim(mixture) == 0 else [*jnp.asarray(mixture)]
  terms = (m * x for m, x in zip(further, others, strict=True))
  return sum(terms, (1.0 - sum(further)) * first)


def positions_of(mask: Bool[Array, "N T"]) -> Int[Array, "N T"]:
  """Returns each token's position among the unmasked ones; 0 on padding before them."""
  return jnp.maximum(jnp.cumsum(mask, axis=-1) - 1, 0)


def causal_mask(mask: Bool[Array, "N T"]) -> Bool[Array, "N T T"]:
  """Returns which tokens each token may attend to: unmasked ones up to itself."""
  length = mask.shape[-1]
  return jnp.tril(jnp.ones((1, length, length), bool)) & mask[:, None, :]

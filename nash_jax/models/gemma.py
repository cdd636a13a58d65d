"""Gemma assembled from the gemma library's own blocks.

Two layouts of one parameter tree:

* stacked, for training, judging and prefill: `layers/<i>` holds all blocks at position i of the
  pattern, with a leading repeat axis that is scanned over; `tail/<i>` holds the remaining layers.
  If local and global layers differ only in their window (Gemma 2), the pattern is one layer. With
  `value_norm` (Gemma 4), i counts the pattern's runs of layers of one kind (`runs`).
  `shared/<i>` holds the layers that read another layer's keys and values (Gemma 4 E2B and E4B): a
  second scan, over whole patterns, that reads those of the first scan's last pattern;
* unstacked, for decoding and checkpoints: `layer_<n>` as in the library.

Both gating layouts of the published checkpoints become [2, features, hidden] when stacked.
"""

import dataclasses
import functools
import importlib.machinery
import itertools
import sys
import types
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from gemma import gm
from gemma.gm.nn.gemma4 import _layers as gemma4_layers
from gemma.gm.nn.gemma4 import _modules as gemma4
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
  # The block is gm.nn.gemma4's: values are normalised too, queries are not scaled, norms multiply
  # by their scale and not by 1 + scale, and a learnt scalar multiplies the block's output.
  value_norm: bool = False
  # The fields below need it.
  global_key_size: int | None = None  # head size of global layers; None: head_dim
  num_global_kv_heads: int | None = None  # key-value heads of global layers; None: num_kv_heads
  k_eq_v_global: bool = False  # global layers project keys only; values are those, normalised
  global_rope_proportion: float = 1.0  # share of a global layer's head that is rotated
  per_layer_input_dim: int = 0  # columns of each layer's own embedding of the tokens; 0: none
  num_kv_shared_layers: int = 0  # last layers, which read keys and values of the last before them
  override_kv_shared_ffw_hidden: int | None = None  # hidden_dim of those layers; None: hidden_dim

  @property
  def query_scale(self) -> float:
    return 1.0 if self.value_norm else (self.query_pre_attn_scalar or self.head_dim) ** -0.5

  @property
  def num_layers(self) -> int:
    return len(self.attention_types)

  @property
  def num_kv_layers(self) -> int:
    """How many layers have keys and values of their own: the first ones."""
    return self.num_layers - self.num_kv_shared_layers

  @property
  def one_rope(self) -> bool:
    """Whether local and global layers differ only in their window, so that one block serves both.

    The compiler then sees one layer instead of a pattern, which halves its time for Gemma 2.
    """
    local = (self.local_base_frequency, self.local_scale_factor)
    same = local == (self.global_base_frequency, self.global_scale_factor)
    return same and not self.value_norm

  def kv_shape(self, attn_type: gm.nn.AttentionType) -> tuple[int, int]:
    """Returns (key-value heads, head size) of a layer of this kind."""
    if attn_type == LOCAL:
      return self.num_kv_heads, self.head_dim
    return self.num_global_kv_heads or self.num_kv_heads, self.global_key_size or self.head_dim

  def donor(self, layer: int) -> int | None:
    """Returns the layer whose keys and values this one reads; None where it has its own."""
    if layer < self.num_kv_layers:
      return None
    kind = self.attention_types[layer]
    return max(n for n in range(self.num_kv_layers) if self.attention_types[n] == kind)


_PAIR, _SIX = (LOCAL, GLOBAL), (LOCAL,) * 5 + (GLOBAL,)  # the patterns of Gemma 2, and 3 and 4
_GEMMA3: dict[str, Any] = {
  "final_logit_softcap": None, "attn_logits_soft_cap": None, "use_qk_norm": True,
  "transpose_gating_einsum": True, "global_base_frequency": 1_000_000,
}  # fmt: skip
_GEMMA4: dict[str, Any] = {
  **_GEMMA3, "final_logit_softcap": 30.0, "value_norm": True, "global_key_size": 512,
  "global_rope_proportion": 0.25,
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
  "gemma4_e2b": GemmaConfig(
    262_144,
    1536,
    6144,
    8,
    1,
    256,
    _SIX[1:] * 7,
    512,
    **_GEMMA4,
    per_layer_input_dim=256,
    num_kv_shared_layers=20,
    override_kv_shared_ffw_hidden=12_288,
  ),
  "gemma4_e4b": GemmaConfig(
    262_144,
    2560,
    10_240,
    8,
    2,
    256,
    _SIX * 7,
    512,
    **_GEMMA4,
    per_layer_input_dim=256,
    num_kv_shared_layers=18,
  ),
  "gemma4_12b": GemmaConfig(
    262_144,
    3840,
    15_360,
    16,
    8,
    256,
    _SIX * 8,
    1024,
    **_GEMMA4,
    num_global_kv_heads=1,
    k_eq_v_global=True,
  ),
  "gemma4_31b": GemmaConfig(
    262_144,
    5376,
    21_504,
    32,
    16,
    256,
    _SIX * 10,
    1024,
    **_GEMMA4,
    num_global_kv_heads=4,
    k_eq_v_global=True,
  ),
}


# {beginning of a preset's name: licence of the published weights, as model cards spell it}
LICENCES = {"gemma4": "apache-2.0", "gemma": "gemma"}
NO_EXPERTS = "mixtures of experts are not supported yet: use gemma4_31b or a smaller Gemma 4"


def check_preset(name: str, what: str = "model.preset") -> None:
  """Raises ValueError unless there is a preset of this name; `what` names the field in errors."""
  if name.startswith("gemma4_26b"):
    raise ValueError(f"{what}: got {name!r}, which is a mixture of experts: {NO_EXPERTS}")
  one_of(what, name, PRESETS)


def licence(name: str) -> str:
  """Returns the licence of the weights published for a preset; "" if none are."""
  return next((licence for start, licence in LICENCES.items() if name.startswith(start)), "")


def preset(name: str, **changes: Any) -> GemmaConfig:
  """Returns the architecture called `name`, with fields replaced by `changes`.

  A change of `num_layers` keeps only the first layers.
  """
  check_preset(name)
  fields = [field.name for field in dataclasses.fields(GemmaConfig)]
  for change in changes:
    one_of("model.changes", change, [*fields, "num_layers"])
  base, layers = PRESETS[name], changes.pop("num_layers", None)
  shortened = dataclasses.replace(base, attention_types=base.attention_types[:layers])
  return dataclasses.replace(shortened, **changes)


def pattern(model_config: GemmaConfig) -> tuple[int, int, int]:
  """Returns (period of the layer pattern, full repeats, remaining layers).

  Repeats and remaining layers are of those with keys and values of their own; the layers that share
  them are whole patterns (config/checks.py).
  """
  layers, length, period = tuple(model_config.attention_types), model_config.num_layers, 1
  while not model_config.one_rope and (layers[:period] * length)[:length] != layers:
    period += 1
  return period, model_config.num_kv_layers // period, model_config.num_kv_layers % period


def runs(model_config: GemmaConfig) -> list[tuple[int, int]]:
  """Returns (first place in the pattern, length) of the runs of layers that are one stack.

  Neighbours of one kind are, so that the compiler sees each kind once: half of Gemma 4's time.
  Without value_norm each place is, as saved trees have it.
  """
  period, *_ = pattern(model_config)
  kinds = model_config.attention_types
  starts = [
    place
    for place in range(period)
    if place == 0 or kinds[place] != kinds[place - 1] or not model_config.value_norm
  ]
  return [(start, end - start) for start, end in itertools.pairwise([*starts, period])]


def place_of(model_config: GemmaConfig, layer: int) -> tuple[str, str, int | None]:
  """Returns where a layer is in the stacked tree: (stack, place, row; None in "tail")."""
  period, repeats, _ = pattern(model_config)
  stack, first = "layers", 0
  if layer >= model_config.num_kv_layers:
    stack, first = "shared", model_config.num_kv_layers
  repeat, place = divmod(layer - first, period)
  if stack == "layers" and repeat >= repeats:
    return "tail", str(place), None
  stacks = enumerate(runs(model_config))
  i, start, length = next((i, start, n) for i, (start, n) in stacks if place < start + n)
  return stack, str(i), repeat * length + place - start


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


class _Block(gemma4.Block):
  """gm.nn.gemma4's block, but gating is [2, features, hidden], as in every stacked tree."""

  def _setup_dense(self):
    self.pre_ffw_norm = gemma4_layers.RMSNorm()
    self.mlp = gm.nn.FeedForward(self.embed_dim, self.hidden_dim, transpose_gating_einsum=False)
    self.post_ffw_norm = gemma4_layers.RMSNorm()


def block(
  model_config: GemmaConfig,
  attn_type: gm.nn.AttentionType,
  transpose_gating: bool = False,
  sharing: bool = False,
) -> nn.Module:
  """Returns the library's block for one layer; gating is [2, features, hidden] by default.

  Args:
    sharing: whether it reads another layer's keys and values.
  """
  _import_annotations()  # otherwise the block's call imports TensorFlow
  if attn_type == LOCAL:
    frequency, scale = model_config.local_base_frequency, model_config.local_scale_factor
  else:
    frequency, scale = model_config.global_base_frequency, model_config.global_scale_factor
  wide = sharing and model_config.override_kv_shared_ffw_hidden
  common: dict[str, Any] = {
    "num_heads": model_config.num_heads, "num_kv_heads": model_config.num_kv_heads,
    "embed_dim": model_config.embed_dim, "head_dim": model_config.head_dim,
    "hidden_dim": wide or model_config.hidden_dim,
    "sliding_window_size": model_config.sliding_window_size,
    "use_post_attn_norm": True, "use_post_ffw_norm": True,
    "attn_logits_soft_cap": model_config.attn_logits_soft_cap,
    "rope_base_frequency": frequency, "rope_scale_factor": scale,
  }  # fmt: skip
  if not model_config.value_norm:
    return gm.nn.Block(
      **common, attn_type=attn_type, query_pre_attn_scalar=model_config.query_scale,
      transpose_gating_einsum=transpose_gating, use_qk_norm=model_config.use_qk_norm,
    )  # fmt: skip
  return (gemma4.Block if transpose_gating else _Block)(
    **common, attn_type=gemma4.AttentionType[attn_type.name],
    num_global_kv_heads=model_config.num_global_kv_heads,
    global_key_size=model_config.global_key_size, k_eq_v_global=model_config.k_eq_v_global,
    global_rope_proportion=model_config.global_rope_proportion, local_rope_proportion=1.0,
    per_layer_input_dim=model_config.per_layer_input_dim,
  )  # fmt: skip


def _norm(model_config: GemmaConfig) -> gemma4_layers.RMSNorm | gm.nn.RMSNorm:
  return gemma4_layers.RMSNorm() if model_config.value_norm else gm.nn.RMSNorm()


# Parameters of the attention of a layer that has keys and values of its own, and no other.
_OWN = ("kv_einsum", "k_einsum", "key_norm")


def init(key: Array, model_config: GemmaConfig) -> Params:
  """Returns random float32 parameters in the stacked layout."""
  period, repeats, rest = pattern(model_config)
  x, visible = jnp.zeros((1, 1, model_config.embed_dim)), jnp.ones((1, 1, 1), bool)
  positions = jnp.zeros((1, 1), jnp.int32)
  columns = model_config.per_layer_input_dim
  per_layer = (jnp.zeros((1, 1, columns)),) if columns else ()

  def stacked(n: int, count: int) -> Params:
    """Returns `count` layers of the type of layer n."""
    keys = jax.random.split(jax.random.fold_in(key, n), count)
    sharing = model_config.donor(n) is not None
    layer = block(model_config, model_config.attention_types[n], sharing=sharing)

    def init_layer(key):
      with jax.numpy_rank_promotion("allow"):  # gm.nn.gemma4 multiplies by a scalar of shape [1]
        found = layer.init(key, x, positions, None, visible, *per_layer)["params"]
      if sharing:
        found["attn"] = {name: leaf for name, leaf in found["attn"].items() if name not in _OWN}
      return found

    return jax.vmap(init_layer)(keys)

  owners = model_config.num_kv_layers
  last = [stacked(period * repeats + i, 1) for i in range(rest)]
  tail = {str(i): jax.tree.map(lambda leaf: leaf[0], layer) for i, layer in enumerate(last)}
  count = model_config.num_kv_shared_layers // period
  stacks = list(enumerate(runs(model_config)))
  shared = {str(i): stacked(owners + n, count * size) for i, (n, size) in stacks if count}
  return {
    "embedder": _init_embedder(jax.random.fold_in(key, model_config.num_layers), model_config),
    "final_norm": _norm(model_config).init(key, x)["params"],
    "layers": {str(i): stacked(n, repeats * size) for i, (n, size) in stacks},
    **({"tail": tail} if tail else {}),
    **({"shared": shared} if shared else {}),
  }


def _init_embedder(key: Array, model_config: GemmaConfig) -> Params:
  tokens = jnp.zeros((1, 1), jnp.int32)
  rows, width, columns = (
    model_config.num_embed, model_config.embed_dim, model_config.per_layer_input_dim
  )  # fmt: skip
  if not columns:
    return gm.nn.Embedder(rows, width).init(key, tokens, method="encode")["params"]
  embedder = gemma4.Embedder(rows, width, model_config.num_layers, columns)
  x = jnp.zeros((1, 1, width))
  return embedder.init(key, x, tokens, method="encode_per_layer_input")["params"]


def shapes(model_config: GemmaConfig) -> Params:
  """Returns the stacked tree as `jax.ShapeDtypeStruct`s; allocates nothing."""
  return jax.eval_shape(functools.partial(init, model_config=model_config), jax.random.key(0))


def unstack(params: Params, model_config: GemmaConfig, library_gating: bool = True) -> Params:
  """Returns the `layer_<n>` view, with the library's names and shapes.

  Args:
    library_gating: False keeps gating as [2, features, hidden], for `decoding`.
  """
  out = {"embedder": params["embedder"], "final_norm": params["final_norm"]}
  for n in range(model_config.num_layers):
    stack, place, repeat = place_of(model_config, n)
    layer = params[stack][place]
    if repeat is not None:
      layer = jax.tree.map(lambda leaf, r=repeat: leaf[r], layer)
    if library_gating and model_config.transpose_gating_einsum:
      gating = jnp.swapaxes(layer["mlp"]["gating_einsum"], -1, -2)
      layer = {**layer, "mlp": {**layer["mlp"], "gating_einsum": gating}}
    out[f"layer_{n}"] = layer
  return out


def cast(params: Params, dtype: DTypeLike) -> Params:
  """Casts a whole tree, norms included: one float32 scale would make later activations float32."""
  return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def init_cache(model_config: GemmaConfig, batch: int, length: int, dtype: DTypeLike) -> Cache:
  """Returns an empty cache of `length` columns for every layer with keys of its own."""
  return tuple(
    gm.nn.Attention.init_cache(length, *model_config.kv_shape(attn_type), batch, dtype)
    for attn_type in model_config.attention_types[: model_config.num_kv_layers]
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
  embedder = params["embedder"]
  x = sharding.constrain(embedder["input_embedding"].astype(dtype)[tokens], sharding.BATCH)
  x *= jnp.sqrt(model_config.embed_dim).astype(dtype)
  inputs = None
  if model_config.per_layer_input_dim:
    per_layer = jax.checkpoint(_per_layer_inputs) if remat else _per_layer_inputs
    inputs = per_layer({n: p for n, p in embedder.items() if n != "input_embedding"}, tokens, x)

  def run_layer(layer, attn_type, x, layer_cache, visible=attn_mask, inputs=None, donor=None):
    x = sharding.constrain(x, sharding.BATCH)
    args = (x, positions, layer_cache, visible)
    if not model_config.value_norm:
      return lora.apply(block(model_config, attn_type), layer, *args)
    if donor is not None:
      layer = _with_unread(layer, model_config, attn_type, dtype)
    module = block(model_config, attn_type, sharing=donor is not None)
    with jax.numpy_rank_promotion("allow"):  # gm.nn.gemma4 multiplies by a scalar of shape [1]
      return lora.apply(module, layer, *args, inputs, donor)

  if "layers" in params and model_config.value_norm:
    x, new_cache = _stacked_runs(params, model_config, x, inputs, cache, run_layer, dtype, remat)
  elif "layers" in params:
    in_window = _within_window(model_config, positions, cache)
    x, new_cache = _stacked_layers(
      params, model_config, x, attn_mask, in_window, cache, run_layer, dtype, remat
    )
  else:
    new_cache = []
    for n, attn_type in enumerate(model_config.attention_types):
      donor, own = model_config.donor(n), inputs if inputs is None else inputs[n]
      layer = cast(params[f"layer_{n}"], dtype)
      if donor is None:
        layer_cache, x = run_layer(layer, attn_type, x, cache and cache[n], inputs=own)
        new_cache.append(layer_cache)
      else:
        _, x = run_layer(layer, attn_type, x, None, inputs=own, donor=new_cache[donor])
  norm = {"params": cast(params["final_norm"], dtype)}
  x = jnp.asarray(_norm(model_config).apply(norm, x))
  return x, cache and tuple(new_cache)


def _with_unread(layer: Params, model_config: GemmaConfig, attn_type, dtype) -> Params:
  """Returns a sharing layer with the parameters of keys that the library's block makes and drops.

  The compiler drops them too.
  """
  heads, size = model_config.kv_shape(attn_type)
  shape = (heads, model_config.embed_dim, size)
  unread = {"kv_einsum": {"w": jnp.zeros((2, *shape), dtype)}}
  if attn_type == GLOBAL and model_config.k_eq_v_global:
    unread = {"k_einsum": {"w": jnp.zeros(shape, dtype)}}
  norm = {"key_norm": {"scale": jnp.zeros(size, dtype)}}
  return {**layer, "attn": {**layer["attn"], **unread, **norm}}


def _per_layer_inputs(
  embedder: Params, tokens: Int[Array, "N T"], x: Float[Array, "N T D"]
) -> Float[Array, "layers N T P"]:
  """Returns what each layer reads beside x: the mean of a row of its own table and of projected x.

  As gm.nn.gemma4.Embedder.encode_per_layer_input, which would first cast the whole table.
  """
  rows = embedder["per_layer_embeddings"][tokens].astype(x.dtype)
  weights = {n: cast(embedder[n], x.dtype) for n in embedder if n != "per_layer_embeddings"}
  weights = sharding.gather_weights({"embedder": weights})["embedder"]
  projection = weights["per_layer_model_projection"]["w"] * x.shape[-1] ** -0.5
  norm = {"params": weights["per_layer_projection_norm"]}
  projected = gemma4_layers.RMSNorm().apply(norm, jnp.einsum("NTD,DLP->NTLP", x, projection))
  mean = (projected + rows * rows.shape[-1] ** 0.5) * 2**-0.5
  return sharding.constrain(jnp.moveaxis(mean, 2, 0), None, sharding.BATCH)


def _stacked_layers(
  params, model_config, x, attn_mask, in_window, cache, run_layer, dtype, remat
) -> tuple[Float[Array, "N T D"], list]:
  """Scans the stacked layers, each pattern a step, then runs the remaining ones; see `forward`."""
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


def _stacked_runs(
  params, model_config, x, inputs, cache, run_layer, dtype, remat
) -> tuple[Float[Array, "N T D"], list]:
  """The same for blocks with `value_norm`: within a pattern, each run of one kind is scanned."""
  attention_types, owners = tuple(model_config.attention_types), model_config.num_kv_layers
  period, repeats, _ = pattern(model_config)
  num_scanned = period * repeats
  again = jax.checkpoint if remat else lambda fn: fn

  def step(x, scanned, kind, donor=None):
    layer, layer_cache, own = scanned
    layer = sharding.gather_weights(cast(layer, dtype))
    layer_cache, x = run_layer(layer, kind, x, layer_cache, inputs=own, donor=donor)
    return x, layer_cache if donor is None else None

  def run_group(x, scanned, donors=None):
    kept = []
    for (place, _), stack in zip(runs(model_config), scanned, strict=True):
      kind = attention_types[place]
      one = functools.partial(step, kind=kind, donor=donors and donors[kind])
      x, found = jax.lax.scan(again(one), x, stack)
      # Without a cache, only the last layer's keys and values are read again, if any layer shares.
      last = jax.tree.map(lambda leaf: leaf[-1:], found) if "shared" in params else None
      kept.append(found if cache else last)
    return x, tuple(kept)

  def scanned(name, first, count):
    """Returns ([patterns, layers of a run, ...] of parameters, caches and inputs) of each run."""
    out = []
    for i, (place, size) in enumerate(runs(model_config)):
      rows = [n for n in range(first, first + count) if 0 <= (n - first) % period - place < size]
      caches = name == "layers" and cache and [cache[n] for n in rows]
      stack = (
        params[name][str(i)],
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *caches) if caches else None,
        None if inputs is None else inputs[np.array(rows)],
      )
      split = lambda leaf, size=size: leaf.reshape(-1, size, *leaf.shape[1:])  # noqa: E731
      out.append(jax.tree.map(split, stack))
    return out

  x, kept = jax.lax.scan(run_group, x, scanned("layers", 0, num_scanned))
  new_cache = []
  for n in range(num_scanned if cache else 0):
    place = int(place_of(model_config, n)[1])
    at = n // period, n % period - runs(model_config)[place][0]
    new_cache.append(jax.tree.map(lambda leaf, at=at: leaf[at], kept[place]))
  for n in range(num_scanned, owners):
    layer, own = params["tail"][str(n - num_scanned)], None if inputs is None else inputs[n]
    x, layer_cache = step(x, (layer, cache and cache[n], own), attention_types[n])
    new_cache.append(layer_cache)
  if "shared" in params:
    kinds = [attention_types[place] for place, _ in runs(model_config)]
    last = [jax.tree.map(lambda leaf: leaf[-1, -1], found) for found in kept]
    sharing = functools.partial(run_group, donors=dict(zip(kinds, last, strict=True)))
    x, _ = jax.lax.scan(sharing, x, scanned("shared", owners, model_config.num_layers - owners))
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

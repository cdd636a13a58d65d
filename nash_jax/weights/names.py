"""The tensors of a text model: their names in our tree, in the gemma library and at Hugging Face.

Axes are letters: V vocabulary rows, D embed, F hidden, N heads, K key-value heads, H head size, L
layers, P columns of per-layer embeddings. A digit is an axis of that size, and "NH" is one axis of
size N·H. F, K and H may differ between layers.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax
from jax.sharding import Sharding

from nash_jax.models import gemma
from nash_jax.models.gemma import GemmaConfig
from nash_jax.validation import printable

Shape = tuple[int, ...]
# (names of the tensors in a file that form one of ours, axes of each)
Names = tuple[tuple[str, ...], str]


@dataclasses.dataclass(frozen=True)
class Tensor:
  """One tensor of a block, or of the model.

  Attributes:
    name: its name within the block, in our tree and in the gemma library.
    axes: its axes in our tree, without the axis of stacked layers.
    hf_names: Hugging Face's names within the block; several tensors form the first axis.
    hf_axes: the axes of each of Hugging Face's tensors.
  """

  name: str
  axes: str
  hf_names: tuple[str, ...]
  hf_axes: str


@dataclasses.dataclass(frozen=True)
class Place:
  """The source of a leaf of our stacked tree; `layers` is () for tensors outside the blocks.

  `sizes` are {axis letter: length}, the same for all its layers.
  """

  tensor: Tensor
  sizes: Mapping[str, int]
  layers: tuple[int, ...] = ()
  stacked: bool = False

  @property
  def shape(self) -> Shape:
    """The shape of the leaf."""
    return (len(self.layers),) * self.stacked + shape(self.tensor.axes, self.sizes)


# (place, shape, dtype, sharding) -> the array of one leaf.
Read = Callable[[Place, Shape, Any, Sharding], jax.Array]
Scheme = Callable[[GemmaConfig, Tensor, int | None], Names]  # `library` or `hugging_face`

EMBEDDING = Tensor("embedder/input_embedding", "V D", ("embed_tokens.weight",), "V D")
# Heads of a reward model and of a general preference model; Hugging Face has no such tensors.
HEADS = tuple(
  Tensor(f"head/{name}", axes, (), "")
  for name, axes in (("w", "D"), ("v", "D G"), ("scale", "D G"))
)
_NORM = Tensor("final_norm/scale", "D", ("norm.weight",), "D")
# Of a model with an embedding of its own for each layer.
LAYERS_EMBEDDING = Tensor(
  "embedder/per_layer_embeddings", "V L P", ("embed_tokens_per_layer.weight",), "V LP"
)
_PER_LAYER = (
  LAYERS_EMBEDDING,
  Tensor(
    "embedder/per_layer_model_projection/w", "D L P", ("per_layer_model_projection.weight",), "LP D"
  ),
  Tensor(
    "embedder/per_layer_projection_norm/scale", "P", ("per_layer_projection_norm.weight",), "P"
  ),
)
TABLES = (EMBEDDING, LAYERS_EMBEDDING)  # a row for each piece of a tokenizer
_Q, _K, _V = (f"self_attn.{x}_proj.weight" for x in "qkv")
_GROUPED = (
  Tensor("attn/q_einsum/w", "N D H", (_Q,), "NH D"),
  Tensor("attn/kv_einsum/w", "2 K D H", (_K, _V), "KH D"),
)
# The library's layout if there are as many key-value heads as heads.
_UNGROUPED = (Tensor("attn/qkv_einsum/w", "3 N D H", (_Q, _K, _V), "NH D"),)
_QK_NORMS = (
  Tensor("attn/_query_norm/scale", "H", ("self_attn.q_norm.weight",), "H"),
  Tensor("attn/_key_norm/scale", "H", ("self_attn.k_norm.weight",), "H"),
)
# Of a block whose values are normed too: a layer that reads another's keys has only the queries'.
_QUERIES = (_GROUPED[0], Tensor("attn/query_norm/scale", "H", ("self_attn.q_norm.weight",), "H"))
_KEY_NORM = Tensor("attn/key_norm/scale", "H", ("self_attn.k_norm.weight",), "H")
_KEYS = Tensor("attn/k_einsum/w", "K D H", (_K,), "KH D")  # which are the values too
_SCALAR = Tensor("skip_scale", "1", ("layer_scalar",), "1")
_OWN_INPUT = (
  Tensor("per_layer_input_gate/w", "D P", ("per_layer_input_gate.weight",), "P D"),
  Tensor("per_layer_projection/w", "P D", ("per_layer_projection.weight",), "D P"),
  Tensor("post_per_layer_input_norm/scale", "D", ("post_per_layer_input_norm.weight",), "D"),
)
_BLOCK = (
  Tensor("attn/attn_vec_einsum/w", "N H D", ("self_attn.o_proj.weight",), "D NH"),
  Tensor("mlp/gating_einsum", "2 D F", ("mlp.gate_proj.weight", "mlp.up_proj.weight"), "F D"),
  Tensor("mlp/linear", "F D", ("mlp.down_proj.weight",), "D F"),
  Tensor("pre_attention_norm/scale", "D", ("input_layernorm.weight",), "D"),
  Tensor("post_attention_norm/scale", "D", ("post_attention_layernorm.weight",), "D"),
  Tensor("pre_ffw_norm/scale", "D", ("pre_feedforward_layernorm.weight",), "D"),
  Tensor("post_ffw_norm/scale", "D", ("post_feedforward_layernorm.weight",), "D"),
)


def sizes(model_config: GemmaConfig, layer: int | None = None) -> dict[str, int]:
  """Returns {axis letter: length}, those of a layer included."""
  outside = {
    "V": model_config.num_embed, "D": model_config.embed_dim, "N": model_config.num_heads,
    "L": model_config.num_layers, "P": model_config.per_layer_input_dim, "1": 1, "2": 2, "3": 3,
  }  # fmt: skip
  if layer is None:
    return outside
  heads, size = model_config.kv_shape(model_config.attention_types[layer])
  wider = model_config.donor(layer) is not None and model_config.override_kv_shared_ffw_hidden
  return outside | {"K": heads, "H": size, "F": wider or model_config.hidden_dim}


def shape(axes: str, sizes: Mapping[str, int]) -> Shape:
  """Returns the shape of axes such as "2 NH D"."""
  return tuple(math.prod(sizes[letter] for letter in axis) for axis in axes.split())


def _keys(model_config: GemmaConfig, layer: int) -> tuple[Tensor, ...]:
  """Returns the tensors of a layer's keys and values, where its values are normed."""
  is_global = model_config.attention_types[layer] == gemma.GLOBAL
  return (_KEYS if is_global and model_config.k_eq_v_global else _GROUPED[1]), _KEY_NORM


def _tensors(model_config: GemmaConfig, layer: int) -> tuple[Tensor, ...]:
  if model_config.value_norm:
    own = () if model_config.donor(layer) is not None else _keys(model_config, layer)
    more = _OWN_INPUT if model_config.per_layer_input_dim else ()
    return (*_QUERIES, *own, *_BLOCK, _SCALAR, *more)
  grouped = model_config.num_heads != model_config.num_kv_heads
  return (*(_GROUPED if grouped else _UNGROUPED), *_QK_NORMS * model_config.use_qk_norm, *_BLOCK)


def places(model_config: GemmaConfig) -> dict[str, Place]:
  """Returns {path: place} of the stacked tree's leaves, without building a block."""
  outside = (EMBEDDING, _NORM, *(_PER_LAYER if model_config.per_layer_input_dim else ()))
  leaves = {tensor.name: Place(tensor, sizes(model_config)) for tensor in outside}
  stacks: dict[tuple[str, str], list[int]] = {}
  for layer in range(model_config.num_layers):
    stack, place, _ = gemma.place_of(model_config, layer)
    stacks.setdefault((stack, place), []).append(layer)
  tensors = {path: _tensors(model_config, layers[0]) for path, layers in stacks.items()}
  for tensor in dict.fromkeys(itertools.chain(*tensors.values())):
    for (stack, place), layers in stacks.items():
      if tensor in tensors[stack, place]:
        leaves[f"{stack}/{place}/{tensor.name}"] = Place(
          tensor, sizes(model_config, layers[0]), tuple(layers), stack != "tail"
        )
  return leaves


def unread(model_config: GemmaConfig, scheme: Scheme) -> set[str]:
  """Returns the names of tensors that a file may have but no model reads.

  They are keys and values of layers that read another layer's.
  """
  sharing = range(model_config.num_kv_layers, model_config.num_layers)
  return {
    name
    for layer in sharing
    for tensor in _keys(model_config, layer)
    for name in scheme(model_config, tensor, layer)[0]
  }


def heads(got: Mapping[str, Shape], model_config: GemmaConfig) -> dict[str, Place]:
  """Returns the heads among leaves of these shapes by name, each with as many columns as it has."""
  own = {x: {"G": (*got[x.name], 0)[1]} for x in HEADS if got.get(x.name)}
  return {x.name: Place(x, sizes(model_config) | columns) for x, columns in own.items()}


def library(model_config: GemmaConfig, tensor: Tensor, layer: int | None = None) -> Names:
  """Returns ((name,), axes) in the gemma library's nested layout, with gating as published."""
  swap = model_config.transpose_gating_einsum and tensor.name == "mlp/gating_einsum"
  prefix = "" if layer is None else f"layer_{layer}/"
  return (prefix + tensor.name,), "2 F D" if swap else tensor.axes


def hugging_face(model_config: GemmaConfig, tensor: Tensor, layer: int | None = None) -> Names:
  """Returns (names, axes of each) at Hugging Face, without the model's prefix."""
  prefix = "" if layer is None else f"layers.{layer}."
  return tuple(prefix + name for name in tensor.hf_names), tensor.hf_axes


def sources(
  model_config: GemmaConfig, scheme: Scheme
) -> Iterator[tuple[str, Place, int, tuple[str, ...], str]]:
  """Yields (path in our tree, place, repeat, names, axes) of every tensor of a file."""
  for path, place in places(model_config).items():
    for repeat, layer in enumerate(place.layers or (None,)):
      yield path, place, repeat, *scheme(model_config, place.tensor, layer)


def check_experts(path: str, got: Collection[str]) -> None:
  """Raises ValueError if a file holds a mixture of experts."""
  for name in got:
    if re.search(r"\.(experts|router)\.|/mlp2/", name):
      raise ValueError(f"weights {path}: {printable(name)} belongs to experts: {gemma.NO_EXPERTS}")


def check(path: str, got: Mapping[str, Shape], expected: Mapping[str, Shape]) -> None:
  """Raises ValueError for the first tensor that is missing, unknown or of another shape."""
  hint = "; is model.preset right for this file?"
  for name, shape in expected.items():
    if name not in got:
      raise ValueError(f"weights {path}: no leaf {printable(name)}{hint}")
    if got[name] != shape:
      leaf = f"leaf {printable(name)} expected shape {shape}, got {got[name]}"
      raise ValueError(f"weights {path}: {leaf}{hint}")
  unknown = sorted(set(got) - set(expected))
  if unknown:
    raise ValueError(f"weights {path}: unknown leaf {printable(unknown[0])}{hint}")


def check_dtypes(path: str, got: Mapping[str, str]) -> None:
  """Raises ValueError for the first of these tensors that has an unknown type."""
  for name, dtype in got.items():
    if dtype not in ("F32", "BF16", "F16", "float32", "bfloat16", "float16"):
      quantised = "; quantised files are not read" if "8" in dtype or "4" in dtype[:2] else ""
      expected = f"tensor {printable(name)} expected F32, BF16 or F16, got {dtype}{quantised}"
      raise ValueError(f"weights {path}: {expected}")

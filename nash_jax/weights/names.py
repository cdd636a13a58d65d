"""Every tensor of a text model: its name here, in the gemma library and at Hugging Face.

Axes are letters: V vocabulary rows, D embed, F hidden, N heads, K key-value heads, H head size; a
digit is an axis of that size, and "NH" one axis that holds both.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator

from nash_jax.models import gemma


@dataclasses.dataclass(frozen=True)
class Tensor:
  """One tensor of a block, or of the model.

  Attributes:
    name: within its block, here and in the gemma library.
    axes: as held here, without the axis of stacked layers.
    theirs: Hugging Face's names within the block; several make the first axis.
    their_axes: of each of theirs.
  """

  name: str
  axes: str
  theirs: tuple[str, ...]
  their_axes: str


@dataclasses.dataclass(frozen=True)
class Place:
  """Where a tensor of our stacked tree comes from: `layers` is () for the model's own tensors."""

  tensor: Tensor
  layers: tuple[int, ...] = ()
  stacked: bool = False


EMBEDDING = Tensor("embedder/input_embedding", "V D", ("embed_tokens.weight",), "V D")
HEAD = Tensor("head/w", "D", (), "")  # of a reward model; Hugging Face has no such tensor
_NORM = Tensor("final_norm/scale", "D", ("norm.weight",), "D")
_Q, _K, _V = (f"self_attn.{x}_proj.weight" for x in "qkv")
_GROUPED = (
  Tensor("attn/q_einsum/w", "N D H", (_Q,), "NH D"),
  Tensor("attn/kv_einsum/w", "2 K D H", (_K, _V), "KH D"),
)
# The library's layout where every head has keys and values of its own.
_UNGROUPED = (Tensor("attn/qkv_einsum/w", "3 N D H", (_Q, _K, _V), "NH D"),)
_QK_NORMS = (
  Tensor("attn/_query_norm/scale", "H", ("self_attn.q_norm.weight",), "H"),
  Tensor("attn/_key_norm/scale", "H", ("self_attn.k_norm.weight",), "H"),
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


def sizes(model_config: gemma.GemmaConfig) -> dict[str, int]:
  """Returns the length of every axis by its letter."""
  return {
    "V": model_config.num_embed,
    "D": model_config.embed_dim,
    "F": model_config.hidden_dim,
    "N": model_config.num_heads,
    "K": model_config.num_kv_heads,
    "H": model_config.head_dim,
    "2": 2,
    "3": 3,
  }


def shape(axes: str, sizes: dict[str, int]) -> tuple[int, ...]:
  """Returns the shape of axes such as "2 NH D"."""
  return tuple(math.prod(sizes[letter] for letter in axis) for axis in axes.split())


def places(model_config: gemma.GemmaConfig) -> dict[str, Place]:
  """Returns every leaf of the stacked tree by its path, without building a block."""
  grouped = model_config.num_heads != model_config.num_kv_heads
  attention = (_GROUPED if grouped else _UNGROUPED) + _QK_NORMS * model_config.use_qk_norm
  period, repeats, rest = gemma.pattern(model_config)
  scanned = period * repeats
  found = {tensor.name: Place(tensor) for tensor in (EMBEDDING, _NORM)}
  for tensor in attention + _BLOCK:
    for i in range(period):
      layers = tuple(range(i, scanned, period))
      found[f"layers/{i}/{tensor.name}"] = Place(tensor, layers, stacked=True)
    for i in range(rest):
      found[f"tail/{i}/{tensor.name}"] = Place(tensor, (scanned + i,))
  return found


def library(model_config: gemma.GemmaConfig, tensor: Tensor, layer: int | None = None):
  """Returns ((name,), axes) in the gemma library's nested layout, its gating as published."""
  swap = model_config.transpose_gating_einsum and tensor.name == "mlp/gating_einsum"
  prefix = "" if layer is None else f"layer_{layer}/"
  return (prefix + tensor.name,), "2 F D" if swap else tensor.axes


def hugging_face(model_config: gemma.GemmaConfig, tensor: Tensor, layer: int | None = None):
  """Returns (names, the axes of each) at Hugging Face, without the model's prefix."""
  prefix = "" if layer is None else f"layers.{layer}."
  return tuple(prefix + name for name in tensor.theirs), tensor.their_axes


def sources(
  model_config: gemma.GemmaConfig, scheme: Callable
) -> Iterator[tuple[str, Place, int, tuple[str, ...], str]]:
  """Yields (path, place, repeat, names, axes) of every tensor of files; `scheme` as above."""
  for path, place in places(model_config).items():
    for repeat, layer in enumerate(place.layers or (None,)):
      yield path, place, repeat, *scheme(model_config, place.tensor, layer)

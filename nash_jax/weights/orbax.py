"""Reads the gemma library's Orbax checkpoints: nested, flat, or stacked by attention pattern.

gm.ckpts.load_params holds a second copy of the model, takes a quarter of a minute to import, and
applies a layer's sharding to a whole stack. This module reads the parts of one of our tensors at a
time, and each host reads only the parts it needs.
"""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import jax
from etils import epath
from flax import traverse_util
from jax import numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from nash_jax.models import gemma
from nash_jax.weights import names

_STACK = "stacked_layers/attention_type_"
# Tensors of the models of images and sounds, and of their projections into the text model.
_NOT_TEXT = re.compile(r"(SigLiPFromPatches_0|vision_encoder|audio_\w+|embedder/(mm|audio)_)")


def is_checkpoint(path: str) -> bool:
  """Returns whether `path` is an Orbax checkpoint.

  Raises:
    ValueError: an address that cannot be read, such as http://.
  """
  try:
    return (epath.Path(path) / "_METADATA").exists()
  except KeyError as error:  # etils does not know this scheme
    raise ValueError(f"weights {path}: expected a local path, got an address") from error


def reader(path: str, model_config: gemma.GemmaConfig) -> tuple[dict[str, names.Place], names.Read]:
  """Returns ({path: place} of the stacked tree, read), with every name and shape checked."""
  import orbax.checkpoint as ocp

  folder = epath.Path(path).absolute() if "://" not in str(path) else epath.Path(path)
  with _as_value_error(path), ocp.StandardCheckpointer() as checkpointer:
    saved = _flatten(checkpointer.metadata(folder).item_metadata.tree)
  stacks = filter(None, (re.match(rf"{_STACK}(\d+)/", name) for name in saved))
  period = max((int(stack[1]) + 1 for stack in stacks), default=0)
  names.check_experts(path, saved)
  expected = _expected_shapes(model_config, period)
  unread = names.unread(model_config, names.library)
  saved = {name: found for name, found in saved.items() if name not in unread}
  shapes = {name: shape for name, (_, shape, _) in saved.items()}
  names.check(path, shapes, expected)
  names.check_dtypes(path, {name: dtype for name, (*_, dtype) in saved.items()})

  def read(place: names.Place, shape: names.Shape, dtype, sharding: Sharding) -> jax.Array:
    _, axes = names.library(model_config, place.tensor)
    order = tuple(axes.split().index(letter) for letter in place.tensor.axes.split())
    sources = [_saved_as(place.tensor, layer, period) for layer in place.layers or (None,)]
    parts = list(dict.fromkeys(name for name, _ in sources))
    specs = {}
    for keys, saved_shape, _ in (saved[name] for name in parts):
      saved_sharding = _saved_sharding(sharding, place.stacked, order, len(saved_shape))
      specs[keys] = jax.ShapeDtypeStruct(saved_shape, dtype, sharding=saved_sharding)
    with _as_value_error(f"{path}, leaf {parts[0]}"), ocp.PyTreeCheckpointer() as checkpointer:
      item = traverse_util.unflatten_dict(specs)
      restore_args = ocp.checkpoint_utils.construct_restore_args(item)
      args = ocp.args.PyTreeRestore(item=item, restore_args=restore_args, partial_restore=True)
      restored = traverse_util.flatten_dict(checkpointer.restore(folder, args=args))
      arrays = [restored[keys] for keys in specs]
    picks = tuple((parts.index(name), row) for name, row in sources)
    static = ("picks", "order", "stacked")
    combine = jax.jit(_combine, static_argnames=static, out_shardings=sharding)
    return combine(arrays, picks=picks, order=order, stacked=place.stacked)

  return names.places(model_config), read


@contextlib.contextmanager
def _as_value_error(source: str) -> Iterator[None]:
  try:
    yield
  except Exception as error:  # Orbax raises many kinds
    first = f"{type(error).__name__}: {error}".split("\n")[0]
    raise ValueError(f"weights {source}: expected an Orbax checkpoint, got {first!r}") from error


def _flatten(tree) -> dict[str, tuple[tuple[str, ...], names.Shape, str]]:
  """Returns {nested name: (keys in the checkpoint, shape, dtype)} of the text tensors."""
  saved = {}
  for keys, leaf in traverse_util.flatten_dict(tree).items():
    name = "/".join(keys).removeprefix("transformer/")
    if not _NOT_TEXT.match(name):
      saved[re.sub(r"(mlp/\w+)/w$", r"\1", name)] = keys, tuple(leaf.shape), str(leaf.dtype)
  return saved


def _saved_as(tensor: names.Tensor, layer: int | None, period: int) -> tuple[str, int | None]:
  """Returns a tensor's nested name, and its row if it is in a stack."""
  if layer is None:
    return tensor.name, None
  if not period:
    return f"layer_{layer}/{tensor.name}", None
  return f"{_STACK}{layer % period}/{tensor.name}", layer // period


def _expected_shapes(model_config: gemma.GemmaConfig, period: int) -> dict[str, names.Shape]:
  """Returns {nested name: shape} of a checkpoint's tensors."""
  shapes = {}
  for place in names.places(model_config).values():
    _, axes = names.library(model_config, place.tensor)
    for layer in place.layers or (None,):
      name, _ = _saved_as(place.tensor, layer, period)
      stack: names.Shape = ()
      if layer is not None and period:
        stack = (len(range(layer % period, model_config.num_layers, period)),)
      shapes[name] = stack + names.shape(axes, place.sizes)
  return shapes


def _saved_sharding(sharding: Sharding, stacked: bool, order: tuple, rank: int) -> Sharding:
  """Returns the sharding, in saved axes, of a layer, or of a stack without splitting its layers."""
  if not isinstance(sharding, NamedSharding):
    return sharding
  padding = [None] * (len(order) + stacked - len(sharding.spec))
  spec: list[Any] = [None] * len(order)
  for axis, name in zip(order, (*sharding.spec, *padding)[stacked:], strict=True):
    spec[axis] = name
  return NamedSharding(sharding.mesh, PartitionSpec(*[None] * (rank - len(order)), *spec))


def _combine(arrays, picks, order, stacked: bool) -> jax.Array:
  layers = [(arrays[i] if row is None else arrays[i][row]).transpose(order) for i, row in picks]
  return jnp.stack(layers) if stacked else layers[0]

"""The gemma library's Orbax checkpoints: nested, flat, or stacked by attention pattern.

gm.ckpts.load_params holds the whole model beside ours and takes a quarter of a minute to import; of
a stacked checkpoint it gives each layer's sharding to the stack. Here Orbax reads what makes one of
our tensors at a time, each host the parts it needs.
"""

import contextlib
import re
from collections.abc import Callable

import jax
from etils import epath
from flax import traverse_util
from jax import numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from nash_jax.models import gemma
from nash_jax.weights import names, safetensors

_STACK = "stacked_layers/attention_type_"
# The vision model, and what leads from it into the text model.
_NOT_TEXT = re.compile(r"(SigLiPFromPatches_0|vision_encoder|embedder/mm_)")


def is_checkpoint(path: str) -> bool:
  """Whether an Orbax checkpoint lies at `path`."""
  return (epath.Path(path) / "_METADATA").exists()


def reader(path: str, model_config: gemma.GemmaConfig) -> tuple[dict[str, names.Place], Callable]:
  """Returns (places, read) for a checkpoint whose every name and shape has been checked.

  Returns:
    The leaves of the stacked tree, and read(place, shape, dtype, sharding) -> jax.Array.

  Raises:
    ValueError: a damaged checkpoint, or the first leaf missing, unknown or of another shape.
  """
  import orbax.checkpoint as ocp

  where = epath.Path(path).absolute() if "://" not in str(path) else epath.Path(path)
  with _told(path), ocp.StandardCheckpointer() as checkpointer:
    saved = _flatten(checkpointer.metadata(where).item_metadata.tree)
  stacks = [int(name[len(_STACK) :].split("/")[0]) for name in saved if name.startswith(_STACK)]
  period = max(stacks) + 1 if stacks else 0
  places = names.places(model_config)
  _check(path, model_config, saved, period)

  def read(place, shape, dtype, sharding):
    (_,), axes = names.library(model_config, place.tensor)
    order = tuple(axes.split().index(letter) for letter in place.tensor.axes.split())
    sources = [_saved_as(place.tensor, layer, period) for layer in place.layers or (None,)]
    parts = list(dict.fromkeys(name for name, _ in sources))
    wanted = {}
    for keys, there in (saved[name] for name in parts):
      slot = _there(sharding, place.stacked, order, len(there))
      wanted[keys] = jax.ShapeDtypeStruct(there, dtype, sharding=slot)
    with _told(f"{path}, leaf {parts[0]}"):
      arrays = _restore(where, wanted)
    picks = tuple((parts.index(name), row) for name, row in sources)
    combine = jax.jit(
      _combine, static_argnames=("picks", "order", "stacked"), out_shardings=sharding
    )
    return combine(arrays, picks=picks, order=order, stacked=place.stacked)

  return places, read


@contextlib.contextmanager
def _told(what: str):
  try:
    yield
  except Exception as error:  # Orbax raises many kinds
    first = str(error).strip().split("\n")[0]
    raise ValueError(f"weights {what}: expected an Orbax checkpoint, got {first!r}") from error


def _flatten(tree) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
  """Returns (its keys in the checkpoint, shape) of every text tensor by its nested name."""
  found = {}
  for keys, leaf in traverse_util.flatten_dict(tree).items():
    name = "/".join(keys).removeprefix("transformer/")
    if not _NOT_TEXT.match(name):
      found[re.sub(r"(mlp/\w+)/w$", r"\1", name)] = keys, tuple(leaf.shape)
  return found


def _saved_as(tensor, layer: int | None, period: int) -> tuple[str, int | None]:
  """Returns a tensor's nested name, and its place in a stack."""
  if layer is None:
    return tensor.name, None
  if not period:
    return f"layer_{layer}/{tensor.name}", None
  return f"{_STACK}{layer % period}/{tensor.name}", layer // period


def _check(path: str, model_config: gemma.GemmaConfig, saved: dict, period: int) -> None:
  sizes, wanted = names.sizes(model_config), {}
  for place in names.places(model_config).values():
    (_,), axes = names.library(model_config, place.tensor)
    for layer in place.layers or (None,):
      name, pick = _saved_as(place.tensor, layer, period)
      stack = (
        () if pick is None else (1 + (model_config.num_layers - 1 - layer % period) // period,)
      )
      wanted[name] = stack + names.shape(axes, sizes)
  for name, shape in wanted.items():
    if name not in saved:
      raise ValueError(f"weights {path}: no leaf {name}{safetensors.HINT}")
    if saved[name][1] != shape:
      got = f"{saved[name][1]}{safetensors.HINT}"
      raise ValueError(f"weights {path}: leaf {name} expected shape {shape}, got {got}")
  unknown = sorted(set(saved) - set(wanted))
  if unknown:
    raise ValueError(f"weights {path}: unknown leaf {unknown[0]}{safetensors.HINT}")


def _there(sharding, stacked: bool, order: tuple[int, ...], rank: int):
  """Returns the sharding, as saved, of one layer or of a whole stack, whose axis is not split."""
  if not isinstance(sharding, NamedSharding):
    return sharding
  ours = (*sharding.spec, *[None] * (len(order) + stacked - len(sharding.spec)))[stacked:]
  spec = [None] * len(order)
  for axis, name in zip(order, ours, strict=True):
    spec[axis] = name
  return NamedSharding(sharding.mesh, PartitionSpec(*[None] * (rank - len(order)), *spec))


def _restore(where, wanted: dict[tuple[str, ...], jax.ShapeDtypeStruct]) -> list[jax.Array]:
  import orbax.checkpoint as ocp

  item = traverse_util.unflatten_dict(wanted)
  like = ocp.checkpoint_utils.construct_restore_args(item)
  args = ocp.args.PyTreeRestore(item=item, restore_args=like, partial_restore=True)
  with ocp.PyTreeCheckpointer() as checkpointer:
    found = traverse_util.flatten_dict(checkpointer.restore(where, args=args))
  return [found[keys] for keys in wanted]


def _combine(arrays, picks, order, stacked) -> jax.Array:
  layers = [(arrays[i] if row is None else arrays[i][row]).transpose(order) for i, row in picks]
  return jnp.stack(layers) if stacked else layers[0]

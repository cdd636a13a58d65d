"""Safetensors files, ours and Hugging Face's: checked by their headers, read slice by slice."""

import itertools
import json
import math
import pathlib
import re
from collections.abc import Callable, Iterator

import jax
import numpy as np
from flax import traverse_util

from nash_jax.models import gemma
from nash_jax.types import Params
from nash_jax.weights import hugging_face, names

HINT = "; is model.preset right for this file?"
_SPARE_ROWS = 128  # more than this no published Gemma's embedding differs from its pieces
# What a multimodal Gemma 3 has besides its text model.
_NOT_TEXT = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\.")


def open_all(path: str) -> dict[str, Callable]:
  """Returns a lazy slice of every tensor by name, from a file, or a folder with its shards.

  Raises:
    ValueError: a file that is missing, damaged or no safetensors file, or a shard without one of
      the tensors that the index says it has.
  """
  where = pathlib.Path(path)
  if where.name == hugging_face.INDEX:
    where = where.parent
  if where.is_file() or not where.exists():
    return _open(where)
  if not (where / hugging_face.INDEX).exists():
    files = sorted(where.glob("*.safetensors"))
    if len(files) != 1:
      raise ValueError(
        f"weights {path}: expected one .safetensors file or {hugging_face.INDEX}, got"
        f" {len(files)} files"
      )
    return _open(files[0])
  index = _index(where / hugging_face.INDEX)
  missing = sorted(shard for shard in set(index.values()) if not (where / shard).is_file())
  if missing:
    raise ValueError(
      f"weights {path}: shard {missing[0]} is missing ({len(missing)} of {len(set(index.values()))}"
      f" that {hugging_face.INDEX} names): download it"
    )
  shards = {shard: _open(where / shard) for shard in sorted(set(index.values()))}
  for name, shard in index.items():
    if name not in shards[shard]:
      raise ValueError(
        f"weights {where / shard}: no tensor {name}, which {hugging_face.INDEX} says is in it"
      )
  return {name: shards[shard][name] for name, shard in index.items()}


def _index(path: pathlib.Path) -> dict[str, str]:
  try:
    return dict(json.loads(path.read_text())["weight_map"])
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(f"weights {path}: expected JSON with a weight_map, got {error!r}") from error


def _open(path: pathlib.Path) -> dict[str, Callable]:
  from safetensors import SafetensorError, safe_open

  try:
    with open(path, "rb") as file:
      if file.read(40).startswith(b"version https://git-lfs"):
        raise OSError("a Git LFS pointer: run `git lfs pull` in its folder")
    file = safe_open(str(path), "np")
  except (OSError, SafetensorError) as error:
    raise ValueError(f"weights {path}: expected a .safetensors file, got {error}") from error
  slices = {name: file.get_slice(name) for name in file.offset_keys()}
  for name, found in slices.items():
    if found.get_dtype() not in ("F32", "BF16", "F16"):
      raise ValueError(
        f"weights {path}: tensor {name} expected F32, BF16 or F16, got {found.get_dtype()}; "
        "quantised files are not read"
      )
  return slices


def reader(path: str, model_config: gemma.GemmaConfig) -> tuple[dict[str, names.Place], Callable]:
  """Returns (places, read) for a file or folder whose every name and shape has been checked.

  Returns:
    The leaves of the stacked tree, with the head that a reward model's file has; and
    read(place, index, dtype) -> np.ndarray, the slices `index` of one leaf.

  Raises:
    ValueError: what `open_all` raises, or the first tensor missing, unknown or of another shape.
  """
  found = open_all(path)
  places = names.places(model_config)
  if names.EMBEDDING.name in found:
    if names.HEAD.name in found:
      places["head/w"] = names.Place(names.HEAD)
    scheme, prefix = names.library, ""
  else:
    scheme, prefix = names.hugging_face, _prefix(path, found)
    hugging_face.check_config(path, model_config)
  sizes = names.sizes(model_config)

  def source(tensor, layer):
    parts, axes = scheme(model_config, tensor, layer)
    return tuple(prefix + part for part in parts), axes

  wanted = {}
  for place in places.values():
    for layer in place.layers or (None,):
      parts, axes = source(place.tensor, layer)
      wanted.update({part: (place.tensor, names.shape(axes, sizes)) for part in parts})
  _check(path, found, wanted, prefix)

  def read(place, index, dtype):
    def one(layer, index):
      parts, axes = source(place.tensor, layer)
      return _read(found, parts, axes, place.tensor.axes, sizes, index)

    if not place.stacked:
      layer = place.layers[0] if place.layers else None
      return np.asarray(one(layer, index), dtype, order="C")
    layers = place.layers[index[0]]
    out = np.empty((len(layers), *(s.stop - s.start for s in index[1:])), dtype)
    for i, layer in enumerate(layers):
      out[i] = one(layer, index[1:])
    return out

  return places, read


def _prefix(path, found) -> str:
  ends = [name for name in found if name.endswith("embed_tokens.weight")]
  if len(ends) != 1:
    raise ValueError(
      f"weights {path}: expected the tensors of a Gemma text model, got {len(found)} others"
      f" ({next(iter(sorted(found)), 'none')}, ...)"
    )
  return ends[0].removesuffix("embed_tokens.weight")


def _check(path, found, wanted, prefix) -> None:
  """Raises ValueError for the first tensor that is missing, of another shape, or unknown."""
  for name, (tensor, shape) in wanted.items():
    if name not in found:
      raise ValueError(f"weights {path}: no leaf {name}{HINT}")
    got = tuple(found[name].get_shape())
    spare = tensor is names.EMBEDDING and name != tensor.name and len(got) == 2
    if spare and abs(got[0] - shape[0]) <= _SPARE_ROWS:
      got = (shape[0], got[1])
    if got != shape:
      raise ValueError(f"weights {path}: leaf {name} expected shape {shape}, got {got}{HINT}")
  # Gemma's output layer is its embedding; some files write it twice.
  tied = {prefix.removesuffix("model.") + "lm_head.weight", "lm_head.weight"}
  for name in sorted(set(found) - set(wanted) - tied):
    if not _NOT_TEXT.match(name):
      raise ValueError(f"weights {path}: unknown leaf {name}{HINT}")


def _slice(found, cut) -> np.ndarray:
  """Returns one slice an axis; rows beyond the tensor's are 0: they stand for no piece."""
  rows = found.get_shape()[0]
  start, stop = (min(at, rows) for at in (cut[0].start, cut[0].stop))
  x = found[(slice(start, stop), *cut[1:])]
  missing = cut[0].stop - cut[0].start - len(x)
  return np.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1)) if missing else x


def _read(found, parts, file_axes, axes, sizes, index) -> np.ndarray:
  """Returns slices of one tensor, from files that cut it up, merge its axes or order them else."""
  where = dict(zip(axes.split(), index, strict=True))
  first = axes.split()[0]
  several = first.isdigit() and first not in file_axes.split()
  if several:
    parts = parts[where[first]]
  letters = list(itertools.chain(*file_axes.split()))
  cut, view, inner = [], [], []
  for axis in file_axes.split():
    rest = [sizes[letter] for letter in axis[1:]]
    each, s = math.prod(rest), where[axis[0]]
    cut.append(slice(s.start * each, s.stop * each))
    view += [s.stop - s.start, *rest]
    inner += [slice(None), *(where[letter] for letter in axis[1:])]
  order = [letters.index(letter) for letter in axes.split()[several:]]

  def one(part):
    x = _slice(found[part], cut)
    return x.reshape(view)[tuple(inner)].transpose(order)

  return np.stack([one(part) for part in parts]) if several else one(parts[0])


def tensors(
  params: Params, model_config: gemma.GemmaConfig, scheme: Callable, dtype, rows: int
) -> Iterator[tuple[str, np.ndarray]]:
  """Yields (name, array on the host) of every tensor of a file, one layer's at a time.

  All processes make the same calls, for the parameters may lie on all of them.

  Args:
    scheme: names.library or names.hugging_face.
    rows: of the embedding that are kept.
  """
  leaves = traverse_util.flatten_dict(params, sep="/")
  sizes = {**names.sizes(model_config), "V": rows}
  for path, place, repeat, parts, axes in names.sources(model_config, scheme):
    x = leaves[path][repeat] if place.stacked else leaves[path]
    x = _host((x[:rows] if place.tensor is names.EMBEDDING else x).astype(dtype))
    several = len(parts) > 1
    letters = place.tensor.axes.split()[several:]
    order = [letters.index(letter) for axis in axes.split() for letter in axis]
    for part, y in zip(parts, x if several else [x], strict=True):
      yield part, np.ascontiguousarray(y.transpose(order).reshape(names.shape(axes, sizes)))


def _host(x) -> np.ndarray:
  if isinstance(x, jax.Array) and not x.is_fully_addressable:
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(x, tiled=True)
  return np.asarray(x)

"""Safetensors files, ours and Hugging Face's: checked by their headers, read slice by slice."""

import functools
import itertools
import json
import math
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jax.sharding import Sharding
from jax.typing import DTypeLike

from nash_jax.models import gemma
from nash_jax.types import Params
from nash_jax.weights import hf_config, names

_SPARE_ROWS = 128  # most by which a published Gemma's embedding differs from its tokenizer
# What a multimodal Gemma 3 has besides its text model.
_NOT_TEXT = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\.")


def open_all(path: str) -> dict[str, Any]:
  """Returns a lazy slice of every tensor by name, from a file, or a folder with its shards.

  Raises:
    ValueError: a file that is missing, damaged or no safetensors file, or a shard without one of
      the tensors that the index says it has.
  """
  folder, index_name = pathlib.Path(path), hf_config.INDEX
  if folder.name == index_name:
    folder = folder.parent
  if folder.is_file() or not folder.exists():
    return _open(folder)
  if not (folder / index_name).exists():
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
      expected = f"expected one .safetensors file or {index_name}"
      raise ValueError(f"weights {path}: {expected}, got {len(files)} files")
    return _open(files[0])
  index = _index(folder / index_name)
  shards = sorted(set(index.values()))
  missing = [shard for shard in shards if not (folder / shard).is_file()]
  if missing:
    count = f"{len(missing)} of {len(shards)} that {index_name} names"
    raise ValueError(f"weights {path}: shard {missing[0]} is missing ({count}): download it")
  tensors = {shard: _open(folder / shard) for shard in shards}
  for name, shard in index.items():
    if name not in tensors[shard]:
      listed = f"which {index_name} says is in it"
      raise ValueError(f"weights {folder / shard}: no tensor {name}, {listed}")
  return {name: tensors[shard][name] for name, shard in index.items()}


def _index(path: pathlib.Path) -> dict[str, str]:
  try:
    return dict(json.loads(path.read_text())["weight_map"])
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(f"weights {path}: expected JSON with a weight_map, got {error!r}") from error


def _open(path: pathlib.Path) -> dict[str, Any]:
  from safetensors import SafetensorError, safe_open

  try:
    with open(path, "rb") as file:
      if file.read(40).startswith(b"version https://git-lfs"):
        raise OSError("a Git LFS pointer: run `git lfs pull` in its folder")
    tensors = safe_open(str(path), "np")
  except (OSError, SafetensorError) as error:
    raise ValueError(f"weights {path}: expected a .safetensors file, got {error}") from error
  slices = {name: tensors.get_slice(name) for name in tensors.offset_keys()}
  for name, tensor in slices.items():
    if tensor.get_dtype() not in ("F32", "BF16", "F16"):
      got = f"{tensor.get_dtype()}; quantised files are not read"
      raise ValueError(f"weights {path}: tensor {name} expected F32, BF16 or F16, got {got}")
  return slices


def reader(path: str, model_config: gemma.GemmaConfig) -> tuple[dict[str, names.Place], names.Read]:
  """Returns (leaves of the stacked tree, read); every name and shape has been checked.

  Among the leaves is the head that a reward model's file has.
  """
  slices = open_all(path)
  places, sizes = names.places(model_config), names.sizes(model_config)
  scheme: names.Scheme = names.library
  prefix = ""
  if names.EMBEDDING.name not in slices:
    scheme, prefix = names.hugging_face, _prefix(path, slices)
    hf_config.check_config(path, model_config)
  expected = {
    prefix + part: names.shape(axes, sizes)
    for *_, parts, axes in names.sources(model_config, scheme)
    for part in parts
  }
  if scheme is names.library and names.HEAD.name in slices:
    places[names.HEAD.name] = names.Place(names.HEAD)
    expected[names.HEAD.name] = names.shape(names.HEAD.axes, sizes)
  _check(path, slices, expected, prefix)

  def read(place: names.Place, shape: names.Shape, dtype, sharding: Sharding) -> jax.Array:
    def read_layer(layer, index):
      parts, axes = scheme(model_config, place.tensor, layer)
      files = [slices[prefix + part] for part in parts]
      return _read(files, axes, place.tensor.axes, sizes, index)

    @functools.cache  # each distinct part is read once on each host that has it
    def read_part(index):
      if not place.stacked:
        layer = place.layers[0] if place.layers else None
        return np.asarray(read_layer(layer, index), dtype, order="C")
      layers = place.layers[index[0]]
      out = np.empty((len(layers), *(s.stop - s.start for s in index[1:])), dtype)
      for i, layer in enumerate(layers):
        out[i] = read_layer(layer, index[1:])
      return out

    def callback(index):
      ranges = (s.indices(size)[:2] for s, size in zip(index, shape, strict=True))
      return read_part(tuple(slice(start, stop) for start, stop in ranges))

    return jax.make_array_from_callback(shape, sharding, callback, dtype=dtype)

  return places, read


def _prefix(path: str, slices: dict[str, Any]) -> str:
  """Returns what precedes Hugging Face's names of the text model."""
  embeddings = [name for name in slices if name.endswith("embed_tokens.weight")]
  if len(embeddings) != 1:
    got = f"{len(slices)} others ({min(slices, default='none')}, ...)"
    raise ValueError(f"weights {path}: expected the tensors of a Gemma text model, got {got}")
  return embeddings[0].removesuffix("embed_tokens.weight")


def _check(
  path: str, slices: dict[str, Any], expected: dict[str, names.Shape], prefix: str
) -> None:
  """Runs names.check without the vision model; the embedding may have a few other rows."""
  # Gemma's output layer is its embedding; some files write it twice.
  tied = {prefix.removesuffix("model.") + "lm_head.weight", "lm_head.weight"}
  got = {
    name: tuple(tensor.get_shape())
    for name, tensor in slices.items()
    if name in expected or not (name in tied or _NOT_TEXT.match(name))
  }
  embedding = prefix + "embed_tokens.weight"
  if embedding in expected and len(got[embedding]) == 2:
    (rows, width), expected_rows = got[embedding], expected[embedding][0]
    spare = abs(rows - expected_rows) <= _SPARE_ROWS
    got[embedding] = (expected_rows if spare else rows, width)
  names.check(path, got, expected)


def _slice(tensor, index) -> np.ndarray:
  """Returns one slice an axis; rows beyond the tensor's are 0: they stand for no piece."""
  rows = tensor.get_shape()[0]
  start, stop = min(index[0].start, rows), min(index[0].stop, rows)
  x = tensor[(slice(start, stop), *index[1:])]
  missing = index[0].stop - index[0].start - len(x)
  return np.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1)) if missing else x


def _read(files: list, file_axes: str, axes: str, sizes: dict[str, int], index) -> np.ndarray:
  """Returns slices of one tensor that files may store split, with merged axes or transposed."""
  ranges = dict(zip(axes.split(), index, strict=True))
  first = axes.split()[0]
  split = first.isdigit() and first not in file_axes.split()
  if split:
    files = files[ranges[first]]
  letters = list(itertools.chain(*file_axes.split()))
  file_index, unmerged, inner = [], [], []
  for axis in file_axes.split():
    rest = [sizes[letter] for letter in axis[1:]]
    each, outer = math.prod(rest), ranges[axis[0]]
    file_index.append(slice(outer.start * each, outer.stop * each))
    unmerged += [outer.stop - outer.start, *rest]
    inner += [slice(None), *(ranges[letter] for letter in axis[1:])]
  order = [letters.index(letter) for letter in axes.split()[split:]]
  parts = [
    _slice(file, file_index).reshape(unmerged)[tuple(inner)].transpose(order) for file in files
  ]
  return np.stack(parts) if split else parts[0]


def tensors(
  params: Params, model_config: gemma.GemmaConfig, scheme: names.Scheme, dtype: DTypeLike, rows: int
) -> Iterator[tuple[str, np.ndarray]]:
  """Yields (name, array on the host) of every tensor of a file, one layer's at a time.

  All processes make the same calls, because the parameters may lie on all of them.

  Args:
    rows: of the embedding that are kept.
  """
  leaves = traverse_util.flatten_dict(params, sep="/")
  sizes = {**names.sizes(model_config), "V": rows}
  for path, place, repeat, parts, axes in names.sources(model_config, scheme):
    x = leaves[path][repeat] if place.stacked else leaves[path]
    x = _host((x[:rows] if place.tensor is names.EMBEDDING else x).astype(dtype))
    split = len(parts) > 1
    letters = place.tensor.axes.split()[split:]
    order = [letters.index(letter) for axis in axes.split() for letter in axis]
    for part, tensor in zip(parts, x if split else [x], strict=True):
      yield part, np.ascontiguousarray(tensor.transpose(order).reshape(names.shape(axes, sizes)))


def _host(x) -> np.ndarray:
  if isinstance(x, jax.Array) and not x.is_fully_addressable:
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(x, tiled=True)
  return np.asarray(x)

"""Reads and writes safetensors files, ours and Hugging Face's, slice by slice."""

import functools
import itertools
import math
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jax.sharding import Sharding
from jax.typing import DTypeLike

from nash_jax.models import gemma
from nash_jax.types import Params
from nash_jax.validation import printable
from nash_jax.weights import files, hf_config, names

_ROWS_READ = 4096  # rows at a time when an output layer is compared with the embedding
_SPARE_ROWS = 128  # most embedding rows of a published Gemma beyond its tokenizer's pieces
# Tensors of a multimodal Gemma 3 or 4 outside its text model.
_NOT_TEXT = re.compile(
  r"(model\.)?(vision_tower|multi_modal_projector|vision_embedder|audio_tower|embed_(vision|audio))\."
)


def open_all(path: str) -> dict[str, Any]:
  """Returns {name: lazy slice} of the tensors in a file, or in the shards of a folder.

  Raises:
    ValueError: a file is missing, damaged or no safetensors file; the index names a file outside
      its folder, or does not match the shards.
  """
  folder, index_name = pathlib.Path(path), hf_config.INDEX
  if folder.name == index_name:
    return _open_shards(folder)
  if folder.is_file() or not folder.exists():
    return _open(folder)
  found = sorted(file.name for file in folder.glob("*.safetensors"))
  if (folder / index_name).exists():
    return _open_shards(folder / index_name)
  if len(found) != 1:
    expected = f"expected one .safetensors file or {index_name}"
    raise ValueError(f"weights {path}: {expected}, got {len(found)} files")
  return _open(folder / found[0])


def _open_shards(index_path: pathlib.Path) -> dict[str, Any]:
  folder, index = index_path.parent, _index(index_path)
  shards = sorted(set(index.values()))
  missing = [shard for shard in shards if not (folder / shard).is_file()]
  if missing:
    count = f"{len(missing)} of {len(shards)} that {index_path.name} names"
    shard = f"shard {printable(missing[0])} is missing ({count})"
    raise ValueError(f"weights {folder}: {shard}: download it")
  if "model.safetensors" not in shards and (folder / "model.safetensors").exists():
    got = f"got both model.safetensors and {index_path.name}, which does not name it"
    raise ValueError(f"weights {folder}: expected one model, {got}: move one of them away")
  tensors = {shard: _open(folder / shard) for shard in shards}
  for name, shard in index.items():
    if name not in tensors[shard]:
      listed = f"which {index_path.name} says is in it"
      raise ValueError(f"weights {folder / shard}: no tensor {printable(name)}, {listed}")
  for shard, found in tensors.items():
    for name in found:
      if index.get(name) != shard:
        listed = f"which {index_path.name} says is in {index.get(name, 'no file')}"
        raise ValueError(f"weights {folder / shard}: tensor {printable(name)}, {listed}")
  return {name: tensors[shard][name] for name, shard in index.items()}


def _index(path: pathlib.Path) -> dict[str, str]:
  """Returns {tensor: shard} of an index; a shard is a file in the same folder."""
  expected = "JSON with a weight_map"
  index = files.read_json(path, expected).get("weight_map")
  if not isinstance(index, dict):
    raise ValueError(f"weights {path}: expected {expected}, got {index!r:.80} there")
  for name, shard in index.items():
    if not isinstance(shard, str) or pathlib.PurePath(shard).name != shard or shard == "..":
      expected = f"the name of a file of this folder for {printable(name)}"
      raise ValueError(f"weights {path}: expected {expected}, got {shard!r:.80}")
  return index


def _open(path: pathlib.Path) -> dict[str, Any]:
  from safetensors import SafetensorError, safe_open

  try:
    tensors = safe_open(str(path), "np")
  except (OSError, ValueError, SafetensorError) as error:
    got = files.explain(path, error)
    raise ValueError(f"weights {path}: expected a .safetensors file, got {got}") from error
  return {name: tensors.get_slice(name) for name in tensors.offset_keys()}


def reader(path: str, model_config: gemma.GemmaConfig) -> tuple[dict[str, names.Place], names.Read]:
  """Returns ({path: place} of the stacked tree, read), with every name and shape checked.

  The leaves include the head of a judge's file.
  """
  slices = _without_vision(open_all(path))
  places = names.places(model_config)
  scheme: names.Scheme = names.library
  prefix = ""
  if names.EMBEDDING.name not in slices:
    scheme, prefix = names.hugging_face, _prefix(path, slices)
    _tie(path, slices, prefix)
    hf_config.check_config(path, model_config)
  names.check_experts(path, slices)
  unread = {prefix + name for name in names.unread(model_config, scheme)}
  slices = {name: tensor for name, tensor in slices.items() if name not in unread}
  expected = {
    prefix + part: names.shape(axes, place.sizes)
    for _, place, _, parts, axes in names.sources(model_config, scheme)
    for part in parts
  }
  if scheme is names.library:
    got = {name: tuple(tensor.get_shape()) for name, tensor in slices.items()}
    heads = names.heads(got, model_config)
    places |= heads
    expected |= {name: place.shape for name, place in heads.items()}
  _check(path, slices, expected, prefix, model_config)

  def read(place: names.Place, shape: names.Shape, dtype, sharding: Sharding) -> jax.Array:
    def read_layer(layer, index):
      parts, axes = scheme(model_config, place.tensor, layer)
      found = [slices[prefix + part] for part in parts]
      return _read(found, axes, place.tensor.axes, place.sizes, index)

    @functools.cache  # a host reads each distinct part once
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
      with np.errstate(over="ignore", invalid="ignore"):  # weights.check_finite reports it
        return read_part(tuple(slice(start, stop) for start, stop in ranges))

    return jax.make_array_from_callback(shape, sharding, callback, dtype=dtype)

  return places, read


def _without_vision(slices: dict[str, Any]) -> dict[str, Any]:
  return {name: tensor for name, tensor in slices.items() if not _NOT_TEXT.match(name)}


def _prefix(path: str, slices: dict[str, Any]) -> str:
  """Returns the prefix of Hugging Face's names of the text model."""
  if any("lora" in name for name in slices):
    fix = "merge them into their base, and give the merged model"
    raise ValueError(f"weights {path}: expected a whole model, got adapters (LoRA): {fix}")
  for known in ("embed_tokens.weight", "layers.0.input_layernorm.weight"):
    found = [name for name in slices if name.endswith(known)]
    if len(found) == 1:
      return found[0].removesuffix(known)
  first = printable(min(slices, default="none"))
  got = f"{len(slices)} others ({first}, ...)"
  raise ValueError(f"weights {path}: expected the tensors of a Gemma text model, got {got}")


def _tie(path: str, slices: dict[str, Any], prefix: str) -> None:
  """Removes the output layer from `slices`, checking that it equals the embedding as in Gemma."""
  embedding = prefix + "embed_tokens.weight"
  for name in {prefix.removesuffix("model.") + "lm_head.weight", "lm_head.weight"} & slices.keys():
    head = slices.pop(name)
    tied = slices.setdefault(embedding, head)
    names.check_dtypes(path, {name: head.get_dtype(), embedding: tied.get_dtype()})
    if not _equal(head, tied):
      differs = f"{printable(name)} differs from {printable(embedding)}"
      fix = "Gemma's output layer is its embedding, so this is another architecture"
      raise ValueError(f"weights {path}: {differs}: {fix}")


def _equal(a, b) -> bool:
  """Returns whether two tensors of a file have equal shapes and numbers; types may differ."""
  if a is b or list(a.get_shape()) != list(b.get_shape()):
    return a is b
  stops = [*range(_ROWS_READ, a.get_shape()[0], _ROWS_READ), a.get_shape()[0]]
  parts = (
    [np.asarray(x[start:stop], np.float32) for x in (a, b)]
    for start, stop in zip([0, *stops], stops, strict=False)
  )
  return all(np.array_equal(x, y, equal_nan=True) for x, y in parts)


def _check(
  path: str,
  slices: dict[str, Any],
  expected: dict[str, names.Shape],
  prefix: str,
  model_config: gemma.GemmaConfig,
) -> None:
  """Runs names.check, but lets embeddings lack rows without a piece, or have a few more."""
  got = {name: tuple(tensor.get_shape()) for name, tensor in slices.items()}
  for name in (prefix + table.hf_names[0] for table in names.TABLES):
    if name in expected and len(got.get(name, ())) == 2:
      (rows, width), expected_rows = got[name], expected[name][0]
      spare = hf_config.rows(model_config) <= rows <= expected_rows + _SPARE_ROWS
      got[name] = (expected_rows if spare else rows, width)
  names.check(path, got, expected)
  names.check_dtypes(path, {name: tensor.get_dtype() for name, tensor in slices.items()})


def _slice(tensor, index) -> np.ndarray:
  """Returns a part of a tensor, given a slice per axis; rows beyond its end, of no piece, are 0."""
  rows = tensor.get_shape()[0]
  start, stop = min(index[0].start, rows), min(index[0].stop, rows)
  x = tensor[(slice(start, stop), *index[1:])]
  missing = index[0].stop - index[0].start - len(x)
  return np.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1)) if missing else x


def _read(found: list, file_axes: str, axes: str, sizes: Mapping[str, int], index) -> np.ndarray:
  """Returns a part of one of our tensors, which files may store split, merged or transposed."""
  ranges = dict(zip(axes.split(), index, strict=True))
  first = axes.split()[0]
  split = first.isdigit() and first not in file_axes.split()
  if split:
    found = found[ranges[first]]
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
    _slice(file, file_index).reshape(unmerged)[tuple(inner)].transpose(order) for file in found
  ]
  return np.stack(parts) if split else parts[0]


def tensors(
  params: Params, model_config: gemma.GemmaConfig, scheme: names.Scheme, dtype: DTypeLike, rows: int
) -> Iterator[tuple[str, np.ndarray]]:
  """Yields (name, array on the host) of every tensor of a file, one layer at a time.

  All processes must make the same calls, because the parameters may be spread over them.

  Args:
    rows: number of embedding rows to keep.
  """
  leaves = traverse_util.flatten_dict(params, sep="/")
  for path, place, repeat, parts, axes in names.sources(model_config, scheme):
    x = leaves[path][repeat] if place.stacked else leaves[path]
    x = _host((x[:rows] if place.tensor in names.TABLES else x).astype(dtype))
    shape = names.shape(axes, {**place.sizes, "V": rows})
    split = len(parts) > 1
    letters = place.tensor.axes.split()[split:]
    order = [letters.index(letter) for axis in axes.split() for letter in axis]
    for part, tensor in zip(parts, x if split else [x], strict=True):
      yield part, np.ascontiguousarray(tensor.transpose(order).reshape(shape))


def _host(x) -> np.ndarray:
  if isinstance(x, jax.Array) and not x.is_fully_addressable:
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(x, tiled=True)
  return np.asarray(x)


def write(path: pathlib.Path, leaves: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
  """Writes one file with default permissions; safetensors itself lets only the owner read it."""
  from safetensors import SafetensorError
  from safetensors.numpy import save_file

  path.touch()
  mode = path.stat().st_mode
  try:
    save_file(leaves, str(path), metadata=metadata)
  except SafetensorError as error:  # also raised when the disk is full
    raise OSError(f"weights {path}: could not be written: {error}") from error
  path.chmod(mode)

"""Reads and writes parameters, directly into their shardings and one tensor at a time.

Reads our own .safetensors files (with the gemma library's names), Hugging Face's text models of
Gemma 2, 3 and 4, and the library's Orbax checkpoints. Writes our own files and Hugging Face's.
"""

import contextlib
import functools
import itertools
import json
import math
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jax import numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jax.typing import DTypeLike

from nash_jax.data.tokenizer import Tokenizer
from nash_jax.models import gemma
from nash_jax.types import Params
from nash_jax.weights import files, hf_config, names, orbax, safetensors


def kind(path: str) -> str:
  """Returns the format of the weights at a path: "safetensors", "orbax", or "" for neither."""
  folder = pathlib.Path(path)
  if (folder / "checkpoints").is_dir():  # a run's workdir, even if it contains an export
    return ""
  if orbax.is_checkpoint(path):
    return "orbax"
  named = folder.is_file() or (folder / hf_config.INDEX).exists()
  return "safetensors" if named or any(folder.glob("*.safetensors")) else ""


def load(
  path: str, model_config: gemma.GemmaConfig, dtype: DTypeLike = jnp.float32, shardings: Any = None
) -> Params:
  """Returns the stacked tree; every name and shape is checked before a tensor is read.

  The number of embedding rows may differ from a Hugging Face file's where rows have no piece of the
  published tokenizer: rows that the file lacks become 0, and rows that only it has are dropped.

  Args:
    path: a .safetensors file, a Hugging Face folder, or an Orbax checkpoint of the gemma library.
    dtype: the dtype of the result, whatever the file's.
    shardings: a tree like gemma.shapes(model_config), or one sharding for all leaves; by default
      the first device.

  Raises:
    ValueError: no such weights, a damaged file, a missing shard, an output layer other than the
      embedding; or names the first leaf that is missing, unknown, of another shape or not finite.
  """
  places, read = reader(path, model_config)
  by_name, leaves = _shardings(shardings, places), {}
  for name, place in places.items():
    leaves[name] = read(place, place.shape, jnp.dtype(dtype), by_name[name])
  params = traverse_util.unflatten_dict(leaves, sep="/")
  check_finite(f"weights {path}", params, dtype)
  return params


def reader(path: str, model_config: gemma.GemmaConfig) -> tuple[dict[str, names.Place], names.Read]:
  """Returns ({path: place} of the tree, read); names and shapes are checked, no tensor is read."""
  file_format = kind(path)
  if not file_format and pathlib.Path(path).is_dir():
    expected = "expected .safetensors files or one of Gemma's Orbax checkpoints in this folder"
    found = files.others(pathlib.Path(path))
    raise ValueError(f"weights {path}: {expected}, got neither{found}")
  return (orbax.reader if file_format == "orbax" else safetensors.reader)(path, model_config)


def check_finite(source: str, params: Params, dtype: DTypeLike) -> None:
  """Raises ValueError for the first leaf that has NaN or infinity, or would have in `dtype`."""
  finite = jax.device_get(_finite(traverse_util.flatten_dict(params, sep="/"), jnp.dtype(dtype)))
  for name, layers in finite.items():
    if not np.all(layers):
      place = f" (place {int(np.argmin(layers))} of its stack)" if np.ndim(layers) else ""
      got = f"NaN or infinity in leaf {name}{place}"
      fix = "it is damaged, comes from a run that diverged, or needs a wider type, such as bfloat16"
      raise ValueError(f"{source}: expected finite numbers in {jnp.dtype(dtype)}, got {got}: {fix}")


@functools.partial(jax.jit, static_argnums=1)
def _finite(leaves: dict[str, jax.Array], dtype) -> dict[str, jax.Array]:
  """Returns whether each leaf is finite; for a stacked leaf, whether each layer is."""
  return {
    name: jnp.isfinite(x.astype(dtype)).all(tuple(range(name.startswith("layers/"), x.ndim)))
    for name, x in leaves.items()
  }


def _shardings(shardings: Any, places: dict[str, names.Place]) -> dict[str, Sharding]:
  """Returns the sharding of each leaf; heads, which gemma.shapes lacks, are replicated."""
  if shardings is None:
    shardings = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  if isinstance(shardings, Sharding):
    return dict.fromkeys(places, shardings)
  by_name = traverse_util.flatten_dict(shardings, sep="/")
  replicated = NamedSharding(by_name[names.EMBEDDING.name].mesh, PartitionSpec())
  return {head.name: replicated for head in names.HEADS} | by_name


def save(
  path: str, params: Params, model_config: gemma.GemmaConfig, dtype: DTypeLike, card: dict
) -> None:
  """Writes a `.safetensors` file with the library's names in `dtype`, and `card` as its metadata.

  The file includes a judge's head, `params["head"]`. It replaces an existing file atomically. Every
  process must call this; process 0 writes.

  Raises:
    ValueError: parameters of another architecture, or not finite in `dtype`.
  """
  target = pathlib.Path(path)
  if target.is_dir():
    raise ValueError(f"weights {path}: expected the name of a file, got a folder")
  _check_params(path, params, model_config, dtype)
  rows = model_config.num_embed
  leaves = dict(safetensors.tensors(params, model_config, names.library, dtype, rows))
  for name, head in params.get("head", {}).items():
    leaves[f"head/{name}"] = np.asarray(jnp.asarray(head, dtype))
  if jax.process_index() == 0:
    target.parent.mkdir(parents=True, exist_ok=True)
    with _whole(target) as part:
      safetensors.write(part, leaves, {"card": json.dumps(card)})


def export(
  path: str,
  params: Params,
  model_config: gemma.GemmaConfig,
  dtype: DTypeLike = "bfloat16",
  shard_bytes: int = 4 << 30,
  tokenizer: Tokenizer | None = None,
) -> None:
  """Writes a folder that transformers reads: configs, and .safetensors files with an index.

  Every process must call this; process 0 writes, and holds the tensors of one file at a time. The
  folder appears, or gets its weights, only when everything is written.

  Args:
    dtype: the dtype of the files; bfloat16 rounds away much of a short run (docs/weights.md).
    shard_bytes: the most tensor bytes in a file, unless a single tensor is larger.
    tokenizer: gives the special ids and the embedding rows to keep, and is written to the folder
      with its template; tokenizer files that exist there stay. By default the published Gemma's ids
      and rows, without files.

  Raises:
    ValueError: the folder has weights already; the model has a head, is no Gemma 2, 3 or 4, does
      not fit its architecture, or is not finite.
  """
  folder = pathlib.Path(path)
  if folder.is_file() or any(folder.glob("*.safetensors*")):
    raise ValueError(f"export {path}: expected a folder without weights; move them away")
  if "head" in params:
    raise ValueError(
      f"export {path}: Hugging Face has no place for a reward model's head: use save"
    )
  rows, dtype = hf_config.rows(model_config, tokenizer), jnp.dtype(dtype)
  configs = hf_config.export_json(model_config, dtype.name, tokenizer)
  for name in configs:
    if (folder / name).exists():
      raise ValueError(f"export {path}: expected a folder without {name}; move it away")
  pieces = hf_config.tokenizer_files(tokenizer) if tokenizer else {}
  if (folder / "tokenizer_config.json").exists():  # with a template of its own, or without one
    pieces.pop(hf_config.CHAT_TEMPLATE, None)
  _check_params(path, params, model_config, dtype)
  stream = safetensors.tensors(params, model_config, names.hugging_face, dtype, rows)
  counts = _counts(model_config, rows, dtype.itemsize, shard_bytes)
  first = jax.process_index() == 0
  with _whole(folder) if first else contextlib.nullcontext(folder) as part:
    if first:
      part.mkdir(parents=True)
    total_size, weight_map = 0, {}
    for i, count in enumerate(counts):
      file = f"model-{i + 1:05d}-of-{len(counts):05d}.safetensors"
      file = file if len(counts) > 1 else "model.safetensors"
      leaves = {f"model.{name}": x for name, x in itertools.islice(stream, count)}
      if first:
        safetensors.write(part / file, leaves, {"format": "pt"})
      total_size += sum(x.nbytes for x in leaves.values())
      weight_map.update(dict.fromkeys(leaves, file))
    if len(counts) > 1:
      index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
      configs[hf_config.INDEX] = index
    for name, content in configs.items() if first else ():
      (part / name).write_text(json.dumps(content, indent=2) + "\n")
    for name, data in pieces.items() if first else ():
      if not (folder / name).exists():
        (part / name).write_bytes(data)


def _counts(model_config, rows: int, itemsize: int, limit: int) -> list[int]:
  """Returns the number of tensors in each file of an export."""
  counts, used = [0], 0
  for _, place, _, parts, axes in names.sources(model_config, names.hugging_face):
    for _ in parts:
      size = math.prod(names.shape(axes, {**place.sizes, "V": rows})) * itemsize
      if counts[-1] and used + size > limit:
        counts, used = [*counts, 0], 0
      counts[-1], used = counts[-1] + 1, used + size
  return counts


def _check_params(path: str, params: Params, model_config: gemma.GemmaConfig, dtype) -> None:
  """Raises ValueError unless these are parameters of a plain model, finite in `dtype`."""
  shapes = {name: x.shape for name, x in traverse_util.flatten_dict(params, sep="/").items()}
  places = names.places(model_config) | names.heads(shapes, model_config)
  expected = {name: place.shape for name, place in places.items()}
  names.check(f"for {path}", shapes, expected)
  check_finite(f"weights for {path}", params, dtype)


@contextlib.contextmanager
def _whole(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields a temporary path for a file or folder, which is renamed to `path` when complete.

  If `path` is a folder with files, the new files move into it, the weights last. Incomplete files
  are deleted.
  """
  path = pathlib.Path(os.path.realpath(path))
  part = path.with_name(f"{path.name}.{os.getpid()}.part")
  try:
    yield part
    if part.is_dir() and path.is_dir() and any(path.iterdir()):
      for file in sorted(part.iterdir(), key=_order):
        file.replace(path / file.name)
    else:
      part.replace(path)
  finally:
    if part.is_dir():
      shutil.rmtree(part)
    part.unlink(missing_ok=True)


def _order(file: pathlib.Path) -> tuple[bool, str]:
  """Sort key: the file that makes a folder's weights readable comes last."""
  return file.name in ("model.safetensors", hf_config.INDEX), file.name

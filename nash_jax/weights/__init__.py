"""Parameters in and out of files, straight into shardings and one tensor at a time.

Read: our own .safetensors files (the gemma library's names), Hugging Face's Gemma 2 and Gemma 3
text models, and the library's Orbax checkpoints. Written: our own, and Hugging Face's.
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
  if (folder / "checkpoints").is_dir():  # a run's workdir, even if the run also exported there
    return ""
  if orbax.is_checkpoint(path):
    return "orbax"
  named = folder.is_file() or (folder / hf_config.INDEX).exists()
  return "safetensors" if named or any(folder.glob("*.safetensors")) else ""


def load(
  path: str, model_config: gemma.GemmaConfig, dtype: DTypeLike = jnp.float32, shardings: Any = None
) -> Params:
  """Returns the stacked tree; every name and shape is checked before a tensor is read.

  Rows of the embedding that no piece of the published tokenizer has and a Hugging Face file lacks
  are 0; rows that only the file has are left out.

  Args:
    path: a .safetensors file, a folder of Hugging Face's, or an Orbax checkpoint of the library's.
    dtype: of the parameters, whatever the file has.
    shardings: a tree like gemma.shapes(model_config), or one for all; default the first device.

  Raises:
    ValueError: no such weights, a damaged file, a missing shard, an output layer other than the
      embedding, or the first leaf that is missing, unknown, of another shape or not finite.
  """
  file_format = kind(path)
  if not file_format and pathlib.Path(path).is_dir():
    expected = "expected .safetensors files or one of Gemma's Orbax checkpoints in this folder"
    found = files.others(pathlib.Path(path))
    raise ValueError(f"weights {path}: {expected}, got neither{found}")
  reader = orbax.reader if file_format == "orbax" else safetensors.reader
  places, read = reader(path, model_config)
  by_name, sizes = _shardings(shardings, places), names.sizes(model_config)
  leaves = {}
  for name, place in places.items():
    leaves[name] = read(place, place.shape(sizes), jnp.dtype(dtype), by_name[name])
  params = traverse_util.unflatten_dict(leaves, sep="/")
  check_finite(f"weights {path}", params, dtype)
  return params


def check_finite(source: str, params: Params, dtype: DTypeLike) -> None:
  """Raises ValueError for the first leaf that holds NaN or infinity, or would in `dtype`."""
  finite = jax.device_get(_finite(traverse_util.flatten_dict(params, sep="/"), jnp.dtype(dtype)))
  for name, layers in finite.items():
    if not np.all(layers):
      place = f" (place {int(np.argmin(layers))} of its stack)" if np.ndim(layers) else ""
      got = f"NaN or infinity in leaf {name}{place}"
      fix = "it is damaged, comes from a run that diverged, or needs a wider type, such as bfloat16"
      raise ValueError(f"{source}: expected finite numbers in {jnp.dtype(dtype)}, got {got}: {fix}")


@functools.partial(jax.jit, static_argnums=1)
def _finite(leaves: dict[str, jax.Array], dtype) -> dict[str, jax.Array]:
  """Returns for every leaf, or for every layer of a stacked one, whether it is finite."""
  return {
    name: jnp.isfinite(x.astype(dtype)).all(tuple(range(name.startswith("layers/"), x.ndim)))
    for name, x in leaves.items()
  }


def _shardings(shardings: Any, places: dict[str, names.Place]) -> dict[str, Sharding]:
  """Returns the sharding of every leaf; heads, which gemma.shapes lacks, are replicated."""
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
  """Writes one `.safetensors` file of the library's names in `dtype`, with `card` as its metadata.

  The head of a judge, `params["head"]`, is kept. A file of that name is replaced, at once.
  Every process calls it, and the first writes.

  Raises:
    ValueError: parameters of another architecture, or ones that are not finite in `dtype`.
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

  Every process calls it, and the first writes; it holds one file's tensors at a time. The folder
  gets its name, or its weights, only when all is written.

  Args:
    dtype: of the files; bfloat16 rounds away much of a short run (docs/weights.md).
    shard_bytes: the most tensor bytes in a file, unless a single tensor is larger.
    tokenizer: whose ids begin and stop a text, and whose pieces' rows are kept; default the
      published Gemma's. It goes into the folder with its template; files of it that are there stay.

  Raises:
    ValueError: the folder has such files already, a model with a head, an architecture that is
      neither Gemma 2's nor Gemma 3's, parameters of another one, or ones that are not finite.
  """
  folder = pathlib.Path(path)
  if folder.is_file() or any(folder.glob("*.safetensors*")):
    raise ValueError(f"export {path}: expected a folder without weights; move them away")
  if "head" in params:
    raise ValueError(f"export {path}: Hugging Face has no room for a reward model's head: use save")
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
  """Returns how many tensors each file of an export takes."""
  sizes = {**names.sizes(model_config), "V": rows}
  counts, used = [0], 0
  for *_, parts, axes in names.sources(model_config, names.hugging_face):
    for _ in parts:
      size = math.prod(names.shape(axes, sizes)) * itemsize
      if counts[-1] and used + size > limit:
        counts, used = [*counts, 0], 0
      counts[-1], used = counts[-1] + 1, used + size
  return counts


def _check_params(path: str, params: Params, model_config: gemma.GemmaConfig, dtype) -> None:
  """Raises ValueError unless these are a plain model's parameters, finite in `dtype`."""
  places, sizes = names.places(model_config), names.sizes(model_config)
  shapes = {name: x.shape for name, x in traverse_util.flatten_dict(params, sep="/").items()}
  places |= names.heads(shapes)
  expected = {name: place.shape(sizes) for name, place in places.items()}
  names.check(f"for {path}", shapes, expected)
  check_finite(f"weights for {path}", params, dtype)


@contextlib.contextmanager
def _whole(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields a name to write a file or folder under, which takes the name `path` when it is whole.

  Where that is a folder with other files in it, the new ones move in, the weights last. What is
  cut short is deleted.
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
  """Sorts what makes a folder's weights readable last."""
  return file.name in ("model.safetensors", hf_config.INDEX), file.name

"""Parameters in and out of files, straight into shardings and one tensor at a time.

Read: our own .safetensors files (the gemma library's names), Hugging Face's Gemma 2 and Gemma 3
text models, and the library's Orbax checkpoints. Written: our own, and Hugging Face's.
"""

import itertools
import json
import math
import pathlib
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jax import numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jax.typing import DTypeLike

from nash_jax.models import gemma
from nash_jax.types import Params
from nash_jax.weights import hf_config, names, orbax, safetensors


def kind(path: str) -> str:
  """Returns the format of the weights at a path: "safetensors", "orbax", or "" for neither."""
  folder = pathlib.Path(path)
  if (folder / "checkpoints").is_dir():  # a run's workdir, even if the run also exported there
    return ""
  if orbax.is_checkpoint(path):
    return "orbax"
  files = folder.is_file() or (folder / hf_config.INDEX).exists()
  return "safetensors" if files or any(folder.glob("*.safetensors")) else ""


def load(
  path: str, model_config: gemma.GemmaConfig, dtype: DTypeLike = jnp.float32, shardings: Any = None
) -> Params:
  """Returns the stacked tree; every name and shape is checked before a tensor is read.

  Rows of the embedding that a Hugging Face file lacks are 0; rows that only it has are left out.

  Args:
    path: a .safetensors file, a folder of Hugging Face's, or an Orbax checkpoint of the library's.
    dtype: of the parameters, whatever the file has.
    shardings: a tree like gemma.shapes(model_config), or one for all; default the first device.

  Raises:
    ValueError: no such weights, a damaged file, a missing shard, or the first leaf that is
      missing, unknown or of another shape.
  """
  file_format = kind(path)
  if not file_format and pathlib.Path(path).is_dir():
    expected = "expected .safetensors files or one of Gemma's Orbax checkpoints in this folder"
    raise ValueError(f"weights {path}: {expected}, got neither")
  reader = orbax.reader if file_format == "orbax" else safetensors.reader
  places, read = reader(path, model_config)
  by_name, sizes = _shardings(shardings, places), names.sizes(model_config)
  leaves = {}
  for name, place in places.items():
    shape = (len(place.layers),) * place.stacked + names.shape(place.tensor.axes, sizes)
    leaves[name] = read(place, shape, jnp.dtype(dtype), by_name[name])
  return traverse_util.unflatten_dict(leaves, sep="/")


def _shardings(shardings: Any, places: dict[str, names.Place]) -> dict[str, Sharding]:
  """Returns the sharding of every leaf; a head, which gemma.shapes lacks, is replicated."""
  if shardings is None:
    shardings = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  if isinstance(shardings, Sharding):
    return dict.fromkeys(places, shardings)
  by_name = traverse_util.flatten_dict(shardings, sep="/")
  if names.HEAD.name in places.keys() - by_name.keys():
    mesh = by_name[names.EMBEDDING.name].mesh
    by_name[names.HEAD.name] = NamedSharding(mesh, PartitionSpec())
  return by_name


def save(
  path: str, params: Params, model_config: gemma.GemmaConfig, dtype: DTypeLike, card: dict
) -> None:
  """Writes one `.safetensors` file of the library's names in `dtype`, with `card` as its metadata.

  The head of a reward model, `params["head"]`, is kept. Every process calls it, and the first
  writes.
  """
  rows = model_config.num_embed
  leaves = dict(safetensors.tensors(params, model_config, names.library, dtype, rows))
  if "head" in params:
    leaves[names.HEAD.name] = np.asarray(jnp.asarray(params["head"]["w"], dtype))
  target = pathlib.Path(path)
  target.parent.mkdir(parents=True, exist_ok=True)
  _write(target, leaves, {"card": json.dumps(card)})


def export(
  path: str,
  params: Params,
  model_config: gemma.GemmaConfig,
  dtype: DTypeLike = "bfloat16",
  shard_bytes: int = 4 << 30,
) -> None:
  """Writes a folder that transformers reads: config.json, and .safetensors files with an index.

  Every process calls it, and the first writes; it holds one file's tensors at a time.

  Args:
    shard_bytes: the most tensor bytes in a file, unless a single tensor is larger.

  Raises:
    ValueError: the folder has weights already, a model with a head, or an architecture that is
      neither Gemma 2's nor Gemma 3's.
  """
  folder = pathlib.Path(path)
  if folder.is_file() or any(folder.glob("*.safetensors*")):
    raise ValueError(f"export {path}: expected a folder without weights; move them away")
  if "head" in params:
    raise ValueError(f"export {path}: Hugging Face has no room for a reward model's head: use save")
  rows, dtype = hf_config.rows(model_config), jnp.dtype(dtype)
  fields = hf_config.config_json(model_config, dtype.name)
  stream = safetensors.tensors(params, model_config, names.hugging_face, dtype, rows)
  counts = _counts(model_config, rows, dtype.itemsize, shard_bytes)
  folder.mkdir(parents=True, exist_ok=True)
  total_size, weight_map = 0, {}
  for i, count in enumerate(counts):
    file = f"model-{i + 1:05d}-of-{len(counts):05d}.safetensors"
    file = file if len(counts) > 1 else "model.safetensors"
    leaves = {f"model.{name}": x for name, x in itertools.islice(stream, count)}
    _write(folder / file, leaves, {"format": "pt"})
    total_size += sum(x.nbytes for x in leaves.values())
    weight_map.update(dict.fromkeys(leaves, file))
  if jax.process_index() == 0:
    if len(counts) > 1:
      index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
      (folder / hf_config.INDEX).write_text(json.dumps(index, indent=2) + "\n")
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n")


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


def _write(path: pathlib.Path, leaves: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
  """Writes one file on the first process; one that is cut short never takes its name."""
  from safetensors.numpy import save_file

  if jax.process_index() == 0:
    part = path.with_suffix(".part")
    save_file(leaves, str(part), metadata=metadata)
    part.replace(path)

"""Parameters in and out of files, straight into shardings and one tensor at a time.

Read: our own .safetensors files (the gemma library's names), Hugging Face's Gemma 2 and Gemma 3
text models, and the library's Orbax checkpoints. Written: our own, and Hugging Face's.
"""

import itertools
import json
import math
import pathlib
from collections.abc import Callable

import jax
import numpy as np
from flax import traverse_util
from jax import numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from nash_jax.models import gemma
from nash_jax.types import Params
from nash_jax.weights import hugging_face, names, orbax, safetensors


def kind(path: str) -> str:
  """Returns what weights a path holds: "safetensors", "orbax", or "" for neither, as a run's."""
  where = pathlib.Path(path)
  if (where / "checkpoints").is_dir():  # a run's workdir, whatever it was told to export there
    return ""
  if orbax.is_checkpoint(path):
    return "orbax"
  if where.is_file() or (where / hugging_face.INDEX).exists():
    return "safetensors"
  return "safetensors" if where.is_dir() and any(where.glob("*.safetensors")) else ""


def load(path: str, model_config: gemma.GemmaConfig, dtype=jnp.float32, shardings=None) -> Params:
  """Returns the stacked tree; every name and shape is checked before a tensor is read.

  The embedding's rows that a Hugging Face file has not are 0; those it has besides are left out.

  Args:
    path: a .safetensors file, a folder of Hugging Face's, or an Orbax checkpoint of the library's.
    dtype: of the parameters, wherever the file has another.
    shardings: a tree like gemma.shapes(model_config), or one for all; default the first device.

  Raises:
    ValueError: no such weights, a damaged file, a missing shard, or the first leaf that is
      missing, unknown or of another shape.
  """
  found = kind(path)
  if not found and pathlib.Path(path).is_dir():
    raise ValueError(
      f"weights {path}: expected .safetensors files or one of Gemma's Orbax checkpoints in this"
      " folder, got neither"
    )
  if found == "orbax":
    places, read = orbax.reader(path, model_config)
  else:
    places, slices = safetensors.reader(path, model_config)

    def read(place, shape, dtype, sharding):
      return _assemble(lambda index: slices(place, index, dtype), shape, dtype, sharding)

  where, sizes = _shardings(shardings, places), names.sizes(model_config)
  leaves = {}
  for name, place in places.items():
    shape = (len(place.layers),) * place.stacked + names.shape(place.tensor.axes, sizes)
    leaves[name] = read(place, shape, jnp.dtype(dtype), where[name])
  return traverse_util.unflatten_dict(leaves, sep="/")


def _assemble(slices: Callable, shape, dtype, sharding) -> jax.Array:
  """Returns one array, each distinct part of which is read once on each host that has it."""
  parts = {}

  def part(index):
    index = tuple(slice(*s.indices(size)[:2]) for s, size in zip(index, shape, strict=True))
    key = tuple((s.start, s.stop) for s in index)
    if key not in parts:
      parts[key] = slices(index)
    return parts[key]

  return jax.make_array_from_callback(shape, sharding, part, dtype=dtype)


def _shardings(shardings, places) -> dict[str, Sharding]:
  if shardings is None:
    shardings = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  if isinstance(shardings, Sharding):
    return dict.fromkeys(places, shardings)
  found = traverse_util.flatten_dict(shardings, sep="/")
  if "head/w" in places and "head/w" not in found:
    found["head/w"] = NamedSharding(found[names.EMBEDDING.name].mesh, PartitionSpec())
  return found


def save(path: str, params: Params, model_config: gemma.GemmaConfig, dtype, card: dict) -> None:
  """Writes one `.safetensors` file of the library's names in `dtype`, with `card` as its metadata.

  A head beside the blocks (`params["head"]`, of reward models) is kept. Every process calls it,
  and the first writes.
  """
  leaves = dict(
    safetensors.tensors(params, model_config, names.library, dtype, model_config.num_embed)
  )
  if "head" in params:
    leaves["head/w"] = np.asarray(jnp.asarray(params["head"]["w"], dtype))
  target = pathlib.Path(path)
  target.parent.mkdir(parents=True, exist_ok=True)
  _write(target, leaves, {"card": json.dumps(card)})


def export(
  path: str,
  params: Params,
  model_config: gemma.GemmaConfig,
  dtype="bfloat16",
  shard_bytes: int = 4 << 30,
) -> None:
  """Writes a folder that transformers reads: config.json, and .safetensors files with an index.

  Every process calls it, and the first writes; it holds one file's tensors at a time.

  Args:
    shard_bytes: the most tensor bytes in a file, where a single tensor is not larger.

  Raises:
    ValueError: the folder has weights already, a model with a head, or an architecture that is
      neither Gemma 2's nor Gemma 3's.
  """
  folder = pathlib.Path(path)
  if folder.is_file() or any(folder.glob("*.safetensors*")):
    raise ValueError(f"export {path}: expected a folder without weights; move them away")
  if "head" in params:
    raise ValueError(f"export {path}: a reward model's head has no place at Hugging Face: use save")
  rows, dtype = hugging_face.rows(model_config), jnp.dtype(dtype)
  fields = hugging_face.config_json(model_config, dtype.name)
  stream = safetensors.tensors(params, model_config, names.hugging_face, dtype, rows)
  counts = _counts(model_config, rows, dtype.itemsize, shard_bytes)
  folder.mkdir(parents=True, exist_ok=True)
  index = {"metadata": {"total_size": 0}, "weight_map": {}}
  for i, count in enumerate(counts):
    file = f"model-{i + 1:05d}-of-{len(counts):05d}.safetensors"
    file = file if len(counts) > 1 else "model.safetensors"
    leaves = {f"model.{name}": x for name, x in itertools.islice(stream, count)}
    _write(folder / file, leaves, {"format": "pt"})
    index["metadata"]["total_size"] += sum(x.nbytes for x in leaves.values())
    index["weight_map"].update(dict.fromkeys(leaves, file))
  if jax.process_index() == 0:
    if len(counts) > 1:
      (folder / hugging_face.INDEX).write_text(json.dumps(index, indent=2) + "\n")
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

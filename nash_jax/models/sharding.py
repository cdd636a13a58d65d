"""Shardings: a mesh of (data, fsdp, tensor), and one ordered table of rules."""

import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array
from ml_collections import ConfigDict

from nash_jax.types import Params
from nash_jax.validation import require

# (path, axes of the trailing dimensions). A leading axis of stacked layers is never split. "?"
# replicates key and value heads if the tensor axis does not divide their number.
RULES = (
  (r"embedder/input_embedding$", ("tensor", "fsdp")),
  (r"embedder/per_layer_embeddings$", ("tensor", None, "fsdp")),
  (r"embedder/per_layer_model_projection/w$", ("fsdp", None, "tensor")),
  (r"attn/q_einsum/w$", ("tensor", "fsdp", None)),
  (r"attn/k_einsum/w$", ("tensor?", "fsdp", None)),
  (r"attn/kv_einsum/w$", (None, "tensor?", "fsdp", None)),
  (r"attn/qkv_einsum/w$", (None, "tensor", "fsdp", None)),
  (r"attn/attn_vec_einsum/w$", ("tensor", None, "fsdp")),
  (r"mlp/gating_einsum$", (None, "fsdp", "tensor")),
  (r"mlp/linear$", ("tensor", "fsdp")),
  (r"per_layer_input_gate/w$", ("fsdp", "tensor")),
  (r"per_layer_projection/w$", ("tensor", "fsdp")),
  # Adapters (models/lora.py): A's inputs and B's outputs are split like the weight's.
  (r"(attn/(q|k|kv|qkv)_einsum/w|mlp/gating_einsum|per_layer_input_gate/w)/a$", ("fsdp", None)),
  (r"attn/q_einsum/w/b$", (None, "tensor", None)),
  (r"attn/k_einsum/w/b$", (None, "tensor?", None)),
  (r"attn/q?kv_einsum/w/b$", (None, None, "tensor?", None)),
  (r"attn/attn_vec_einsum/w/a$", ("tensor", None, None)),
  (r"mlp/gating_einsum/b$", (None, None, "tensor")),
  (r"(mlp/linear|per_layer_projection/w)/a$", ("tensor", None)),
  (r"per_layer_input_gate/w/b$", (None, "tensor")),
  (r"(attn/attn_vec_einsum/w|mlp/linear|per_layer_projection/w)/b$", (None, "fsdp")),
  (r"norm/scale$", ()),
  (r"skip_scale$", (None,)),
  (r"head/(w|v|scale)$", ()),
  (r"^(counts|cap|finish|per_token)?$", ()),  # judges that are not models
)
AnyMesh = Mesh | AbstractMesh
type Sizes = Mapping[str, int] | ConfigDict  # {axis of a mesh: size}
BATCH = ("data", "fsdp")  # mesh axes that split the leading axis of every batch


def resolve_mesh(mesh: Sizes, devices: int, field: str = "mesh") -> dict[str, int]:
  """Returns a mesh's sizes with -1 filled in.

  Raises:
    ValueError: their product is not `devices`.
  """
  sizes: dict[str, int] = dict(mesh)
  free = [name for name, size in sizes.items() if size == -1]
  fixed = math.prod(size for size in sizes.values() if size != -1)
  good = len(free) <= 1 and all(size == -1 or size > 0 for size in sizes.values())
  require(good, field, "positive sizes and at most one -1", sizes, f"Fix --config.{field}.")
  if free:
    sizes[free[0]] = devices // fixed if devices % fixed == 0 else 0
  good, expected = math.prod(sizes.values()) == devices, f"sizes whose product is {devices} devices"
  require(good, field, expected, dict(mesh), f"For example data={devices}, fsdp=1, tensor=1.")
  return sizes


def make_mesh(sizes: Sizes, like: Mesh | None = None) -> Mesh:
  """Returns the mesh of a run's config; with `like`, over its devices in the same order."""
  sizes = resolve_mesh(sizes, jax.device_count() if like is None else like.size)
  shape, names, types = tuple(sizes.values()), tuple(sizes), (AxisType.Auto,) * len(sizes)
  if like is None:
    return jax.make_mesh(shape, names, axis_types=types)
  return Mesh(like.devices.reshape(shape), names, axis_types=types)


def _name(path) -> str:
  return jax.tree_util.keystr(path, simple=True, separator="/")


def _count(mesh: AnyMesh, axes: str | tuple[str, ...] | None) -> int:
  """Returns into how many parts one or several axes of the mesh split a dimension."""
  names = (axes,) if isinstance(axes, str) else axes or ()
  return math.prod(mesh.shape[name] for name in names)


def _spec(path: str, shape: tuple[int, ...], mesh: AnyMesh) -> P:
  # Scalars and Adafactor's factored moments, which are vectors, are replicated.
  if math.prod(shape) == 1 or re.search(r"/v_(row|col)/", path):
    return P()
  rules = [axes for pattern, axes in RULES if re.search(pattern, path)]
  if len(rules) != 1:
    raise ValueError(f"parameter {path}: expected exactly one sharding rule, got {len(rules)}")
  spec: list[str | None] = [None] * (len(shape) - len(rules[0]))
  for size, axis in zip(shape[len(spec) :], rules[0], strict=True):
    name = axis and axis.rstrip("?")
    divides = size % _count(mesh, name) == 0
    if not divides and name == axis:
      count = mesh.shape[name]
      split = f"{name}={count}; use mesh.{name}={math.gcd(size, count)}"
      raise ValueError(f"parameter {path}: dimension {size} does not divide over {split}")
    spec.append(name if divides else None)
  return P(*spec)


def shardings(tree: Any, mesh: AnyMesh) -> Any:
  """Returns a NamedSharding for each leaf, by its path, also in optimiser state and copies."""
  return jax.tree.map_with_path(
    lambda path, leaf: NamedSharding(mesh, _spec(_name(path), leaf.shape, mesh)), tree
  )


def jit(mesh: Mesh, fn: Callable, **options) -> jax.stages.Wrapped:
  """Returns jax.jit(fn, **options) in which `constrain` and `gather_weights` use `mesh`."""

  @functools.wraps(fn)
  def traced(*args):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return fn(*args)

  return jax.jit(traced, **options)


def compilations(jitted) -> int:
  """Returns how often a function from `jit` was compiled.

  Only the private `_cache_size` tells; tested with jax 0.11 and 0.12.
  """
  if not hasattr(jitted, "_cache_size"):
    raise RuntimeError(f"jax {jax.__version__} has no _cache_size, jax 0.11 and 0.12 have it")
  return jitted._cache_size()


def constrain(x: Array, *axes: str | tuple[str, ...] | None) -> Array:
  """Splits the leading dimensions of an activation over `axes`, written as in RULES.

  If an axis without "?" does not divide its dimension, the compiler chooses the layout.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x
  spec: list[str | tuple[str, ...] | None] = []
  for size, axis in zip(x.shape, axes, strict=False):
    name = axis.rstrip("?") if isinstance(axis, str) else axis
    divides = size % _count(mesh, name) == 0
    if not divides and name == axis:
      return x
    spec.append(name if divides else None)
  return jax.lax.with_sharding_constraint(x, P(*spec))


def gather_weights(tree: Params) -> Params:
  """Gathers weights over data and fsdp; keeps heads, features and vocabulary split over tensor.

  Layers compute in this layout, and policies decode in it.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return tree

  def gather(path, leaf):
    spec = _spec(_name(path), leaf.shape, mesh)
    gathered = P(*(None if axis == "fsdp" else axis for axis in spec))
    return jax.lax.with_sharding_constraint(leaf, gathered)

  return jax.tree.map_with_path(gather, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of a batch, whose leading axis is split over data and fsdp."""
  return NamedSharding(mesh, P(BATCH))


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding that replicates an array on every device."""
  return NamedSharding(mesh, P())


def abstract(shapes: Any, shardings: Any) -> Any:
  """Returns a tree of `jax.ShapeDtypeStruct`s with these shardings."""
  return jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes, shardings
  )


def shard(tree: Any, mesh: Mesh | None) -> Any:
  """Shards arrays that every host holds over the mesh; without a mesh, returns them unchanged.

  Each host takes its part from its own copy, so nothing is communicated.
  """
  if mesh is None:
    return tree

  def shard_leaf(x, sharding):
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

  return jax.tree.map(shard_leaf, tree, shardings(tree, mesh))


def global_batch(sharding: NamedSharding, size: int, read: Callable[[slice], Any]) -> Any:
  """Returns a batch of `size` rows, of which each host reads only its own.

  Args:
    sharding: from `batch_sharding`.
    read: slice of rows -> a tree of arrays whose leading axis has these rows.
  """
  indices = sharding.addressable_devices_indices_map((size,)).values()
  starts, stops, _ = zip(*(index[0].indices(size) for index in indices if index), strict=True)

  def from_local(x):
    return jax.make_array_from_process_local_data(sharding, x, (size, *x.shape[1:]))

  return jax.tree.map(from_local, read(slice(min(starts), max(stops))))


def describe(tree: Any) -> list[tuple[str, str, str, int]]:
  """Returns (name, shape, sharding, bytes per device) of arrays or shapes with shardings."""
  lines = []
  for path, x in jax.tree.leaves_with_path(tree):
    size = math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    lines.append((_name(path), "x".join(map(str, x.shape)), str(tuple(x.sharding.spec)), size))
  return lines

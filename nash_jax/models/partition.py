"""Sharding as data: a mesh of (data, fsdp, tensor), and one ordered table of rules."""

import functools
import math
import re
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nash_jax import config as configs

# (path, axes of the trailing dimensions). A leading axis of stacked layers is never split. Key and
# value heads are few: they are replicated where the tensor axis does not divide them.
RULES = (
  (r"embedder/input_embedding$", ("tensor", "fsdp")),
  (r"attn/q_einsum/w$", ("tensor", "fsdp", None)),
  (r"attn/kv_einsum/w$", (None, "tensor?", "fsdp", None)),
  (r"attn/qkv_einsum/w$", (None, "tensor", "fsdp", None)),
  (r"attn/attn_vec_einsum/w$", ("tensor", None, "fsdp")),
  (r"mlp/gating_einsum$", (None, "fsdp", "tensor")),
  (r"mlp/linear$", ("tensor", "fsdp")),
  # Of adapters, models/lora.py: A's inputs and B's outputs are split as the weight's are.
  (r"(attn/(q|kv|qkv)_einsum/w|mlp/gating_einsum)/a$", ("fsdp", None)),
  (r"attn/q_einsum/w/b$", (None, "tensor", None)),
  (r"attn/q?kv_einsum/w/b$", (None, None, "tensor?", None)),
  (r"attn/attn_vec_einsum/w/a$", ("tensor", None, None)),
  (r"mlp/gating_einsum/b$", (None, None, "tensor")),
  (r"mlp/linear/a$", ("tensor", None)),
  (r"(attn/attn_vec_einsum/w|mlp/linear)/b$", (None, "fsdp")),
  (r"norm/scale$", ()),
  (r"head/w$", ()),
  (r"^(counts|cap|finish|per_token)?$", ()),  # of judges that are no models
)
BATCH = ("data", "fsdp")  # what the leading axis of every batch is split over


def make_mesh(sizes, like: Mesh | None = None) -> Mesh:
  """Returns the mesh of a run's config, or another of the same devices in the order of `like`.

  Raises:
    ValueError: sizes that do not make the devices there are.
  """
  if like is not None:
    sizes = configs.resolve_mesh(sizes, like.size)
    devices = like.devices.reshape(*sizes.values())
    return Mesh(devices, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
  sizes = configs.resolve_mesh(sizes, jax.device_count())
  return jax.make_mesh(
    tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes)
  )


def _name(path) -> str:
  return jax.tree_util.keystr(path, simple=True, separator="/")


def _count(mesh, axes) -> int:
  """Returns over how many devices one or several axes of the mesh split a dimension."""
  names = (axes,) if isinstance(axes, str) else axes or ()
  return math.prod(mesh.shape[name] for name in names)


def _spec(path: str, shape, mesh: Mesh) -> P:
  # Scalars, and Adafactor's factored moments, which are vectors, are held everywhere.
  if math.prod(shape) == 1 or re.search(r"/v_(row|col)/", path):
    return P()
  found = [axes for pattern, axes in RULES if re.search(pattern, path)]
  if len(found) != 1:
    raise ValueError(f"parameter {path}: expected exactly one sharding rule, got {len(found)}")
  axes = (None,) * (len(shape) - len(found[0])) + found[0]
  out = []
  for size, axis in zip(shape, axes, strict=True):
    name = axis and axis.rstrip("?")
    whole = size % _count(mesh, name) == 0
    if not whole and not axis.endswith("?"):
      raise ValueError(
        f"parameter {path}: dimension {size} does not divide over {name}={mesh.shape[name]};"
        f" use mesh.{name}={math.gcd(size, mesh.shape[name])}"
      )
    out.append(name if whole else None)
  return P(*out)


def shardings(tree, mesh: Mesh):
  """Returns a NamedSharding a leaf; optimiser state, target and copies follow by path."""

  return jax.tree.map_with_path(
    lambda path, leaf: NamedSharding(mesh, _spec(_name(path), leaf.shape, mesh)), tree
  )


def jit(mesh: Mesh, fn, **options):
  """Returns jax.jit(fn, **options), traced so that `constrain` and `gathered` act on `mesh`."""

  @functools.wraps(fn)
  def traced(*args):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return fn(*args)

  return jax.jit(traced, **options)


def constrain(x, *axes):
  """Splits the leading dimensions of an activation over `axes`, in the grammar of RULES.

  Where a dimension does not divide over an axis without "?", the layout is left to the compiler.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x
  spec = []
  for size, axis in zip(x.shape, axes, strict=False):
    optional = isinstance(axis, str) and axis.endswith("?")
    name = axis.rstrip("?") if optional else axis
    if size % _count(mesh, name) == 0:
      spec.append(name)
    elif optional:
      spec.append(None)
    else:
      return x
  return jax.lax.with_sharding_constraint(x, P(*spec))


def gathered(tree):
  """Returns weights whole over data and fsdp, heads, features and vocabulary still split.

  The layout in which a layer computes, and in which all of a policy is decoded from.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return tree

  def one(path, leaf):
    spec = _spec(_name(path), leaf.shape, mesh)
    whole = P(*(None if axis == "fsdp" else axis for axis in spec))
    return jax.lax.with_sharding_constraint(leaf, whole)

  return jax.tree.map_with_path(one, tree)


def rows(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of a batch: split over data and fsdp by its leading axis."""
  return NamedSharding(mesh, P(BATCH))


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding that holds everything everywhere."""
  return NamedSharding(mesh, P())


def abstract(shapes, shardings):
  """Returns a tree of `jax.ShapeDtypeStruct`s with these shardings."""
  return jax.tree.map(
    lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes, shardings
  )


def place(tree, mesh: Mesh):
  """Returns arrays that every host has, as arrays of the mesh; no host asks another."""

  def one(x, sharding):
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

  return jax.tree.map(one, tree, shardings(tree, mesh))


def feed(rows: NamedSharding, size: int, read: Callable):
  """Returns a batch of `size` rows, of which each host reads its own.

  Args:
    rows: as from `rows`.
    read: from a slice of the batch's rows to their arrays, a tree with these rows leading.
  """
  own = [index[0].indices(size) for index in rows.addressable_devices_indices_map((size,)).values()]
  first, last = min(start for start, _, _ in own), max(stop for _, stop, _ in own)

  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(rows, x, (size, *x.shape[1:])),
    read(slice(first, last)),
  )


def describe(tree) -> list[tuple[str, str, str, int]]:
  """Returns (name, shape, what splits it, bytes a device) of arrays or shapes with shardings."""
  return [
    (_name(path), "x".join(map(str, x.shape)), str(tuple(x.sharding.spec)),
     math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize)
    for path, x in jax.tree.leaves_with_path(tree)
  ]  # fmt: skip

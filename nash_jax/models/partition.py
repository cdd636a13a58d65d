"""Sharding as data: a mesh of (data, fsdp, tensor), and one ordered table of rules."""

import math
import re

import jax
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
ROWS = P(("data", "fsdp"))  # of every batch: its leading axis


def make_mesh(sizes) -> Mesh:
  """Returns the mesh of a run's config; ValueError where the sizes do not make its devices."""
  sizes = configs.resolve_mesh(sizes, jax.device_count())
  return jax.make_mesh(
    tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes)
  )


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
    whole = name is None or size % mesh.shape[name] == 0
    if not whole and not axis.endswith("?"):
      raise ValueError(
        f"parameter {path}: dimension {size} does not divide over {name}={mesh.shape[name]};"
        f" use mesh.{name}={math.gcd(size, mesh.shape[name])}"
      )
    out.append(name if whole else None)
  return P(*out)


def shardings(tree, mesh: Mesh):
  """Returns a NamedSharding a leaf; optimiser state, target and copies follow by path."""

  def one(path, leaf):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return NamedSharding(mesh, _spec(name, leaf.shape, mesh))

  return jax.tree.map_with_path(one, tree)


def rows(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of a batch: split over data and fsdp by its leading axis."""
  return NamedSharding(mesh, ROWS)


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding that holds everything everywhere."""
  return NamedSharding(mesh, P())

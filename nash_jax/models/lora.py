"""LoRA (Hu et al. 2106.09685): W + (alpha / r)·A·B with W frozen, on every projection of a block.

There are three trees: the base, which are a plain model's parameters; the trained adapters, with
{"a", "b"} at the path of each weight; and the two joined, which are a policy's parameters. Joining
does not change the base. Merging a joined tree gives a plain model.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn
from flax import traverse_util
from gemma import gm, peft
from gemma.gm.nn.gemma4 import _layers as gemma4_layers
from jax import numpy as jnp
from jaxtyping import Array
from ml_collections import ConfigDict

from nash_jax import keys
from nash_jax.types import Params
from nash_jax.validation import require

# {path in the block: axes of A, of B and of the weight}; r is the rank. As in gemma.peft, a factor
# covers all inputs or all outputs, so keys and values share A, and so do gate and up.
FACTORS = {
  "attn/q_einsum/w": ("Dr", "rNH", "NDH"),
  "attn/kv_einsum/w": ("Dr", "rCKH", "CKDH"),
  "attn/k_einsum/w": ("Dr", "rKH", "KDH"),
  "attn/qkv_einsum/w": ("Dr", "rCNH", "CNDH"),
  "attn/attn_vec_einsum/w": ("NHr", "rD", "NHD"),
  "mlp/gating_einsum": ("Dr", "rCF", "CDF"),
  "mlp/linear": ("Fr", "rD", "FD"),
  "per_layer_input_gate/w": ("Dr", "rP", "DP"),
  "per_layer_projection/w": ("Pr", "rD", "PD"),
}
_STACKS = ("layers", "tail", "shared")
EINSUMS = (gm.nn.Einsum, gemma4_layers.Einsum)  # of the two modules that blocks are from


def init_and_join(
  config: ConfigDict,
) -> tuple[Callable[[Params], Params], Callable[[Params, Params], Params]]:
  """Returns (init, join) of a run's config.

  init(base) makes the trainable parameters, and join(base, trainable) the policy's. Without LoRA
  the base itself is trained, and join returns the trained parameters.
  """
  rank = config.model.lora.rank
  if not rank:
    return lambda base: base, lambda base, trained: trained

  def init_adapters(base: Params) -> Params:
    return init(keys.key(config.seed, "lora"), base, rank)

  return init_adapters, functools.partial(join, scale=config.model.lora.alpha / rank)


def init(key: Array, base: Params, rank: int) -> Params:
  """Returns float32 adapters of a stacked base with B = 0; A is drawn as in gemma.peft.

  The result includes a judge's head, which is trained directly. If the base is already joined with
  adapters of this rank, returns those. Only columns that are 0 in both A and B, which would get no
  gradient, are drawn in A.

  Raises:
    ValueError: the base has no projections, such as that of a tabular policy.
  """
  adapters: dict[tuple[str, ...], Array] = {}
  flat = traverse_util.flatten_dict(base)
  for path, weight in flat.items():
    name = "/".join(path[2:])
    if path[0] not in _STACKS or name not in FACTORS:
      continue
    a, b, axes = FACTORS[name]
    stack = weight.shape[: -len(axes)]
    sizes = {**dict(zip(axes, weight.shape[len(stack) :], strict=True)), "r": rank}
    a_shape, b_shape = ((*stack, *(sizes[axis] for axis in letters)) for letters in (a, b))
    inputs, stacked = range(len(stack), len(a_shape) - 1), range(len(stack))
    draw = jax.nn.initializers.he_uniform(in_axis=inputs, batch_axis=stacked)
    fresh = draw(jax.random.fold_in(key, len(adapters)), a_shape)
    start = {part: flat.get((*path[:2], "lora", *path[2:], part)) for part in "ab"}
    adapters[(*path, "a")] = fresh if start["a"] is None else _filled(start, fresh, len(stack))
    adapters[(*path, "b")] = jnp.zeros(b_shape) if start["b"] is None else start["b"]
  expected, fix = "a Gemma's projections to adapt", "Set model.lora.rank=0."
  require(bool(adapters), "model.lora", expected, sorted(base), fix)
  for name, head in base.get("head", {}).items():
    adapters["head", name] = head.astype(jnp.float32)
  return traverse_util.unflatten_dict(adapters)


def _filled(start: dict[str, Array], fresh: Array, stack: int) -> Array:
  """Returns A with fresh columns where both A and B are 0."""
  a, b = start["a"], start["b"]
  used = jnp.any(a != 0, tuple(range(stack, a.ndim - 1)))
  used |= jnp.any(b != 0, tuple(range(stack + 1, b.ndim)))
  return jnp.where(jnp.expand_dims(used, tuple(range(stack, a.ndim - 1))), a, fresh)


def join(base: Params, adapters: Params, scale: float | Array) -> Params:
  """Returns the base with each layer's adapters, B scaled, under "lora" beside its weights."""

  def scaled(path, x):
    return x * scale if path[-1].key == "b" else x

  joined = {**base, **adapters}
  for stack in (name for name in _STACKS if name in base):
    joined[stack] = {
      place: {**layer, "lora": jax.tree.map_with_path(scaled, adapters[stack][place])}
      for place, layer in base[stack].items()
    }
  return joined


def merge(params: Params) -> Params:
  """Returns a plain model from a joined one, stacked or unstacked; adapted weights are float32."""
  if "lora" not in params:
    return {name: merge(x) if isinstance(x, dict) else x for name, x in params.items()}
  plain = {name: x for name, x in params.items() if name != "lora"}
  layer = traverse_util.flatten_dict(plain, sep="/")
  adapters = traverse_util.flatten_dict(params["lora"], sep="/")
  for name in (name for name in FACTORS if name in layer):
    a_axes, b_axes, axes = FACTORS[name]
    equation = f"...{a_axes},...{b_axes}->...{axes}"
    a, b = adapters[f"{name}/a"], adapters[f"{name}/b"]
    # In full precision, because a TPU would round both factors to bfloat16.
    layer[name] += jnp.einsum(equation, a, b, precision="highest")
  return traverse_util.unflatten_dict(layer, sep="/")


def split(params: Params) -> tuple[Params, Params]:
  """Returns the parameters without the table of inputs by layer, and that table, which is frozen.

  It is half of a small Gemma 4. A step reads a few of its rows; the optimiser would hold and move
  all of them.
  """
  frozen = {n: x for n, x in params.get("embedder", {}).items() if n == "per_layer_embeddings"}
  if not frozen:
    return params, {}
  embedder = {name: x for name, x in params["embedder"].items() if name not in frozen}
  return {**params, "embedder": embedder}, frozen


def rejoin(trained: Params, frozen: Params) -> Params:
  """Returns the tree of which `split` made these parts."""
  return {**trained, "embedder": {**trained["embedder"], **frozen}} if frozen else trained


def apply(block: nn.Module, layer: Params, *args) -> Any:
  """Returns block.apply's outputs for one layer, joined or plain.

  Computes x·W + (x·A)·B and not W + A·B, so that no gradient of W's size exists.
  """
  params = {name: x for name, x in layer.items() if name != "lora"}
  if "lora" not in layer:
    return block.apply({"params": params}, *args)
  with nn.intercept_methods(_add):
    return block.apply({"params": params, "lora": layer["lora"]}, *args)


def _add(call, args, kwargs, context):
  """Adds the adapters' product to Einsum.__call__; other methods run unchanged.

  A projection that the block makes and drops (keys of a layer that reads another's) has none.
  """
  out, module = call(*args, **kwargs), context.module
  if not isinstance(module, EINSUMS) or context.method_name != "__call__":
    return out
  pair = module.get_variable("lora", module.weight_name)
  if pair is None:
    return out
  adapter = peft.LoRAEinsumAdapter(
    rank=pair["a"].shape[-1], einsum_str=args[0], shape=module.shape, dtype=out.dtype, parent=None
  )
  return out + adapter.apply({"params": pair}, args[1])

"""Memory that an online run needs on one device, from shapes alone, and how to reduce it."""

import functools
from typing import Any, NamedTuple

import jax
from jax import numpy as jnp
from jax.sharding import AbstractMesh
from jax.typing import DTypeLike
from ml_collections import ConfigDict

from nash_jax import report, update
from nash_jax.judges import bradley_terry
from nash_jax.models import gemma, logprobs, sharding
from nash_jax.objectives import algorithms
from nash_jax.types import Params

GIB = 2**30
ONE_DEVICE = {"data": 1, "fsdp": 1, "tensor": 1}


class Chip(NamedTuple):
  """Bytes that a program may use, and published peaks: bfloat16 FLOP/s, bytes/s of memory."""

  hbm: float
  flops: float
  bandwidth: float


# By jax's device kind. TPU: what the compiler allows, and cloud.google.com/tpu/docs; GPU: their
# data sheets, dense, without what the driver reserves.
CHIPS = {
  "TPU v5 lite": Chip(15.75 * GIB, 197e12, 819e9),
  "TPU v5": Chip(95.73 * GIB, 459e12, 2765e9),
  "TPU v6 lite": Chip(31.24 * GIB, 918e12, 1640e9),
  "Tesla T4": Chip(15.0 * GIB, 65e12, 320e9),
  "NVIDIA H100 80GB HBM3": Chip(78 * GIB, 989e12, 3350e9),
  "NVIDIA H200": Chip(139 * GIB, 989e12, 4800e9),
}
DEVICES = {"T4": "Tesla T4", "v5e-1": "TPU v5 lite"}  # names of a notebook's single device
# Parts of an estimate: what is held all the time, and what two phases need in addition.
HELD = ("parameters", "target and copies", "optimiser state", "reference", "judge")
PHASES = {
  "sample": ("weights for decoding", "cache for decoding"),
  "update": ("gradient and update", "logits of a chunk", "activations"),
}


def estimate(config: ConfigDict, mesh: dict[str, int] = ONE_DEVICE) -> dict[str, int | float]:
  """Returns the bytes of each part of a run on one device, from shapes alone.

  Exact except for "activations", a lower bound: what one layer of the backward pass needs, and what
  all layers keep for it.

  Args:
    config: of an online run; its weights need not exist.
    mesh: sizes of data, fsdp and tensor.
  """
  config = config.copy_and_resolve_references().unlock()
  algorithms.fill_defaults(config.algorithm)
  model_config = gemma.preset(config.model.preset, **config.model.changes)
  shapes, method = gemma.shapes(model_config), algorithms.get(config.algorithm.name)
  policy_logprobs = functools.partial(logprobs.response_logprobs, model_config=model_config)
  state = jax.eval_shape(update.make_update(config, policy_logprobs).init, shapes)
  dtype = jnp.dtype(config.model.dtype)
  all_axes = AbstractMesh(tuple(mesh.values()), tuple(mesh))
  tensor_axis = AbstractMesh((1, 1, mesh["tensor"]), tuple(mesh))
  compute_shapes, judge = as_type(shapes, dtype), judge_shapes(config.judge)

  def size(tree, mesh=all_axes):
    return bytes_per_device(sharding.abstract(tree, sharding.shardings(tree, mesh)))

  rows = config.prompts.batch_size * config.algorithm.samples / (mesh["data"] * mesh["fsdp"])
  length = config.sampling.max_tokens
  width = config.prompts.max_tokens + length
  num_models = 2 if "mixture" in (method.player, method.opponent) else 1
  heads = mesh["tensor"] if model_config.num_kv_heads % mesh["tensor"] == 0 else 1
  cache = jax.eval_shape(lambda: gemma.init_cache(model_config, 1, 1, dtype))
  column = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
  micro_batch = rows / config.optimizer.micro_batches
  inside = _activations(model_config, config.model.remat, width)
  # Each device has the logits of its rows, or of its part of the vocabulary: as many.
  logits = 3 * 4 * micro_batch * min(config.model.logit_chunk, length) * model_config.num_embed
  return {
    "parameters": size(state.params), "target and copies": size((state.target, state.copies)),
    "optimiser state": size(state.opt_state), "reference": size(compute_shapes),
    "judge": size(judge) if judge else 0,
    "weights for decoding": num_models * size(compute_shapes, tensor_axis),
    "cache for decoding": num_models * rows * width * column / heads,
    "gradient and update": 2 * size(state.params), "logits of a chunk": logits / mesh["tensor"],
    "activations": micro_batch * width * dtype.itemsize * inside,
  }  # fmt: skip


def peak(parts: dict[str, int | float]) -> float:
  """Returns the bytes that an estimate needs at one time."""
  phases = (sum(parts[name] for name in names) for names in PHASES.values())
  return sum(parts[name] for name in HELD) + max(phases)


def _activations(model_config: gemma.GemmaConfig, remat: bool, width: int) -> int:
  """Returns how many numbers a token's activations are: layers' inputs, and values inside."""
  heads = model_config.num_heads + 2 * model_config.num_kv_heads
  inside = 8 * model_config.embed_dim + 4 * model_config.hidden_dim
  inside += 2 * heads * model_config.head_dim + 3 * model_config.num_heads * width
  if not remat:
    return model_config.num_layers * inside
  period, _, _ = gemma.pattern(model_config)
  return model_config.num_layers * model_config.embed_dim + period * inside


def advice(config: ConfigDict, mesh: dict[str, int], bytes_needed: float, room: float) -> list[str]:
  """Returns changes that together are enough, in order; one line where they are not."""
  rows = mesh["data"] * mesh["fsdp"]
  micro = max(1, min(8, config.prompts.batch_size // rows))
  savings = (  # each in addition to those before it
    ("optimizer.name", "adafactor", "Adam's two moments go"),
    ("model.remat", True, "activations are computed again in the backward pass"),
    ("optimizer.micro_batches", micro, "so many parts have activations one after the other"),
    ("model.logit_chunk", 4, "fewer columns have logits at one time"),
    ("prompts.batch_size", rows * micro, "fewer responses are sampled at one time"),
    ("model.lora.rank", 16, "adapters are trained instead of all parameters"),
    ("algorithm.name", "reg_self_play", "no target: another algorithm, so the last resort"),
  )
  lines, smaller = [], config.copy_and_resolve_references().unlock()
  before = peak(estimate(smaller, mesh))
  for field, value, why in savings:
    smaller.update_from_flattened_dict({field: value})
    after = peak(estimate(smaller, mesh))
    if after < before:
      reduced = bytes_needed + after - before
      lines.append(f"{field} = {value}: {bytes_needed / GIB:.2f} -> {reduced / GIB:.2f} GiB; {why}")
      bytes_needed, before = reduced, after
    if bytes_needed <= room:
      return [*lines, "Then it fits."]
  single = mesh == ONE_DEVICE
  devices = "one such device: a smaller model, or several" if single else "these devices: more"
  return [f"No setting makes it fit {devices} (docs/tpu.md)."]


def table(config: ConfigDict, device: str) -> str:
  """Returns the estimate for one device of DEVICES as Markdown, with advice if it does not fit."""
  model_config = gemma.preset(config.model.preset, **config.model.changes)
  parts, room = estimate(config), CHIPS[DEVICES[device]].hbm
  total = peak(parts)
  count = sum(leaf.size for leaf in jax.tree.leaves(gemma.shapes(model_config)))
  rows = [[name, f"{x / GIB:.3f}"] for name, x in {**parts, "at one time": total}.items()]
  lines = [
    f"{config.model.preset}: {count:,} parameters, {config.algorithm.name}, computing in"
    f" {config.model.dtype}",
    report.markdown_table(["resident", "GiB"], rows),
    f"{device} has {room / GIB} GiB: " + ("fits" if total <= room else "does not fit"),
  ]
  if device == "T4" and config.model.dtype == "bfloat16":
    lines.append("A T4 has no native bfloat16: set model.dtype = float32.")
  if total > room:
    lines += advice(config, ONE_DEVICE, total, room)
  return "\n\n".join(lines)


def judge_shapes(config: ConfigDict) -> Params | None:
  """Returns the shapes of a judge's parameters; None where it is not a model."""
  if config.name not in ("gemma", "gemma_text", "bradley_terry"):
    return None
  shapes = gemma.shapes(gemma.preset(config.model.preset, **config.model.changes))
  if config.name == "bradley_terry":
    shapes = jax.eval_shape(bradley_terry.add_head, shapes, jax.random.key(0))
  return as_type(shapes, config.model.dtype)


def as_type(shapes: Params, dtype: DTypeLike) -> Params:
  """Returns shapes of arrays of another type."""
  return jax.eval_shape(lambda tree: gemma.cast(tree, dtype), shapes)


def bytes_per_device(tree: Any) -> int:
  """Returns the bytes that one device holds of a tree of arrays or shapes with shardings."""
  return sum(size for *_, size in sharding.describe(tree))

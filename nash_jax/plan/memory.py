"""Estimates the memory of an online run on one device from shapes, and how to reduce it."""

import functools
import os
from typing import Any, NamedTuple

import jax
from jax import numpy as jnp
from jax.sharding import AbstractMesh
from jax.typing import DTypeLike
from ml_collections import ConfigDict

from nash_jax import judges, report, update
from nash_jax.config.checks import judged_by_reference
from nash_jax.models import gemma, logprobs, lora, sharding
from nash_jax.objectives import algorithms
from nash_jax.types import Params
from nash_jax.validation import one_of

GIB = 2**30
ONE_DEVICE = {"data": 1, "fsdp": 1, "tensor": 1}


class Chip(NamedTuple):
  """A device's bytes, and its published peaks: bfloat16 FLOP/s and bytes/s of memory."""

  hbm: float
  flops: float
  bandwidth: float


# {jax's device kind: Chip}. TPU: memory that the compiler allows; peaks from
# cloud.google.com/tpu/docs. GPU: data sheets (dense), without memory that the driver reserves.
CHIPS = {
  "TPU v5 lite": Chip(15.75 * GIB, 197e12, 819e9),
  "TPU v5": Chip(95.73 * GIB, 459e12, 2765e9),
  "TPU v6 lite": Chip(31.24 * GIB, 918e12, 1640e9),
  "Tesla T4": Chip(15.0 * GIB, 65e12, 320e9),
  "NVIDIA L4": Chip(22.0 * GIB, 121e12, 300e9),
  "NVIDIA A100-SXM4-40GB": Chip(39.5 * GIB, 312e12, 1555e9),
  "NVIDIA A100-SXM4-80GB": Chip(79.0 * GIB, 312e12, 2039e9),
  "NVIDIA H100 80GB HBM3": Chip(78 * GIB, 989e12, 3350e9),
  "NVIDIA H200": Chip(139 * GIB, 989e12, 4800e9),
}
CPU = "cpu"
# Accelerators of notebooks: {name they are sold under: (jax's device kind, number)}.
DEVICES = {
  "T4": ("Tesla T4", 1), "2 x T4": ("Tesla T4", 2), "L4": ("NVIDIA L4", 1),
  "A100": ("NVIDIA A100-SXM4-40GB", 1), "A100-80GB": ("NVIDIA A100-SXM4-80GB", 1),
  "H100": ("NVIDIA H100 80GB HBM3", 1), "v5e-1": ("TPU v5 lite", 1), "v5e-8": ("TPU v5 lite", 8),
  "v6e-1": ("TPU v6 lite", 1), "CPU": (CPU, 1),
}  # fmt: skip
PREALLOCATED = 0.75  # share of a GPU that jax takes, unless this variable sets another:
FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"
_NO_BFLOAT16 = ("Tesla T4", CPU)  # slower in bfloat16, which they have to emulate


class Device(NamedTuple):
  """The devices that a run is estimated for.

  Attributes:
    name: a name of DEVICES, or jax's own.
    kind: jax's device kind.
    number: how many there are, all of the same kind.
    room: bytes that a program may use on each; 0 if unknown.
  """

  name: str
  kind: str
  number: int
  room: float

  @property
  def mesh(self) -> dict[str, int]:
    """Mesh sizes for the notebook's config, in which all devices split the parameters."""
    return {"data": 1, "fsdp": self.number, "tensor": 1}

  @property
  def native_bfloat16(self) -> bool:
    return self.kind not in _NO_BFLOAT16


def named(name: str) -> Device:
  """Returns a device of DEVICES; the CPU is this machine's."""
  one_of("device", name, DEVICES)
  kind, count = DEVICES[name]
  return Device(name, kind, count, _room(kind))


def detect(devices: list[jax.Device] | None = None) -> Device:
  """Returns jax's devices here, all by default; memory that jax reports takes precedence."""
  devices = devices or jax.devices()
  kind, count = devices[0].device_kind, len(devices)
  kind, limit = (CPU, 0) if devices[0].platform == CPU else (kind, _limit(devices[0]))
  names = {value: name for name, value in DEVICES.items()}
  plain = f"{count} x {kind}" if count > 1 else kind
  return Device(names.get((kind, count), plain), kind, count, limit or _room(kind))


def _limit(device: jax.Device) -> int:
  """Returns the bytes that programs may use according to the device; 0 if it does not say."""
  return (device.memory_stats() or {}).get("bytes_limit", 0)


def _room(kind: str) -> float:
  if kind == CPU:
    return host_memory()
  if kind not in CHIPS:
    return 0
  preallocated = 1.0 if kind.startswith("TPU") else float(os.environ.get(FRACTION, PREALLOCATED))
  return CHIPS[kind].hbm * preallocated


def host_memory(limit_file: str = "/sys/fs/cgroup/memory.max") -> int:
  """Returns the bytes of this machine's memory, or of what its container may use."""
  memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  if os.path.exists(limit_file):
    with open(limit_file) as file:
      limit = file.read().strip()
    memory = min(memory, int(limit)) if limit.isdigit() else memory
  return memory


# Parts of an estimate: those held all the time, and those that two phases add.
HELD = (
  "parameters", "target and copies", "optimiser state", "reference", "judge",
  "Python, libraries and compiler", "copy that is saved",
)  # fmt: skip
PHASES = {
  "sample": ("weights for decoding", "cache for decoding"),
  "update": ("gradient and update", "logits of a chunk", "activations", "float32 of the embedding"),
}
# Memory of a run on a CPU besides its arrays; measured with Gemma 3 270M.
PROCESS = 3.0 * GIB


def estimate(
  config: ConfigDict, mesh: dict[str, int] = ONE_DEVICE, kind: str = ""
) -> dict[str, int | float]:
  """Returns {part of a run: bytes on one device}, from shapes alone.

  The parts of HELD are exact on an accelerator. "activations" is a lower bound: what one layer of
  the backward pass needs, and what all layers keep for it. On a CPU the arrays share the memory
  with the process, a checkpoint being written is a second copy of the state, and a bfloat16 product
  takes its operands in float32.

  Args:
    config: an online run's; its weights need not exist.
    mesh: sizes of data, fsdp and tensor.
    kind: jax's device kind; "cpu" adds the host's own parts.
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
  # A table of inputs by layer has no gradient, and is read where it lies.
  trained, _ = lora.split(state.params)
  decoding_shapes, _ = lora.split(compute_shapes)

  def size(tree, mesh=all_axes):
    return bytes_per_device(sharding.abstract(tree, sharding.shardings(tree, mesh)))

  rows = config.prompts.batch_size * config.algorithm.samples / (mesh["data"] * mesh["fsdp"])
  # A method that reads pairs decodes where it is evaluated alone.
  decoded = config.evaluation.prompts / (mesh["data"] * mesh["fsdp"]) if method.offline else rows
  length = config.sampling.max_tokens
  width = config.prompts.max_tokens + length
  num_models = 2 if "mixture" in (method.player, method.opponent) else 1
  heads = mesh["tensor"] if model_config.num_kv_heads % mesh["tensor"] == 0 else 1
  cache = jax.eval_shape(lambda: gemma.init_cache(model_config, 1, 1, dtype))
  column = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
  micro_batch = rows / config.optimizer.micro_batches
  inside = _activations(model_config, config.model.remat, width)
  # Each device has the logits of its rows or of its part of the vocabulary: the same number.
  logits = 3 * 4 * micro_batch * min(config.model.logit_chunk, length) * model_config.num_embed
  own_judge = judged_by_reference(config, mesh)
  held = {
    "parameters": size(state.params), "target and copies": size((state.target, state.copies)),
    "optimiser state": size(state.opt_state),
  }  # fmt: skip
  wide = 4 * model_config.num_embed * model_config.embed_dim * (1 if config.model.lora.rank else 2)
  on_host = {
    "Python, libraries and compiler": PROCESS, "copy that is saved": sum(held.values()),
    "float32 of the embedding": wide if dtype == jnp.bfloat16 else 0,
  }  # fmt: skip
  return {
    **held, "reference": size(compute_shapes),
    "judge": size(judge) if judge and not own_judge else 0,
    "weights for decoding": num_models * size(decoding_shapes, tensor_axis),
    "cache for decoding": num_models * decoded * width * column / heads,
    "gradient and update": 2 * size(trained), "logits of a chunk": logits / mesh["tensor"],
    "activations": micro_batch * width * dtype.itemsize * inside,
    **(on_host if kind == CPU else {}),
  }  # fmt: skip


def peak(parts: dict[str, int | float]) -> float:
  """Returns the most bytes that an estimate needs at any time."""
  phases = (sum(parts.get(name, 0) for name in names) for names in PHASES.values())
  return sum(parts.get(name, 0) for name in HELD) + max(phases)


def _activations(model_config: gemma.GemmaConfig, remat: bool, width: int) -> int:
  """Returns the number of activations per token: inputs of layers and values inside them."""
  kv_heads, head_dim = map(max, *map(model_config.kv_shape, (gemma.LOCAL, gemma.GLOBAL)))
  heads = model_config.num_heads + 2 * kv_heads
  hidden_dim = max(model_config.hidden_dim, model_config.override_kv_shared_ffw_hidden or 0)
  inside = 8 * model_config.embed_dim + 4 * hidden_dim
  inside += 2 * heads * head_dim + 3 * model_config.num_heads * width
  columns = model_config.num_layers * model_config.per_layer_input_dim
  if not remat:
    return model_config.num_layers * inside + 2 * columns
  # What is computed again at one time: a layer of Gemma 4, whose runs are scanned; else a pattern.
  layers = 1 if model_config.value_norm else gemma.pattern(model_config)[0]
  return model_config.num_layers * model_config.embed_dim + layers * inside + 2 * columns


def advice(
  config: ConfigDict, mesh: dict[str, int], bytes_needed: float, room: float, kind: str = ""
) -> list[str]:
  """Returns changes, in order, that together suffice; if none do, one line that says so."""
  rows = mesh["data"] * mesh["fsdp"]
  micro = max(1, min(8, config.prompts.batch_size // rows))
  savings = (  # each is added to those before it
    ("optimizer.name", "adafactor", "without Adam's two moments"),
    ("model.remat", True, "activations are computed again in the backward pass"),
    ("optimizer.micro_batches", micro, "only one of so many parts has activations at a time"),
    ("model.logit_chunk", 4, "fewer columns have logits at a time"),
    ("prompts.batch_size", rows * micro, "fewer responses are sampled at a time"),
    ("model.lora.rank", 16, "adapters are trained instead of all parameters"),
    ("model.dtype", "bfloat16", "halves what computes; slower if it is not native"),
    ("algorithm.name", "reg_self_play", "no target: another algorithm, so the last resort"),
  )
  lines, smaller = [], config.copy_and_resolve_references().unlock()
  before = peak(estimate(smaller, mesh, kind))
  for field, value, why in savings:
    smaller.update_from_flattened_dict({field: value})
    if field == "model.dtype" and config.judge.model.weights == config.model.weights:
      smaller.judge.model.dtype = value
    after = peak(estimate(smaller, mesh, kind))
    if after < before:
      reduced = bytes_needed + after - before
      lines.append(f"{field} = {value}: {bytes_needed / GIB:.2f} -> {reduced / GIB:.2f} GiB; {why}")
      bytes_needed, before = reduced, after
    if bytes_needed <= room:
      return [*lines, "Then it fits."]
  single = mesh == ONE_DEVICE
  instead = "a smaller model, or several devices" if single else "a smaller model, or more devices"
  return [f"No setting makes it fit: use {instead} (docs/tpu.md)."]


def describe(device: Device) -> str:
  """Returns a line or two on a device."""
  if not device.room:
    known = ", ".join(sorted({*CHIPS}))
    return (
      f"{device.name}: jax runs on it, but does not say how much memory it has, and it is none of"
      f" {known}. Compare the sum below with its data sheet."
    )
  room = f"{device.name}: {device.room / GIB:.1f} GiB for a program"
  if device.kind == CPU:
    return f"{room}, all of this machine's memory. Enough for the storyteller, and to try a Gemma."
  each = " on each" if device.number > 1 else ""
  gpu = device.kind in CHIPS and not device.kind.startswith("TPU")
  share = device.room / CHIPS[device.kind].hbm if gpu else 1
  more = (
    f", {share:.0%} of it: set {FRACTION}=.92 before jax starts for more" if share < 0.9 else ""
  )
  slow = "" if device.native_bfloat16 else ". It has no native bfloat16"
  return f"{room}{each}{more}{slow}."


def table(config: ConfigDict, device: Device | str) -> str:
  """Returns the estimate for a device as Markdown, with advice if it does not fit.

  Args:
    device: a device, or its name in DEVICES.
  """
  device = named(device) if isinstance(device, str) else device
  model_config = gemma.preset(config.model.preset, **config.model.changes)
  parts, room = estimate(config, device.mesh, device.kind), device.room
  total = peak(parts)
  count = sum(leaf.size for leaf in jax.tree.leaves(gemma.shapes(model_config)))
  rows = [[name, f"{x / GIB:.3f}"] for name, x in {**parts, "at one time": total}.items()]
  once = (
    ["The judge is the reference, so its weights count once."]
    if judged_by_reference(config, device.mesh)
    else []
  )
  lines = [
    f"{config.model.preset}: {count:,} parameters, {config.algorithm.name}, computing in"
    f" {config.model.dtype}",
    report.markdown_table(["resident", "GiB"], rows),
    *once,
    describe(device),
  ]
  if config.model.dtype == "bfloat16" and not device.native_bfloat16:
    lines.append(f"A {device.name} has no native bfloat16: model.dtype = float32 is faster.")
  if not room:
    return "\n\n".join(lines)
  fits = f"{total / GIB:.2f} of {room / GIB:.2f} GiB: " + (
    "fits" if total <= room else "does not fit"
  )
  more = advice(config, device.mesh, total, room, device.kind) if total > room else []
  return "\n\n".join([*lines, fits, *more])


def judge_shapes(config: ConfigDict) -> Params | None:
  """Returns the shapes of a judge's parameters; None if the judge is not a model."""
  if config.name not in judges.MODELS:
    return None
  model_config = gemma.preset(config.model.preset, **config.model.changes)
  return as_type(judges.shapes(config.name, config, model_config), config.model.dtype)


def as_type(shapes: Params, dtype: DTypeLike) -> Params:
  """Returns the shapes with another dtype."""
  return jax.eval_shape(lambda tree: gemma.cast(tree, dtype), shapes)


def bytes_per_device(tree: Any) -> int:
  """Returns a tree's bytes on one device, for arrays or shapes with shardings."""
  return sum(size for *_, size in sharding.describe(tree))

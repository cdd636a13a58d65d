"""What an online run holds in one device's memory, from shapes alone, and what to change."""

import functools
import math

import jax
from jax import numpy as jnp

from nash_jax import report, update
from nash_jax.models import gemma
from nash_jax.objectives import algorithms

GIB = 2**30
DEVICES = {"T4": 15.0, "v5e-1": 15.75}  # GiB that a program may use
# Tried in this order, each on top of those before.
SAVINGS = (
  ("optimizer.name", "adafactor", "Adam's two moments go"),
  ("model.remat", True, "activations are computed again in the backward pass"),
  ("optimizer.micro_batches", 8, "an eighth of a batch has activations at one time"),
  ("model.logit_chunk", 4, "fewer columns have logits at one time"),
  ("prompts.batch_size", 8, "fewer responses are drawn at one time"),
  ("algorithm.name", "reg_self_play", "no target: another algorithm, so the last resort"),
)


def estimate(config) -> dict[str, float]:
  """Returns the bytes of each part of a run on one device; no array is made.

  Exact for parameters, optimiser state and cache. "activations" is a lower bound: what one layer
  of the backward pass needs, and what all layers keep for it.

  Args:
    config: of an online run; its weights need not exist.
  """
  a, model = config.algorithm, gemma.preset(config.model.preset, **config.model.changes)
  shapes, row = gemma.shapes(model), algorithms.row(a.name)
  state = jax.eval_shape(update.make_update(config, None).init, shapes)
  dtype = jnp.dtype(config.model.dtype)
  rows, length = config.prompts.batch_size * a.samples, config.sampling.max_tokens
  width = config.prompts.max_tokens + length
  models = 2 if "mixture" in (row.y, row.opponent) else 1
  cache = functools.partial(gemma.init_cache, model, rows, width, dtype)
  scored = rows // config.optimizer.micro_batches
  return {
    "parameters": _size(state.params),
    "target and copies": _size((state.target, state.copies)),
    "optimiser state": _size(state.opt_state),
    "reference": _count(shapes) * dtype.itemsize,
    "gradient and update": 2 * _size(shapes),
    "judge": _judge(config.judge),
    "weights for decoding": models * _count(shapes) * dtype.itemsize,
    "cache for decoding": models * _size(jax.eval_shape(cache)),
    "logits of a chunk": 3 * 4 * scored * min(config.model.logit_chunk, length) * model.num_embed,
    "activations": scored * width * dtype.itemsize * _activations(model, config.model.remat, width),
  }


def table(config, device: str) -> str:
  """Returns the estimate as Markdown, whether it fits `device`, and, if not, what to change."""
  model = gemma.preset(config.model.preset, **config.model.changes)
  parts, room = estimate(config), DEVICES[device]
  total = sum(parts.values()) / GIB
  rows = [[name, f"{size / GIB:.3f}"] for name, size in parts.items()]
  count = f"{config.model.preset}: {_count(gemma.shapes(model)):,} parameters"
  lines = [
    f"{count}, {config.algorithm.name}, computing in {config.model.dtype}",
    report.markdown_table(["resident", "GiB"], [*rows, ["all", f"{total:.3f}"]]),
    f"{device} has {room} GiB: " + ("fits" if total < room else "does not fit"),
  ]
  if device == "T4" and config.model.dtype == "bfloat16":
    lines.append("A T4 has no native bfloat16: set model.dtype = float32.")
  return "\n\n".join([*lines, *_advice(config, total, room)])


def _advice(config, total, room) -> list[str]:
  """Returns the savings that are enough, in their order; one line where they are not."""
  if total < room:
    return []
  lines, smaller = [], config.copy_and_resolve_references().unlock()
  for field, value, why in SAVINGS:
    smaller.update_from_flattened_dict({field: value})
    less = sum(estimate(smaller).values()) / GIB
    if less < total:
      lines.append(f"{field} = {value}: {total:.2f} -> {less:.2f} GiB; {why}")
      total = less
    if total < room:
      return [*lines, "Then it fits."]
  return ["No setting makes it fit one such device: a smaller model, or several (docs/tpu.md)."]


def _activations(model, remat, width) -> int:
  """Numbers a token's activations take: per layer its inputs, and a layer's own inside."""
  heads = model.num_heads + 2 * model.num_kv_heads
  inside = 8 * model.embed_dim + 4 * model.hidden_dim
  inside += 2 * heads * model.head_dim + 3 * model.num_heads * width
  period, repeats, rest = gemma.pattern(model)
  if remat:
    return (repeats + rest) * model.embed_dim + period * inside
  return model.num_layers * inside


def _judge(judge) -> int:
  if judge.name not in ("gemma", "bradley_terry"):
    return 0
  shapes = gemma.shapes(gemma.preset(judge.model.preset, **judge.model.changes))
  return _count(shapes) * jnp.dtype(judge.model.dtype).itemsize


def _count(tree) -> int:
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _size(tree) -> int:
  return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

"""Compiles a run for devices that need not exist: does it fit, and what limits each phase?"""

import functools
import math
import os
import re
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from absl import logging
from jax import numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from nash_jax import iteration, judges, report, update
from nash_jax.config import resolve
from nash_jax.config.checks import judged_by_reference
from nash_jax.data.tokenizer import BUNDLED, Tokenizer
from nash_jax.models import gemma, sharding
from nash_jax.objectives import algorithms
from nash_jax.plan import hlo_cost, memory
from nash_jax.plan.topology import devices
from nash_jax.policy import make_policy
from nash_jax.run import files
from nash_jax.types import Prompts, Responses
from nash_jax.validation import asset_path, require


class StandInTokenizer(Tokenizer):
  """Stands in for Gemma's tokenizer if its file is missing: a plan needs only lengths and ids."""

  pad_id, eos_id, bos_id, stop_ids = 0, 1, 2, (1, 107)

  def __init__(self, rows: int):
    self.path, self.size = asset_path(BUNDLED), rows

  def id_of(self, piece: str) -> int:
    return 3 + sum(piece.encode()) % 1000

  def known(self, pieces: Iterable[str]) -> dict[str, int]:
    return {piece: self.id_of(piece) for piece in pieces}

  def encode(self, text: str) -> list[int]:
    return [3] * math.ceil(len(text) / 4)

  def forbidden(self, rows: int, markers: Iterable[str] = ()) -> np.ndarray:
    return np.arange(rows) < 3

  def check_rows(self, rows: int) -> None:
    """Accepts any number of rows."""


def prepare(config: ConfigDict, count: int) -> tuple[ConfigDict, Tokenizer]:
  """Returns the resolved config for `count` devices and its tokenizer; no file needs to exist."""
  expected = "an online run's, as from configs/gemma2_2b.py"
  fix = "Plan a config of `nash-jax train`."
  require("algorithm" in config, "config", expected, sorted(config), fix)
  config = config.copy_and_resolve_references()
  model_config = gemma.preset(config.model.preset, **config.model.changes)
  missing = not os.path.exists(asset_path(config.model.tokenizer))
  same = config.judge.model.weights == config.model.weights
  for part in (config.model, config.judge.model):
    # A plan only needs to know whether judge and policy start from the same weights.
    part.weights = BUNDLED if same and part.weights else ""
    if missing or not os.path.exists(asset_path(part.tokenizer)):
      part.tokenizer = BUNDLED
  for field in ("path", "held_out_path"):  # never read
    config.prompts[field] = BUNDLED if config.prompts[field] else ""
  config.pairs.path = BUNDLED if config.pairs.path else ""
  config = resolve(config, "train", devices=count)
  if missing:
    return config, StandInTokenizer(model_config.num_embed)
  return config, Tokenizer(config.model.tokenizer, config.model.template)


def _with_sharding(tree: Any, sharding: jax.sharding.Sharding) -> Any:
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def lowerings(config: ConfigDict, tokenizer: Tokenizer, mesh: Mesh) -> dict[str, Any]:
  """Returns {phase of a run: function without arguments that lowers it}.

  Also returns as "held" what stays on the devices between phases: {name: shapes with shardings}.
  """
  model_config = gemma.preset(config.model.preset, **config.model.changes)
  judge = judges.make(config.judge, tokenizer, memory.judge_shapes(config.judge))
  programs, shardings = iteration.make_programs(config, tokenizer, model_config, judge, mesh)
  base = gemma.shapes(model_config)
  state = sharding.abstract(jax.eval_shape(programs.init, base), shardings.state)
  reference = sharding.abstract(memory.as_type(base, config.model.dtype), shardings.reference)
  judge_params = sharding.abstract(judge.params, shardings.judge)
  is_own = judged_by_reference(config, dict(mesh.shape))

  def empty() -> Prompts:
    tokens = jnp.zeros((config.prompts.batch_size, config.prompts.max_tokens), jnp.int32)
    return Prompts(tokens, tokens.astype(bool), index=tokens[:, 0])

  batched = functools.partial(_with_sharding, sharding=shardings.batch)
  prompts = batched(jax.eval_shape(empty))
  key = _with_sharding(jax.eval_shape(lambda: jax.random.key(0)), shardings.replicated)
  offline = algorithms.get(config.algorithm.name).offline
  sampled = functools.partial(programs.sample, state, reference, prompts)
  responses, opponents, _ = jax.eval_shape(_pairs(config) if offline else sampled, key)
  responses, opponents = batched((responses, opponents))
  verdict = jax.eval_shape(programs.judge, judge_params, prompts, responses, opponents, key)
  batch = update.Batch.create(prompts, responses, batched(verdict.replace(metrics={})))
  passes = _frozen_logprobs(config, tokenizer, model_config)
  frozen = sharding.jit(mesh, passes, out_shardings=shardings.batch)
  phases = {
    "held": {
      "parameters": state.params, "target and copies": (state.target, state.copies),
      "optimiser state": state.opt_state, "reference": reference,
      "judge": {} if is_own else judge_params,
    },
    "sample": lambda: programs.sample.lower(state, reference, prompts, key),
    "judge": lambda: programs.judge.lower(judge_params, prompts, responses, opponents, key),
    "log_probabilities": lambda: frozen.lower(state, reference, batch),
    "update": lambda: programs.train_step.lower(state, reference, batch),
  }  # fmt: skip
  absent = ("sample", "judge") if offline else ()
  return {name: phase for name, phase in phases.items() if name not in absent}


def _pairs(config: ConfigDict) -> Callable:
  """Returns a function with the results of `Programs.sample`, of a method that reads pairs."""

  def pairs(key):
    tokens = jnp.zeros((config.prompts.batch_size, 2, config.sampling.max_tokens), jnp.int32)
    logp, mask = tokens.astype(jnp.float32), tokens.astype(bool)
    return Responses(tokens, mask, logp, logp, mask[..., 0]), None, jnp.sum(mask)

  return pairs


def _frozen_logprobs(config: ConfigDict, tokenizer, model_config: gemma.GemmaConfig) -> Callable:
  """Returns (state, reference, batch) -> log-probabilities of the roles that have no gradient."""
  policy = make_policy(config.model, config.sampling, tokenizer, model_config)
  rule = update.make_update(config, policy.logprobs)
  method = algorithms.get(config.algorithm.name)
  roles = dict.fromkeys(("reference", *method.role_weights(config.algorithm)))

  def frozen(state, reference, batch):
    players, responses = rule.players(state, reference), batch.responses
    evaluated = {"prompts": batch.prompts, "tokens": responses.tokens, "mask": responses.mask}
    return {role: policy.logprobs(players[role], **evaluated)[0] for role in roles}

  return frozen


def phase(lowered: jax.stages.Lowered, mesh: Mesh) -> dict[str, Any]:
  """Compiles one phase and returns its figures per device.

  If it does not fit into a device, returns only `error`, and `temp_bytes` if the compiler gives it.
  """
  start, cached = time.perf_counter(), jax.config.jax_enable_compilation_cache
  jax.config.update("jax_enable_compilation_cache", False)  # no device could load the program
  try:
    compiled: Any = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    size = re.search(r"\(([0-9.]+)([KMGT])\) exceeds", str(error))
    if "HbmOom" not in str(error) or size is None:
      raise
    bytes_needed = int(float(size[1]) * 2 ** (10 * " KMGT".index(size[2])))
    return {"temp_bytes": bytes_needed, "error": "needs more than the device's memory by itself"}
  finally:
    jax.config.update("jax_enable_compilation_cache", cached)
  seconds = time.perf_counter() - start
  memory_used, work = compiled.memory_analysis(), hlo_cost.analyse(compiled.as_text())
  roofline_seconds, bound = None, None
  if chip := memory.CHIPS.get(mesh.devices.flat[0].device_kind):
    compute, traffic = work.flops / chip.flops, work.bytes / chip.bandwidth
    roofline_seconds, bound = max(compute, traffic), "memory" if traffic > compute else "compute"
  return {
    "argument_bytes": memory_used.argument_size_in_bytes,
    "temp_bytes": memory_used.temp_size_in_bytes,
    # Outputs that reuse a donated argument take no extra memory.
    "output_bytes": memory_used.output_size_in_bytes - memory_used.alias_size_in_bytes,
    "flops": work.flops, "bytes_accessed": work.bytes, "roofline_seconds": roofline_seconds,
    "bound": bound, "compile_seconds": round(seconds, 1),
  }  # fmt: skip


def compile(config: ConfigDict, device_list: list) -> dict[str, Any]:
  """Compiles all phases of a run for these devices, and returns the plan that the job writes."""
  config, tokenizer = prepare(config, len(device_list))
  mesh = sharding.make_mesh(config.mesh, Mesh(np.array(device_list), ("all",)))
  lowers = lowerings(config, tokenizer, mesh)
  trees = lowers.pop("held")
  held = {name: memory.bytes_per_device(tree) for name, tree in trees.items()}
  device_kind, phases = device_list[0].device_kind, {}
  for name, lower in lowers.items():
    logging.info("compiling %s for %d x %s", name, len(device_list), device_kind)
    phases[name] = phase(lower(), mesh)
  algorithm, rank = config.algorithm, config.model.lora.rank
  chip, resident = memory.CHIPS.get(device_kind), sum(held.values())
  needed = resident + max(map(_peak, phases.values()))
  plan = {
    "run": f"{config.model.preset}, {f'LoRA {rank}, ' if rank else ''}{algorithm.name}, "
    f"{config.prompts.batch_size} x {algorithm.samples} responses, "
    f"{config.prompts.max_tokens} + {config.sampling.max_tokens} tokens",
    "devices": len(device_list), "device_kind": device_kind, "mesh": dict(mesh.shape),
    "tokenizer": "a stand-in" if isinstance(tokenizer, StandInTokenizer) else tokenizer.path,
    "hbm_bytes": chip and int(chip.hbm), "resident_bytes": resident, "resident": held,
    "need_bytes": needed, "fits": chip and needed <= chip.hbm, "phases": phases,
    "arrays": sharding.describe(trees["parameters"]),
  }  # fmt: skip
  if chip:
    plan["largest_batch_size"] = _largest(plan, config)
    plan["advice"] = [] if plan["fits"] else memory.advice(config, plan["mesh"], needed, chip.hbm)
  return plan


def _peak(figures: dict[str, Any]) -> int:
  return figures["temp_bytes"] + figures.get("output_bytes", 0)


def _largest(plan: dict[str, Any], config: ConfigDict) -> int:
  """Estimates the largest batch that fits: weights are fixed, and the rest grows with the rows."""
  parts, size = memory.estimate(config, plan["mesh"]), config.prompts.batch_size
  fixed = {"sample": parts["weights for decoding"], "update": parts["gradient and update"] / 2}
  room, limits = plan["hbm_bytes"] - plan["resident_bytes"], []
  for name, figures in plan["phases"].items():
    growing = max(1, _peak(figures) - fixed.get(name, 0))
    limits.append(size * (room - fixed.get(name, 0)) / growing)
  step = plan["mesh"]["data"] * plan["mesh"]["fsdp"] * config.optimizer.micro_batches
  return max(0, int(min(limits) // step * step))


def _gib(size: float, digits: int = 3) -> str:
  return f"{size / memory.GIB:.{digits}f}"


def _phase_row(name: str, figures: dict[str, Any]) -> list:
  """Returns a phase's row in the last table of `text`."""
  peak = _gib(_peak(figures))
  if "error" in figures:
    return [name, peak, figures["error"], *["—"] * 4]
  flops, moved = f"{figures['flops'] / 1e12:.3g}", f"{figures['bytes_accessed'] / 1e9:.3g}"
  bound = figures["bound"] or "—"
  seconds = f"{figures['roofline_seconds']:.3g}" if figures["bound"] else "—"
  return [name, peak, flops, moved, seconds, bound, figures["compile_seconds"]]


def text(plan: dict[str, Any]) -> str:
  """Returns a plan as Markdown."""
  resident = {**plan["resident"], "all": plan["resident_bytes"]}
  held = [[name, _gib(size)] for name, size in resident.items()]
  phases = [_phase_row(name, figures) for name, figures in plan["phases"].items()]
  header = ["phase", "GiB besides", "TFLOP", "GB moved", "s at best", "bound by", "s to compile"]
  mesh = ", ".join(f"{axis}={size}" for axis, size in plan["mesh"].items())
  arrays = [[*line, f"{size / 2**20:.2f}"] for *line, size in plan["arrays"]]
  lines = [
    f"{plan['run']} on {plan['devices']} x {plan['device_kind']} ({mesh}), "
    f"tokenizer: {plan['tokenizer']}; all figures are per device",
    report.markdown_table(["parameter", "shape", "split over", "MiB"], arrays),
    report.markdown_table(["held between phases", "GiB"], held),
    report.markdown_table(header, phases),
  ]
  if plan["hbm_bytes"]:
    fits = "fits" if plan["fits"] else "does not fit"
    lines.append(
      f"{_gib(plan['need_bytes'], 2)} of {_gib(plan['hbm_bytes'], 2)} GiB: {fits}; the largest"
      f" prompts.batch_size that fits is about {plan['largest_batch_size']}"
    )
  return "\n\n".join([*lines, *plan.get("advice", [])])


def run(config: ConfigDict, topology: str = "v5e:4x4", json: str = "") -> dict[str, Any]:
  """Plans an online run for a topology: prints the tables, and writes them to `json` if given.

  Raises:
    ValueError: a bad config or topology, before anything is compiled.
  """
  plan = {"topology": topology, **compile(config, devices(topology))}
  print(text(plan))
  if json:
    files.write_json(json, plan)
  return plan

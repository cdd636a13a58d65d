"""Compiles a run for devices that need not be there: does it fit, and what bounds each phase."""

import functools
import json as jsonlib
import math
import os
import pathlib
import re
import time

import jax
import numpy as np
from absl import logging
from jax import numpy as jnp
from jax.sharding import Mesh

from nash_jax import iteration, judges, report, update
from nash_jax.config import resolve
from nash_jax.data.tokenizer import BUNDLED, Tokenizer
from nash_jax.models import gemma, sharding
from nash_jax.objectives import algorithms
from nash_jax.plan import hlo_cost, memory
from nash_jax.plan.topology import devices
from nash_jax.policy import make_policy
from nash_jax.types import Prompts
from nash_jax.validation import asset_path, require


class StandInTokenizer:
  """What a plan needs of Gemma's tokenizer where its file is absent: lengths of texts, and ids."""

  pad_id, eos_id, bos_id, stop_ids = 0, 1, 2, (1, 107)

  def __init__(self, rows: int):
    self.path, self.size = asset_path(BUNDLED), rows

  def id_of(self, piece: str) -> int:
    return 3 + sum(piece.encode()) % 1000

  def encode(self, text: str) -> list[int]:
    return [3] * math.ceil(len(text) / 4)

  def forbidden(self, rows: int) -> np.ndarray:
    return np.arange(rows) < 3

  def check_rows(self, rows: int) -> None:
    """Any model has its rows."""


def prepare(config, count: int):
  """Returns (the resolved config for so many devices, its tokenizer); no file needs to exist."""
  require(
    "algorithm" in config,
    "config",
    "an online run's, as from configs/gemma2_2b.py",
    sorted(config),
    "Plan a config of `nash-jax train`.",
  )
  config = config.copy_and_resolve_references()
  model_config = gemma.preset(config.model.preset, **config.model.changes)
  missing = not os.path.exists(asset_path(config.model.tokenizer))
  for part in (config.model, config.judge.model):
    part.weights = ""
    if missing or not os.path.exists(asset_path(part.tokenizer)):
      part.tokenizer = BUNDLED
  config = resolve(config, "train", devices=count)
  if missing:
    return config, StandInTokenizer(model_config.num_embed)
  return config, Tokenizer(config.model.tokenizer, config.model.template)


def _with_sharding(tree, sharding):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def lowerings(config, tokenizer, mesh: Mesh) -> dict:
  """Returns how to lower each phase of a run, by name: functions without arguments.

  Also under "held": what lies on the devices between the phases, by name, as shapes with shardings.
  """
  model_config = gemma.preset(config.model.preset, **config.model.changes)
  judge = judges.make(config.judge, tokenizer, memory.judge_shapes(config.judge))
  programs, where = iteration.make_programs(config, tokenizer, model_config, judge, mesh)
  base = gemma.shapes(model_config)
  state = sharding.abstract(jax.eval_shape(programs.init, base), where.state)
  reference = sharding.abstract(memory.as_type(base, config.model.dtype), where.reference)
  judge_params = sharding.abstract(judge.params, where.judge)
  size, width = config.prompts.batch_size, config.prompts.max_tokens
  batched = functools.partial(_with_sharding, sharding=where.batch)
  prompts = batched(
    Prompts(
      jax.ShapeDtypeStruct((size, width), jnp.int32),
      jax.ShapeDtypeStruct((size, width), bool),
      jax.ShapeDtypeStruct((size,), jnp.int32),
    )
  )
  key = _with_sharding(jax.eval_shape(lambda: jax.random.key(0)), where.replicated)
  responses, opponents, _ = jax.eval_shape(programs.sample, state, reference, prompts, key)
  responses, opponents = batched((responses, opponents))
  verdict = jax.eval_shape(programs.judge, judge_params, prompts, responses, opponents, key)
  batch = update.Batch.create(prompts, responses, batched(verdict.replace(metrics={})))
  frozen = sharding.jit(
    mesh, _frozen_logprobs(config, tokenizer, model_config), out_shardings=where.batch
  )
  return {
    "held": {
      "parameters": state.params,
      "target and copies": (state.target, state.copies),
      "optimiser state": state.opt_state,
      "reference": reference,
      "judge": judge_params,
    },
    "sample": lambda: programs.sample.lower(state, reference, prompts, key),
    "judge": lambda: programs.judge.lower(judge_params, prompts, responses, opponents, key),
    "log_probabilities": lambda: frozen.lower(state, reference, batch),
    "update": lambda: programs.train_step.lower(state, reference, batch),
  }


def _frozen_logprobs(config, tokenizer, model_config):
  """Returns (state, reference, batch) -> log-probabilities by role: the passes without gradient."""
  policy = make_policy(config.model, config.sampling, tokenizer, model_config)
  rule = update.make_update(config, policy.logprobs)
  method = algorithms.get(config.algorithm.name)
  roles = dict.fromkeys(("reference", *method.role_weights(config.algorithm)))

  def frozen(state, reference, batch):
    params, responses = rule.players(state, reference), batch.responses
    return {
      role: policy.logprobs(
        params[role], prompts=batch.prompts, tokens=responses.tokens, mask=responses.mask
      )[0]
      for role in roles
    }

  return frozen


def phase(lowered, mesh: Mesh) -> dict:
  """Compiles one phase and returns its figures, a device each.

  Where it needs more memory than a device has, only `temp_bytes`, as far as the compiler says it,
  and `error` are known.
  """
  start, kept = time.perf_counter(), jax.config.jax_enable_compilation_cache
  jax.config.update("jax_enable_compilation_cache", False)  # no device could load it again
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if "HbmOom" not in str(error):
      raise
    size, unit = re.search(r"\(([0-9.]+)([KMGT])\) exceeds", str(error)).groups()
    return {
      "temp_bytes": int(float(size) * 2 ** (10 * " KMGT".index(unit))),
      "error": "over the device's memory by itself",
    }
  finally:
    jax.config.update("jax_enable_compilation_cache", kept)
  seconds = time.perf_counter() - start
  used, work = compiled.memory_analysis(), hlo_cost.analyse(compiled.as_text())
  chip = memory.CHIPS.get(mesh.devices.flat[0].device_kind)
  times = chip and {"compute": work.flops / chip.flops, "memory": work.bytes / chip.bandwidth}
  bound = times and max(times, key=times.get)
  return {
    "argument_bytes": used.argument_size_in_bytes,
    "temp_bytes": used.temp_size_in_bytes,
    # What a donated argument becomes takes no further memory.
    "output_bytes": used.output_size_in_bytes - used.alias_size_in_bytes,
    "flops": work.flops,
    "bytes_accessed": work.bytes,
    "roofline_seconds": times and times[bound],
    "bound": bound,
    "compile_seconds": round(seconds, 1),
  }


def compile(config, device_list: list) -> dict:
  """Compiles all phases of a run for these devices; returns the plan that the job writes."""
  config, tokenizer = prepare(config, len(device_list))
  mesh = sharding.make_mesh(config.mesh, Mesh(np.array(device_list), ("all",)))
  parts = lowerings(config, tokenizer, mesh)
  trees = parts.pop("held")
  held = {name: memory.share(tree) for name, tree in trees.items()}
  phases = {}
  for name, lower in parts.items():
    logging.info("compiling %s for %d x %s", name, len(device_list), device_list[0].device_kind)
    phases[name] = phase(lower(), mesh)
  a, rank = config.algorithm, config.model.lora.rank
  chip, resident = memory.CHIPS.get(device_list[0].device_kind), sum(held.values())
  need = resident + max(map(_peak, phases.values()))
  plan = {
    "run": f"{config.model.preset}, {f'LoRA {rank}, ' if rank else ''}{a.name}, "
    f"{config.prompts.batch_size} x {a.samples} responses, "
    f"{config.prompts.max_tokens} + {config.sampling.max_tokens} tokens",
    "devices": len(device_list),
    "device_kind": device_list[0].device_kind,
    "mesh": dict(mesh.shape),
    "tokenizer": "a stand-in" if isinstance(tokenizer, StandInTokenizer) else tokenizer.path,
    "hbm_bytes": chip and int(chip.hbm),
    "resident_bytes": resident,
    "resident": held,
    "need_bytes": need,
    "fits": chip and need <= chip.hbm,
    "phases": phases,
    "arrays": sharding.describe(trees["parameters"]),
  }
  if chip:
    plan["largest_batch_size"] = _largest(plan, config)
    plan["advice"] = [] if plan["fits"] else memory.advice(config, plan["mesh"], need, chip.hbm)
  return plan


def _peak(figures: dict) -> int:
  return figures["temp_bytes"] + figures.get("output_bytes", 0)


def _largest(plan: dict, config) -> int:
  """Returns about the largest batch that fits: what rows do not set is fixed, the rest follows."""
  parts, size = memory.estimate(config, plan["mesh"]), config.prompts.batch_size
  fixed = {"sample": parts["weights for decoding"], "update": parts["gradient and update"] / 2}
  room, limits = plan["hbm_bytes"] - plan["resident_bytes"], []
  for name, figures in plan["phases"].items():
    rest = max(1, _peak(figures) - fixed.get(name, 0))
    limits.append(size * (room - fixed.get(name, 0)) / rest)
  step = plan["mesh"]["data"] * plan["mesh"]["fsdp"] * config.optimizer.micro_batches
  return max(0, int(min(limits) // step * step))


def text(plan: dict) -> str:
  """Returns a plan as Markdown, for reading."""
  held = [[name, f"{x / memory.GIB:.3f}"] for name, x in plan["resident"].items()]
  held.append(["all", f"{plan['resident_bytes'] / memory.GIB:.3f}"])
  phases = [
    [
      name,
      f"{_peak(p) / memory.GIB:.3f}",
      *(
        [p["error"]]
        if "error" in p
        else [
          f"{p['flops'] / 1e12:.3g}",
          f"{p['bytes_accessed'] / 1e9:.3g}",
          f"{p['roofline_seconds']:.3g}" if p["bound"] else "—",
          p["bound"] or "—",
          p["compile_seconds"],
        ]
      ),
    ]
    for name, p in plan["phases"].items()
  ]
  header = ["phase", "GiB besides", "TFLOP", "GB moved", "s at best", "bound by", "s to compile"]
  for line in phases:
    line += ["—"] * (len(header) - len(line))
  mesh = ", ".join(f"{axis}={size}" for axis, size in plan["mesh"].items())
  arrays = [[*line, f"{size / 2**20:.2f}"] for *line, size in plan["arrays"]]
  lines = [
    f"{plan['run']} on {plan['devices']} x {plan['device_kind']} ({mesh}), "
    f"tokenizer: {plan['tokenizer']}; every figure is one device's",
    report.markdown_table(["parameter", "shape", "split over", "MiB"], arrays),
    report.markdown_table(["held between phases", "GiB"], held),
    report.markdown_table(header, phases),
  ]
  if plan["hbm_bytes"]:
    lines.append(
      f"{plan['need_bytes'] / memory.GIB:.2f} of {plan['hbm_bytes'] / memory.GIB:.2f} GiB: "
      + ("fits" if plan["fits"] else "does not fit")
      + f"; the largest prompts.batch_size that does is about {plan['largest_batch_size']}"
    )
  return "\n\n".join([*lines, *plan.get("advice", [])])


def run(config, topology: str = "v5e:4x4", json: str = "") -> dict:
  """Plans an online run for a topology: prints the tables, and writes `json` if it is named.

  Raises:
    ValueError: a config or topology that cannot be, before anything is compiled.
  """
  plan = {"topology": topology, **compile(config, devices(topology))}
  print(text(plan))
  if json:
    pathlib.Path(json).write_text(jsonlib.dumps(plan, indent=2) + "\n", encoding="utf-8")
  return plan


def overview(plans: list[dict]) -> str:
  """Returns one table of several plans, a line each."""
  header = [
    "topology",
    "run",
    "mesh",
    "held GiB",
    "at most GiB",
    "of GiB",
    "fits",
    "largest batch",
    *(f"{name} s" for name in plans[0]["phases"]),
  ]
  rows = [
    [
      plan["topology"],
      plan["run"],
      "x".join(map(str, plan["mesh"].values())),
      *(
        f"{plan[name] / memory.GIB:.2f}" if plan[name] else "—"
        for name in ("resident_bytes", "need_bytes", "hbm_bytes")
      ),
      {True: "yes", False: "no", None: "—"}[plan["fits"]],
      plan.get("largest_batch_size", "—"),
      *(
        f"{p['roofline_seconds']:.2g} {p['bound']}" if p.get("bound") else "—"
        for p in plan["phases"].values()
      ),
    ]
    for plan in plans
  ]
  return report.markdown_table(header, rows)

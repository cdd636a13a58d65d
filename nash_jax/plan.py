"""Compiles a run for devices that need not be there: does it fit, and what bounds each phase."""

import functools
import importlib.util
import json as jsonlib
import math
import os
import pathlib
import re
import sys
import time

import jax
import numpy as np
from absl import logging
from jax import numpy as jnp
from jax.sharding import Mesh

from nash_jax import config as configs
from nash_jax import cost, judges, memory, report, tokenizer, train, update
from nash_jax.models import gemma, partition
from nash_jax.objectives import algorithms
from nash_jax.types import Prompts

SLICES = {
  **{f"{kind}-{n}": f"{kind}:{grid}" for kind in ("v5e", "v6e") for n, grid in {
    1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16",
  }.items()},
  **{f"v5p-{n}": f"v5p:{grid}" for n, grid in {  # named by cores, two a chip
    8: "2x2x1", 16: "2x2x2", 32: "2x2x4", 64: "2x4x4", 128: "4x4x4", 256: "4x4x8", 512: "4x8x8",
  }.items()},
}  # fmt: skip
LOCAL = "local"  # the devices of this machine


def devices(topology: str) -> list:
  """Returns the devices of a TPU topology, "v5e:4x4" or "v5e-16", or this machine's for "local".

  Raises:
    ValueError: no such topology (the choices are listed), or libtpu, which compiles, is missing.
  """
  if topology == LOCAL:
    return jax.devices()
  known = {*SLICES, *SLICES.values(), LOCAL}
  if not re.fullmatch(r"v(5e|5p|6e):[0-9x]+", topology):
    configs.choose("topology", topology, known)
  configs.check(
    importlib.util.find_spec("libtpu") is not None, "topology", "libtpu, which compiles for TPUs",
    "none installed",
    "pip install --editable '.[plan]', or plan for this machine: --topology=local.",
  )  # fmt: skip
  from jax.experimental import topologies

  # Nothing here is a TPU: its address is not asked for, and several plans may be made at a time.
  os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
  name = SLICES.get(topology, topology)
  try:
    return topologies.get_topology_desc(platform="tpu", topology_name=name).devices
  except jax.errors.JaxRuntimeError as error:
    choices, said = ", ".join(sorted(known)), str(error).splitlines()[0]
    raise ValueError(f"topology: got {topology!r}, expected one of {choices} ({said})") from error


class StandIn:
  """What a plan needs of Gemma's tokenizer where its file is absent: lengths of texts, and ids."""

  pad_id, eos_id, bos_id, stop_ids = 0, 1, 2, (1, 107)

  def __init__(self, rows: int):
    self.path, self.size = configs.path(tokenizer.BUNDLED), rows

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
  configs.check("algorithm" in config, "config", "an online run's, as from configs/gemma2_2b.py",
                sorted(config), "Plan a config of `nash-jax train`.")  # fmt: skip
  config = config.copy_and_resolve_references()
  model = gemma.preset(config.model.preset, **config.model.changes)
  missing = not os.path.exists(configs.path(config.model.tokenizer))
  for part in (config.model, config.judge.model):
    part.weights = ""
    if missing or not os.path.exists(configs.path(part.tokenizer)):
      part.tokenizer = tokenizer.BUNDLED
  config = configs.resolve(config, count)
  if missing:
    return config, StandIn(model.num_embed)
  return config, tokenizer.Tokenizer(config.model.tokenizer, config.model.template)


def _spread(tree, sharding):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def programs(config, tok, mesh: Mesh) -> dict:
  """Returns how to lower each phase of a run, by name: functions without arguments.

  Also under "held": what lies on the devices between the phases, by name, as shapes with shardings.
  """
  model = gemma.preset(config.model.preset, **config.model.changes)
  judge = judges.make(config.judge, tok, memory.judge_shapes(config.judge))
  do = train.functions(config, tok, model, judge, mesh)
  base = gemma.shapes(model)
  state = partition.abstract(jax.eval_shape(do.init, base), do.state)
  ref = partition.abstract(memory.as_type(base, config.model.dtype), do.ref)
  judged = partition.abstract(judge.params, do.judge)
  size, width = config.prompts.batch_size, config.prompts.max_tokens
  spread = functools.partial(_spread, sharding=do.rows)
  x = spread(Prompts(
    jax.ShapeDtypeStruct((size, width), jnp.int32), jax.ShapeDtypeStruct((size, width), bool),
    jax.ShapeDtypeStruct((size,), jnp.int32),
  ))  # fmt: skip
  key = _spread(jax.eval_shape(lambda: jax.random.key(0)), do.everywhere)
  y, against, _ = jax.eval_shape(do.sample, state, ref, x, key)
  y, against = spread((y, against))
  verdict = jax.eval_shape(do.verdict, judged, x, y, against, key)
  batch = update.Batch.of(x, y, spread(verdict.replace(metrics={})))
  frozen = partition.jit(mesh, _frozen(config, tok, model), out_shardings=do.rows)
  return {
    "held": {
      "parameters": state.params,
      "target and copies": (state.target, state.copies),
      "optimiser state": state.opt_state,
      "reference": ref,
      "judge": judged,
    },
    "sample": lambda: do.sample.lower(state, ref, x, key),
    "judge": lambda: do.verdict.lower(judged, x, y, against, key),
    "log_probabilities": lambda: frozen.lower(state, ref, batch),
    "update": lambda: do.train_step.lower(state, ref, batch),
  }


def _frozen(config, tok, model):
  """Returns (state, ref, batch) -> what the update's passes without gradient compute, by role."""
  score, _ = train.policy(config, tok, model)
  rule = update.make_update(config, score)
  row = algorithms.row(config.algorithm.name)
  roles = dict.fromkeys(("reference", *row.weights(config.algorithm)))

  def frozen(state, ref, batch):
    who, y = rule.players(state, ref), batch.responses
    return {
      role: score(who[role], prompts=batch.prompts, tokens=y.tokens, mask=y.mask)[0]
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
    return {"temp_bytes": int(float(size) * 2 ** (10 * " KMGT".index(unit))),
            "error": "over the device's memory by itself"}  # fmt: skip
  finally:
    jax.config.update("jax_enable_compilation_cache", kept)
  seconds = time.perf_counter() - start
  used, work = compiled.memory_analysis(), cost.of(compiled.as_text())
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


def compile(config, where: list) -> dict:
  """Compiles all phases of a run for `where` and returns the plan, as `nash-jax plan` writes it."""
  config, tok = prepare(config, len(where))
  mesh = partition.make_mesh(config.mesh, Mesh(np.array(where), ("all",)))
  parts = programs(config, tok, mesh)
  trees = parts.pop("held")
  held = {name: memory.share(tree) for name, tree in trees.items()}
  phases = {}
  for name, lower in parts.items():
    logging.info("compiling %s for %d x %s", name, len(where), where[0].device_kind)
    phases[name] = phase(lower(), mesh)
  a, rank = config.algorithm, config.model.lora.rank
  chip, resident = memory.CHIPS.get(where[0].device_kind), sum(held.values())
  need = resident + max(map(_peak, phases.values()))
  found = {
    "run": f"{config.model.preset}, {f'LoRA {rank}, ' if rank else ''}{a.name}, "
    f"{config.prompts.batch_size} x {a.samples} responses, "
    f"{config.prompts.max_tokens} + {config.sampling.max_tokens} tokens",
    "devices": len(where),
    "device_kind": where[0].device_kind,
    "mesh": dict(mesh.shape),
    "tokenizer": "a stand-in" if isinstance(tok, StandIn) else tok.path,
    "hbm_bytes": chip and int(chip.hbm),
    "resident_bytes": resident,
    "resident": held,
    "need_bytes": need,
    "fits": chip and need <= chip.hbm,
    "phases": phases,
    "arrays": partition.describe(trees["parameters"]),
  }
  if chip:
    found["largest_batch_size"] = _largest(found, config)
    found["advice"] = [] if found["fits"] else memory.advice(config, found["mesh"], need, chip.hbm)
  return found


def _peak(figures: dict) -> int:
  return figures["temp_bytes"] + figures.get("output_bytes", 0)


def _largest(found: dict, config) -> int:
  """Returns about the largest batch that fits: what rows do not set is fixed, the rest follows."""
  parts, size = memory.estimate(config, found["mesh"]), config.prompts.batch_size
  fixed = {"sample": parts["weights for decoding"], "update": parts["gradient and update"] / 2}
  room, limits = found["hbm_bytes"] - found["resident_bytes"], []
  for name, figures in found["phases"].items():
    rest = max(1, _peak(figures) - fixed.get(name, 0))
    limits.append(size * (room - fixed.get(name, 0)) / rest)
  step = found["mesh"]["data"] * found["mesh"]["fsdp"] * config.optimizer.micro_batches
  return max(0, int(min(limits) // step * step))


def text(found: dict) -> str:
  """Returns a plan as Markdown, for reading."""
  held = [[name, f"{x / memory.GIB:.3f}"] for name, x in found["resident"].items()]
  held.append(["all", f"{found['resident_bytes'] / memory.GIB:.3f}"])
  phases = [
    [name, f"{_peak(p) / memory.GIB:.3f}", *(
      [p["error"]] if "error" in p else [
        f"{p['flops'] / 1e12:.3g}", f"{p['bytes_accessed'] / 1e9:.3g}",
        f"{p['roofline_seconds']:.3g}" if p["bound"] else "—", p["bound"] or "—",
        p["compile_seconds"],
      ])]
    for name, p in found["phases"].items()
  ]  # fmt: skip
  header = ["phase", "GiB besides", "TFLOP", "GB moved", "s at best", "bound by", "s to compile"]
  for line in phases:
    line += ["—"] * (len(header) - len(line))
  mesh = ", ".join(f"{axis}={size}" for axis, size in found["mesh"].items())
  arrays = [[*line, f"{size / 2**20:.2f}"] for *line, size in found["arrays"]]
  lines = [
    f"{found['run']} on {found['devices']} x {found['device_kind']} ({mesh}), "
    f"tokenizer: {found['tokenizer']}; every figure is one device's",
    report.markdown_table(["parameter", "shape", "split over", "MiB"], arrays),
    report.markdown_table(["held between phases", "GiB"], held),
    report.markdown_table(header, phases),
  ]
  if found["hbm_bytes"]:
    lines.append(
      f"{found['need_bytes'] / memory.GIB:.2f} of {found['hbm_bytes'] / memory.GIB:.2f} GiB: "
      + ("fits" if found["fits"] else "does not fit")
      + f"; the largest prompts.batch_size that does is about {found['largest_batch_size']}"
    )
  return "\n\n".join([*lines, *found.get("advice", [])])


def run(config, topology: str = "v5e:4x4", json: str = "") -> dict:
  """Plans an online run for a topology: prints the tables, and writes `json` if it is named.

  Raises:
    ValueError: a config or topology that cannot be, before anything is compiled.
  """
  found = {"topology": topology, **compile(config, devices(topology))}
  print(text(found))
  if json:
    pathlib.Path(json).write_text(jsonlib.dumps(found, indent=2) + "\n", encoding="utf-8")
  return found


def overview(found: list[dict]) -> str:
  """Returns one table of several plans, a line each."""
  header = ["topology", "run", "mesh", "held GiB", "at most GiB", "of GiB", "fits", "largest batch",
            *(f"{name} s" for name in found[0]["phases"])]  # fmt: skip
  rows = [
    [
      plan["topology"], plan["run"], "x".join(map(str, plan["mesh"].values())),
      *(f"{plan[name] / memory.GIB:.2f}" if plan[name] else "—"
        for name in ("resident_bytes", "need_bytes", "hbm_bytes")),
      {True: "yes", False: "no", None: "—"}[plan["fits"]], plan.get("largest_batch_size", "—"),
      *(f"{p['roofline_seconds']:.2g} {p['bound']}" if p.get("bound") else "—"
        for p in plan["phases"].values()),
    ]
    for plan in found
  ]  # fmt: skip
  return report.markdown_table(header, rows)


if __name__ == "__main__":
  print(overview([jsonlib.loads(pathlib.Path(name).read_text()) for name in sys.argv[1:]]))

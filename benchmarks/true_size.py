"""Whole NashMP iterations of a config of true size on one accelerator, by phase.

Weights and prompts are random, since the time does not depend on the words. For sample, judge,
log-probabilities (only the update's frozen passes) and update, it prints seconds, response tokens a
second, and the share of the device's published peak: FLOP/s (MFU) or memory bandwidth, whichever
limits the phase according to nash_jax.plan.hlo_cost.

  python benchmarks/true_size.py                                      # one H200
  python benchmarks/true_size.py --config=gemma2_2b:lora              # 34 GiB: one H100, A100
  python benchmarks/true_size.py --profile=trace                      # and a trace, to explain it
  python benchmarks/true_size.py --smoke                              # tiny, any machine
  python benchmarks/true_size.py --trl-python=ENVIRONMENT/bin/python  # beside TRL 1.0.0

ENVIRONMENT is as for nash_md.py, with a torch for the accelerator. TRL's step is Nash-MD with a
judge that costs nothing, at the sizes of trl_nash_md.py's model; nash_md.py then takes our step.
"""

import argparse
import contextlib
import functools
import importlib
import itertools
import pathlib
import statistics
import subprocess
import sys
import time

import jax
import numpy as np
from jax import numpy as jnp
from jax.sharding import Mesh

from nash_jax import plan, report
from nash_jax.models import sharding
from nash_jax.plan import hlo_cost, memory

HERE = pathlib.Path(__file__).resolve().parent


def settings(args):
  """Returns the named config on one device, or its smoke variant."""
  name, _, kind = args.config.partition(":")
  c = importlib.import_module(f"nash_jax.configs.{name}").get_config(
    "smoke" if args.smoke else kind
  )
  c.mesh.update(data=1, fsdp=1, tensor=1)
  c.prompts.batch_size = c.evaluation.prompts = args.batch or c.prompts.batch_size
  c.optimizer.update(name=args.optimizer, micro_batches=args.micro_batches)
  c.judge.micro_batches = args.judge_micro_batches
  return c


def fill(shapes, seed):
  """Returns arrays of these shapes: small random numbers, ids of words, masks that are True."""
  keys = map(functools.partial(jax.random.fold_in, jax.random.key(seed)), itertools.count())

  def one(x):
    if jnp.issubdtype(x.dtype, jnp.floating):  # positive, like Adam's second moments
      return jax.random.uniform(next(keys), x.shape, x.dtype, 0.0, 0.04)
    if x.dtype == bool:
      return jnp.ones(x.shape, bool)
    return jax.random.randint(next(keys), x.shape, 5, 900, x.dtype)

  return jax.tree.map(one, shapes)


def measure(lowered, arguments, repeats, donated, folder, hlo):
  """Returns (median seconds per call without the first, cost)."""
  compiled, seconds = lowered.compile(), []
  if hlo:
    hlo.parent.mkdir(parents=True, exist_ok=True)
    hlo.write_text(compiled.as_text())
  with jax.profiler.trace(folder) if folder else contextlib.nullcontext():
    for _ in range(repeats + 1):
      start = time.perf_counter()
      out = jax.block_until_ready(compiled(*arguments))
      seconds.append(time.perf_counter() - start)
      if donated:
        arguments = (out[0], *arguments[1:])
  return statistics.median(seconds[1:]), hlo_cost.analyse(compiled.as_text())


def phases(config, tokenizer, mesh, repeats, profile, hlo):
  """Yields (phase, seconds, cost), with everything in memory that a run holds."""
  lowerings = plan.lowerings(config, tokenizer, mesh)
  lowered = {name: lower() for name, lower in lowerings.items() if name != "held"}
  shapes = {name: low.in_avals[0] for name, low in lowered.items()}
  state, reference, batch = (fill(x, i) for i, x in enumerate(shapes["update"]))
  judge_params, key = fill(shapes["judge"][0], 3), jax.random.key(0)
  opponents = shapes["judge"][3] and fill(shapes["judge"][3], 4)
  calls = {
    "sample": (state, reference, batch.prompts, key),
    "judge": (judge_params, batch.prompts, batch.responses, opponents, key),
    "log_probabilities": (state, reference, batch),
    "update": (state, reference, batch),
  }
  del state  # the update donates it
  for name, arguments in calls.items():
    folder = profile and str(pathlib.Path(profile) / name)
    text = hlo and pathlib.Path(hlo) / f"{name}.txt"
    yield name, *measure(lowered[name], arguments, repeats, name == "update", folder, text)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  add = parser.add_argument
  add("--config", default="gemma2_2b", help="a config of true size, and its variant (gemma2_2b)")
  add("--smoke", action="store_true", help="tiny models, to see whether it runs")
  add("--batch", type=int, default=0, help="prompts; 0: the config's")
  add("--optimizer", default="adamw")
  add("--micro_batches", type=int, default=1)
  add("--judge_micro_batches", type=int, default=1)
  add("--repeats", type=int, default=5, help="timed calls; the median counts (5)")
  add("--hlo", default="", help="a folder for the text of each phase's compiled program")
  add("--profile", default="", help="a folder for a trace of each phase's calls")
  add("--trl-python", default="", help="the interpreter of an environment with trl 1.0.0")
  args = parser.parse_args()

  config, tokenizer = plan.prepare(settings(args), 1)
  device = jax.devices()[0]
  mesh = sharding.make_mesh(config.mesh, Mesh(np.array([device]), ("all",)))
  chip = memory.CHIPS.get(device.device_kind)
  size = config.prompts.batch_size * config.algorithm.samples
  tokens = size * config.sampling.max_tokens
  print(
    f"{device.device_kind}, jax {jax.__version__}: {config.model.preset}, judge "
    f"{config.judge.model.preset}, {size} responses, "
    f"{config.prompts.max_tokens} + {config.sampling.max_tokens} tokens"
  )
  rows, total = [], 0.0
  for name, seconds, work in phases(config, tokenizer, mesh, args.repeats, args.profile, args.hlo):
    total += seconds * (name != "log_probabilities")  # a part of the update
    shares = chip and {
      "MFU": work.flops / chip.flops / seconds,
      "bandwidth": work.bytes / chip.bandwidth / seconds,
    }
    best = shares and max(shares, key=shares.get)
    share = f"{shares[best]:.0%} {best}" if best else "—"
    taken = (device.memory_stats() or {}).get("peak_bytes_in_use", 0) / memory.GIB
    rows.append([name, f"{seconds:.3f}", f"{tokens / seconds:,.0f}", share, f"{taken:.1f}"])
  rows.append(["iteration", f"{total:.3f}", f"{tokens / total:,.0f}", "", ""])
  print(report.markdown_table(["phase", "s", "tokens/s", "of peak", "most GiB so far"], rows))
  if args.trl_python:
    subprocess.run(
      [
        sys.executable,
        HERE / "nash_md.py",
        f"--trl-python={args.trl_python}",
        f"--batch={config.prompts.batch_size}",
        f"--prompt={config.prompts.max_tokens}",
        f"--tokens={config.sampling.max_tokens}",
      ],
      check=True,
    )


if __name__ == "__main__":
  main()

"""Judging the responses to a prompt, K each: a general preference model beside the pairwise judge.

  python benchmarks/judges.py                        # the storyteller, K = 8
  python benchmarks/judges.py --samples=2

The pairwise judge reads every pair in both orders, K (K - 1) passes; the general preference model
reads every response once, K passes. Both have the storyteller's architecture and judge the same
responses. They take turns of two calls, of which the second counts; ratios are medians over rounds
of the ratio within a round. An iteration is one NashMP step: sample, judge, update.
"""

import argparse
import statistics
import time

import jax
import numpy as np

from nash_jax import keys, train
from nash_jax.config import resolve
from nash_jax.configs import stories
from nash_jax.models import sharding
from nash_jax.update import Batch

JUDGES = {
  "pairwise": {"name": "gemma"},
  # Random weights: what takes time does not depend on them.
  "general preference model": {"name": "gpm", "model": {"weights": ""}},
}


def set_up(args, judge):
  """Returns the storyteller's run with K samples and this judge."""
  config = stories.get_config()
  config.judge.update(judge)
  config.algorithm.samples, config.sampling.max_tokens = args.samples, args.tokens
  config.prompts.batch_size = args.batch
  config.mesh.update(data=1, fsdp=1, tensor=1)
  return train.set_up(resolve(config))


def second(call):
  """Returns the seconds of the second of two calls."""
  for _ in range(2):
    start = time.perf_counter()
    jax.block_until_ready(call())
    seconds = time.perf_counter() - start
  return seconds


def rounds(args):
  """Returns the seconds of every phase in each round, and of each judge."""
  setups = {name: set_up(args, judge) for name, judge in JUDGES.items()}
  setup = setups["pairwise"]
  programs, state, key = setup.programs, setup.initial_state(), keys.key(0, "benchmark")
  rows = setup.train_prompts.batch(0, args.batch)
  prompts = sharding.global_batch(
    setup.shardings.batch, args.batch, lambda part: jax.tree.map(lambda x: x[part], rows)
  )

  def sample():
    return programs.sample(state, setup.reference, prompts, key)

  responses, opponents, _ = sample()

  def judge(name):
    fn, params = setups[name].programs.judge, setups[name].judge.params
    return fn(params, prompts, responses, opponents, key)

  batch = Batch.create(prompts, responses, judge("pairwise"))

  def update():
    nonlocal state
    state, metrics = programs.train_step(state, setup.reference, batch)
    return metrics

  calls = {"sample": sample, "update": update} | {
    name: lambda name=name: judge(name) for name in JUDGES
  }
  for call in calls.values():
    jax.block_until_ready(call())  # compiles
  lengths = np.asarray(responses.mask).sum(-1)
  print(
    f"{lengths.size} responses of {lengths.mean():.0f} tokens on {jax.devices()[0].device_kind}"
  )
  return [{name: second(call) for name, call in calls.items()} for _ in range(args.repeats)]


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  add = parser.add_argument
  add("--samples", type=int, default=8, help="responses to a prompt, K (8)")
  add("--batch", type=int, default=16, help="prompts (16)")
  add("--tokens", type=int, default=64, help="of a response at most (64)")
  add("--repeats", type=int, default=9, help="rounds (9)")
  args = parser.parse_args()
  found = rounds(args)
  for name in found[0]:
    seconds = [each[name] for each in found]
    print(
      f"{name}: median {statistics.median(seconds) * 1e3:.1f} ms, best {min(seconds) * 1e3:.1f}"
    )

  def ratio(*phases):
    """The median ratio of both judges, each with these phases added."""
    costs = [[each[judge] + sum(each[x] for x in phases) for judge in JUDGES] for each in found]
    return statistics.median(pairwise / gpm for pairwise, gpm in costs)

  both = ratio("sample", "update")
  print(f"judging {args.samples} responses a prompt: {ratio():.1f} times faster than the pairwise")
  print(f"an iteration with it: {both:.2f} times faster")


if __name__ == "__main__":
  main()

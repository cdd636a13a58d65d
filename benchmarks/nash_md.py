"""A Nash-MD step against one of TRL's NashMDTrainer, and the cost of NashMP and of a mixture.

A step is everything between two batches of prompts: responses of the policy and of the mixture of
policy and reference, a verdict (constant on both sides), gradient and optimiser. Both sides have
Gemma 2's architecture with 4 layers of width 128, random float32 weights and responses of full
length. They take turns, so that a busy machine slows both; ratios are medians over rounds.

  python benchmarks/nash_md.py --trl-python=ENVIRONMENT/bin/python
  python benchmarks/nash_md.py --trl-python=... --weights=FOLDER --batch=4 --tokens=32 --repeats=3

ENVIRONMENT has trl 1.0.0 and transformers 5.3.0 (with 5.23.0 the mixture raises). Without that flag
only our side is timed. With a Hugging Face Gemma in FOLDER both sides train all of its weights, by
Nash-MD and by Online DPO; TRL runs in float32 like ours, and in its own bfloat16.
"""

import argparse
import contextlib
import functools
import statistics

import jax
from decode import Peer, ratio, take_turns
from jax import numpy as jnp

from nash_jax import config, iteration, judges, sampler, update
from nash_jax.models import gemma, logprobs
from nash_jax.policy import Policy, load_weights, tokenizer_and_model
from nash_jax.types import Prompts


def constant(params, prompts, a, b):
  """A judge with the same answer for every pair."""
  shape = a.stopped.shape
  return jnp.full(shape, 0.75), jnp.ones(shape, bool), {}


def stepper(name, args, model_config, prompts, params, reference):
  """Returns a function that takes one step of an algorithm and returns its loss."""
  run_config = config.train()
  run_config.algorithm.name = name
  run_config.prompts.batch_size = args.batch
  run_config.sampling.max_tokens = args.tokens
  run_config = config.resolve(run_config)
  policy = Policy(
    functools.partial(logprobs.response_logprobs, model_config=model_config),
    functools.partial(
      sampler.make_sampler, model_config, max_tokens=args.tokens, stop_ids=(), pad_id=0
    ),
  )
  rule = update.make_update(run_config, policy.logprobs)
  sample = jax.jit(iteration.make_sample(run_config.algorithm, rule.players, policy))
  judge = jax.jit(judges.pairwise(constant))
  train_step = jax.jit(rule.train_step, donate_argnums=0)
  state = jax.jit(rule.init)(params)

  def step():
    nonlocal state
    responses, opponents, _ = sample(state, reference, prompts, jax.random.key(2))
    verdict = judge((), prompts, responses, opponents)
    batch = update.Batch.create(prompts, responses, verdict)
    state, metrics = train_step(state, reference, batch)
    return metrics["loss"].total

  return step


def rounds(repeats, contenders):
  """Returns each contender's seconds in every round, and prints the medians."""
  seconds = take_turns(repeats, contenders)
  for name, times in seconds.items():
    print(f"{name:24}{1e3 * statistics.median(times):10.1f} ms, best {1e3 * min(times):8.1f}")
  return seconds


def random_prompts(args, vocabulary):
  shape = (args.batch, args.prompt)
  return Prompts(
    tokens=jax.random.randint(jax.random.key(2), shape, 4, vocabulary),
    mask=jnp.ones(shape, bool),
    index=jnp.arange(args.batch),
  )


def against_trl(args, name, step, vocabulary, **flags):
  """Prints and returns how many of our steps of a method take as long as one of TRL's."""
  flags |= {field: vars(args)[field] for field in ("batch", "prompt", "tokens", "weights")}
  flags |= {"method": name, "vocabulary": vocabulary, "steps": 2 * (args.repeats + 1)}
  with contextlib.closing(Peer(args.trl_python, "trl_nash_md.py", flags)) as trl:
    print(", ".join(f"{library} {version}" for library, version in trl.versions.items()))
    seconds = rounds(args.repeats, {f"{name} step": step, f"{name} step, TRL": trl.step})
  return ratio(seconds[f"{name} step, TRL"], seconds[f"{name} step"])


def on_real_weights(args):
  model = config.model(args.weights)
  model.preset, model.tokenizer = args.preset, f"{args.weights}/tokenizer.model"
  _, model_config = tokenizer_and_model(model)
  params = load_weights(args.weights, model_config, seed=0)
  prompts = random_prompts(args, model_config.num_embed)
  for name in args.methods:
    step = stepper(name, args, model_config, prompts, params, params)
    for precision in args.precisions:
      faster = against_trl(args, name, step, model_config.num_embed, precision=precision)
      bar = "; bar 2" if precision == "float32" else ""
      print(f"a {name} step in float32 {faster:.1f} times as fast as TRL's in {precision}{bar}")


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  add = parser.add_argument
  add("--trl-python", default="", help="the interpreter of an environment with trl 1.0.0")
  add("--weights", default="", help="a Hugging Face folder with a Gemma to train")
  add("--preset", default="gemma3_270m", help="the model in that folder (gemma3_270m)")
  both = ["nash_md", "online_dpo"]
  add("--methods", nargs="+", default=both, choices=both, help="to train its weights by")
  both = ["float32", "bfloat16"]
  add("--precisions", nargs="+", default=both, choices=both, help="TRL's, on these weights")
  add("--batch", type=int, default=16, help="prompts (16)")
  add("--prompt", type=int, default=32, help="prompt tokens (32)")
  add("--tokens", type=int, default=64, help="new tokens (64)")
  add("--vocabulary", type=int, default=512, help="rows of a random embedding (512)")
  add("--repeats", type=int, default=9, help="timed rounds; the median counts (9)")
  args = parser.parse_args()

  sizes = f"batch {args.batch}, {args.prompt} + {args.tokens} tokens"
  print(f"{jax.devices()[0].platform}, jax {jax.__version__}: {sizes}")
  if args.weights:
    on_real_weights(args)
    return
  model_config = gemma.preset("stories", num_embed=args.vocabulary)
  prompts = random_prompts(args, args.vocabulary)
  params, reference = (gemma.init(jax.random.key(seed), model_config) for seed in (0, 1))
  steps = {
    name: stepper(name, args, model_config, prompts, params, reference)
    for name in ("nash_md", "nash_mp", "online_dpo")
  }
  if args.trl_python:
    faster = against_trl(args, "nash_md", steps["nash_md"], args.vocabulary)
    print(f"a Nash-MD step {faster:.1f} times as fast as TRL's (bar 10, goal 15)")

  both = {"NashMP step": steps["nash_mp"], "Online DPO step": steps["online_dpo"]}
  seconds = rounds(args.repeats, both)
  cost = ratio(seconds["NashMP step"], seconds["Online DPO step"])
  print(f"a NashMP step costs {cost:.2f} times an Online DPO step (bar 1.3)")

  options = {"max_tokens": args.tokens, "samples": 1, "stop_ids": (), "pad_id": 0}
  plain = jax.jit(sampler.make_sampler(model_config, **options))
  mixture = jax.jit(sampler.make_sampler(model_config, mixture=0.25, **options))
  key = jax.random.key(3)
  seconds = rounds(
    5 * args.repeats,  # steps are short
    {
      "decoding of one model": lambda: plain(params, prompts, key).tokens,
      "decoding of a mixture": lambda: mixture((params, reference), prompts, key).tokens,
    },
  )
  cost = ratio(seconds["decoding of a mixture"], seconds["decoding of one model"])
  print(f"a mixture of two models costs {cost:.2f} times plain decoding (bar 2.2)")


if __name__ == "__main__":
  main()

"""Tokens per second of our sampler against gm.text's loop or transformers, on the same parameters.

Both decode every row to the full length (no stop id can be drawn) and take turns, so that a busy
machine slows both. Against gm.text there are two comparisons: from prompts to responses (the
library runs its prefill operation by operation), and the loops alone. Our loop's time is that of
the whole call minus that of a sampler of one token (cast, prefill and first draw).

  python benchmarks/decode.py
  python benchmarks/decode.py --weights=FOLDER --transformers=ENVIRONMENT/bin/python

FOLDER has a Hugging Face Gemma, and ENVIRONMENT torch and transformers. Both sides use float32.
"""

import argparse
import contextlib
import dataclasses
import json
import pathlib
import statistics
import subprocess
import time

import jax
from gemma import gm
from jax import numpy as jnp

from nash_jax import config, sampler
from nash_jax.models import gemma
from nash_jax.policy import load_weights, tokenizer_and_model
from nash_jax.types import Prompts


def library(model_config, params, prompts, tokens, key):
  """Returns (prefill(), loop(state)) of gm.text's sampler on the same prompts."""
  from gemma.gm.text import _prefill, _sampler_loop
  from gemma.gm.utils import _types

  fields = dataclasses.asdict(model_config)
  assert fields.pop("query_pre_attn_scalar") is None  # the benchmark's model has none
  architecture = gm.nn.config.TransformerConfig(
    use_post_attn_norm=True, use_post_ffw_norm=True, **fields
  )
  model = gm.nn.Transformer(config=architecture, dtype=jnp.float32)
  params = jax.device_put(gemma.unstack(params, model_config))
  columns = prompts.tokens.shape[1] + tokens
  loop = _sampler_loop.SamplerLoop(
    model=model,
    end_tokens=(model_config.num_embed,),  # beyond the vocabulary: never drawn
    forbidden_tokens=None,
    sampling=gm.text.RandomSampling(),
    cache_length=columns,
    special_tokens=gm.text.Gemma2Tokenizer.special_tokens,
  )

  def prefill():
    return _prefill.prefill(
      model=model,
      params=params,
      input=_types.Input(text=prompts.tokens, images=None, config=architecture.input_config),
      last_state=None,
      cache_length=columns,
      max_out_length=tokens,
      rng=key,
      sharding=None,
    )

  def decode(state):
    limit = jnp.asarray(tokens)
    return loop.sample(params=params, init_state=state, max_new_tokens=limit).predicted_tokens

  return prefill, decode


class Peer:
  """A program of this folder in another environment, which does its work on request.

  Args:
    python: the environment's interpreter.
    program: a file that prints a JSON line of versions, then one for each line that it reads.
    flags: the program's flags.
  """

  def __init__(self, python, program, flags):
    path = pathlib.Path(__file__).with_name(program)
    command = [python, path, *(f"--{name}={value}" for name, value in flags.items())]
    pipe = subprocess.PIPE
    self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
    self.versions = self.answer()

  def answer(self):
    line = self.process.stdout.readline()
    if not line:
      status = self.process.wait()
      raise RuntimeError(f"{self.process.args[1]} ended with status {status}; see above")
    return json.loads(line)

  def step(self):
    """Does the work once and waits for it."""
    print(file=self.process.stdin, flush=True)
    self.answer()

  def close(self):
    self.process.stdin.close()
    self.process.wait()


def take_turns(repeats, contenders):
  """Returns each contender's seconds in every round, without a first round that compiles.

  A turn has two runs, and the second counts: in the first, caches and memory are as the other
  contenders left them.
  """
  seconds = {name: [] for name in contenders}
  for _ in range(repeats + 1):
    for name, run in contenders.items():
      jax.block_until_ready(run())
      start = time.perf_counter()
      jax.block_until_ready(run())
      seconds[name].append(time.perf_counter() - start)
  return {name: times[1:] for name, times in seconds.items()}


def ratio(slow, fast):
  """Returns the median over rounds of slow / fast, which is robust to a passing load."""
  return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def against_transformers(args):
  """Prints the tokens per second of our sampler and of transformers on a folder's weights."""
  preset = config.model(args.weights)
  preset.preset, preset.tokenizer = args.preset, f"{args.weights}/tokenizer.model"
  _, model_config = tokenizer_and_model(preset)
  params = load_weights(args.weights, model_config, seed=0)
  prompts, key = random_prompts(args, model_config.num_embed), jax.random.key(3)
  options = {"max_tokens": args.tokens, "samples": 1, "stop_ids": (), "pad_id": 0}
  sample = jax.jit(sampler.make_sampler(model_config, **options))
  flags = {name: vars(args)[name] for name in ("weights", "batch", "prompt", "tokens")}
  with contextlib.closing(Peer(args.transformers, "transformers_generate.py", flags)) as peer:
    contenders = {
      "nash_jax": lambda: sample(params, prompts, key).tokens,
      "transformers": peer.step,
    }
    seconds = take_turns(args.repeats, contenders)
  print_rates(args, seconds)
  versions = ", ".join(f"{name} {version}" for name, version in peer.versions.items())
  faster = ratio(seconds["transformers"], seconds["nash_jax"])
  print(f"{faster:.2f} times the tokens per second of transformers ({versions}; bar 3)")


def random_prompts(args, vocabulary):
  """Returns prompts without padding."""
  shape = (args.batch, args.prompt)
  tokens = jax.random.randint(jax.random.key(2), shape, 4, vocabulary)
  return Prompts(tokens, jnp.ones(shape, bool), jnp.arange(args.batch))


def print_rates(args, seconds):
  """Prints each contender's median and best time, and its tokens per second."""
  print(f"{jax.devices()[0].platform}: batch {args.batch}, {args.prompt} + {args.tokens} tokens")
  for name, times in seconds.items():
    s = statistics.median(times)
    tokens = args.batch * (args.tokens - (name == "nash_jax loop alone"))
    rate = "" if name == "nash_jax one token" else f"{tokens / s:,.0f} tokens/s"
    print(f"{name:22}{1e3 * s:9.1f} ms, best {1e3 * min(times):7.1f}  {rate}")


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  add = parser.add_argument
  add("--batch", type=int, default=32, help="prompts (32)")
  add("--prompt", type=int, default=32, help="prompt tokens (32)")
  add("--tokens", type=int, default=0, help="new tokens (64; 48 with --weights)")
  add("--vocabulary", type=int, default=512, help="rows of the embedding (512)")
  add("--repeats", type=int, default=0, help="timed rounds (11; 3 with --weights)")
  add("--weights", default="", help="a Hugging Face folder, to compare with transformers")
  add("--preset", default="gemma3_270m", help="the model of that folder (gemma3_270m)")
  add("--transformers", default="python", help="an interpreter with torch and transformers")
  args = parser.parse_args()
  # A round on a real vocabulary takes over a minute.
  args.tokens = args.tokens or (48 if args.weights else 64)
  args.repeats = args.repeats or (3 if args.weights else 11)
  if args.weights:
    against_transformers(args)
    return

  model_config = gemma.preset("stories", num_embed=args.vocabulary)
  params = gemma.init(jax.random.key(0), model_config)
  reference = gemma.init(jax.random.key(1), model_config)
  prompts = random_prompts(args, args.vocabulary)
  key = jax.random.key(3)
  options = {"max_tokens": args.tokens, "samples": 1, "stop_ids": (), "pad_id": 0}
  plain = jax.jit(sampler.make_sampler(model_config, **options))
  mixture = jax.jit(sampler.make_sampler(model_config, mixture=0.25, **options))
  single = jax.jit(sampler.make_sampler(model_config, **{**options, "max_tokens": 1}))
  prefill, decode = library(model_config, params, prompts, args.tokens, key)
  state = prefill()
  assert decode(state).shape == plain(params, prompts, key).tokens[:, 0].shape

  seconds = take_turns(
    args.repeats,
    {
      "nash_jax": lambda: plain(params, prompts, key).tokens,
      "nash_jax one token": lambda: single(params, prompts, key).tokens,
      "gm.text": lambda: decode(prefill()),
      "gm.text loop alone": lambda: decode(state),
      "nash_jax mixture": lambda: mixture((params, reference), prompts, key).tokens,
    },
  )
  ours = seconds["nash_jax"]
  pairs = zip(ours, seconds["nash_jax one token"], strict=True)
  seconds["nash_jax loop alone"] = [whole - first for whole, first in pairs]
  print_rates(args, seconds)
  whole = ratio(seconds["gm.text"], ours)
  print(f"from prompts to responses, {whole:.2f} times gm.text's tokens per second")
  loop = ratio(seconds["gm.text loop alone"], seconds["nash_jax loop alone"])
  loop *= (args.tokens - 1) / args.tokens
  print(f"the loops alone, {loop:.2f} times (bar 1.3)")
  cost = ratio(seconds["nash_jax mixture"], ours)
  print(f"a mixture of two models costs {cost:.2f} times plain decoding (bar 2.2)")


if __name__ == "__main__":
  main()

"""Prints continuations of prompts, typed or from a file; optionally realigned.

Decoding-time realignment (Liu et al. 2402.02992) draws from the token-wise geometric mixture
π_ref^(1-λ)·π_θ^λ: as a policy trained with β/λ in place of β would be, approximately.
"""

import itertools
import os
import sys
from collections.abc import Iterable, Iterator

import jax
from jax import numpy as jnp
from ml_collections import ConfigDict

from nash_jax import keys
from nash_jax.config import resolve
from nash_jax.data.corpus import Texts, pad
from nash_jax.data.files import read_records
from nash_jax.data.tokenizer import Tokenizer
from nash_jax.policy import load_weights, make_policy, tokenizer_and_model
from nash_jax.types import Prompts
from nash_jax.validation import require


def run(config: ConfigDict, workdir: str | os.PathLike[str] = "") -> None:
  """Prints continuations of `prompt`, of each line of `file`, or of what is typed.

  Args:
    config: from nash_jax.config.sample(); model.weights may be a run, such as "runs/x@target", and
      so may reference, which is loaded only where realign is not 1.
    workdir: nothing is written.

  Raises:
    ValueError: a bad config, weights, or a file without prompts.
  """
  config = resolve(config, "sample")
  tokenizer, model_config = tokenizer_and_model(config.model)
  prompts = _prompts(config, tokenizer)
  params, mixture = load_weights(config.model.weights, model_config, config.seed), None
  if config.realign != 1:
    reference = load_weights(config.reference, model_config, config.seed)
    params, mixture = (params, reference), 1 - config.realign
  policy = make_policy(config.model, config.sampling, tokenizer, model_config)
  sample = jax.jit(policy.make_sampler(samples=config.sampling.samples, mixture=mixture))
  for number, (text, ids) in enumerate(prompts):
    width = 16 * -(-len(ids) // 16)  # a few widths, so that few programs are compiled
    tokens, mask = map(jnp.asarray, pad([ids], width, tokenizer.pad_id, left=True))
    batch = Prompts(tokens, mask, jnp.zeros(1, jnp.int32))
    responses = sample(params, batch, keys.key(config.seed, "sample", number))
    arrays = jax.device_get((responses.tokens[0], responses.mask[0]))
    for response, mask in zip(*arrays, strict=True):
      print(f"{text} ▸{tokenizer.decode(response[mask])}\n", flush=True)


def _prompts(config, tokenizer: Tokenizer) -> Iterable[tuple[str, list[int]]]:
  """Returns prompts and their ids, all checked but those that are typed later."""

  def encode(place: str, text: str) -> tuple[str, list[int]]:
    try:
      return text, Texts(tokenizer).prompt({"prompt": text})
    except ValueError as error:
      raise ValueError(f"{place}: {error}") from None

  def typed() -> Iterator[tuple[str, list[int]]]:
    for text in itertools.takewhile(bool, _typed()):
      try:
        yield encode("prompt", text)
      except ValueError as error:  # the next one may be good
        print(error, file=sys.stderr)

  if config.prompt:
    return [encode("prompt", config.prompt)]
  if config.file:
    readable = os.access(config.file, os.R_OK) and not os.path.isdir(config.file)
    require(readable, "file", "a readable text file", config.file, "Give its path.")
    pairs = list(itertools.starmap(encode, read_records(config.file, str)))
    require(len(pairs) > 0, "file", "a prompt a line", config.file, "Write some.")
    return pairs
  return typed()


def _typed() -> Iterator[str]:
  while True:
    try:
      yield input("prompt (empty line to stop): ")
    except EOFError:
      return
    except UnicodeDecodeError as error:
      raise ValueError(f"prompt: expected UTF-8 ({error})") from None

"""Prints continuations of prompts, typed or from a file; optionally realigned.

Decoding-time realignment (Liu et al. 2402.02992) draws from the token-wise geometric mixture
π_ref^(1-λ)·π_θ^λ: as a policy trained with β/λ in place of β would be, approximately.
"""

import itertools
import os
import pathlib
from collections.abc import Iterable, Iterator

import jax
from jax import numpy as jnp
from ml_collections import ConfigDict

from nash_jax import keys
from nash_jax.config import resolve
from nash_jax.data.corpus import pad
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
  texts = _texts(config)
  params, mixture = load_weights(config.model.weights, model_config, config.seed), None
  if config.realign != 1:
    reference = load_weights(config.reference, model_config, config.seed)
    params, mixture = (params, reference), 1 - config.realign
  policy = make_policy(config.model, config.sampling, tokenizer, model_config)
  sample = jax.jit(policy.make_sampler(samples=config.sampling.samples, mixture=mixture))
  for number, text in enumerate(texts):
    ids = tokenizer.prompt(text)
    width = 16 * -(-len(ids) // 16)  # a few widths, so that few programs are compiled
    tokens, mask = map(jnp.asarray, pad([ids], width, tokenizer.pad_id, left=True))
    prompts = Prompts(tokens, mask, jnp.zeros(1, jnp.int32))
    responses = sample(params, prompts, keys.key(config.seed, "sample", number))
    arrays = jax.device_get((responses.tokens[0], responses.mask[0]))
    for response, mask in zip(*arrays, strict=True):
      print(f"{text} ▸{tokenizer.decode(response[mask])}\n", flush=True)


def _texts(config) -> Iterable[str]:
  if config.prompt:
    return [config.prompt]
  if config.file:
    try:
      lines = pathlib.Path(config.file).read_text(encoding="utf-8").splitlines()
    except OSError as error:
      raise ValueError(f"file: expected a readable text file, got {error}") from error
    require(any(lines), "file", "a prompt a line", config.file, "Write some.")
    return [line for line in lines if line.strip()]
  return itertools.takewhile(bool, _typed())


def _typed() -> Iterator[str]:
  while True:
    try:
      yield input("prompt (empty line to stop): ")
    except EOFError:
      return

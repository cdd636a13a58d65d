"""Continuations of prompts, printed: interactive, or from a file; realigned if asked to.

Decoding-time realignment (Liu et al. 2402.02992) draws from the token-wise geometric mixture
π_ref^(1-λ)·π_θ^λ: as a policy trained with β/λ in place of β would be, approximately.
"""

import itertools
import pathlib

import jax
import numpy as np

from nash_jax import checkpoint, keys, tokenizer, train
from nash_jax import config as configs
from nash_jax.models import gemma
from nash_jax.types import Prompts


def run(config, workdir: str = "") -> None:
  """Prints continuations of `prompt`, of each line of `file`, or of what is typed.

  Args:
    config: from nash_jax.config.sample(); model.weights may be a run, such as "runs/x@target", and
      so may reference, which is loaded only where realign is not 1.
    workdir: nothing is written.

  Raises:
    ValueError: a bad config, weights, or a file without prompts.
  """
  config = configs.resolve(config)
  tok = tokenizer.Tokenizer(configs.path(config.model.tokenizer), config.model.template)
  model = gemma.preset(config.model.preset, **config.model.changes)
  given = _prompts(config)
  params, mixture = checkpoint.load_weights(config.model.weights, model, config.seed), None
  if config.realign != 1:
    reference = checkpoint.load_weights(config.reference, model, config.seed)
    params, mixture = (params, reference), 1 - config.realign
  _, make = train.policy(config, tok, model)
  draw = jax.jit(make(samples=config.sampling.samples, mixture=mixture))
  for number, text in enumerate(given):
    ids = tok.prompt(text)
    width = 16 * -(-len(ids) // 16)  # a few widths, so that few are compiled
    tokens = np.full((1, width), tok.pad_id, np.int32)
    tokens[0, width - len(ids) :] = ids
    mask = np.arange(width)[None] >= width - len(ids)
    y = draw(params, Prompts(tokens, mask, np.zeros(1, np.int32)),
             keys.key(config.seed, "sample", number))  # fmt: skip
    for row, kept in zip(np.asarray(y.tokens[0]), np.asarray(y.mask[0]), strict=True):
      print(f"{text} ▸{tok.decode(row[kept])}\n", flush=True)


def _prompts(config):
  if config.prompt:
    return [config.prompt]
  if config.file:
    try:
      lines = pathlib.Path(config.file).read_text(encoding="utf-8").splitlines()
    except OSError as error:
      raise ValueError(f"file: expected a readable text file, got {error}") from error
    configs.check(any(lines), "file", "a prompt a line", config.file, "Write some.")
    return [line for line in lines if line.strip()]
  return itertools.takewhile(bool, _typed())


def _typed():
  while True:
    try:
      yield input("prompt (empty line to stop): ")
    except EOFError:
      return

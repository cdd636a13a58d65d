"""seqio tasks and mixtures of prompts, dealt out left-padded; the formats are in docs/data.md."""

import json

import numpy as np
from absl import logging

from nash_jax.data import corpus
from nash_jax.types import Prompts

TASKS = ("json_lines", "text", "stories", "rlhflow")


def load_prompts(config, tokenizer, seed: int) -> tuple[corpus.Examples, corpus.Examples]:
  """Reads, tokenises and splits prompts: (train, held_out), whose batches are `Prompts`.

  Args:
    config: `task`: one of TASKS, or a seqio task or mixture registered elsewhere whose "inputs" are
      prompt tokens. `path`: its files, "a.jsonl,b.jsonl"; with rates, "a.jsonl:3,b.jsonl:1", a
      mixture. `max_tokens`: width of a prompt, <bos> and template included. `overflow`: "drop" or
      "cut" longer ones; a cut one keeps <bos> and its end. `held_out`: so many prompts from the end
      are the held-out part, unless `held_out_path` names files for it.
    tokenizer: a Tokenizer.
    seed: of the order.

  Raises:
    ValueError: an unknown task or overflow, a missing file, a bad line (file and line named), no
      prompt left to train on.
  """

  def read(path):
    if config.task not in TASKS:
      return {"inputs": _registered(config.task, seed)["inputs"]}
    parse = (lambda line: {"prompt": line}) if config.task == "text" else json.loads
    return corpus.run(config.task, path, encode, seed, parse)

  def encode(record):
    return {"inputs": corpus.prompt(record, tokenizer)}

  def arrange(columns):
    padded = corpus.pad(columns["inputs"], config.max_tokens, tokenizer.pad_id, left=True)
    return Prompts(*padded, np.array(columns["index"], np.int32))

  budgets = {"inputs": config.max_tokens}
  train, held_out = corpus.load_examples(config, read, budgets, arrange, seed)
  logging.info("prompts to train on: %s, held out: %s", train.report, held_out.report)
  if not len(train):
    raise ValueError(
      f"no prompts left: all {train.report['dropped']} are over max_tokens={config.max_tokens}; "
      "raise it, or set overflow='cut'"
    )
  return train, held_out


def _registered(task: str, seed: int) -> corpus.Columns:
  corpus.import_tensorflow()
  import seqio

  known = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
  if task not in known:
    raise ValueError(f"unknown task {task!r}: choose one of {', '.join(sorted({*TASKS, *known}))}")
  return corpus.read(task, seed)

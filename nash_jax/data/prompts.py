"""seqio tasks and mixtures of prompts, in left-padded batches; docs/data.md has the formats."""

import functools
import json
from typing import Any

from nash_jax.data import corpus
from nash_jax.data.tokenizer import Tokenizer
from nash_jax.validation import one_of

TASKS = ("json_lines", "text", "stories", "rlhflow")


def load_prompts(config, tokenizer: Tokenizer, seed: int) -> corpus.Split:
  """Reads, tokenises and splits prompts: (train, held_out), whose batches are `Prompts`.

  Args:
    config: `task`: one of TASKS, or a seqio task or mixture registered elsewhere whose "inputs" are
      prompt tokens. `path`: its files, "a.jsonl,b.jsonl"; with rates, "a.jsonl:3,b.jsonl:1", a
      mixture. `max_tokens`: width of a prompt, <bos> and template included. `overflow`, `held_out`
      and `held_out_path`: as in corpus.load_examples.
    seed: of the order.

  Raises:
    ValueError: an unknown task or overflow, a missing file, a bad line (file and line named), no
      prompt left to train on.
  """

  def read(path: str) -> corpus.Columns:
    if config.task not in TASKS:
      corpus.import_tensorflow()
      import seqio

      registered = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
      one_of("prompts.task", config.task, {*TASKS, *registered})
      return {"inputs": corpus.read_task(config.task, seed)["inputs"]}
    parse = (lambda line: {"prompt": line}) if config.task == "text" else json.loads
    return corpus.read_files(config.task, path, encode, seed, parse)

  def encode(record: Any) -> corpus.Features:
    return {"inputs": corpus.encode_prompt(record, tokenizer)}

  width = config.max_tokens
  arrange = functools.partial(corpus.pad_prompts, width=width, pad_id=tokenizer.pad_id)
  return corpus.load_examples(config, read, {"inputs": width}, arrange, seed)

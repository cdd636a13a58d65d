"""seqio tasks and mixtures of prompts, in left-padded batches; formats are in docs/data.md."""

import functools
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging

from nash_jax.data import answers, corpus, forms
from nash_jax.data.tokenizer import Tokenizer
from nash_jax.validation import one_of, require

TASKS = ("json_lines", "text", "stories", "rlhflow", *answers.BENCHMARKS)


def load_prompts(config, tokenizer: Tokenizer, seed: int) -> corpus.Split:
  """Reads, tokenises and splits prompts: (train, held_out), whose batches are `Prompts`.

  Args:
    config: `task`: one of TASKS, or a seqio task or mixture registered elsewhere whose "inputs" are
      prompt tokens. `path`: its files, "a.jsonl,b.jsonl", or with rates a mixture,
      "a.jsonl:3,b.jsonl:1". `max_tokens`: width of a prompt, including <bos> and template.
      `overflow`, `held_out`, `held_out_path` and `duplicates`: as in corpus.load_examples. `bad`:
      "stop" at a record that cannot be read, or "skip" it.
    seed: determines the order.

  Raises:
    ValueError: an unknown task or overflow, a missing file, a bad line (names file and line), a
      registered task whose prompts do not fit, no prompt left to train on.
  """

  def read(path: str) -> corpus.Columns:
    if config.task not in TASKS:
      return {"inputs": _read_registered(config, tokenizer, seed)}
    if config.task in answers.BENCHMARKS:
      return _read_benchmark(config, path, tokenizer, seed)
    parse = (lambda line: {"prompt": line}) if config.task == "text" else json.loads
    return corpus.read_files(
      config.task, path, encode, tokenizer, seed, parse, config.bad, forms.prompts
    )

  def encode(record: Any, texts: corpus.Texts) -> corpus.Features:
    return {"inputs": texts.prompt(forms.with_prompt(record))}

  width = config.max_tokens
  require(width > 0, "prompts.max_tokens", "at least 1", width, "Raise it.")
  arrange = functools.partial(corpus.pad_prompts, width=width, pad_id=tokenizer.pad_id)
  return corpus.load_examples(config, read, {"inputs": width}, arrange, seed, tokenizer)


def _read_benchmark(config, path: str, tokenizer: Tokenizer, seed: int) -> corpus.Columns:
  """Returns a benchmark's prompts; the column "record" has what a file of answers needs."""
  records = []

  def encode(record: Any, texts: corpus.Texts) -> corpus.Features:
    features = {"inputs": texts.prompt(answers.prompt_of(config.task, record))}
    records.append(record)
    return features

  rates = [rate for _, rate in corpus.parse_paths(path) if rate is not None]
  fix = "A benchmark's prompts keep their order."
  require(not rates, "rates of prompts.path", f"none, with the task {config.task!r}", rates, fix)
  columns = corpus.read_files(config.task, path, encode, tokenizer, seed, bad=config.bad)
  return {**columns, "record": records}


def _read_registered(config, tokenizer: Tokenizer, seed: int) -> Sequence[np.ndarray]:
  """Returns and checks the prompts of a seqio task or mixture that is registered elsewhere."""
  corpus.import_tensorflow()
  import seqio

  task = config.task
  registered = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
  one_of("prompts.task", task, {*TASKS, *registered})
  fix = "Set held_out: the last prompts of its split train are held out."
  path = config.held_out_path
  require(not path, "prompts.held_out_path", f"none, with the registered task {task!r}", path, fix)
  columns = corpus.read_task(task, seed)
  fix = "Register the prompts' token ids as its feature inputs."
  require("inputs" in columns, f"features of {task!r}", "inputs", sorted(columns), fix)
  prompts, begun = columns["inputs"], 0
  for number, ids in enumerate(prompts):
    what = f"inputs of example {number} of the task {task!r}"
    flat = np.ndim(ids) == 1 and np.issubdtype(np.asarray(ids).dtype, np.integer)
    require(flat, what, "token ids, i32[n]", f"{ids.dtype}{list(np.shape(ids))}", fix)
    corpus.check_ids(ids, tokenizer, what)
    corpus.check_prompt(ids, tokenizer, what)
    begun += int(ids[0]) == tokenizer.bos_id
  if begun < len(prompts):
    message = "%d of %d prompts of the task %r do not begin with <bos>, as Gemma's do"
    logging.warning(message, len(prompts) - begun, len(prompts), task)
  return prompts

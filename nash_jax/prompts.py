"""seqio tasks and mixtures of prompts, dealt out left-padded; the formats are in docs/data.md."""

import dataclasses
import json

import numpy as np
from absl import logging

from nash_jax import corpus
from nash_jax.types import Prompts

TASKS = ("json_lines", "text", "stories", "rlhflow")


@dataclasses.dataclass(frozen=True)
class PromptSet:
  """Tokenised prompts of at most max_tokens; `report` counts those kept, dropped and cut.

  Attributes:
    tokens: the prompts.
    index: i32[N], the place of each in the whole data set, dropped ones counted.
  """

  tokens: corpus.Ragged
  index: np.ndarray
  max_tokens: int
  pad_id: int
  seed: int
  report: dict[str, int]

  def __len__(self) -> int:
    return len(self.tokens)

  def all(self, indices=None) -> Prompts:
    """Returns the prompts at some places of this set (default: every one, in order)."""
    indices = np.arange(len(self)) if indices is None else np.asarray(indices)
    tokens, mask = self.tokens.padded(indices, self.max_tokens, self.pad_id, left=True)
    return Prompts(tokens, mask, self.index[indices])

  def batch(self, step: int, size: int, rows: slice = slice(None)) -> Prompts:
    """Returns a host's `rows` of the batch of `size` at `step`, as numpy arrays."""
    return self.all(corpus.draw(len(self), step, size, self.seed, rows))


def load(config, tokenizer, seed: int) -> tuple[PromptSet, PromptSet]:
  """Reads, tokenises and splits prompts: (train, held_out).

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
  corpus.check_overflow(config.overflow)
  columns, parts = corpus.split(config, lambda path: _read(config.task, path, tokenizer, seed))
  prompts, budget, cut = columns["inputs"], config.max_tokens, config.overflow == "cut"
  sets = []
  for part in parts:
    over = np.array([len(prompts[i]) > budget for i in part], bool)
    kept = part if cut else part[~over]
    report = {"kept": len(kept), "dropped": len(part) - len(kept), "cut": int(over.sum()) * cut}
    tokens = corpus.Ragged.of(corpus.cut(prompts[i], budget) for i in kept)
    sets.append(PromptSet(tokens, kept.astype(np.int32), budget, tokenizer.pad_id, seed, report))
  train, held_out = sets
  logging.info("prompts to train on: %s, held out: %s", train.report, held_out.report)
  if not len(train):
    raise ValueError(
      f"no prompts left: all {len(parts[0])} are over max_tokens={budget}; raise it, or set "
      "overflow='cut'"
    )
  return train, held_out


def _read(task: str, path, tokenizer, seed: int) -> dict[str, list]:
  """Runs the task once and returns its prompts' tokens, in order, as "inputs"."""
  if task not in TASKS:
    import seqio

    known = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
    if task not in known:
      raise ValueError(
        f"unknown task {task!r}: choose one of {', '.join(sorted({*TASKS, *known}))}"
      )
    return corpus.read_task(task, ["inputs"], seed)

  def read(record):
    return {"prompt": corpus.prompt(record, tokenizer)}

  def encode(record):
    return {"inputs": tokenizer.prompt(record["prompt"])}

  parse = (lambda line: {"prompt": line}) if task == "text" else json.loads
  sources = [(corpus.records(file, read, parse), rate) for file, rate in corpus.files(path)]
  return corpus.run(task, sources, encode, {"inputs": 1}, seed)

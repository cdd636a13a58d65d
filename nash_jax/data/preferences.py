"""Supervised data through seqio: texts, responses to learn from, and preferences.

The formats are written down in docs/data.md.
"""

import dataclasses

import numpy as np
from absl import logging

from nash_jax.data import corpus
from nash_jax.types import Prompts


def load_preferences(config, tokenizer, seed: int) -> tuple[corpus.Examples, corpus.Examples]:
  """Reads, tokenises and splits supervised data: (train, held_out).

  Args:
    config: `task` (one of TASKS), `path`, `held_out`, `held_out_path` (as in prompts.load_prompts).
      `max_tokens`: of a window T for text, of a prompt Lp for the others, which also have
      `max_response_tokens` L (for responses T = Lp + L) and `overflow`: "drop" or "cut" what is
      over a budget; a cut prompt keeps <bos> and its end, a cut response its beginning.
    tokenizer: a Tokenizer.
    seed: of the order.

  Returns:
    Examples whose batches are dictionaries. Of texts and responses: tokens i32[B T], mask bool[B T]
    (padded right), and loss_mask bool[B T], which says that token t is to be predicted from those
    before it. Of preferences: prompts (`Prompts`), a_tokens, a_mask, b_tokens, b_mask [B L] (padded
    right, with their stop tokens unless they were cut) and p_win f32[B], P(a ≻ b).

  Raises:
    ValueError: an unknown task, a missing file, a bad line (file and line named), nothing left.
  """
  if config.task not in TASKS:
    raise ValueError(f"unknown task {config.task!r}: choose one of {', '.join(TASKS)}")
  encode, responses = TASKS[config.task]
  width, length, pad_id = config.max_tokens, config.max_response_tokens, tokenizer.pad_id

  def read(path):
    return corpus.run(config.task, path, lambda record: encode(record, tokenizer), seed)

  def sequences(columns):
    parts = zip(columns["inputs"], columns["targets"], strict=True)
    joined = [np.concatenate(pair) for pair in parts]
    tokens, mask = corpus.pad(joined, width + length * len(responses), pad_id)
    start = np.array([len(ids) for ids in columns["inputs"]])
    counts = np.arange(tokens.shape[1])[None, :] >= start[:, None]
    loss_mask = mask & counts & (tokens != tokenizer.bos_id)  # nothing predicts <bos>
    return {"tokens": tokens, "mask": mask, "loss_mask": loss_mask}

  def pairs(columns):
    padded = corpus.pad(columns["inputs"], width, pad_id, left=True)
    batch = {
      "prompts": Prompts(*padded, np.array(columns["index"], np.int32)),
      "p_win": np.array(columns["p_win"], np.float32),
    }
    for side in responses:
      batch[f"{side}_tokens"], batch[f"{side}_mask"] = corpus.pad(columns[side], length, pad_id)
    return batch

  budgets = {"inputs": width, **dict.fromkeys(responses, length)} if responses else {}
  parts = corpus.load_examples(
    config, read, budgets, pairs if len(responses) > 1 else sequences, seed
  )
  train, held_out = parts if responses else (_windows(part, width) for part in parts)
  logging.info("examples to train on: %s, held out: %s", train.report, held_out.report)
  if not len(train):
    raise ValueError(f"no examples left of {config.path!r}: raise the budgets, or overflow='cut'")
  return train, held_out


def _windows(documents: corpus.Examples, width: int) -> corpus.Examples:
  """Returns documents laid end to end and cut into windows; the last may be shorter."""
  ids = np.concatenate([np.zeros(0, np.int32), *documents.columns["inputs"]])
  windows = [ids[i : i + width] for i in range(0, len(ids), width)]
  # Nothing comes before a window's first token, which therefore counts as its prompt.
  columns = {"inputs": [w[:1] for w in windows], "targets": [w[1:] for w in windows]}
  return dataclasses.replace(documents, columns=columns)


def _text(record, tokenizer):
  ids = tokenizer.encode(corpus.field(record, "text"))
  return {"inputs": [tokenizer.bos_id, *ids, tokenizer.eos_id]}


def _responses(record, tokenizer):
  response = tokenizer.response(corpus.field(record, "response"))
  return {"inputs": corpus.prompt(record, tokenizer), "targets": response}


def _preferences(record, tokenizer):
  a, b, p_win = _judged(record)
  a, b = tokenizer.response(a), tokenizer.response(b)
  return {"inputs": corpus.prompt(record, tokenizer), "a": a, "b": b, "p_win": p_win}


def _tokens(record, tokenizer):
  ids = {name: corpus.field(record, name, list) for name in ("inputs", "a", "b")}
  for name, found in ids.items():
    wrong = [i for i in found if not isinstance(i, int) or not 0 <= i < tokenizer.size]
    if wrong:
      raise ValueError(
        f"field {name!r} holds {wrong[0]!r}, expected ids of this tokenizer's {tokenizer.size} "
        "pieces"
      )
  return {**ids, "p_win": _probability(record)}


# Task: (a record's features, those of them that are responses).
TASKS = {
  "text": (_text, ()),
  "responses": (_responses, ("targets",)),
  "preferences": (_preferences, ("a", "b")),
  "tokens": (_tokens, ("a", "b")),
}


def _judged(record: dict) -> tuple[str, str, float]:
  """Returns the two responses of a record in one of the three forms, and P(a ≻ b)."""
  if "chosen" in record:
    return corpus.field(record, "chosen"), corpus.field(record, "rejected"), 1.0
  pair = corpus.field(record, "response_a"), corpus.field(record, "response_b")
  if "p_a" in record:
    return *pair, _probability(record)
  a, b, ties = (corpus.field(record, name, (int, float)) for name in ("votes_a", "votes_b", "ties"))
  if min(a, b, ties) < 0 or a + b + ties == 0:
    raise ValueError(f"votes_a, votes_b, ties are {a}, {b}, {ties}: expected some, none negative")
  return *pair, (a + ties / 2) / (a + b + ties)


def _probability(record: dict) -> float:
  p_a = corpus.field(record, "p_a", (int, float))
  if not 0 <= p_a <= 1:
    raise ValueError(f"field 'p_a' is {p_a}, expected a probability")
  return p_a

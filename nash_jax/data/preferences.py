"""Supervised data through seqio: texts, responses to learn from, and preferences.

The formats are written down in docs/data.md.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from nash_jax.data import corpus
from nash_jax.data.tokenizer import Tokenizer
from nash_jax.validation import one_of


def load_preferences(config, tokenizer: Tokenizer, seed: int) -> corpus.Split:
  """Reads, tokenises and splits supervised data: (train, held_out).

  Args:
    config: `task` (one of TASKS); `path` as in prompts.load_prompts; `overflow`, `held_out` and
      `held_out_path` as in corpus.load_examples. `max_tokens`: of a window T for text, of a prompt
      Lp for the others, which also have `max_response_tokens` L (for responses T = Lp + L).
    seed: of the order.

  Returns:
    Examples whose batches are dictionaries. Of texts and responses: tokens i32[B T], mask bool[B T]
    (padded right), and loss_mask bool[B T], which says that token t is to be predicted from those
    before it. Of preferences: prompts (`Prompts`), a_tokens, a_mask, b_tokens, b_mask [B L] (padded
    right, with their stop tokens unless they were cut) and p_win f32[B], P(a ≻ b).

  Raises:
    ValueError: an unknown task, a missing file, a bad line (file and line named), nothing left.
  """
  one_of("data.task", config.task, TASKS)
  encode, responses = TASKS[config.task]
  width, length, pad_id = config.max_tokens, config.max_response_tokens, tokenizer.pad_id

  def read(path: str) -> corpus.Columns:
    return corpus.read_files(config.task, path, lambda record: encode(record, tokenizer), seed)

  def sequences(columns: corpus.Columns) -> dict[str, np.ndarray]:
    inputs, targets = columns["inputs"], columns["targets"]
    joined = [np.concatenate(pair) for pair in zip(inputs, targets, strict=True)]
    tokens, mask = corpus.pad(joined, width + length * len(responses), pad_id)
    start = np.array([len(ids) for ids in inputs])
    predicted = np.arange(tokens.shape[1])[None, :] >= start[:, None]
    loss_mask = mask & predicted & (tokens != tokenizer.bos_id)  # nothing predicts <bos>
    return {"tokens": tokens, "mask": mask, "loss_mask": loss_mask}

  def pairs(columns: corpus.Columns) -> dict[str, Any]:
    batch: dict[str, Any] = {"prompts": corpus.pad_prompts(columns, width, pad_id)}
    batch["p_win"] = np.array(columns["p_win"], np.float32)
    for side in responses:
      batch[f"{side}_tokens"], batch[f"{side}_mask"] = corpus.pad(columns[side], length, pad_id)
    return batch

  budgets = {"inputs": width, **dict.fromkeys(responses, length)} if responses else {}
  arrange = pairs if len(responses) > 1 else sequences
  train, held_out = corpus.load_examples(config, read, budgets, arrange, seed)
  return (train, held_out) if responses else (_windows(train, width), _windows(held_out, width))


def _windows(documents: corpus.Examples, width: int) -> corpus.Examples:
  """Returns documents laid end to end and cut into windows; the last may be shorter."""
  ids = np.concatenate([np.zeros(0, np.int32), *documents.columns["inputs"]])
  windows = [ids[i : i + width] for i in range(0, len(ids), width)]
  # Nothing comes before a window's first token, which therefore counts as its prompt.
  columns = {"inputs": [w[:1] for w in windows], "targets": [w[1:] for w in windows]}
  return dataclasses.replace(documents, columns=columns)


def _text(record: Any, tokenizer: Tokenizer) -> corpus.Features:
  ids = tokenizer.encode(corpus.field(record, "text"))
  return {"inputs": [tokenizer.bos_id, *ids, tokenizer.eos_id]}


def _responses(record: Any, tokenizer: Tokenizer) -> corpus.Features:
  response = tokenizer.response(corpus.field(record, "response"))
  return {"inputs": corpus.encode_prompt(record, tokenizer), "targets": response}


def _preferences(record: Any, tokenizer: Tokenizer) -> corpus.Features:
  *texts, p_win = _judged(record)
  a, b = map(tokenizer.response, texts)
  return {"inputs": corpus.encode_prompt(record, tokenizer), "a": a, "b": b, "p_win": p_win}


def _tokens(record: Any, tokenizer: Tokenizer) -> corpus.Features:
  ids = {name: corpus.field(record, name, list) for name in ("inputs", "a", "b")}
  for name, values in ids.items():
    wrong = [i for i in values if not isinstance(i, int) or not 0 <= i < tokenizer.size]
    if wrong:
      expected = f"ids of this tokenizer's {tokenizer.size} pieces"
      raise ValueError(f"field {name!r} holds {wrong[0]!r}, expected {expected}")
  return {**ids, "p_win": _probability(record)}


# By task: a record's features, and those of them that are responses.
TASKS: dict[str, tuple[Callable[[Any, Tokenizer], corpus.Features], tuple[str, ...]]] = {
  "text": (_text, ()),
  "responses": (_responses, ("targets",)),
  "preferences": (_preferences, ("a", "b")),
  "tokens": (_tokens, ("a", "b")),
}


def _judged(record: Any) -> tuple[str, str, float]:
  """Returns the two responses of a record in any of the three forms, and P(a ≻ b)."""
  if "chosen" in record:
    return corpus.field(record, "chosen"), corpus.field(record, "rejected"), 1.0
  pair = corpus.field(record, "response_a"), corpus.field(record, "response_b")
  if "p_a" in record:
    return *pair, _probability(record)
  a, b, ties = (corpus.field(record, name, (int, float)) for name in ("votes_a", "votes_b", "ties"))
  if min(a, b, ties) < 0 or a + b + ties == 0:
    raise ValueError(f"votes_a, votes_b, ties are {a}, {b}, {ties}: expected some, none negative")
  return *pair, (a + ties / 2) / (a + b + ties)


def _probability(record: Any) -> float:
  p_a = corpus.field(record, "p_a", (int, float))
  if not 0 <= p_a <= 1:
    raise ValueError(f"field 'p_a' is {p_a}, expected a probability")
  return p_a

"""Supervised data through seqio: texts, responses to learn from, and preferences.

docs/data.md documents the formats.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from nash_jax.data import corpus, forms
from nash_jax.data.corpus import Texts
from nash_jax.data.tokenizer import Tokenizer
from nash_jax.types import Prompts, Responses
from nash_jax.validation import one_of, require


def load_preferences(config, tokenizer: Tokenizer, seed: int) -> corpus.Split:
  """Reads, tokenises and splits supervised data: (train, held_out).

  Args:
    config: `task` is one of TASKS; `path` and `bad` as in prompts.load_prompts; `overflow`,
      `held_out`, `held_out_path` and `duplicates` as in corpus.load_examples. `max_tokens` is the
      width T of a text's window, or the width Lp of a prompt; `max_response_tokens` is the width L
      of a response. With responses T = Lp + L.
    seed: determines the order.

  Returns:
    Examples whose batches are dictionaries. For texts and responses: tokens i32[B T], mask
    bool[B T] (padded right), and loss_mask bool[B T], True where the loss predicts token t from
    those before it. For preferences: prompts (`Prompts`), a_tokens, a_mask, b_tokens, b_mask [B L]
    (padded right, with stop tokens unless they were cut) and p_win f32[B], P(a ≻ b).

  Raises:
    ValueError: an unknown task, a missing file, a bad line (names file and line), nothing left.
  """
  one_of("data.task", config.task, TASKS)
  encode, responses = TASKS[config.task]
  width, length, pad_id = config.max_tokens, config.max_response_tokens, tokenizer.pad_id
  least = 1 if responses else 2  # the second token of a window is the first predicted one
  require(width >= least, "data.max_tokens", f"at least {least}", width, "Raise it.")
  require(
    not responses or length > 0, "data.max_response_tokens", "at least 1", length, "Raise it."
  )

  gather = forms.comparisons if config.task == "preferences" else None

  def read(path: str) -> corpus.Columns:
    return corpus.read_files(
      config.task, path, encode, tokenizer, seed, bad=config.bad, gather=gather
    )

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
  train, held_out = corpus.load_examples(config, read, budgets, arrange, seed, tokenizer)
  return (train, held_out) if responses else (_windows(train, width), _windows(held_out, width))


def load_pairs(config, tokenizer: Tokenizer, length: int, seed: int) -> corpus.Split:
  """Reads the pairs of an offline run: (train, held_out), with batches for update.Batch.of_pairs.

  Args:
    config: an online run's: `pairs` says what is read, `prompts` its width and what to do with what
      is over it or cannot be read.
    length: L.

  Returns:
    Examples whose batches are dictionaries: prompts, tokens [B 2 L], mask, stopped [B 2], p_win
    [B], counted [B] and, where there is such a column, reference [B 2 L].

  Raises:
    ValueError: as load_preferences.
  """
  merged = {**config.prompts.to_dict(), **config.pairs.to_dict()}
  merged |= {"held_out_path": "", "max_response_tokens": length}
  parts = load_preferences(ConfigDict(merged), tokenizer, seed)

  def arrange(columns: corpus.Columns, pairs: Callable) -> dict[str, Any]:
    batch = pairs(columns)
    tokens, mask = (
      np.stack([batch[f"{side}_{name}"] for side in "ab"], axis=1) for name in ("tokens", "mask")
    )
    stopped = np.any(np.isin(tokens, tokenizer.stop_ids) & mask, axis=-1)
    known = {name: np.stack(columns[name]) for name in ("reference",) if name in columns}
    responses = {"tokens": tokens, "mask": mask, "stopped": stopped}
    verdict = {"p_win": batch["p_win"], "counted": np.ones(len(tokens), bool)}
    return {"prompts": batch["prompts"], **responses, **verdict, **known}

  train, held_out = (
    dataclasses.replace(part, arrange=functools.partial(arrange, pairs=part.arrange))
    for part in parts
  )
  return dataclasses.replace(train, window=config.pairs.window), held_out


def token_pairs(
  prompts: Prompts, responses: Responses, opponents: Responses | None, p_win: np.ndarray
) -> Iterator[dict[str, Any]]:
  """Yields every compared pair of host arrays once, as a record of the task "tokens".

  Args:
    p_win: NaN where there is no verdict.
  """
  others = responses if opponents is None else opponents
  for row, prompt in enumerate(prompts.tokens):
    ours, theirs = (
      [tokens[mask].tolist() for tokens, mask in zip(x.tokens[row], x.mask[row], strict=True)]
      for x in (responses, others)
    )
    places = itertools.product(range(len(ours)), range(len(theirs)))
    inputs = prompt[prompts.mask[row]].tolist()
    for i, j in places if opponents is not None else itertools.combinations(range(len(ours)), 2):
      p_a = float(p_win[row, i, j])
      # Readers keep a pair of equals only as a tie; no loss learns from such a pair, whatever P is.
      if ours[i] == theirs[j] and not math.isnan(p_a):
        p_a = 0.5
      yield {"inputs": inputs, "a": ours[i], "b": theirs[j], "p_a": p_a}


def _windows(documents: corpus.Examples, width: int) -> corpus.Examples:
  """Returns the concatenated documents, cut into windows; the last may be shorter."""
  ids = np.concatenate([np.zeros(0, np.int32), *documents.columns["inputs"]])
  windows = [ids[i : i + width] for i in range(0, len(ids), width)]
  # A window's first token cannot be predicted, so it counts as the prompt.
  columns = {"inputs": [w[:1] for w in windows], "targets": [w[1:] for w in windows]}
  return dataclasses.replace(documents, columns=columns)


def _text(record: Any, texts: Texts) -> corpus.Features:
  return {"inputs": texts.document(record)}


def _responses(record: Any, texts: Texts) -> corpus.Features:
  record = forms.demonstration(record)
  return {"inputs": texts.prompt(record), "targets": texts.response(record, "response")}


def _preferences(record: Any, texts: Texts) -> corpus.Features:
  record = forms.comparison(record)
  a, b, p_win = sides(record)
  ids = {"a": texts.response(record, a), "b": texts.response(record, b)}
  return {"inputs": texts.prompt(record), **ids, "p_win": p_win}


def _tokens(record: Any, texts: Texts) -> corpus.Features:
  ids = {name: corpus.field(record, name, list) for name in ("inputs", "a", "b")}
  for name, values in ids.items():
    corpus.check_ids(values, texts.tokenizer, f"field {name!r}")
  corpus.check_prompt(ids["inputs"], texts.tokenizer, "field 'inputs'")
  for name in ("a", "b"):
    corpus.check_response(ids[name], texts.tokenizer, f"field {name!r}")
  return {**ids, "p_win": _probability(record)}


# {task: (how to encode a record, which features are responses)}
TASKS: dict[str, tuple[corpus.Encode, tuple[str, ...]]] = {
  "text": (_text, ()),
  "responses": (_responses, ("targets",)),
  "preferences": (_preferences, ("a", "b")),
  "tokens": (_tokens, ("a", "b")),
}


def sides(record: Any) -> tuple[str, str, float]:
  """Returns the names of the fields with responses a and b, and P(a ≻ b)."""
  if corpus.has(record, "chosen"):
    return "chosen", "rejected", 1.0
  return "response_a", "response_b", _p_win(record)


def _p_win(record: Any) -> float:
  """Returns P(a ≻ b) from "p_a" or from votes."""
  if corpus.has(record, "p_a"):
    return _probability(record)
  votes = [corpus.number(record, name) for name in ("votes_a", "votes_b", "ties")]
  if not all(0 <= count < math.inf for count in votes) or not any(votes):
    listed = ", ".join(f"{count:g}" for count in votes)
    raise ValueError(f"votes_a, votes_b, ties are {listed}: expected some, none negative")
  a, b, ties = (count / max(votes) for count in votes)  # so that their sum is finite
  return (a + ties / 2) / (a + b + ties)


def _probability(record: Any) -> float:
  p_a = corpus.number(record, "p_a")
  if not 0 <= p_a <= 1:
    raise ValueError(f"field 'p_a' is {p_a:g}, expected a probability")
  return p_a

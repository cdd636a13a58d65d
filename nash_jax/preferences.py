"""Supervised data through seqio: texts, responses to learn from, and preferences.

The formats are written down in docs/data.md.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
from absl import logging

from nash_jax import corpus
from nash_jax.types import Prompts

TASKS = ("text", "responses", "preferences", "tokens")


@dataclasses.dataclass(frozen=True)
class Sequences:
  """Token sequences for next-token training; `start` is the first token that counts, by sequence.

  <bos> never counts: nothing predicts it. `report` counts what was kept, dropped and cut.
  """

  tokens: corpus.Ragged
  start: np.ndarray
  max_tokens: int
  pad_id: int
  bos_id: int
  seed: int
  report: dict[str, int]

  def __len__(self) -> int:
    return len(self.tokens)

  def all(self, indices=None) -> dict[str, np.ndarray]:
    """Returns tokens i32[B T], mask bool[B T] and loss_mask bool[B T], right-padded.

    loss_mask[b, t] says that token t is to be predicted (from the tokens before it).
    """
    indices = np.arange(len(self)) if indices is None else np.asarray(indices)
    tokens, mask = self.tokens.padded(indices, self.max_tokens, self.pad_id)
    counts = np.arange(self.max_tokens)[None, :] >= self.start[indices][:, None]
    return {"tokens": tokens, "mask": mask, "loss_mask": mask & counts & (tokens != self.bos_id)}

  def batch(self, step: int, size: int, rows: slice = slice(None)) -> dict[str, np.ndarray]:
    """Returns a host's `rows` of the batch of `size` at `step`; see `all` for the arrays."""
    return self.all(corpus.draw(len(self), step, size, self.seed, rows))


@dataclasses.dataclass(frozen=True)
class Pairs:
  """Two responses to each prompt and the probability that the first is preferred.

  `report` counts what was kept, dropped and cut.
  """

  prompts: corpus.Ragged
  a: corpus.Ragged
  b: corpus.Ragged
  p_win: np.ndarray
  max_tokens: int
  max_response_tokens: int
  pad_id: int
  seed: int
  report: dict[str, int]

  def __len__(self) -> int:
    return len(self.prompts)

  def all(self, indices=None) -> dict[str, Prompts | np.ndarray]:
    """Returns prompts (left-padded `Prompts`), a_tokens, a_mask, b_tokens, b_mask [B L], p_win [B].

    Responses are right-padded and hold their stop token unless they were cut.
    """
    indices = np.arange(len(self)) if indices is None else np.asarray(indices)
    tokens, mask = self.prompts.padded(indices, self.max_tokens, self.pad_id, left=True)
    a_tokens, a_mask = self.a.padded(indices, self.max_response_tokens, self.pad_id)
    b_tokens, b_mask = self.b.padded(indices, self.max_response_tokens, self.pad_id)
    return {
      "prompts": Prompts(tokens, mask, indices.astype(np.int32)),
      "a_tokens": a_tokens,
      "a_mask": a_mask,
      "b_tokens": b_tokens,
      "b_mask": b_mask,
      "p_win": self.p_win[indices],
    }

  def batch(self, step: int, size: int, rows: slice = slice(None)) -> dict:
    """Returns a host's `rows` of the batch of `size` at `step`; see `all` for the arrays."""
    return self.all(corpus.draw(len(self), step, size, self.seed, rows))


def load(config, tokenizer, seed: int) -> tuple[Sequences, Sequences] | tuple[Pairs, Pairs]:
  """Reads, tokenises and splits supervised data: (train, held_out).

  Args:
    config: `task` (one of TASKS), `path`, `held_out`, `held_out_path` (as in prompts.load).
      `max_tokens`: of a window T for text, of a prompt Lp for the others, which also have
      `max_response_tokens` L (for responses T = Lp + L) and `overflow`: "drop" or "cut" what is
      over a budget; a cut prompt keeps <bos> and its end, a cut response its beginning.
    tokenizer: a Tokenizer.
    seed: of the order.

  Raises:
    ValueError: an unknown task, a missing file, a bad line (file and line named), nothing left.
  """
  loaders = dict(zip(TASKS, (_text, _responses, _preferences, _tokens), strict=True))
  if config.task not in loaders:
    raise ValueError(f"unknown task {config.task!r}: choose one of {', '.join(TASKS)}")
  train, held_out = loaders[config.task](config, tokenizer, seed)
  logging.info("examples to train on: %s, held out: %s", train.report, held_out.report)
  if not len(train):
    raise ValueError(f"no examples left of {config.path!r}: raise the budgets, or overflow='cut'")
  return train, held_out


def _split(config, read, encode, features, seed):
  def columns(path):
    sources = [(corpus.records(file, read), rate) for file, rate in corpus.files(path)]
    return corpus.run(config.task, sources, encode, features, seed)

  return corpus.split(config, columns)


def _text(config, tokenizer, seed) -> list[Sequences]:
  """{"text"}: documents <bos>text<eos>, joined and cut into windows; the last may be shorter."""

  def read(record):
    return {"text": corpus.field(record, "text")}

  def encode(record):
    return {"targets": [tokenizer.bos_id, *tokenizer.encode(record["text"]), tokenizer.eos_id]}

  columns, parts = _split(config, read, encode, {"targets": 1}, seed)
  width, ids, sets = config.max_tokens, (tokenizer.pad_id, tokenizer.bos_id), []
  for part in parts:
    values = np.concatenate([np.zeros(0, np.int32), *(columns["targets"][i] for i in part)])
    ends = np.minimum(np.arange(0, len(values) + width, width), len(values))
    start = np.ones(len(ends) - 1, np.int64)  # nothing comes before a window's first token
    report = {"kept": len(part), "dropped": 0, "cut": 0}
    sets.append(Sequences(corpus.Ragged(values, ends), start, width, *ids, seed, report))
  return sets


def _responses(config, tokenizer, seed) -> list[Sequences]:
  """{"prompt" or "messages", "response"}: the response alone counts."""

  def read(record):
    prompt = corpus.prompt(record, tokenizer)
    return {"prompt": prompt, "response": corpus.field(record, "response")}

  def encode(record):
    prompt, response = tokenizer.prompt(record["prompt"]), tokenizer.response(record["response"])
    return {"inputs": prompt, "targets": response}

  split = _split(config, read, encode, {"inputs": 1, "targets": 1}, seed)
  width, ids = config.max_tokens + config.max_response_tokens, tokenizer
  sets = []
  for (prompts, responses), report in _budgeted(config, *split):
    tokens = corpus.Ragged.of(map(np.concatenate, zip(prompts, responses, strict=True)))
    start = np.array([len(prompt) for prompt in prompts], np.int64)
    sets.append(Sequences(tokens, start, width, ids.pad_id, ids.bos_id, seed, report))
  return sets


def _preferences(config, tokenizer, seed) -> list[Pairs]:
  """{"prompt" or "messages", two responses and who won}."""

  def read(record):
    return {"prompt": corpus.prompt(record, tokenizer), **_judged(record)}

  def encode(record):
    a, b = tokenizer.response(record["a"]), tokenizer.response(record["b"])
    return {**record, "inputs": tokenizer.prompt(record["prompt"]), "a": a, "b": b}

  split = _split(config, read, encode, {"inputs": 1, "a": 1, "b": 1, "p_win": 0}, seed)
  return _pairs(config, split, tokenizer, seed)


def _judged(record: dict) -> dict:
  """Returns the two responses of a record in one of the three forms, and P(a ≻ b)."""
  if "chosen" in record:
    chosen, rejected = corpus.field(record, "chosen"), corpus.field(record, "rejected")
    return {"a": chosen, "b": rejected, "p_win": 1.0}
  pair = {"a": corpus.field(record, "response_a"), "b": corpus.field(record, "response_b")}
  if "p_a" in record:
    p_win = corpus.field(record, "p_a", (int, float))
    if not 0 <= p_win <= 1:
      raise ValueError(f"field 'p_a' is {p_win}, expected a probability")
    return {**pair, "p_win": p_win}
  a, b, ties = (corpus.field(record, name, (int, float)) for name in ("votes_a", "votes_b", "ties"))
  if min(a, b, ties) < 0 or a + b + ties == 0:
    raise ValueError(f"votes_a, votes_b, ties are {a}, {b}, {ties}: expected some, none negative")
  return {**pair, "p_win": (a + ties / 2) / (a + b + ties)}


_ARRAYS = ("prompt_tokens", "prompt_mask", "a_tokens", "a_mask", "b_tokens", "b_mask", "p_win")


def save_pairs(path, prompt_tokens, prompt_mask, a_tokens, a_mask, b_tokens, b_mask, p_win) -> None:
  """Writes preferences as token arrays [N Lp], [N L] (masks bool) and p_win [N], for "tokens"."""
  arrays = (prompt_tokens, prompt_mask, a_tokens, a_mask, b_tokens, b_mask, p_win)
  np.savez_compressed(path, **dict(zip(_ARRAYS, map(np.asarray, arrays), strict=True)))


def _tokens(config, tokenizer, seed) -> list[Pairs]:
  """An .npz of preferences that are token arrays already, as `save_pairs` writes it."""

  def columns(path):
    (path, _), *others = corpus.files(path)
    if others:
      raise ValueError(f"the task 'tokens' reads one .npz, got {config.path!r}")
    with np.load(path) as file:
      missing = [name for name in _ARRAYS if name not in file]
      if missing:
        raise ValueError(f"{path}: no array {', '.join(missing)}; expected {', '.join(_ARRAYS)}")
      arrays = {name: file[name] for name in _ARRAYS}
    found = {"p_win": list(arrays["p_win"])}
    for name in ("prompt", "a", "b"):
      tokens, masks = arrays[f"{name}_tokens"], arrays[f"{name}_mask"].astype(bool)
      if tokens.max(initial=0) >= tokenizer.size:
        raise ValueError(
          f"{path} has token {tokens.max()}, but this tokenizer only {tokenizer.size} pieces"
        )
      found[name] = [ids[mask] for ids, mask in zip(tokens, masks, strict=True)]
    return {name: found[name] for name in ("prompt", "a", "b", "p_win")}

  return _pairs(config, corpus.split(config, columns), tokenizer, seed)


def _pairs(config, split, tokenizer, seed: int) -> list[Pairs]:
  budgets = config.max_tokens, config.max_response_tokens
  sets = []
  for (*columns, p_win), report in _budgeted(config, *split):
    ragged = map(corpus.Ragged.of, columns)
    p_win = np.array(p_win, np.float32)
    sets.append(Pairs(*ragged, p_win, *budgets, tokenizer.pad_id, seed, report))
  return sets


def _budgeted(config, columns, parts) -> Iterator[tuple[list[list], dict[str, int]]]:
  """Yields the columns of each part, rows over a budget dropped or cut, and the counts of these."""
  corpus.check_overflow(config.overflow)
  width, length, cut = config.max_tokens, config.max_response_tokens, config.overflow == "cut"
  rows = list(zip(*columns.values(), strict=True))
  for part in parts:
    chosen = [rows[i] for i in part]
    over = [len(p) > width or any(np.size(r) > length for r in rest) for p, *rest in chosen]
    kept = [
      (corpus.cut(p, width), *(r[:length] if np.ndim(r) else r for r in rest))
      for (p, *rest), o in zip(chosen, over, strict=True)
      if cut or not o
    ]
    report = {"kept": len(kept), "dropped": len(part) - len(kept), "cut": sum(over) * cut}
    yield [list(column) for column in zip(*kept, strict=True)] or [[] for _ in columns], report

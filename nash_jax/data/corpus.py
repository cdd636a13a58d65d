"""Text files read once through seqio, tokenised, cut to budgets, padded; batches by step.

The order of a data set is the order in which seqio yields it, unshuffled and unrepeated. The batch
of step n is cut from one seeded permutation an epoch, so it depends on the seed and the step alone:
no iterator state needs saving, and any number of hosts sees the same examples.
"""

import dataclasses
import functools
import json
import os
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from nash_jax.data.tokenizer import Tokenizer
from nash_jax.types import Prompts
from nash_jax.validation import asset_path, one_of

Columns = Mapping[str, Sequence[Any]]  # by feature, one entry an example, as in Features
Features = dict[str, Any]  # of one example, by name: token ids i32[n], or a number
Parse = Callable[[str], Any]  # from a line of a file to a record
Encode = Callable[[Any], Features]  # from a record
Arrange = Callable[[Columns], Any]  # from columns that hold a batch's rows alone, to the batch


@functools.cache
def import_tensorflow() -> Any:
  """Returns the tensorflow module, which seqio needs (10 to 20 s), without its notes on CUDA."""
  stderr = os.dup(2)
  with tempfile.TemporaryFile() as notes:
    os.dup2(notes.fileno(), 2)
    try:
      import tensorflow as tf

      tf.config.set_visible_devices([], "GPU")  # the accelerator's memory is JAX's
    except BaseException:
      notes.seek(0)
      os.write(stderr, notes.read())
      raise
    finally:
      os.dup2(stderr, 2)
      os.close(stderr)
  return tf


@dataclasses.dataclass(frozen=True)
class Examples:
  """One part of a data set, to train on or held out.

  Attributes:
    seed: of the order.
    report: how many examples were kept, dropped and cut.
  """

  columns: Columns
  arrange: Arrange
  seed: int
  report: dict[str, int]

  def __len__(self) -> int:
    return len(next(iter(self.columns.values())))

  def all(self, indices: Iterable[int] | None = None) -> Any:
    """Returns the examples at `indices` of this part (default: every one, in order)."""
    chosen = range(len(self)) if indices is None else list(indices)
    return self.arrange({name: [x[i] for i in chosen] for name, x in self.columns.items()})

  def batch(self, step: int, size: int, rows: slice = slice(None)) -> Any:
    """Returns a host's `rows` of the batch of `size` at `step`, as numpy arrays.

    The batches of steps 0, 1, … are consecutive pieces of one seeded permutation after another, so
    every example comes once an epoch; a batch may straddle two epochs.
    """
    length = len(self)
    if not length:
      raise ValueError("this part of the data is empty, so it has no batches: see `held_out`")
    places = range(step * size, (step + 1) * size)[rows]
    return self.all(_epoch(length, p // length, self.seed)[p % length] for p in places)


Split = tuple[Examples, Examples]  # to train on, held out


@functools.lru_cache(maxsize=8)
def _epoch(length: int, epoch: int, seed: int) -> np.ndarray:
  return np.random.default_rng((seed, epoch)).permutation(length)


def pad(sequences: Sequence, width: int, pad_id: int, left: bool = False) -> tuple[Any, Any]:
  """Returns (tokens i32[B width], mask bool[B width]) of token ids, padded right or left."""
  tokens = np.full((len(sequences), width), pad_id, np.int32)
  mask = np.zeros(tokens.shape, bool)
  for row, ids in enumerate(sequences):
    columns = slice(width - len(ids), width) if left else slice(len(ids))
    tokens[row, columns], mask[row, columns] = ids, True
  return tokens, mask


def pad_prompts(columns: Columns, width: int, pad_id: int) -> Prompts:
  """Returns the prompts of examples, as numpy arrays."""
  tokens, mask = pad(columns["inputs"], width, pad_id, left=True)
  index: Any = np.array(columns["index"], np.int32)
  return Prompts(tokens, mask, index)


def load_examples(
  config, read: Callable[[str], Columns], budgets: dict[str, int], arrange: Arrange, seed: int
) -> Split:
  """Returns (train, held_out) of a data set.

  Args:
    config: its `path` goes to `read`. `overflow` says what to do with an example over a budget,
      "drop" it or "cut" it: a prompt to <bos> and its end, others to their beginning. Held out are
      the last `held_out` rows, or those of `held_out_path` where that is set.
    read: from a path to columns; `index`, the place in the whole data set, is added.
    budgets: the most tokens by feature, "inputs" being prompts.

  Raises:
    ValueError: an unknown overflow; nothing left to train on.
  """
  one_of("overflow", config.overflow, ("drop", "cut"))
  columns, held_out = dict(read(config.path)), config.held_out
  if config.held_out_path:
    more = read(config.held_out_path)
    columns = {name: [*column, *more[name]] for name, column in columns.items()}
    held_out = len(more["inputs"])
  count = len(columns["inputs"])
  if not 0 <= held_out < count:
    raise ValueError(f"held_out is {held_out} of {count} records: leave some to train on")
  columns["index"] = range(count)

  def part(rows: range) -> Examples:
    over = {i for i in rows if any(len(columns[f][i]) > most for f, most in budgets.items())}
    kept = [i for i in rows if config.overflow == "cut" or i not in over]
    report = {"kept": len(kept), "dropped": len(rows) - len(kept), "cut": len(over & {*kept})}
    chosen = {name: [column[i] for i in kept] for name, column in columns.items()}
    for name, most in budgets.items():
      chosen[name] = [_cut(name, ids, most) for ids in chosen[name]]
    return Examples(chosen, arrange, seed, report)

  train, held = part(range(count - held_out)), part(range(count - held_out, count))
  logging.info("examples to train on: %s, held out: %s", train.report, held.report)
  if not len(train):
    raise ValueError(
      f"no examples left: all {train.report['dropped']} are over max_tokens={config.max_tokens} (or"
      " max_response_tokens); raise it, or set overflow='cut'"
    )
  return train, held


def _cut(name: str, ids: np.ndarray, most: int) -> np.ndarray:
  if name != "inputs" or len(ids) <= most:
    return ids[:most]
  return np.concatenate([ids[:1], ids[len(ids) - most + 1 :]])  # the question is at the end


def parse_paths(path: str | Sequence[str]) -> list[tuple[str, float | None]]:
  """Splits "a.jsonl:3, b.jsonl:1" (or a tuple of such) into (file, rate) pairs; no rate is None."""
  pairs: list[tuple[str, float | None]] = []
  for entry in filter(None, map(str.strip, path.split(",") if isinstance(path, str) else path)):
    rated = re.fullmatch(r"(.+):(\d+\.?\d*|\.\d+)", entry)
    file = asset_path(rated[1] if rated else entry)
    if not pathlib.Path(file).is_file():
      raise ValueError(f"no data file {file!r}: give `path` the file(s) to read")
    pairs.append((file, float(rated[2]) if rated else None))
  if not pairs:
    raise ValueError("`path` is empty: give it the file(s) to read, separated by commas")
  if len({rate is None for _, rate in pairs}) > 1:
    raise ValueError(f"either every file of a mixture has a :rate or none has, got {path!r}")
  return pairs


def read_records(path: str, encode: Encode, parse: Parse = json.loads) -> list[Features]:
  """Encodes a file of one record a line, blank lines skipped; errors name the file and the line."""
  records = []
  for number, line in enumerate(pathlib.Path(path).read_text("utf-8").split("\n"), 1):
    if line.strip():
      try:
        features = encode(parse(line)).items()
        dtypes = {name: np.float32 if np.isscalar(x) else np.int32 for name, x in features}
        records.append({name: np.asarray(x, dtypes[name]) for name, x in features})
      except json.JSONDecodeError as error:
        message = f"{path}:{number}: not JSON ({error}); expected one object a line"
        raise ValueError(message) from None
      except (ValueError, TypeError) as error:
        raise ValueError(f"{path}:{number}: {error}") from None
  return records


def field(record: Any, name: str, types: type | tuple[type, ...] = str) -> Any:
  """Returns record[name]; ValueError where it is missing or of another type."""
  if not isinstance(record, dict) or name not in record:
    got = ", ".join(map(repr, record)) if isinstance(record, dict) else type(record).__name__
    raise ValueError(f"no field {name!r}, got {got}")
  if not isinstance(record[name], types) or isinstance(record[name], bool):
    raise ValueError(f"field {name!r} is {record[name]!r}, expected {types}")
  return record[name]


def encode_prompt(record: Any, tokenizer: Tokenizer) -> list[int]:
  """Returns the ids of a record's "prompt" (a string) or "messages" (a conversation)."""
  if isinstance(record, dict) and "messages" in record and "prompt" not in record:
    return tokenizer.prompt(field(record, "messages", list))
  return tokenizer.prompt(field(record, "prompt"))


def read_files(
  task: str, path: str | Sequence[str], encode: Encode, seed: int, parse: Parse = json.loads
) -> Columns:
  """Registers files as the seqio task or mixture `task`, and reads it.

  Args:
    task: its name; with rates it is a mixture of tasks task_0, task_1, …, which ends where the
      first of them does.
    path: as `parse_paths` takes it.
    seed: decides the order in which a mixture alternates.
  """
  import_tensorflow()
  import seqio

  files = parse_paths(path)
  parts = [read_records(file, encode, parse) for file, _ in files]
  for registry in (seqio.TaskRegistry, seqio.MixtureRegistry):
    registry.remove(task)  # a name belongs to what was loaded last
  if files[0][1] is None:
    _register(task, [record for part in parts for record in part])
  else:
    rates = [(f"{task}_{i}", rate) for i, (_, rate) in enumerate(files)]
    for (name, _), part in zip(rates, parts, strict=True):
      _register(name, part)
    seqio.MixtureRegistry.add(task, rates)
  return read_task(task, seed)


def read_task(task: str, seed: int) -> Columns:
  """Reads the registered seqio task or mixture `task` once, unshuffled and unrepeated."""
  import seqio

  dataset = seqio.get_mixture_or_task(task).get_dataset(
    sequence_length=None, split="train", shuffle=False, seed=seed, num_epochs=1
  )
  examples = list(dataset.as_numpy_iterator())
  return {feature: [example[feature] for example in examples] for feature in dataset.element_spec}


def _register(name: str, records: list[Features]) -> None:
  """Adds a seqio task over encoded records, in place of one of the same name."""
  tf = import_tensorflow()
  import seqio

  if not records:
    raise ValueError(f"the file(s) of {name!r} hold no records: expected one a line")
  tensors: dict[str, Any] = {}
  for feature, first in records[0].items():
    column = [record[feature] for record in records]
    if first.ndim:
      lengths = list(map(len, column))
      tensors[feature] = tf.RaggedTensor.from_row_lengths(np.concatenate(column), lengths)
    else:
      tensors[feature] = tf.constant(np.array(column))

  def read(split, shuffle_files, seed=None):
    del split, shuffle_files, seed  # one split, and the order is ours
    return tf.data.Dataset.from_tensor_slices(tensors)

  vocabulary = seqio.PassThroughVocabulary(size=0)
  features = {
    feature: seqio.Feature(vocabulary, add_eos=False, dtype=x.dtype, rank=x.shape.rank - 1)
    for feature, x in tensors.items()
  }
  source = seqio.FunctionDataSource(read, splits=["train"])
  seqio.TaskRegistry.remove(name)
  seqio.TaskRegistry.add(name, source, preprocessors=[], output_features=features)

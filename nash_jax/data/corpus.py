"""Text files read once, tokenised, through seqio; kept in memory and dealt out by step.

The order of a data set is the order in which seqio yields it, unshuffled and unrepeated. The batch
of step n is cut from one seeded permutation an epoch, so it depends on the seed and the step alone:
nothing of an iterator needs saving, and any number of hosts sees the same examples.
"""

import dataclasses
import functools
import json
import os
import pathlib
import re
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from nash_jax.validation import asset_path, one_of


@functools.cache
def import_tensorflow():
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


Columns = dict[str, Sequence]  # by feature, one entry an example: token ids i32[n], or a number


@dataclasses.dataclass(frozen=True)
class Examples:
  """One part of a data set, to train on or held out.

  Attributes:
    columns: the examples.
    arrange: makes a batch from columns of its rows alone.
    seed: of the order.
    report: how many examples were kept, dropped and cut.
  """

  columns: Columns
  arrange: Callable[[Columns], Any]
  seed: int
  report: dict[str, int]

  def __len__(self) -> int:
    return len(next(iter(self.columns.values())))

  def all(self, indices=None):
    """Returns the examples at some places of this part (default: every one, in order)."""
    indices = range(len(self)) if indices is None else indices
    return self.arrange({name: [x[i] for i in indices] for name, x in self.columns.items()})

  def batch(self, step: int, size: int, rows: slice = slice(None)):
    """Returns a host's `rows` of the batch of `size` at `step`, as numpy arrays.

    The batches of steps 0, 1, … are consecutive pieces of one seeded permutation after another, so
    every example comes once an epoch; a batch may straddle two epochs.
    """
    length = len(self)
    if not length:
      raise ValueError("this part of the data is empty, so it has no batches: see `held_out`")
    places = range(step * size, (step + 1) * size)[rows]
    return self.all([_epoch(length, p // length, self.seed)[p % length] for p in places])


@functools.lru_cache(maxsize=8)
def _epoch(length: int, epoch: int, seed: int) -> np.ndarray:
  return np.random.default_rng((seed, epoch)).permutation(length)


def pad(sequences: Sequence, width: int, pad_id: int, left: bool = False):
  """Returns (tokens i32[B width], mask bool[B width]) of token ids, padded right or left."""
  tokens = np.full((len(sequences), width), pad_id, np.int32)
  mask = np.zeros(tokens.shape, bool)
  for row, ids in enumerate(sequences):
    place = slice(width - len(ids), width) if left else slice(len(ids))
    tokens[row, place], mask[row, place] = ids, True
  return tokens, mask


def load_examples(config, read: Callable, budgets: dict[str, int], arrange: Callable, seed: int):
  """Returns (train, held_out) of a data set as `Examples`.

  Held out are the last `config.held_out` rows, or those of `config.held_out_path` where it is set.

  Args:
    config: `path`, `held_out`, `held_out_path`, and `overflow`: what to do with an example over a
      budget, "drop" it or "cut" it: a prompt to <bos> and its end, others to their beginning.
    read: from a path to Columns; `index`, the place in the whole data set, is added.
    budgets: the most tokens by feature, "inputs" being prompts.
    arrange: see Examples.
  """
  one_of("overflow", config.overflow, ("drop", "cut"))
  columns, held_out = read(config.path), config.held_out
  if config.held_out_path:
    more = read(config.held_out_path)
    columns = {name: [*column, *more[name]] for name, column in columns.items()}
    held_out = len(more["inputs"])
  count = len(columns["inputs"])
  if not 0 <= held_out < count:
    raise ValueError(f"held_out is {held_out} of {count} records: leave some to train on")
  columns["index"] = range(count)
  parts = []
  for rows in (range(count - held_out), range(count - held_out, count)):
    over = {i for i in rows if any(len(columns[f][i]) > most for f, most in budgets.items())}
    kept = [i for i in rows if config.overflow == "cut" or i not in over]
    report = {"kept": len(kept), "dropped": len(rows) - len(kept), "cut": len(over & {*kept})}
    chosen = {name: [column[i] for i in kept] for name, column in columns.items()}
    for name, most in budgets.items():
      chosen[name] = [_cut(name, ids, most) for ids in chosen[name]]
    parts.append(Examples(chosen, arrange, seed, report))
  return tuple(parts)


def _cut(name: str, ids: np.ndarray, most: int) -> np.ndarray:
  if name != "inputs" or len(ids) <= most:
    return ids[:most]
  return np.concatenate([ids[:1], ids[len(ids) - most + 1 :]])  # the question is at the end


def files(path) -> list[tuple[str, float | None]]:
  """Splits "a.jsonl:3, b.jsonl:1" (or a tuple of such) into (file, rate) pairs; no rate is None."""
  entries = path.split(",") if isinstance(path, str) else path
  pairs = []
  for entry in filter(None, map(str.strip, entries)):
    name, rate = re.fullmatch(r"(.+?)(?::(\d+\.?\d*|\.\d+))?", entry).groups()
    pairs.append((asset_path(name), rate and float(rate)))
  for name, _ in pairs:
    if not pathlib.Path(name).is_file():
      raise ValueError(f"no data file {name!r}: give `path` the file(s) to read")
  if not pairs:
    raise ValueError("`path` is empty: give it the file(s) to read, separated by commas")
  if len({rate is None for _, rate in pairs}) > 1:
    raise ValueError(f"either every file of a mixture has a :rate or none has, got {path!r}")
  return pairs


def records(path: str, encode: Callable, parse: Callable = json.loads) -> list[dict]:
  """Encodes a file of one record a line, blank lines skipped; errors name the file and the line."""
  found = []
  for number, line in enumerate(pathlib.Path(path).read_text("utf-8").split("\n"), 1):
    if line.strip():
      try:
        features = encode(parse(line)).items()
        kinds = {name: np.float32 if np.isscalar(x) else np.int32 for name, x in features}
        found.append({name: np.asarray(x, kinds[name]) for name, x in features})
      except json.JSONDecodeError as error:
        raise ValueError(
          f"{path}:{number}: not JSON ({error}); expected one object a line"
        ) from None
      except (ValueError, TypeError) as error:
        raise ValueError(f"{path}:{number}: {error}") from None
  return found


def field(record: dict, name: str, kind: type | tuple = str):
  """Returns record[name], checked to be there and of the right kind."""
  if not isinstance(record, dict) or name not in record:
    got = ", ".join(map(repr, record)) if isinstance(record, dict) else type(record).__name__
    raise ValueError(f"no field {name!r}, got {got}")
  if not isinstance(record[name], kind) or isinstance(record[name], bool):
    raise ValueError(f"field {name!r} is {record[name]!r}, expected {kind}")
  return record[name]


def prompt(record: dict, tokenizer) -> list[int]:
  """Returns the ids of a record's "prompt" (a string) or "messages" (a conversation)."""
  if isinstance(record, dict) and "messages" in record and "prompt" not in record:
    return tokenizer.prompt(field(record, "messages", list))
  return tokenizer.prompt(field(record, "prompt"))


def run(task: str, path, encode: Callable, seed: int, parse: Callable = json.loads) -> Columns:
  """Registers files as the seqio task or mixture `task`, and reads it.

  Args:
    task: its name; with rates it is a mixture of tasks task_0, task_1, …, which ends where the
      first of them does.
    path: as `files` takes it.
    encode: from a record to its features: token ids, or a float.
    seed: decides the order in which a mixture alternates.
    parse: from a line to a record.
  """
  import_tensorflow()
  import seqio

  parts, rates = zip(
    *((records(file, encode, parse), rate) for file, rate in files(path)), strict=True
  )
  for registry in (seqio.TaskRegistry, seqio.MixtureRegistry):
    registry.remove(task)  # a name belongs to what was loaded last
  if None in rates:
    _register(task, [record for part in parts for record in part])
  else:
    for i, part in enumerate(parts):
      _register(f"{task}_{i}", part)
    seqio.MixtureRegistry.add(task, [(f"{task}_{i}", rate) for i, rate in enumerate(rates)])
  return read(task, seed)


def read(task: str, seed: int) -> Columns:
  """Reads the registered seqio task or mixture `task` once, unshuffled and unrepeated."""
  import seqio

  dataset = seqio.get_mixture_or_task(task).get_dataset(
    sequence_length=None, split="train", shuffle=False, seed=seed, num_epochs=1
  )
  examples = list(dataset.as_numpy_iterator())
  return {feature: [example[feature] for example in examples] for feature in dataset.element_spec}


def _register(name: str, part: list[dict]) -> None:
  """Adds a seqio task over encoded records, in place of one of the same name."""
  tf = import_tensorflow()
  import seqio

  if not part:
    raise ValueError(f"the file(s) of {name!r} hold no records: expected one a line")
  columns = {feature: [record[feature] for record in part] for feature in part[0]}
  tensors = {
    feature: tf.RaggedTensor.from_row_lengths(np.concatenate(column), list(map(len, column)))
    if column[0].ndim
    else tf.constant(np.array(column))
    for feature, column in columns.items()
  }

  def source(split, shuffle_files, seed=None):
    del split, shuffle_files, seed  # one split, and the order is ours
    return tf.data.Dataset.from_tensor_slices(tensors)

  vocabulary = seqio.PassThroughVocabulary(size=0)
  seqio.TaskRegistry.remove(name)
  seqio.TaskRegistry.add(
    name,
    source=seqio.FunctionDataSource(source, splits=["train"]),
    preprocessors=[],
    output_features={
      feature: seqio.Feature(vocabulary, add_eos=False, dtype=x.dtype, rank=x.shape.rank - 1)
      for feature, x in tensors.items()
    },
  )

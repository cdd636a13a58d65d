"""Text files tokenised once by seqio, kept as ragged arrays, and dealt out by step.

The order of a data set is the order in which seqio yields it, unshuffled and unrepeated. The batch
of step n is cut from one seeded permutation an epoch, so it depends on the seed and the step alone:
nothing of an iterator needs saving, and any number of hosts sees the same examples.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Iterable

import numpy as np

from nash_jax import libraries
from nash_jax.config import path as expand


@dataclasses.dataclass(frozen=True)
class Ragged:
  """Sequences of different lengths laid end to end: the i-th is values[offsets[i]:offsets[i+1]]."""

  values: np.ndarray  # i32[total]
  offsets: np.ndarray  # i64[N + 1]

  @classmethod
  def of(cls, sequences: Iterable) -> "Ragged":
    """Lays the sequences end to end."""
    arrays = [np.asarray(sequence, np.int32) for sequence in sequences]
    values = np.concatenate([np.zeros(0, np.int32), *arrays])
    return cls(values, np.cumsum([0, *map(len, arrays)], dtype=np.int64))

  def __len__(self) -> int:
    return len(self.offsets) - 1

  def __getitem__(self, i: int) -> np.ndarray:
    return self.values[self.offsets[i] : self.offsets[i + 1]]

  @property
  def lengths(self) -> np.ndarray:
    return np.diff(self.offsets)

  def padded(self, indices, width: int, pad_id: int, left: bool = False):
    """Returns (tokens i32[B width], mask bool[B width]) of some sequences, padded left or right."""
    starts, lengths = self.offsets[indices], self.lengths[indices]
    columns = np.arange(width)[None, :]
    if left:
      columns = columns - (width - lengths)[:, None]
    mask = (columns >= 0) & (columns < lengths[:, None])
    places = np.where(mask, starts[:, None] + columns, 0)
    values = self.values if len(self.values) else np.zeros(1, np.int32)
    return np.where(mask, values[places], np.int32(pad_id)), mask


@functools.lru_cache(maxsize=8)
def _epoch(length: int, epoch: int, seed: int) -> np.ndarray:
  return np.random.default_rng((seed, epoch)).permutation(length)


def draw(length: int, step: int, size: int, seed: int, rows: slice = slice(None)) -> np.ndarray:
  """Returns which examples make up `rows` of the batch of `size` at `step`.

  The batches of steps 0, 1, … are consecutive pieces of one seeded permutation after another, so
  every example comes once an epoch; a batch may straddle two epochs.
  """
  if not length:
    raise ValueError("this part of the data is empty, so it has no batches: see `held_out`")
  places = np.arange(step * size, (step + 1) * size)[rows]
  return np.array([_epoch(length, int(p // length), seed)[p % length] for p in places], np.int64)


def files(path) -> list[tuple[str, float | None]]:
  """Splits "a.jsonl:3, b.jsonl:1" (or a tuple of such) into (file, rate) pairs; no rate is None."""
  entries = path.split(",") if isinstance(path, str) else path
  pairs = []
  for entry in filter(None, (expand(entry.strip()) for entry in entries)):
    name, _, rate = entry.rpartition(":")
    try:
      pairs.append((name, float(rate)) if name else (entry, None))
    except ValueError:
      pairs.append((entry, None))
  for name, _ in pairs:
    if not pathlib.Path(name).is_file():
      raise ValueError(f"no data file {name!r}: give `path` the file(s) to read")
  if not pairs:
    raise ValueError("`path` is empty: give it the file(s) to read, separated by commas")
  if len({rate is None for _, rate in pairs}) > 1:
    raise ValueError(f"either every file of a mixture has a :rate or none has, got {path!r}")
  return pairs


def records(path: str, read: Callable[[dict], dict], parse: Callable = json.loads) -> list[dict]:
  """Reads a file of one record a line, blank lines skipped; errors name the file and the line."""
  found = []
  for number, line in enumerate(pathlib.Path(path).read_text("utf-8").split("\n"), 1):
    if line.strip():
      try:
        found.append(read(parse(line)))
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


def prompt(record: dict, tokenizer) -> str | list[dict]:
  """Returns a record's "prompt" (a string) or "messages" (a conversation), checked."""
  if isinstance(record, dict) and "messages" in record and "prompt" not in record:
    found = field(record, "messages", list)
  else:
    found = field(record, "prompt")
  tokenizer.turns(found)
  return found


def check_overflow(overflow: str) -> None:
  """Raises ValueError unless `overflow` is "drop" or "cut"."""
  if overflow not in ("drop", "cut"):
    raise ValueError(f"unknown overflow {overflow!r}: choose 'drop' or 'cut'")


def cut(ids: np.ndarray, budget: int) -> np.ndarray:
  """Shortens a prompt to `budget` tokens: its <bos> and its end, where the question is."""
  return ids if len(ids) <= budget else np.concatenate([ids[:1], ids[len(ids) - budget + 1 :]])


def split(config, read: Callable) -> tuple[dict[str, list], list[np.ndarray]]:
  """Reads the columns of `config.path` and says which rows to train on and which to hold out.

  Held out are the last `config.held_out` rows, or those of `config.held_out_path` where it is set.
  """
  columns, held_out = read(config.path), config.held_out
  if config.held_out_path:
    more = read(config.held_out_path)
    columns = {name: [*column, *more[name]] for name, column in columns.items()}
    held_out = len(next(iter(more.values())))
  count = len(next(iter(columns.values())))
  if not 0 <= held_out < count:
    raise ValueError(f"held_out is {held_out} of {count} records: leave some to train on")
  return columns, [np.arange(count - held_out), np.arange(count - held_out, count)]


def run(
  name: str,
  sources: list[tuple[list[dict], float | None]],
  encode: Callable[[dict], dict],
  features: dict[str, int],
  seed: int,
) -> dict[str, list]:
  """Registers records as the seqio task `name` and runs it once, unshuffled and unrepeated.

  Args:
    name: of the task; with rates it is a mixture of tasks name_0, name_1, …, which ends where the
      first of them does.
    sources: records of each file, and its rate.
    encode: a record's features: token lists or numbers.
    features: rank by feature: 1 for tokens (i32), 0 for a number (f32).
    seed: decides the order in which a mixture alternates.

  Returns:
    feature: its value in every example, in order.
  """
  libraries.tensorflow()
  import seqio

  if any(rate is None for _, rate in sources):
    sources = [([record for part, _ in sources for record in part], None)]
  names = [name] if len(sources) == 1 else [f"{name}_{i}" for i in range(len(sources))]
  for registry in (seqio.TaskRegistry, seqio.MixtureRegistry):
    registry.remove(name)  # a name belongs to what was loaded last
  for task, (part, _) in zip(names, sources, strict=True):
    _register(task, part, encode, features)
  if len(names) > 1:
    seqio.MixtureRegistry.add(name, list(zip(names, (r for _, r in sources), strict=True)))
  return read_task(name, features, seed)


def read_task(name: str, features: Iterable[str], seed: int) -> dict[str, list]:
  """Reads the registered seqio task or mixture `name` once, unshuffled and unrepeated."""
  libraries.tensorflow()
  import seqio

  dataset = seqio.get_mixture_or_task(name).get_dataset(
    sequence_length=None, split="train", shuffle=False, seed=seed, num_epochs=1
  )
  examples = list(dataset.as_numpy_iterator())
  return {feature: [example[feature] for example in examples] for feature in features}


def _register(name: str, part: list[dict], encode: Callable, features: dict[str, int]) -> None:
  """Adds a seqio task over records, in place of one of the same name."""
  tf = libraries.tensorflow()
  import seqio

  types = {feature: tf.int32 if rank else tf.float32 for feature, rank in features.items()}

  def source(split, shuffle_files, seed=None):
    del split, shuffle_files, seed  # one split, and the order is ours
    lines = [json.dumps(record) for record in part]
    return tf.data.Dataset.from_tensor_slices({"record": tf.constant(lines, tf.string)})

  def tokenise(dataset):
    def arrays(line):
      encoded = encode(json.loads(line))
      return [np.asarray(encoded[f], t.as_numpy_dtype) for f, t in types.items()]

    def example(element):
      values = tf.numpy_function(arrays, [element["record"]], list(types.values()))
      for value, rank in zip(values, features.values(), strict=True):
        value.set_shape([None] * rank)
      return dict(zip(features, values, strict=True))

    return dataset.map(example)

  vocabulary = seqio.PassThroughVocabulary(size=0)
  seqio.TaskRegistry.remove(name)
  seqio.TaskRegistry.add(
    name,
    source=seqio.FunctionDataSource(source, splits=["train"]),
    preprocessors=[tokenise],
    output_features={
      feature: seqio.Feature(vocabulary, add_eos=False, dtype=types[feature], rank=rank)
      for feature, rank in features.items()
    },
  )

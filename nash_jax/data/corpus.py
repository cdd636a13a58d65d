"""Reads text files once through seqio, tokenises, cuts and pads them, and makes batches by step.

The order of a data set is that of seqio, unshuffled and unrepeated. Every epoch has a seeded
permutation, and the batch of a step is a piece of it, so a batch depends only on the seed and the
step. No iterator state needs saving, and any number of hosts sees the same examples.
"""

import collections
import dataclasses
import functools
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from nash_jax.data import files
from nash_jax.data.chat_template import TEMPLATES, check_untemplated, text_of, turns, with_system
from nash_jax.data.tokenizer import Tokenizer
from nash_jax.types import Prompts
from nash_jax.validation import asset_path, one_of, require

Columns = Mapping[str, Sequence[Any]]  # {feature: an entry per example}, entries as in Features
Features = dict[str, Any]  # {name: token ids i32[n], or a number} of one example
Parse = Callable[[str], Any]  # line of a file -> record
Encode = Callable[[Any, "Texts"], Features]  # (record, texts) -> features
# (a file's records, callback for bad ones or None to raise, {reason: number left out} to update) ->
# the records to encode
Gather = Callable[
  [Iterable[files.Placed], files.Skip | None, collections.Counter[str]], Iterable[files.Placed]
]
Arrange = Callable[[Columns], Any]  # columns with the rows of a batch -> the batch


@functools.cache
def import_tensorflow() -> Any:
  """Imports tensorflow for seqio (10 to 20 s), and silences its messages about CUDA."""
  stderr = os.dup(2)
  with tempfile.TemporaryFile() as notes:
    os.dup2(notes.fileno(), 2)
    try:
      import tensorflow as tf

      tf.config.set_visible_devices([], "GPU")  # leave the accelerator's memory to JAX
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
  """The training or held-out part of a data set.

  Attributes:
    seed: determines the order.
    window: so many consecutive examples are shuffled among themselves; 0 shuffles all.
    report: numbers of examples that were kept, dropped and cut, and of `equal` pairs and
      `duplicates` if there are any (see load_examples).
  """

  columns: Columns
  arrange: Arrange
  seed: int
  report: dict[str, int]
  window: int = 0

  def __len__(self) -> int:
    return len(next(iter(self.columns.values())))

  def all(self, indices: Iterable[int] | None = None) -> Any:
    """Returns the examples at `indices`; by default all, in order."""
    chosen = range(len(self)) if indices is None else list(indices)
    return self.arrange({name: [x[i] for i in chosen] for name, x in self.columns.items()})

  def batch(self, step: int, size: int, rows: slice = slice(None)) -> Any:
    """Returns a host's `rows` of the batch of `size` at `step`, as numpy arrays.

    Every example appears once per epoch; a batch may span two epochs.
    """
    return self.all(self.places(step, size, rows))

  def places(self, step: int, size: int, rows: slice = slice(None)) -> list[int]:
    """Returns which examples `batch` returns."""
    length = len(self)
    if not length:
      raise ValueError("this part of the data is empty, so it has no batches: see `held_out`")
    numbers = range(step * size, (step + 1) * size)[rows]
    return [int(_epoch(length, n // length, self.seed, self.window)[n % length]) for n in numbers]


Split = tuple[Examples, Examples]  # training, held out


@functools.lru_cache(maxsize=8)
def _epoch(length: int, epoch: int, seed: int, window: int) -> np.ndarray:
  rng, size = np.random.default_rng((seed, epoch)), window or length
  starts = range(0, length, size)
  return np.concatenate([start + rng.permutation(min(size, length - start)) for start in starts])


def pad(sequences: Sequence, width: int, pad_id: int, left: bool = False) -> tuple[Any, Any]:
  """Returns (tokens i32[B width], mask bool[B width]) of token ids, padded right or left."""
  tokens = np.full((len(sequences), width), pad_id, np.int32)
  mask = np.zeros(tokens.shape, bool)
  for row, ids in enumerate(sequences):
    columns = slice(width - len(ids), width) if left else slice(len(ids))
    tokens[row, columns], mask[row, columns] = ids, True
  return tokens, mask


def pad_prompts(columns: Columns, width: int, pad_id: int) -> Prompts:
  """Returns the examples' prompts as numpy arrays."""
  tokens, mask = pad(columns["inputs"], width, pad_id, left=True)
  index: Any = np.array(columns["index"], np.int32)
  return Prompts(tokens, mask, index)


def load_examples(
  config,
  read: Callable[[str], Columns],
  budgets: dict[str, int],
  arrange: Arrange,
  seed: int,
  tokenizer: Tokenizer,
) -> Split:
  """Returns (train, held_out) of a data set.

  Pairs whose responses have the same tokens, perhaps only after a cut, are left out and reported as
  `equal`, unless they are a tie. `duplicates` in the held-out part's report counts its prompts (or
  texts) that are also trained on; in the training part's report, the examples left out for that.

  Args:
    config: `path` goes to `read`. `overflow`: whether to "drop" or "cut" an example over a budget;
      a prompt keeps its end (Tokenizer.cut_prompt), a response its start. The last `held_out` rows
      are held out, or those of `held_out_path` if that is set. `duplicates`: whether to "keep" or
      "drop" training examples whose prompt is held out.
    read: path -> columns, to which `index` is added: the position in the whole data set.
    budgets: {feature: most tokens}; prompts are "inputs".

  Raises:
    ValueError: an unknown overflow; nothing left to train on.
  """
  one_of("overflow", config.overflow, ("drop", "cut"))
  one_of("duplicates", config.duplicates, ("keep", "drop"))
  columns, held_out = dict(read(config.path)), config.held_out
  if config.held_out_path:
    more = read(config.held_out_path)
    columns = {name: [*column, *more[name]] for name, column in columns.items()}
    held_out = len(more["inputs"])
  count, source = len(columns["inputs"]), f"(task {config.task!r}, path {config.path!r})"
  if not 0 <= held_out < count:
    raise ValueError(f"held_out is {held_out} of {count} records: leave some to train on {source}")
  columns["index"] = range(count)
  over = {i for i in range(count) if any(len(columns[f][i]) > most for f, most in budgets.items())}
  dropped = over if config.overflow == "drop" else set()

  def part(rows: range) -> Examples:
    chosen = {
      name: [column[i] for i in rows if i not in dropped] for name, column in columns.items()
    }
    for name, most in budgets.items():
      cut = tokenizer.cut_prompt if name == "inputs" else lambda ids, most: ids[:most]
      chosen[name] = [cut(ids, most) if len(ids) > most else ids for ids in chosen[name]]
    examples = Examples(chosen, arrange, seed, {})
    return _without(examples, _unequal(chosen), "equal") if "b" in chosen else examples

  train, held = part(range(count - held_out)), part(range(count - held_out, count))
  train = without_duplicates(train, held, config)
  for examples, rows in ((train, range(count - held_out)), (held, range(count - held_out, count))):
    kept = examples.columns["index"]
    counts = {"kept": len(kept), "dropped": len(dropped & {*rows}), "cut": len(over & {*kept})}
    examples.report.update(counts)
  logging.info("examples to train on: %s, held out: %s", train.report, held.report)
  _tell_over(len(over), count, budgets, config)
  if not len(train):
    number = train.report["dropped"]
    everything = "all " if number == count - held_out else ""
    others = [f", {train.report[n]} {n}" for n in ("equal", "duplicates") if n in train.report]
    raise ValueError(
      f"no examples left: {everything}{number} are over max_tokens={config.max_tokens} (or"
      f" max_response_tokens){''.join(others)}; raise it, or set overflow='cut' {source}"
    )
  fix = "Raise it, set overflow='cut', or hold others out."
  expected = f"some of the {held_out} within max_tokens, with responses that differ"
  require(len(held) > 0 or not held_out, f"held-out examples {source}", expected, "none", fix)
  return train, held


def _tell_over(over: int, count: int, budgets: dict[str, int], config) -> None:
  """Warns if most examples are over a budget."""
  names = {name: "max_tokens" if name == "inputs" else "max_response_tokens" for name in budgets}
  most = ", ".join(sorted({f"{names[name]}={budgets[name]}" for name in budgets}))
  fate, share = "dropped" if config.overflow == "drop" else "cut", 100 * over // count
  message = "%d of %d examples (%d%%) are over %s and are %s: raise these, unless that is intended"
  if 2 * over > count:
    logging.warning(message, over, count, share, most, fate)


def without_duplicates(train: Examples, held: Examples, config) -> Examples:
  """Logs how many held-out prompts are also trained on, and returns the training part."""
  seen, evaluated = ({*map(_key, part.columns["inputs"])} for part in (train, held))
  if config.duplicates == "drop":
    different = [_key(ids) not in evaluated for ids in train.columns["inputs"]]
    return _without(train, different, "duplicates")
  if shared := sum(_key(ids) in seen for ids in held.columns["inputs"]):
    held.report["duplicates"] = shared
    message = (
      "%d of %d held-out prompts or texts are also trained on: duplicates='drop' leaves them"
    )
    # One file for both is deliberate: a game is evaluated on the prompts that it is played on.
    level = logging.INFO if config.held_out_path == config.path else logging.WARNING
    logging.log(level, f"{message} out of training", shared, len(held))
  return train


def _key(ids: Any) -> bytes:
  return np.asarray(ids, np.int32).tobytes()


def _unequal(columns: Columns) -> list[bool]:
  """Returns whether each pair differs or is a tie."""
  sides = zip(columns["a"], columns["b"], columns["p_win"], strict=True)
  return [_key(a) != _key(b) or float(p_win) == 0.5 for a, b, p_win in sides]


def _without(examples: Examples, kept: list[bool], reason: str) -> Examples:
  """Returns the kept examples, and counts the others under `reason` in the report."""
  if left_out := len(kept) - sum(kept):
    columns = {
      name: [x for x, keep in zip(column, kept, strict=True) if keep]
      for name, column in examples.columns.items()
    }
    report = {**examples.report, reason: left_out}
    return dataclasses.replace(examples, columns=columns, report=report)
  return examples


def parse_paths(path: str | Sequence[str], flag: str = "`path`") -> list[tuple[str, float | None]]:
  """Splits "a.jsonl:3, b.jsonl:1", or a tuple, into pairs of file and rate (None without one).

  A folder is replaced by its files of records, sorted by name.

  Args:
    flag: what errors call the argument in which the user gave `path`.
  """
  pairs: list[tuple[str, float | None]] = []
  for entry in filter(None, map(str.strip, path.split(",") if isinstance(path, str) else path)):
    rated = re.fullmatch(r"(.+):(\d+\.?\d*|\.\d+)", entry)
    rated = None if os.path.isfile(entry) else rated  # the colon is part of the name
    file = asset_path(rated[1] if rated else entry)
    if not os.path.exists(file):
      raise ValueError(f"no data file {file!r}: give {flag} the file(s) to read")
    rate = float(rated[2]) if rated else None
    shards = files.in_folder(file) if os.path.isdir(file) else [file]
    good = rate is None or 0 < rate < math.inf
    require(
      good, f"rate of {file!r}", "a positive number", rate, "Leave the file out instead of 0."
    )
    whole, fix = rate is None or len(shards) == 1, "Join its files into one."
    require(whole, f"files in {file!r}", "one, as the folder has a rate", len(shards), fix)
    pairs += [(shard, rate) for shard in shards]
  if not pairs:
    raise ValueError(f"{flag} is empty: give it the file(s) to read, separated by commas")
  if len({rate is None for _, rate in pairs}) > 1:
    raise ValueError(f"either every file of a mixture has a :rate or none has, got {path!r}")
  return pairs


def _checked(text: str) -> str:
  """Returns a text; raises ValueError if it cannot be tokenised, or already has the template."""
  check_untemplated(files.check_text(text))
  return text


def prompt_of(record: Any) -> str | list[dict[str, Any]]:
  """Returns and checks a record's "prompt" or "messages": a text, or a conversation."""
  name = "messages" if has(record, "messages") and not record.get("prompt") else "prompt"
  prompt = field(record, name, list if name == "messages" else (str, list))
  for extra in ("tools", "chat_template_kwargs"):
    if record.get(extra):
      raise ValueError(
        f"field {extra!r} is {files.shorten(record[extra])}: prompts cannot show it here"
      )
  for text in _texts(prompt):
    _checked(text)
  return prompt


def _texts(prompt: str | list[dict[str, Any]]) -> list[str]:
  """Returns the texts of a prompt; raises ValueError if its messages do not wait for an answer."""
  return [prompt] if isinstance(prompt, str) else [with_system(t) for t in turns(prompt)]


def response_of(record: Any, name: str) -> str:
  """Returns and checks a field that is a response: a text, or one message of the model."""
  value = field(record, name, (str, list))
  if isinstance(value, list):
    message = value[0] if len(value) == 1 and isinstance(value[0], dict) else {}
    text = text_of(message.get("content"))
    if text is None or message.get("role") not in ("assistant", "model"):
      raise ValueError(
        f"field {name!r} is {files.shorten(value)}: expected a text, or one message of the"
        " assistant; the conversation before it goes into 'messages' (docs/data.md)"
      )
    value = text
  return _checked(value)


def document_of(record: Any) -> str:
  """Returns and checks a record's "text"."""
  return _checked(field(record, "text"))


class Texts:
  """Turns the texts of a file's records into ids, and counts records that spell out markers."""

  # Gemma's markers, and those of other families' templates.
  _SPELLED = re.compile(
    r"<(?:bos|eos|(?:start|end)_of_turn|\|\w+\|?|\w+\|)>|\[/?INST\]|\nAssistant:"
  )

  def __init__(self, tokenizer: Tokenizer):
    self.tokenizer, self.spelled = tokenizer, False
    self._trim = TEMPLATES[tokenizer.template].response

  def _noted(self, text: str) -> str:
    self.spelled |= self._SPELLED.search(text) is not None
    return text

  def prompt(self, record: Any) -> list[int]:
    """Returns the ids of a record's prompt."""
    prompt = prompt_of(record)
    for text in _texts(prompt):
      self._noted(text)
    return self.tokenizer.prompt(prompt)

  def response(self, record: Any, name: str) -> list[int]:
    """Returns the ids of a field that is a response."""
    return self.tokenizer.response(self._trim(self._noted(response_of(record, name))))

  def document(self, record: Any) -> list[int]:
    """Returns the ids of a record's "text" between <bos> and <eos>."""
    text = self._noted(document_of(record)).removeprefix("<bos>")
    return [self.tokenizer.bos_id, *self.tokenizer.encode(text), self.tokenizer.eos_id]


def read_records(
  path: str,
  encode: Encode,
  tokenizer: Tokenizer,
  parse: Parse = json.loads,
  bad: str = "stop",
  gather: Gather | None = None,
) -> list[Features]:
  """Encodes a file's records; errors name the file and the line.

  Args:
    bad: "stop" with an error at a record that cannot be read, or "skip" it.
    gather: turns the file's records into those to encode.
  """
  one_of("bad", bad, ("stop", "skip"))
  records, spelled, skipped = [], [], list[ValueError]()
  skip, left_out = skipped.append if bad == "skip" else None, collections.Counter[str]()
  rows = files.read_records(path, parse, skip)
  for place, record in gather(rows, skip, left_out) if gather else rows:
    texts = Texts(tokenizer)
    try:
      features = encode(record, texts).items()
    except (ValueError, TypeError) as error:
      skipped.append(files.placed(place, error))
      if skip is None:
        raise skipped[-1] from None
      continue
    dtypes = {name: np.float32 if np.isscalar(x) else np.int32 for name, x in features}
    records.append({name: np.asarray(x, dtypes[name]) for name, x in features})
    spelled += [place] * texts.spelled
  for reason, count in left_out.items():
    logging.info("%s: %d left out: %s", path, count, reason)
  if skipped:
    message = "%s: %d of %d records cannot be read and are left out, the first because %s"
    logging.warning(message, path, len(skipped), len(skipped) + len(records), skipped[0])
  if spelled:
    message = (
      "%s: %d of %d records spell out markers such as <bos> or <end_of_turn> (the first: %s)"
    )
    advice = (
      "; they are read as text, except a <bos> at the start of a prompt or a document, which is"
      " dropped"
    )
    logging.warning(message + advice, path, len(spelled), len(records), spelled[0])
  return records


def has(record: Any, name: str) -> bool:
  """Returns whether a record has a field, and it is not null, as an empty column of a table is."""
  return isinstance(record, dict) and record.get(name) is not None


def field(record: Any, name: str, types: type | tuple[type, ...] = str) -> Any:
  """Returns record[name]; raises ValueError if it is missing or has another type."""
  if not isinstance(record, dict) or name not in record:
    is_object = isinstance(record, dict)
    got = ", ".join(map(files.shorten, [*record][:20])) if is_object else type(record).__name__
    raise ValueError(f"no field {name!r}, got {got}")
  if not isinstance(record[name], types) or isinstance(record[name], bool):
    listed = " or ".join(t.__name__ for t in (types if isinstance(types, tuple) else (types,)))
    got = files.shorten(record[name])
    raise ValueError(f"field {name!r} is {got}, expected {listed}; see docs/data.md")
  return record[name]


def number(record: Any, name: str) -> float:
  """Returns record[name] as a float; raises ValueError if it is no finite number."""
  value = field(record, name, (int, float))
  try:
    return float(value)
  except OverflowError:
    raise ValueError(f"field {name!r} is {files.shorten(value)}, expected a number") from None


def check_ids(ids: Sequence[Any], tokenizer: Tokenizer, what: str) -> None:
  """Raises ValueError unless all token ids are the tokenizer's."""
  if isinstance(ids, np.ndarray):
    wrong = ids[(ids < 0) | (ids >= tokenizer.size)].tolist()
  else:
    wrong = [i for i in ids if type(i) is not int or not 0 <= i < tokenizer.size]
  if wrong:
    expected = f"ids of this tokenizer's {tokenizer.size} pieces"
    raise ValueError(f"{what} holds {files.shorten(wrong[0])}, expected {expected}")


def check_prompt(ids: Sequence[int], tokenizer: Tokenizer, what: str) -> None:
  """Raises ValueError unless token ids are a prompt that waits for a response."""
  require(len(ids) > 0, what, "at least one token of a prompt", 0, "Leave such prompts out.")
  fix = "A response would begin after the end: leave the stop token out (seqio: add_eos=False)."
  last = int(ids[-1])
  require(last not in tokenizer.stop_ids, what, "a prompt that waits for a response", last, fix)
  _check_absent(ids, [tokenizer.pad_id], what, "a prompt without <pad>", _PADDING)
  fix = "Leave the others out."
  _check_absent(ids, [tokenizer.bos_id], what, "one <bos>, at the start", fix, start=1)
  fix = "Make each text a prompt of its own."
  _check_absent(ids, [tokenizer.eos_id], what, "one text, without <eos>", fix)


def check_response(ids: Sequence[int], tokenizer: Tokenizer, what: str) -> None:
  """Raises ValueError unless token ids are a response, without padding or tokens after its end."""
  _check_absent(ids, [tokenizer.pad_id], what, "a response without <pad>", _PADDING)
  fix = "It belongs to the prompt."
  _check_absent(ids, [tokenizer.bos_id], what, "a response without <bos>", fix)
  expected, fix = "a response that ends at its stop token", "Leave out what follows."
  _check_absent(ids[:-1], tokenizer.stop_ids, what, expected, fix)


_PADDING = "Leave it out: padding is added here."


def _check_absent(
  ids: Sequence[int], ids_absent: Sequence[int], what: str, expected: str, fix: str, start: int = 0
) -> None:
  for place, i in enumerate(ids):
    absent = place < start or int(i) not in ids_absent
    require(absent, f"{what}, place {place}", expected, int(i), fix)


def read_files(
  task: str,
  path: str | Sequence[str],
  encode: Encode,
  tokenizer: Tokenizer,
  seed: int,
  parse: Parse = json.loads,
  bad: str = "stop",
  gather: Gather | None = None,
) -> Columns:
  """Registers files as the seqio task or mixture `task`, and reads it.

  Args:
    task: the name; with rates, a mixture of tasks task_0, task_1, …, which ends when the first of
      them ends.
    path: see `parse_paths`.
    seed: determines the order in which a mixture alternates.
    bad, gather: as in read_records.
  """
  pairs = parse_paths(path)
  parts = [read_records(file, encode, tokenizer, parse, bad, gather) for file, _ in pairs]
  empty = [file for (file, _), part in zip(pairs, parts, strict=True) if not part]
  if empty and (pairs[0][1] is not None or len(empty) == len(pairs)):
    raise ValueError(f"the file(s) {', '.join(empty)} hold no records: expected one a line")
  return _through_seqio(task, parts, [rate for _, rate in pairs], seed)


def _through_seqio(
  task: str, parts: list[list[Features]], rates: list[float | None], seed: int
) -> Columns:
  """Returns the files' records in the order of the seqio task or mixture `task`."""
  import_tensorflow()
  import seqio

  for registry in (seqio.TaskRegistry, seqio.MixtureRegistry):
    registry.remove(task)  # the last data set loaded owns the name
  if rates[0] is None:
    _register(task, [record for part in parts for record in part])
  else:
    names = [f"{task}_{i}" for i in range(len(parts))]
    for name, part in zip(names, parts, strict=True):
      _register(name, part)
    seqio.MixtureRegistry.add(task, list(zip(names, rates, strict=True)))
  return read_task(task, seed)


def read_task(task: str, seed: int) -> Columns:
  """Reads the registered seqio task or mixture `task` once, unshuffled and unrepeated."""
  import seqio

  provider = seqio.get_mixture_or_task(task)
  splits = list(provider.splits)
  fix = "Register its prompts under that split."
  require("train" in splits, f"splits of the task {task!r}", "train among them", splits, fix)
  dataset = provider.get_dataset(
    sequence_length=None, split="train", shuffle=False, seed=seed, num_epochs=1
  )
  examples = list(dataset.as_numpy_iterator())
  return {feature: [example[feature] for example in examples] for feature in dataset.element_spec}


def _register(name: str, records: list[Features]) -> None:
  """Adds a seqio task over encoded records, and replaces one of the same name."""
  tf = import_tensorflow()
  import seqio

  tensors: dict[str, Any] = {}
  for feature, first in records[0].items():
    column = [record[feature] for record in records]
    if first.ndim:
      lengths = list(map(len, column))
      tensors[feature] = tf.RaggedTensor.from_row_lengths(np.concatenate(column), lengths)
    else:
      tensors[feature] = tf.constant(np.array(column))

  def read(split, shuffle_files, seed=None):
    del split, shuffle_files, seed  # there is one split, and its order is ours
    return tf.data.Dataset.from_tensor_slices(tensors)

  vocabulary = seqio.PassThroughVocabulary(size=0)
  features = {
    feature: seqio.Feature(vocabulary, add_eos=False, dtype=x.dtype, rank=x.shape.rank - 1)
    for feature, x in tensors.items()
  }
  source = seqio.FunctionDataSource(read, splits=["train"])
  seqio.TaskRegistry.remove(name)
  seqio.TaskRegistry.add(name, source, preprocessors=[], output_features=features)

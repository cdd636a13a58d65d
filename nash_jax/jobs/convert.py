"""Converts records of any form to ours, and reports their forms and what is left out, and why."""

import collections
import contextlib
import itertools
import json
import os
import pathlib
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from nash_jax import validation
from nash_jax.data import corpus, files, forms, preferences
from nash_jax.data.chat_template import text_of
from nash_jax.run.files import replacing
from nash_jax.validation import one_of, require

Record = dict[str, Any]
_LINE = json.JSONEncoder(ensure_ascii=False, allow_nan=False)


def run(config: ConfigDict) -> None:
  """Calls `convert` and prints its report.

  Args:
    config: the arguments of `convert`; see configs/convert.py.
  """
  names = ("source", "output", "task", "bad", "seed")
  found = convert(**{name: config[name] for name in names})
  print(found.report(config.source, config.output))


class Found:
  """What was found in files.

  Attributes:
    task: the task that the output is for, one of TASKS.
    read, written: numbers of records.
    forms: {form: number of records}.
    left_out: {reason: number of records}; unreadable records share the message of the first.
  """

  def __init__(self, task: str):
    self.task, self.read, self.written = task, 0, 0
    self.forms, self.left_out = collections.Counter[str](), collections.Counter[str]()
    self._first: dict[tuple[str, int], str] = {}

  def skip(self, error: ValueError) -> None:
    """Counts an unreadable record; records refused by the same line of code share a reason."""
    frames = traceback.extract_tb(error.__traceback__)
    raised = [(x.filename, x.lineno or 0) for x in frames if x.filename != validation.__file__]
    self.left_out[self._first.setdefault(raised[-1], str(error))] += 1

  def report(self, source: str, output: str) -> str:
    """Returns the report as lines of text."""
    lines = [f"{source}: {self.read} records", *_listed(self.forms)]
    lines += [f"{output}: {self.written} {TASKS[self.task].noun}"]
    if self.left_out:
      lines += ["left out, by reason:", *_listed(self.left_out)]
    return "\n".join(lines)


def _listed(counts: collections.Counter[str]) -> list[str]:
  return [f"  {count} {name}" for name, count in counts.most_common()]


def convert(
  source: str, output: str, task: str = "found", bad: str = "stop", seed: int = 0
) -> Found:
  """Writes the records of files in the form that `task` reads; docs/data.md has all forms.

  Args:
    source: files or folders, separated by commas; the output itself is never read.
    output: the file to write, after all are read.
    task: one of TASKS; "found" is that of the first record.
    bad: "stop" at a record that cannot be read or is for another task, or "skip" it.
    seed: determines which response of a comparison comes first.

  Raises:
    ValueError: no such files, a record that cannot be read (names file and line), or nothing to
      write; an existing output is unchanged.
  """
  one_of("task", task, ("found", *TASKS))
  one_of("bad", bad, ("stop", "skip"))
  whole = isinstance(seed, int) and seed >= 0
  require(whole, "seed", "a whole number from 0 on", seed, "The default is 0.")
  rng, paths = np.random.default_rng(seed), _inputs(source, output)
  with contextlib.suppress(OSError):  # `replacing` raises a better error
    pathlib.Path(output).parent.mkdir(parents=True, exist_ok=True)
  with replacing(output) as part, part.open("w", encoding="utf-8") as lines:
    found = Found(task)
    for record in _converted(paths, found, found.skip if bad == "skip" else None, rng):
      lines.write(_LINE.encode(record) + "\n")
      found.written += 1
    got = "; ".join(_listed(found.left_out)[:3]).strip() or "no records"
    require(found.written > 0, source, "records to write", got, "docs/data.md has their forms.")
  return found


def _inputs(source: str, output: str) -> list[str]:
  """Returns the files to read, without the output."""
  good = output.endswith(".jsonl") and "://" not in output and not os.path.isdir(output)
  require(good, "output (--to)", "a .jsonl file on this machine", output, "Give its path.")
  require(bool(source.strip()), "source (--from)", "files or folders", source, "Give their path.")
  pairs = corpus.parse_paths(source, "source (--from)")
  rated = [path for path, rate in pairs if rate is not None]
  require(not rated, "source (--from)", "files without rates", source, "Mix what is written.")
  own = {path for path, _ in pairs if os.path.exists(output) and os.path.samefile(path, output)}
  inputs = [path for path, _ in pairs if path not in own]
  named = not own.isdisjoint(map(str.strip, source.split(",")))
  other = inputs and not named and not (own and os.path.islink(output))
  fix = "Give the output another name."
  require(bool(other), "output (--to)", "a file other than those that are read", output, fix)
  return inputs


def _converted(
  paths: list[str], found: Found, skip: files.Skip | None, rng: np.random.Generator
) -> Iterator[Record]:
  """Yields records in our form, and counts their forms in `found`."""
  rows = _noted(paths, found, skip)
  first = next(rows, None)  # sets found.task
  if first is None:
    return
  task = TASKS[found.task]
  for place, record in task.gather(itertools.chain([first], rows), skip, found.left_out):
    try:
      ours = task.turn(record, rng)
    except ValueError as error:
      _leave_out(place, error, skip)
      continue
    if ours is None:
      found.left_out["comparisons of a response with itself"] += 1
    else:
      yield ours


def _noted(paths: list[str], found: Found, skip: files.Skip | None) -> Iterator[files.Placed]:
  """Yields the records of files; counts their forms and sets the task if none is given."""
  given = found.task != "found"

  def unread(error: ValueError) -> None:
    found.read += 1
    found.skip(error)

  for path in paths:
    for place, record in files.read_records(path, skip=unread if skip else None):
      found.read += 1
      task, form = forms.described(record)
      found.forms[form] += 1
      if not given:
        try:
          _check_task(record, task, found)
        except ValueError as error:
          _leave_out(place, error, skip)
          continue
      yield place, record


def _check_task(record: Any, task: str, found: Found) -> None:
  """Sets the task to the first record's; raises ValueError for a record of no or another task."""
  if not task:
    got = (
      ", ".join(map(files.shorten, [*record][:20])) if isinstance(record, dict) else type(record)
    )
    raise ValueError(f"fields are {got}, expected those of a form in docs/data.md")
  found.task = task if found.task == "found" else found.task
  if task != found.task:
    raise ValueError(
      f"is for the task {task}, and the records before it for {found.task}: give files of one"
      " kind, or --task"
    )


def _leave_out(place: str, error: ValueError, skip: files.Skip | None) -> None:
  if skip is None:
    raise files.placed(place, error) from None
  skip(files.placed(place, error))


def _prompt(record: Any, rng: np.random.Generator) -> Record:
  del rng
  answered = forms.described(record)[0] == "responses"
  return _asked(forms.demonstration(record) if answered else forms.with_prompt(record))


def _asked(record: Any) -> Record:
  """Returns the prompt of a record, with the parts of a content joined."""
  prompt = corpus.prompt_of(record)
  if isinstance(prompt, str):
    return {"prompt": prompt}
  return {"messages": [{"role": x["role"], "content": text_of(x["content"])} for x in prompt]}


def _preference(record: Any, rng: np.random.Generator) -> Record | None:
  """Returns a comparison with its sides in random order; None if they are equal."""
  record = forms.comparison(record)
  first, second, p_a = preferences.sides(record)
  a, b = (corpus.response_of(record, name) for name in (first, second))
  if a == b and p_a != 0.5:
    return None
  if rng.integers(2):
    a, b, p_a = b, a, 1 - p_a
  return {**_asked(record), "response_a": a, "response_b": b, "p_a": p_a}


def _response(record: Any, rng: np.random.Generator) -> Record:
  del rng
  record = forms.demonstration(record)
  return {**_asked(record), "response": corpus.response_of(record, "response")}


def _text(record: Any, rng: np.random.Generator) -> Record:
  del rng
  return {"text": corpus.document_of(record)}


def _as_they_are(
  rows: Iterable[files.Placed], skip: files.Skip | None, left_out: collections.Counter[str]
) -> Iterable[files.Placed]:
  del skip, left_out
  return rows


class Task(NamedTuple):
  """A kind of records to write.

  Attributes:
    noun: its plural.
    gather: as in corpus.read_records.
    turn: record -> one of ours, or None to leave it out.
  """

  noun: str
  gather: corpus.Gather
  turn: Callable[[Any, np.random.Generator], Record | None]


TASKS = {
  "preferences": Task("comparisons", forms.comparisons, _preference),
  "responses": Task("prompts with a response", _as_they_are, _response),
  "prompts": Task("prompts", forms.prompts, _prompt),
  "text": Task("texts", _as_they_are, _text),
}

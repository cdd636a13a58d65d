"""AlpacaEval's and Arena-Hard's files: a set of prompts, and one model's answers to them.

An answer belongs to the prompt with exactly the same key: AlpacaEval identifies a prompt by its
instruction, Arena-Hard by its uid.
"""

import collections
import json
import os
import pathlib
import re
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from absl import logging

from nash_jax.data.corpus import field, has
from nash_jax.data.files import read_records, shorten
from nash_jax.run.files import replacing
from nash_jax.validation import require

Record = dict[str, Any]
Count = Callable[[str], int]  # text -> number of tokens


class Benchmark(NamedTuple):
  """The format of a benchmark's prompts and answers.

  Attributes:
    key: the fields that match an answer to its prompt; all but the first count only if both
      records have them.
    prompt: a prompt's record -> its text.
    model: the field with the name of an answer's model.
    answer: an answer's record -> its text.
    file: the extension of a file of answers.
    write: (prompts' records, answers, model's name, count) -> content of a file of answers.
  """

  key: tuple[str, ...]
  prompt: Callable[[Record], str]
  model: str
  answer: Callable[[Record], str]
  file: str
  write: Callable[[Sequence[Record], Sequence[str], str, Count], str]


def _instruction(record: Record) -> str:
  given = field(record, "input") if has(record, "input") else ""
  return "\n\n".join(text for text in (field(record, "instruction"), given) if text)


def _model_outputs(records, answers, model: str, count: Count) -> str:
  """AlpacaEval's format: one array, in the order of the prompts."""
  rows = []
  for record, text in zip(records, answers, strict=True):
    kept = {name: record[name] for name in ("instruction", "input") if name in record}
    dataset = {"dataset": record["dataset"]} if "dataset" in record else {}
    rows.append({**kept, "output": text.strip(), "generator": model, **dataset})
  return json.dumps(rows, ensure_ascii=False, indent=1) + "\n"


def _last_message(record: Record) -> str:
  messages = field(record, "messages", list)
  last = messages[-1] if messages and isinstance(messages[-1], dict) else {}
  content = last.get("content")
  answer = content.get("answer") if isinstance(content, dict) else None
  if last.get("role") != "assistant" or not isinstance(answer, str):
    expected = "expected one of the assistant with content {'answer': text}"
    raise ValueError(f"the last of field 'messages' is {shorten(last)}, {expected}")
  return answer


def _model_answers(records, answers, model: str, count: Count) -> str:
  """Arena-Hard's format: a line per prompt; its tools need this order of the metadata's fields."""
  lines, now = [], time.time()
  for record, text in zip(records, answers, strict=True):
    text = text.strip()
    asked = {"role": "user", "content": record["prompt"]}
    said = {"role": "assistant", "content": {"answer": text}}
    lines.append({
      "uid": record["uid"], "ans_id": uuid.uuid4().hex, "model": model, "messages": [asked, said],
      "tstamp": now, "metadata": {"token_len": count(text), **count_markdown(text)},
    })  # fmt: skip
  return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


BENCHMARKS = {
  "alpaca_eval": Benchmark(
    ("instruction", "input"), _instruction, "generator", lambda record: field(record, "output"),
    ".json", _model_outputs,
  ),
  "arena_hard": Benchmark(
    ("uid",), lambda record: field(record, "prompt"), "model", _last_message,
    ".jsonl", _model_answers,
  ),
}  # fmt: skip


def prompt_of(task: str, record: Any) -> Record:
  """Returns a benchmark's prompt as a record of ours, with its key checked."""
  field(record, BENCHMARKS[task].key[0])
  return {"prompt": BENCHMARKS[task].prompt(record)}


def count_markdown(text: str) -> dict[str, dict[str, int]]:
  """Returns Arena-Hard's style counts outside code blocks, counted exactly as it does.

  It removes every copy of a text that stands between two ``` and has no ` inside, but keeps the
  marks.
  """
  for block in re.findall("```([^`]*)```", text):
    text = text.replace(block, "")

  def found(pattern: str) -> int:
    return len(re.findall(pattern, text, re.MULTILINE))

  return {
    "header_count": {f"h{level}": found(rf"^#{{{level}}}\s") for level in range(1, 7)},
    "list_count": {"ordered": found(r"^\s*\d+\.\s"), "unordered": found(r"^\s*[-*+]\s")},
    "bold_count": {"**": found(r"\*\*[^*\n]+\*\*"), "__": found(r"__[^_\n]+__")},
  }


def token_counter(task: str, otherwise: Count) -> Count:
  """Returns a counter of tokens as in Arena-Hard (tiktoken); if that fails, logs it, and returns
  `otherwise`.
  """
  if task != "arena_hard":  # other benchmarks' files have no number of tokens
    return otherwise
  try:
    import tiktoken

    encoding = tiktoken.encoding_for_model("gpt-4o")
  except (ImportError, OSError) as error:  # tiktoken downloads its vocabulary
    message = "token_len counts the policy's tokens, not tiktoken's for gpt-4o (%s): %s"
    advice = "leave length out of Arena-Hard's style control, or install tiktoken"
    logging.warning(message, error, advice)
    return otherwise
  return lambda text: len(encoding.encode(text, disallowed_special=()))


def write(
  path: str | os.PathLike[str],
  task: str,
  records: Sequence[Record],
  answers: Sequence[str],
  model: str,
  count: Count,
) -> None:
  """Writes a model's answers, in the order of the prompts, for the benchmark's tools.

  Args:
    records: the prompts' records as they were read.
    count: from `token_counter`; unused for AlpacaEval.
  """
  text = BENCHMARKS[task].write(records, answers, model, count)
  with replacing(path) as part:
    part.write_text(text, encoding="utf-8")


def read(
  path: str | pathlib.Path, task: str, records: Sequence[Record], count: int
) -> list[tuple[str, str]]:
  """Returns one model's answers to the first `count` prompts, each with its "file:line".

  Equal prompts take their answers in order. Answers to other prompts are left out, and their number
  is logged.

  Raises:
    ValueError: a record that is no answer, is another model's, or is a second answer to a prompt; a
      prompt without an answer.
  """
  benchmark = BENCHMARKS[task]
  rows = _rows(path, benchmark)
  name, *more = benchmark.key
  both = [n for n in more if all(any(has(r, n) for r in rs) for rs in (records, rows.values()))]

  def key(record: Record) -> tuple[str, ...]:
    return (record[name], *(record.get(n) or "" for n in both))

  prompts = collections.Counter(map(key, records))
  found: dict[tuple[str, ...], list[tuple[str, str]]] = {}
  for place, row in rows.items():
    answers = found.setdefault(key(row), [])
    if 0 < prompts[key(row)] <= len(answers):
      first = f"the first is {answers[0][0]}"
      raise ValueError(f"{place}: a second answer to {name} {shorten(row[name])}, {first}")
    answers.append((place, benchmark.answer(row)))
  strangers = [answers for k, answers in found.items() if k not in prompts]
  taken, missing = list[tuple[str, str]](), list[Record]()
  for record in records[:count]:
    answers = found.get(key(record), [])
    taken += answers[:1]
    missing += [] if answers else [record]
    del answers[:1]
  other = f"; {len(strangers)} of its {len(rows)} answers are to others" if strangers else ""
  if missing:
    raise ValueError(
      f"{path}: no answer to {len(missing)} of {count} prompts, the first with {name}"
      f" {shorten(missing[0][name])}{other}. Answers match prompts exactly, by"
      f" {' and '.join([name, *both])}: give answers to this set, or lower max_prompts to their"
      " number"
    )
  if strangers:
    message = "%s: %d of %d answers are to prompts that are not in this arena"
    logging.warning(message, path, len(strangers), len(rows))
  return taken


def _rows(path: str | pathlib.Path, benchmark: Benchmark) -> dict[str, Record]:
  """Returns {place: answer's key and text} of a file, and checks that one model gave them all."""
  rows, models = {}, dict[Any, str]()
  for place, record in read_records(path):
    try:
      for name in benchmark.key:
        if name == benchmark.key[0] or has(record, name):
          field(record, name)
      benchmark.answer(record)
    except ValueError as error:
      raise ValueError(f"{place}: {error}") from None
    models.setdefault(str(record.get(benchmark.model)), place)
    got, fix = " and ".join(map(shorten, models)), "Give each model's answers a file of their own."
    require(len(models) == 1, f"{place}, {benchmark.model}", "one model in a file", got, fix)
    rows[place] = record
  require(len(rows) > 0, str(path), "a model's answers", "none", "Give another file.")
  return rows

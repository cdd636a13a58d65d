"""Reads pairs of responses to judge from files of jobs and of other programs."""

import collections
import itertools
import json
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from nash_jax.data import corpus, forms
from nash_jax.data.chat_template import TURN
from nash_jax.data.files import Placed, placed, read_records
from nash_jax.data.preferences import sides
from nash_jax.data.tokenizer import Tokenizer
from nash_jax.data.votes import Answer, Pair, Prompt
from nash_jax.run.files import read_json
from nash_jax.validation import require

# Files to look for in a folder, in this order; without any, its files of records are read.
_TEXTS = [
  f"{arena}{name}" for arena in ("", "arena/", "arena/*/") for name in ("texts.jsonl", "arena.json")
]
IN_FOLDER = (*_TEXTS, "pairs.jsonl", "samples.jsonl")
_ENDS = re.compile(r"(?:<end_of_turn>|<turn\|>|<\|channel>thought\n<channel\|>)\Z")


def read(source: str, tokenizer: Tokenizer) -> list[Pair]:
  """Returns the pairs in files: comparisons, and pairs of responses of different policies.

  A comparison has any form of docs/data.md, or token ids as `collect` writes them. Two responses to
  a prompt are a pair if their policies differ or have no names. They come from an arena or a
  comparison (the texts in arena.json), a run's samples.jsonl, or records with a "response".

  Args:
    source: files or folders, separated by commas; a folder may be a job's workdir.
    tokenizer: decodes token ids.

  Raises:
    ValueError: no such file, a record that cannot be read (names file and line), or no pairs.
  """
  paths = [path for entry in source.split(",") if entry.strip() for path in _files(entry.strip())]
  require(bool(paths), "source (--from)", "files or folders", source, "Give their path.")
  pairs: list[Pair] = []
  answers: dict[str, dict[Answer, None]] = {}  # {prompt: answers in the order of the files}
  for path in paths:
    run = f"{pathlib.Path(path).parent.name} " if len(paths) > 1 else ""
    for place, record in _records(path):
      try:
        if (pair := _comparison(record, tokenizer)) is not None:
          pairs.append(pair)
        else:
          prompt, given = _answers(record, run)
          answers.setdefault(json.dumps(prompt), {}).update(dict.fromkeys(given))
      except (ValueError, TypeError) as error:
        raise placed(place, error) from None
  for written, known in answers.items():
    for a, b in itertools.combinations(known, 2):
      if a.text != b.text and (a.policy != b.policy or not a.policy):
        pairs.append(Pair(json.loads(written), a, b))
  fix = "Give comparisons, or two responses to a prompt of different policies; see docs/votes.md."
  require(bool(pairs), source, "pairs of different responses", "none", fix)
  return pairs


def _files(entry: str) -> list[str]:
  if os.path.isdir(entry):
    for name in IN_FOLDER:
      if found := sorted(map(str, pathlib.Path(entry).glob(name))):
        return found
  return [path for path, _ in corpus.parse_paths(entry)]


def _records(path: str) -> Iterator[Placed]:
  if pathlib.Path(path).name != "arena.json":
    yield from forms.comparisons(read_records(path), None, collections.Counter())
    return
  texts = read_json(path).get("texts", [])
  fix = "Run the arena again with more --config.texts."
  require(bool(texts), path, "texts of the policies", "none", fix)
  for number, text in enumerate(texts, 1):
    yield f"{path}, text {number}", text


def _comparison(record: Any, tokenizer: Tokenizer) -> Pair | None:
  """Returns the pair of a record that compares two responses; None for other records."""
  names = ("inputs", "a", "b")
  if all(corpus.has(record, name) for name in names):
    return of_tokens(tokenizer, *(corpus.field(record, name, list) for name in names))
  if forms.described(record)[0] != "preferences":
    return None
  policies = [_policy(record, side) for side in ("_a", "_b")]
  record = forms.comparison(record)
  first, second, _ = sides({"p_a": 0.5, **record})  # the winner is not needed
  a, b = (
    Answer(corpus.response_of(record, name), policy)
    for name, policy in zip((first, second), policies, strict=True)
  )
  return Pair(corpus.prompt_of(record), a, b)


def _policy(record: dict[str, Any], suffix: str = "") -> str:
  """Returns the policy that a record names; "" if it names none."""
  names = [f"policy{suffix}", f"model{suffix}", *([] if suffix else ["generator"])]
  return next((record[name] for name in names if isinstance(record.get(name), str)), "")


def _answers(record: Any, run: str) -> tuple[Prompt, list[Answer]]:
  """Returns a record's prompt and the responses to it.

  Args:
    run: a prefix for the names of a run's policies if there are several runs.
  """
  if corpus.has(record, "continuations"):
    given = corpus.field(record, "continuations", dict)
    return asked(corpus.field(record, "prompt")), [
      Answer(corpus.response_of(given, name), name) for name in given
    ]
  if corpus.has(record, "response") and isinstance(record.get("step"), int):  # a sample of a run
    given = {f"{run}step {record['step']}": corpus.response_of(record, "response")}
    if corpus.has(record, "reference"):
      given["reference"] = corpus.response_of(record, "reference")
    return asked(corpus.field(record, "prompt")), [Answer(x, name) for name, x in given.items()]
  policy = _policy(record) if isinstance(record, dict) else ""
  record = forms.demonstration(record)
  return corpus.prompt_of(record), [Answer(corpus.response_of(record, "response"), policy)]


def of_tokens(tokenizer: Tokenizer, inputs: list[int], a: list[int], b: list[int]) -> Pair:
  """Returns the pair of these token ids, with their texts."""
  for name, ids in {"inputs": inputs, "a": a, "b": b}.items():
    corpus.check_ids(ids, tokenizer, f"field {name!r}")
  one, two = (Answer(tokenizer.decode(ids), "", ids) for ids in (a, b))
  return Pair(asked(tokenizer.decode(inputs)), one, two, inputs)


def asked(text: str) -> Prompt:
  """Returns a decoded prompt without its chat template: the user's text, or messages."""
  head, *turns = TURN.split(text)
  if head.strip() or not turns:
    return text
  roles = {"system": "system", "user": "user", "model": "assistant"}
  messages = [
    {"role": roles[role], "content": _ENDS.sub("", said.removesuffix("\n"))}
    for role, said in zip(turns[::2], turns[1::2], strict=True)
  ]
  if not messages[-1]["content"] and messages[-1]["role"] == "assistant":
    messages = messages[:-1]
  return messages[0]["content"] if len(messages) == 1 else messages

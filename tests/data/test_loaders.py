"""Any damage to a file that we read: it is loaded, or refused in one line that names it."""

import contextlib
import copy
import functools
import gzip
import io
import json
import math
import pathlib
import tempfile
from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

import nash_jax
from nash_jax.data import corpus, judge_template, preferences, prompts
from nash_jax.data.chat_template import turns
from nash_jax.data.tokenizer import BUNDLED, Tokenizer
from nash_jax.jobs import convert, sample
from nash_jax.validation import asset_path

CHAT = Tokenizer(BUNDLED, "gemma")
ASK = {"role": "user", "content": "Why is it dark?"}
TALK = [
  {"role": "system", "content": "Be brief."},
  ASK,
  {"role": "assistant", "content": "Night."},
  ASK,
]
PAIR = {"response_a": "A cat.", "response_b": "A dog."}
VOTES = PAIR | {"votes_a": 3, "votes_b": 1, "ties": 2}
RATED = [{"response": x, "annotations": {"honesty": {"Rating": x}}} for x in ("1", "4")]
SAID = {"role": "prompter", "text": "Hi", "deleted": False}
REPLIES = [{"role": "assistant", "text": text, "rank": len(text)} for text in ("Yes.", "No.")]
PROMPTS = [{"prompt": "Lily saw a kite."}, {"messages": TALK}, {"prompt": None, "messages": [ASK]}]
RECORDS = {
  "json_lines": PROMPTS,
  "documents": [{"text": "Tom ran home."}, {"text": "The sun set.\n\nThe end."}],
  "responses": [{"prompt": "Hi", "response": "Yes."}, {"messages": TALK, "response": "It set."}],
  "preferences": [
    {"prompt": "Hi", "chosen": "A cat.", "rejected": "A dog."},
    {"prompt": "Hi", "p_a": 0.25} | PAIR,
    {"messages": TALK, "chosen": None, "p_a": None} | VOTES,
  ],
  "tokens": [{"inputs": [2, 9, 10], "a": [7, 8, 1], "b": [7], "p_a": 0.25}] * 2,
  "convert.jsonl": [
    {"context_messages": [ASK], "prompt": None},
    {"context_messages": None, "prompt": "Hi"},
  ],
  "convert.json": [{"context_messages": [ASK]}, {"prompt": [ASK]}],
  "convert_rated.jsonl": [
    {"prompt": "Hi", "completion": "Yes.", "label": True},
    {"prompt": "Hi", "completion": "No.", "label": False},
    {"prompt": "Hi", "response": "Yes.", "helpfulness": 3},
    {"prompt": "Hi", "response": "No.", "helpfulness": 1},
    {"instruction": "Hi", "completions": RATED},
  ],
  "convert_trees.jsonl": [
    {"message_tree_id": "x", "prompt": {**SAID, "replies": REPLIES}},
    {**SAID, "message_id": "0", "parent_id": None},
    *({**reply, "message_id": str(reply["rank"]), "parent_id": "0"} for reply in REPLIES),
  ],
}


def parquet():
  import pyarrow
  from pyarrow import parquet

  file = io.BytesIO()
  parquet.write_table(pyarrow.Table.from_pylist(RECORDS["convert.jsonl"]), file)
  return file.getvalue()


FILES = {
  "text": b"Lily saw a kite.\nTom ran.\n\nThe end",
  "typed": b"Lily saw a kite.\nTom ran.\n\nThe end",
  "template": b"{prompt}<start_of_turn>A:\n{a}\nB:\n{b}\nBest:",
  "tokenizer": pathlib.Path(asset_path(BUNDLED)).read_bytes(),
  "convert.parquet": parquet(),
}
VALUES = [
  None, True, 0, -1, 3, 1.5, math.nan, math.inf, -math.inf, 1e308, 10**400, "", "x", " \n",
  "\ud83d", "\0", "<bos>Hi", "<start_of_turn>user\nHi", "Hi<eos>", "\u2028", [], {}, [[]], [ASK],
  [1, 5000], [None],
  {"role": "user"}, [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
]  # fmt: skip
INSERTED = [
  b"\xef\xbb\xbf", b"\0", b"\xff", b"\xed\xa0\xbd", b"\n", b"\r\n", b"\r", b"\xe2\x80\xa8", b"\x1a",
  b"[" * 3000, b"9" * 5000, b"NaN", b'"', b"{", b"}", b",", b"\\ud800", b"<bos>", b"{a}",
]  # fmt: skip


def render(name, records):
  if name == "convert.json":
    return json.dumps(records).encode()
  return "\n".join(map(json.dumps, records)).encode()


@st.composite
def damaged(draw, name):
  """Returns a file's bytes: valid ones with records and then bytes changed, or none of it."""
  if draw(st.integers(0, 9)) == 0:
    return draw(st.binary(max_size=200))
  data = FILES.get(name)
  if data is None:
    records = json.loads(json.dumps(RECORDS[name]))
    for _ in range(draw(st.integers(0, 2))):
      damage_record(draw, records)
    data = render(name, records)
  for _ in range(draw(st.integers(0, 2))):
    data = damage_bytes(draw, data)
  wrap = draw(st.sampled_from([bytes] * 20 + [gzip.compress, to_utf16, b"\xef\xbb\xbf".__add__]))
  return wrap(data)


def to_utf16(data):
  return data.decode("utf-8", "replace").encode("utf-16")


def damage_record(draw, records):
  """Drops a key or an entry anywhere in a record, or puts another value in its place."""
  place = draw(st.integers(0, len(records) - 1))
  parent = records
  while isinstance(parent[place], dict | list) and parent[place] and draw(st.integers(0, 4)):
    parent, keys = parent[place], parent[place]
    place = draw(st.sampled_from(sorted(keys) if isinstance(keys, dict) else range(len(keys))))
  if parent is not records and draw(st.integers(0, 3)) == 0:
    del parent[place]
  else:
    parent[place] = copy.deepcopy(draw(st.sampled_from(VALUES)))


def damage_bytes(draw, data):
  start = draw(st.integers(0, len(data)))
  end = min(len(data), start + draw(st.integers(0, 40)))
  kind = draw(st.sampled_from(["cut", "insert", "delete", "repeat", "replace"]))
  if kind == "cut":
    return data[:start]
  if kind == "insert":
    return data[:start] + draw(st.sampled_from(INSERTED)) + data[start:]
  if kind == "replace":
    return data[:start] + draw(st.binary(max_size=8)) + data[end:]
  return data[:start] + data[start:end] * (2 * (kind == "repeat")) + data[end:]


def without_seqio(task, parts, rates, seed):
  records = [record for part in parts for record in part]
  return {name: [record[name] for record in records] for name in records[0]}


def load_data(load, task, path):
  config = ConfigDict(
    {
      "task": task, "path": str(path), "held_out": 0, "held_out_path": "", "overflow": "cut",
      "max_tokens": 40, "max_response_tokens": 6, "duplicates": "keep",
      "bad": "stop",
    }
  )  # fmt: skip
  with mock.patch.object(corpus, "_through_seqio", without_seqio):
    train, _ = load(config, CHAT, 0)
  batch = train.all()
  arrays = vars(batch) if not isinstance(batch, dict) else batch
  p_win = arrays.get("p_win", np.zeros(1))
  assert ((p_win >= 0) & (p_win <= 1)).all(), "no NaN"
  shown = [x for name, x in arrays.items() if name.endswith("tokens")]
  assert all(((x >= 0) & (x < CHAT.size)).all() for x in shown)


class Loaded(Exception):
  """Weights would load now."""


def load_typed(path):
  config = nash_jax.config.sample()
  config.file = str(path)
  with mock.patch.object(sample, "load_weights", side_effect=Loaded), contextlib.suppress(Loaded):
    sample.run(config)


def load_tokenizer(path):
  tokenizer = Tokenizer(str(path), "gemma")
  assert tokenizer.prompt("Tom ran.")[0] == tokenizer.bos_id
  assert len(tokenizer.forbidden(tokenizer.size)) == tokenizer.size
  assert isinstance(tokenizer.decode(range(5, tokenizer.size)), str)


def load_convert(path):
  output = path.with_name("out.jsonl")
  found = convert.convert(str(path), str(output))
  lines = output.read_text("utf-8").split("\n")[:-1]
  assert found.written == len(lines)
  for line in map(json.loads, lines):
    assert {*line} <= {"prompt", "messages", "response", "response_a", "response_b", "p_a", "text"}
    assert "messages" not in line or turns(line["messages"])


def loader(name):
  if name in preferences.TASKS:
    return functools.partial(load_data, preferences.load_preferences, name)
  others = {
    "documents": functools.partial(load_data, preferences.load_preferences, "text"),
    "template": lambda path: judge_template.layout(str(path), CHAT),
    "tokenizer": load_tokenizer,
    "typed": load_typed,
  }
  if name.startswith("convert"):
    return load_convert
  return others.get(name) or functools.partial(load_data, prompts.load_prompts, name)


NAMES = sorted([*RECORDS, *FILES])
# "text" is a file of prompts here; the task of the same name is "documents".
LOADERS = {name: loader(name) for name in NAMES} | {
  "text": functools.partial(load_data, prompts.load_prompts, "text")
}


def check(name, data):
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / f"victim{pathlib.PurePath(name).suffix}"
    path.write_bytes(data)
    try:
      LOADERS[name](path)
    except ValueError as error:
      message = str(error)
    else:
      return True
  assert "victim" in message, message
  assert len(message.splitlines()) == 1, message
  assert len(message) < 1000
  return False


QUIET = settings(derandomize=True, database=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("name", NAMES)
def test_a_whole_file_is_loaded(name):
  assert check(name, FILES[name] if name in FILES else render(name, RECORDS[name]))


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@settings(QUIET, max_examples=40)
def test_a_damaged_file_is_loaded_or_refused_in_a_line_that_names_it(name, data):
  check(name, data.draw(damaged(name)))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@settings(QUIET, max_examples=500)
def test_any_damage_is_loaded_or_refused_in_a_line_that_names_it(name, data):
  check(name, data.draw(damaged(name)))

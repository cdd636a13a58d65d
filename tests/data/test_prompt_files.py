"""Files of prompts: what counts as their text, and every bad line is named."""

import gzip
import json
import logging

import pytest
from prompt_files import CHAT, TOKENIZER, configure, load_all, texts_of, write

from nash_jax.data import prompts


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ('{"prompt": "unfinished', r"p\.jsonl:3: not JSON"),
    ('{"text": "x"}', r"p\.jsonl:3: no field 'prompt', got 'text'"),
    ('{"prompt": 3}', r"p\.jsonl:3: field 'prompt' is 3"),
    ("[1]", r"p\.jsonl:3: no field 'prompt', got list"),
    ('{"messages": [{"role": "user"}]}', r"p\.jsonl:3: message 0 is"),
    ('{"messages": "x"}', r"p\.jsonl:3: field 'messages'"),
    ('{"messages": ["x"]}', r"p\.jsonl:3: message 0 is 'x'"),
  ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
  path = tmp_path / "p.jsonl"
  path.write_text('{"prompt": "fine"}\n\n' + line + "\n")
  with pytest.raises(ValueError, match=message):
    prompts.load_prompts(configure(str(path)), TOKENIZER, seed=0)


MARK = "\ufeff"


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("task", ["text", "json_lines"])
def test_marks_and_line_ends_of_other_systems_are_no_text(tmp_path, task, end):
  texts = ["a cat", "a\u2028dog", "the sun\x85\x0c", "a bird"]
  lines = texts if task == "text" else [f'{{"prompt": "{text}"}}' for text in texts]
  if task == "json_lines":
    lines[2] = json.dumps({"prompt": texts[2]})
  first, second = tmp_path / "a", tmp_path / "b"
  # Two files that were joined, and a second one: each begins with its mark.
  first.write_bytes(f"{MARK}{lines[0]}{end}{MARK}{lines[1]}{end}{end}".encode())
  second.write_bytes(f"{MARK}{lines[2]}{end}{lines[3]}".encode())
  expected = [TOKENIZER._model.decode(TOKENIZER.encode(text)) for text in texts]
  assert load_all(f"{first},{second}", task=task) == expected
  mixed = load_all(f"{first}:1,{second}:1", task=task)
  assert set(mixed) <= {*expected}


BAD_FILES = {
  "latin": (b'{"prompt": "x"}\n{"prompt": "caf\xe9"}\n', r"bad:2: byte 0xe9 is not UTF-8"),
  "utf-16": ('{"prompt": "x"}'.encode("utf-16"), "bad: UTF-16.*expected UTF-8"),
  "utf-16 of no mark": ('{"prompt": "x"}'.encode("utf-16-le"), r"bad:1: byte 0x00 \(NUL\)"),
  "utf-32": ('{"prompt": "x"}'.encode("utf-32"), "bad: UTF-16 or UTF-32"),
  "a surrogate's bytes": (b'\r\n\r{"prompt": "\xed\xa0\xbd"}', "bad:3: byte 0xed is not UTF-8"),
  "nul": (b'{"prompt": "x"}\n\n{"prompt": "a\0b"}', r"bad:3: byte 0x00 \(NUL\) is not text"),
  "nul, spelled": (b'{"prompt": "a\\u0000b"}', r"bad:1: '\\x00' in .* is NUL"),
  "surrogate": (b'{"prompt": "x"}\n{"prompt": "a \\ud83d kite"}', "bad:2: .*half of a surrogate"),
  "surrogate of a conversation": (
    b'{"messages": [{"role": "user", "content": "\\udc00"}]}',
    "bad:1: .*half of a surrogate",
  ),
  "half of gzip": (
    gzip.compress(b'{"prompt": "x"}', mtime=0)[:-9],
    "bad: not a readable gzip file",
  ),
  "zstd": (b"\x28\xb5\x2f\xfd\x04", "bad: compressed .zstd.: unpack it"),
  "parquet": (b"PAR1\x15\x04", "bad: not a readable parquet file"),
  "array": (b'\n[{"prompt": "x"},\n{"prompt": "y"]', "bad:3: not JSON .*an array of objects"),
  "row": (b'[{"prompt": "x"}, {"prompt": 3}]', "bad, row 2: field 'prompt' is 3"),
  "pointer": (b"version https://git-lfs.github.com/spec/v1\n", "bad: a Git LFS pointer: run `git"),
  "deep": (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "bad:1: JSON is nested too"),
  "digits": (b'{"prompt": ' + b"9" * 5000 + b"}", "bad:1: .*4300 digits"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_file_that_is_no_utf8_text_is_refused_with_its_line(tmp_path, kind):
  data, message = BAD_FILES[kind]
  path = tmp_path / "bad"
  path.write_bytes(data)
  with pytest.raises(ValueError, match=message) as error:
    load_all(path)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["latin", "utf-16 of no mark", "half of gzip", "pointer"])
def test_a_plain_text_file_is_refused_alike(tmp_path, kind):
  data, message = BAD_FILES[kind]
  (tmp_path / "bad").write_bytes(data)
  with pytest.raises(ValueError, match=message):
    load_all(tmp_path / "bad", task="text")


def test_null_columns_of_a_table_are_no_values(tmp_path):
  ask = [{"role": "user", "content": "Hi", "name": None}]
  rows = [{"prompt": None, "messages": ask}, {"prompt": "Tom ran", "messages": None}]
  rows += [{"prompt": "", "messages": ask}, {"prompt": [], "messages": ask}, {"prompt": ""}]
  assert load_all(write(tmp_path / "p.jsonl", rows)) == ["Hi", "Tom ran", "Hi", "Hi", ""]
  path = write(tmp_path / "none.jsonl", [{"prompt": None, "messages": None}])
  with pytest.raises(ValueError, match=r"none.jsonl:1: field 'prompt' is None, expected"):
    load_all(path)


def test_a_prompt_may_be_a_conversation_and_a_content_its_parts(tmp_path):
  parts = [{"type": "text", "text": " Why is "}, {"type": "text", "text": "it dark?\n"}]
  rows = [{"prompt": [{"role": "user", "content": parts}]}]
  assert load_all(write(tmp_path / "p.jsonl", rows), CHAT) == [
    "<start_of_turn>user\nWhy isit dark?<end_of_turn>\n<start_of_turn>model\n"
  ]  # as Gemma's template joins them
  image = {"type": "image", "url": "x"}
  path = write(tmp_path / "i.jsonl", [{"prompt": [{"role": "user", "content": [image]}]}])
  with pytest.raises(ValueError, match=r"i.jsonl:1: message 0 is .*expected a text 'content'"):
    load_all(path)


TEMPLATED = [
  "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n",
  "<start_of_turn>user\nHi",
  "\n <bos> <start_of_turn>Hi",
  "system <start_of_turn>model\nHi",
  "Hi<end_of_turn>\n",
  "Hi<eos>",
  "<|turn>user\nHi<turn|>\n<|turn>model\n",
]


@pytest.mark.parametrize("text", TEMPLATED)
@pytest.mark.parametrize("tokenizer", [TOKENIZER, CHAT], ids=["plain", "gemma"])
def test_a_prompt_that_carries_the_template_is_refused(tmp_path, text, tokenizer):
  for row in ({"prompt": text}, {"messages": [{"role": "user", "content": text}]}):
    path = write(tmp_path / "p.jsonl", [{"prompt": "Hi"}, row])
    with pytest.raises(ValueError, match=r"p.jsonl:2: .* already has the chat template"):
      load_all(path, tokenizer)


def test_prompts_that_spell_out_markers_are_counted_in_a_warning(tmp_path, caplog):
  texts = ["Hi", "<bos>Hi", "What is <end_of_turn> for?", "[INST] Hi", "<|im_start|>user", "a <b>"]
  texts += ["What is <|turn> for?", "Human: Hi\n\nAssistant:", "Dear Assistant: hi", "a <- b|>"]
  path = write(tmp_path / "p.jsonl", [{"prompt": text} for text in texts])
  with caplog.at_level(logging.WARNING, "absl"):
    loaded = load_all(path)
  assert loaded == [
    "Hi",
    *(TOKENIZER._model.decode(TOKENIZER.encode(t)) for t in ["Hi", *texts[2:]]),
  ]
  assert [record.getMessage() for record in caplog.records] == [
    f"{path}: 6 of 10 records spell out markers such as <bos> or <end_of_turn> (the first:"
    f" {path}:2); they are read as text, except a <bos> at the start of a prompt or a document,"
    " which is dropped"
  ]


def test_a_rate_is_positive_and_a_file_may_have_a_colon(tmp_path):
  path = write(tmp_path / "p.jsonl:3", [{"prompt": "a cat"}])
  assert load_all(path) == ["a cat"]
  with pytest.raises(ValueError, match=r"rate of .*: expected a positive number, got 0\.0"):
    load_all(f"{path}:0,{path}:1")
  with pytest.raises(ValueError, match="max_tokens: expected at least 1, got 0"):
    load_all(path, max_tokens=0)


def test_the_bundled_stories_differ_and_are_plain_text():
  train, held_out = prompts.load_prompts(
    configure("assets:stories/prompts.jsonl", "stories", 32, held_out=96), TOKENIZER, seed=0
  )
  assert len(held_out) == 96
  assert len(train) >= 200
  assert train.report["dropped"] == held_out.report["dropped"] == 0
  texts = texts_of(train) + texts_of(held_out)
  assert len(set(texts)) == len(texts)
  unknown = TOKENIZER.id_of("<unk>")
  assert not any((part.all().tokens == unknown).any() for part in (train, held_out))
  assert sum('"' in text for text in texts) <= len(texts) / 8
  assert all(text.isascii() and "\n" not in text for text in texts)

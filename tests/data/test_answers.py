"""AlpacaEval's and Arena-Hard's files: prompts read, answers written and read."""

import json
import sys

import pytest
from answer_files import (
  TASKS,
  TOKENIZER,
  answers_of,
  configure,
  questions,
  read_rows,
  text_of,
  write_questions,
)

from nash_jax.data import answers, prompts


@pytest.mark.parametrize("task", TASKS)
def test_a_benchmarks_prompts_are_read_with_their_records(tmp_path, task):
  records = questions(task, 20)
  records[17] = {**records[17], answers.BENCHMARKS[task].key[0]: "long", "prompt": "cat " * 99}
  if task == "alpaca_eval":
    records[17]["instruction"] = "cat " * 99
  path = write_questions(tmp_path / "set", task, records)
  train, held_out = prompts.load_prompts(configure(path, task), TOKENIZER, 0)
  assert train.columns["record"] == records[:15]
  assert held_out.columns["record"] == [*records[15:17], *records[18:]], "with its own, if dropped"
  text = records[16]["instruction" if task == "alpaca_eval" else "prompt"]
  assert held_out.columns["inputs"][1].tolist() == TOKENIZER.prompt(text)
  assert held_out.all().tokens.shape == (4, 60)


def test_an_instructions_input_belongs_to_the_prompt(tmp_path):
  records = [
    {"instruction": "Sum up.", "input": "The cat sat."},
    {"instruction": "Hi", "input": ""},
  ]
  path = write_questions(tmp_path / "set.json", "alpaca_eval", records)
  config = configure(path, "alpaca_eval", held_out=1)
  train, held_out = prompts.load_prompts(config, TOKENIZER, 0)
  assert train.columns["inputs"][0].tolist() == TOKENIZER.prompt("Sum up.\n\nThe cat sat.")
  assert held_out.columns["inputs"][0].tolist() == TOKENIZER.prompt("Hi")


@pytest.mark.parametrize(
  ("task", "record", "message"),
  [
    ("alpaca_eval", {"prompt": "Hi"}, r"set:1: no field 'instruction', got 'prompt'"),
    ("alpaca_eval", {"instruction": ["Hi"]}, r"set:1: field 'instruction' is \['Hi'\]"),
    ("arena_hard", {"question_id": "1", "prompt": "Hi"}, r"set:1: no field 'uid'"),
    ("arena_hard", {"uid": "1", "turns": []}, r"set:1: no field 'prompt'"),
  ],
)
def test_a_record_of_another_form_is_named(tmp_path, task, record, message):
  (tmp_path / "set").write_text(json.dumps(record))
  with pytest.raises(ValueError, match=message):
    prompts.load_prompts(configure(tmp_path / "set", task), TOKENIZER, 0)


def test_a_benchmark_is_no_part_of_a_mixture(tmp_path):
  path = write_questions(tmp_path / "set", "arena_hard", questions("arena_hard", 3))
  with pytest.raises(ValueError, match=r"rates of prompts.path: expected none.*arena_hard"):
    prompts.load_prompts(configure(f"{path}:1", "arena_hard"), TOKENIZER, 0)


@pytest.mark.parametrize(
  ("text", "found"),
  [
    ("# One\n## Two\n## Two\n###### Six\n####### no\n#no", {"h1": 1, "h2": 2, "h6": 1}),
    ("1. a\n  22. b\n1) no\n3.no", {"ordered": 2}),
    ("- a\n * b\n+ c\n-no\n– no", {"unordered": 3}),
    ("**a** b\n**c d**\n**no\nline\n****", {"**": 2}),
    ("__a__ and _no_\n____\n__b__", {"__": 2}),
    ("# One\n```py\n# two\n- x\n**b**\n```\n- y", {"h1": 1, "unordered": 1}),
    ("```a `quoted` # x```\n# One", {"h1": 1}),  # a ` inside: no block
    ("- a\n```- a```", {}),  # what stands in a block goes wherever it stands
    ("```# open\n# One", {"h1": 1}),  # never closed
    ("", {}),
  ],
)
def test_markdown_is_counted_as_arena_hard_does(text, found):
  counts = answers.count_markdown(text)
  assert list(counts) == ["header_count", "list_count", "bold_count"]
  assert list(counts["header_count"]) == ["h1", "h2", "h3", "h4", "h5", "h6"]
  flat = {name: count for group in counts.values() for name, count in group.items()}
  assert {name: count for name, count in flat.items() if count} == found


def test_files_have_the_fields_that_the_benchmarks_tools_read(tmp_path):
  said = ["  **Yes**, “well”.\n", "No"]
  records = [
    {"dataset": "vicuna", "instruction": " Is it?\n\u2028é ", "id": 7, "input": ""},
    {"instruction": "Hm"},
  ]
  answers.write(tmp_path / "x.json", "alpaca_eval", records, said, "my model/1", len)
  assert read_rows(tmp_path / "x.json") == [
    {
      "instruction": " Is it?\n\u2028é ", "input": "", "output": "**Yes**, “well”.",
      "generator": "my model/1", "dataset": "vicuna",
    },
    {"instruction": "Hm", "output": "No", "generator": "my model/1"},
  ]  # fmt: skip
  records = [{"uid": "7a", "category": "c", "prompt": " Is it?\n"}, {"uid": "b", "prompt": "Hm"}]
  answers.write(tmp_path / "x.jsonl", "arena_hard", records, said, "x", len)
  first, second = read_rows(tmp_path / "x.jsonl")
  assert list(first) == ["uid", "ans_id", "model", "messages", "tstamp", "metadata"]
  assert (first["uid"], second["uid"], first["model"]) == ("7a", "b", "x")
  assert first["messages"] == [
    {"role": "user", "content": " Is it?\n"},
    {"role": "assistant", "content": {"answer": "**Yes**, “well”."}},
  ]
  assert next(iter(first["metadata"])) == "token_len"
  assert first["metadata"] == {"token_len": 16, **answers.count_markdown(said[0])}
  assert first["ans_id"] != second["ans_id"]
  assert isinstance(first["tstamp"], float)


def test_token_len_is_tiktokens_where_it_is_installed(monkeypatch, caplog):
  class Encoding:
    def encode(self, text, disallowed_special):
      assert disallowed_special == ()
      return text.split("-")

  class Tiktoken:
    def encoding_for_model(name):
      assert name == "gpt-4o"
      return Encoding()

  monkeypatch.setitem(sys.modules, "tiktoken", Tiktoken)
  assert answers.token_counter("arena_hard", len)("a-b-c") == 3
  assert answers.token_counter("alpaca_eval", len)("a-b-c") == 5
  assert not caplog.text
  monkeypatch.setitem(sys.modules, "tiktoken", None)  # as where it is not there
  assert answers.token_counter("arena_hard", len)("a-b-c") == 5
  assert "leave length out of Arena-Hard's style control, or install tiktoken" in caplog.text


@pytest.mark.parametrize("task", TASKS)
def test_answers_find_their_prompts_whatever_their_order(tmp_path, task, caplog):
  records, path = questions(task, 6), tmp_path / "a.json"
  rows = answers_of(task, records)
  rows = json.loads(rows) if task == "alpaca_eval" else list(map(json.loads, rows.splitlines()))
  more = json.loads(json.dumps(rows[0]))
  more[answers.BENCHMARKS[task].key[0]] = "of no prompt"
  path.write_text("\n".join(map(json.dumps, [*rows[::-1], more])))
  found = answers.read(path, task, records, 4)
  assert found == [(f"{path}:{6 - i}", text_of(100 + i)) for i in range(4)]
  assert "1 of 7 answers are to prompts that are not in this arena" in caplog.text


def test_equal_instructions_are_answered_in_their_order(tmp_path):
  records, path = [{"instruction": name} for name in "abca"], tmp_path / "a.json"
  rows = [{"instruction": r["instruction"], "output": str(i)} for i, r in enumerate(records)]
  path.write_text(json.dumps(rows))
  assert [text for _, text in answers.read(path, "alpaca_eval", records, 4)] == list("0123")
  path.write_text(json.dumps([*rows, {"instruction": "a", "output": "third"}]))
  with pytest.raises(ValueError, match=r"row 5: a second answer to instruction 'a', the first is"):
    answers.read(path, "alpaca_eval", records, 4)
  path.write_text(json.dumps(rows[:3]))
  with pytest.raises(
    ValueError, match=r"no answer to 1 of 4 prompts, the first with instruct.*'a'"
  ):
    answers.read(path, "alpaca_eval", records, 4)


def test_an_input_is_compared_where_both_files_have_one(tmp_path):
  records = [{"instruction": "Sum up.", "input": x} for x in ("one", "two")]
  rows = [{**r, "output": r["input"].upper()} for r in records]
  (tmp_path / "a.json").write_text(json.dumps(rows[::-1]))
  found = answers.read(tmp_path / "a.json", "alpaca_eval", records, 2)
  assert [text for _, text in found] == ["ONE", "TWO"]
  (tmp_path / "a.json").write_text(json.dumps([{"instruction": "Sum up.", "output": "x"}]))
  found = answers.read(tmp_path / "a.json", "alpaca_eval", records[:1], 1)
  assert [text for _, text in found] == ["x"]


def changed(task, place, **fields):
  """Answers to three prompts, one of them changed."""

  def make():
    rows = json.loads(answers_of(task, questions(task, 3))) if task == "alpaca_eval" else [
      json.loads(line) for line in answers_of(task, questions(task, 3)).splitlines()
    ]  # fmt: skip
    rows[place] = {name: x for name, x in {**rows[place], **fields}.items() if x is not None}
    return "\n".join(map(json.dumps, rows))

  return make


@pytest.mark.parametrize(
  ("task", "make", "message"),
  [
    ("alpaca_eval", changed("alpaca_eval", 1, output=None), r"a:2: no field 'output'"),
    ("alpaca_eval", changed("alpaca_eval", 1, output=3), r"a:2: field 'output' is 3"),
    ("alpaca_eval", changed("arena_hard", 0), r"a:1: no field 'instruction', got 'uid'"),
    ("alpaca_eval", changed("alpaca_eval", 2, generator="b"),
     r"a:3, generator: expected one model in a file, got \"'gpt' and 'b'\".*file of their own"),
    ("alpaca_eval", changed("alpaca_eval", 2, instruction="Tell a story 2."),
     r"no answer to 1 of 3 prompts, the first with instruction 'Tell a story 2\. .*; 1 of its 3"
     r" answers are to others\. Answers match prompts exactly, by instruction: give"),
    ("arena_hard", changed("arena_hard", 2, uid="u0"), r"a:3: a second answer to uid 'u0', .*a:1"),
    ("arena_hard", changed("arena_hard", 2, uid="x"), r"no answer to 1 of 3 .*'u2'; 1 of its 3"),
    ("arena_hard", changed("arena_hard", 0, messages=[{"role": "assistant", "content": "a"}]),
     r"a:1: the last of field 'messages' .* with content \{'answer': text\}"),
    ("arena_hard", changed("arena_hard", 0, messages=[]), r"a:1: the last of field 'messages'"),
    ("arena_hard", lambda: "", r"a: expected a model's answers, got 'none'"),
    ("arena_hard", lambda: "{", r"a:1: not JSON"),
    ("alpaca_eval", lambda: "[1]", r"a, row 1: no field 'instruction', got int"),
    ("alpaca_eval", changed("alpaca_eval", 1, input=[1]), r"a:2: field 'input' is \[1\]"),
  ],
)  # fmt: skip
def test_answers_that_are_none_or_not_these_are_named(tmp_path, task, make, message):
  (tmp_path / "a").write_text(make())
  with pytest.raises(ValueError, match=message):
    answers.read(tmp_path / "a", task, questions(task, 3), 3)

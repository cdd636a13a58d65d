"""Records of other programs and data sets become ours, whatever file they lie in."""

import gzip
import json
import pathlib

import pyarrow
import pytest
from ml_collections import ConfigDict
from pyarrow import parquet

from nash_jax.data import corpus, forms
from nash_jax.data.files import read_records
from nash_jax.data.preferences import load_preferences
from nash_jax.data.prompts import load_prompts
from nash_jax.data.tokenizer import BUNDLED, Tokenizer

HH = "hh_rlhf/helpful-base.test.jsonl.gz"


def say(*texts):
  """Returns a conversation: the user's text, the assistant's, and so on."""
  roles = ("user", "assistant")
  return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def answer(text):
  return [{"role": "assistant", "content": text}]


ASKED, PAIR = say("Hi"), {"chosen": answer("Hello."), "rejected": answer("No.")}
OURS = {"messages": ASKED, **PAIR}
LONG = say("Hi", "Hello.", "Sing")
HUMAN = "\n\nHuman: Hi\n\nAssistant: "
JUDGED = {"prompt": "Hi", "response_a": "Hello.", "response_b": "No."}
# Of each form, a record and what it means.
READ = {
  "texts": ({"prompt": "Hi", "chosen": "Hello.", "rejected": "No."},) * 2,
  "ours": ({**JUDGED, "p_a": 0.6},) * 2,
  "conversations": ({"prompt": ASKED, **PAIR}, OURS),
  "an implicit prompt": ({"chosen": say("Hi", "Hello."), "rejected": say("Hi", "No.")}, OURS),
  "a long implicit prompt": (
    {"chosen": [*LONG, *answer("La.")], "rejected": [*LONG, *answer("No.")]},
    {"messages": LONG, "chosen": answer("La."), "rejected": answer("No.")},
  ),
  "UltraFeedback": (
    {
      **{"prompt": "Hi", "prompt_id": "x", "messages": say("Hi", "Hello.")},
      **{"chosen": say("Hi", "Hello."), "rejected": say("Hi", "No."), "score_chosen": 8.0},
    },
    OURS,
  ),
  "a prompt of which the answers go on": (
    {
      "prompt": ASKED,
      "chosen": [*say("Hi", "Hello.", "Sing")[1:], *answer("La.")],
      "rejected": [*say("Hi", "Hello.", "Sing")[1:], *answer("No.")],
    },
    {"messages": LONG, "chosen": answer("La."), "rejected": answer("No.")},
  ),
  "a transcript": ({"chosen": f"{HUMAN}Hello.", "rejected": f"{HUMAN}No. "}, OURS),
  "ShareGPT's messages": (
    {
      "chosen": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}],
      "rejected": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "No."}],
    },
    OURS,
  ),
  "OpenAssistant's roles": (
    {"prompt": [{"role": "prompter", "text": "Hi"}], "chosen": "Hello.", "rejected": "No."},
    {"prompt": ASKED, "chosen": "Hello.", "rejected": "No."},
  ),
  "HelpSteer3, the first better": (
    {"context": ASKED, "response1": "Hello.", "response2": "No.", "overall_preference": -2},
    {"messages": ASKED, "response_a": "Hello.", "response_b": "No.", "p_a": 1.0},
  ),
  "HelpSteer2, the second better": (
    {"prompt": "Hi", "response_1": "Hello.", "response_2": "No.", "preference_strength": 3},
    {**JUDGED, "p_a": 0.0},
  ),
  "HelpSteer2, a tie": (
    {"prompt": "Hi", "response_1": "Hello.", "response_2": "No.", "preference_strength": 0},
    {**JUDGED, "p_a": 0.5},
  ),
  "PandaLM": (
    {
      **{"instruction": "Repeat", "input": "Hi", "response1": "Hello.", "response2": "No."},
      **{"annotator1": 1, "annotator2": 0, "annotator3": 1, "cmp_key": "x_y"},
    },
    {
      **{"prompt": "Repeat\n\nHi", "response_a": "Hello.", "response_b": "No."},
      **{"votes_a": 2, "votes_b": 0, "ties": 1},
    },
  ),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_a_form_is_told_by_its_fields_and_means_what_it_says(name):
  record, ours = READ[name]
  kept = {field: forms.comparison(record).get(field) for field in ours}
  assert kept == ours
  assert forms.comparison(forms.comparison(record)) == forms.comparison(record)


BAD = {
  "no prompt": ({"chosen": "Hello.", "rejected": "No."}, "there is no 'prompt': expected a transc"),
  "two kinds": ({"prompt": "Hi", "chosen": "x", "rejected": answer("y")}, "one is a text and one"),
  "other prompts": ({"chosen": say("Hi", "x"), "rejected": say("Ho", "y")}, "got user, assistant"),
  "another prompt": ({"prompt": "Ho", "chosen": say("Hi", "x"), "rejected": say("Hi", "y")}, "Ho"),
  "no answer": ({"chosen": say("Hi", "x", "Ho"), "rejected": say("Hi", "x", "Hm")}, "got user"),
  "a picture": (
    {"prompt": "Hi", "chosen": [{"role": "assistant", "content": [{"type": "image"}]}],
     "rejected": answer("y")},
    "message 0 is .*text 'content'",
  ),
  "two turns of one": ({"chosen": f"{HUMAN}x\n\nAssistant: y", "rejected": HUMAN}, "in a row"),
  "an empty turn": ({"chosen": HUMAN, "rejected": f"{HUMAN}x"}, "turn 1: an empty turn"),
  "marks of turns": (
    {"prompt": "Hi<extra_id_1>", "response_1": "x", "response_2": "y", "preference_strength": 1},
    "several turns in one text",
  ),
  "a strength that is a text": (
    {"prompt": "Hi", "response_1": "x", "response_2": "y", "preference_strength": "1"},
    "field 'preference_strength' is '1'",
  ),
  "another vote": (
    {"instruction": "Hi", "response1": "x", "response2": "y", "annotator1": 3},
    "an annotator says 3: expected 1, 2, or 0",
  ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_record_that_breaks_its_form_is_refused_by_what_is_wrong(name):
  record, message = BAD[name]
  with pytest.raises(ValueError, match=message):
    forms.comparison(record)


@pytest.mark.parametrize(
  "record",
  [
    {"prompt": "Hi", "completion": "Hello."},
    {"prompt": "Hi", "completion": "Hello.", "label": True},
    {"prompt": ASKED, "completion": answer("Hello.")},
    {"messages": say("Hi", "Hello.")},
    {"messages": ASKED, "response": answer("Hello.")},
  ],
)
def test_a_completion_and_a_conversations_last_turn_are_learnt(tmp_path, record):
  path = written(tmp_path, "x.jsonl", [record])
  learnt, _ = load_preferences(settings(path, "responses"), TOKENIZER, seed=0)
  (prompt,), (response,) = learnt.columns["inputs"], learnt.columns["targets"]
  assert prompt.tolist() == TOKENIZER.prompt("Hi")
  assert response.tolist() == TOKENIZER.response("Hello.")


def test_a_completion_that_is_labelled_as_bad_is_not_learnt(tmp_path):
  rows = [{"prompt": "Hi", "completion": "No.", "label": False}]
  with pytest.raises(
    ValueError, match=r"x\.jsonl:1: field 'label' is false, expected a completion"
  ):
    load_preferences(settings(written(tmp_path, "x.jsonl", rows), "responses"), TOKENIZER, seed=0)


def test_anthropics_transcripts_are_read(data_dir):
  """All but those whose prompts differ, whose turns do not alternate or that are empty."""
  records = [record for _, record in read_records(data_dir / HH)]
  read, refused = [], 0
  for record in records:
    try:
      read.append(forms.comparison(record))
    except ValueError:
      refused += 1
  different = [record for record in read if record["chosen"] != record["rejected"]]
  assert (len(records), len(different), len(read) - len(different)) == (2354, 2333, 2)
  assert refused == 2354 - 2335
  assert all(record["messages"][-1]["role"] == "user" for record in read)


NAMES = ("Tom", "Lily", "Ben", "Sam", "Mia")
ROWS = [{"prompt": f"Tell {name}", "chosen": "Hello.", "rejected": "No."} for name in NAMES]
TOKENIZER = Tokenizer(BUNDLED, "plain")


def written(folder: pathlib.Path, name: str, rows: list) -> pathlib.Path:
  path, lines = folder / name, "".join(json.dumps(row) + "\n" for row in rows).encode()
  if name.endswith(".parquet"):
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
  else:
    data = json.dumps(rows).encode() if ".json" in path.suffixes else lines
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
  return path


def settings(path, task):
  return ConfigDict(
    {
      **{"task": task, "path": str(path), "max_tokens": 32, "max_response_tokens": 16},
      **{"overflow": "drop", "held_out": 0, "held_out_path": "", "duplicates": "keep"},
      "bad": "stop",
    }
  )


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.parquet", "x.jsonl.gz", "x.json.gz"])
def test_a_file_of_any_kind_holds_the_same_records(tmp_path, name):
  config = settings(written(tmp_path, name, ROWS), "preferences")
  pairs, _ = load_preferences(config, TOKENIZER, seed=0)
  plain = settings(written(tmp_path, "plain.jsonl", ROWS), "preferences")
  expected = load_preferences(plain, TOKENIZER, seed=0)[0].all()
  got = pairs.all()
  assert got["prompts"].tokens.tolist() == expected["prompts"].tokens.tolist()
  for field in ("a_tokens", "b_tokens", "p_win"):
    assert got[field].tolist() == expected[field].tolist()


def test_a_folder_is_its_files_by_name_and_has_no_rate(tmp_path):
  for name, rows in (("b.parquet", ROWS[3:]), ("a.jsonl", ROWS[:3])):
    written(tmp_path, name, rows)
  (tmp_path / "README.md").write_text("not a record")
  prompts, _ = load_prompts(settings(tmp_path, "json_lines"), TOKENIZER, seed=0)
  texts = [TOKENIZER.decode(ids) for ids in prompts.columns["inputs"]]
  assert texts == [row["prompt"] for row in ROWS]
  with pytest.raises(ValueError, match="expected one, as it has a rate, got 2"):
    corpus.parse_paths(f"{tmp_path}:2")
  (tmp_path / "empty").mkdir()
  with pytest.raises(ValueError, match=r"expected some in \.jsonl, .* got .an empty folder"):
    corpus.parse_paths(str(tmp_path / "empty"))


@pytest.mark.parametrize("name", [name for name in READ if name != "OpenAssistant's roles"])
def test_the_prompt_of_every_form_is_read(name, tmp_path):
  record, ours = READ[name]
  chat = Tokenizer(BUNDLED, "gemma")
  config = settings(written(tmp_path, "x.jsonl", [record]), "json_lines")
  config.max_tokens = 64
  prompts, _ = load_prompts(config, chat, seed=0)
  # A prompt of its own is the prompt.
  asked = next(x for x in (record.get("prompt"), ours.get("messages"), ours.get("prompt")) if x)
  assert [ids.tolist() for ids in prompts.columns["inputs"]] == [chat.prompt(asked)]


def test_records_that_cannot_be_read_are_left_out_where_that_is_said(tmp_path, caplog):
  path = written(tmp_path, "x.jsonl", ROWS)
  lines = path.read_text().splitlines()
  path.write_text(
    "\n".join([lines[0], "{", lines[1], '{"chosen": "x", "rejected": "y"}', lines[2]])
  )
  config = settings(path, "preferences")
  with pytest.raises(ValueError, match=r"x\.jsonl:2: not JSON"):
    load_preferences(config, TOKENIZER, seed=0)
  config.bad = "skip"
  pairs, _ = load_preferences(config, TOKENIZER, seed=0)
  texts = [TOKENIZER.decode(ids) for ids in pairs.columns["inputs"]]
  assert texts == [row["prompt"] for row in ROWS[:3]]
  told = "x.jsonl: 2 of 5 records cannot be read and are left out, the first since"
  assert [line for line in caplog.messages if told in line and "x.jsonl:2: not JSON" in line]
  path.write_text("{\n")
  with pytest.raises(ValueError, match="hold no records"):
    load_preferences(config, TOKENIZER, seed=0)

"""Records of other programs and data sets become ours, whatever file they lie in."""

import collections
import json

import pytest
from form_records import (
  ASKED,
  GATHERED,
  HUMAN,
  LONG,
  READ,
  SANG,
  TOKENIZER,
  answer,
  labelled,
  say,
  settings,
  summaries,
  written,
)

from nash_jax.data import corpus, forms
from nash_jax.data.files import read_records
from nash_jax.data.preferences import load_preferences
from nash_jax.data.prompts import load_prompts
from nash_jax.data.tokenizer import BUNDLED, Tokenizer

HH = "hh_rlhf/helpful-base.test.jsonl.gz"


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
    "several turns in a text",
  ),
  "a strength that is a text": (
    {"prompt": "Hi", "response_1": "x", "response_2": "y", "preference_strength": "1"},
    "field 'preference_strength' is '1'",
  ),
  "another vote": (
    {"instruction": "Hi", "response1": "x", "response2": "y", "annotator1": 3},
    "an annotator says 3: expected 1, 2, or 0",
  ),
  "a summarised article": (summaries(0, {"title": "Hi", "article": "Ho", "site": "x"}), "no post"),
  "a third choice": (summaries(2), "choice is 2 of 2 summaries: expected 0 or 1 of 2"),
  "three summaries": (summaries(1, texts=("x", "y", "z")), "choice is 1 of 3 summaries"),
  "a summary that is no text": (summaries(1, texts=("x", 3)), "field 'text' is 3, expected str"),
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
    {"prompt": "Hi", "prompt_id": "x", "messages": say("Hi", "Hello.")},
    {"prompt": ASKED, "messages": say("Hi", "Hello.")},
    {"instruction": "Hi", "input": "", "output": "Hello."},
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


def test_a_prompt_beside_another_conversation_is_refused(tmp_path):
  rows = [{"prompt": "Ho", "messages": say("Hi", "Hello.")}]
  with pytest.raises(
    ValueError, match=r"x\.jsonl:1: field 'prompt' is 'Ho', expected what 'messages'"
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
  with pytest.raises(ValueError, match="expected one, as the folder has a rate, got 2"):
    corpus.parse_paths(f"{tmp_path}:2")
  (tmp_path / "empty").mkdir()
  with pytest.raises(ValueError, match=r"expected some in \.jsonl, .* got .an empty folder"):
    corpus.parse_paths(str(tmp_path / "empty"))


@pytest.mark.parametrize("name", READ)
def test_the_prompt_of_every_form_is_read(name, tmp_path):
  record, ours = READ[name]
  chat = Tokenizer(BUNDLED, "gemma")
  config = settings(written(tmp_path, "x.jsonl", [record]), "json_lines")
  config.max_tokens = 64
  prompts, _ = load_prompts(config, chat, seed=0)
  # A prompt of its own is the prompt.
  asked = next(x for x in (ours.get("prompt"), record.get("prompt"), ours.get("messages")) if x)
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
  told = "x.jsonl: 2 of 5 records cannot be read and are left out, the first because"
  assert [line for line in caplog.messages if told in line and "x.jsonl:2: not JSON" in line]
  path.write_text("{\n")
  with pytest.raises(ValueError, match="hold no records"):
    load_preferences(config, TOKENIZER, seed=0)


def gathered(rows, gather=forms.comparisons, skip=None):
  left_out = collections.Counter()
  placed = [(f"x.jsonl:{i}", row) for i, row in enumerate(rows, 1)]
  return list(gather(placed, skip, left_out)), left_out


@pytest.mark.parametrize("name", GATHERED)
def test_of_rated_responses_every_two_to_a_prompt_are_compared(name, tmp_path):
  rows, expected, left_out = GATHERED[name]
  got, counts = gathered(rows)
  assert counts == left_out
  asked = [record.get("prompt") or record["messages"] for _, record in got]
  sides = [(record["response_a"], record["response_b"], record["p_a"]) for _, record in got]
  assert [(x, *y) for x, y in zip(asked, sides, strict=True)] == expected
  # A table has all columns in all rows, and null where there is nothing.
  columns = {field for row in rows for field in row}
  path = written(tmp_path, "x.jsonl", [dict.fromkeys(columns) | row for row in rows])
  config = settings(path, "preferences")
  config.max_tokens = 64
  chat = Tokenizer(BUNDLED, "gemma")
  pairs = load_preferences(config, chat, seed=0)[0].columns
  assert [ids.tolist() for ids in pairs["inputs"]] == [chat.prompt(x) for x in asked]
  assert [float(p) for p in pairs["p_win"]] == [p for *_, p in expected]


def test_records_of_other_forms_stay_and_one_that_lacks_a_field_is_named():
  rows = [READ["ours"][0], labelled("Hi", "x", True), {"prompt": "Hi", "completion": "y"}]
  with pytest.raises(
    ValueError, match=r"x\.jsonl:3: field 'label' is None, expected true or false"
  ):
    gathered(rows)
  skipped = []
  rows += [labelled("Hi", "y", False), READ["UltraFeedback"][0], labelled("Ho", 3, True)]
  got, _ = gathered(rows, skip=skipped.append)
  assert [place for place, _ in got] == ["x.jsonl:1", "x.jsonl:2 and x.jsonl:4", "x.jsonl:5"]
  assert [record for _, record in got][::2] == [rows[0], rows[4]]
  assert [str(error)[:29] for error in skipped] == [
    "x.jsonl:3: field 'label' is N",
    "x.jsonl:6: field 'completion'",
  ]


def test_the_prompts_of_trees_are_all_that_users_say(tmp_path):
  """And those of other rated responses, once each, where they are no field of their own."""
  for name in ("OpenAssistant's trees", "OpenAssistant's messages"):
    got, _ = gathered(GATHERED[name][0], forms.prompts)
    assert sorted([record["messages"] for _, record in got], key=len) == [ASKED, SANG]
  assert [x for _, x in gathered(GATHERED["UltraFeedback"][0], forms.prompts)[0]] == [ASKS]
  rows = GATHERED["unpaired, of texts"][0] + GATHERED["HelpSteer2"][0]
  assert [record for _, record in gathered(rows, forms.prompts)[0]] == rows
  trees, others = GATHERED["OpenAssistant's trees"][0], ["Why?", {"context_messages": LONG}]
  assert [record for _, record in gathered([*trees, *others], forms.prompts)[0]][2:] == others


ASKS = {"prompt": "Hi"}


@pytest.mark.parametrize(
  ("record", "prompt"),
  [
    ("Why?", "Why?"),
    ({"context_messages": LONG, "prompt": "Sing"}, LONG),
    ({"context_messages": [], "prompt": "Why?"}, "Why?"),
    ({"instruction": "Add.", "instances": [{"input": "1 + 1", "output": "2"}]}, "Add.\n\n1 + 1"),
    ({"instruction": "Name a fruit.", "instances": [{"input": ""}]}, "Name a fruit."),
    ({"instruction": "Translate.", "input": "chat", "output": "cat"}, "Translate.\n\nchat"),
    ({"messages": [{"from": "human", "value": "Hi"}]}, ASKED),
    ({"prompt": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]}, ASKED),
  ],
)
def test_prompts_alone_are_read_as_they_are_published(record, prompt, tmp_path):
  chat = Tokenizer(BUNDLED, "gemma")
  config = settings(written(tmp_path, "x.jsonl", [record]), "json_lines")
  config.max_tokens = 64
  prompts, _ = load_prompts(config, chat, seed=0)
  assert [ids.tolist() for ids in prompts.columns["inputs"]] == [chat.prompt(prompt)]


def test_a_picture_is_no_text(tmp_path):
  parts = [{"type": "text", "text": "What is it?"}, {"type": "image", "url": "x.png"}]
  rows = [{"prompt": [{"role": "user", "content": parts}]}]
  with pytest.raises(ValueError, match=r"x\.jsonl:1: message 0 is .*expected a text 'content'"):
    load_prompts(settings(written(tmp_path, "x.jsonl", rows), "json_lines"), TOKENIZER, seed=0)


def test_every_two_ranked_replies_of_openassistants_trees_are_compared(data_dir):
  rows = [record for _, record in read_records(data_dir / "oasst/en_100_tree.jsonl")]
  got, _ = gathered(rows)
  assert len(got) == 754
  assert len({json.dumps(record["messages"]) for _, record in got}) == 212
  shown = {
    (json.dumps(record["messages"]), *sorted((record["response_a"], record["response_b"])),
     record["response_a"] if record["p_a"] else record["response_b"])
    for _, record in got
  }  # fmt: skip
  by_people = [record for _, record in read_records(data_dir / "oasst/ranked_pairs.jsonl")]
  assert len(by_people) == 732
  for record in map(forms.comparison, by_people):
    asked, sides = json.dumps(record["prompt"]), sorted((record["chosen"], record["rejected"]))
    assert (asked, *sides, record["chosen"]) in shown

"""Supervised data that cannot be read: every bad line is named."""

import pytest
from preference_files import CHAT, TOKENIZER, configure, write

from nash_jax.data import preferences


@pytest.mark.parametrize(
  ("task", "line", "message"),
  [
    ("text", '{"prompt": "x"}', r":2: no field 'text', got 'prompt'"),
    ("responses", '{"prompt": "x"}', r":2: no field 'response'"),
    ("preferences", '{"prompt": "x", "chosen": "y"}', r":2: no field 'rejected'"),
    (
      "tokens",
      '{"inputs": [1], "a": [5000], "b": [], "p_a": 1}',
      r":2: field 'a' holds 5000, expected ids of this tokenizer's 1024 pieces",
    ),
    ("tokens", '{"inputs": ["x"], "a": [], "b": [], "p_a": 1}', r":2: field 'inputs' holds 'x'"),
    (
      "tokens",
      '{"inputs": [2, 9, 0], "a": [7], "b": [8], "p_a": 1}',
      r":2: field 'inputs', place 2: expected a prompt without <pad>, got 0",
    ),
    (
      "tokens",
      '{"inputs": [2, 9], "a": [7, 1, 0, 0], "b": [8], "p_a": 1}',
      r":2: field 'a', place 2: expected a response without <pad>, got 0",
    ),
    (
      "tokens",
      '{"inputs": [2, 9], "a": [7], "b": [2, 8], "p_a": 1}',
      r":2: field 'b', place 0: expected a response without <bos>, got 2",
    ),
    (
      "tokens",
      '{"inputs": [2, 9], "a": [7, 1, 8], "b": [8], "p_a": 1}',
      r":2: field 'a', place 1: expected a response that ends at its stop token, got 1",
    ),
    (
      "preferences",
      '{"prompt": "x", "response_a": "y", "response_b": "z"}',
      r":2: no field 'votes_a'",
    ),
    (
      "preferences",
      '{"prompt": "x", "response_a": "y", "response_b": "z", "p_a": 1.5}',
      r":2: field 'p_a' is 1.5, expected a probability",
    ),
    (
      "preferences",
      '{"prompt": "x", "response_a": "", "response_b": "", "votes_a": 0, "votes_b": 0, "ties": 0}',
      r":2: votes_a, votes_b, ties are 0, 0, 0",
    ),
  ],
)
def test_a_bad_line_is_named(tmp_path, task, line, message):
  path = tmp_path / "bad.jsonl"
  path.write_text("\n" + line)
  with pytest.raises(ValueError, match=message):
    preferences.load_preferences(configure(task, str(path)), TOKENIZER, seed=0)


NUMBER = '{"prompt": "x", "response_a": "y", "response_b": "z", %s}'


BAD_VERDICTS = {
  '"votes_a": NaN, "votes_b": 1, "ties": 0': "votes_a, votes_b, ties are nan, 1, 0: expected some",
  '"votes_a": 1, "votes_b": NaN, "ties": 0': "votes_a, votes_b, ties are 1, nan, 0: expected some",
  '"votes_a": 1, "votes_b": 1, "ties": NaN': "votes_a, votes_b, ties are 1, 1, nan: expected some",
  '"votes_a": Infinity, "votes_b": 1, "ties": 0': "are inf, 1, 0: expected some",
  '"votes_a": -Infinity, "votes_b": 1, "ties": 0': "are -inf, 1, 0: expected some",
  '"votes_a": 1%s, "votes_b": 1, "ties": 0' % ("0" * 400): "'votes_a' is 10.*, expected a number",
  '"votes_a": 1e999, "votes_b": 1, "ties": 0': "are inf, 1, 0: expected some",
  '"votes_a": true, "votes_b": 1, "ties": 0': "'votes_a' is True, expected int or float",
  '"votes_a": "3", "votes_b": 1, "ties": 0': "'votes_a' is '3', expected int or float",
  '"votes_a": 1, "votes_b": 1, "ties": null': "'ties' is None, expected int or float",
  '"p_a": NaN': "field 'p_a' is nan, expected a probability",
  '"p_a": Infinity': "field 'p_a' is inf, expected a probability",
  '"p_a": 1%s' % ("0" * 400): "field 'p_a' is 10.*, expected a number",
  '"p_a": null': "no field 'votes_a'",
}


@pytest.mark.parametrize("verdict", BAD_VERDICTS)
def test_a_verdict_that_is_no_number_is_refused_with_its_line(tmp_path, verdict):
  path = tmp_path / "bad.jsonl"
  path.write_text(NUMBER % '"p_a": 1' + "\n" + NUMBER % verdict)
  with pytest.raises(ValueError, match=rf"bad.jsonl:2: .*{BAD_VERDICTS[verdict]}") as error:
    preferences.load_preferences(configure("preferences", str(path)), TOKENIZER, seed=0)
  assert len(str(error.value)) < 400


@pytest.mark.parametrize(
  ("task", "row"),
  [
    ("text", {"text": "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nYes"}),
    ("text", {"text": "Once upon a time.<eos>"}),
    ("responses", {"prompt": "Hi", "response": "Yes<end_of_turn>\n"}),
    ("responses", {"prompt": "<start_of_turn>user\nHi", "response": "Yes"}),
    ("preferences", {"prompt": "Hi", "chosen": "Yes<eos>", "rejected": "No"}),
    ("preferences", {"prompt": "Hi", "chosen": "Yes", "rejected": "No<end_of_turn>"}),
  ],
)
def test_a_text_that_carries_the_template_is_refused(tmp_path, task, row):
  path = write(tmp_path / "p.jsonl", [row])
  with pytest.raises(ValueError, match=r"p.jsonl:1: .* already has the chat template"):
    preferences.load_preferences(configure(task, path, held_out=0), CHAT, seed=0)


@pytest.mark.parametrize(
  ("ids", "message"),
  [
    ({"inputs": []}, ":1: field 'inputs': expected at least one token of a prompt"),
    (
      {"inputs": [2, 9, 1]},
      ":1: field 'inputs': expected a prompt that waits for a response, got 1",
    ),
    ({"a": [True]}, "field 'a' holds True, expected ids of this tokenizer's 1024"),
    ({"b": [10**30]}, "field 'b' holds 10.*, expected ids"),
    ({"b": [7.0]}, "field 'b' holds 7.0, expected ids"),
  ],
)
def test_token_ids_that_are_no_prompt_or_response_are_refused(tmp_path, ids, message):
  row = {"inputs": [2, 9], "a": [7], "b": [8], "p_a": 1} | ids
  config = configure("tokens", write(tmp_path / "t.jsonl", [row]), held_out=0)
  with pytest.raises(ValueError, match=message):
    preferences.load_preferences(config, TOKENIZER, seed=0)


@pytest.mark.parametrize(
  ("task", "fields", "message"),
  [
    ("text", {"max_tokens": 0}, "data.max_tokens: expected at least 2, got 0"),
    ("text", {"max_tokens": 1}, "data.max_tokens: expected at least 2, got 1"),
    ("preferences", {"max_tokens": 0}, "data.max_tokens: expected at least 1, got 0"),
    ("preferences", {"max_response_tokens": 0}, "max_response_tokens: expected at least 1, got 0"),
  ],
)
def test_a_budget_of_no_token_is_refused(tmp_path, task, fields, message):
  path = write(tmp_path / "p.jsonl", [{"text": "x"}])
  with pytest.raises(ValueError, match=message):
    preferences.load_preferences(configure(task, path, **fields), TOKENIZER, seed=0)


def test_other_bad_input_is_refused(tmp_path):
  path = write(tmp_path / "p.jsonl", [{"text": "x"}])
  with pytest.raises(ValueError, match="expected one of preferences, responses, text, tokens"):
    preferences.load_preferences(configure("pairs", path), TOKENIZER, seed=0)
  (tmp_path / "none.jsonl").write_text("\n")
  with pytest.raises(ValueError, match="hold no records"):
    preferences.load_preferences(configure("text", f"{tmp_path}/none.jsonl"), TOKENIZER, seed=0)

"""Supervised data: what counts towards a loss, who won, and the published sets we convert."""

import errno
import json
import logging
import pathlib
import types

import numpy as np
import pytest
from jax import numpy as jnp
from ml_collections import ConfigDict

import nash_jax
from nash_jax import sampler
from nash_jax.data import preferences
from nash_jax.data.tokenizer import BUNDLED, Tokenizer
from nash_jax.jobs import collect
from nash_jax.types import Responses, Verdict

TOKENIZER = Tokenizer(BUNDLED, "plain")
CHAT = Tokenizer(BUNDLED, "gemma")


def write(path, records):
  path.write_text("\n".join(map(json.dumps, records)))
  return str(path)


def configure(task, path, **fields):
  budgets = {"max_tokens": 16, "max_response_tokens": 12, "held_out_path": ""}
  budgets |= {"duplicates": "keep", "bad": "stop"}
  return ConfigDict(
    {"task": task, "path": path, "held_out": 1, "overflow": "drop", **budgets} | fields
  )


@pytest.mark.parametrize("width", [5, 16])
def test_windows_hold_every_document_once_in_order(tmp_path, width):
  texts = ["A cat sat on the mat.", "Tom ran.", "The end of it all.", "Lily saw a bird."]
  path = write(tmp_path / "t.jsonl", [{"text": text} for text in texts])
  config = configure("text", path, max_tokens=width)
  train, held_out = preferences.load_preferences(config, TOKENIZER, seed=0)
  ids = [[TOKENIZER.bos_id, *TOKENIZER.encode(text), TOKENIZER.eos_id] for text in texts]
  whole = train.all()
  assert whole["tokens"].shape == (len(train), width)
  assert list(whole["tokens"][whole["mask"]]) == [i for document in ids[:3] for i in document]
  last = held_out.all()
  assert list(last["tokens"][last["mask"]]) == ids[3]
  # Counted: every token that has one before it in its window, <bos> apart.
  expected = whole["mask"] & (whole["tokens"] != TOKENIZER.bos_id)
  expected[:, 0] = False
  np.testing.assert_array_equal(whole["loss_mask"], expected)
  (tmp_path / "more.jsonl").write_text(json.dumps({"text": texts[3]}))
  path = write(tmp_path / "t.jsonl", [{"text": text} for text in texts[:3]])
  config.update(path=path, held_out=0, held_out_path=str(tmp_path / "more.jsonl"))
  for part, same in zip(
    preferences.load_preferences(config, TOKENIZER, 0), (train, held_out), strict=True
  ):
    np.testing.assert_array_equal(part.all()["tokens"], same.all()["tokens"])
  batch = train.batch(3, 4)
  rows = [train.batch(3, 4, slice(0, 2)), train.batch(3, 4, slice(2, 4))]
  for name, array in batch.items():
    np.testing.assert_array_equal(np.concatenate([row[name] for row in rows]), array)


def test_only_tokens_of_the_response_count_in_the_loss(tmp_path):
  rows = [
    {"prompt": "Tom had", "response": " a cat."},
    {"messages": [{"role": "user", "content": "Lily"}], "response": " ran."},
    {"prompt": "The end", "response": "."},
  ]
  config = configure("responses", write(tmp_path / "r.jsonl", rows))
  train, held_out = preferences.load_preferences(config, TOKENIZER, seed=0)
  arrays = train.all()
  assert arrays["tokens"].shape == (2, 28)
  for i, (prompt, response) in enumerate((("Tom had", " a cat."), ("Lily", " ran."))):
    whole = TOKENIZER.prompt(prompt) + TOKENIZER.response(response)
    assert list(arrays["tokens"][i][arrays["mask"][i]]) == whole
    assert list(arrays["tokens"][i][arrays["loss_mask"][i]]) == TOKENIZER.response(response)
  assert len(held_out) == 1


@pytest.mark.parametrize(
  ("verdict", "p_win"),
  [
    ({"chosen": "one", "rejected": "two"}, 1.0),
    ({"p_a": 0.25}, 0.25),
    ({"p_a": 0}, 0.0),
    ({"votes_a": 2, "votes_b": 1, "ties": 1}, 0.625),
    ({"votes_a": 0, "votes_b": 0, "ties": 3}, 0.5),
  ],
)
def test_every_form_of_a_verdict_gives_the_probability_that_a_wins(tmp_path, verdict, p_win):
  pair = {} if "chosen" in verdict else {"response_a": "one", "response_b": "two"}
  rows = [{"prompt": "Say", **pair, **verdict}] * 2
  config = configure("preferences", write(tmp_path / "p.jsonl", rows))
  train, _ = preferences.load_preferences(config, TOKENIZER, seed=0)
  batch = train.batch(0, 1)
  assert batch["p_win"] == np.float32(p_win)
  assert list(batch["a_tokens"][batch["a_mask"]]) == TOKENIZER.response("one")
  assert list(batch["b_tokens"][batch["b_mask"]]) == TOKENIZER.response("two")
  assert list(batch["prompts"].tokens[batch["prompts"].mask]) == TOKENIZER.prompt("Say")
  assert batch["prompts"].mask[0, -1]
  assert batch["a_mask"][0, 0]


def test_texts_over_their_budgets_are_dropped_or_cut(tmp_path):
  long, short = "a very very long and windy text of many many words", "Hi"
  rows = [
    {"prompt": p, "chosen": a, "rejected": b}
    for p, a, b in [
      (short, short, "Oh"),
      (long, short, "Oh"),
      (short, "Oh", long),
      (short, "A", "B"),
    ]
  ]
  path = write(tmp_path / "p.jsonl", rows)
  budgets = {"max_tokens": 6, "max_response_tokens": 5}
  dropped, _ = preferences.load_preferences(
    configure("preferences", path, **budgets), TOKENIZER, seed=0
  )
  assert dropped.report == {"kept": 1, "dropped": 2, "cut": 0}
  config = configure("preferences", path, overflow="cut", **budgets)
  cut, _ = preferences.load_preferences(config, TOKENIZER, seed=0)
  assert cut.report == {"kept": 3, "dropped": 0, "cut": 2}
  arrays = cut.all()
  assert list(arrays["prompts"].tokens[1]) == [TOKENIZER.bos_id, *TOKENIZER.prompt(long)[-5:]]
  assert list(arrays["b_tokens"][2]) == TOKENIZER.response(long)[:5]
  none = configure("preferences", path, max_tokens=1, max_response_tokens=5)
  with pytest.raises(ValueError, match="no examples left"):
    preferences.load_preferences(none, TOKENIZER, seed=0)


@pytest.mark.parametrize(("long", "overflow"), [(3, "cut"), (3, "drop"), (2, "cut")])
def test_budgets_that_most_examples_exceed_are_told_with_their_share(
  tmp_path, caplog, long, overflow
):
  pairs = [
    ("A b.", "A b."),
    *[("A cat sat on the mat. " * 9, "No.")] * long,
    *[("C d.", "E f.")] * 4,
  ]
  pairs = pairs[: long + 2]
  records = [{"prompt": "Hi", "chosen": a, "rejected": f"{b} !"} for a, b in pairs]
  path = write(tmp_path / "p.jsonl", records)
  preferences.load_preferences(configure("preferences", path, overflow=overflow), TOKENIZER, 0)
  said = [r.getMessage() for r in caplog.records if "max_response_tokens=12" in r.getMessage()]
  fate = {"cut": "cut", "drop": "dropped"}[overflow]
  expected = f"3 of 5 examples (60%) are over max_response_tokens=12, max_tokens=16 and are {fate}:"
  assert [line.startswith(expected) for line in said] == [True] * (long > 2)


def test_pairs_of_token_ids_are_taken_as_they_are(tmp_path):
  rows = [
    {"inputs": [2, 9], "a": [7, 8, 1], "b": [7], "p_a": 0.25},
    {"inputs": [2], "a": [], "b": [1], "p_a": 1},
  ]
  config = configure("tokens", write(tmp_path / "t.jsonl", rows), held_out=0)
  train, _ = preferences.load_preferences(config, TOKENIZER, seed=0)
  batch = train.all()
  sides = [(batch["prompts"].tokens, batch["prompts"].mask)]
  sides += [(batch[f"{side}_tokens"], batch[f"{side}_mask"]) for side in "ab"]
  for name, (tokens, mask) in zip(("inputs", "a", "b"), sides, strict=True):
    assert [list(ids[kept]) for ids, kept in zip(tokens, mask, strict=True)] == [
      row[name] for row in rows
    ]
  np.testing.assert_array_equal(batch["p_win"], np.array([0.25, 1], np.float32))


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
  ("votes", "p_win"),
  [
    ((1e308, 1e308, 1e308), 0.5),
    ((1e308, 0, 1e308), 0.75),
    ((1e308, 5e-324, 0), 1.0),
    ((5e-324, 5e-324, 0), 0.5),
  ],
)
def test_votes_of_any_size_give_their_share(tmp_path, votes, p_win):
  row = {"prompt": "x", "response_a": "y", "response_b": "z"}
  rows = [row | dict(zip(("votes_a", "votes_b", "ties"), votes, strict=True))] * 2
  config = configure("preferences", write(tmp_path / "p.jsonl", rows))
  train, _ = preferences.load_preferences(config, TOKENIZER, seed=0)
  assert train.all()["p_win"] == np.float32(p_win)


def test_null_columns_of_a_table_are_no_values(tmp_path):
  empty = dict.fromkeys(
    ("messages", "chosen", "rejected", "response_a", "response_b", "p_a", "votes_a", "votes_b")
  )
  verdicts = [
    {"chosen": "y", "rejected": "z"},
    {"response_a": "y", "response_b": "z", "p_a": 0.25},
    {"response_a": "y", "response_b": "z", "votes_a": 3, "votes_b": 1, "ties": 0},
  ]
  path = write(tmp_path / "p.jsonl", [empty | {"prompt": "x"} | verdict for verdict in verdicts])
  config = configure("preferences", path, held_out=0)
  train, _ = preferences.load_preferences(config, TOKENIZER, seed=0)
  assert train.all()["p_win"].tolist() == [1, 0.25, 0.75]


def test_pairs_of_equal_responses_keep_no_label_but_a_tie(tmp_path):
  same = "The little cat ran all the way home to the big red house and"
  pairs = [
    (f"{same} slept.", f"{same} cried."),  # equal once they are cut
    ("x", "x"),
    ("y", "z"),
    (same, "z"),
  ]
  rows = [{"prompt": "Tell me.", "chosen": a, "rejected": b} for a, b in pairs]
  path = write(tmp_path / "p.jsonl", rows)
  config = configure("preferences", path, overflow="cut", held_out=0, max_response_tokens=8)
  train, _ = preferences.load_preferences(config, TOKENIZER, seed=0)
  assert train.report == {"kept": 2, "dropped": 0, "cut": 1, "equal": 2}
  batch = train.all()
  assert not (batch["a_tokens"] == batch["b_tokens"]).all(1).any()
  assert list(batch["prompts"].index) == [2, 3]

  ids = {"inputs": [2, 9], "a": [7, 8], "b": [7, 8]}
  path = write(tmp_path / "t.jsonl", [ids | {"p_a": p} for p in (0.5, 0.9, 0.5)])
  train, held_out = preferences.load_preferences(configure("tokens", path), TOKENIZER, seed=0)
  assert train.all()["p_win"].tolist() == [0.5]
  assert train.report == {"kept": 1, "dropped": 0, "cut": 0, "equal": 1}
  assert held_out.report["kept"] == 1

  path = write(tmp_path / "e.jsonl", [{"prompt": "x", "chosen": "y", "rejected": "y"}])
  with pytest.raises(ValueError, match=r"no examples left: 0 are over.*, 1 equal"):
    preferences.load_preferences(configure("preferences", path, held_out=0), TOKENIZER, seed=0)


def test_held_out_texts_and_prompts_that_are_trained_on_are_counted_and_can_be_dropped(tmp_path):
  texts = ["Tom ran.", "Lily sat.", "Tom ran."]
  path = write(tmp_path / "t.jsonl", [{"text": text} for text in texts])
  _, held_out = preferences.load_preferences(configure("text", path), TOKENIZER, seed=0)
  assert held_out.report["duplicates"] == 1
  config = configure("text", path, duplicates="drop")
  train, held_out = preferences.load_preferences(config, TOKENIZER, seed=0)
  windows = train.all()
  ids = [TOKENIZER.bos_id, *TOKENIZER.encode(texts[1]), TOKENIZER.eos_id]
  assert list(windows["tokens"][windows["mask"]]) == ids
  assert (train.report["duplicates"], len(held_out)) == (1, 1)
  rows = [{"prompt": text, "response": "x"} for text in texts]
  config = configure("responses", write(tmp_path / "r.jsonl", rows), duplicates="drop")
  train, _ = preferences.load_preferences(config, TOKENIZER, seed=0)
  assert (len(train), train.report["duplicates"]) == (1, 1)


def test_white_space_around_a_response_is_as_in_gemmas_published_template(tmp_path):
  rows = [
    {"prompt": " Hi \n", "chosen": " I think so. \n", "rejected": "No\n\n"},
    {"prompt": "Hi", "chosen": "I think so.", "rejected": "No"},
  ]
  config = configure("preferences", write(tmp_path / "p.jsonl", rows), held_out=0, max_tokens=64)
  arrays = preferences.load_preferences(config, CHAT, seed=0)[0].all()
  for tokens in (arrays["a_tokens"], arrays["b_tokens"], arrays["prompts"].tokens):
    np.testing.assert_array_equal(tokens[0], tokens[1])
  plain = preferences.load_preferences(config, TOKENIZER, seed=0)[0].all()
  assert list(plain["b_tokens"][0][plain["b_mask"][0]]) == TOKENIZER.response("No\n\n")


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
  with pytest.raises(ValueError, match=r"p.jsonl:1: .* carries the chat template already"):
    preferences.load_preferences(configure(task, path, held_out=0), CHAT, seed=0)


def test_a_response_may_be_one_message_of_the_model(tmp_path):
  def say(text, role="assistant"):
    return {"role": role, "content": text}

  ask = [say("Hi", "user")]
  rows = [
    {"prompt": ask, "chosen": [say("Yes")], "rejected": [say([{"type": "text", "text": "No"}])]}
  ]
  path = write(tmp_path / "p.jsonl", rows)
  batch = preferences.load_preferences(configure("preferences", path, held_out=0), TOKENIZER, 0)
  arrays = batch[0].all()
  for side, text in (("a", "Yes"), ("b", "No")):
    assert list(arrays[f"{side}_tokens"][0][arrays[f"{side}_mask"][0]]) == TOKENIZER.response(text)
  for chosen in ([*ask, say("Yes")], [say("Yes", "user")], [], ["Yes"]):
    path = write(
      tmp_path / "p.jsonl", [{"prompt": "Hi", "chosen": chosen, "rejected": [say("No")]}]
    )
    message = r"p.jsonl:1: (field 'chosen': expected one message of the assist|message 0 is 'Yes')"
    with pytest.raises(ValueError, match=message):
      preferences.load_preferences(configure("preferences", path, held_out=0), TOKENIZER, 0)


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


def test_votes_of_three_annotators_under_gemmas_template(data_dir, tmp_path):
  """PandaLM's test set: each annotator says 1, 2, or 0 for a tie."""
  found = json.loads((data_dir / "pandalm" / "testset-v1.json").read_text("utf-8"))[:40]
  rows = []
  for row in found:
    votes = [row[f"annotator{i}"] for i in (1, 2, 3)]
    rows.append(
      {
        "messages": [{"role": "user", "content": row["instruction"]}],
        "response_a": row["response1"],
        "response_b": row["response2"],
        "votes_a": votes.count(1),
        "votes_b": votes.count(2),
        "ties": votes.count(0),
      }
    )
  gemma = Tokenizer(str(data_dir / "gemma_tokenizer" / "tokenizer.model"), "gemma")
  path = write(tmp_path / "votes.jsonl", rows)
  config = configure("preferences", path, overflow="cut", max_tokens=64, max_response_tokens=48)
  train, held_out = preferences.load_preferences(config, gemma, seed=0)
  assert (len(train), len(held_out)) == (39, 1)
  batch = train.all()
  model = gemma.prompt("x")[-3:]
  assert (batch["prompts"].tokens[:, -3:] == np.array(model)[None]).all()
  assert (batch["prompts"].tokens == gemma.bos_id).sum(1).tolist() == [1] * 39
  for side in "ab":
    text = gemma.decode(batch[f"{side}_tokens"][0][batch[f"{side}_mask"][0]])
    assert text
    assert rows[0][f"response_{side}"].startswith(text)
  sixths = batch["p_win"] * 6  # three annotators, halves for ties
  np.testing.assert_allclose(sixths, np.round(sixths), atol=1e-5)
  assert 0 < batch["p_win"].mean() < 1


def test_a_collection_follows_the_configs_sampling_and_dtype(tmp_path, monkeypatch):
  config = nash_jax.config.collect()
  config.model.update({"preset": "tiny", "changes": {"num_embed": 1024}, "weights": ""})
  config.model.dtype = "bfloat16"
  config.prompts.update({"held_out": 300, "batch_size": 4})
  allowed = tuple(range(300, 308))
  config.sampling.update({"max_tokens": 6, "samples": 2, "tokens": allowed})
  config.sources = {"base": {"weights": "", "temperature": 1.0}}
  config.steps, dtypes = 2, []
  make_sampler = sampler.make_sampler
  monkeypatch.setattr(
    sampler,
    "make_sampler",
    lambda *args, **options: dtypes.append(options["dtype"]) or make_sampler(*args, **options),
  )
  path = pathlib.Path(collect.run(config, tmp_path))
  pairs = [json.loads(line) for line in path.read_text().splitlines()]
  assert len(pairs) == 2 * 4
  assert {token for pair in pairs for side in "ab" for token in pair[side]} == set(allowed)
  assert dtypes == [jnp.bfloat16]


def test_a_collection_on_a_full_disk_names_its_file_and_is_not_taken_for_whole(
  tmp_path, monkeypatch
):
  def full(*arrays):
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(collect, "token_pairs", full)
  monkeypatch.setattr(collect, "load_weights", lambda *_: None)
  policy = types.SimpleNamespace(make_sampler=lambda samples: lambda *_: jnp.ones(1))
  monkeypatch.setattr(collect, "make_policy", lambda *_: policy)
  verdict = Verdict(jnp.ones(1), jnp.ones(1, bool))
  judge = types.SimpleNamespace(fn=lambda *_: verdict, params=None)
  monkeypatch.setattr(collect.judges, "make", lambda *_: judge)
  config = nash_jax.config.collect()
  config.steps = 1
  with pytest.raises(
    ValueError, match=r"pairs.unfinished: expected a file that can be written: .*No space"
  ):
    collect.run(config, tmp_path)
  assert not (tmp_path / "pairs.jsonl").exists()


def test_collected_votes_are_data_for_a_judge(tmp_path):
  config = nash_jax.config.collect()
  config.model.update({"preset": "tiny", "changes": {"num_embed": 1024}, "weights": ""})
  config.prompts.update({"held_out": 300, "batch_size": 4})
  config.sampling.update({"max_tokens": 6, "samples": 3})
  config.sources = {name: {"weights": "", "temperature": t} for name, t in (("a", 1.0), ("b", 2.0))}
  config.steps = 3
  path = collect.run(config, tmp_path / "votes")
  config = configure("tokens", path, held_out=9, max_tokens=32, max_response_tokens=6)
  train, held_out = preferences.load_preferences(config, TOKENIZER, seed=0)
  assert (len(train), len(held_out)) == (3 * 4 * 3 - 9, 9)
  assert train.report["dropped"] == 0
  batch = train.all()
  # The pairs of a prompt's three responses follow one another: (0, 1), (0, 2), (1, 2).
  for first in range(0, 27, 3):
    prompts, a, b = (
      x[first : first + 3] for x in (batch["prompts"].tokens, batch["a_tokens"], batch["b_tokens"])
    )
    assert (prompts == prompts[:1]).all()
    for same, other in ((a[0], a[1]), (b[0], a[2]), (b[1], b[2])):
      np.testing.assert_array_equal(same, other)
  assert set(np.round(3 * batch["p_win"], 5)) <= {0, 0.5, 1, 1.5, 2, 2.5, 3}  # three annotators


@pytest.fixture
def table_collection(tmp_path, monkeypatch):
  """A collection whose responses are 0, 1 and 5 to every prompt; its judge knows 0 and 1 alone."""

  def sample(params, prompts, key):
    tokens = jnp.broadcast_to(jnp.array([[300], [301], [305]])[None], (*prompts.index.shape, 3, 1))
    zeros = jnp.zeros(tokens.shape)
    return Responses(tokens, zeros == 0, zeros, zeros, zeros[..., 0] == 0)

  drawn = types.SimpleNamespace(make_sampler=lambda samples: sample)
  monkeypatch.setattr(collect, "make_policy", lambda *args: drawn)
  monkeypatch.setattr(collect, "load_weights", lambda *args: {})
  np.save(tmp_path / "table.npy", np.array([[[0.5, 1], [0, 0.5]]], np.float32))
  config = nash_jax.config.collect()
  config.prompts.update({"held_out": 300, "batch_size": 4})
  config.sampling.samples = 3
  config.judge.update({"name": "table", "table": str(tmp_path / "table.npy"), "first_token": 300})
  config.steps = 2
  return config


def test_pairs_without_a_verdict_are_left_out_and_counted(table_collection, tmp_path, caplog):
  with caplog.at_level(logging.INFO, "absl"):
    path = pathlib.Path(collect.run(table_collection, tmp_path / "votes"))
  pairs = [json.loads(line) for line in path.read_text().splitlines()]
  assert [(pair["a"], pair["b"], pair["p_a"]) for pair in pairs] == [([300], [301], 1.0)] * 8
  messages = [record.getMessage() for record in caplog.records]
  assert "16 of 24 pairs have no verdict: left out" in messages
  assert {file.name for file in path.parent.iterdir()} == {"pairs.jsonl", ".lock"}


def test_a_collection_leaves_an_earlier_one_alone(table_collection, tmp_path, monkeypatch):
  (tmp_path / "votes").mkdir()
  (tmp_path / "votes" / "pairs.jsonl").write_text("from before")
  monkeypatch.setattr(collect, "load_weights", None)
  with pytest.raises(ValueError, match=r"workdir: expected one without pairs.jsonl, got .*votes"):
    collect.run(table_collection, tmp_path / "votes")
  assert (tmp_path / "votes" / "pairs.jsonl").read_text() == "from before"


def test_a_collection_without_one_verdict_is_an_error(table_collection, tmp_path):
  table_collection.judge.first_token = 900
  with pytest.raises(
    ValueError, match="judge: expected a readable verdict on some of the 24 pairs"
  ):
    collect.run(table_collection, tmp_path / "votes")
  assert not (tmp_path / "votes" / "pairs.jsonl").exists()
  table_collection.sources = {}
  with pytest.raises(ValueError, match="sources: expected at least one"):
    collect.run(table_collection, tmp_path / "none")

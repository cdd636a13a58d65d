"""Supervised data: what counts towards a loss, who won, and the published sets we convert."""

import json

import numpy as np
import pytest
from preference_files import CHAT, TOKENIZER, configure, write

from nash_jax.data import preferences
from nash_jax.data.tokenizer import Tokenizer


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

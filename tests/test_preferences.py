"""Supervised data: what counts towards a loss, who won, and the published sets we convert."""

import json
import pathlib

import numpy as np
import pytest
from jax import numpy as jnp
from ml_collections import ConfigDict

import nash_jax
from nash_jax import sampler
from nash_jax.data import preferences
from nash_jax.data.tokenizer import BUNDLED, Tokenizer
from nash_jax.jobs import collect

TOKENIZER = Tokenizer(BUNDLED, "plain")


def write(path, records):
  path.write_text("\n".join(map(json.dumps, records)))
  return str(path)


def configure(task, path, **fields):
  budgets = {"max_tokens": 16, "max_response_tokens": 12, "held_out_path": ""}
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

"""Supervised data: what counts towards a loss, who won, and the published sets we convert."""

import json

import numpy as np
import pytest
from ml_collections import ConfigDict

from nash_jax import convert, preferences
from nash_jax.tokenizer import BUNDLED, Tokenizer

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
  train, held_out = preferences.load(config, TOKENIZER, seed=0)
  ids = [[TOKENIZER.bos_id, *TOKENIZER.encode(text), TOKENIZER.eos_id] for text in texts]
  whole = train.all()
  assert whole["tokens"].shape == (len(train), width)
  assert list(whole["tokens"][whole["mask"]]) == [i for document in ids[:3] for i in document]
  assert list(held_out.tokens.values) == ids[3]
  # Counted: every token that has one before it in its window, <bos> apart.
  expected = whole["mask"] & (whole["tokens"] != TOKENIZER.bos_id)
  expected[:, 0] = False
  np.testing.assert_array_equal(whole["loss_mask"], expected)
  (tmp_path / "more.jsonl").write_text(json.dumps({"text": texts[3]}))
  path = write(tmp_path / "t.jsonl", [{"text": text} for text in texts[:3]])
  config.update(path=path, held_out=0, held_out_path=str(tmp_path / "more.jsonl"))
  for part, same in zip(preferences.load(config, TOKENIZER, 0), (train, held_out), strict=True):
    np.testing.assert_array_equal(part.tokens.values, same.tokens.values)
  batch = train.batch(3, 4)
  rows = [train.batch(3, 4, slice(0, 2)), train.batch(3, 4, slice(2, 4))]
  for name, array in batch.items():
    np.testing.assert_array_equal(np.concatenate([row[name] for row in rows]), array)


def test_only_the_response_counts(tmp_path):
  rows = [
    {"prompt": "Tom had", "response": " a cat."},
    {"messages": [{"role": "user", "content": "Lily"}], "response": " ran."},
    {"prompt": "The end", "response": "."},
  ]
  config = configure("responses", write(tmp_path / "r.jsonl", rows))
  train, held_out = preferences.load(config, TOKENIZER, seed=0)
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
def test_who_won(tmp_path, verdict, p_win):
  pair = {} if "chosen" in verdict else {"response_a": "one", "response_b": "two"}
  rows = [{"prompt": "Say", **pair, **verdict}] * 2
  config = configure("preferences", write(tmp_path / "p.jsonl", rows))
  train, _ = preferences.load(config, TOKENIZER, seed=0)
  batch = train.batch(0, 1)
  assert batch["p_win"] == np.float32(p_win)
  assert list(batch["a_tokens"][batch["a_mask"]]) == TOKENIZER.response("one")
  assert list(batch["b_tokens"][batch["b_mask"]]) == TOKENIZER.response("two")
  assert list(batch["prompts"].tokens[batch["prompts"].mask]) == TOKENIZER.prompt("Say")
  assert batch["prompts"].mask[0, -1]
  assert batch["a_mask"][0, 0]


def test_budgets_drop_or_cut(tmp_path):
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
  dropped, _ = preferences.load(configure("preferences", path, **budgets), TOKENIZER, seed=0)
  assert dropped.report == {"kept": 1, "dropped": 2, "cut": 0}
  config = configure("preferences", path, overflow="cut", **budgets)
  cut, _ = preferences.load(config, TOKENIZER, seed=0)
  assert cut.report == {"kept": 3, "dropped": 0, "cut": 2}
  arrays = cut.all()
  assert list(arrays["prompts"].tokens[1]) == [TOKENIZER.bos_id, *TOKENIZER.prompt(long)[-5:]]
  assert list(arrays["b_tokens"][2]) == TOKENIZER.response(long)[:5]
  none = configure("preferences", path, max_tokens=1, max_response_tokens=5)
  with pytest.raises(ValueError, match="no examples left"):
    preferences.load(none, TOKENIZER, seed=0)


def test_token_arrays_come_back_as_they_were_saved(tmp_path):
  rng = np.random.default_rng(0)
  tokens = [rng.integers(5, 1000, (6, n)).astype(np.int32) for n in (16, 12, 12)]
  lengths = [rng.integers(1, n + 1, 6) for n in (16, 12, 12)]
  masks = [np.arange(t.shape[1])[None] < n[:, None] for t, n in zip(tokens, lengths, strict=True)]
  tokens[0], masks[0] = tokens[0][:, ::-1], masks[0][:, ::-1]  # prompts are left-padded
  tokens = [np.where(m, t, TOKENIZER.pad_id) for t, m in zip(tokens, masks, strict=True)]
  p_win = rng.uniform(size=6).astype(np.float32)
  path = str(tmp_path / "pairs.npz")
  columns = [array for pair in zip(tokens, masks, strict=True) for array in pair]
  preferences.save_pairs(path, *columns, p_win)
  train, held_out = preferences.load(configure("tokens", path, held_out=2), TOKENIZER, seed=0)
  for part, rows in ((train, slice(0, 4)), (held_out, slice(4, 6))):
    arrays = part.all()
    got = [arrays["prompts"].tokens, arrays["prompts"].mask]
    got += [arrays[name] for name in ("a_tokens", "a_mask", "b_tokens", "b_mask", "p_win")]
    for array, saved in zip(got, [*columns, p_win], strict=True):
      np.testing.assert_array_equal(array, saved[rows])


@pytest.mark.parametrize(
  ("task", "line", "message"),
  [
    ("text", '{"prompt": "x"}', r":2: no field 'text', got 'prompt'"),
    ("responses", '{"prompt": "x"}', r":2: no field 'response'"),
    ("preferences", '{"prompt": "x", "chosen": "y"}', r":2: no field 'rejected'"),
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
    preferences.load(configure(task, str(path)), TOKENIZER, seed=0)


def test_other_bad_input(tmp_path):
  path = write(tmp_path / "p.jsonl", [{"text": "x"}])
  with pytest.raises(ValueError, match="choose one of text, responses, preferences, tokens"):
    preferences.load(configure("pairs", path), TOKENIZER, seed=0)
  np.savez(tmp_path / "foreign.npz", a_tokens=np.zeros((2, 3)))
  with pytest.raises(ValueError, match="no array prompt_tokens, prompt_mask, a_mask"):
    preferences.load(configure("tokens", f"{tmp_path}/foreign.npz"), TOKENIZER, seed=0)
  two = configure("tokens", f"{tmp_path}/foreign.npz, {tmp_path}/foreign.npz")
  with pytest.raises(ValueError, match="reads one"):
    preferences.load(two, TOKENIZER, seed=0)
  ones, mask = np.full((2, 3), 5000), np.ones((2, 3), bool)
  preferences.save_pairs(tmp_path / "big.npz", ones, mask, ones, mask, ones, mask, np.ones(2))
  with pytest.raises(ValueError, match="token 5000, but this tokenizer only 1024"):
    preferences.load(configure("tokens", f"{tmp_path}/big.npz"), TOKENIZER, seed=0)


@pytest.mark.parametrize(
  ("kind", "file", "counts"),
  [
    ("hh_rlhf", "hh_rlhf/helpful-base.test.jsonl.gz", (2339, 15)),
    ("oasst", "oasst/ranked_pairs.jsonl", (732, 0)),
    ("pandalm", "pandalm/testset-v1.json", (999, 0)),
  ],
)
def test_published_sets(data_dir, tmp_path, kind, file, counts):
  output = tmp_path / "all.jsonl"
  done = convert.convert(kind, str(data_dir / file), str(output))
  assert (done["written"], done["skipped"]) == counts
  few = output.read_text("utf-8").split("\n")[:40]
  (tmp_path / "few.jsonl").write_text("\n".join(few), "utf-8")
  gemma = Tokenizer(str(data_dir / "gemma_tokenizer" / "tokenizer.model"), "gemma")
  config = configure(
    "preferences",
    str(tmp_path / "few.jsonl"),
    overflow="cut",
    max_tokens=64,
    max_response_tokens=48,
  )
  train, held_out = preferences.load(config, gemma, seed=0)
  assert (len(train), len(held_out)) == (39, 1)
  arrays = train.all()
  model = gemma.prompt("x")[-3:]
  assert (arrays["prompts"].tokens[:, -3:] == np.array(model)[None]).all()
  assert (arrays["prompts"].tokens == gemma.bos_id).sum(1).tolist() == [1] * 39
  first = json.loads(few[0])
  texts = [
    first[k]
    for k in (("response_a", "response_b") if kind == "pandalm" else ("chosen", "rejected"))
  ]
  for name, text in zip("ab", texts, strict=True):
    said = gemma.decode(arrays[f"{name}_tokens"][0][arrays[f"{name}_mask"][0]])
    assert text.startswith(said)
    assert len(said) > 0
  if kind == "pandalm":
    thirds = arrays["p_win"] * 6  # three annotators, halves for ties
    np.testing.assert_allclose(thirds, np.round(thirds), atol=1e-5)
    assert 0 < arrays["p_win"].mean() < 1

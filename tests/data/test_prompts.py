"""Prompts: their order belongs to the seed and the step, their budget to the config."""

import json
import logging

import numpy as np
import pytest
from prompt_files import CHAT, TOKENIZER, configure, load_all, texts_of, write

import nash_jax
from nash_jax.data import prompts

WORDS = ["cat", "dog", "sun", "tree", "ball", "bird", "boat"]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
  texts = [f"The {WORDS[i % 7]} {'very ' * (i // 7)}big" for i in range(23)]
  path = write(tmp_path_factory.mktemp("prompts") / "p.jsonl", [{"prompt": t} for t in texts])
  return texts, *prompts.load_prompts(configure(path), TOKENIZER, seed=1)


def test_prompts_are_left_padded_and_keep_their_place(loaded):
  texts, train, held_out = loaded
  batch = train.all()
  for tokens, mask, index in zip(batch.tokens, batch.mask, batch.index, strict=True):
    expected = TOKENIZER.prompt(texts[index])
    assert list(tokens[mask]) == expected
    assert not mask[: 16 - len(expected)].any()
    assert (tokens[~mask] == TOKENIZER.pad_id).all()
  assert (len(train), list(train.all().index)) == (20, list(range(20)))
  assert list(held_out.all().index) == [20, 21, 22]
  assert [x.dtype for x in (batch.tokens, batch.mask, batch.index)] == [np.int32, bool, np.int32]


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_rows_make_up_the_batch_of_one_host(loaded, hosts):
  _, train, _ = loaded
  for step in range(7):
    whole = train.batch(step, 8)
    parts = [
      train.batch(step, 8, slice(h * 8 // hosts, (h + 1) * 8 // hosts)) for h in range(hosts)
    ]
    for name in ("tokens", "mask", "index"):
      joined = np.concatenate([getattr(part, name) for part in parts])
      np.testing.assert_array_equal(joined, getattr(whole, name))


def test_every_prompt_once_an_epoch_though_batches_straddle_epochs(loaded):
  _, train, _ = loaded
  order = np.concatenate([train.batch(step, 8).index for step in range(5)])
  first, second = order[:20], order[20:]
  assert sorted(first) == sorted(second) == list(range(20))
  assert list(first) != list(second)
  assert list(first) != sorted(first)


def test_any_step_can_be_asked_for_first_and_the_seed_decides(loaded, tmp_path):
  texts, train, _ = loaded
  path = write(tmp_path / "p.jsonl", [{"prompt": t} for t in texts])
  again, _ = prompts.load_prompts(configure(path), TOKENIZER, seed=1)
  other, _ = prompts.load_prompts(configure(path), TOKENIZER, seed=2)
  np.testing.assert_array_equal(again.batch(1000, 8).index, train.batch(1000, 8).index)
  assert list(other.batch(0, 8).index) != list(train.batch(0, 8).index)


def test_drop_and_cut_are_counted_and_leave_the_split_alone(loaded, tmp_path):
  texts = loaded[0][::-1]  # those that are held out are the shortest, and fit
  path = write(tmp_path / "p.jsonl", [{"prompt": t} for t in texts])
  lengths = np.array([len(TOKENIZER.prompt(t)) for t in texts])
  budget = int(np.median(lengths[:20]))
  over = int((lengths[:20] > budget).sum())
  assert over
  dropped, held_out = prompts.load_prompts(configure(path, max_tokens=budget), TOKENIZER, seed=1)
  assert dropped.report == {"kept": 20 - over, "dropped": over, "cut": 0}
  assert set(held_out.all().index) <= {20, 21, 22}
  cut, _ = prompts.load_prompts(
    configure(path, max_tokens=budget, overflow="cut"), TOKENIZER, seed=1
  )
  assert cut.report == {"kept": 20, "dropped": 0, "cut": over}
  for row, text in zip(cut.all().tokens, texts, strict=False):
    whole = TOKENIZER.prompt(text)
    if len(whole) > budget:
      assert list(row) == [TOKENIZER.bos_id, *whole[-(budget - 1) :]]


def test_text_files_and_several_of_them_and_a_held_out_file(tmp_path):
  for name, lines in {"a": "one cat\n\ntwo", "b": "three\n", "c": "a fish"}.items():
    (tmp_path / f"{name}.txt").write_text(lines)
  config = configure(
    f"{tmp_path}/a.txt, {tmp_path}/b.txt", "text", held_out_path=f"{tmp_path}/c.txt"
  )
  train, held_out = prompts.load_prompts(config, TOKENIZER, seed=0)
  assert texts_of(train) == ["one cat", "two", "three"]
  assert texts_of(held_out) == ["a fish"]
  assert list(held_out.all().index) == [3]


def test_a_mixture_keeps_its_rates_and_repeats(tmp_path):
  paths = [
    write(tmp_path / f"{word}.jsonl", [{"prompt": word + " ran" * i} for i in range(60)])
    for word in ("cat", "dog")
  ]
  config = configure(f"{paths[0]}:3,{paths[1]}:1", max_tokens=128, held_out=0)
  train, held_out = prompts.load_prompts(config, TOKENIZER, seed=0)
  texts = texts_of(train)
  cats = [text for text in texts if text.startswith("cat")]
  assert cats == [
    "cat" + " ran" * i for i in range(60)
  ]  # the mixture ends with its first source to end
  assert 8 <= len(texts) - len(cats) <= 35  # 60 / 3, give or take five standard deviations
  again, _ = prompts.load_prompts(config, TOKENIZER, seed=0)
  assert texts_of(again) == texts
  with pytest.raises(ValueError, match="empty"):
    held_out.batch(0, 2)


def test_a_task_registered_elsewhere_is_read(tmp_path):
  import seqio
  import tensorflow as tf

  def source(split, shuffle_files, seed=None):
    return tf.data.Dataset.from_tensor_slices({"inputs": [[2, 9, 10], [2, 11, 12]]})

  seqio.TaskRegistry.add(
    "someone_elses",
    source=seqio.FunctionDataSource(source, splits=["train"]),
    preprocessors=[],
    output_features={"inputs": seqio.Feature(seqio.PassThroughVocabulary(64), add_eos=False)},
  )
  train, _ = prompts.load_prompts(configure(task="someone_elses", held_out=1), TOKENIZER, seed=0)
  batch = train.all()
  assert list(batch.tokens[batch.mask]) == [2, 9, 10]
  with pytest.raises(ValueError, match=r"prompts.task: got 'storys', .*someone_elses.*stories"):
    prompts.load_prompts(configure(task="storys"), TOKENIZER, seed=0)


def test_other_bad_input_is_refused(tmp_path):
  path = write(tmp_path / "p.jsonl", [{"prompt": "a long prompt of many words"}] * 5)
  for config, message in [
    (configure(path, max_tokens=2), "no examples left: all 2 are over max_tokens=2"),
    (configure(path, overflow="wrap"), "expected one of cut, drop"),
    (configure(path, held_out=5), "held_out is 5 of 5 records"),
    (configure(f"{tmp_path}/none.jsonl"), "no data file"),
    (configure(""), "`path` is empty"),
    (configure(f"{path}:1,{path}"), "either every file"),
  ]:
    with pytest.raises(ValueError, match=message):
      prompts.load_prompts(config, TOKENIZER, seed=0)


def conversation(*texts):
  return [{"role": "model" if i % 2 else "user", "content": text} for i, text in enumerate(texts)]


def test_a_cut_conversation_keeps_whole_turns_and_its_template(tmp_path):
  messages = conversation("One day a cat sat.", "It ran away.", "Why did it?", "It was big.", "Oh?")
  path = write(tmp_path / "p.jsonl", [{"messages": messages}])

  def cut(length):
    return load_all(path, CHAT, max_tokens=length, overflow="cut")

  whole, one, last = (CHAT.prompt(messages[i:]) for i in (0, 2, 4))
  expected = {len(whole): 0, len(whole) - 1: 2, len(one): 2, len(one) - 1: 4, len(last): 4}
  for length, first in expected.items():
    assert cut(length) == [CHAT._model.decode(CHAT.prompt(messages[first:])[1:])]
  fix = rf"max_tokens: expected at least \d+ for this template, got {len(last) - 6}"
  with pytest.raises(ValueError, match=fix):
    cut(len(last) - 6)


def test_a_cut_turn_keeps_its_opening_and_its_end(tmp_path):
  text = "One day a little cat ran all the way home and sat in the sun"
  messages = [{"role": "system", "content": "Be brief."}, *conversation("Hi", "Yes", text)]
  path = write(tmp_path / "p.jsonl", [{"messages": messages}])
  head, tail = "<start_of_turn>user\n", "<end_of_turn>\n<start_of_turn>model\n"
  budget = len(CHAT.prompt(text)) - 4
  (cut,) = load_all(path, CHAT, max_tokens=budget, overflow="cut")
  assert cut.startswith(head)
  assert cut.endswith(f" in the sun{tail}")
  kept = cut.removeprefix(head).removesuffix(tail)
  assert text.endswith(kept)
  assert len(text) > len(kept) > 20
  # The plain template has no turns: <bos> and the end.
  (plain,) = load_all(write(tmp_path / "t.jsonl", [{"prompt": text}]), max_tokens=9, overflow="cut")
  assert text.endswith(plain)


@pytest.fixture
def registered():
  """Returns prompts' token ids -> the name of a seqio task that yields them."""
  import seqio
  import tensorflow as tf

  def register(ids, splits=("train",), feature="inputs"):
    rows = tf.ragged.constant(ids)
    data = tf.data.Dataset.from_tensor_slices({feature: rows})
    vocabulary = seqio.PassThroughVocabulary(8000, eos_id=1)
    seqio.TaskRegistry.remove("trial")
    seqio.TaskRegistry.add(
      "trial",
      source=seqio.FunctionDataSource(lambda split, shuffle_files, seed=None: data, splits=splits),
      preprocessors=[],
      output_features={
        feature: seqio.Feature(
          vocabulary, add_eos=False, dtype=rows.dtype, rank=rows.shape.rank - 1
        )
      },
    )
    return "trial"

  return register


@pytest.mark.parametrize(
  ("ids", "options", "fields", "message"),
  [
    (
      [[2, 9], [2, 5000]],
      {},
      {},
      "inputs of example 1 of the task 'trial' holds 5000, .*1024 pieces",
    ),
    ([[2, -1], [2, 9]], {}, {}, "example 0 .*holds -1, expected ids of this tokenizer's 1024"),
    ([[2, 9, 1], [2, 9]], {}, {}, "example 0 .*expected a prompt that waits.*add_eos=False"),
    ([[2, 9], []], {}, {}, "example 1 .*at least one token of a prompt"),
    (
      [[2, 9], [2, 9, 0, 0]],
      {},
      {},
      "example 1 .*, place 2: .*without <pad>, got 0. Leave it out: padding is added here",
    ),
    ([[0, 0, 2, 9], [2, 9]], {}, {}, "example 0 .*, place 0: expected .*without <pad>, got 0"),
    (
      [[2, 9], [2, 2, 9]],
      {},
      {},
      "example 1 .*, place 1: expected .*one <bos>, at the start, got 2",
    ),
    ([[2, 9], [9, 2]], {}, {}, "example 1 .*, place 1: expected .*one <bos>, at the start, got 2"),
    (
      [[2, 9, 1, 9], [2, 9]],
      {},
      {},
      "example 0 .*, place 2: expected .*one text, without <eos>, got 1",
    ),
    ([[2.0, 9.5]], {}, {}, r"example 0 .*expected token ids, i32\[n\], got 'float32\[2\]'"),
    ([[[2, 9]]], {}, {}, r"expected token ids, i32\[n\], got 'int32\[1, 2\]'"),
    ([[2, 9]] * 2, {}, {"held_out_path": "eval.jsonl"}, "held_out_path: expected none, with the"),
    (
      [[2, 9]] * 2,
      {"splits": ("test",)},
      {},
      r"splits of the task 'trial': expected train .*\['test'",
    ),
    ([[2, 9]] * 2, {"feature": "ids"}, {}, r"features of 'trial': expected inputs, got \['ids'\]"),
  ],
)
def test_a_registered_task_that_does_not_fit_is_refused(registered, ids, options, fields, message):
  config = configure(task=registered(ids, **options), **{"held_out": 0, **fields})
  with pytest.raises(ValueError, match=message):
    prompts.load_prompts(config, TOKENIZER, seed=0)


def test_a_registered_tasks_held_out_prompts_are_none_that_it_trains_on(registered, caplog):
  config = configure(task=registered([[2, i] for i in range(9, 14)] + [[9, 9]]), held_out=2)
  with caplog.at_level(logging.WARNING, "absl"):
    train, held_out = prompts.load_prompts(config, TOKENIZER, seed=0)
  assert list(train.all().index) == [0, 1, 2, 3]
  assert list(held_out.all().index) == [4, 5]
  (message,) = (record.getMessage() for record in caplog.records)
  assert message.startswith("1 of 6 prompts of the task 'trial' do not begin with <bos>")


def test_held_out_prompts_that_are_trained_on_are_counted_and_can_be_dropped(tmp_path, caplog):
  texts = ["a cat", "a dog", "a cat", "a bird", "the sun", "a cat", "a dog", "a boat"]
  path = write(tmp_path / "p.jsonl", [{"prompt": text} for text in texts])
  with caplog.at_level(logging.WARNING, "absl"):
    train, held_out = prompts.load_prompts(configure(path), TOKENIZER, seed=0)
  assert texts_of(train) == texts[:5]
  assert train.report == {"kept": 5, "dropped": 0, "cut": 0}
  assert held_out.report == {"kept": 3, "dropped": 0, "cut": 0, "duplicates": 2}
  (message,) = (record.getMessage() for record in caplog.records)
  assert message.startswith("2 of 3 held-out prompts or texts are also trained on")
  config = configure(path, duplicates="drop")
  train, held_out = prompts.load_prompts(config, TOKENIZER, seed=0)
  assert texts_of(train) == ["a bird", "the sun"]
  assert list(train.all().index) == [3, 4]
  assert train.report == {"kept": 2, "dropped": 0, "cut": 0, "duplicates": 3}
  assert texts_of(held_out) == texts[5:]
  assert held_out.report == {"kept": 3, "dropped": 0, "cut": 0}
  path = write(tmp_path / "same.jsonl", [{"prompt": "a cat"}] * 5)
  with pytest.raises(ValueError, match=r"no examples left: 0 are over.*, 2 duplicates"):
    prompts.load_prompts(configure(path, duplicates="drop"), TOKENIZER, seed=0)
  with pytest.raises(ValueError, match="duplicates: got 'no', expected one of drop, keep"):
    prompts.load_prompts(configure(path, duplicates="no"), TOKENIZER, seed=0)


@pytest.mark.parametrize("job", ["train", "arena", "collect", "fit"])
def test_what_to_do_with_duplicates_is_checked_before_anything_loads(job):
  config = getattr(nash_jax.config, job)()
  group = "data" if job == "fit" else "prompts"
  config[group].duplicates = "no"
  with pytest.raises(
    ValueError, match=rf"{group}.duplicates: got 'no', expected one of drop, keep"
  ):
    nash_jax.config.resolve(config, job)


def test_prompts_that_a_cut_makes_equal_count_as_duplicates(tmp_path):
  texts = ["Tom saw a big red kite in the sun", "Lily saw a big red kite in the sun"]
  path = write(tmp_path / "p.jsonl", [{"prompt": text} for text in texts])
  config = configure(path, max_tokens=6, overflow="cut", held_out=1)
  _, held_out = prompts.load_prompts(config, TOKENIZER, seed=0)
  assert held_out.report["duplicates"] == 1


def test_a_held_out_part_of_which_nothing_fits_is_refused(tmp_path):
  """An evaluation would be a mean over nothing, and a fit would go on without one."""
  path, other = tmp_path / "p.jsonl", tmp_path / "held_out.jsonl"
  path.write_text("".join(json.dumps({"prompt": x}) + "\n" for x in ("One", "Two", "a " * 200)))
  other.write_text(json.dumps({"prompt": "a " * 200}) + "\n")
  for held_out in ({"held_out": 1}, {"held_out_path": str(other)}):
    with pytest.raises(
      ValueError, match=r"held-out examples .*: expected some of the 1 within max_tokens"
    ):
      load_all(path, max_tokens=30, **held_out)

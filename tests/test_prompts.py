"""Prompts: their order belongs to the seed and the step, and every bad line is named."""

import json

import numpy as np
import pytest
from ml_collections import ConfigDict

from nash_jax.data import prompts, rlhflow
from nash_jax.data.tokenizer import BUNDLED, Tokenizer

TOKENIZER = Tokenizer(BUNDLED, "plain")
WORDS = ["cat", "dog", "sun", "tree", "ball", "bird", "boat"]


def configure(
  path="", task="json_lines", max_tokens=16, overflow="drop", held_out=3, held_out_path=""
):
  return ConfigDict(locals())


def texts_of(part):
  return [TOKENIZER.decode(row) for row in part.all().tokens]


def write(path, records):
  path.write_text("\n".join(map(json.dumps, records)) + "\n")
  return str(path)


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
  texts, _, _ = loaded
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


def test_rlhflow_collection_from_parquet_to_prompts(tmp_path, data_dir):
  pyarrow = pytest.importorskip("pyarrow")
  from pyarrow import parquet

  ask = {"role": "user", "content": "How tall is it?"}
  answer = {"role": "assistant", "content": "Very."}
  rows = [[ask], [ask, answer, ask], [ask, answer], [answer, ask]]
  table = pyarrow.Table.from_pylist(
    [
      {"dataset": "d", "context": "", "context_messages": r, "id": str(i)}
      for i, r in enumerate(rows)
    ]
  )
  (tmp_path / "in").mkdir()
  parquet.write_table(table, tmp_path / "in" / "train-00000.parquet")
  (tmp_path / "in" / "more.json").write_text(json.dumps([{"prompt": "Why?"}, {"prompt": [ask]}]))
  (tmp_path / "in" / "README.md").write_text("not rows")
  output = str(tmp_path / "out.jsonl")
  counts = rlhflow.convert(str(tmp_path / "in"), output)
  assert counts == {"written": 4, "skipped": 2}
  gemma = Tokenizer(str(data_dir / "gemma_tokenizer" / "tokenizer.model"), "gemma")
  train, _ = prompts.load_prompts(configure(output, "rlhflow", 64, held_out=0), gemma, seed=0)
  batch = train.all()
  ids = [list(row[mask]) for row, mask in zip(batch.tokens, batch.mask, strict=True)]
  assert (ids[0], ids[3]) == (gemma.prompt("Why?"), gemma.prompt([ask, answer, ask]))

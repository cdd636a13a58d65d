"""The job collect: preferences that a judge has given to a policy's responses."""

import errno
import json
import logging
import pathlib
import types

import numpy as np
import pytest
from jax import numpy as jnp
from preference_files import TOKENIZER, configure

import nash_jax
from nash_jax import sampler
from nash_jax.data import preferences
from nash_jax.jobs import collect
from nash_jax.types import Responses, Verdict


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


@pytest.mark.slow
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
  assert "16 of 24 pairs have no verdict and are left out" in messages
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

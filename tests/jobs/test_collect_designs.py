"""A collection with a budget: a design chooses which pairs are judged."""

import json
import pathlib
import types

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from judge_server import says
from preference_files import TOKENIZER

import nash_jax
from nash_jax.config import fields
from nash_jax.data import votes
from nash_jax.design import rounds
from nash_jax.jobs import collect
from nash_jax.types import Responses

PROMPTS, SAMPLES, LENGTH = 8, 4, 5
IDS = [*map(TOKENIZER.id_of, (".", "!", '"')), *range(300, 310)]
PAIRS = PROMPTS * SAMPLES * (SAMPLES - 1) // 2


def test_a_config_may_name_the_designs_that_there_are():
  assert fields.DESIGNS == rounds.DESIGNS


@pytest.fixture
def config(monkeypatch):
  """A collection of random responses, which takes no model; features of a tiny Gemma."""

  def sample(params, prompts, key):
    shape = (*prompts.index.shape, SAMPLES, LENGTH)
    # What annotators look for is among the tokens, so that they seldom agree on a tie.
    tokens = jnp.asarray(IDS)[jax.random.randint(key, shape, 0, len(IDS))]
    zeros = jnp.zeros(shape)
    return Responses(tokens, zeros == 0, zeros, zeros, zeros[..., 0] == 0)

  drawn = types.SimpleNamespace(make_sampler=lambda samples: sample)
  monkeypatch.setattr(collect, "make_policy", lambda *args: drawn)
  monkeypatch.setattr(collect, "load_weights", lambda *args: {})
  c = nash_jax.config.collect()
  c.prompts.update({"held_out": 300, "batch_size": 4})
  c.sampling.update({"max_tokens": LENGTH, "samples": SAMPLES})
  c.features.model.update({"preset": "tiny", "changes": {"num_embed": 1024}, "weights": ""})
  c.steps = PROMPTS // 4
  return c


def collected(config, folder, **changes):
  config.update_from_flattened_dict(changes)
  return [json.loads(line) for line in pathlib.Path(collect.run(config, folder)).open()]


def chosen(folder):
  return json.loads((folder / "chosen.json").read_text())


def test_every_design_s_pairs_are_pairs_of_the_whole_collection_with_their_votes(config, tmp_path):
  whole = collected(config, tmp_path / "whole")
  assert len(whole) == PAIRS
  records = {}
  for name in rounds.DESIGNS:
    found = collected(config, tmp_path / name, design=name, budget=20)
    assert len(found) == 20
    assert all(pair in whole for pair in found)
    records[name] = found
    saved = chosen(tmp_path / name)
    assert saved["p_win"] == pytest.approx([pair["p_a"] for pair in found])
    assert name == "odpo" or len({*saved["pairs"]}) == 20
  assert records["active"][:16] == records["greedy"][:16]
  assert records["active"] != records["greedy"]
  assert records["uniform"] != records["greedy"]


def test_odpo_buys_several_labels_of_a_pair_and_sampled_ones_are_of_one_annotator_each(
  config, tmp_path
):
  soft = collected(config, tmp_path / "soft", design="odpo", budget=4 * PAIRS)
  found = collected(config, tmp_path / "sampled", design="odpo", budget=4 * PAIRS, labels="sampled")
  pairs = chosen(tmp_path / "sampled")["pairs"]
  assert pairs == chosen(tmp_path / "soft")["pairs"]
  assert max(np.bincount(pairs)) > 1
  p, drawn = (np.array([pair["p_a"] for pair in x]) for x in (soft, found))
  assert {*drawn} == {0.0, 1.0}
  sure = (p == 0) | (p == 1)
  np.testing.assert_array_equal(drawn[sure], p[sure])
  split = ~sure
  error = np.sqrt(np.sum(p[split] * (1 - p[split])))
  assert abs(drawn[split].sum() - p[split].sum()) < 4 * error


def vote(workdir, most=None):
  """Has somebody judge the pairs that wait, or so many of them: the longer text wins."""
  store = votes.Store(workdir / votes.FILE)
  me, count = store.sign_in("ann"), 0
  while count != most and (question := store.question(me)):
    left = (len(question.left), question.left) > (len(question.right), question.right)
    store.vote(me, question.pair, question.left_id, "left" if left else "right")
    count += 1
  store.close()
  return count


def test_people_judge_round_after_round_and_the_same_command_goes_on(config, tmp_path):
  people, folder = tmp_path / "people", tmp_path / "votes"
  changes = {"judge.name": "human", "judge.votes": str(people), "design": "active", "budget": 24}
  config.update_from_flattened_dict(changes)
  with pytest.raises(ValueError, match="judge human: 16 of 16 pairs have no vote yet"):
    collect.run(config, folder)
  first = chosen(folder)["pairs"]
  assert len(first) == vote(people, 1) + 15
  # A round that is judged in part waits, with the same pairs.
  assert collect.run(config, folder) == str(folder / "chosen.json")
  saved = chosen(folder)
  assert saved["pairs"] == first
  assert saved["p_win"].count(None) == 15
  assert vote(people) == 15
  assert collect.run(config, folder) == str(folder / "chosen.json")
  saved = chosen(folder)
  assert saved["pairs"][:16] == first
  assert saved["p_win"][16:] == [None] * 8
  assert None not in saved["p_win"][:16]
  assert not (folder / "pairs.jsonl").exists()
  assert vote(people) == 8
  found = collected(config, folder)
  assert len(found) == 24
  assert chosen(folder)["pairs"] == saved["pairs"]
  assert {pair["p_a"] for pair in found} == {0.0, 1.0}


def test_a_server_is_asked_about_the_chosen_pairs_alone_in_both_orders(config, tmp_path, serve):
  server, config.judge = serve(lambda text, times: (200, says("A" if len(text) % 2 else "B")))
  found = collected(config, tmp_path, design="uniform", budget=6)
  assert server.asked.total() == 2 * 6
  assert {*server.asked.values()} == {1}
  assert len(found) == 6


def test_a_workdir_with_another_design_s_pairs_is_refused(config, tmp_path, monkeypatch):
  (tmp_path / "chosen.json").write_text('{"pairs": [1], "p_win": [0.5], "config": {}}')
  monkeypatch.setattr(collect, "load_prompts", None)
  config.update_from_flattened_dict({"design": "greedy", "budget": 4})
  with pytest.raises(ValueError, match=r"workdir with chosen.json: expected the config that began"):
    collect.run(config, tmp_path)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      {"design": "odpo"},
      "design: expected uniform if budget = 0, got 'odpo'. Set budget, how many",
    ),
    ({"design": "best"}, "design: got 'best', expected one of"),
    (
      {"design": "greedy", "budget": PAIRS + 1},
      f"budget: expected at most {PAIRS}, the pairs of 8 prompts, got {PAIRS + 1}. Raise steps",
    ),
    ({"judge.name": "human"}, "judge.name: .*Use human in the arena, or in collect with a budget"),
    (
      {"design": "greedy", "budget": 4, "features.model.weights": "none.safetensors"},
      "features.model.weights: expected a file that exists, got 'none.safetensors'",
    ),
    (
      {"design": "greedy", "budget": 4, "features.name": "gpm"},
      "features.name: got 'gpm', expected one of",
    ),
  ],
)
def test_a_design_is_checked_before_weights_load(config, changes, message, tmp_path, monkeypatch):
  monkeypatch.setattr(collect, "load_prompts", None)
  config.update_from_flattened_dict(changes)
  with pytest.raises(ValueError, match=message):
    collect.run(config, tmp_path)


def test_what_no_design_reads_is_refused():
  config = nash_jax.config.collect()
  for field, message in (
    ("labels", "labels: expected no value, because budget = 0 does not read it"),
    ("features.name", "features.name: expected no value, because design = uniform"),
  ):
    with pytest.raises(ValueError, match=message):
      nash_jax.config.refuse_unread(config, "collect", [field])

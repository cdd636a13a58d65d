"""Learning from a file of pairs: the online run that saw them, order, caching, what is refused."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest
import tiny
from metric_files import lines

from nash_jax import policy, train
from nash_jax.config import resolve
from nash_jax.configs import online_offline, short_game
from nash_jax.data import corpus, preferences
from nash_jax.jobs import collect, compare, sweep
from nash_jax.run import metrics
from nash_jax.update import Batch

# A pair as the short game records it.
ROW = {"step": 0, "inputs": [2, 13], "a": [8, 8, 8], "b": [7, 9, 10], "p_a": 0.97}


def config(**changes):
  """The short game on a policy of one layer, for six steps of Online IPO or what is named."""
  c = short_game.get_config()
  c.model.weights = ""
  c.model.changes = {"num_embed": 16, "embed_dim": 8, "hidden_dim": 16, "num_layers": 1}
  c.prompts.batch_size, c.steps = 8, 6
  c.evaluation.every, c.checkpoint.every = 3, 6
  c.evaluation.exact = False
  c.algorithm.name = "online_ipo"
  c.update_from_flattened_dict({name.replace("__", "."): x for name, x in changes.items()})
  return c


def offline(path, **changes):
  file = {"pairs__path": str(path), "pairs__task": "tokens", "pairs__window": 1}
  return config(**{"algorithm__name": "gpo", **file, **changes})


def difference(a, b):
  """Returns the largest difference of two trees of parameters."""
  return max(jax.tree.leaves(jax.tree.map(lambda x, y: np.max(np.abs(x - y)), a, b)))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
  """The workdir and the end of a run of Online IPO that recorded its pairs."""
  workdir = tmp_path_factory.mktemp("online")
  return workdir, train.run(config(record_pairs=True), workdir, progress=False)


@pytest.mark.slow
def test_a_run_records_the_pairs_that_it_saw_in_order(recorded):
  rows, c = lines(recorded[0], "pairs.jsonl"), resolve(config())
  assert [row["step"] for row in rows] == [step for step in range(6) for _ in range(8)]
  assert all(len(row["a"]) == len(row["b"]) == 3 for row in rows)
  assert len({row["p_a"] for row in rows}) > 20
  prompts, _ = train.load_prompts(c.prompts, policy.tokenizer_and_model(c.model)[0], c.seed)
  for step in range(6):
    batch = prompts.batch(step, 8)
    drawn = [ids[mask].tolist() for ids, mask in zip(batch.tokens, batch.mask, strict=True)]
    assert [row["inputs"] for row in rows if row["step"] == step] == drawn


@pytest.mark.slow
def test_an_offline_run_on_recorded_pairs_ends_where_the_online_run_did(recorded, tmp_path):
  workdir, done = recorded
  again = train.run(offline(workdir / "pairs.jsonl"), tmp_path, progress=False)
  assert difference(again.state.params, done.state.params) <= 1e-6
  assert again.compilations == 1
  first, *_, last = lines(tmp_path)
  online = lines(workdir)[-1]
  assert first["eval/kl_to_reference"] < last["eval/kl_to_reference"]
  assert last["eval/kl_to_reference"] == pytest.approx(online["eval/kl_to_reference"], abs=1e-5)
  assert {"log_ratio_to_reference", "logp_chosen", "logp_rejected"} < {*first}
  assert not {"kl_to_reference", "logp_gap", "seconds/sample", "seconds/judge"} & {*first}


@pytest.mark.slow
def test_a_shuffled_run_ends_elsewhere_and_a_cached_reference_changes_nothing(recorded, tmp_path):
  path, ends = recorded[0] / "pairs.jsonl", []
  for cached in (False, True):
    changes = {"pairs__window": 0, "pairs__held_out": 5, "pairs__cache_reference": cached}
    c = offline(path, algorithm__f="logistic", judge__name="none", **changes)
    ends.append(train.run(c, tmp_path / str(cached), progress=False).state.params)
  assert difference(*ends) <= 1e-6
  assert difference(ends[0], recorded[1].state.params) > 1e-4
  rows = lines(tmp_path / "True")
  assert {name for row in rows for name in row} - {"step"} <= set(metrics.GLOSSARY)
  assert rows[0]["eval/pair_accuracy"] == 0.5, "the policy is the reference yet"
  assert rows[0]["delta"] == pytest.approx(0, abs=1e-5)
  assert rows[-1]["eval/delta"] != 0
  assert rows[-1]["eval/loss"] > 0
  assert rows[-1]["eval/win_rate_vs_reference"] is None, "there is no judge"
  assert rows[-1]["eval/kl_to_reference"] is not None


@pytest.mark.slow
def test_nothing_flows_into_the_reference_cached_or_not(recorded):
  """Nor into the file's labels; what is known of the reference is used in its place."""
  setup = train.set_up(resolve(offline(recorded[0] / "pairs.jsonl")))
  state, rule = setup.initial_state(), setup.programs
  batch = jax.tree.map(np.asarray, Batch.of_pairs(setup.pairs.batch(0, 8)))
  responses = (batch.prompts, batch.responses.tokens, batch.responses.mask)
  moved = jax.tree.map(lambda x: 10 * x, setup.reference)

  def loss(reference, p_win, known):
    verdict = dataclasses.replace(batch.verdict, p_win=p_win)
    part = dataclasses.replace(batch, verdict=verdict, known=known)
    return rule.measure(state, reference, part)["loss"].value()

  known = {"reference": rule.logprobs(moved, *responses)}
  for given in ({}, known):
    grads = jax.jit(jax.grad(loss, (0, 1, 2)))(setup.reference, batch.verdict.p_win, given)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(grads))
  value = float(loss(setup.reference, batch.verdict.p_win, known))
  assert value == pytest.approx(float(loss(moved, batch.verdict.p_win, {})), rel=1e-5)
  assert value != pytest.approx(float(loss(setup.reference, batch.verdict.p_win, {})), rel=1e-2)


def test_a_window_shuffles_its_own_pairs_alone():
  columns = {"inputs": [np.array([i]) for i in range(10)]}
  whole = corpus.Examples(columns, lambda c: [int(ids[0]) for ids in c["inputs"]], 0, {})
  order = lambda window, step=0: dataclasses.replace(whole, window=window).batch(step, 10)  # noqa: E731
  assert order(1) == order(1, step=3) == [*range(10)]
  three = order(3)
  assert three != [*range(10)] != sorted(three, reverse=True)
  assert [sorted(three[i : i + 3]) for i in (0, 3, 6, 9)] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]
  assert order(10) == order(0) == whole.batch(0, 10)


def test_pairs_are_recorded_once_each_with_equals_as_ties():
  def responses(*texts):
    tokens = np.array([[[ord(c) for c in text] for text in texts]])
    ones = np.ones(tokens.shape, bool)
    zeros = np.zeros(tokens.shape, np.float32)
    return preferences.Responses(tokens, ones, zeros, zeros, ones[..., 0])

  prompts = preferences.Prompts(np.array([[0, 5]]), np.array([[False, True]]), np.array([3]))
  p_win = np.array([[[0.5, 0.2, 0.9], [0.8, 0.5, np.nan], [0.1, np.nan, 0.5]]])
  found = list(preferences.token_pairs(prompts, responses("x", "y", "x"), None, p_win))
  assert [(r["inputs"], r["a"], r["b"]) for r in found] == [
    ([5], [120], [121]), ([5], [120], [120]), ([5], [121], [120])
  ]  # fmt: skip
  assert [r["p_a"] for r in found] == pytest.approx([0.2, 0.5, np.nan], nan_ok=True)
  opposed = preferences.token_pairs(prompts, responses("x"), responses("y", "z"), p_win[:, :1, 1:])
  assert [(r["a"], r["b"], r["p_a"]) for r in opposed] == [([120], [121], 0.2), ([120], [122], 0.9)]


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"pairs__path": ""}, "pairs.path: expected a file of pairs for gpo, got ''"),
    ({"pairs__path": "nowhere.jsonl"}, r"pairs.path: no data file 'nowhere.jsonl'"),
    ({"algorithm__f": "dpo"}, "algorithm.f: got 'dpo', expected one of .*squared"),
    ({"algorithm__samples": 4}, "algorithm.samples: expected 2 for a file of pairs, got 4"),
    (
      {"algorithm__reference_period": 3, "pairs__cache_reference": True},
      "pairs.cache_reference: expected False where algorithm.reference_period",
    ),
    (
      {"algorithm__name": "online_dpo", "judge__name": "none"},
      "judge.name: expected a judge, for online_dpo learns from verdicts, got 'none'",
    ),
  ],
)
def test_what_an_offline_run_cannot_use_is_refused(tmp_path, changes, message):
  (tmp_path / "pairs.jsonl").write_text(json.dumps(ROW) + "\n")
  with pytest.raises(ValueError, match=message):
    resolve(offline(tmp_path / "pairs.jsonl", **changes))


def test_responses_that_the_policy_may_not_give_are_refused(tmp_path):
  (tmp_path / "bad.jsonl").write_text(json.dumps({**ROW, "a": [12, 8, 8]}) + "\n")
  message = r"pairs.path: expected responses that the policy may give.*got 'token \[12\]'"
  c = resolve(offline(tmp_path / "bad.jsonl"))
  with pytest.raises(ValueError, match=message):
    train.set_up(c)
  exact = offline(tmp_path / "bad.jsonl", evaluation__exact=True)
  with pytest.raises(ValueError, match=message):  # nor in one program of runs
    sweep.run({"run": exact}, tmp_path, "network", progress=False)


@pytest.mark.slow
def test_texts_written_by_others_are_learned_from_and_a_killed_run_goes_on(tmp_path):
  """The storyteller's tokenizer and texts; eight devices would compute the same."""
  rows = [
    {"prompt": f"{name} saw a {thing}.", "chosen": " It was big.", "rejected": " It was red."}
    for name in ("Lily", "Tom", "Ben", "Sue") for thing in ("dog", "kite", "cat", "box")
  ]  # fmt: skip
  (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
  file = {"algorithm.name": "gpo", "pairs.path": str(tmp_path / "texts.jsonl")}
  c = tiny.train({**file, "pairs.held_out": 3, "prompts.duplicates": "drop", "judge.name": "none"})
  whole = train.run(c, tmp_path / "whole", progress=False)
  less = c.copy_and_resolve_references()
  less.steps = 3
  train.run(less, tmp_path / "parts", progress=False)
  rest = train.run(c, tmp_path / "parts", progress=False)
  assert difference(rest.state.params, whole.state.params) == 0
  rows = lines(tmp_path / "whole")
  assert rows[-2]["delta"] > rows[0]["delta"]
  texts = (tmp_path / "texts.jsonl").read_text()
  (tmp_path / "texts.jsonl").write_text(texts.replace("red", "blue"))
  with pytest.raises(ValueError, match=r"pairs.path"):
    train.run(c, tmp_path / "parts", progress=False)


def last(workdir):
  row = lines(pathlib.Path(workdir))[-1]
  return [row[f"exact/{name}"] for name in ("suboptimality", "kl_to_reference")]


@pytest.mark.slow
def test_the_study_runs_by_its_commands_and_order_is_all_that_a_replay_needs(tmp_path, monkeypatch):
  """Of runs in one program too, whose networks and tables read the pairs of a file."""
  monkeypatch.chdir(tmp_path)
  place = pathlib.Path(online_offline.FOLDER)
  train.run(online_offline.get_config("online,smoke"), place / "online", progress=False)
  for kind in ("reference", "final"):
    collect.run(online_offline.get_config(f"{kind},smoke"), place / kind)
  runs = compare.run(online_offline.get_config("order,smoke"), place / "order", progress=False)
  ends = {name: last(run["seeds"][0]["folder"]) for name, run in runs["network"].items()}
  np.testing.assert_allclose(ends["online's pairs, in order"], ends["online"], rtol=1e-4)
  np.testing.assert_allclose(last(place / "online"), ends["online"], rtol=2e-4)
  assert abs(ends["pairs of reference"][0] / ends["online"][0] - 1) > 1e-3
  runs = compare.run(online_offline.get_config("tables,smoke"), place / "tables", progress=False)
  assert len(runs["tabular"]) == 11
  assert (place / "tables" / "over_kl_tabular.png").is_file()
  c = online_offline.get_config("tables,smoke")
  c.base.record_pairs = True
  with pytest.raises(ValueError, match=r"record_pairs: expected False where"):
    compare.run(c, place / "recorded", progress=False)


def test_pairs_on_prompts_that_the_game_has_not_are_refused():
  held_out = corpus.Examples({"inputs": [[2, 11], [2, 12]], "index": [0, 1]}, list, 0, {})
  pairs = corpus.Examples({"inputs": [[2, 12], [2, 11], [2, 12]], "index": [0, 1, 2]}, list, 0, {})
  assert sweep._in_contexts(pairs, held_out).columns["index"] == [1, 0, 1]
  other = dataclasses.replace(pairs, columns={**pairs.columns, "inputs": [[2, 13]] * 3})
  with pytest.raises(ValueError, match=r"pairs.path: expected prompts of the game, got \[\[2, 13"):
    sweep._in_contexts(other, held_out)

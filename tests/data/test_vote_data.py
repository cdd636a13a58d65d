"""Pairs from files, votes as data for fit, what votes say, and people as a judge of the arena."""

import collections
import itertools
import json

import numpy as np
import pytest
from voting import pairs

from nash_jax import config as configs
from nash_jax.data import forms
from nash_jax.data import pairs as sources
from nash_jax.data.corpus import read_records
from nash_jax.data.preferences import TASKS
from nash_jax.data.tokenizer import BUNDLED, Tokenizer
from nash_jax.data.votes import FILE, Answer, Pair, Store, Vote
from nash_jax.jobs import vote, vote_statistics
from nash_jax.judges import human
from nash_jax.types import Prompts, Responses


@pytest.fixture(scope="module")
def tokenizer():
  return Tokenizer(BUNDLED, "plain")


@pytest.fixture
def read(tmp_path, tokenizer):
  """Returns the pairs of a file with these records, or of a file by this name with this object."""

  def read(*records, name="records.jsonl"):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text("\n".join(map(json.dumps, records)))
    return sources.read(str(path if name == "records.jsonl" else tmp_path), tokenizer)

  return read


def test_comparisons_of_any_form_are_pairs_with_the_names_of_policies(read):
  ours = {
    "prompt": "p",
    "response_a": "x",
    "response_b": "y",
    "votes_a": 1,
    "votes_b": 0,
    "ties": 0,
  }
  found = read(ours, {"prompt": "q", "chosen": "x", "rejected": "y"})
  assert found == [Pair(q, Answer("x"), Answer("y")) for q in "pq"]
  unjudged = {"prompt": "p", "response_a": "x", "response_b": "y", "model_a": "m", "model_b": "n"}
  assert read(unjudged) == [Pair("p", Answer("x", "m"), Answer("y", "n"))]


def test_responses_of_different_policies_to_one_prompt_are_pairs(read):
  rows = [{"prompt": "p", "response": f"{m} says", "model": m} for m in ("m", "n", "o")]
  rows += [{"prompt": "p", "response": "m again", "model": "m"}]
  texts = [{pair.a.text, pair.b.text} for pair in read(*rows)]
  assert len(texts) == 5  # of six pairs one is of the same model
  assert {"m says", "m again"} not in texts
  unnamed = [{"prompt": "p", "response": x} for x in "abc"]
  assert len(read(*unnamed)) == 3
  benchmark = [{"instruction": "p", "output": x, "generator": x} for x in "ab"]
  assert read(*benchmark) == [Pair("p", Answer("a", "a"), Answer("b", "b"))]


def test_what_jobs_leave_is_found_in_their_folders(read, tokenizer):
  texts = [{"prompt": "p", "continuations": {"base": "x", "trained": "y"}}]
  there = [Pair("p", Answer("x", "base"), Answer("y", "trained"))]
  steps = [
    {"step": step, "prompt": "p", "response": f"at {step}", "reference": "before", "p_win": 0.5}
    for step in (0, 5)
  ]
  names = [{pair.a.policy, pair.b.policy} for pair in read(*steps, name="samples.jsonl")]
  assert len(names) == 3
  assert {"step 0", "step 5"} in names
  ids = {"inputs": [2, *tokenizer.encode("One day")], "a": tokenizer.response(" he ran.")}
  (pair,) = read({**ids, "b": tokenizer.encode(" she"), "p_a": 0.2}, name="pairs.jsonl")
  assert (pair.prompt, pair.a.text, pair.b.text) == ("One day", " he ran.", " she")
  assert (pair.ids, pair.a.ids) == (ids["inputs"], ids["a"])
  assert read({"texts": texts}, name="arena/seed_0/arena.json") == there
  assert read({"texts": texts}, name="arena/arena.json") == there
  assert read(*texts, name="arena/texts.jsonl") == there
  assert read({"texts": texts}, name="arena.json") == there


def test_a_prompt_in_gemmas_template_is_shown_without_its_markers():
  assert sources.asked("Once upon a time") == "Once upon a time"
  one = "<start_of_turn>user\nHi\nthere<end_of_turn>\n<start_of_turn>model\n"
  assert sources.asked(one) == "Hi\nthere"
  assert sources.asked(one.replace("<end_of_turn>", "")) == "Hi\nthere"  # as decode leaves it
  several = f"{one}Ho\n<start_of_turn>user\nBye\n<start_of_turn>model\n"
  said = [("user", "Hi\nthere"), ("assistant", "Ho"), ("user", "Bye")]
  assert sources.asked(several) == [{"role": role, "content": x} for role, x in said]


@pytest.mark.parametrize(
  ("records", "message"),
  [
    ([{"prompt": "p", "response": "x"}], "expected pairs of different responses, got 'none'"),
    ([{"prompt": "p", "response_a": "x"}], r"records.jsonl:1: no field 'response'"),
    ([{"inputs": [2, 9999], "a": [5], "b": [6]}], r"records.jsonl:1: field 'inputs' holds 9999"),
    ([{"prompt": "p", "response_a": "\0", "response_b": "y"}], r"records.jsonl:1: .*NUL"),
  ],
)
def test_what_is_no_pair_is_refused_with_its_place(read, records, message):
  with pytest.raises(ValueError, match=message):
    read(*records)


def test_no_source_is_refused(tokenizer):
  with pytest.raises(ValueError, match="no data file 'nowhere'"):
    sources.read("nowhere", tokenizer)
  with pytest.raises(ValueError, match="expected files or folders"):
    sources.read(" , ", tokenizer)


@pytest.fixture
def judged(tmp_path, tokenizer):
  """A store in which three annotators of two groups have judged all pairs, by one taste each."""
  store = Store(tmp_path / FILE, share=1)
  prompt, words = [2, *tokenizer.encode("One day")], (" he ran.", " she sat.", " it was.")
  ids = [tokenizer.response(word) for word in words]
  store.add([sources.of_tokens(tokenizer, prompt, a, b) for a, b in itertools.combinations(ids, 2)])
  orders = {"ann": words, "bob": words[1:] + words[:1], "cyd": words[2:] + words[:2]}
  for name, order in orders.items():
    me = store.sign_in(name, "odd" if name == "bob" else "even")
    while shown := store.question(me):
      left = order.index(shown.left) < order.index(shown.right)
      store.vote(me, shown.pair, shown.left_id, "left" if left else "right")
  yield store
  store.close()


def counts(path) -> dict[frozenset, dict[str, float]]:
  """Returns, for the two responses of each record, the votes by the text of the winner."""
  found = {}
  for line in path.read_text().splitlines():
    row = json.loads(line)
    votes = {
      row["response_a"]: row["votes_a"],
      row["response_b"]: row["votes_b"],
      "tie": row["ties"],
    }
    found[frozenset((row["response_a"], row["response_b"]))] = votes
  return found


def test_exported_votes_are_preferences_with_their_counts(judged, tmp_path, tokenizer):
  (path,) = vote.export(judged, str(tmp_path / "out" / "votes.jsonl"))
  there = counts(path)
  x, y, z = " he ran.", " she sat.", " it was."
  assert there == {
    frozenset((x, y)): {x: 2, y: 1, "tie": 0}, frozenset((y, z)): {y: 2, z: 1, "tie": 0},
    frozenset((x, z)): {x: 1, z: 2, "tie": 0},
  }  # fmt: skip
  by_task = {}
  for task in ("preferences", "tokens"):
    rows = read_records(str(path), TASKS[task][0], tokenizer, gather=forms.comparisons)
    by_task[task] = {
      (tokenizer.decode(x["a"]), tokenizer.decode(x["b"])): float(x["p_win"]) for x in rows
    }
    assert all(row["a"][-1] == tokenizer.stop_ids[-1] for row in rows)
  assert by_task["preferences"] == pytest.approx(by_task["tokens"])
  for (a, b), p in by_task["tokens"].items():
    assert p == pytest.approx(there[frozenset((a, b))][a] / 3)


def test_files_by_annotator_and_by_group_add_up_to_that_of_all(judged, tmp_path):
  (whole,) = vote.export(judged, str(tmp_path / "votes.jsonl"))
  for by, names in (("annotator", ["ann", "bob", "cyd"]), ("group", ["even", "odd"])):
    paths = vote.export(judged, str(tmp_path / f"{by}.jsonl"), by)
    assert [path.name for path in paths] == [f"{by}-{name}.jsonl" for name in names]
    total: dict[frozenset, collections.Counter] = collections.defaultdict(collections.Counter)
    for path in paths:
      for pair, votes in counts(path).items():
        total[pair].update(votes)
    assert total == counts(whole)


def test_the_pairs_of_a_prompt_stand_together(tmp_path):
  """So that the last lines can be held out."""
  store = Store(tmp_path / FILE, share=0)
  store.add(pairs(12))
  me = store.sign_in("ann")
  while shown := store.question(me):
    store.vote(me, shown.pair, shown.left_id, "left")
  (path,) = vote.export(store, str(tmp_path / "votes.jsonl"))
  store.close()
  prompts = [json.loads(line)["prompt"] for line in path.read_text().splitlines()]
  assert [prompt for prompt, _ in itertools.groupby(prompts)] == [f"prompt {i}" for i in range(12)]


def test_export_without_votes_or_a_name_is_refused(tmp_path, judged):
  with pytest.raises(ValueError, match=r"expected a \.jsonl file on this machine"):
    vote.export(judged, "votes.csv")
  store = Store(tmp_path / "none.sqlite3")
  with pytest.raises(ValueError, match="expected votes to export, got 'none'"):
    vote.export(store, str(tmp_path / "x.jsonl"))
  store.close()


def test_tastes_that_cycle_make_a_cycle_that_no_single_annotator_has(judged):
  found = vote_statistics.statistics(judged)
  assert found["cycles"]["majority"] == {"triples": 1, "cyclic": 1}
  assert found["cycles"]["single annotators"] == {"triples": 3, "cyclic": 0}
  # Of two of the three, on each pair, one agrees with the majority: a third of the twos agree.
  assert found["agreement"]["mean"] == pytest.approx(1 / 3)
  assert found["agreement"]["pairs"] == 3
  assert "Cyclic triples of responses, majority: 1 of 1." in vote_statistics.text(found)


def made(rng, prompts, people, p_right=None) -> list[Vote]:
  """Returns votes on one pair of each prompt: right with a probability, or by a coin."""
  votes = []
  for prompt in range(prompts):
    truth = rng.random() < 0.5
    for name in people:
      wins = (
        float(rng.random() < 0.5) if p_right is None else float((rng.random() < p_right) == truth)
      )
      votes.append(Vote(prompt, prompt, 2 * prompt, 2 * prompt + 1, name, "", wins, 0.5))
  return votes


def test_agreement_is_that_of_two_drawn_annotators():
  rng = np.random.default_rng(0)
  chance = vote_statistics.agreement(made(rng, 600, "abc"))
  assert chance["low"] < 0.5 < chance["high"]
  assert 0.42 < chance["low"] < chance["high"] < 0.58
  careful = vote_statistics.agreement(made(rng, 600, "abc", 0.9))
  assert careful["low"] < 0.9**2 + 0.1**2 < careful["high"]
  votes = made(rng, 5, "ab", 1)
  assert vote_statistics.agreement(votes)["mean"] == 1
  # With a tie, half right in one role, and not counted in the other.
  tied = [v._replace(wins=0.5) if v.annotator == "b" else v for v in votes]
  assert vote_statistics.agreement(tied)["mean"] == 0.5
  both = [v._replace(wins=0.5) for v in votes]
  assert np.isnan(vote_statistics.agreement(both)["mean"])
  assert np.isnan(vote_statistics.agreement(made(rng, 5, "a"))["mean"])


def ballots(prompts: int, wins: dict[tuple[str, str], float]):
  """Returns votes on all pairs of policies, and the names of these by response."""
  rng, votes, names = np.random.default_rng(1), [], {}
  policies = sorted({name for pair in wins for name in pair})
  for prompt in range(prompts):
    ids = {name: len(policies) * prompt + i for i, name in enumerate(policies)}
    names |= {number: [name] for name, number in ids.items()}
    for (one, two), p in wins.items():
      won = float(rng.random() < p)
      votes.append(Vote(len(votes), prompt, ids[one], ids[two], "a", "", won, 0.5))
  return votes, names


def test_a_ranking_is_as_sure_as_its_win_rates():
  ladder = {("x", "y"): 0.9, ("x", "z"): 0.9, ("y", "z"): 0.5}
  found = vote_statistics.ranking(*ballots(200, ladder))
  assert found["order"][0] == "x"
  assert (found["certain"], found["compared"]) == (2, 3)
  cell = found["win_rate"]["x"]["y"]
  assert cell["low"] < 0.9 < cell["high"]
  assert cell["mean"] + found["win_rate"]["y"]["x"]["mean"] == pytest.approx(1)
  assert vote_statistics.ranking(*ballots(5, ladder))["certain"] == 0
  circle = {("x", "y"): 0.9, ("y", "z"): 0.9, ("x", "z"): 0.1}
  assert vote_statistics.ranking(*ballots(200, circle))["cycles"] == {"triples": 1, "cyclic": 1}
  assert vote_statistics.ranking(*ballots(200, ladder))["cycles"]["cyclic"] == 0
  votes, _ = ballots(5, ladder)
  assert vote_statistics.ranking(votes, {})["order"] == []


def test_people_are_a_judge_whose_missing_verdicts_are_asked_for(tmp_path, tokenizer):
  """Three responses to two prompts, of which two have one text: nobody is asked about these."""
  words = [" he ran.", " he ran.", " she sat."]
  rows = [tokenizer.response(word) for word in words]
  length = max(map(len, rows))
  tokens = np.array([[ids + [0] * (length - len(ids)) for ids in rows]] * 2, np.int32)
  mask = np.array([[[i < len(ids) for i in range(length)] for ids in rows]] * 2)
  zeros = np.zeros(tokens.shape, np.float32)
  responses = Responses(tokens, mask, zeros, zeros, np.ones((2, 3), bool))
  asked = [[2, *tokenizer.encode(text)] for text in ("One day", "A day ")]
  width = max(map(len, asked))
  padded = np.array([[0] * (width - len(ids)) + ids for ids in asked], np.int32)
  prompts = Prompts(padded, padded > 0, np.arange(2, dtype=np.int32))
  c = configs.train().judge
  c.name, c.votes = "human", str(tmp_path / "vote")

  def verdict():
    judge = human.make(c, tokenizer)
    found = judge.fn(judge.params, prompts, responses, None).checked()
    judge.server.finish()
    return np.asarray(found.p_win), np.asarray(found.valid)

  p_win, valid = verdict()
  assert valid[:, 0, 1].all()
  assert (p_win[:, 0, 1] == 0.5).all()
  assert not valid[:, 0, 2].any()
  store = Store(tmp_path / "vote" / FILE)
  me = store.sign_in("ann")
  assert store.progress()["pairs"] == 2
  shown = store.question(me)
  side = "left" if shown.left == words[0] else "right"
  store.vote(me, shown.pair, shown.left_id, side)
  store.close()
  row = ["One day", "A day "].index(shown.prompt)
  p_win, valid = verdict()
  for i in (0, 1):
    assert (valid[row, i, 2], p_win[row, i, 2], p_win[row, 2, i]) == (True, 1, 0)
  assert not valid[1 - row, 0, 2]


def test_people_who_have_judged_nothing_are_asked_by_a_command(tmp_path, tokenizer):
  c = configs.train().judge
  c.name, c.votes = "human", str(tmp_path / "vo te")
  judge = human.make(c, tokenizer)
  pair = Pair("p", Answer("x"), Answer("y"))
  judge.server.ask([pair, pair])
  with pytest.raises(
    ValueError, match=r"2 of 2 pairs have no vote yet.*--workdir='.*vo te'`; then"
  ):
    judge.server.finish()


def test_people_judge_in_the_arena_alone():
  c = configs.arena()
  c.judges.judge.update(name="human", votes="runs/vote")
  with pytest.raises(ValueError, match="select_judge: expected a judge that answers at once"):
    configs.resolve(c)
  c.select_judge, c.judges.judge.votes = "population", ""
  with pytest.raises(
    ValueError, match=r"judges.judge.votes: expected a workdir of `nash-jax vote`"
  ):
    configs.resolve(c)
  c.judges.judge.votes = "runs/vote"
  assert configs.resolve(c).judges.judge.name == "human"
  c = configs.train()
  c.judge.update(name="human", votes="runs/vote")
  with pytest.raises(ValueError, match=r"judge.name: expected a judge that answers at once"):
    configs.resolve(c)

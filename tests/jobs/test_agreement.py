"""Judges beside people's comparisons."""

import json
import math

import numpy as np
import pytest

from nash_jax import config as configs
from nash_jax.jobs import agreement

WORDS = ("No!", "Go!", "They smiled.", "Tom and Ann went to the big house.")


def rows(count: int = 24) -> list[dict]:
  """Returns comparisons of four responses to each of some prompts; people are of two minds."""
  rng, found = np.random.default_rng(0), []
  for prompt in range(count // 6):
    for i in range(4):
      for j in range(i):
        a, b = (i, j) if rng.integers(2) else (j, i)
        votes = map(int, rng.multinomial(3, [0.5, 0.4, 0.1]))
        record = {"prompt": "One day" + " and night" * prompt}
        record |= {"response_a": WORDS[a], "response_b": WORDS[b]}
        found.append(record | dict(zip(("votes_a", "votes_b", "ties"), votes, strict=True)))
  return found


def settings(tmp_path, records, **judges):
  path = tmp_path / "pairs.jsonl"
  path.write_text("\n".join(map(json.dumps, records)))
  c = configs.agreement()
  c.data.update(path=str(path), batch_size=8, max_tokens=32, max_response_tokens=32)
  c.judges = judges or {"population": {**configs.train().judge.to_dict(), "name": "population"}}
  return c


@pytest.fixture(scope="module")
def result(tmp_path_factory):
  folder = tmp_path_factory.mktemp("agreement")
  return agreement.run(settings(folder, rows()), folder / "out"), folder


def test_the_sides_of_a_pair_do_not_matter(result, tmp_path):
  """Who is a and who is b changes no figure; nor does the order of the pairs."""
  there, _ = result
  names = {"response_a": "response_b", "votes_a": "votes_b"}
  names |= {b: a for a, b in names.items()}
  exchanged = [{names.get(name, name): x for name, x in row.items()} for row in rows()]
  here = agreement.run(settings(tmp_path, exchanged[::-1]), tmp_path / "out")
  for name, judge in there["judges"].items():
    other = here["judges"][name]
    assert other["cycles"] == judge["cycles"]
    assert other["agreement"] == pytest.approx(judge["agreement"], rel=1e-9)
    # A rule that says who wins, and not how surely, has no probabilities to rate.
    for figure in ("log_loss", "calibration_error") if name != agreement.LENGTH else ():
      assert other[figure] == pytest.approx(judge[figure], rel=1e-6)
    assert ("log_loss" in judge) == (name != agreement.LENGTH)


@pytest.mark.parametrize("size", [7, 1000])
def test_how_pairs_are_batched_changes_no_figure(result, tmp_path, size):
  """Neither a short batch at the end nor one that is larger than the data."""
  there, _ = result
  c = settings(tmp_path, rows())
  c.data.batch_size = size
  here = agreement.run(c, tmp_path / "out")["judges"]["population"]
  metrics = there["judges"]["population"]["metrics"]
  assert metrics
  assert here["metrics"] == pytest.approx(metrics)
  assert here["log_loss"] == pytest.approx(there["judges"]["population"]["log_loss"])


def test_a_result_is_tables_a_picture_and_is_not_written_over(result):
  there, folder = result
  assert there["pairs"] == 24
  assert {"agreement.json", "agreement.md", "agreement.png"} <= {
    path.name for path in (folder / "out").iterdir()
  }
  assert "| population " in (folder / "out" / "agreement.md").read_text()
  with pytest.raises(ValueError, match=r"without agreement.json.*Use another workdir"):
    agreement.run(settings(folder, rows()), folder / "out")


def test_a_judge_that_is_the_people_agrees_and_one_that_is_not_does_not():
  rng = np.random.default_rng(1)
  people = rng.choice([0, 0.25, 0.5, 0.75, 1], 200)
  prompts = [*range(200)]
  counted = int(np.sum(people != 0.5))
  same = agreement.agreement(people, people, prompts)
  assert (same["mean"], same["pairs"], same["high"]) == (1, counted, 1)
  assert agreement.agreement(1 - people, people, prompts)["mean"] == 0
  undecided = agreement.agreement(np.full(200, 0.5), people, prompts)
  assert undecided["mean"] == 0.5
  assert agreement.calibration_error(agreement.calibration(people, people)) == 0
  # Cross-entropy is least where P is the share of people, and then their entropy.
  entropy = -np.mean([p * math.log(p) if p else 0 for p in (*people, *(1 - people))]) * 2
  assert agreement.log_loss(people, people) == pytest.approx(entropy, abs=1e-5)
  assert agreement.log_loss(np.full(200, 0.5), people) == pytest.approx(math.log(2))


def test_pairs_of_one_prompt_say_no_more_than_the_prompt():
  """Ten copies of each pair leave mean and interval where they were."""
  rng = np.random.default_rng(2)
  p_win, people, prompts = rng.random(60), rng.integers(0, 2, 60), [*range(60)]
  once = agreement.agreement(p_win, people, prompts)
  often = agreement.agreement(np.tile(p_win, 10), np.tile(people, 10), prompts * 10)
  for field in ("mean", "low", "high", "prompts"):
    assert often[field] == pytest.approx(once[field])


def test_cycles_are_counted_by_triples():
  circle = {("x", 0, 1): 0.9, ("x", 1, 2): 0.6, ("x", 0, 2): 0.1}
  ranking = {("y", 0, 1): 0.9, ("y", 1, 2): 0.6, ("y", 0, 2): 0.8}
  assert agreement.cycles(circle) == {"triples": 1, "cyclic": 1}
  assert agreement.cycles(circle | ranking) == {"triples": 2, "cyclic": 1}
  assert agreement.cycles({**circle, ("x", 0, 2): 0.5})["triples"] == 0
  del circle["x", 0, 1]
  assert agreement.cycles(circle)["triples"] == 0
  # Of random preferences a quarter of the triples is cyclic.
  rng = np.random.default_rng(3)
  wins = {(p, i, j): rng.random() for p in range(400) for i in range(5) for j in range(i + 1, 5)}
  found = agreement.cycles(wins)
  assert found["triples"] == 4000
  assert abs(found["cyclic"] / 4000 - 0.25) < 0.03


def test_pairs_that_nobody_compared_are_judged_where_a_prompt_has_three_responses(tmp_path):
  """Two comparisons of three responses: the third pair is judged, so there is one triple."""
  sides = {"votes_a": 2, "votes_b": 1, "ties": 0}
  records = [
    {"prompt": "One day", "response_a": WORDS[0], "response_b": WORDS[2], **sides},
    {"prompt": "One day", "response_a": WORDS[2], "response_b": WORDS[3], **sides},
    {"prompt": "One night", "response_a": WORDS[0], "response_b": WORDS[3], **sides},
  ]
  found = agreement.run(settings(tmp_path, records), tmp_path / "out")
  assert (found["pairs"], found["prompts"]) == (3, 2)
  assert found["people"]["cycles"]["triples"] == 0
  assert found["judges"][agreement.LENGTH]["cycles"] == {"triples": 1, "cyclic": 0}

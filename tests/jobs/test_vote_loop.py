"""From responses to votes, a judge, a run, and votes again: with people whose tastes cycle."""

import concurrent.futures
import itertools
import json
import pathlib
import signal

import numpy as np
import pytest
from commands import command
from voting import Served

from nash_jax import config as configs
from nash_jax import fit, train
from nash_jax.configs import stories
from nash_jax.data.votes import FILE, Store
from nash_jax.jobs import agreement, arena

NAMES, ANIMALS = ("Tom", "Ann", "Sam", "Lily", "Ben"), ("dog", "cat", "bird", "frog", "duck")
PLACES = ("a tree", "the house", "the park", "a big box", "the sea")
# What each annotator likes best, second, and least.
TASTES = {
  "ann": ("talk", "cheer", "pace"),
  "bob": ("cheer", "pace", "talk"),
  "cyd": ("pace", "talk", "cheer"),
}


def style(text: str) -> str:
  """Returns what a person sees at once: speech, smiles, or short sentences."""
  return "talk" if '"' in text else "cheer" if "happy" in text else "pace"


def write_responses(path: pathlib.Path, prompts: int) -> None:
  """Writes responses of three policies, each of its own style, to some prompts."""
  rng, rows = np.random.default_rng(0), []
  asked = rng.permutation([*itertools.product(NAMES, ANIMALS, PLACES)])[:prompts]
  for name, animal, place in asked:  # the small tokenizer knows no digits
    other, prompt = rng.choice(NAMES), f"One day {name} saw a {animal} near {place}."
    texts = {
      "talk": f' "Look at the {animal}," {name} said. "It is big," said {other}.',
      "cheer": f" {name} was so happy and smiled and played with {other} and the {animal} all day.",
      "pace": f" {name} ran. The {animal} ran. {other} sat. It was late. They went home.",
    }
    rows += [{"prompt": prompt, "response": text, "policy": name} for name, text in texts.items()]
  path.write_text("\n".join(map(json.dumps, rows)))


def judge_all(served: Served, name: str) -> int:
  """Votes over HTTP by one taste until nothing is left; returns how often."""
  state, count = served.ask("next", annotator=name, group="scripted"), 0
  while shown := state["question"]:
    ranks = [TASTES[name].index(style(shown[side])) for side in ("left", "right")]
    choice = "left" if ranks[0] < ranks[1] else "right" if ranks[1] < ranks[0] else "tie"
    said = {"pair": shown["pair"], "left": shown["left_id"], "choice": choice}
    state, count = served.ask("vote", annotator=name, **said), count + 1
  return count


@pytest.mark.slow
def test_votes_of_tastes_that_cycle_make_a_judge_that_cycles_and_trains(tmp_path):
  responses, workdir, votes = tmp_path / "x.jsonl", tmp_path / "vote", tmp_path / "votes.jsonl"
  write_responses(responses, prompts=120)
  served = Served(workdir, f"--from={responses}", "--config.shared=1.0")
  with concurrent.futures.ThreadPoolExecutor() as people:
    counts = [*people.map(lambda name: judge_all(served, name), TASTES)]
  status, printed, errors = served.end(signal.SIGINT)
  assert (status, counts) == (0, [360] * 3), errors
  assert "Cyclic triples of responses, majority: 120 of 120" in printed
  assert "Cyclic triples of responses, single annotators: 0 of 360" in printed
  assert "Triples of policies that are clearly cyclic: 1 of 1." in printed

  done = command("vote", f"--workdir={workdir}", f"--export={votes}")
  assert done.returncode == 0, done.stderr
  c = configs.fit()
  c.loss, c.export = "judge", str(tmp_path / "judge.safetensors")
  c.model.weights = "assets:stories/policy.safetensors"
  c.data.update(task="preferences", path=str(votes), held_out=60, batch_size=16)
  c.data.update(max_tokens=32, max_response_tokens=56)
  c.steps, c.checkpoint.every, c.evaluation.every = 80, 80, 80
  c.optimizer.update(learning_rate=1e-3, warmup_steps=20)
  fit.run(c, tmp_path / "fit")

  c = configs.agreement()
  c.data.update(path=str(votes), held_out=60, batch_size=15, max_tokens=32, max_response_tokens=56)
  c.judges.judge.model.weights = str(tmp_path / "judge.safetensors")
  found = agreement.run(c, tmp_path / "agreement")
  assert found["people"]["cycles"] == {"triples": 20, "cyclic": 20}
  assert found["judges"]["judge"]["cycles"]["cyclic"] >= 18, found["judges"]["judge"]
  agrees = found["judges"]["judge"]["agreement"]
  assert agrees["mean"] > 0.9
  assert agrees["low"] > 0.5  # twenty prompts that all agree show .72

  c = stories.get_config()
  c.judge.model.weights = str(tmp_path / "judge.safetensors")
  c.steps, c.evaluation.every, c.checkpoint.every = 2, 1, 2
  train.run(c, tmp_path / "run")
  again = Served(tmp_path / "again", f"--from={tmp_path / 'run'}")
  assert {"left", "right"} <= {*again.ask("next", annotator="ann")["question"]}
  status, printed, errors = again.end(signal.SIGINT)
  assert status == 0, errors


@pytest.mark.slow
def test_an_arena_asks_people_and_has_their_cells_once_they_have_answered(tmp_path):
  c = configs.arena()
  c.prompts.update(held_out=12, batch_size=12)
  c.sampling.max_tokens, c.samples, c.resamples, c.texts = 24, 1, 10, 12
  human = configs.train().judge
  human.update(name="human", votes=str(tmp_path / "vote"))
  c.judges, c.select_judge = {"population": c.judges.population, "people": human}, "population"
  with pytest.raises(
    ValueError, match=r"judge human: (\d+) of \1 pairs have no vote yet. Let people judge"
  ):
    arena.run(c, tmp_path / "arena")
  store = Store(tmp_path / "vote" / FILE, share=0)
  me, prompts = store.sign_in("ann"), set()
  while (shown := store.question(me)) and len(prompts) < 11:  # one is left out
    prompts.add(shown.prompt)
    store.vote(me, shown.pair, shown.left_id, "left" if shown.left < shown.right else "right")
  assert len(store.all_votes()) == 11
  store.close()
  result = arena.run(c, tmp_path / "arena")
  tables = result["judges"]["people"]["win_rate"]
  cell = tables["base"]["best_of_4"]
  assert cell["n"] == 11
  assert 0 <= cell["low"] <= cell["mean"] <= cell["high"] <= 1
  assert cell["mean"] + tables["best_of_4"]["base"]["mean"] == pytest.approx(1)
  assert result["judges"]["people"]["metrics"]["valid"] == pytest.approx(11 / 12)
  # Who comes first in the order of letters has won, whoever wrote it.
  for text in result["texts"]:
    assert {*text["continuations"]} == {"base", "best_of_4"}
  won = [
    float(texts["base"] < texts["best_of_4"])
    for texts in (text["continuations"] for text in result["texts"])
    if texts["base"] != texts["best_of_4"]
  ]
  assert abs(sum(won) - 11 * cell["mean"]) <= 1  # but for the prompt that was left out

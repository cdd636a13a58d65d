"""An arena of files of answers, AlpacaEval's or Arena-Hard's."""

import json

import jax
import numpy as np
import pytest
from answer_files import (
  TASKS,
  TOKENIZER,
  answers_of,
  configure,
  questions,
  read_rows,
  text_of,
  write_questions,
)
from jax import numpy as jnp
from ml_collections import ConfigDict

import nash_jax
from nash_jax import report
from nash_jax.config import describe, refuse_unread, resolve
from nash_jax.configs import arena as arena_config
from nash_jax.data import answers, corpus
from nash_jax.jobs import arena, outputs
from nash_jax.policy import Policy
from nash_jax.run import checkpoint
from nash_jax.types import Responses


@pytest.fixture
def held(tmp_path, monkeypatch):
  """Holds arenas whose policies say canonical texts, without models; counts what is loaded."""
  said = [TOKENIZER.response(text_of(seed)) for seed in range(40)]
  unfinished = [TOKENIZER.encode(text_of(seed, 60))[:20] for seed in range(40)]
  texts = [TOKENIZER.decode(ids).strip() for ids in unfinished]
  pairs = zip(texts, unfinished, strict=True)
  said += [ids for text, ids in pairs if len(ids) == 20 and TOKENIZER.encode(text) == ids]
  tokens, mask = map(jnp.asarray, corpus.pad(said, 20, TOKENIZER.pad_id))
  stopped = jnp.array([ids[-1] in TOKENIZER.stop_ids for ids in said])
  assert 40 <= stopped.sum() < len(said)
  loads = []

  def make_sampler(*, samples):
    def sample(params, prompts, key):
      rows = jax.random.randint(key, (len(prompts.index), samples), 0, len(said))
      zeros = jnp.zeros((*rows.shape, 20))
      return Responses(tokens[rows], mask[rows], zeros, zeros, stopped[rows])

    return sample

  def logprobs(params, *, prompts, tokens, mask, **_):
    logp = jnp.where(mask, params * tokens, 0.0)
    return logp, logp

  def load(spec, model_config):
    loads.append(spec)
    return jnp.float32(0.1 * len(spec)), None

  monkeypatch.setattr(arena, "make_policy", lambda *_: Policy(logprobs, make_sampler))
  monkeypatch.setattr(arena, "load_weights_and_step", load)
  monkeypatch.setattr(report, "heat_map", lambda *_: None)

  def hold(task, policies, folder="x", **fields):
    config = nash_jax.config.arena()
    path = tmp_path / f"{task}.json"
    write_questions(path, task, questions(task))
    config.prompts = configure(path, task)
    config.judges, config.select_judge = {"judge": config.judges.population}, "judge"
    config.policies, config.base = policies, next(iter(policies))
    config.sampling.max_tokens, config.samples, config.resamples = 20, 1, 20
    config.update_from_flattened_dict(fields)
    return arena.run(config, tmp_path / folder)

  hold.loads = loads
  return hold


WEIGHTS = "assets:stories/policy.safetensors"


MINE = {"weights": WEIGHTS, "best_of": 1}


@pytest.mark.parametrize("task", TASKS)
def test_answers_that_were_written_and_read_have_the_same_cells(held, tmp_path, task):
  """Bit for bit: key, order and text come back, and judges read the same tokens."""
  first = held(task, {"a": MINE, "B/2": MINE})
  ending, key = answers.BENCHMARKS[task].file, answers.BENCHMARKS[task].key[0]
  a, b = sorted((tmp_path / "x" / "outputs").iterdir())
  assert (a.name, b.suffix) == (f"a{ending}", ending)
  rows, more = read_rows(a), read_rows(b)
  assert [row[key] for row in rows] == [record[key] for record in questions(task)]
  named = [{row[answers.BENCHMARKS[task].model] for row in file} for file in (rows, more)]
  assert named == [{"a"}, {"B/2"} if task == "alpaca_eval" else {b.stem}]
  second = held(task, {"a": MINE, "B/2": {"outputs": str(b)}}, "y")
  third = held(task, {"a": {"outputs": str(a)}, "B/2": {"outputs": str(b)}}, "z")
  for again in (second, third):
    assert again["judges"] == first["judges"]
    assert again["texts"] == first["texts"]
  assert first["judges"]["judge"]["win_rate"]["a"]["B/2"]["n"] == 60
  assert first["judges"]["judge"]["length_controlled"]["a"]["B/2"]["refused"] == ""
  assert first["policies"]["B/2"]["kl_to_reference"] is not None
  assert 0 < first["policies"]["B/2"]["truncated"] == second["policies"]["B/2"]["truncated"]
  statistics = second["policies"]["B/2"]
  assert (statistics["kl_to_reference"], statistics["weights"]) == (None, None)
  assert statistics["no_kl"] == "no log-probabilities"
  assert third["policies"]["a"]["no_kl"] == "no log-probabilities"
  page = (tmp_path / "y" / "arena.md").read_text()
  assert "— (no log-probabilities)" in page
  assert "LC (ours)" in page
  assert [p.name for p in (tmp_path / "y" / "outputs").iterdir()] == [f"a{ending}"]
  assert len(held.loads) == 2, "one file for two policies, and none where all have answers"


def other(tmp_path, task="alpaca_eval", text=None):
  path = tmp_path / "gpt.json"
  path.write_text(answers_of(task, questions(task)) if text is None else text)
  return {"outputs": str(path)}


def test_answers_may_be_the_base_and_count_as_every_sample(held, tmp_path):
  policies = {"gpt": other(tmp_path), "mine": MINE}
  result = held("alpaca_eval", policies, samples=2, max_prompts=10)
  mine, gpt = result["policies"]["mine"], result["policies"]["gpt"]
  assert mine["no_kl"] == "base has no log-probabilities"
  assert mine["kl_to_reference"] is mine["log_ratio_to_reference"] is None
  assert gpt["distinct2"] is mine["distinct2_ratio"] is None
  assert mine["distinct2"] > 0
  assert mine["length_ratio"] == mine["length"] / gpt["length"]
  cell = result["judges"]["judge"]["win_rate"]["gpt"]["gpt"]
  assert (cell["mean"], cell["n"]) == (0.5, 10)
  page = (tmp_path / "x" / "arena.md").read_text()
  assert "— (base has no log-probabilities)" in page
  assert "No length-controlled win rates, LC (ours): fewer than 50 prompts." in page


def test_answers_are_cut_at_the_budget_and_that_is_told(held, tmp_path, caplog):
  rows = json.loads(answers_of("alpaca_eval", questions("alpaca_eval")))
  rows[3]["output"], rows[5]["output"] = "the cat saw a big dog " * 9, "“Hi”"
  policies = {"mine": MINE, "gpt": other(tmp_path, text=json.dumps(rows))}
  result = held("alpaca_eval", policies, max_prompts=12)
  assert result["policies"]["gpt"]["truncated"] == pytest.approx(1 / 12)
  assert "gpt.outputs: 1 of 12 answers are cut at sampling.max_tokens = 20" in caplog.text
  assert (
    "gpt.outputs: 1 of 12 answers have text that model.tokenizer spells differently" in caplog.text
  )
  assert "outputs: answers to 12 of the benchmark's 60 prompts" in caplog.text
  page = (tmp_path / "x" / "arena.md").read_text()
  mine = result["policies"]["mine"]["truncated"]
  shares = f"gpt .08, mine {report.number(mine, 2)}" if mine else "gpt .08"
  assert f"Share of responses cut at the token limit: {shares}." in page


def test_judges_that_read_text_get_the_answers_text(tmp_path):
  config = resolve(ConfigDict({
    **nash_jax.config.arena(), "policies": {"gpt": other(tmp_path), "b": MINE}, "base": "b",
    "prompts": configure(write_questions(tmp_path / "q", "alpaca_eval", questions("alpaca_eval")),
                         "alpaca_eval"),
  }), "arena")  # fmt: skip
  held_out = arena._load_held_out(config, TOKENIZER)
  found = outputs.read(config, held_out, 60, TOKENIZER)["gpt"]
  assert found.tokens.shape == (60, 2, config.sampling.max_tokens)
  for sample in range(2):
    texts = [
      TOKENIZER.decode(ids[mask])
      for ids, mask in zip(found.tokens[:, sample], found.mask[:, sample], strict=True)
    ]
    assert texts == [text_of(100 + i) for i in range(60)]
  assert found.stopped.all()


@pytest.mark.parametrize(
  ("policy", "fields", "message"),
  [
    ({"outputs": "none.json"}, {}, r"policies.gpt.outputs: expected a file, got 'none.json'"),
    ({"outputs": "here", "best_of": 2}, {}, r"policies.gpt.best_of: expected 1 with outputs"),
    ({"outputs": "here"}, {"prompts.task": "stories"},
     r"policies.gpt.outputs: expected prompts.task = alpaca_eval or arena_hard, .*= stories"),
    ({"outputs": "here"}, {"prompts.task": "arena_hard"}, r"no field 'uid'"),
    ({"outputs": 3}, {}, r"policies.gpt.outputs: expected text, got 3"),
  ],
)  # fmt: skip
def test_answers_that_cannot_be_judged_are_refused_before_weights_load(
  held, tmp_path, policy, fields, message
):
  if policy["outputs"] == "here":
    policy = {**policy, **other(tmp_path)}
  with pytest.raises(ValueError, match=message):
    held("alpaca_eval", {"mine": MINE, "gpt": policy}, **fields)
  assert not held.loads


@pytest.mark.parametrize(
  ("rows", "message"),
  [
    (slice(0, 3), r"policies.gpt.outputs: .*no answer to 57 of 60 prompts"),
    ([*range(60), 0], r"policies.gpt.outputs: .*row 61: a second answer to instruction"),
  ],
)
def test_files_that_do_not_fit_the_prompts_are_refused_before_weights_load(
  held, tmp_path, rows, message
):
  given = np.array(json.loads(answers_of("alpaca_eval", questions("alpaca_eval"))))[rows].tolist()
  with pytest.raises(ValueError, match=message):
    held("alpaca_eval", {"mine": MINE, "gpt": other(tmp_path, text=json.dumps(given))})
  assert not held.loads


def test_an_answer_with_a_template_is_named_by_its_line(held, tmp_path):
  rows = json.loads(answers_of("alpaca_eval", questions("alpaca_eval")))
  rows[7]["output"] = "Yes.<end_of_turn>"
  with pytest.raises(
    ValueError, match=r"gpt.outputs: .*gpt.json, row 8: .*already has the chat template"
  ):
    held("alpaca_eval", {"mine": MINE, "gpt": other(tmp_path, text=json.dumps(rows))})


def test_what_answers_make_useless_is_told(tmp_path):
  path = write_questions(tmp_path / "q", "alpaca_eval", questions("alpaca_eval"))
  config = nash_jax.config.arena()
  config.prompts = configure(path, "alpaca_eval")
  config.policies = {**config.policies, "gpt": other(tmp_path)}
  for field in ("policies.gpt.weights", "policies.gpt.best_of", "prompts.held_out"):
    with pytest.raises(ValueError, match=f"{field}: expected no value, because"):
      refuse_unread(config, "arena", [field])
  refuse_unread(config, "arena", ["policies.gpt.outputs", "policies.base.weights", "prompts.path"])
  config.prompts.held_out_path, config.prompts.path = str(path), "stories"
  with pytest.raises(
    ValueError, match=r"prompts.path: expected no value, because prompts.held_out_path"
  ):
    refuse_unread(config, "arena", ["prompts.path"])
  config.prompts.path = config.prompts.held_out_path
  assert len(arena._load_held_out(config, TOKENIZER)) == 60


def test_an_arena_from_before_outputs_is_the_same_arena():
  config = describe(resolve(nash_jax.config.arena()))
  older = json.loads(json.dumps(config))
  for policy in older["policies"].values():
    del policy["outputs"]
  assert checkpoint.differences(older, config) == {}
  config["policies"]["base"]["outputs"] = "x.json"
  assert [*checkpoint.differences(older, config)] == ["policies.base.outputs"]


def test_the_bundled_config_takes_weights_and_answers():
  policies = arena_config.get_config("mine=runs/x@target:50,gpt=a/gpt.json,o3=o3.jsonl").policies
  assert policies.mine.weights == "runs/x@target:50"
  assert (policies.gpt.outputs, policies.o3.outputs) == ("a/gpt.json", "o3.jsonl")

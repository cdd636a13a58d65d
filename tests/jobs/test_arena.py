"""The arena: a small one from end to end, and bad configs refused."""

import json
import math
import re

import jax
import numpy as np
import pytest
from arenas import SMALL, small, without_models
from jax import numpy as jnp
from ml_collections import ConfigDict
from page_files import page_data

import nash_jax
from nash_jax import judges, policy, report, weights
from nash_jax.config import resolve
from nash_jax.data.tokenizer import BUNDLED, Tokenizer
from nash_jax.jobs import arena
from nash_jax.models import gemma
from nash_jax.run import checkpoint
from nash_jax.types import Mean, Prompts, Responses, TrainState, Verdict


def test_one_response_each_is_enough_for_two_policies_but_none_meets_itself():
  def compare(params, prompts, a, b):
    seen = jnp.ones(len(prompts.index), bool)
    return jnp.full(len(seen), 0.75), seen, {}

  config, held_out, params, drawn = without_models(12, 4, samples=1)
  judge = {"judge": judges.Judge(jnp.zeros(()), judges.pairwise(compare))}
  judged = arena._sample_and_judge(config, held_out, 12, params, judge, drawn)
  result = arena.evaluate(config, Tokenizer(BUNDLED, "plain"), judged)
  cells = result["judges"]["judge"]["win_rate"]
  assert (cells["base"]["other"]["mean"], cells["other"]["base"]["mean"]) == (0.75, 0.25)
  assert cells["base"]["base"]["mean"] is cells["other"]["other"]["mean"] is None
  page = report.arena(result)
  assert "12 held-out prompts, 1 response a policy to each" in page
  assert "| base | — |" in re.sub(" +", " ", page)
  alone = nash_jax.config.arena()
  alone.samples, alone.policies = 1, {"base": alone.policies.base}
  with pytest.raises(ValueError, match="samples: expected at least 2 with a single policy"):
    resolve(alone)


@pytest.mark.parametrize(("count", "batch_size"), [(3, 2), (7, 3), (11, 4)])
def test_every_prompt_is_judged_once_and_counts_once_in_the_judges_metrics(count, batch_size):
  asked = []

  def compare(params, prompts, a, b):
    jax.debug.callback(lambda index: asked.extend(index.tolist()), prompts.index)
    seen = jnp.ones(len(prompts.index), bool)
    return jnp.full(len(seen), 0.5), seen, {"flip_rate": Mean.from_values(seen)}

  config, held_out, params, drawn = without_models(count, batch_size)
  judge = {"judge": judges.Judge(jnp.zeros(()), judges.pairwise(compare))}
  judged = arena._sample_and_judge(config, held_out, count, params, judge, drawn)
  jax.effects_barrier()
  pairs = math.comb(2 * config.samples, 2)
  metrics = judged.verdicts["judge"].metrics
  assert {name: mean.weight for name, mean in metrics.items()} == dict.fromkeys(
    ("flip_rate", "tie_mass"), count * pairs
  )
  assert sorted(asked) == sorted(list(range(count)) * pairs)
  assert judged.responses.tokens.shape[0] == len(judged.verdicts["judge"].p_win) == count


def test_an_arena_under_top_k_calls_its_mean_log_ratio_no_kl():
  def statistics(**changes):
    config, held_out, params, drawn = without_models(12, 12, **changes)
    judge = {"judge": judges.Judge(jnp.zeros(()), judges.pairwise(unread))}
    judged = arena._sample_and_judge(config, held_out, 12, params, judge, drawn)
    return config, judged, arena.response_statistics(config, judged)["other"]

  def unread(params, prompts, a, b):
    return jnp.full(len(prompts.index), jnp.nan), jnp.ones(len(prompts.index), bool), {}

  _, judged, full = statistics()
  expected = 0.1 * judged.responses.tokens[:, 2:].sum(-1).mean()
  np.testing.assert_allclose(full["kl_to_reference"], expected, rtol=1e-5)
  assert full["log_ratio_to_reference"] is None
  config, judged, narrow = statistics(**{"sampling.top_k": 5})
  assert narrow["kl_to_reference"] is None
  np.testing.assert_allclose(narrow["log_ratio_to_reference"], expected, rtol=1e-5)

  # And where no verdict could be read, no number stands for one.
  result = arena.evaluate(config, None, judged)
  tables = result["judges"]["judge"]
  assert tables["metrics"] == {"tie_mass": None, "valid": 0.0}
  assert tables["win_rate"]["other"]["base"]["mean"] is None
  assert tables["win_rate"]["other"]["base"]["n"] == 0
  page = report.arena(result)
  assert "(log-ratio)" in page
  assert "tie mass —; valid .000" in page
  assert f"{config.samples} responses a policy to each" in page


def test_an_error_of_kl_takes_more_than_a_few_prompts():
  def tie(params, prompts, a, b):
    shape = len(prompts.index)
    return jnp.full(shape, 0.5), jnp.ones(shape, bool), {}

  config, held_out, params, drawn = without_models(2, 2)
  judge = {"judge": judges.Judge(jnp.zeros(()), judges.pairwise(tie))}
  judged = arena._sample_and_judge(config, held_out, 2, params, judge, drawn)
  statistics = arena.response_statistics(config, judged)["other"]
  assert statistics["kl_to_reference"] > 0
  assert statistics["kl_sigma3"] is None


def test_an_arena_of_twins_another_policy_and_the_best_of_four(
  files, tmp_path, monkeypatch, capsys
):
  traced = []

  def compare(params, prompts, a, b):  # the greater first token wins: the best of 4 does so 4 in 5
    traced.append(1)
    a, b = a.tokens[:, 0], b.tokens[:, 0]
    return (1 + jnp.sign(a - b)) / 2.0, a >= 0, {}

  judge = judges.Judge(jnp.zeros(()), judges.pairwise(compare))
  monkeypatch.setattr(judges, "make", lambda config, tokenizer: judge)
  result = arena.run(small(files), tmp_path)

  assert len(traced) == 2, "one compilation to choose the best, one to compare, in five batches"
  cells = result["judges"]["judge"]["win_rate"]
  for name, cell in cells.items():
    np.testing.assert_allclose(cell[name]["mean"], 0.5, atol=1e-6)
    assert cell["base"]["n"] == 25, "every prompt counts once"
  for name, expected in (("twin", 0.5), ("best_of_4", 0.8)):
    cell = cells[name]["base"]
    assert abs(cell["mean"] - expected) < cell["sigma3"]
  assert cells["best_of_4"]["base"]["significant"]
  assert not cells["twin"]["base"]["significant"]

  policies = result["policies"]
  assert abs(policies["base"]["kl_to_reference"]) < 1e-6
  assert abs(policies["twin"]["kl_to_reference"]) < 1e-6
  assert policies["other"]["kl_to_reference"] > 0.1
  assert policies["best_of_4"]["kl_to_reference"] is None
  np.testing.assert_allclose(policies["best_of_4"]["best_of_kl_bound"], np.log(4) - 0.75)
  assert policies["base"]["length_ratio"] == policies["base"]["distinct2_ratio"] == 1

  assert json.loads((tmp_path / "arena.json").read_text()) == result
  assert len(result["texts"]) == 3
  assert result["texts"][1]["prompt"] == "Once there was a" + " big" * 6 + " cat"
  assert set(result["texts"][0]["continuations"]) == set(policies)
  page, printed = (tmp_path / "arena.md").read_text(), capsys.readouterr().out
  assert printed.strip() in page
  assert result["texts"][1]["prompt"] in page
  assert (tmp_path / "arena_judge.png").read_bytes().startswith(b"\x89PNG")
  rows = [json.loads(line) for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
  assert len(rows) == 25, "every prompt, whatever is shown"
  for row, shown in zip(rows, result["texts"], strict=False):
    assert {name: row[name] for name in ("prompt", "continuations")} == shown
  (texts,), tables = page_data(tmp_path)["texts"], page_data(tmp_path)["tables"]
  assert [item["prompt"] for item in texts["items"]] == [row["prompt"] for row in rows]
  base = [*cells].index("base")
  assert tables[0]["cells"][[*cells].index("twin")][base][0] == pytest.approx(
    cells["twin"]["base"]["mean"], rel=1e-4
  )

  found = arena.summary(result, trained="other", target="twin", best_of="best_of_4", base="base")
  assert set(found["win_rate"]) == {"trained", "target", "best_of_4"}
  shown = found["win_rate"]["best_of_4"]["judge"]
  assert shown == {what: cells["best_of_4"]["base"][what] for what in ("mean", "sigma3", "n")}
  assert found["kl_to_reference"] == policies["other"]["kl_to_reference"]
  assert found["length_ratio"] == policies["other"]["length_ratio"]


def test_the_texts_have_the_verdicts_of_the_first_responses_in_both_orders(tmp_path):
  """Two policies of two samples each; the judge says what is 10·i + j of the pair (i, j)."""
  places = np.add.outer(10 * np.arange(4), np.arange(4)) / 100
  p_win = np.stack([places, places + 0.5]).astype(np.float32)
  valid = np.ones((2, 4, 4), bool)
  valid[1, 0, 2] = False
  tokens = np.full((2, 4, 1), 5, np.int32)
  mask = np.ones((2, 4, 1), bool)
  zero = np.zeros((2, 4, 1), np.float32)
  responses = Responses(tokens, mask, zero, zero, np.ones((2, 4), bool))
  prompts = Prompts(tokens[:, 0], mask[:, 0], np.arange(2))
  verdicts = {"both": Verdict(p_win, valid, None, {}, p_win + 0.1), "one": Verdict(p_win, valid)}
  judged = arena.Judged(prompts, responses, verdicts, {})
  config = ConfigDict({"samples": 2, "policies": {"a": {}, "b": {}}})
  tokenizer = Tokenizer(BUNDLED, "plain")
  arena._write_texts(config, tokenizer, judged, tmp_path / "texts.jsonl")
  lines = (tmp_path / "texts.jsonl").read_text().splitlines()
  first, second = (json.loads(line)["verdicts"] for line in lines)
  assert first["both"] == {
    "p_win": [[None, 0.02], [0.2, None]], "p_win_first": [[None, 0.12], [0.3, None]],
  }  # fmt: skip
  assert second["one"] == {"p_win": [[None, None], [0.7, None]]}


def test_policies_come_from_files_and_from_any_part_and_step_of_a_run(files, tmp_path):
  model = gemma.preset("tiny", **SMALL)
  one = weights.load(str(files / "one.safetensors"), model)

  def scaled(by):
    return jax.tree.map(lambda x: x * by, one)

  run = checkpoint.Checkpoints(tmp_path / "run", keep=2, config={})
  for step in (1, 2):
    state = TrainState(jnp.int32(step), scaled(10.0 * step), scaled(10.0 * step + 1), {}, {})
    run.save(step, state, score=-step)
  run.close()
  where = str(tmp_path / "run")
  expected = {
    "": 20,
    "@params": 20,
    "@target": 21,
    "@params:1": 10,
    "@target:1": 11,
    "@params:best": 10,
  }
  for suffix, by in expected.items():
    got = policy.load_weights(where + suffix, model)["embedder"]["input_embedding"]
    np.testing.assert_allclose(got, by * one["embedder"]["input_embedding"], rtol=1e-6)
  wider = gemma.preset("tiny", **{**SMALL, "hidden_dim": 48})
  for spec in (where, str(files / "one.safetensors")):
    with pytest.raises(ValueError, match=r"mlp.gating_einsum.*48"):
      policy.load_weights(spec, wider)


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("policies.base.weights", "runs/absent", "policies.base.weights: expected a weights file"),
    (
      "policies.base.best_of",
      0,
      r"policies.base.best_of: expected a whole number in \[1, 1024\], got 0",
    ),
    ("policies.base.best_of", 2, "base: expected a policy with best_of = 1"),
    ("base", "bse", "base: got 'bse', expected one of.*did you mean 'base'"),
    ("select_judge", "x", "select_judge: got 'x', expected one of judge"),
    ("judges.judge.name", "gpt", "judges.judge.name: got 'gpt', expected one of bradley_terry"),
    ("samples", 0, r"^samples: expected a whole number in \[1, 1024\], got 0"),
    ("sampling.temperature", 0.0, "sampling.temperature: expected a number in .*, got 0.0"),
    ("prompts.held_out", 0, "held-out prompts: expected at least two"),
    ("prompts.batch_size", 0, "prompts.batch_size: expected a whole number in .*, got 0"),
  ],
)
def test_bad_configs_are_refused_with_what_is_wrong(files, tmp_path, field, value, message):
  config = small(files)
  config.update_from_flattened_dict({field: value})
  with pytest.raises(ValueError, match=message):
    arena.run(config, tmp_path)


def test_bad_parts_fields_and_workdirs_are_named(files, tmp_path):
  config = small(files)
  config.policies.base.weights += "@parms"
  with pytest.raises(ValueError, match=r"after @: got 'parms', expected one of params, target"):
    resolve(config)
  config = small(files)
  config.policies.base = {"weights": config.policies.base.weights, "best": 1}
  with pytest.raises(
    ValueError,
    match=r"policies.base.best is unknown; fields here: best_of, outputs, realign, weights; did",
  ):
    resolve(config)
  (tmp_path / "file").write_text("")
  with pytest.raises(ValueError, match=r"workdir .*/file/x: expected a folder"):
    arena.run(small(files), tmp_path / "file" / "x")

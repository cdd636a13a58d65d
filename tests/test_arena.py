"""The arena: its statistics as functions of arrays, and a small one from end to end."""

import json

import jax
import numpy as np
import pytest
from gemma import gm
from jax import numpy as jnp

import nash_jax
from nash_jax import judges, policy, weights
from nash_jax.config import resolve
from nash_jax.jobs import arena
from nash_jax.models import gemma
from nash_jax.run import checkpoint
from nash_jax.types import TrainState

SMALL = {"num_embed": 1024, "attention_types": (gm.nn.AttentionType.GLOBAL,)}


def verdicts(n, policies, samples, seed=0):
  """Antisymmetric verdicts [N P S P S] of random strength, the diagonal not valid."""
  k = policies * samples
  logits = np.random.default_rng(seed).normal(size=(n, k, k))
  p = 1 / (1 + np.exp(logits.swapaxes(1, 2) - logits))
  valid = np.broadcast_to(~np.eye(k, dtype=bool), p.shape)
  return (a.reshape(n, policies, samples, policies, samples) for a in (p, valid))


def test_self_cells_are_one_half_and_the_table_is_antisymmetric():
  rates = arena.win_rates(*verdicts(30, 3, 2))
  np.testing.assert_allclose(np.diag(rates["mean"]), 0.5, atol=1e-12)
  assert not np.diag(rates["significant"]).any()
  np.testing.assert_allclose(rates["mean"] + rates["mean"].T, 1, atol=1e-12)
  np.testing.assert_allclose(rates["sigma3"], rates["sigma3"].T, atol=1e-12)
  np.testing.assert_allclose(rates["low"] + rates["high"].T, 1, atol=1e-12)


def test_sigma_of_coin_flips_is_the_binomial_one():
  n, wins = 20, 15
  p = np.zeros((n, 1, 1, 1, 1))
  p[:wins] = 1
  rates = arena.win_rates(p, np.ones(p.shape, bool))
  assert rates["mean"].item() == wins / n
  expected = 3 * np.sqrt(wins * (n - wins) / n**2 / (n - 1))
  np.testing.assert_allclose(rates["sigma3"].item(), expected, rtol=1e-12)
  assert rates["significant"].item() == (wins / n - expected > 0.5)


def test_more_samples_of_the_same_prompt_are_no_more_prompts():
  p, valid = verdicts(12, 2, 2)
  once = arena.win_rates(p[:, :1, :, 1:], valid[:, :1, :, 1:])
  again = arena.win_rates(*(a[:, :1, :, 1:].repeat(5, axis=2) for a in (p, valid)))
  np.testing.assert_allclose(again["sigma3"], once["sigma3"], rtol=1e-12)
  np.testing.assert_allclose(again["mean"], once["mean"], rtol=1e-12)
  assert again["n"].item() == once["n"].item() == 12


def test_the_bootstrap_agrees_with_three_sigma():
  rates = arena.win_rates(*verdicts(400, 2, 2))
  width = (rates["high"] - rates["low"])[0, 1] / 2
  np.testing.assert_allclose(width, rates["sigma3"][0, 1], rtol=0.15)


def test_what_is_not_valid_does_not_count():
  p, valid = verdicts(10, 2, 2)
  valid = valid.copy()
  valid[:4, 0, :, 1] = valid[:4, 1, :, 0] = False  # four prompts without a pair of the two
  valid[5, 0, 0, 1, 0] = valid[5, 1, 0, 0, 0] = False
  rates = arena.win_rates(np.where(valid, p, np.nan), valid)
  assert rates["n"].tolist() == [[10, 6], [6, 10]]
  only = arena.win_rates(p[4:], valid[4:])
  np.testing.assert_allclose(rates["mean"][0, 1], only["mean"][0, 1])
  nothing = arena.win_rates(p, np.zeros_like(valid))
  assert np.isnan(nothing["mean"]).all()
  assert not nothing["significant"].any()
  assert np.isnan(nothing["low"]).all()


def test_one_prompt_is_never_significant():
  p, valid = verdicts(1, 2, 2)
  rates = arena.win_rates(p, valid)
  assert np.isnan(rates["sigma3"]).all()
  assert not rates["significant"].any()


def test_lengths_match_within_two_tokens_or_a_tenth():
  pairs = {(3, 5): True, (3, 6): False, (100, 110): True, (100, 112): False, (0, 2): True}
  lengths = np.array(list(pairs))[:, :, None]
  matched = arena.length_matched(lengths)[:, 0, 0, 1, 0]
  assert matched.tolist() == list(pairs.values())
  turned = arena.length_matched(lengths[:, ::-1])[:, 0, 0, 1, 0]
  np.testing.assert_array_equal(turned, matched)


def test_distinct_bigrams_by_hand_and_past_the_end():
  tokens = np.array([[1, 2, 1, 2, 9], [2, 1, 7, 7, 7]])
  lengths = np.array([4, 3])  # 12 21 12 | 21 17
  assert arena.distinct_bigrams(tokens, lengths) == 3 / 5
  assert arena.distinct_bigrams(np.pad(tokens, [(0, 0), (0, 3)]), lengths) == 3 / 5
  assert arena.distinct_bigrams(tokens, np.array([4, 1])) == 2 / 3
  assert np.isnan(arena.distinct_bigrams(tokens, np.array([1, 0])))


def test_the_best_response_wins_most_of_the_comparisons_that_count():
  strength = np.random.default_rng(0).normal(size=(5, 4))
  p = 1 / (1 + np.exp(strength[:, None, :] - strength[:, :, None]))
  valid = np.broadcast_to(~np.eye(4, dtype=bool), p.shape)
  choose = jax.jit(arena.choose_best)
  np.testing.assert_array_equal(choose(p, valid), strength.argmax(1))
  # Its diagonal, and what a judge could not read, may hold anything.
  best = strength.argmax(1)
  valid = valid.copy()
  valid[np.arange(5), best] = valid[np.arange(5), :, best] = False
  second = np.argsort(strength)[:, -2]
  np.testing.assert_array_equal(choose(np.where(valid, p, 1.0), valid), second)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  """Two random policies as weights files, and story openings."""
  folder = tmp_path_factory.mktemp("arena")
  model = gemma.preset("tiny", **SMALL)
  for seed, name in enumerate(("one", "two")):
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda x, r=rng: r.normal(0, 0.3, x.shape), gemma.shapes(model))
    weights.save(str(folder / f"{name}.safetensors"), params, model, jnp.float32, {})
  lines = [json.dumps({"prompt": f"Once there was a{' big' * i} cat"}) for i in range(30)]
  (folder / "prompts.jsonl").write_text("\n".join(lines))
  return folder


def small(files):
  config = nash_jax.config.arena()
  config.model.preset, config.model.changes = "tiny", SMALL
  config.prompts.path = str(files / "prompts.jsonl")
  config.prompts.held_out, config.prompts.batch_size = 25, 8
  config.prompts.max_tokens, config.sampling.max_tokens = 40, 6
  config.resamples = 200
  one, two = (str(files / f"{name}.safetensors") for name in ("one", "two"))
  config.policies = {
    "base": {"weights": one, "best_of": 1},
    "twin": {"weights": one, "best_of": 1},
    "other": {"weights": two, "best_of": 1},
    "best_of_4": {"weights": one, "best_of": 4},
  }
  config.judges = {"judge": {**config.judges.population}}
  return config


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

  assert len(traced) == 2, "one compilation to choose the best, one to compare, in four batches"
  cells = result["judges"]["judge"]["win_rate"]
  for name, cell in cells.items():
    np.testing.assert_allclose(cell[name]["mean"], 0.5, atol=1e-6)
    assert cell["base"]["n"] == 25, "places filled up in the last batch count for nothing"
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

  found = arena.summary(result, trained="other", target="twin", best_of="best_of_4", base="base")
  assert set(found["win_rate"]) == {"trained", "target", "best_of_4"}
  shown = found["win_rate"]["best_of_4"]["judge"]
  assert shown == {what: cells["best_of_4"]["base"][what] for what in ("mean", "sigma3", "n")}
  assert found["kl_to_reference"] == policies["other"]["kl_to_reference"]
  assert found["length_ratio"] == policies["other"]["length_ratio"]


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
    ("samples", 1, r"^samples: expected a whole number in \[2, 1024\], got 1"),
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
    match=r"policies.base.best is unknown; fields here: best_of, weights; did you mean 'best_of'",
  ):
    resolve(config)
  (tmp_path / "file").write_text("")
  with pytest.raises(ValueError, match=r"workdir .*/file/x: expected a folder"):
    arena.run(small(files), tmp_path / "file" / "x")

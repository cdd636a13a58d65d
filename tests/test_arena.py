"""The arena: its statistics as functions of arrays, and a small one from end to end."""

import json
import math
import re
import resource

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import scipy
from gemma import gm
from jax import numpy as jnp
from ml_collections import ConfigDict
from page_files import page_data

import nash_jax
from nash_jax import judges, policy, report, weights
from nash_jax.config import resolve
from nash_jax.data import corpus
from nash_jax.data.tokenizer import BUNDLED, Tokenizer
from nash_jax.jobs import arena
from nash_jax.jobs.rates import TAIL
from nash_jax.models import gemma
from nash_jax.run import checkpoint
from nash_jax.types import Mean, Prompts, Responses, TrainState, Verdict

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
  for ends in (("low", "high"), ("bootstrap_low", "bootstrap_high")):
    low, high = (rates[end][0, 1] for end in ends)
    np.testing.assert_allclose((high - low) / 2, rates["sigma3"][0, 1], rtol=0.15)


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


def rates_of(*values):
  """The cell of one pair of policies, given its prompts' means."""
  p = np.array(values, float)[:, None, None, None, None]
  return {name: table.item() for name, table in arena.win_rates(p, p >= 0).items()}


@pytest.mark.parametrize(
  "values",
  [
    [1] * 5, [0] * 5, [1] * 9, [1, 1, 1, 1, 0.999], [0.51] * 2, [0.51, 0.51001], [0.9] * 3,
    [1] * 9 + [0], [1] * 11 + [0], [0.5] * 2, [0.5] * 40, [0.5 + 6e-8, 0.5] * 20, [1, 0] * 20,
  ],
)  # fmt: skip
def test_what_so_few_or_such_prompts_cannot_show_is_not_significant(values):
  """Fewer than ten never are: 2 / 2^9 > .003; nor are ties, nor what rounding tells apart."""
  cell = rates_of(*values)
  assert not cell["significant"]
  assert cell["low"] <= 0.5 <= cell["high"]
  assert 0 <= cell["low"] <= cell["mean"] <= cell["high"] <= 1
  assert cell["high"] - cell["low"] > 0.1
  assert cell["sigma3"] > 0.1


def test_a_win_rate_over_no_prompt_is_refused():
  with pytest.raises(ValueError, match="p_win: expected verdicts on at least one prompt, got 0"):
    arena.win_rates(np.ones((0, 2, 1, 2, 1)), np.ones((0, 2, 1, 2, 1), bool))


@pytest.mark.parametrize("n", [10, 20, 96])
def test_unanimous_prompts_have_the_exact_interval(n):
  """A rate p is possible while n wins of n are: p^n is the tail (Clopper and Pearson)."""
  won, lost = rates_of(*[1] * n), rates_of(*[0] * n)
  np.testing.assert_allclose(won["low"] ** n, TAIL, rtol=1e-6)
  np.testing.assert_allclose([lost["low"], lost["high"]], [0, 1 - won["low"]], atol=1e-9)
  assert won["high"] == 1
  assert won["significant"]
  assert lost["significant"]
  np.testing.assert_allclose(won["sigma3"], 1 - won["low"])
  # A judge whose certainty is not quite 1 knows no more.
  nearly = rates_of(*np.linspace(0.9999, 1, n))
  np.testing.assert_allclose(nearly["low"], won["low"], atol=1e-3)
  assert nearly["sigma3"] > 2.9 / (n + 1)


@pytest.mark.parametrize("n", [2, 5, 9, 10, 12, 15, 30])
def test_the_interval_covers_the_rate_of_every_coin(n):
  """By enumeration: 99.7% of all draws of n coins, whatever their rate."""
  cells = [rates_of(*[1] * wins, *[0] * (n - wins)) for wins in range(n + 1)]
  low, high = (np.array([cell[end] for cell in cells]) for end in ("low", "high"))
  for rate in np.linspace(0.02, 0.98, 49):
    covered = (low <= rate) & (rate <= high)
    chance = scipy.stats.binom.pmf(np.arange(n + 1), n, rate)
    assert chance[covered].sum() > 0.997
  significant = np.array([cell["significant"] for cell in cells])
  assert scipy.stats.binom.pmf(np.arange(n + 1), n, 0.5)[significant].sum() < 0.003


def test_a_spread_that_was_seen_is_three_sigma_as_ever():
  values = np.random.default_rng(0).normal(0.758, 0.13, 96).clip(0, 1)
  cell = rates_of(*values)
  np.testing.assert_allclose(cell["sigma3"], 3 * values.std(ddof=1) / np.sqrt(96))
  np.testing.assert_allclose(cell["mean"] - cell["low"], cell["sigma3"], rtol=0.1)


def test_what_is_no_probability_does_not_count():
  p, valid = (a.copy() for a in verdicts(12, 2, 1))
  p[:3, 0, 0, 1, 0] = [np.nan, np.inf, 1.5]
  rates = arena.win_rates(p, valid)
  assert rates["n"][0, 1] == 9
  assert rates["mean"][0, 1] == pytest.approx(p[3:, 0, 0, 1, 0].mean())


def test_no_response_that_could_not_be_compared_is_the_best():
  """Not even against one that lost every comparison."""
  p_win = np.array([[[0.5, 0.5, 0.5], [0.5, 0.5, 0.0], [0.5, 1.0, 0.5]]], np.float32)
  valid = np.zeros((1, 3, 3), bool)
  valid[0, 1, 2] = True  # as where the other order could not be read
  assert jax.jit(arena.choose_best)(p_win, valid).item() == 1


@pytest.mark.parametrize(
  ("count", "most", "expected"), [(96, 8, 12), (3, 2, 3), (25, 8, 5), (97, 16, 7), (5, 8, 1)]
)
def test_batches_are_equal_where_that_takes_at_most_twice_as_many(count, most, expected):
  assert arena._num_batches(count, most) == expected


def without_models(count, batch_size, **changes):
  """An arena's config, its held-out part, and policies that draw without a model."""
  config = nash_jax.config.arena()
  config.policies = {"base": {"weights": "", "best_of": 1}, "other": {"weights": "", "best_of": 1}}
  config.judges, config.select_judge = {"judge": config.judges.population}, "judge"
  config.prompts.batch_size, config.resamples, config.texts = batch_size, 20, 0
  config.update_from_flattened_dict(changes)
  columns = {"inputs": [[n + 3] for n in range(count)], "index": list(range(count))}
  held_out = corpus.Examples(columns, lambda x: corpus.pad_prompts(x, 2, 0), 0, {})

  def make_sampler(*, samples):
    def sample(params, prompts, key):
      shape = (len(prompts.index), samples, 3)
      tokens = jax.random.randint(key, shape, 3, 60)
      zeros = jnp.zeros(shape)
      return Responses(tokens, jnp.ones(shape, bool), zeros, zeros, jnp.ones(shape[:2], bool))

    return sample

  def logprobs(params, *, prompts, tokens, mask):
    logp = jnp.where(mask, params * tokens, 0.0)
    return logp, logp

  params = {"base": jnp.float32(0.1), "other": jnp.float32(0.2)}
  return config, held_out, params, policy.Policy(logprobs, make_sampler)


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
  assert "| base | — |" in re.sub(" +", " ", report.arena(result))
  alone = nash_jax.config.arena()
  alone.samples, alone.policies = 1, {"base": alone.policies.base}
  with pytest.raises(ValueError, match="samples: expected at least 2 where there is one policy"):
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
    match=r"policies.base.best is unknown; fields here: best_of, outputs, weights; did you mean",
  ):
    resolve(config)
  (tmp_path / "file").write_text("")
  with pytest.raises(ValueError, match=r"workdir .*/file/x: expected a folder"):
    arena.run(small(files), tmp_path / "file" / "x")


@pytest.fixture
def made_up(monkeypatch):
  """Makes the arena's responses and verdicts up; `before_end` is called when they are there."""
  calls = {"sampled": 0, "before_end": lambda: None}

  def sample_and_judge(config, held_out, count, params_by_name, judges_by_name, policy, given):
    calls["sampled"] += 1
    rng, k = np.random.default_rng(0), len(params_by_name) * config.samples
    mask = np.ones((count, k, 6), bool)
    tokens = rng.integers(5, 200, mask.shape).astype(np.int32)
    logp = np.zeros(mask.shape, np.float32)
    responses = Responses(tokens, mask, logp, logp, mask[..., 0])
    p_win, valid = (a.reshape(count, k, k) for a in verdicts(count, k, 1))
    ratios = {name: np.zeros((count, config.samples)) for name in params_by_name}
    calls["before_end"]()
    prompts = held_out.all(np.arange(count))
    judged = {name: Verdict(p_win, valid) for name in judges_by_name}
    return arena.Judged(prompts, responses, judged, ratios)

  monkeypatch.setattr(arena, "_sample_and_judge", sample_and_judge)
  return calls


def test_a_judge_that_can_read_nothing_ends_an_arena_with_counts(
  files, made_up, tmp_path, monkeypatch, caplog
):
  """Whatever the judge: a table whose digits no policy writes, rewards that are no numbers."""
  sample_and_judge, checked = arena._sample_and_judge, []

  def unread(*args):
    judged = sample_and_judge(*args)
    verdict = judged.verdicts["judge"]
    checked.append(
      judged._replace(verdicts={"judge": verdict.replace(valid=verdict.valid & False)})
    )
    return checked[0]

  monkeypatch.setattr(arena, "_sample_and_judge", unread)
  expected = r"judge 'judge': expected .* some of 700 pairs, got 'none'.*first_token"
  with pytest.raises(ValueError, match=expected):
    arena.run(small(files), tmp_path)
  assert not (tmp_path / "arena.json").exists()
  verdict = checked[0].verdicts["judge"]
  verdict = verdict.replace(valid=np.broadcast_to((np.arange(25) > 4)[:, None, None], (25, 8, 8)))
  judged = checked[0]._replace(verdicts={"judge": verdict})
  arena._check_read(judged, {"judge": judges.Judge(None, None)})
  assert "judge 'judge': 140 of 700 pairs have no verdict" in caplog.text


def renamed(config, policies=("base", "other"), judges=("judge",)):
  """The same arena with two policies, and one judge under several names."""
  entries, judge = list(config.policies.values()), config.judges.judge
  config.policies = {
    name: {"weights": entry.weights, "best_of": 1}
    for name, entry in zip(policies, (entries[0], entries[2]), strict=True)
  }
  config.base, config.judges = policies[0], dict.fromkeys(judges, judge)
  config.select_judge, config.max_prompts, config.resamples = judges[0], 4, 20
  return config


def test_judges_and_policies_may_have_any_name(files, made_up, tmp_path, capsys):
  policies = ("$\\frac{$ _x", "a|b\n**c**\x1b[31m")
  judges = ("a/b", "x" * 300)
  workdir = tmp_path / "in" / "work"
  result = arena.run(renamed(small(files), policies, judges), workdir)
  assert set(result["policies"]) == {*policies}
  assert set(result["judges"]) == {*judges}
  assert json.loads((workdir / "arena.json").read_text()) == result
  pictures = list(workdir.glob("arena_*.png"))
  assert len({path.name.casefold() for path in pictures}) == len(judges)
  assert [path for path in tmp_path.rglob("*") if path.is_file() and path.parent != workdir] == []
  page, printed = (workdir / "arena.md").read_text(), capsys.readouterr().out
  for text in (page, printed):
    assert r"a\|b\\n\*\*c\*\*\\x1b" in text
    assert all(c.isprintable() for c in text.replace("\n", ""))


def test_an_arena_is_not_overwritten_by_one_of_another_config(files, made_up, tmp_path):
  config = renamed(small(files))
  arena.run(config, tmp_path)
  before = (tmp_path / "arena.json").read_bytes()
  config.samples = 3
  with pytest.raises(ValueError, match=r"arena.json: expected an arena of this config.*samples"):
    arena.run(config, tmp_path)
  assert (tmp_path / "arena.json").read_bytes() == before
  assert made_up["sampled"] == 1, "it is refused before anything is sampled"
  config.samples = 2
  arena.run(config, tmp_path)
  assert made_up["sampled"] == 2, "the same one may be held again"


def test_a_damaged_result_is_named(files, made_up, tmp_path):
  (tmp_path / "arena.json").write_text('{"prompts": 4, "sam')
  with pytest.raises(ValueError, match=r"arena.json: does not parse .*move it away"):
    arena.run(renamed(small(files)), tmp_path)
  assert not made_up["sampled"]


def test_a_full_disk_leaves_the_last_whole_result(files, made_up, tmp_path):
  config = renamed(small(files))
  arena.run(config, tmp_path)
  before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  made_up["before_end"] = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
  try:
    with pytest.raises(ValueError, match=r"arena.json: expected a file that can be written"):
      arena.run(config, tmp_path)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("workdir", ["gs://bucket/x", "file:///tmp/x"])
def test_an_arena_in_a_bucket_is_refused(files, made_up, workdir, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ValueError, match="workdir: expected a folder of this machine"):
    arena.run(renamed(small(files)), workdir)
  assert list(tmp_path.iterdir()) == [], "least of all as a folder of that name"


def run_that_goes_on(files, folder, keep):
  """Returns a run's checkpoints, and a function that saves its next step."""
  one = weights.load(str(files / "one.safetensors"), gemma.preset("tiny", **SMALL))
  run, steps = checkpoint.Checkpoints(folder, keep=keep, config={}), iter(range(1, 100))

  def go_on():
    step = next(steps)
    params = jax.tree.map(lambda x: x * step, one)
    run.save(step, TrainState(jnp.int32(step), params, params, {}, {}))
    run.wait()

  go_on()
  return run, go_on


def test_an_arena_records_the_steps_that_it_read(files, made_up, tmp_path):
  run, go_on = run_that_goes_on(files, tmp_path / "run", keep=2)
  go_on()
  config, where = renamed(small(files)), str(tmp_path / "run")
  one, two = config.policies.base, config.policies.other
  config.policies = {"base": one, "new": {**one, "weights": where}}
  config.policies.old = {**two, "weights": f"{where}@target:1"}
  # The run goes on while the arena is held: what was read is what counts.
  made_up["before_end"] = go_on
  result = arena.run(config, tmp_path / "arena")
  run.close()
  steps = {name: policy["step"] for name, policy in result["policies"].items()}
  assert steps == {"base": None, "new": 2, "old": 1}
  assert json.loads((tmp_path / "arena" / "arena.json").read_text()) == result
  page = (tmp_path / "arena" / "arena.md").read_text()
  assert "Steps of the runs that were read: new 2, old 1." in page


@pytest.mark.parametrize("saves", [1, 3])
def test_a_checkpoint_that_a_run_replaces_meanwhile_is_read_anew(
  files, tmp_path, monkeypatch, saves
):
  run, go_on = run_that_goes_on(files, tmp_path / "run", keep=1)
  left, restore = [saves], ocp.Checkpointer.restore

  def replaced(self, *args, **options):
    if left[0]:
      left[0] -= 1
      go_on()
    return restore(self, *args, **options)

  monkeypatch.setattr(ocp.Checkpointer, "restore", replaced)
  model = gemma.preset("tiny", **SMALL)
  params = policy.load_weights(str(tmp_path / "run"), model)
  run.close()
  one = weights.load(str(files / "one.safetensors"), model)["embedder"]["input_embedding"]
  newest = (saves + 1) * one
  np.testing.assert_allclose(params["embedder"]["input_embedding"], newest, rtol=1e-6)


def test_a_run_that_is_always_faster_is_named(files, tmp_path, monkeypatch):
  run, go_on = run_that_goes_on(files, tmp_path / "run", keep=1)
  restore = ocp.Checkpointer.restore
  monkeypatch.setattr(ocp.Checkpointer, "restore", lambda *a, **k: (go_on(), restore(*a, **k)))
  with pytest.raises(ValueError, match=r"run/checkpoints: a run replaced .* checkpoint.keep"):
    policy.load_weights(str(tmp_path / "run"), gemma.preset("tiny", **SMALL))
  run.close()

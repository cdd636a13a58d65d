"""Games of short responses: enumerated policies, exact metrics, and sweeps in one program."""

import functools
import importlib
import json

import jax
import numpy as np
import pytest
import scipy

from nash_jax import exact, iteration, judges, train, update
from nash_jax.config import resolve
from nash_jax.configs import short_compare
from nash_jax.configs.short_game import get_config
from nash_jax.data.prompts import load_prompts
from nash_jax.games import preference, zoo
from nash_jax.jobs import compare, short_game, sweep
from nash_jax.judges import table
from nash_jax.objectives import algorithms
from nash_jax.policy import tokenizer_and_model
from nash_jax.types import Prompts, Responses, Verdict
from nash_jax.validation import asset_path

TOKENS, LENGTH = (7, 8), 2


def config(strength="mild", **changes):
  """The short game on a policy of one layer, for a few steps."""
  c = get_config(strength)
  c.update_from_flattened_dict({name.replace("__", "."): v for name, v in changes.items()})
  algorithms.fill_defaults(c.algorithm)
  return c


def game(contexts=3):
  actions = len(TOKENS) ** LENGTH
  drawn = zoo.random_game(0, actions, strength=4.0, contexts=contexts, normalisation="rank")
  p_win = drawn.p_win.astype(np.float32)
  zeros = np.zeros((contexts, 1), np.int32)
  prompts = Prompts(zeros, zeros == 0, np.arange(contexts))
  return exact.Game(prompts, p_win, exact.enumerate_responses(TOKENS, LENGTH))


def log_policies(seed, contexts=3):
  logits = np.random.default_rng(seed).normal(size=(contexts, 4))
  return scipy.special.log_softmax(logits, axis=-1).astype(np.float32)


def test_the_bundled_games_are_those_of_their_config():
  """P = σ(A − Aᵀ) with A of rank 4, of seed 0."""
  for strength, c in (("mild", 4.0), ("strong", 8.0)):
    bundled = table.load(asset_path(f"assets:short_game/{strength}.npy"))
    np.testing.assert_array_equal(bundled, short_game.draw_table(c))
    assert bundled.shape == (4, 64, 64)


def sample_from(params, g, sample):
  return jax.device_get(jax.jit(sample)(params, g.prompts, jax.random.key(0)))


def test_tabular_policies_have_and_sample_their_distribution():
  g, logp = game(), log_policies(0)
  policy, params = exact.tabular_policy(logp, TOKENS, LENGTH)
  got = jax.jit(functools.partial(g.log_policy, policy.logprobs))(params)
  np.testing.assert_allclose(got, logp, atol=1e-6)
  y = sample_from(params, g, policy.make_sampler(samples=20_000))
  actions = (y.tokens == TOKENS[1]) @ np.array([2, 1])
  for x in range(3):
    shares = np.bincount(actions[x], minlength=4) / 20_000
    np.testing.assert_allclose(shares, np.exp(logp[x]), atol=0.015)
  expected = np.take_along_axis(logp, actions, axis=1)
  np.testing.assert_allclose(np.sum(y.logp, -1), expected, atol=1e-6)
  np.testing.assert_array_equal(y.logp, y.logp_sampling)


def test_tabular_mixtures_and_flatter_distributions_follow_their_definitions():
  g, logp, ref = game(), log_policies(0), log_policies(1)
  policy, params = exact.tabular_policy(logp, TOKENS, LENGTH)
  both = (params, {"logits": ref})
  y = sample_from(both, g, policy.make_sampler(samples=50, mixture=0.3))
  actions = (y.tokens == TOKENS[1]) @ np.array([2, 1])
  mixed = scipy.special.log_softmax(0.7 * logp + 0.3 * ref, axis=-1)
  expected = np.take_along_axis(mixed, actions, axis=1)
  np.testing.assert_allclose(np.sum(y.logp, -1), expected, atol=1e-5)
  flat = sample_from(params, g, policy.make_sampler(samples=50, behaviour_temperature=2.0))
  actions = (flat.tokens == TOKENS[1]) @ np.array([2, 1])
  flatter = scipy.special.log_softmax(logp / 2, axis=-1)
  for got, distribution in ((flat.logp, logp), (flat.logp_sampling, flatter)):
    expected = np.take_along_axis(distribution, actions, axis=1)
    np.testing.assert_allclose(np.sum(got, -1), expected, atol=1e-5)


DISTANCES = ("exact/suboptimality", "exact/kl_to_equilibrium", "exact/gap")


def test_the_exact_metrics_are_zero_at_the_equilibrium_and_positive_elsewhere():
  g, ref = game(), log_policies(1)
  equilibrium = g.log_equilibrium(ref, 0.1)
  exact = jax.jit(lambda logp: g.metrics(logp, ref, equilibrium, 0.1))
  at = lambda logp: {k: float(m.value()) for k, m in exact(logp).items()}  # noqa: E731
  regularised = {name: at(equilibrium)[name] for name in DISTANCES}
  assert 1e-3 < regularised.pop("exact/gap") < at(ref)["exact/gap"]
  assert max(regularised.values()) < 1e-6
  assert min(at(ref)[name] for name in DISTANCES) > 1e-3
  wins = np.einsum("xab,xb->xa", g.p_win, np.exp(ref))
  np.testing.assert_allclose(at(ref)["exact/gap"], np.mean(wins.max(-1) - 0.5), rtol=1e-5)
  assert at(ref)["exact/win_rate_vs_reference"] == pytest.approx(0.5, abs=1e-6)
  assert at(ref)["exact/kl_to_reference"] == 0
  assert at(equilibrium)["exact/win_rate_vs_reference"] > 0.5
  np.testing.assert_allclose(
    at(ref)["exact/suboptimality"],
    jax.jit(preference.suboptimality)(g.p_win, np.exp(ref), np.exp(ref), 0.1),
    rtol=1e-4,
  )


def test_a_game_that_cannot_be_enumerated_is_refused():
  c = config(sampling__max_tokens=2)
  _, held_out = load_prompts(c.prompts, tokenizer_and_model(c.model)[0], c.seed)
  with pytest.raises(ValueError, match=r"evaluation.exact: expected .* 64 actions .*'4 \*\* 2'"):
    exact.Game.from_config(c, held_out)


def exact_game(c):
  train_prompts, held_out = load_prompts(c.prompts, tokenizer_and_model(c.model)[0], c.seed)
  return exact.Game.from_config(c, held_out, train_prompts)


@pytest.mark.parametrize(
  "changes",
  [
    {"sampling__tokens": (10, 9, 8, 7)},
    {"judge__first_token": 8},
    {"sampling__tokens": (7, 8, 9, 11)},
  ],
)
def test_a_game_whose_judge_reads_other_responses_than_are_enumerated_is_refused(changes):
  with pytest.raises(ValueError, match=r"^sampling.tokens: expected .*first_token.*got \("):
    exact_game(config(**changes))


def test_a_prompt_that_is_evaluated_in_another_context_than_it_is_played_in_is_refused(tmp_path):
  """Six prompts and four contexts: the same file again begins in the context of the third."""
  names = ("six.jsonl", "eight.jsonl")
  for name, letters in zip(names, ("efghef", "efghefgh"), strict=True):
    lines = [json.dumps({"prompt": letter}) + "\n" for letter in letters]
    (tmp_path / name).write_text("".join(lines))
  six, eight = (
    {f"prompts__{p}": str(tmp_path / n) for p in ("path", "held_out_path")} for n in names
  )
  with pytest.raises(
    ValueError, match=r"^prompts.held_out_path: expected .*judge.table's 4 contexts.*multiple"
  ):
    exact_game(config(**six))
  assert exact_game(config(**eight)).p_win.shape == (8, 64, 64)


@pytest.mark.parametrize(
  "name", [name for name, method in algorithms.ALGORITHMS.items() if not method.offline]
)
def test_every_algorithm_has_its_players_and_their_shares_of_the_samples(name):
  a = config(algorithm__name=name, algorithm__samples=6).algorithm
  method, g = algorithms.get(name), game()
  policy, params = exact.tabular_policy(log_policies(0), TOKENS, LENGTH)
  rule = update.make_update(config(algorithm__name=name), policy.logprobs)
  sample = iteration.make_sample(a, rule.players, policy)
  state = jax.eval_shape(rule.init, params)
  y, opponents, _ = jax.eval_shape(sample, state, params, g.prompts, jax.random.key(0))
  assert y.tokens.shape == ((3, 3, 2) if method.opponent else (3, 6, 2))
  assert (opponents is not None) == bool(method.opponent)
  if method.opponent:
    assert opponents.tokens.shape == (3, 3, 2)


def test_responses_come_from_the_players_that_an_algorithm_names():
  """Each player has a single response, by which it is known."""
  g = game()

  def sure(action):
    logits = np.full((3, 4), -1e9, np.float32)
    logits[:, action] = 0
    return {"logits": logits}

  policy, _ = exact.tabular_policy(log_policies(0), TOKENS, LENGTH)
  for name, player_action, opponent_action in (
    ("best_response", 0, 1),
    ("nash_ema", 0, 2),
    ("mpo", 0, 2),
    ("self_play", 0, 0),
  ):
    c = config(algorithm__name=name, algorithm__reference_period=5)
    rule = update.make_update(c, policy.logprobs)
    state = rule.init(sure(0))
    copies = {key: sure(1) for key in state.copies}
    state = state.replace(target=sure(2), copies=copies)
    sample = iteration.make_sample(c.algorithm, rule.players, policy)
    y, opponents, queries = jax.device_get(
      jax.jit(sample)(state, sure(1), g.prompts, jax.random.key(0))
    )
    every = exact.enumerate_responses(TOKENS, LENGTH)
    np.testing.assert_array_equal(y.tokens[:, 0], np.tile(every[player_action], (3, 1)))
    np.testing.assert_array_equal(opponents.tokens[:, 0], np.tile(every[opponent_action], (3, 1)))
    assert int(queries) == 3 * 2 * LENGTH


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2])
def test_a_run_of_a_sweep_is_the_ordinary_run(rank, tmp_path):
  """The scanned program of EGPO (half steps restored, an opponent) makes train.run's numbers."""
  changes = {
    "algorithm__name": "egpo",
    "algorithm__samples": 4,
    "steps": 5,
    "evaluation__every": 5,
    "checkpoint__every": 5,
    "prompts__batch_size": 8,
    "model__changes": {"num_embed": 16, "num_layers": 1},
    "model__weights": "",
    "optimizer__name": "sgd",
    "optimizer__learning_rate": 0.1,
    "model__lora__rank": rank,
  }
  train.run(config(**changes), tmp_path / "ordinary", progress=False)
  runs = {"run": config(**changes), "other": config(**changes, seed=1)}
  sweep.run(runs, tmp_path, progress=False)

  def last(name):
    lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
    ends = [json.loads(lines[0]), json.loads(lines[-1])]
    return [[line[m] for m in ("exact/suboptimality", "exact/kl_to_equilibrium")] for line in ends]

  start, end = last("ordinary")
  assert abs(end[0] - start[0]) > 1e-5
  np.testing.assert_allclose(last("run"), (start, end), rtol=2e-4)
  assert last("other")[1] != last("run")[1]


@pytest.mark.slow
def test_a_comparison_takes_each_methods_best_rate_and_goes_on_where_it_stopped(tmp_path, capsys):
  c = short_compare.get_config("smoke")
  c.runs = ({"algorithm.name": "nash_mp"}, {"algorithm.name": "rlhf", "judge.name": "table_reward"})
  c.base.steps = c.base.evaluation.every = 4
  c.learning_rates = (1e6, 1.0)
  result = compare.run(c, tmp_path, progress=False)["tabular"]
  assert [r["learning_rate"] for r in result.values()] == [1.0, 1.0], "the other diverges"
  assert all(len(r["seeds"]) == 2 and len(r["tuning"]) == 2 for r in result.values())
  assert "| nash_mp" in capsys.readouterr().out
  assert (tmp_path / "curves_tabular.png").stat().st_size > 10_000
  assert (tmp_path / "over_kl_tabular.png").stat().st_size > 10_000
  record = tmp_path / "tabular" / "nash_mp" / "rate_1" / "seed_0" / "metrics.jsonl"
  before = record.stat().st_mtime_ns
  compare.run(c, tmp_path, progress=False)
  assert record.stat().st_mtime_ns == before
  c.base.algorithm.beta = 0.04
  with pytest.raises(ValueError, match="expected a run of this config, got 'one of another"):
    compare.run(c, tmp_path, progress=False)


@pytest.mark.slow
def test_a_comparison_shows_what_diverged_as_such(tmp_path, capsys):
  c = short_compare.get_config("smoke")
  c.runs = (
    {"algorithm.name": "nash_mp"},
    # Regression on samples of the reference, so that no gradient vanishes.
    {
      "label": "wild",
      "algorithm.name": "ipo_md",
      "algorithm.mixture": 1.0,
      "optimizer.learning_rate": 1e6,
      "optimizer.clip_norm": 0.0,
    },
  )
  c.base.steps = c.base.evaluation.every = 12
  c.learning_rates = ()
  result = compare.run(c, tmp_path, progress=False)["tabular"]
  assert [seed["exact/suboptimality"][-1] for seed in result["wild"]["seeds"]] == [None, None]
  rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
  assert rows[-1].startswith("| wild"), "the last of the table"
  assert "—" in rows[-1]


def test_sweeps_are_evaluated_at_whole_fractions_of_their_steps(tmp_path):
  with pytest.raises(ValueError, match=r"every: expected a divisor of steps = 5, got 2."):
    sweep.run({"run": config(steps=5, evaluation__every=2)}, tmp_path, progress=False)


@pytest.mark.parametrize("name", ["kappa", "beta", "eta"])
def test_ablations_name_their_values(name):
  c = resolve(importlib.import_module(f"nash_jax.configs.ablations.{name}").get_config("smoke"))
  labels = [compare.label(item) for item in c.runs]
  assert all(label.startswith(f"{name} = ") for label in labels)
  assert len(set(labels)) == len(labels) >= 5


def responses_of(actions):
  tokens = exact.enumerate_responses(TOKENS, LENGTH)[np.array(actions)]
  mask = np.ones(tokens.shape, bool)
  zeros = np.zeros(tokens.shape, np.float32)
  return Responses(tokens, mask, zeros, zeros, mask[..., 0])


def test_table_rewards_are_the_bradley_terry_fit():
  rewards = np.array([[0.0, 1.0, -1.0, 2.0], [0.5, 0.5, 0.0, -1.0]])
  p_win = 1 / (1 + np.exp(rewards[:, None, :] - rewards[:, :, None]))
  judge = table.reward_judge(p_win.astype(np.float32), TOKENS[0], 2)
  zeros = np.zeros((2, 1), np.int32)
  y = responses_of([[0, 1, 2, 3]] * 2)
  verdict = jax.jit(judge.fn)(judge.params, Prompts(zeros, zeros == 0, np.arange(2)), y, None)
  np.testing.assert_allclose(verdict.p_win, p_win, atol=1e-4)
  centred = rewards - rewards.mean(1, keepdims=True)
  np.testing.assert_allclose(verdict.rewards, centred, atol=1e-3)


def test_sampled_labels_are_zero_or_one_with_the_judges_probability():
  p = np.tile(np.array([[0.5, 0.8], [0.2, 0.5]], np.float32), (4000, 1, 1))
  fixed = lambda *_: Verdict(p, np.broadcast_to(~np.eye(2, dtype=bool), p.shape))  # noqa: E731

  @functools.partial(jax.jit, static_argnums=0)
  def labels(kind, key):
    return judges.labels(fixed, kind, None, None, None, None, key)

  own = np.asarray(labels("sampled", jax.random.key(0)).p_win)
  assert set(np.unique(own[:, [0, 1], [1, 0]])) == {0.0, 1.0}
  np.testing.assert_array_equal(own[:, 0, 1] + own[:, 1, 0], 1)
  assert abs(np.mean(own[:, 0, 1]) - 0.8) < 0.03
  soft = labels("soft", jax.random.key(0))
  np.testing.assert_array_equal(soft.p_win, p)


def test_a_reference_is_fitted_to_the_probabilities_of_its_game():
  g, target = game(), log_policies(3)
  policy, params = exact.tabular_policy(log_policies(0), TOKENS, LENGTH)
  params, kl = short_game.fit_reference(policy.logprobs, g, params, target, steps=2000)
  start = np.asarray(jax.jit(preference.kl)(target, log_policies(0))).mean()
  assert kl < 1e-3 * start
  fitted = jax.jit(functools.partial(g.log_policy, policy.logprobs))(params)
  np.testing.assert_allclose(np.exp(fitted), np.exp(target), atol=0.01)

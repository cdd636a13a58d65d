"""Judges without a network: the population of annotators, and tables of preferences."""

import math
from unittest import mock

import jax
import numpy as np
import pytest
from judge_examples import make_judge, prompts_of, responses_of, settings, verdict_of

from nash_jax import judges
from nash_jax.data import judge_template
from nash_jax.data.tokenizer import BUNDLED, Tokenizer
from nash_jax.judges import base, bradley_terry, gemma, population, table
from nash_jax.models import gemma as gemma_model
from nash_jax.types import Answers, Prompts, Responses, Verdict


@pytest.fixture(scope="module")
def tokenizer():
  return Tokenizer(BUNDLED, "plain")


STORIES = (
  # talks most, of middling length and pace, without cheer
  '"Stop!" said Tom to the big dog. "No!" said Ann to the dog. "Go!" said Tom to the dog.',
  # happiest, longest, in one breath
  '"Look" said Ann, and they played and laughed and smiled and hugged and went back to the house'
  " with the big tree and the little dog and the cat and Ann was happy.",
  # says nothing, a little cheer, shortest and busiest
  "No! Go! No! Go! No! Go! They smiled.",
)


def test_population_cycles_and_no_reward_explains_it(tokenizer):
  judge = make_judge("population")
  rows = [[tokenizer.response(text) for text in STORIES]]
  verdict = verdict_of(
    judge, prompts_of([tokenizer.prompt("One day")], 8), responses_of(rows, 64), None
  )
  p = np.asarray(verdict.p_win[0])
  cycle = (0, 1), (1, 2), (2, 0)
  for pair in cycle:
    np.testing.assert_allclose(p[pair], 2 / 3, rtol=1e-6)
  # Rewards make the log-odds around a circle sum to 0; here they sum to 3 log 2.
  np.testing.assert_allclose(
    sum(math.log(p[i, j] / p[j, i]) for i, j in cycle), 3 * math.log(2), rtol=1e-5
  )
  rewards = np.random.default_rng(0).normal(0, 3, (1000, 3)).astype(np.float32)
  pairs = (rewards.ravel(), np.roll(rewards, -1, axis=1).ravel())
  fits = jax.jit(judges.base.compare_rewards)(None, None, *pairs).p
  assert np.abs(np.reshape(fits, (1000, 3)) - 2 / 3).max(axis=1).min() >= 1 / 6 - 1e-6


def test_annotators_count_words_up_to_a_limit_and_prefer_finished_stories(tokenizer):
  judge = population.judge(
    tokenizer,
    {
      "dialogue": population.STORYTELLERS["dialogue"],
      "cheer": population.STORYTELLERS["cheer"],
      "closure": population.Annotator(finish=1e6, per_token=-1.0),
    },
  )
  texts = ['" " " " " " " "', " happy happy happy happy happy happy", " a happy end", " unhappy"]
  rows = [[tokenizer.response(t) for t in texts] + [tokenizer.encode(" a cut")]]
  y = responses_of(rows, 24)
  answers = Answers(y.tokens[0], y.mask[0], y.stopped[0])
  dialogue, cheer, closure = np.asarray(
    jax.jit(population.utilities)(judge.params, None, answers)
  ).T
  np.testing.assert_array_equal(dialogue, [6, 0, 0, 0, 0])
  np.testing.assert_array_equal(cheer, [0, 4, 1, 0, 0])
  lengths = np.array([len(r) for r in rows[0]])
  order = np.argsort(-closure, stable=True)
  assert order[-1] == 4  # however short, a cut story comes last
  assert (np.diff(lengths[order[:-1]]) >= 0).all()


def game(contexts=3, actions=4, seed=0):
  upper = np.random.default_rng(seed).uniform(size=(contexts, actions, actions))
  upper = np.triu(upper, 1)
  return upper + np.tril(1 - upper.swapaxes(1, 2), -1) + np.eye(actions)[None] / 2


def test_table_is_read_by_context_and_digits(tmp_path, tokenizer):
  p = game()
  np.save(tmp_path / "p.npy", p)
  config = settings("table", table=str(tmp_path / "p.npy"), first_token=10, table_tokens=2)
  judge = judges.make(config, tokenizer)
  actions = [[10, 10], [10, 11], [11, 10], [11, 11]]
  prompts = prompts_of([[2]] * 4, 1)  # contexts 0, 1, 2, 0
  verdict = verdict_of(judge, prompts, responses_of([actions] * 4, 2), None)
  np.testing.assert_allclose(verdict.p_win, p[[0, 1, 2, 0]], atol=1e-6)
  strange = [[10, 11, 1], [12, 10, 1], [9, 10, 1], [10]]
  verdict = verdict_of(
    judge, prompts, responses_of([actions] * 4, 3), responses_of([strange] * 4, 3)
  )
  np.testing.assert_array_equal(verdict.valid, np.tile([True, False, False, False], (4, 4, 1)))
  np.testing.assert_array_equal(verdict.p_win[..., 1:], 0.5)
  config.table_tokens = 0  # then a token is an action
  verdict = verdict_of(
    judges.make(config, tokenizer), prompts, responses_of([[[10], [13]]] * 4, 1), None
  )
  np.testing.assert_allclose(verdict.p_win[:, 0, 1], p[[0, 1, 2, 0], 0, 3], atol=1e-6)


def test_bad_tables_name_the_worst_entry(tmp_path, tokenizer):
  def broken(change, value):
    p = game()
    p[change] = value
    return p

  outside = broken((1, 0, 2), 1 + 5e-7)
  outside[1, 2, 0] = -5e-7
  for wrong, message in (
    (broken((1, 2, 3), 1.5), r"must hold probabilities .* worst entry: p_win\[1, 2, 3\] = 1.5"),
    (broken((2, 1, 1), 0.7), r"worst entry: p_win\[2, 1, 1\] = 0.7"),
    (broken((0, 3, 1), np.nan), r"worst entry: .*p_win\[0, 3, 1\] = nan"),
    (outside, r"must hold probabilities, got -.* to 1.0000005"),
    (game()[0], r"\[X A A\], got .*p.npy': got shape \(4, 4\)"),
  ):
    np.save(tmp_path / "p.npy", wrong)
    with pytest.raises(ValueError, match=message):
      table.load(str(tmp_path / "p.npy"))
  with pytest.raises(ValueError, match=r"\.npy file"):
    table.load(str(tmp_path / "none.npy"))
  with pytest.raises(ValueError, match="4 actions as a power, got 3"):
    table.judge(game(), 10, 3)
  judge = table.judge(game(), 10, 2)
  with pytest.raises(ValueError, match="need 2 tokens"):
    verdict_of(judge, prompts_of([[2]], 1), responses_of([[[10], [11]]], 1), None)
  np.save(tmp_path / "p.npy", game())
  with pytest.raises(ValueError, match="1024 pieces, got 1022 to 1025"):
    judges.make(settings("table", table=str(tmp_path / "p.npy"), first_token=1022), tokenizer)


BAD = (np.nan, np.inf, -np.inf, -0.1, 1.1)


def a_few(prompts, samples=2):
  rows = [[[k + 1] for k in range(samples)]] * prompts
  return prompts_of([[3]] * prompts, 2), responses_of(rows, 3)


def test_a_judge_of_ones_own_that_gives_no_probability_is_not_valid_and_counted():
  values = np.array([*BAD, 0.9], np.float32)

  def compare(params, prompts, a, b):
    return params, np.ones(values.shape, bool), {}

  def bare(params, prompts, responses, opponents=None):
    p_win = np.full((len(values), 2, 2), 0.5, np.float32)
    p_win[:, 0, 1] = values
    p_win[:, 1, 0] = 1 - values
    return Verdict(p_win, np.tile(~np.eye(2, dtype=bool), (len(values), 1, 1)))

  for fn in (judges.pairwise(compare), bare):
    for form in ("soft", "sampled"):
      verdict = judges.labels(fn, form, values, *a_few(len(values)), None, jax.random.key(0))
      assert verdict.valid[:, 0, 1].tolist() == [False] * len(BAD) + [True]
      assert verdict.valid[:, 1, 0].tolist() == verdict.valid[:, 0, 1].tolist()
      assert np.isfinite(verdict.p_win).all()
    assert all(mean.weight == 1 for mean in verdict.metrics.values())
  exact = judges.labels(bare, "soft", values, *a_few(len(values)), None, jax.random.key(0))
  np.testing.assert_array_equal(exact.p_win[-1, 0, 1], values[-1])


@pytest.mark.parametrize("missing", [np.nan, np.inf, -np.inf])
def test_a_reward_that_is_not_finite_makes_no_comparison(missing):
  """σ(∞) would be a certain win."""
  rewards = jax.device_put(np.array([1.0, 3.0, missing], np.float32))
  fn = judges.pairwise(judges.base.compare_rewards, lambda *_: rewards, scalar=True)
  verdict = judges.labels(fn, "soft", None, *a_few(1, 3), None, jax.random.key(0))
  assert verdict.valid[0].tolist() == [[False, True, False], [True, False, False], [False] * 3]
  np.testing.assert_allclose(verdict.p_win[0, 1, 0], 1 / (1 + np.exp(-2)), rtol=1e-6)
  assert verdict.metrics["tie_mass"].weight == 1
  opposed = fn(None, *a_few(1, 3), a_few(1, 3)[1])
  assert opposed.valid[0].tolist() == [[True, True, False]] * 2 + [[False] * 3]


def test_logits_that_are_not_finite_are_no_verdict_and_no_agreement(tokenizer):
  """As of a judge whose numbers overflow."""
  first, second = (np.array(x, np.float32) for x in ([2.0, np.nan, np.inf], [1.0, 1.0, 1.0]))
  config = settings("gemma")
  judge = gemma.make(config, tokenizer, params={})
  with mock.patch.object(gemma, "_margins", return_value=(first, second)):
    verdict = judge.fn({}, *a_few(3))
  assert verdict.valid[:, 0, 1].tolist() == [True, False, False]
  assert verdict.metrics["flip_rate"].weight == 1
  assert np.isfinite(verdict.p_win).all()


def test_pairs_of_a_preference_batch_that_do_not_count_weigh_nothing(tokenizer):
  model = gemma_model.preset("tiny")
  margin = np.array([2.0, -1.0, 3.0, 0.5], np.float32)
  counted = np.array([True, True, False, True])
  p_win = np.array([1.0, 0.0, 0.2, 0.5], np.float32)
  word = np.ones((4, 1), bool)
  batch = {"prompts": None, "p_win": p_win, "a_tokens": word, "a_mask": word, "counted": counted}
  batch |= {"b_tokens": word, "b_mask": word}
  each = -(
    p_win * np.log(1 / (1 + np.exp(-margin))) + (1 - p_win) * np.log(1 / (1 + np.exp(margin)))
  )
  rewards = np.stack([margin, np.zeros(4, np.float32)], 1).reshape(-1)
  with mock.patch.object(bradley_terry, "rewards", return_value=rewards):
    of_rewards = bradley_terry.reward_loss({}, batch, model_config=model, options={})
  layout = judge_template.layout("stories", tokenizer)
  with mock.patch.object(gemma, "_margins", return_value=(margin, margin)):
    of_judge = gemma.pairwise_loss({}, batch, model_config=model, template=layout, options={})
  for means, presentations in ((of_rewards, 1), (of_judge, 2)):
    np.testing.assert_allclose(means["loss"].value(), each[counted].mean(), rtol=1e-5)
    assert means["loss"].weight == 3 * presentations
    assert (means["accuracy"].total, means["accuracy"].weight) == (2, 2)


@pytest.mark.parametrize("scale", [0.0, 30.0])
def test_an_unfitted_reward_starts_at_ln_2_whatever_the_scale_of_the_final_norm(scale):
  """Also where some of its entries are far larger than others, as in a real Gemma."""
  model, rng = gemma_model.preset("tiny", num_embed=1024, num_layers=1), np.random.default_rng(0)
  params = jax.eval_shape(lambda key: gemma_model.init(key, model), jax.random.key(0))
  norm = scale * rng.random(model.embed_dim, np.float32) ** 4
  hidden = rng.normal(size=(512, model.embed_dim)).astype(np.float32)
  hidden *= (1 + norm) / np.sqrt(np.mean(hidden**2, axis=1, keepdims=True))
  params = {**params, "final_norm": {"scale": norm}}
  for seed in range(5):
    head = bradley_terry.add_head(params, jax.random.key(seed))["head"]["w"]
    rewards = hidden @ np.asarray(head)
    assert 0.03 < rewards.std() < 0.3
    loss = np.log1p(np.exp(rewards[::2] - rewards[1::2])).mean()
    assert abs(loss - math.log(2)) < 0.02


def test_a_judge_that_prefers_neither_is_half_right_whichever_wins():
  """As one that has no opinion is, whatever share of the pairs lists its winner first."""
  p_win, counted = np.array([0.9, 0.9, 0.9, 0.2, 0.5], np.float32), np.ones(5, bool)
  for ahead, expected in ((np.zeros(5), 0.5), (np.ones(5), 0.75), (-np.ones(5), 0.25)):
    mean = base.accuracy(ahead.astype(np.float32), p_win, counted)
    assert (float(mean.value()), float(mean.weight)) == (expected, 4)


def test_judges_are_antisymmetric_whatever_the_responses_are(tokenizer):
  """Among themselves and against each other, empty responses and equal rewards included."""
  rng = np.random.default_rng(0)
  mask = np.arange(4)[None, None] < rng.integers(0, 5, (5, 3, 1))
  mask[0] = False
  tokens = np.where(mask, rng.integers(5, 10, mask.shape), 0).astype(np.int32)
  zeros = np.zeros(mask.shape, np.float32)
  responses = Responses(tokens, mask, zeros, zeros, mask[..., 3])
  prompts = Prompts(np.full((5, 2), 9, np.int32), np.ones((5, 2), bool), np.arange(5))
  p = rng.random((2, 4, 4))
  game, ties = ((x + 1 - x.swapaxes(1, 2)) / 2 for x in (p, np.full(p.shape, 0.5)))
  made = {
    "population": population.judge(tokenizer),
    "table": table.judge(np.float32(game), 5, 4),
    "rewards": table.reward_judge(np.float32(game), 5, 4),
    "ties": table.reward_judge(np.float32(ties), 5, 4),
  }
  off = ~np.eye(3, dtype=bool)
  for name, judge in made.items():
    run = jax.jit(lambda x, y, j=judge: (j.fn(j.params, x, y), j.fn(j.params, x, y, y)))
    verdicts = jax.device_get(run(prompts, responses))
    for v in verdicts:
      assert np.isfinite(v.p_win).all(), name
      np.testing.assert_allclose(v.p_win + v.p_win.swapaxes(1, 2), 1, atol=1e-6, err_msg=name)
      np.testing.assert_array_equal(v.valid, v.valid.swapaxes(1, 2), name)
      assert v.valid[1:, off].any(), name
      assert v.valid[0, off].all() == (name == "population"), "what is empty has no digits"
    np.testing.assert_allclose(verdicts[0].p_win, verdicts[1].p_win, atol=1e-6, err_msg=name)
    np.testing.assert_array_equal(verdicts[0].valid[:, off], verdicts[1].valid[:, off], name)
    assert not verdicts[0].valid[:, ~off].any(), name

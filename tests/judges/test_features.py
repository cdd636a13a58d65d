"""Features of pairs: a judge's log-odds are linear in them."""

import functools

import jax
import numpy as np
import pytest
from judge_examples import TINY, examples, make_judge, prompts_of, responses_of, verdict_of
from scipy import special

import nash_jax
from nash_jax import judges
from nash_jax.data.tokenizer import BUNDLED, Tokenizer
from nash_jax.judges import features

TOKENIZER = Tokenizer(BUNDLED, "plain")


def settings(name, changes=None, **fields):
  config = nash_jax.config.collect().features
  config.update({"name": name, **fields})
  config.model.update(TINY)
  config.model.changes = {**TINY["changes"], **(changes or {})}
  return config


@functools.cache
def case():
  prompts, rows = examples(samples=3)
  return prompts_of(prompts, 8), responses_of(rows, 8)


def features_of(config, params, responses=None):
  prompts, given = case()
  made = features.make(config, TOKENIZER, seed=0)
  return np.asarray(jax.jit(made.fn)(params, prompts, given if responses is None else responses))


def log_odds(judge):
  """Returns log P/(1 - P) of the pairs (0, 1), (0, 2), (1, 2) of each prompt, [B 3]."""
  p_win = verdict_of(judge, *case()).p_win.astype(np.float64)
  return special.logit(p_win[:, *np.triu_indices(3, 1)])


def test_a_reward_model_s_head_applied_to_the_features_is_the_log_odds():
  judge = make_judge("bradley_terry")
  found = features_of(settings("bradley_terry"), judge.params)
  assert found.shape == (2, 3, 16)
  expected = log_odds(judge)
  assert np.ptp(expected) > 0.1
  np.testing.assert_allclose(found @ judge.params["head"]["w"], expected, atol=1e-4)


@pytest.fixture(scope="module")
def pairwise():
  """A pairwise judge without a soft-cap, its features, and the embeddings of its answers."""
  config = settings("gemma", {"final_logit_softcap": None})
  params = make_judge("bradley_terry").params
  a, b = (TOKENIZER.id_of(answer) for answer in ("A", "B"))
  rows = np.asarray(params["embedder"]["input_embedding"])
  return config, params, features_of(config, params), rows[a] - rows[b]


def test_a_pairwise_judge_s_answers_applied_to_the_features_are_both_orders_log_odds(pairwise):
  config, params, found, answers = pairwise
  judge_config = nash_jax.config.train().judge
  judge_config.model = config.model
  verdict = verdict_of(judges.make(judge_config, TOKENIZER, params), *case())
  i, j = np.triu_indices(3, 1)
  first = verdict.p_win_first.astype(np.float64)
  both = special.logit(first[:, i, j]) - special.logit(first[:, j, i])
  assert np.ptp(both) > 0.1
  np.testing.assert_allclose(found @ answers, both, atol=1e-3)


def test_exchanged_responses_have_the_negative_features(pairwise):
  config, params, found, _ = pairwise
  turned = jax.tree.map(lambda leaf: leaf[:, ::-1], case()[1])
  # The pairs (0, 1), (0, 2), (1, 2) of 2, 1, 0 are (2, 1), (2, 0), (1, 0).
  other = features_of(config, params, turned)
  np.testing.assert_allclose(other, -found[:, ::-1], atol=1e-4)
  same = jax.tree.map(lambda leaf: np.repeat(leaf[:, :1], 3, axis=1), case()[1])
  np.testing.assert_allclose(features_of(config, params, same), 0, atol=1e-5)


def test_more_features_than_the_dimension_are_projected_by_the_seed():
  params = make_judge("bradley_terry").params
  full = features_of(settings("bradley_terry"), params).reshape(-1, 16)
  few = features_of(settings("bradley_terry", dimension=3), params)
  assert few.shape == (2, 3, 3)
  made = features.make(settings("bradley_terry", dimension=3), TOKENIZER, seed=1)
  other = np.asarray(made.fn(params, *case()))
  assert np.abs(other - few).max() > 0.1
  # Linear: features that are twice another's stay so.
  few = few.reshape(-1, 3)
  matrix, *_ = np.linalg.lstsq(full, few, rcond=None)
  np.testing.assert_allclose(full @ matrix, few, atol=1e-4)


def test_another_tokenizer_than_the_policy_s_is_refused(tmp_path):
  (tmp_path / "tokenizer.model").write_bytes(b"other")
  config = settings("bradley_terry")
  config.model.tokenizer = str(tmp_path / "tokenizer.model")
  with pytest.raises(ValueError, match=r"^features.model.tokenizer is .*of the policy's tokenizer"):
    features.make(config, TOKENIZER, seed=0)

"""Decoding-time realignment, enumerated: the law of whole responses, and token by token.

The identities are those of Liu et al. 2402.02992 and what follows for several rewards, for a game
and for rewards that are sums over tokens.
"""

import functools

import jax
import numpy as np
import pytest
import scipy
from jax import numpy as jnp

from nash_jax import exact
from nash_jax.configs.short_game import get_config
from nash_jax.data.prompts import load_prompts
from nash_jax.games import preference
from nash_jax.judges import table
from nash_jax.models import gemma
from nash_jax.policy import make_policy, tokenizer_and_model
from nash_jax.validation import asset_path

T, L, BETA = 3, 3, 0.2
log_softmax = scipy.special.log_softmax


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


def draw(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape)


REF, REWARD = log_softmax(draw(0, 2, T**L), axis=-1), draw(1, 2, T**L) / 4


def trained(reward, beta, ref=REF):
  """π_ref exp(R/β), normalised: where training at β ends, if R is fixed."""
  return log_softmax(ref + reward / beta, axis=-1)


def kl(log_p, log_q):
  return np.asarray(preference.kl(log_p, log_q)).mean()


# One compiled program for all strengths, instead of every operation's own.
laws_of = jax.jit(exact.realigned, static_argnums=3)


def realigned(reward, strength, ref=REF):
  return laws_of(ref, [trained(reward, BETA, ref)], np.array([strength]), T)


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0, 1.5, 4.0])
def test_over_whole_responses_realigning_is_training_at_another_beta(strength):
  sequences, tokens = realigned(REWARD, strength)
  target = log_softmax(REF + strength * REWARD / BETA, axis=-1)
  np.testing.assert_allclose(sequences, target, atol=1e-12)
  np.testing.assert_allclose(np.exp(tokens).sum(-1), 1, atol=1e-12)
  if strength in (0.0, 1.0):
    np.testing.assert_allclose(tokens, target, atol=1e-12)


def test_token_by_token_it_is_another_law_and_farther_the_more_is_extrapolated():
  distances = [kl(*realigned(REWARD, x)[::-1]) for x in (1.0, 1.5, 2.0, 4.0)]
  assert distances[0] < 1e-12
  assert 1e-4 < distances[1] < distances[2] < distances[3]
  assert kl(*realigned(REWARD, 0.5)[::-1]) > 1e-4


def on_first_token():
  return REF, np.repeat(draw(2, 2, T), T ** (L - 1), axis=1)


def of_every_token():
  """R = Σ_t r_t(y_t), and a reference whose tokens do not depend on each other."""
  sums = (draw(seed, 2, L, T) for seed in (3, 4))
  terms = [sum(x[:, t].reshape(2, *np.roll([T, 1, 1], t)) for t in range(L)) for x in sums]
  ref, reward = (x.reshape(2, T**L) for x in terms)
  return log_softmax(ref, axis=-1), reward


@pytest.mark.parametrize("case", [on_first_token, of_every_token])
def test_the_two_laws_are_one_where_no_later_reward_depends_on_the_prefix(case):
  ref, reward = case()
  sequences, tokens = realigned(reward, 2.5, ref)
  np.testing.assert_allclose(tokens, sequences, atol=1e-12)


def test_several_policies_are_realigned_as_if_their_rewards_had_been_added():
  rewards, betas, strengths = (REWARD, draw(5, 2, T**L) / 4), (0.2, 0.5), (0.5, 0.7)
  policies = [trained(r, b) for r, b in zip(rewards, betas, strict=True)]
  sequences, tokens = laws_of(REF, policies, np.array(strengths), T)
  total = sum(s * r / b for s, r, b in zip(strengths, rewards, betas, strict=True))
  np.testing.assert_allclose(sequences, trained(total, 1.0), atol=1e-12)
  assert kl(tokens, sequences) > 1e-4


@pytest.mark.parametrize("strength", [0.5, 2.0])
def test_in_a_game_neither_law_is_the_equilibrium_of_the_other_beta(strength):
  """It is the best response to the equilibrium of β, which with cycles overshoots."""
  beta = 0.05
  p_win = np.asarray(table.load(asset_path("assets:short_game/mild.npy")), np.float64)
  ref = log_softmax(0.5 * draw(0, 4, 64), axis=-1)
  star, retrained = (
    np.log(preference.equilibrium(p_win, np.exp(ref), b)) for b in (beta, beta / strength)
  )

  def subopt(log_policy):
    return float(np.mean(preference.gap(p_win, log_policy, ref, beta / strength)))

  assert subopt(retrained) < 1e-9
  laws = laws_of(ref, [star], np.array([strength]), 4)
  answer = preference.best_response(p_win, np.exp(star), np.exp(ref), beta / strength)
  np.testing.assert_allclose(laws[0], np.log(answer), atol=1e-8)
  for law in laws:
    assert 1e-3 < subopt(star) < subopt(law) < subopt(ref)


def test_a_gemmas_mixture_is_the_law_token_by_token_of_its_enumerated_policies():
  c, strengths = get_config(), (0.5, 0.9)
  tokenizer, model = tokenizer_and_model(c.model)
  policy = make_policy(c.model, c.sampling, tokenizer, model)
  game = exact.Game.from_config(c, load_prompts(c.prompts, tokenizer, 0)[1])
  with jax.enable_x64(False):
    models = [
      jax.tree.map(lambda x, s=s: jnp.asarray(draw(s, *x.shape) / 4, jnp.float32), tree)
      for s, tree in enumerate([gemma.shapes(model)] * (1 + len(strengths)))
    ]
    log_policy = jax.jit(functools.partial(game.log_policy, policy.logprobs))
    each = [log_policy(params) for params in models]
    logprobs = functools.partial(policy.logprobs, mixture=jnp.float32(strengths))
    mixed = jax.jit(functools.partial(game.log_policy, logprobs))(models)
    sequences, tokens = laws_of(each[0], each[1:], jnp.float32(strengths), 4)
  np.testing.assert_allclose(mixed, tokens, atol=1e-4)
  assert np.max(np.abs(sequences - tokens)) > 0.05

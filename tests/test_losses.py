"""The losses against the exact game: every pair of responses enumerated."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from nash_jax.models import gemma, logprobs
from nash_jax.objectives import algorithms, losses
from nash_jax.types import Prompts

CONTEXTS, ACTIONS = 3, 4
BETA, ETA = 0.2, 0.7
KL = {"reference": BETA, "target": BETA / ETA}


def game(dtype):
  """A random preference table and three policies' log-probabilities [X A]."""
  keys = jax.random.split(jax.random.key(0), 4)
  a = 2 * jax.random.normal(keys[0], (CONTEXTS, ACTIONS, ACTIONS), dtype)
  table = jax.nn.sigmoid(a - jnp.swapaxes(a, 1, 2))
  theta, ref, target = (
    jax.nn.log_softmax(jax.random.normal(k, (CONTEXTS, ACTIONS), dtype)) for k in keys[1:]
  )
  return table, theta, ref, target


def objective(log_policy, opponent, table, frozen, kl):
  """Mean over contexts of 1/2 − P(π ≻ opponent) + Σ weight·KL(π‖role)."""
  policy = jnp.exp(log_policy)
  wins = jnp.einsum("xa,xab,xb->x", policy, table, opponent)
  penalty = sum(
    weight * jnp.sum(policy * (log_policy - frozen[role]), -1) for role, weight in kl.items()
  )
  return jnp.mean(0.5 - wins + penalty)


def enumerated(loss, log_policy, table, frozen, samples=2):
  """Expectation of a loss over all tuples of responses, their probabilities under stop_gradient."""
  choices = np.indices((ACTIONS,) * samples).reshape(samples, -1).T  # [tuples, K]
  x = np.repeat(np.arange(CONTEXTS), len(choices))[:, None]
  chosen = np.tile(choices, (CONTEXTS, 1))  # [tuples of all contexts, K]
  logp = log_policy[x, chosen]
  ratios = {
    role: jax.lax.stop_gradient(logp) - other[x, chosen] for role, other in frozen.items()
  }
  p_win = table[x[..., None], chosen[:, :, None], chosen[:, None, :]]
  valid = np.broadcast_to(~np.eye(samples, dtype=bool), p_win.shape)
  # Each tuple is a batch of one prompt of its own, weighted by its probability.
  one = jax.tree.map(lambda a: a[:, None], (logp, ratios, p_win, jnp.asarray(valid)))
  mean = jax.vmap(loss)(*one)
  weight = jax.lax.stop_gradient(jnp.exp(jnp.sum(logp, axis=-1)))
  return jnp.sum(weight * mean.total / mean.weight) / CONTEXTS


@pytest.mark.parametrize("name", ["nash_mp", "reg_self_play"])
@pytest.mark.parametrize("centre", [False, True])
@pytest.mark.parametrize("samples", [2, 3])
def test_expected_gradient_is_twice_that_of_the_objective(name, centre, samples):
  row = algorithms.row(name)

  class A:
    beta, eta = BETA, ETA

  kl = row.kl(A)
  with jax.enable_x64(True):
    table, theta, ref, target = game(jnp.float64)
    frozen = {"reference": ref, "target": target}
    frozen = {role: frozen[role] for role in kl}

    def sampled(theta):
      return enumerated(
        lambda *arrays: row.loss(*arrays, kl=kl, centre=centre),
        jax.nn.log_softmax(theta), table, frozen, samples,
      )  # fmt: skip

    def exact(theta):
      opponent = jax.lax.stop_gradient(jax.nn.softmax(theta))
      return objective(jax.nn.log_softmax(theta), opponent, table, frozen, kl)

    got, expected = jax.jit(jax.grad(sampled))(theta), 2 * jax.grad(exact)(theta)
    np.testing.assert_allclose(got, expected, atol=1e-10)


def test_the_printed_sign_would_make_the_policy_worse():
  """One step on the loss must raise the win rate against the old policy."""
  table, theta, _, _ = game(jnp.float32)

  def loss(theta):
    return enumerated(
      lambda *arrays: losses.score_function(*arrays, kl={}), jax.nn.log_softmax(theta), table, {}
    )

  moved = theta - 0.1 * jax.grad(loss)(theta)
  wins = jnp.einsum("xa,xab,xb->x", jax.nn.softmax(moved), table, jax.nn.softmax(theta))
  assert jnp.mean(wins) > 0.5


def test_a_log_ratio_differentiated_through_its_samples_has_no_gradient():
  """Why ratios are coefficients: the expected gradient of the printed KL term is zero."""
  with jax.enable_x64(True):
    _, theta, ref, _ = game(jnp.float64)

    def printed(theta):
      logp = jax.nn.log_softmax(theta)
      return jnp.mean(jnp.sum(jax.lax.stop_gradient(jnp.exp(logp)) * (logp - ref), -1))

    np.testing.assert_allclose(jax.grad(printed)(theta), 0, atol=1e-12)


def test_responses_without_a_valid_verdict_weigh_nothing():
  logp = jnp.log(jnp.array([[0.3, 0.4], [0.2, 0.1]]))
  ratios = {"reference": logp + 1.0}
  p_win = jnp.full((2, 2, 2), 0.8)
  off = jnp.broadcast_to(~jnp.eye(2, dtype=bool), (2, 2, 2))

  def loss(logp, count, valid):
    some = {role: ratio[:count] for role, ratio in ratios.items()}
    mean = losses.score_function(logp, some, p_win[:count], valid, kl={"reference": 0.1})
    return mean.total / mean.weight

  grad = jax.grad(loss)(logp, 2, off.at[1].set(False))
  np.testing.assert_array_equal(grad[1], 0)
  np.testing.assert_allclose(grad[0], jax.grad(loss)(logp[:1], 1, off[:1])[0], rtol=1e-6)


def test_centring_changes_no_expectation_but_the_variance():
  """At a large KL the centred coefficients vary less."""
  key = jax.random.key(1)
  ratios = {"reference": 18 + 3 * jax.random.normal(key, (512, 2))}
  p_win = jnp.broadcast_to(jnp.array([[0.5, 0.6], [0.4, 0.5]]), (512, 2, 2))
  off = jnp.broadcast_to(~jnp.eye(2, dtype=bool), (512, 2, 2))

  def coefficients(centre):
    grad = jax.grad(lambda logp: losses.score_function(
      logp, ratios, p_win, off, kl={"reference": 0.1}, centre=centre).total)  # fmt: skip
    return grad(jnp.zeros((512, 2)))

  assert jnp.mean(coefficients(True) ** 2) < 0.2 * jnp.mean(coefficients(False) ** 2)


def test_a_one_token_gemma_has_the_exact_games_gradient():
  """The loss that trains Gemma, on one-token responses, is the exact game's gradient."""
  model = gemma.preset("tiny", num_embed=16)
  forbidden = jnp.arange(16) >= ACTIONS
  table, _, _, _ = game(jnp.float32)
  rng = np.random.default_rng(0)
  params, ref, target = (
    jax.tree.map(lambda s: jnp.asarray(0.1 * rng.normal(size=s.shape), s.dtype), shapes)
    for shapes in [gemma.shapes(model)] * 3
  )
  prompts = Prompts(
    jnp.array([[0, 5, 6], [5, 7, 8], [0, 0, 9]]),
    jnp.array([[False, True, True], [True, True, True], [False, False, True]]),
    jnp.arange(CONTEXTS),
  )
  tokens = jnp.broadcast_to(jnp.arange(ACTIONS)[None, :, None], (CONTEXTS, ACTIONS, 1))

  def log_policy(params):
    logp, _ = logprobs.response_logprobs(
      params, model, prompts, tokens, jnp.ones_like(tokens, bool), forbidden=forbidden
    )
    return logp[..., 0]

  frozen = {"reference": log_policy(ref), "target": log_policy(target)}
  np.testing.assert_allclose(jnp.sum(jnp.exp(log_policy(params)), -1), 1, atol=1e-5)

  @jax.jit
  def gradients(params):
    sampled = jax.grad(lambda p: enumerated(
      lambda *arrays: losses.score_function(*arrays, kl=KL), log_policy(p), table, frozen
    ))(params)  # fmt: skip
    exact = jax.grad(lambda p: objective(
      log_policy(p), jax.lax.stop_gradient(jnp.exp(log_policy(p))), table, frozen, KL
    ))(params)  # fmt: skip
    return sampled, exact

  sampled, exact = gradients(params)
  assert max(float(jnp.max(jnp.abs(g))) for g in jax.tree.leaves(exact)) > 1e-3
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, 2 * b, atol=1e-5), sampled, exact)

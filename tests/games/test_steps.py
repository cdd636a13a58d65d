"""A step of every method: the closed forms, the gradients, and the identities between them."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_games import BOTH, EXACT, objective, one_step, random_game, random_policy

from nash_jax.games import preference, proximal, solvers


@jax.jit
def _slope_at_the_closed_step(game, base, opponent, eta):
  closed = proximal.prox(game, eta / (game.beta * (1 + eta)), base, opponent)

  def prox(logits):
    return objective(game, logits, opponent) + game.beta / eta * preference.kl(
      jax.nn.log_softmax(logits), base
    )

  return jax.grad(prox)(closed)


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.sampled_from([0.02, 0.1, 1.0]), st.sampled_from([0.01, 0.5, 3.0]))
def test_the_closed_step_zeroes_the_gradient_of_its_prox_objective(seed, beta, eta):
  game = random_game(seed, beta=beta)
  base, opponent = random_policy(seed, game.log_ref), random_policy(seed + 1, game.log_ref)
  slope = _slope_at_the_closed_step(game, base, opponent, eta)
  np.testing.assert_allclose(slope, np.zeros(5), atol=1e-12)


@pytest.mark.parametrize(("updates", "method"), BOTH)
def test_the_equilibrium_is_a_fixed_point_of_methods_for_the_regularised_game(updates, method):
  game = random_game(2, beta=0.1, contexts=2)
  star = np.log(preference.equilibrium(game.p_win, np.exp(game.log_ref), 0.1))
  logp, _ = one_step(updates, method, game, solvers.State(star, star, np.asarray(0)), step=0.3)
  moved = np.abs(np.exp(logp) - np.exp(star)).max()
  if (updates, method) in [
    ("proximal", "mpo"),
    ("proximal", "mwu"),
    ("proximal", "omwu"),
    ("proximal", "nash_md"),
    ("gradient", "nash_md"),
    ("gradient", "online_dpo"),
  ]:
    assert moved > 1e-4  # these solve another game, or none: mixtures, no β, a reward
  else:
    assert moved < 1e-12


def test_nash_md_keeps_the_equilibrium_as_its_step_falls():
  game = random_game(2)
  star = np.log(preference.equilibrium(game.p_win, np.exp(game.log_ref), 0.1))
  moved = []
  for step in (1e-1, 1e-2, 1e-3):
    logp, _ = one_step("proximal", "nash_md", game, solvers.State(star, star, 0), step=step)
    moved.append(float(preference.span(logp, star)) / step)
  assert moved[0] > 5 * moved[1] > 25 * moved[2]


@jax.jit
def _enumerated_and_differentiated(game, logp, target, opponent):
  def with_centre(v):
    return objective(game, v, logp) + game.beta / 0.3 * preference.kl(jax.nn.log_softmax(v), target)

  estimate = functools.partial(solvers.gradient, "policy_gradient", game, logp, EXACT)
  return [
    (estimate(), jax.grad(lambda v: objective(game, v, logp))(logp)),
    (estimate(centre=target, eta=0.3), jax.grad(with_centre)(logp)),
    (estimate(opponent=opponent), jax.grad(lambda v: objective(game, v, opponent))(logp)),
  ]


@settings(max_examples=15)
@given(st.integers(0, 10**6))
def test_the_enumerated_estimator_is_the_gradient_of_its_objective(seed):
  game = random_game(seed)
  players = (random_policy(seed + i, game.log_ref) for i in range(3))
  for estimate, grad in _enumerated_and_differentiated(game, *players):
    np.testing.assert_allclose(estimate, grad, atol=1e-14)


@pytest.mark.parametrize("kind", ["ipo", "dpo", "egpo"])
def test_regression_gradients_are_those_of_their_printed_losses(kind):
  game = random_game(4)
  logp, third = random_policy(5, game.log_ref), random_policy(6, game.log_ref)
  weights = np.full(5, 0.2) if kind == "egpo" else np.exp(logp)

  def loss(v):
    r = jax.nn.log_softmax(v) - game.log_ref
    margin = r[:, None] - r[None, :]
    wins = game.p_win @ np.exp(third)
    each = {
      "ipo": (margin - (game.p_win - 0.5) / game.beta) ** 2,
      "dpo": -(
        game.p_win * jax.nn.log_sigmoid(game.beta * margin)
        + (1 - game.p_win) * jax.nn.log_sigmoid(-game.beta * margin)
      ),
      "egpo": (margin - (wins[:, None] - wins[None, :]) / game.beta) ** 2,
    }[kind]
    return weights @ each @ weights

  coefficients = "logistic" if kind == "dpo" else "regression"

  @jax.jit
  def estimate(logp):
    judge = third if kind == "egpo" else None
    return solvers.gradient(coefficients, game, logp, EXACT, judge=judge)

  np.testing.assert_allclose(estimate(logp), jax.jit(jax.grad(loss))(logp), atol=1e-12)


@pytest.mark.parametrize("method", list(solvers.GRADIENT))
def test_sampled_gradients_have_the_exact_ones_as_their_mean(method):
  game, contexts, draws = random_game(7, contexts=2), 2, 400
  state = solvers.State(
    random_policy(8, game.log_ref), random_policy(9, game.log_ref), np.asarray(0)
  )
  knobs = solvers.Knobs(*(np.asarray(v) for v in (1e-4, 0.3, 0.4, 0.25)))  # to first order

  @functools.partial(jax.jit, static_argnums=1)
  def move(key, batch):
    new = solvers.GRADIENT[method](state, game, knobs, solvers.Draws(key, batch, 1))[0]
    return (new - new.mean(-1, keepdims=True)) - (state.logp - state.logp.mean(-1, keepdims=True))

  keys = jax.random.split(jax.random.key(0), draws)
  sampled = np.asarray(jax.jit(jax.vmap(lambda key: move(key, 50)))(keys))
  exact = np.asarray(move(jax.random.key(0), 0))
  error = np.std(sampled, 0) / draws**0.5
  assert sampled.shape == (draws, contexts, 5)
  assert np.max(np.abs(sampled.mean(0) - exact) / error) < 4.5
  assert np.max(np.abs(exact) / error) > 4.5  # so that a zero would have failed


def test_self_play_is_online_ipo_at_the_stated_rate():
  game = random_game(10)
  state = solvers.State(random_policy(11, game.log_ref), game.log_ref, np.asarray(0))
  self_play, _ = one_step("gradient", "reg_self_play", game, state, step=4 * 0.02 / 0.1)
  ipo, _ = one_step("gradient", "online_ipo", game, state, step=0.02)
  np.testing.assert_allclose(self_play, ipo, atol=1e-13)


@pytest.mark.parametrize("method", ["egpo", "mmd"])
def test_exact_regression_on_uniform_pairs_is_the_proximal_update(method):
  game = random_game(12)
  state = solvers.State(random_policy(13, game.log_ref), game.log_ref, np.asarray(0))
  prox, _ = one_step("proximal", method, game, state, step=0.8)
  regressed, _ = one_step("gradient", method, game, state, step=0.8 * 5 * 0.1 / 4)
  np.testing.assert_allclose(regressed, prox, atol=1e-13)


def test_the_target_decides_between_self_play_and_a_frozen_centre():
  game = random_game(14)
  state = solvers.State(
    random_policy(15, game.log_ref), random_policy(16, game.log_ref), np.asarray(0)
  )
  new, frozen = one_step("gradient", "nash_mp", game, state, kappa=0.0)
  np.testing.assert_allclose(frozen, state.other, atol=1e-15)
  _, copied = one_step("gradient", "nash_mp", game, state, kappa=1.0)
  np.testing.assert_allclose(copied, new, atol=1e-15)
  self_play, _ = one_step("gradient", "reg_self_play", game, state)
  follower = state._replace(other=state.logp)  # κ = 1: the target is the policy itself
  np.testing.assert_allclose(
    one_step("gradient", "nash_mp", game, follower)[0], self_play, atol=1e-15
  )


def test_many_inner_steps_are_the_two_closed_half_steps():
  game = random_game(17)
  state = solvers.State(random_policy(18, game.log_ref), game.log_ref, np.asarray(0))
  eta = 0.2
  closed, half = one_step("proximal", "nash_mp", game, state, step=eta / (0.1 * (1 + eta)))
  inner, middle = one_step(
    "gradient", "nash_mp_two_step", game, state, step=1.0, eta=eta, inner=3000
  )
  np.testing.assert_allclose(middle, half, atol=1e-11)
  np.testing.assert_allclose(inner, closed, atol=1e-11)

"""Equilibria at small β, at small payoffs and at the ends of the range: solved or refused."""

from decimal import Decimal, localcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax

from nash_jax.games import equilibria, preference, solvers, zoo


def _error(p_win, ref, beta, pi):
  """Distance of π to the equilibrium: Newton's step from a residual in 60 decimal digits."""
  with localcontext() as context:
    context.prec = 60
    p, q = [Decimal(float(x)) for x in pi], [Decimal(float(x)) for x in ref]
    total = sum(p)
    wins = [
      sum(Decimal(a) * b for a, b in zip(row, p, strict=True)) / total for row in p_win.tolist()
    ]
    theta = [a.ln() - b.ln() - w / Decimal(float(beta)) for a, b, w in zip(p, q, wins, strict=True)]
    mean = sum(a * b for a, b in zip(p, theta, strict=True)) / total
    residual = np.array([float(x - mean) for x in theta])
  spread = np.diag(pi) - np.outer(pi, pi)
  jacobian = np.eye(len(pi)) - p_win @ spread / beta
  return np.abs(spread @ np.linalg.solve(jacobian, residual)).max()


def _games(number, seed=0):
  rng = np.random.default_rng(seed)
  for game in range(number):
    ref, beta = rng.dirichlet(np.full(5, 2.0)), 10 ** rng.uniform(-4, 1)
    yield zoo.random_game(game, 5).p_win, ref, beta


def test_equilibria_of_200_random_games_are_fixed_points_to_1e_12():
  for p_win, ref, beta in _games(200):
    star = np.asarray(preference.equilibrium(p_win, ref, beta))
    response = softmax(np.log(ref) + (p_win - 0.5) @ star / beta)
    np.testing.assert_allclose(response, star, rtol=0, atol=1e-12, err_msg=f"beta={beta}")
    # what a best response to π* wins in the original game is what its KL to the reference costs
    exploitable = (p_win @ star).max() - 0.5
    assert exploitable <= beta * np.log(1 / ref.min()) + 1e-12


@pytest.mark.parametrize("beta", [1e-3, 1e-4, 1e-5, 1e-7])
def test_biased_rock_paper_scissors_is_solved_at_small_beta(beta):
  ref = np.array([0.5, 0.3, 0.2])
  for payoffs in ((1.0, 1.0, 1.0), (0.5, 1.0, 0.8), (0.01, 1.0, 0.5)):
    game = zoo.rock_paper_scissors(*payoffs)
    star = np.asarray(preference.equilibrium(game.p_win, ref, beta))
    assert _error(game.p_win, ref, beta, star) < 1e-12
    np.testing.assert_allclose(star, game.nash, atol=200 * beta)


def test_equilibria_at_tiny_beta_are_near_that_of_the_linear_program():
  for seed in range(10):
    p_win = zoo.random_game(seed, 5, strength=4.0).p_win
    nash = np.asarray(preference.nash_equilibrium(p_win))
    for beta in (1e-6, 1e-9):
      star = np.asarray(preference.equilibrium(p_win, np.full(5, 0.2), beta))
      assert (p_win @ star).max() - 0.5 <= beta * np.log(5) + 1e-15
      np.testing.assert_allclose(star, nash, atol=1e-3 if beta == 1e-6 else 1e-6)


def test_a_smaller_scale_of_payoffs_and_beta_alike_changes_nothing():
  ref = np.array([0.1, 0.15, 0.2, 0.25, 0.3])
  payoff = 2 * zoo.planted(0, [0.1, 0.2, 0.3, 0.25, 0.15]).p_win - 1
  for scale in (1e-3, 1e-6, 1e-9):
    small = preference.from_payoff(scale * payoff)
    for beta in (0.1, 1e-3, 1e-4):
      star = preference.equilibrium(preference.from_payoff(payoff), ref, beta)
      # entries near ½ hold a payoff to 1e-16 only
      got = preference.equilibrium(small, ref, scale * beta)
      np.testing.assert_allclose(got, star, atol=1e-15 / scale)
    np.testing.assert_allclose(
      preference.nash_equilibrium(small), [0.1, 0.2, 0.3, 0.25, 0.15], atol=1e-8 + 1e-15 / scale
    )


def test_a_huge_beta_gives_the_reference_and_an_infinite_one_is_refused():
  p_win, ref = zoo.random_game(0, 4).p_win, np.array([0.1, 0.2, 0.3, 0.4])
  for beta in (1e13, 1e30, 1e300):
    np.testing.assert_allclose(preference.equilibrium(p_win, ref, beta), ref, rtol=1e-12)
  with pytest.raises(ValueError, match="beta"):
    preference.equilibrium(p_win, ref, np.inf)


@pytest.mark.parametrize("beta", [1e-17, 1e-100, 5e-324])
def test_a_beta_below_what_float64_resolves_is_refused_before_solving(beta):
  with pytest.raises(ValueError, match=r"beta.*nash_equilibrium"):
    preference.equilibrium(zoo.random_game(0, 4).p_win, np.full(4, 0.25), beta)


def test_win_rates_are_summed_beyond_float64():
  rng, digits = np.random.default_rng(0), Decimal
  p_win = zoo.random_game(3, 40).p_win
  pi = rng.dirichlet(np.full(40, 0.3))
  got = equilibria.precise_win_rates(p_win, pi)
  with localcontext() as context:
    context.prec = 60
    exact = [
      sum((digits(a) - digits(0.5)) * digits(b) for a, b in zip(row, pi, strict=True))
      for row in p_win.tolist()
    ]
    error = max(abs(digits(g) - e) / abs(e) for g, e in zip(got.tolist(), exact, strict=True))
  assert error < 5e-16


@pytest.mark.slow
def test_equilibria_of_many_sizes_strengths_and_betas_are_within_1e_12():
  rng = np.random.default_rng(0)
  for beta in (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-8):
    for seed in range(60):
      actions = [2, 3, 4, 5, 8, 20][seed % 6]
      p_win = zoo.random_game(seed, actions, strength=[0.5, 2.0, 8.0][seed % 3]).p_win
      ref = rng.dirichlet(np.full(actions, 2.0))
      star = np.asarray(preference.equilibrium(p_win, ref, beta))
      played = star > 1e-250  # the others have no logarithm to speak of
      sub = p_win[np.ix_(played, played)]
      assert _error(sub, ref[played], beta, star[played]) < 1e-12
      gain = np.log(ref) + (p_win - 0.5) @ star / beta
      assert softmax(gain)[~played].sum() < 1e-200


@pytest.mark.slow
def test_a_large_game_at_small_beta_is_solved_or_refused():
  p_win, ref = zoo.random_game(0, 1600).p_win, np.full(1600, 1 / 1600)
  for beta in (1e-3,):
    star = np.asarray(preference.equilibrium(p_win, ref, beta))
    response = softmax(np.log(ref) + (p_win - 0.5) @ star / beta)
    np.testing.assert_allclose(response, star, atol=1e-12)


# SubOpt_β at the ends of β.


def test_suboptimality_at_a_beta_below_float32_is_that_of_the_original_game():
  with jax.enable_x64(False):
    p_win = np.asarray(zoo.random_game(0, 4).p_win, np.float32)
    policy = ref = np.full(4, 0.25, np.float32)
    bound = preference.exploitability(p_win, policy)
    for beta in (1e-45, 1e-40, 1e-39, 1e-38, 1e-30):
      got = preference.suboptimality(p_win, policy, ref, beta)
      assert float(got) == pytest.approx(float(bound), rel=1e-6)
      response = preference.best_response(p_win, policy, ref, beta)
      assert int(np.argmax(response)) == int(np.argmax(p_win @ policy))
      assert float(jnp.sum(response)) == pytest.approx(1)


def test_a_traced_beta_that_is_no_number_from_0_on_gives_nan_not_the_original_game():
  p_win, ref = zoo.random_game(0, 4).p_win, np.full(4, 0.25)
  measure = jax.jit(preference.suboptimality)
  assert np.isnan(measure(p_win, ref, ref, np.nan))
  assert np.isnan(measure(p_win, ref, ref, -0.1))
  assert measure(p_win, ref, ref, 0.0) > 0


def test_kl_of_a_probability_that_hardly_is_one_is_finite():
  log_p, log_q = np.array([-740.0, 0.0]), np.log([0.5, 0.5])
  assert float(jax.jit(preference.kl)(log_p, log_q)) == pytest.approx(np.log(2))
  slope = jax.jit(jax.grad(lambda q: preference.kl(log_p, q)))(log_q)
  assert np.all(np.isfinite(slope))


def test_mpo_without_a_reset_within_reach_is_mirror_descent():
  p_win, ref = zoo.random_game(0, 4).p_win, np.full(4, 0.25)
  for beta in (1e-6, 1e-200):
    mpo, _ = solvers.solve("mpo", p_win, ref, beta=beta, iterations=20)
    mmd, _ = solvers.solve("mmd", p_win, ref, beta=beta, iterations=20)
    np.testing.assert_allclose(mpo, mmd, atol=1e-15)


def test_nash_mp_without_a_prox_term_is_the_best_response_to_the_best_response():
  p_win, ref, beta = zoo.random_game(0, 4).p_win, np.full(4, 0.25), 0.3
  logp, _ = solvers.solve("nash_mp", p_win, ref, beta=beta, iterations=1, eta=np.inf)
  half = preference.best_response(p_win, ref, ref, beta)
  np.testing.assert_allclose(
    np.exp(logp), preference.best_response(p_win, half, ref, beta), atol=1e-15
  )


def test_a_game_of_ties_has_no_cycles_and_rests_at_its_reference():
  p_win, ref = np.full((3, 3), 0.5), np.array([0.2, 0.3, 0.5])
  assert float(preference.cyclic_energy(p_win)) == 0
  np.testing.assert_allclose(preference.equilibrium(p_win, ref, 1e-200), ref, rtol=1e-14)
  np.testing.assert_allclose(np.sum(preference.nash_equilibrium(p_win)), 1)

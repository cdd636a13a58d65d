"""Which methods reach the equilibrium, how fast, and which do not."""

import itertools

import jax
import numpy as np
import pytest
import scipy
from hypothesis import given, settings
from hypothesis import strategies as st
from small_games import random_game, suboptimality

from nash_jax.games import preference, solvers, zoo

kl = jax.jit(preference.kl)


@settings(max_examples=12)
@given(st.integers(0, 10**6), st.sampled_from([0.03, 0.1, 0.45]), st.sampled_from([2, 5, 11]))
def test_kl_falls_every_iteration_within_the_theorem(seed, beta, actions):
  game = random_game(seed, actions, beta, strength=6.0)
  star = np.log(preference.equilibrium(game.p_win, np.exp(game.log_ref), beta))
  step = jax.jit(solvers.nash_mp)
  knobs = solvers.Knobs(2 / (1 + 2 * beta), 0.0, 0.0, 0.0)
  state, distance = solvers.init(game.log_ref), kl(star, game.log_ref)
  for k in range(1, 31):
    logp, half = step(state, game, knobs)
    state = solvers.State(logp, half, state.k + 1)
    closer = kl(star, logp)
    assert float(closer) < float(distance) or float(distance) < 1e-24
    assert float(closer) <= (1 + 2 * beta) ** -k / (2 * beta)
    distance = closer


SURE = [
  ("proximal", "nash_mp", 400, 1e-12),
  ("proximal", "proximal_point", 200, 1e-12),
  ("proximal", "egpo", 20_000, 1e-5),
  ("proximal", "mmd", 3_000, 1e-9),
  ("proximal", "nash_md", 2_000, 1e-2),
  ("proximal", "fictitious_play", 2_000, 2e-3),
  ("gradient", "nash_mp_two_step", 2_000, 1e-4),
]


@pytest.mark.parametrize(("updates", "method", "iterations", "atol"), SURE)
def test_methods_that_claim_convergence_reach_the_equilibrium_of_every_zoo_game(
  updates, method, iterations, atol
):
  beta, games = 0.2, sorted(zoo.menagerie(), key=lambda game: len(game.p_win))
  for actions, alike in itertools.groupby(games, lambda game: len(game.p_win)):
    if method == "egpo" and actions > 10:
      continue  # its theory's step is 1/(1 + β + 2A): too slow to wait for here
    p_win = np.stack([game.p_win for game in alike])
    ref = np.arange(1, actions + 1.0) / np.arange(1, actions + 1.0).sum()
    star = preference.equilibrium(p_win, ref, beta)
    logp, curve = solvers.solve(
      method, p_win, ref, beta=beta, iterations=iterations, updates=updates, every=iterations
    )
    np.testing.assert_allclose(np.exp(logp), star, atol=atol, err_msg=f"{actions} actions")
    np.testing.assert_allclose(curve[-1], suboptimality(p_win, np.exp(logp), ref, beta), atol=1e-14)


@settings(max_examples=10)
@given(st.integers(0, 10**6), st.sampled_from([0.05, 0.3]))
def test_nash_mp_reaches_the_equilibrium_of_random_games(seed, beta):
  game = random_game(seed, 7, beta, strength=5.0, contexts=2)
  star = preference.equilibrium(game.p_win, np.exp(game.log_ref), beta)
  logp, _ = solvers.solve("nash_mp", game.p_win, np.exp(game.log_ref), beta=beta, iterations=800)
  np.testing.assert_allclose(np.exp(logp), star, atol=1e-12)


@pytest.mark.parametrize(
  ("method", "step"), [("reg_self_play", 4.0), ("online_ipo", 0.2), ("nash_mp_ema", 4.0)]
)
def test_gradient_methods_reach_the_equilibrium_at_a_good_step(method, step):
  game = random_game(1, beta=0.2)
  star = preference.equilibrium(game.p_win, np.exp(game.log_ref), 0.2)
  logp, _ = solvers.solve(
    method, game.p_win, np.exp(game.log_ref), beta=0.2, iterations=4000, step=step, kappa=0.1
  )
  np.testing.assert_allclose(np.exp(logp), star, atol=1e-8)


def test_online_dpo_finds_the_reward_policy_and_misses_a_cyclic_equilibrium():
  ref = np.full(6, 1 / 6)
  transitive = zoo.random_game(0, 6, cyclicity=0.0, strength=0.3)
  logp, _ = solvers.solve(
    "online_dpo", transitive.p_win, ref, beta=0.5, iterations=20_000, step=20.0
  )
  rewards = np.asarray(preference.bradley_terry(transitive.p_win))
  reward_policy = scipy.special.softmax(rewards / 0.5)
  np.testing.assert_allclose(np.exp(logp), reward_policy, atol=1e-6)
  cyclic = zoo.random_game(1, 6, strength=2.0)
  _, curve = solvers.solve("online_dpo", cyclic.p_win, ref, beta=0.1, iterations=20_000, step=2.0)
  assert float(curve[-1]) > 1e-3


def test_the_original_game_is_solved_by_optimism_and_magnets_and_not_by_mwu():
  game, ref = zoo.rock_paper_scissors(0.5, 1.0, 0.6), np.array([0.6, 0.3, 0.1])
  optimism, _ = solvers.solve(
    "omwu", game.p_win, ref, beta=0.0, iterations=20_000, every=20_000, step=1.0
  )
  np.testing.assert_allclose(np.exp(optimism), game.nash, atol=1e-8)
  magnets, _ = solvers.solve("mpo", game.p_win, ref, beta=0.2, iterations=20_000, every=20_000)
  np.testing.assert_allclose(np.exp(magnets), game.nash, atol=1e-6)
  _, drift = solvers.solve("mwu", game.p_win, ref, beta=0.0, iterations=20_000, step=0.125)
  assert float(drift[-1]) > float(drift[0])
  mean, curve = solvers.solve("fictitious_play", game.p_win, ref, beta=0.0, iterations=20_000)
  assert float(curve[-1]) < 1e-2 < float(curve[0])
  np.testing.assert_allclose(np.exp(mean).sum(), 1, atol=1e-12)

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy
from hypothesis import given, settings
from hypothesis import strategies as st

from nash_jax.games import equilibria, preference, zoo

kl, value, suboptimality, best_response, exploitability, cyclic_energy = map(
  jax.jit,
  (
    preference.kl,
    preference.value,
    preference.suboptimality,
    preference.best_response,
    preference.exploitability,
    preference.cyclic_energy,
  ),
)


def _game(seed, actions, strength=2.0, contexts=None):
  rng = np.random.default_rng(seed)
  shape = (actions,) if contexts is None else (contexts, actions)
  ref = rng.dirichlet(np.full(actions, 2.0), size=shape[:-1]) + 1e-3
  return (
    zoo.random_game(seed, actions, strength=strength, contexts=contexts).p_win,
    ref / ref.sum(-1, keepdims=True),
  )


def test_validate_names_the_worst_entry():
  p_win = np.full((4, 4), 0.5)
  p_win[2, 1] = 0.9
  p_win[0, 3] = 0.51
  with pytest.raises(ValueError, match=r"p_win\[(2, 1|1, 2)\] = 0\.[59]"):
    preference.validate(p_win)
  with pytest.raises(ValueError, match=r"p_win\[1, 0, 2\] = 1\.2"):
    preference.validate(
      np.stack([np.full((3, 3), 0.5), [[0.5, 0.5, 1.2], [0.5, 0.5, 0.5], [-0.2, 0.5, 0.5]]])
    )
  with pytest.raises(ValueError, match="shape"):
    preference.validate(np.full((2, 3), 0.5))
  with pytest.raises(ValueError, match="nan"):
    preference.validate(np.full((2, 2), np.nan))
  with pytest.raises(ValueError, match="worst"):  # the diagonal is a half
    preference.validate(np.eye(3))


def test_validate_sees_a_fault_across_its_blocks_of_rows():
  p_win = np.full((1100, 1100), 0.5, np.float32)
  preference.validate(p_win)
  p_win[1090, 3] = 0.7
  with pytest.raises(ValueError, match=r"1090"):
    preference.validate(p_win)


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.sampled_from([2, 5, 9]), st.sampled_from([0.005, 0.05, 0.5, 5.0]))
def test_equilibrium_is_its_own_best_response_and_nothing_else_is(seed, actions, beta):
  p_win, ref = _game(seed, actions, strength=4.0)
  star = preference.equilibrium(p_win, ref, beta)
  np.testing.assert_allclose(best_response(p_win, star, ref, beta), star, atol=1e-12)
  assert float(suboptimality(p_win, star, ref, beta)) < 1e-24
  assert float(suboptimality(p_win, ref, ref, beta)) > 0
  np.testing.assert_allclose(value(p_win, star, star), 0.5, atol=1e-14)
  # nobody gains over π* in the regularised game
  log_ref, log_star, rng = np.log(ref), np.log(star), np.random.default_rng(seed)
  for _ in range(5):
    other = rng.dirichlet(np.ones(actions)) + 1e-9
    other = other / other.sum()
    price = float(kl(np.log(other), log_ref)) - float(kl(log_star, log_ref))
    gain = float(value(p_win, other, star)) - beta * price
    assert gain <= 0.5 + 1e-12


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.sampled_from([0.02, 0.3, 2.0]))
def test_suboptimality_is_its_definition(seed, beta):
  p_win, ref = _game(seed, 6)
  policy = np.random.default_rng(seed + 1).dirichlet(np.ones(6))
  wins = p_win @ policy
  by_definition = (
    beta * np.log(ref @ np.exp(wins / beta)) + beta * policy @ np.log(policy / ref) - 0.5
  )
  got = suboptimality(p_win, policy, ref, beta)
  np.testing.assert_allclose(got, by_definition, rtol=1e-12, atol=1e-13)
  assert float(got) >= 0


def test_suboptimality_without_regularisation_is_exploitability_and_its_limit():
  p_win, ref = _game(3, 6)
  policy = np.random.default_rng(4).dirichlet(np.ones(6))
  exploit = exploitability(p_win, policy)
  np.testing.assert_allclose(suboptimality(p_win, policy, ref, 0.0), exploit, atol=1e-15)
  np.testing.assert_allclose(suboptimality(p_win, policy, ref, 1e-7), exploit, atol=1e-5)


def test_a_policy_without_full_support_has_a_finite_suboptimality():
  p_win, ref = _game(0, 4)
  pure = np.array([0.0, 1.0, 0.0, 0.0])
  beta = 0.1
  expected = beta * np.log(ref @ np.exp(p_win[:, 1] / beta)) - beta * np.log(ref[1]) - 0.5
  np.testing.assert_allclose(suboptimality(p_win, pure, ref, beta), expected, rtol=1e-12)


def test_kl_keeps_its_digits_when_tiny():
  p = np.array([0.2, 0.3, 0.5])
  shift = np.array([1.0, 1.0, -1.0]) * 1e-7
  log_q = scipy.special.log_softmax(np.log(p) + shift)
  variance = np.sum(p * shift**2) - np.sum(p * shift) ** 2
  np.testing.assert_allclose(kl(np.log(p), log_q), variance / 2, rtol=1e-6)
  far = np.log(np.array([0.98, 0.01, 0.01]))
  np.testing.assert_allclose(kl(np.log(p), far), p @ (np.log(p) - far), rtol=1e-14)


def test_contexts_are_games_of_their_own():
  p_win, ref = _game(5, 4, contexts=3)
  star = preference.equilibrium(p_win, ref, 0.1)
  alone = [preference.equilibrium(p, r, 0.1) for p, r in zip(p_win, ref, strict=True)]
  np.testing.assert_allclose(star, np.stack(alone), atol=1e-15)
  gaps = [suboptimality(p, r, r, 0.1) for p, r in zip(p_win, ref, strict=True)]
  np.testing.assert_allclose(suboptimality(p_win, ref, ref, 0.1), np.mean(gaps))
  shared = preference.equilibrium(p_win, ref[0], 0.1)
  np.testing.assert_allclose(shared[0], star[0], atol=1e-14)


def test_large_games_are_solved_without_forming_the_jacobian(monkeypatch):
  p_win, ref = _game(7, 40, strength=4.0)
  dense = preference.equilibrium(p_win, ref, 0.02)
  monkeypatch.setattr(equilibria, "DENSE_LIMIT", 0)
  np.testing.assert_allclose(preference.equilibrium(p_win, ref, 0.02), dense, atol=1e-12)


def test_equilibrium_refuses_what_has_none():
  p_win, ref = _game(0, 3)
  with pytest.raises(ValueError, match="nash_equilibrium"):
    preference.equilibrium(p_win, ref, 0.0)
  with pytest.raises(ValueError, match="positive"):
    preference.equilibrium(p_win, np.array([0.5, 0.5, 0.0]), 0.1)


@settings(max_examples=15)
@given(st.integers(0, 10**6), st.sampled_from([2, 6, 15]))
def test_linear_programming_finds_an_unexploitable_policy(seed, actions):
  p_win, _ = _game(seed, actions)
  nash = preference.nash_equilibrium(p_win)
  np.testing.assert_allclose(nash.sum(), 1, atol=1e-12)
  assert abs(float(exploitability(p_win, nash))) < 1e-9


def test_the_regularised_equilibrium_tends_to_the_original_one():
  game = zoo.planted(0, [0.1, 0.2, 0.3, 0.25, 0.15])
  ref = np.full(5, 0.2)
  errors = [
    np.abs(preference.equilibrium(game.p_win, ref, beta) - game.nash).max()
    for beta in (0.1, 0.01, 0.001)
  ]
  assert errors[0] > errors[1] > errors[2]
  assert errors[2] < 1e-2


def test_bradley_terry_recovers_scores_and_a_cycle_has_none():
  scores = np.array([1.0, 0.2, -0.4, -0.8])
  p_win = 1 / (1 + np.exp(scores[None] - scores[:, None]))
  np.testing.assert_allclose(preference.bradley_terry(p_win), scores, atol=1e-6)
  assert np.abs(preference.intransitive_residue(p_win)).max() < 1e-7
  cycle = zoo.condorcet_cycle(3, 0.9)
  np.testing.assert_allclose(preference.bradley_terry(cycle.p_win), np.zeros(3), atol=1e-9)
  residue = preference.intransitive_residue(cycle.p_win)
  np.testing.assert_allclose(residue, cycle.p_win - 0.5, atol=1e-9)
  np.testing.assert_allclose(cyclic_energy(cycle.p_win), 1.0)
  ref = np.full(3, 1 / 3)
  np.testing.assert_allclose(preference.equilibrium(cycle.p_win, ref, 0.01), ref, atol=1e-12)


def test_bradley_terry_matches_wins_and_survives_certainty():
  game = zoo.random_game(0, 6)
  weights = np.random.default_rng(0).uniform(0.1, 1, (6, 6))
  weights = weights + weights.T
  residue = preference.intransitive_residue(game.p_win, weights)
  np.testing.assert_allclose((weights * residue).sum(1), 0, atol=1e-5)  # the first-order condition
  certain = preference.bradley_terry(np.triu(np.ones((3, 3)), 1) + np.eye(3) / 2)
  assert np.all(np.isfinite(certain))
  assert np.all(np.diff(certain) < -3)


def test_float32_stays_float32():
  with jax.enable_x64(False):
    p_win = jnp.asarray(zoo.random_game(0, 5).p_win)
    ref = np.full(5, 0.2, np.float32)
    star = preference.equilibrium(p_win, ref, 0.1)
    assert star.dtype == jnp.float32
    assert float(suboptimality(p_win, star, ref, 0.1)) < 1e-10

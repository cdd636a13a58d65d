"""Names that notebooks and other projects import: they stay, and mean what they meant."""

import numpy as np

UNIFORM = np.full(3, 1 / 3)
CYCLE = np.array([[0.5, 0.0, 1.0], [1.0, 0.5, 0.0], [0.0, 1.0, 0.5]])  # rock, paper, scissors


def test_jobs_are_imported_from_the_package_and_have_run():
  from nash_jax import arena, fit, train

  assert [job.run.__module__ for job in (train, fit, arena)] == [
    "nash_jax.train",
    "nash_jax.fit",
    "nash_jax.jobs.arena",
  ]


def test_win_rates_say_which_are_significant():
  from nash_jax import arena

  wins = np.ones((20, 1, 1, 1, 1))  # 20 prompts, all won
  assert arena.win_rates(wins, wins > 0)["significant"].item() is True
  assert arena.win_rates(wins / 2, wins > 0)["significant"].item() is False


def test_games_are_solved_and_measured():
  from nash_jax.games import preference, solvers, zoo

  np.testing.assert_array_equal(zoo.rock_paper_scissors(1, 1, 1).p_win, CYCLE)
  np.testing.assert_array_equal(preference.from_payoff(2 * CYCLE - 1), CYCLE)
  np.testing.assert_allclose(preference.equilibrium(CYCLE, UNIFORM, 0.1), UNIFORM, atol=1e-6)
  np.testing.assert_allclose(preference.nash_equilibrium(CYCLE), UNIFORM, atol=1e-6)
  np.testing.assert_allclose(preference.suboptimality(CYCLE, UNIFORM, UNIFORM, 0.1), 0, atol=1e-6)
  ref = np.array([0.2, 0.3, 0.5])
  logp, _ = solvers.solve("nash_mp", CYCLE, ref, beta=0.1, iterations=200)
  star = preference.equilibrium(CYCLE, ref, 0.1)
  np.testing.assert_allclose(np.exp(logp), star, atol=1e-5)
  assert np.abs(star - UNIFORM).max() > 0.01


def test_presets_have_shapes():
  from nash_jax.models import gemma

  model_config = gemma.preset("tiny", num_embed=48)
  assert gemma.shapes(model_config)["embedder"]["input_embedding"].shape == (48, 16)

"""Running a solver: symmetries, batches, schedules, draws, names, and what is refused."""

import functools

import jax
import numpy as np
import pytest
from small_games import BOTH, random_game, suboptimality

from nash_jax.games import preference, solvers
from nash_jax.objectives.algorithms import ALGORITHMS


@pytest.mark.parametrize(("updates", "method"), BOTH)
def test_renaming_actions_renames_the_answer(updates, method):
  game = random_game(20, beta=0.3)
  order = np.array([3, 0, 4, 1, 2])
  renamed = solvers.Game(game.p_win[order][:, order], game.log_ref[order], game.beta)
  one, other = (
    np.asarray(
      solvers.solve(method, g.p_win, np.exp(g.log_ref), beta=0.3, iterations=20, updates=updates)[0]
    )
    for g in (game, renamed)
  )
  np.testing.assert_allclose(one[order], other, atol=1e-12)
  assert np.abs(one - game.log_ref).max() > 1e-3


@pytest.mark.parametrize(("updates", "method"), BOTH)
def test_contexts_do_not_touch_each_other(updates, method):
  game = random_game(21, contexts=3)
  together, curve = solvers.solve(
    method, game.p_win, np.exp(game.log_ref), beta=0.1, iterations=20, updates=updates
  )
  alone = [
    solvers.solve(method, p, np.exp(r), beta=0.1, iterations=20, updates=updates)
    for p, r in zip(game.p_win, game.log_ref, strict=True)
  ]
  np.testing.assert_allclose(together, np.stack([a[0] for a in alone]), atol=1e-12)
  np.testing.assert_allclose(curve, np.mean([a[1] for a in alone], 0), atol=1e-12)


def test_a_grid_over_games_and_knobs_is_one_call_and_one_compilation():
  games = jax.tree.map(lambda *leaves: np.stack(leaves), *[random_game(s) for s in range(3)])
  steps = np.array([0.1, 0.5, 1.5])

  def one(game, step):
    knobs = solvers.Knobs(step, 0.2, 1.0, 0.25)
    return solvers.run("nash_mp", "proximal", game, knobs, jax.random.key(0), points=30)[1]

  grid = jax.jit(jax.vmap(jax.vmap(one, (None, 0)), (0, None)))
  curves = np.asarray(grid(games, steps))
  assert curves.shape == (3, 3, 30)
  single, _ = _solve_curve(random_game(1), 0.5)
  np.testing.assert_allclose(curves[1, 1], single, rtol=1e-9, atol=1e-20)
  grid(games, steps / 2)
  assert grid._cache_size() == 1


def _solve_curve(game, step):
  logp, curve = solvers.solve(
    "nash_mp", game.p_win, np.exp(game.log_ref), beta=0.1, iterations=30, step=step
  )
  return curve, logp


def test_schedules_are_read_at_their_iteration():
  assert solvers.harmonic(3)[0] == 1.0
  np.testing.assert_array_equal(solvers.periodic(2, 5), [0, 1, 0, 1, 0])
  game = random_game(22)
  constant, _ = solvers.solve(
    "mmd", game.p_win, np.exp(game.log_ref), beta=0.1, iterations=6, step=0.4
  )
  listed, _ = solvers.solve(
    "mmd", game.p_win, np.exp(game.log_ref), beta=0.1, iterations=6, step=np.full(6, 0.4)
  )
  np.testing.assert_array_equal(constant, listed)
  halted, _ = solvers.solve(
    "mmd",
    game.p_win,
    np.exp(game.log_ref),
    beta=0.1,
    iterations=6,
    step=np.array([0.4, 0.4, 0.4, 1e-300, 1e-300, 1e-300]),
  )
  three, _ = solvers.solve(
    "mmd", game.p_win, np.exp(game.log_ref), beta=0.1, iterations=3, step=0.4
  )
  np.testing.assert_allclose(halted, three, atol=1e-15)


def test_the_same_key_draws_the_same_run():
  game = random_game(23)
  runs = [
    solvers.solve(
      "nash_mp_ema",
      game.p_win,
      np.exp(game.log_ref),
      beta=0.1,
      iterations=20,
      batch=4,
      key=jax.random.key(seed),
    )[0]
    for seed in (0, 0, 1)
  ]
  np.testing.assert_array_equal(runs[0], runs[1])
  assert np.abs(np.subtract(runs[0], runs[2])).max() > 1e-3


def test_the_curve_is_sampled_without_changing_the_run():
  game = random_game(24)
  fine, curve = solvers.solve("egpo", game.p_win, np.exp(game.log_ref), beta=0.1, iterations=20)
  coarse, points = solvers.solve(
    "egpo", game.p_win, np.exp(game.log_ref), beta=0.1, iterations=20, every=5
  )
  np.testing.assert_array_equal(fine, coarse)
  np.testing.assert_array_equal(np.asarray(curve)[4::5], points)


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    ({"method": "nash"}, "choices: egpo, fictitious_play"),
    ({"method": "mwu", "updates": "gradient"}, "choices: proximal"),
    ({"updates": "proximal", "batch": 3}, "batch=0"),
    ({"method": "reg_self_play", "beta": 0.0}, "give step"),
    ({"method": "nash_md", "beta": 0.0}, "give step"),
    ({"iterations": 5, "every": 2}, "multiple"),
    ({"step": np.ones(4)}, "iterations=6"),
    ({"ref": np.array([0.5, 0.5, 0, 0, 0])}, "full support"),
    ({"p_win": np.ones((5, 5))}, "worst entry"),
  ],
)
def test_bad_arguments_are_refused_with_the_choices(arguments, words):
  given = {
    "method": "nash_mp",
    "p_win": np.full((5, 5), 0.5),
    "ref": np.full(5, 0.2),
    "beta": 0.1,
    "iterations": 6,
  } | arguments
  with pytest.raises(ValueError, match=words):
    solvers.solve(given.pop("method"), given.pop("p_win"), given.pop("ref"), **given)


def test_gradient_methods_have_their_names_in_training():
  """But for mmd, which training knows as inpo."""
  assert set(solvers.GRADIENT) - {"mmd"} <= set(ALGORITHMS)


@pytest.mark.parametrize(
  ("method", "options", "same"),
  [
    ("nash_mp", {"updates": "gradient"}, ["nash_mp_ema"]),
    ("nash_mp", {"updates": "gradient", "inner": 5}, ["nash_mp_two_step", "nash_mp_approximate"]),
    ("nash_mp", {"updates": "gradient", "batch": 4}, ["nash_mp_ema"]),
  ],
)
def test_the_forms_of_nash_mp_are_said_by_arguments_and_known_by_other_names(method, options, same):
  game = random_game(26)
  run = functools.partial(
    solvers.solve, p_win=game.p_win, ref=np.exp(game.log_ref), beta=0.1, iterations=8, kappa=0.3
  )
  logp, curve = run(method, **options)
  for name in same:
    other, other_curve = run(name, **{k: v for k, v in options.items() if k != "updates"})
    np.testing.assert_array_equal(logp, other)
    np.testing.assert_array_equal(curve, other_curve)
  exact, _ = run(method)
  assert np.abs(np.subtract(exact, logp)).max() > 1e-3
  with pytest.raises(ValueError, match="has no updates='proximal'"):
    run(same[0], updates="proximal")


@pytest.mark.parametrize("contexts", [None, 3])
def test_the_names_others_build_on(contexts):
  game = random_game(25, contexts=contexts)
  ref = np.exp(game.log_ref)
  star = preference.equilibrium(game.p_win, ref, 0.1)
  logp, curve = solvers.solve("nash_mp", game.p_win, ref, beta=0.1, iterations=300, step=None)
  assert star.shape == logp.shape == ref.shape
  assert curve.shape == (300,)
  np.testing.assert_allclose(np.exp(logp), star, atol=1e-12)
  found = suboptimality(game.p_win, star, ref, 0.1)
  assert found.shape == ()
  assert float(found) < 1e-24

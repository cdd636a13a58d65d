import jax
import numpy as np
import pytest

from nash_jax.games import contextual, preference, solvers


def _games(seeds, **changes):
  sizes = {"contexts": 2, "actions": 4, "rank": 2, "strength": 2.0, "beta": 0.1} | changes
  return jax.device_get(contextual.make_games(seeds, **sizes))


def test_the_contextual_game_has_the_paper_s_form_and_no_bradley_terry_fit():
  games = _games(range(2), actions=6)
  logits = np.log(games.p_win / (1 - games.p_win))
  np.testing.assert_allclose(logits, -np.swapaxes(logits, -1, -2), atol=1e-12)
  shared = np.concatenate(list(logits[0]), 1)  # U and V are shared by contexts, Θ_x is not
  assert np.linalg.matrix_rank(shared, tol=1e-9) <= 4
  assert not np.allclose(logits[0, 0], logits[0, 1])
  assert np.asarray(jax.jit(preference.cyclic_energy)(games.p_win)).min() > 0.05


def test_one_unit_of_a_grid_s_step_moves_every_gradient_method_alike_near_the_reference():
  games = _games([0], strength=0.1, beta=1.0)
  game = jax.tree.map(lambda leaf: leaf[0], games)
  moves = []
  for method in ("reg_self_play", "online_ipo", "online_dpo", "mmd"):
    scale = solvers.unit(method, "gradient", 1.0)
    logp, _ = solvers.solve(
      method,
      game.p_win,
      np.exp(game.log_ref),
      beta=1.0,
      iterations=1,
      updates="gradient",
      step=1e-3 * scale,
    )
    moves.append(np.asarray(logp) - game.log_ref)
  for move in moves[1:]:
    np.testing.assert_allclose(move, moves[0], atol=1e-9)
  assert np.abs(moves[0]).max() > 1e-7


def test_a_race_tunes_on_other_games_and_keeps_the_best_of_its_grid():
  tuning, games = _games([5, 6]), _games(range(3))
  entrant = contextual.Entrant(
    "x", "nash_mp_ema", "gradient", {"eta": (0.1, 1.0), "kappa": ("harmonic", 0.3)}
  )
  outcomes = contextual.race(entrant, tuning, games, steps=[0.1, 4.0], horizons=[20, 40], points=10)

  def solved(on, horizon, setting):  # what solve does with these knobs
    schedule = solvers.harmonic(horizon) if setting["kappa"] == "harmonic" else setting["kappa"]
    return [
      solvers.solve(
        "nash_mp_ema",
        p_win,
        np.exp(log_ref),
        beta=0.1,
        iterations=horizon,
        every=horizon // 10,
        step=setting["step"],
        eta=setting["eta"],
        kappa=schedule,
      )[1]
      for p_win, log_ref in zip(*on[:2], strict=True)
    ]

  for horizon, (best, outcome, curves) in zip((20, 40), outcomes, strict=True):
    assert len(outcome) == 8
    assert best == min(outcome, key=lambda row: row[1])[0]
    final = np.array(solved(tuning, horizon, outcome[-1][0]))[:, -1]  # of the one tuning run
    np.testing.assert_allclose(outcome[-1][1], np.log10(final).mean(), rtol=1e-9)
    np.testing.assert_allclose(curves, solved(games, horizon, best), rtol=1e-9)


def test_a_sampled_race_runs_in_float32_and_draws_differ_between_seeds():
  games = _games([0, 0, 0])  # the same game three times
  entrant = contextual.Entrant("x", "reg_self_play", "gradient", {}, batch=2)
  ((_, _, curves),) = contextual.race(entrant, games, games, steps=[1.0], horizons=[20], points=5)
  assert curves.dtype == np.float32
  assert len(np.unique(curves[:, -1])) == 3


def test_a_diverged_setting_loses():
  assert contextual.score([[1e-3, 1e-3], [np.nan, 1e-9], [np.inf, np.inf]]).argmin() == 0


def test_intervals_hold_the_mean_and_narrow_with_seeds():
  rng = np.random.default_rng(0)
  few, many = (10 ** rng.normal(-3, 0.5, size=n) for n in (10, 1000))
  mean, low, high = contextual.interval(many)
  assert low < 1e-3 < high
  assert low < mean < high
  assert np.log(high / low) < np.log(np.divide(*contextual.interval(few)[:0:-1]))


def test_the_reference_gap_is_where_curves_start():
  games, suboptimality = _games(range(2)), jax.jit(preference.suboptimality)
  expected = [
    suboptimality(p, np.exp(r), np.exp(r), 0.1)
    for p, r in zip(games.p_win, games.log_ref, strict=True)
  ]
  np.testing.assert_allclose(contextual.reference_gap(games), expected, rtol=1e-12)


def test_unknown_knobs_are_refused():
  entrant = contextual.Entrant("x", "nash_md", "gradient", {"mixtures": (0.1,)})
  with pytest.raises(ValueError, match="choices: eta, kappa, mixture"):
    contextual.grid(entrant, [1.0], 0.1, 10)

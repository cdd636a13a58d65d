"""Payoffs, weights, games of the zoo, races and studies out of their range are refused."""

import importlib

import numpy as np
import pytest
from refusals import refused

from nash_jax.games import contextual, preference, study, zoo

P = zoo.random_game(0, 3).p_win


# Payoffs.


@pytest.mark.parametrize(
  ("payoff", "words"),
  [
    ([[0, 1], [1, 0]], r"worst pair: payoff\[0, 1\] = 1 against payoff\[1, 0\] = 1"),
    ([[0.5, 0.9], [0.1, 0.5]], "win probabilities is a game already"),
    ([[0.1, 0.5], [-0.5, 0]], r"payoff\[0, 0\] = 0.1"),
    ([[0, 1e-9], [1e-9, 0]], "worst pair"),
    ([[0, 1e9], [-1e9, 0]], r"\[-1, 1\].*Divide"),
    ([[0, np.nan], [np.nan, 0]], "nan"),
    ([[0, np.inf], [-np.inf, 0]], "inf"),
    ([[0, 1, 0], [-1, 0, 0]], r"\[A A\]"),
    ([[False, True], [True, False]], "real numbers"),
    ([], r"\[A A\]"),
  ],
)
def test_a_payoff_of_another_game_is_refused_with_its_worst_pair(payoff, words):
  refused(lambda: preference.from_payoff(payoff), words)


def test_a_rounded_payoff_is_made_antisymmetric():
  payoff = np.array([[0, 0.333333, -1.0], [-0.333334, 0, 0.5], [1.0, -0.5, 0]])
  game = preference.from_payoff(payoff)
  np.testing.assert_array_equal(game + game.T, 1)
  np.testing.assert_allclose(game, 0.5 + payoff / 2, atol=1e-6)
  np.testing.assert_array_equal(preference.from_payoff([[0, 1], [-1, 0]]), [[0.5, 1], [0, 0.5]])


@pytest.mark.parametrize(
  "weights",
  [
    np.ones((2, 2)),
    -np.ones((3, 3)),
    np.full((3, 3), np.nan),
    np.zeros((3, 3)),
    np.full((3, 3), 1e308),
    [[True] * 3] * 3,
    np.eye(3),
  ],
)
def test_weights_of_pairs_that_are_none_are_refused(weights):
  refused(lambda: preference.bradley_terry(P, weights), "weights")
  refused(lambda: preference.intransitive_residue(P, weights), "weights")


def test_a_ridge_that_keeps_nothing_finite_is_refused():
  for ridge in (0, -1.0, np.nan):
    refused(lambda ridge=ridge: preference.bradley_terry(P, ridge=ridge), "ridge")


# The zoo.


@pytest.mark.parametrize(
  ("call", "words"),
  [
    (lambda: zoo.rock_paper_scissors(np.nan), "rock"),
    (lambda: zoo.rock_paper_scissors(1, -1), "paper"),
    (lambda: zoo.rock_paper_scissors(1, 1, 2), "scissors"),
    (lambda: zoo.rock_paper_scissors(0, 0, 0), "sum|\\+"),
    (lambda: zoo.condorcet_cycle(0), "actions"),
    (lambda: zoo.condorcet_cycle(3.0), "actions"),
    (lambda: zoo.condorcet_cycle(3, 1.5), "p_cycle"),
    (lambda: zoo.condorcet_cycle(3, np.nan), "p_cycle"),
    (lambda: zoo.dice({}), "die"),
    (lambda: zoo.dice({"A": []}), "faces of A"),
    (lambda: zoo.dice({"A": (1, np.nan)}), "faces of A"),
    (lambda: zoo.population([[1, np.nan]]), "utilities"),
    (lambda: zoo.population([1, 2]), "utilities"),
    (lambda: zoo.population([[1, 2]], [-1.0]), "weights"),
    (lambda: zoo.population([[1, 2]], [0.0]), "weights"),
    (lambda: zoo.population([[1, 2]], [1, 2]), "weights"),
    (lambda: zoo.majority([[np.inf, np.inf]]), "utilities"),
    (lambda: zoo.blotto(0), "soldiers"),
    (lambda: zoo.blotto(5, 0), "fields"),
    (lambda: zoo.blotto(1000, 5), "10,000"),
    (lambda: zoo.random_game(-1, 3), "seed"),
    (lambda: zoo.random_game(0, 0), "actions"),
    (lambda: zoo.random_game(0, 3, rank=0), "rank"),
    (lambda: zoo.random_game(0, 3, strength=np.nan), "strength"),
    (lambda: zoo.random_game(0, 3, cyclicity=2), "cyclicity"),
    (lambda: zoo.random_game(0, 3, contexts=-1), "contexts"),
    (lambda: zoo.planted(0, [0.5, 0.5, 0.0]), "nash"),
    (lambda: zoo.planted(0, [1.0, 2.0]), "nash"),
  ],
)
def test_a_zoo_game_out_of_its_range_is_refused(call, words):
  refused(call, words)


def test_zoo_games_at_the_ends_of_their_ranges_are_what_they_say():
  certain = zoo.random_game(0, 4, strength=1e6)
  assert set(np.unique(certain.p_win)) == {0.0, 0.5, 1.0}
  for actions in (1, 2):
    np.testing.assert_array_equal(zoo.planted(0, np.full(actions, 1 / actions)).p_win, 0.5)
  degenerate = zoo.rock_paper_scissors(1, 1, 0)
  assert "not unique" in degenerate.note
  assert float(preference.exploitability(degenerate.p_win, degenerate.nash)) == 0


# Races and studies.


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"steps": []}, "step"),
    ({"steps": [np.nan]}, "step"),
    ({"steps": [0.0]}, "step"),
    ({"horizons": []}, "horizons"),
    ({"horizons": [0]}, "horizons"),
    ({"horizons": [7]}, "points"),
    ({"points": 0}, "points"),
    ({"knobs": {"eta": [0.0]}}, "eta"),
    ({"knobs": {"eta": []}}, "eta"),
    ({"knobs": {"kappa": [2.0]}}, "kappa"),
    ({"knobs": {"kappa": ["slow"]}}, "kappa"),
    ({"method": "nash"}, "method"),
  ],
)
def test_a_race_refuses_what_it_cannot_run(changes, words):
  games = contextual.make_games([0], contexts=None, actions=3, rank=2, strength=1.0, beta=0.1)
  settings = {"steps": [1.0], "horizons": [10], "points": 5} | changes
  entrant = contextual.Entrant(
    "x", settings.pop("method", "nash_mp_ema"), "gradient", settings.pop("knobs", {})
  )
  refused(lambda: contextual.race(entrant, games, games, **settings), words)


def test_an_interval_of_one_seed_or_of_nan_is_refused_and_a_diverged_one_is_infinite():
  refused(lambda: contextual.interval([1e-3]), "two seeds")
  refused(lambda: contextual.interval([1e-3, np.nan]), "values")
  refused(lambda: contextual.interval([1e-3, -1e-3]), "values")
  refused(lambda: contextual.score([]), "values")
  values = np.array([[1e-3, 1e-3], [np.inf, 1e-3], [1e-3, 1e-3]])
  for bound in contextual.interval(values):
    np.testing.assert_allclose(bound, [np.inf, 1e-3])


@pytest.mark.parametrize(
  "name", ["theorem", "rates", "figure", "map", "approximation", "bradley_terry"]
)
def test_every_number_of_a_study_s_config_is_checked_before_it_runs(name, tmp_path):
  module = importlib.import_module(f"nash_jax.configs.games.{name}")
  for field, given in module.get_config("smoke").items():
    number = given[0] if isinstance(given, tuple) and given else given
    if isinstance(number, (int, float)) and field != "extra_votes":
      for bad in (np.nan, -1, np.inf):
        config = module.get_config("smoke")
        with config.ignore_type():
          config[field] = (bad,) if isinstance(given, tuple) else bad
        refused(lambda config=config: study.run(config, tmp_path), field)
  assert not list(tmp_path.iterdir())

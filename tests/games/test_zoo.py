import itertools
import json

import jax
import numpy as np
import pytest

from nash_jax.games import preference, zoo

cyclic_energy, exploitability = map(jax.jit, (preference.cyclic_energy, preference.exploitability))
GAMES = {game.name: game for game in zoo.menagerie()}


@pytest.mark.parametrize("name", GAMES)
def test_what_is_known_of_each_game_is_true(name):
  game = GAMES[name]
  preference.validate(game.p_win, atol=1e-12)
  assert len(game.labels) == len(game.p_win)
  if game.nash is not None:
    assert abs(float(exploitability(game.p_win, game.nash))) < 1e-14
  if "unique" in game.note and "not unique" not in game.note:
    np.testing.assert_allclose(preference.nash_equilibrium(game.p_win), game.nash, atol=1e-9)


def test_dice_of_efron_beat_their_neighbour_by_two_to_one():
  p_win = zoo.dice(zoo.EFRON).p_win
  np.testing.assert_allclose([p_win[i, (i + 1) % 4] for i in range(4)], 2 / 3)


def test_types_cycle_at_two_thirds_and_the_majority_of_them_at_one():
  orders = [np.roll(np.arange(3), k) for k in range(3)]
  mixed, ruled = zoo.population(orders).p_win, zoo.majority(orders).p_win
  np.testing.assert_allclose(np.sort(mixed[0]), [1 / 3, 1 / 2, 2 / 3])
  np.testing.assert_allclose(np.sort(ruled[0]), [0, 1 / 2, 1])
  np.testing.assert_array_equal(mixed > 0.5, ruled > 0.5)


def test_a_type_that_ties_splits_its_vote():
  p_win = zoo.population([[1, 1], [0, 1]], weights=[3, 1]).p_win
  np.testing.assert_allclose(p_win, [[0.5, 0.375], [0.625, 0.5]])


def test_blotto_by_its_rules_and_symmetric_in_its_fields():
  game = zoo.blotto(4, 3)
  at = {plan: i for i, plan in enumerate(game.labels)}
  assert len(at) == 15
  assert game.p_win[at[2, 2, 0], at[4, 0, 0]] == 0.5  # one field each, one tied
  assert game.p_win[at[1, 2, 1], at[4, 0, 0]] == 1.0
  nash = np.asarray(preference.nash_equilibrium(game.p_win))
  orders = list(itertools.permutations(range(3)))
  mean = sum(nash[[at[tuple(plan[i] for i in order)] for plan in game.labels]] for order in orders)
  assert abs(float(exploitability(game.p_win, mean / len(orders)))) < 1e-9


def test_blotto_of_many_fields_makes_no_more_than_its_allocations():
  game = zoo.blotto(soldiers=2, fields=30)  # of 3³⁰ rows of 0, 1 and 2
  assert len(game.p_win) == len(set(game.labels)) == 465
  assert {sum(plan) for plan in game.labels} == {2}
  assert game.labels == tuple(sorted(game.labels))


def test_random_games_have_the_rank_and_cyclicity_asked_for():
  game = zoo.random_game(0, 30, rank=2, cyclicity=1.0)
  logits = np.log(game.p_win / (1 - game.p_win))
  assert np.linalg.matrix_rank(logits, tol=1e-8) == 4  # A - Aᵀ with A of rank 2
  energies = [
    float(cyclic_energy(zoo.random_game(0, 30, cyclicity=c).p_win)) for c in (0.0, 0.5, 1.0)
  ]
  assert energies[0] < 0.05 < energies[1] < energies[2]
  assert zoo.random_game(0, 5, contexts=3).p_win.shape == (3, 5, 5)


def test_strength_is_a_factor_of_the_log_odds_whatever_they_are_normalised_by():
  def log_odds(**options):
    p_win = zoo.random_game(3, 6, rank=9, contexts=2, **{"strength": 0.1} | options).p_win
    return np.log(p_win / (1 - p_win))

  np.testing.assert_allclose(log_odds(strength=0.2), 2 * log_odds(), atol=1e-12)
  by_rank = log_odds(normalisation="rank")
  np.testing.assert_allclose(log_odds(normalisation="rank", strength=0.2), 2 * by_rank, atol=1e-12)
  np.testing.assert_allclose(log_odds(), 3 * by_rank, atol=1e-12)
  spread = zoo.random_game(0, 200, rank=9, normalisation="rank").p_win
  spread = np.log(spread / (1 - spread))[np.triu_indices(200, 1)]
  assert 0.8 < spread.std() / 2**0.5 < 1.2  # of A - Aᵀ, whose entries of A have variance 1
  with pytest.raises(ValueError, match="'root', expected one of rank, sqrt_rank"):
    zoo.random_game(0, 3, normalisation="root")


def test_even_cycles_are_refused():
  with pytest.raises(ValueError, match="odd"):
    zoo.condorcet_cycle(4)


def test_votes_are_read_with_ties_unseen_pairs_and_a_prior(tmp_path):
  path = tmp_path / "votes.csv"
  path.write_text("left,right,winner\na,b,left\nb,a,tie\na,b,left\nb,c,right\n")
  game = zoo.load_votes(path)
  assert game.labels == ("a", "b", "c")
  np.testing.assert_allclose(game.p_win, [[0.5, 2.5 / 3, 0.5], [0.5 / 3, 0.5, 0], [0.5, 1, 0.5]])
  assert zoo.load_votes(path, prior=2.0).p_win[2, 1] == pytest.approx(2 / 3)
  path.write_text("left,right,winner\na,b,a\n")
  with pytest.raises(ValueError, match="left, right, tie"):
    zoo.load_votes(path)


def test_measured_games_load_and_agree_with_what_is_recorded_of_them(games_dir):
  paths = sorted(games_dir.glob("*.json"))
  assert paths
  for path in paths:
    game, stats = zoo.load_json(path), json.loads(path.read_text())["stats"]
    assert float(cyclic_energy(game.p_win)) == pytest.approx(
      stats["cyclic_energy_fraction"], abs=1e-4
    )
    assert float(exploitability(game.p_win, game.nash)) < 1e-6
    if stats["nash_coordinate_width"] == 0:
      np.testing.assert_allclose(preference.nash_equilibrium(game.p_win), game.nash, atol=1e-4)


def test_raw_crowd_votes_give_the_stored_matrix(games_dir):
  table = games_dir.parent / "llmfao" / "crowd-comparisons.csv"
  stored = games_dir / "llmfao_crowd_59.json"
  if not (table.exists() and stored.exists()):
    pytest.skip(f"needs {table} and {stored}")
  votes, game = zoo.load_votes(table), zoo.load_json(stored)
  assert votes.labels == game.labels
  np.testing.assert_array_equal(votes.votes, game.votes)
  np.testing.assert_allclose(votes.p_win, game.p_win, atol=1e-6)

"""Games of imperfect information as arrays, and what their policies are worth."""

import json
import subprocess
import sys

import kuhn as rules
import numpy as np
import pytest

from nash_jax.games import exact, trees


@pytest.fixture(scope="module")
def kuhn():
  return trees.load("kuhn_poker")


@pytest.fixture(scope="module")
def leduc():
  return trees.load("leduc_poker")


def _random(tree, seed):
  policy = trees.legal(tree) * np.random.default_rng(seed).exponential(size=trees.legal(tree).shape)
  return policy / policy.sum(1, keepdims=True)


def _tabular(tree, policy):
  """The policy as OpenSpiel holds it."""
  from open_spiel.python import policy as policies

  game = trees.openspiel().load_game(tree.name)
  tabular, rows = policies.TabularPolicy(game), trees.by_label(tree, policy)
  tabular.action_probability_array[:] = 0
  for label, names in zip(tree.labels, tree.names, strict=True):
    tabular.action_probability_array[tabular.state_lookup[label], list(names)] = rows[label]
  return game, tabular


@pytest.mark.parametrize(
  ("name", "nodes", "sets", "actions", "decisions", "bounds"),
  [
    ("kuhn_poker", 58, 6, 12, (2, 1), (-2, 2)),
    ("leduc_poker", 9457, 468, 1092, (4, 4), (-13, 13)),
    pytest.param("liars_dice", 294_883, 12_288, 24_570, (7, 6), (-1, 1), marks=pytest.mark.slow),
  ],
)
def test_games_of_openspiel_have_their_sizes(name, nodes, sets, actions, decisions, bounds):
  tree = trees.load(name)
  assert len(tree.player) == nodes
  for player in (0, 1):
    own = tree.owner == player
    assert (own.sum(), tree.actions[own].sum()) == (sets, actions)
    assert tree.depth[own].max() + 1 == decisions[player]
  assert (tree.low, tree.high) == bounds


def test_children_follow_their_first_and_parents_lie_before_them(leduc):
  inner = np.flatnonzero(leduc.children)
  for node in inner[::97]:
    children = leduc.first[node] + np.arange(leduc.children[node])
    assert (leduc.parent[children] == node).all()
    np.testing.assert_array_equal(leduc.slot[children], np.arange(len(children)))
    if leduc.player[node] == trees.CHANCE:
      assert leduc.chance[children].sum() == pytest.approx(1, abs=1e-14)
  assert (leduc.before < np.arange(len(leduc.before))).all()


@pytest.mark.parametrize("name", ["kuhn_poker", "leduc_poker"])
def test_the_gap_and_the_value_are_those_of_openspiel(name):
  from open_spiel.python.algorithms import best_response, expected_game_score, exploitability

  tree = trees.load(name)
  for policy in [_random(tree, 1)] + [trees.uniform(tree)] * (name == "kuhn_poker"):
    game, tabular = _tabular(tree, policy)
    scale = tree.high - tree.low
    theirs = exploitability.nash_conv(game, tabular, use_cpp_br=True) / scale
    assert exact.gap(tree, policy) == pytest.approx(theirs, abs=1e-12)
    values = expected_game_score.policy_value(game.new_initial_state(), [tabular, tabular])
    assert exact.value(tree, policy) == pytest.approx(values[0], abs=1e-12)
    if name == "kuhn_poker":
      for player in (0, 1):
        response = best_response.BestResponsePolicy(game, player, tabular)
        theirs = response.value(game.new_initial_state())
        ours = exact.value(tree, exact.best_response(tree, policy, player).policy)
        assert ours * (1, -1)[player] == pytest.approx(theirs, abs=1e-12)


@pytest.mark.slow
def test_the_gap_in_liars_dice_is_that_of_openspiel():
  tree, spiel = trees.load("liars_dice"), trees.openspiel()
  assert exact.gap(tree, trees.uniform(tree)) == pytest.approx(0.7807, abs=1e-4)
  policy = _random(tree, 1)
  rows, labelled = trees.by_label(tree, policy), zip(tree.labels, tree.names, strict=True)
  theirs = {s: list(zip(names, rows[s], strict=True)) for s, names in labelled}
  gap = spiel.nash_conv(spiel.load_game(tree.name), spiel.TabularPolicy(theirs)) / 2
  assert exact.gap(tree, policy) == pytest.approx(gap, abs=1e-12)


@pytest.mark.parametrize(("name", "gap"), [("kuhn", 0.2292), ("leduc", 0.1826)])
def test_the_uniform_policies_have_their_gap(name, gap, request):
  tree = request.getfixturevalue(name)
  assert exact.gap(tree, trees.uniform(tree)) == pytest.approx(gap, abs=1e-4)


@pytest.mark.parametrize(("name", "value"), [("kuhn", -1 / 18), ("leduc", -0.0856064)])
def test_the_linear_program_finds_the_value_and_an_equilibrium(name, value, request):
  tree = request.getfixturevalue(name)
  found = exact.solve(tree)
  assert found.value == pytest.approx(value, abs=1e-7)
  assert exact.value(tree, found.policy) == pytest.approx(found.value, abs=1e-9)
  assert exact.gap(tree, found.policy) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("player", [0, 1])
def test_a_plans_loss_is_linear_and_one_minus_its_scaled_value(leduc, player):
  policy = _random(leduc, 2)
  loss, constant = exact.losses(leduc, policy, player)
  plan = policy.copy()
  for sets in trees.levels(leduc.depth)[1:]:
    plan[sets] *= plan[leduc.before[sets], leduc.choice[sets]][:, None]
  total = (loss * plan)[leduc.owner == player].sum() + constant
  scaled = (exact.value(leduc, policy) - leduc.low) / (leduc.high - leduc.low)
  assert total == pytest.approx(scaled if player else 1 - scaled, abs=1e-14)


def test_a_file_by_the_rules_is_the_game_of_openspiel(kuhn, tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "pyspiel", None)  # not needed
  path = tmp_path / "kuhn.json"
  path.write_text(json.dumps(rules.game()))
  ours = trees.load_json(path)
  for field in trees.Tree._fields:
    if field != "names":
      np.testing.assert_array_equal(getattr(ours, field), getattr(kuhn, field), err_msg=field)
  with pytest.raises(ValueError, match=r"open_spiel: expected this package.*nash_jax\[games\]"):
    trees.load("kuhn_poker")


def test_a_history_without_a_decision_counts_as_well():
  """Half of the time chance decides alone; the first player's loss there is a constant."""
  second = {"player": 2, "sees": "b", "actions": {"l": -1, "r": 1}}
  guess = {"player": 1, "sees": "a", "actions": {"l": 1, "r": second}}
  tree = trees.build("half", {"chance": [[0.5, guess], [0.5, -1]]}, trees._expand_json)
  assert exact.losses(tree, trees.uniform(tree), 0)[1] == 0.5
  assert exact.solve(tree).value == pytest.approx(0, abs=1e-12)
  assert exact.gap(tree, exact.solve(tree).policy) == pytest.approx(0, abs=1e-12)
  assert exact.value(tree, trees.uniform(tree)) == 0.5 * 0.5 - 0.5


def test_what_the_extra_brings_is_imported_where_it_is_used():
  code = "import sys; from nash_jax.games import regret, solvers, study, trees\n"
  code += "print({'pyspiel', 'numba', 'matplotlib'} & {*sys.modules})"
  done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True)
  assert done.stdout == "set()\n"


LEAF = {"player": 2, "sees": "y", "actions": {"l": 1, "r": -1}}


@pytest.mark.parametrize(
  ("tree", "message"),
  [
    (
      {"player": 1, "sees": "x", "actions": {
        "l": {"player": 1, "sees": "z", "actions": {"l": 1, "r": LEAF}},
        "r": {"player": 1, "sees": "z", "actions": {"l": 1, "r": LEAF}}}},
      "information set 'z' of player 1: expected perfect recall: one own decision that leads to it,"
      " got \"'l' at 'x' and 'r' at 'x'\"",
    ),
    (
      {"player": 1, "sees": "x", "actions": {"l": LEAF, "r": LEAF | {"actions": {"l": 1}}}},
      "information set 'y' of player 2: expected the same actions at all of its nodes",
    ),
    (LEAF, "player 1 to decide somewhere, got 'never'"),
    (1, "player 1 to decide somewhere, got 'never'"),
    (
      {"player": 1, "sees": "x", "actions": {"l": LEAF | {"actions": {"l": 1, "r": 1}}, "r": 1}},
      "expected returns that differ, got '1 at every leaf'",
    ),
    ({"chance": [[0.5, LEAF], [0.4, LEAF]]}, "chance: expected positive probabilities that sum"),
    ({"chance": [[0.5, LEAF], 3]}, r"chance: expected \[\[p, tree\], ...\]"),
    ({"player": 3, "sees": "x", "actions": {"l": 1}}, "player: expected 1 or 2, got 3"),
    ({"player": 1, "sees": "x", "actions": {}}, "actions at 'x': expected at least one"),
    ({"player": 1, "sees": 2, "actions": {"l": 1}}, "sees: expected a string, got 2"),
    ({"player": 1, "actions": {"l": 1}}, "a tree: expected a number"),
    (True, "a tree: expected a number"),
    (float("nan"), "NaN is no number of JSON"),
    (10**400, "too large"),
  ],
)  # fmt: skip
def test_a_file_that_is_no_such_game_says_why(tree, message, tmp_path):
  path = tmp_path / "game.json"
  path.write_text(json.dumps({"name": "game", "tree": tree}))
  with pytest.raises(ValueError, match=message) as error:
    trees.load_json(path)
  assert str(error.value).startswith(f"{path}: ")


@pytest.mark.parametrize("chances", [(0.5, 0.4), (1.5, -0.5), ()])
def test_a_walk_refuses_chances_that_are_no_probabilities(chances):
  node = trees.Node(trees.CHANCE, chances=chances, children=("left", "right"))
  with pytest.raises(ValueError, match="game: chances: expected probabilities that sum to 1"):
    trees.build("game", "root", lambda _: node)


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("{", "1: no JSON"),
    ("[1]", 'expected an object with "name" and "tree"'),
    ('{"name": 3, "tree": 1}', 'expected an object with "name" and "tree"'),
    ('{"name": "game", "tree": 1e999}', "a leaf: expected a finite number, got inf"),
    ("[" * 100_000, "nested too deeply"),
  ],
)
def test_a_file_that_is_no_json_object_names_the_file(text, message, tmp_path):
  path = tmp_path / "game.json"
  path.write_text(text)
  with pytest.raises(ValueError, match=f"{path}:.*{message}"):
    trees.load_json(path)


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("kuhn_pokr", "did you mean 'kuhn_poker'"),
    ("kuhn_poker(cards=3)", "OpenSpiel refuses it: Unknown parameter 'cards'"),
    ("kuhn_poker(players=3)", "expected two players, got 3"),
    ("matrix_rps", "expected players who move in turns"),
    ("tiny_hanabi", "expected a zero-sum game"),
    ("liars_dice_ir(dice_sides=3)", "expected perfect recall: one own decision that leads to it"),
    ("leduc_poker", "expected at most 2,000 nodes, for memory"),
  ],
)
def test_a_game_that_does_not_fit_is_refused(name, message):
  with pytest.raises(ValueError, match=message):
    trees.load(name, most_nodes=2000)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda p: p[:-1], "a row for each information set of kuhn_poker"),
    (lambda p: p * 2, "summing to 1"),
  ],
)
def test_policies_of_another_shape_or_sum_are_refused(kuhn, change, message):
  with pytest.raises(ValueError, match=message):
    exact.gap(kuhn, change(trees.uniform(kuhn)))

import csv
import importlib
import json
import math
import resource

import numpy as np
import pytest

from nash_jax.games import convergence, solvers, study, trees


def _config(name, size="smoke"):
  return importlib.import_module(f"nash_jax.configs.games.{name}").get_config(size)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
  """Runs a study of the shipped configs at a small size; returns its tables by file name."""
  done = {}

  def run(name):
    if name not in done:
      config, folder = _config(name), tmp_path_factory.mktemp(name)
      study.run(config.lock(), str(folder))
      for figure in config.figures:
        assert (folder / f"{figure}.png").stat().st_size > 1000
        assert "<path" in (folder / f"{figure}.svg").read_text()
      done[name] = {path.stem: list(csv.DictReader(path.open())) for path in folder.glob("*.csv")}
    return done[name]

  return run


def test_an_unknown_study_lists_the_choices(tmp_path):
  config = _config("theorem")
  config.study = "theorems"
  with pytest.raises(
    ValueError, match="theorem, rates, figure, map, approximation, bradley_terry, trees"
  ):
    study.run(config, tmp_path)


def test_a_full_disk_is_one_line_that_names_the_folder(tmp_path, monkeypatch):
  rows = [{"value": i} for i in range(999)]
  monkeypatch.setitem(study.STUDIES, "bradley_terry", lambda config: {"bradley_terry": rows})
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
  try:
    with pytest.raises(ValueError, match=f"{tmp_path}: expected a folder that can be written"):
      study.run(_config("bradley_terry"), tmp_path)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("field", ["actions", "actions_steps"])
def test_one_action_is_no_game(tmp_path, field):
  config = _config("theorem")
  config.update({field: (1,) if field == "actions" else 1})
  with pytest.raises(ValueError, match=f"{field}: expected a whole number of at least 2, got 1"):
    study.run(config, tmp_path)


def test_the_theorem_holds_and_both_slopes_keep_their_promise(ran):
  rows = ran("theorem")["theorem_slopes"]
  assert len(rows) == 4
  for row in rows:
    assert float(row["worst_kl_over_bound"]) <= 1
    assert float(row["largest_kl_rise"]) < 0
    promised = -math.log1p(2 * float(row["beta"])) / 2
    assert float(row["promised_slope"]) == pytest.approx(promised, rel=1e-5)
    assert float(row["subopt_slope"]) < promised
    assert float(row["span_slope"]) < promised


def test_queries_are_counted_two_a_half_step_pair(ran):
  rows = ran("rates")["rates"]
  proximal = [r for r in rows if r["updates"] == "proximal"]
  at = {(r["method"], r["step_choice"], r["target"]): r for r in proximal}
  best, egpo = at["nash_mp", "best", "1e-06"], at["egpo", "best", "1e-06"]
  assert best["median_queries"] == egpo["median_queries"]  # tuned, they are one iteration
  config = _config("rates")
  (beta,), counts = config.betas, {"nash_mp": [], "mmd": []}
  games = convergence.games_of(config, range(config.games), beta=beta)
  for p_win, log_ref in zip(games.p_win, games.log_ref, strict=True):
    for method, count in counts.items():
      _, curve = solvers.solve(method, p_win, np.exp(log_ref), beta=beta, iterations=100)
      count.append(np.flatnonzero(np.asarray(curve) > 1e-3)[-1] + 2)  # the first index is step 1
  for method, cost in (("nash_mp", 2), ("mmd", 1)):
    queries = float(at[method, "theory", "0.001"]["median_queries"])
    assert queries == cost * np.median(counts[method])


def test_smaller_epsilons_need_more_queries(ran):
  rows = [r for r in ran("rates")["original_game"] if r["method"] == "NashMP"]
  queries = [float(r["median_queries"]) for r in rows]
  assert queries == sorted(queries)
  assert queries[-1] > queries[0]


def test_the_figure_keeps_versions_apart_and_stores_its_grid(ran):
  tables = ran("figure")
  versions = {"proximal updates", "exact gradients", "sampled, 8 pairs"}
  assert {r["version"] for r in tables["figure_tuned"]} == versions
  assert len(tables["figure_tuned"]) == 3 * 2  # versions, horizons
  assert len(tables["figure_grid"]) == 2 * (1 + 3 + 3)  # the gradient entrants try three η
  for row in tables["figure_finals"]:
    assert 0 < float(row["low95"]) <= float(row["mean"]) <= float(row["high95"])
  curve = [
    r
    for r in tables["figure_curves"]
    if r["horizon"] == "40" and r["version"] == "proximal updates" and r["method"] == "NashMP"
  ]
  assert [int(r["step"]) for r in curve] == list(range(0, 41, 4))
  assert float(curve[-1]["mean"]) < float(curve[0]["mean"])


def test_the_map_knows_that_online_ipo_is_self_play_in_exact_gradients(ran):
  rows = ran("map")["map"]
  final = {
    (r["batch"], r["strength"], r["step"], r["method"]): float(r["log10_subopt"]) for r in rows
  }
  for (batch, strength, step, method), value in final.items():
    if method == "self-play":
      other = final[batch, strength, step, "Online IPO"]
      assert (abs(value - other) < 1e-6) == (batch == "0")
  assert len(ran("map")["kappa_eta"]) == 2 * 1 * 2 * 1 * 1  # batches, corners, steps, η, κ
  for row in ran("map")["map_gain"]:
    if row["step"] != "best":
      cell = row["batch"], row["strength"], row["step"]
      gain = final[*cell, row["rival"]] - final[*cell, "NashMP"]
      assert float(row["gain"]) == pytest.approx(gain, abs=1e-4)


def test_the_lemma_s_errors_fall_in_both_directions(ran):
  rows = ran("approximation")["approximation"]
  inner = [float(r["error_half"]) for r in rows if r["against"] == "T"]
  batch = [float(r["error_half"]) for r in rows if r["against"] == "B"]
  assert inner == sorted(inner, reverse=True)
  assert inner[-1] < 1e-3 * inner[0]
  assert batch[-1] < batch[0] / 4  # 128 times the pairs: √128 = 11 in expectation


def test_a_reward_is_pure_brittle_and_bound_to_its_sampling_law(ran):
  rows = ran("bradley_terry")["bradley_terry"]
  cold = [r for r in rows if r["study"] == "beta"][-1]
  assert max(float(cold[f"reward_{y}"]) for y in range(3)) > 0.99
  assert max(float(cold[f"equilibrium_{y}"]) for y in range(3)) < 0.5
  even, one_more = [r for r in rows if r["study"] == "extra_votes"]
  assert abs(float(one_more["reward_0"]) - float(even["reward_0"])) > 0.5
  assert abs(float(one_more["equilibrium_0"]) - float(even["equilibrium_0"])) < 0.02
  even, skewed = [r for r in rows if r["study"] == "law"]
  assert abs(float(skewed["reward_0"]) - float(even["reward_0"])) > 0.5
  assert skewed["equilibrium_0"] == even["equilibrium_0"]


def test_five_methods_learn_kuhn_poker_from_episodes(ran):
  tables = ran("trees")
  assert set(tables) == {f"trees{x}" for x in ("", "_curves", "_slopes", "_tuned", "_grid")}
  gaps = {}
  for row in tables["trees"]:
    assert row["game"] == "kuhn_poker"
    gaps.setdefault(row["method"], {})[row["seed"], int(row["episodes"])] = float(row["gap"])
  methods = {"ixomd", "balanced_omd", "balanced_ftrl", "adaptive_ftrl", "tweaked_ftrl"}
  assert set(gaps) == methods | {"cfr_plus", "mccfr", "theory: balanced_ftrl"}
  for method in methods:
    for seed in ("0", "1"):
      assert gaps[method][seed, 20_000] < 0.229 / 3  # a third of the uniform policies' gap
  assert min(gaps["cfr_plus"].values()) < 0.01
  for row in tables["trees_slopes"]:
    curve = [r for r in tables["trees_curves"] if r["method"] == row["method"]]
    t, gap = np.log([(float(r["episodes"]), float(r["mean"])) for r in curve]).T
    assert int(row["points"]) == len(t)  # all lie in the last two decades
    expected = np.cov(t, gap)[0, 1] / np.var(t, ddof=1)
    assert float(row["slope"]) == pytest.approx(expected, rel=1e-4)
  tuned = {row["method"]: float(row["multiplier"]) for row in tables["trees_tuned"]}
  for method in methods:
    tried = {
      float(row["multiplier"]): float(row["gap"])
      for row in tables["trees_grid"]
      if row["method"] == method
    }
    assert tuned[method] == min(tried, key=tried.get)


def test_the_last_average_policies_are_written_as_openspiel_reads_them(tmp_path):
  config = _config("trees")
  config.update(methods=("ixomd",), theory=(), baselines=(), seeds=(3,), multipliers=(10.0,))
  study.run(config.lock(), tmp_path)
  (path,) = (tmp_path / "policies").iterdir()
  assert path.name == "kuhn_poker_ixomd_3.json"
  policy, game = json.loads(path.read_text()), trees.openspiel().load_game("kuhn_poker")
  theirs = trees.openspiel().TabularPolicy(
    {label: list(enumerate(row)) for label, row in policy.items()}
  )
  scaled = trees.openspiel().nash_conv(game, theirs) / 4
  last = list(csv.DictReader((tmp_path / "trees.csv").open()))[-1]
  assert scaled == pytest.approx(float(last["gap"]), rel=1e-5)


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("methods", ("ixmd",), "did you mean 'ixomd'"),
    ("theory", ("ixmd",), "did you mean 'ixomd'"),
    ("baselines", ("cfr",), "did you mean 'mccfr'|expected one of cfr_plus, mccfr"),
    ("episodes", (10, 20), "episodes: expected 1 numbers"),
    ("multipliers", (0.0,), "multipliers: expected a number"),
    ("seeds", (), "seeds: expected at least one value"),
    ("trees", ("kuhn_pokr",), "did you mean 'kuhn_poker'"),
  ],
)
def test_a_study_of_trees_refuses_what_it_does_not_know(tmp_path, field, value, message):
  config = _config("trees")
  config.update({field: value})
  with pytest.raises(ValueError, match=message):
    study.run(config, tmp_path)

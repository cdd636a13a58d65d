"""Comparisons of runs on texts: what is chosen and reported of made-up records."""

import json
import pathlib

import numpy as np
import pytest
from comparisons import ENDS, config, labelled
from page_files import page_data

from nash_jax import report
from nash_jax.config import comparison, describe, resolve
from nash_jax.configs import short_compare
from nash_jax.jobs import arena, compare, sweep
from nash_jax.jobs.rates import interval


@pytest.fixture
def calls(monkeypatch):
  """Makes runs and arenas whose figures are made up; returns which were asked for, in order."""
  calls = {"runs": [], "arenas": [], "steps": {}}

  def run(named, workdir, policy, progress):
    for name, run_config in named.items():
      folder = workdir / sweep._folder(name)
      if folder.exists():
        continue
      calls["runs"].append(name)
      calls["steps"][name] = run_config.steps
      folder.mkdir(parents=True)
      rate, kl = ENDS[run_config.algorithm.name, run_config.optimizer.learning_rate]
      rate += run_config.seed % 100 / 100
      lines = [
        {
          "step": step,
          compare.WIN: 0.5 + (rate - 0.5) * step / run_config.steps,
          compare.KL: kl * step / run_config.steps,
        }
        for step in (0, 20, 40)
      ]
      (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

  def hold(config, workdir, show):
    assert not show, "the comparison prints one table of all seeds"
    calls["arenas"].append(set(config.policies))
    mean = 0.6 + config.seed / 100
    ends = {"low": mean - 0.03, "high": mean + 0.03}
    cell = {"mean": mean, "sigma3": 0.03, **ends, "n": 96, "significant": True}
    table = {a: dict.fromkeys(config.policies, cell) for a in config.policies}
    found = {
      "judges": {"population": {"win_rate": table, "length_matched": table}},
      "config": describe(config),
      "policies": {name: {} for name in config.policies},
      "texts": [{"prompt": "p", "continuations": {name: name for name in config.policies}}],
    }
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "arena.json").write_text(json.dumps(found))
    return found

  monkeypatch.setattr(sweep, "run", run)
  monkeypatch.setattr(arena, "run", hold)
  # The made-up runs leave no checkpoint whose presence could be checked.
  monkeypatch.setattr(compare, "resolve", lambda config, *_: config)
  return calls


def test_runs_on_texts_are_tuned_by_the_regularised_win_rate_then_meet(calls, tmp_path, capsys):
  result = compare.run(config("nash_mp", "reg_self_play"), tmp_path, progress=False)
  found = result["network"]
  assert found["nash_mp"]["learning_rate"] == 1e-4
  assert found["reg_self_play"]["learning_rate"] == 3e-4
  assert found["nash_mp"]["tuning"]["0.0001"] == pytest.approx(0.74 - 0.05 * 2.8)
  assert len(calls["runs"]) == 4 + 6, "every rate with the tuning seed, the best with every seed"
  assert calls["arenas"] == [{"nash_mp", "reg_self_play", "reference"}] * 3
  cell = result["arena"]["population"]["win_rate"]["nash_mp"]["reference"]
  assert cell == {
    "mean": pytest.approx(0.61),
    "sigma3": pytest.approx(0.03),
    "low": pytest.approx(0.58),
    "high": pytest.approx(0.64),
    "n": 96,
    "significant": True,
  }
  page = (tmp_path / "compare.md").read_text()
  printed = capsys.readouterr().out
  assert page.strip() in printed
  assert printed.endswith(f"arenas: {tmp_path}/arena\n")
  row = next(line for line in page.splitlines() if line.startswith("| nash_mp"))
  shown = [float(cell) for cell in row.split("|")[2:-1]]
  assert shown == [1e-4, 0.75, 0.74, 0.76, 2.8, 0.61]
  assert page.index("| nash_mp") < page.index("| reg_self_play"), "the greatest win rate first"
  assert (tmp_path / "curves_network.png").read_bytes().startswith(b"\x89PNG")
  shown = page_data(tmp_path)
  assert [panel["title"].partition(": ")[2] for panel in shown["curves"]] == [
    "Win rate against the reference", "KL to the reference, nats a response",
  ]  # fmt: skip
  best = shown["curves"][0]["series"][0]
  assert best["name"] == "nash_mp"
  assert (best["x"], best["y"]) == ([0, 20, 40], [0.5, 0.625, 0.75])
  assert shown["tables"][0]["rows"][0][0] == "nash_mp"
  assert shown["tables"][1]["cells"][0][1][0] == pytest.approx(0.61)
  assert [texts["title"] for texts in shown["texts"]] == [f"of seed {s}" for s in range(3)]
  (item,) = shown["texts"][0]["items"]
  assert {name for name, _, _ in item["responses"]} == {"nash_mp", "reg_self_play", "reference"}


def test_pilots_that_choose_the_rate_may_be_shorter(calls, tmp_path):
  c = config("nash_mp")
  c.tuning_steps = 20
  result = compare.run(c, tmp_path, progress=False)["network"]["nash_mp"]
  steps = calls["steps"]
  pilots = {name: n for name, n in steps.items() if name.endswith(f"seed_{c.tuning_seed}")}
  assert set(pilots.values()) == {20}
  assert len(pilots) == 2
  assert {steps[name] for name in steps if name not in pilots} == {40}
  assert result["tuning"]["0.0001"] == pytest.approx(0.74 - 0.05 * 2.8), "at a pilot's own end"
  assert result["seeds"][0]["steps"][-1] == 40


@pytest.mark.parametrize(
  ("wins", "significant", "few"),
  [
    ([1] * 5, False, True),
    ([1] * 9 + [0], False, False),  # its 3σ stays clear of one half, its interval does not
    ([1] * 12, True, False),
    ([1] * 30 + [0] * 2, True, False),
  ],
)
def test_seeds_add_no_prompts_to_a_win_rate(wins, significant, few):
  p_win = np.array(wins, float).reshape(-1, 1, 1, 1, 1)
  rates = arena.win_rates(p_win, np.ones(p_win.shape, bool))
  cell = {name: table.item() for name, table in rates.items()}
  assert cell["significant"] == significant
  table = {"a": {"b": cell}}
  mean = compare._mean_cells([table] * 3)["a"]["b"]
  assert mean == {name: pytest.approx(cell[name]) for name in mean}
  assert ("too few" in report.win_rate_table({"a": {"b": mean}})) == few


def test_an_added_run_is_trained_alone_and_meets_all_others(calls, tmp_path):
  compare.run(config("nash_mp"), tmp_path, progress=False)
  compare.run(config("nash_mp"), tmp_path, progress=False)
  assert calls["arenas"] == [{"nash_mp", "reference"}] * 3, "an arena that was held is kept"
  result = compare.run(config("nash_mp", "reg_self_play"), tmp_path, progress=False)
  assert calls["arenas"][3:] == [{"nash_mp", "reg_self_play", "reference"}] * 3
  assert len(calls["runs"]) == len(set(calls["runs"])) == 10
  assert set(result["arena"]["population"]["win_rate"]) == {"nash_mp", "reg_self_play", "reference"}


def test_more_seeds_of_the_same_prompts_are_no_more_prompts():
  """Five prompts that agree are too few for any number of seeds, whatever their ± would say."""
  low, high = interval(np.ones(1), np.zeros(1), np.full(1, 5.0))
  few = {"mean": 1.0, "sigma3": 0.3, "n": 5, "low": low.item(), "high": high.item()}
  found = compare._mean_cells([{"a": {"b": few}}] * 4)["a"]["b"]
  assert found["n"] == 5
  assert not found["significant"]
  assert "too few: 5" in report.win_rate_cell(found)
  clear = {"mean": 0.7, "sigma3": 0.25, "n": 12, "low": 0.51, "high": 0.9}
  assert compare._mean_cells([{"a": {"b": clear}}] * 2)["a"]["b"]["significant"]


def test_a_learning_rate_is_not_chosen_by_what_is_not_there(calls, tmp_path, monkeypatch, caplog):
  """Under top-k no KL is recorded, and of rates that all diverged none is the best."""
  c = config("nash_mp")
  c.runs = ({"algorithm.name": "online_ipo", "sampling.top_k": 8},)
  with pytest.raises(ValueError, match=r"run 'online_ipo': sampling: expected top_k = 0 .* KL"):
    resolve(c)
  c.learning_rates = c.learning_rates[:1]
  resolve(c)
  for rate in (1e-4, 3e-4):
    monkeypatch.setitem(ENDS, ("nash_mp", rate), (float("nan"), 0.0))
  compare.run(config("nash_mp"), tmp_path, progress=False)
  assert "run 'nash_mp' diverges at every learning rate, so none is the best" in caplog.text


@pytest.mark.parametrize(("metric", "rates"), [("regularised", [1, 3]), ("gap", [3, 1])])
def test_rates_and_rows_are_chosen_in_the_game_with_or_without_beta(
  metric, rates, tmp_path, monkeypatch, capsys
):
  """At rate 1 mpo is nearest in the game with β, sppo in that without."""

  def run(named, workdir, policy, progress):
    for name, c in named.items():
      small = (c.optimizer.learning_rate == 1) == (c.algorithm.name == "mpo")
      values = {compare.SUBOPT: 0.1 if small else 0.2, compare.GAP: 0.2 if small else 0.1}
      values[compare.SUBOPT] += 0.01 * (c.algorithm.name == "mpo")
      rest = (compare.KL_TO_EQUILIBRIUM, compare.EXACT_WIN, compare.EXACT_KL)
      values |= dict.fromkeys(rest, 0.5)
      folder = workdir / sweep._folder(name)
      folder.mkdir(parents=True, exist_ok=True)
      lines = [json.dumps({"step": step, **values}) + "\n" for step in (0, 10, 20)]
      (folder / "metrics.jsonl").write_text("".join(lines))

  monkeypatch.setattr(sweep, "run", run)
  c = short_compare.get_config("smoke,gap")
  assert c.tuning_metric == "gap"
  c.runs, c.learning_rates, c.tuning_metric = c.runs[:2], (1.0, 3.0), metric
  found = compare.run(c, tmp_path, progress=False)["tabular"]
  assert [found[name]["learning_rate"] for name in ("mpo", "sppo")] == rates
  table = capsys.readouterr().out
  if metric == "regularised":
    assert table.index("| sppo") < table.index("| mpo"), "which has less of SubOpt_β"


@pytest.mark.parametrize("start", [0.0, 9e-16, None])
def test_a_reference_without_a_suboptimality_has_no_share(start):
  seeds = [
    {
      "steps": [0, 1],
      compare.SUBOPT: [start, 1e-4],
      compare.KL_TO_EQUILIBRIUM: [0.0, 1.0],
      compare.GAP: [0.5, 0.25],
      compare.EXACT_WIN: [0.5, 0.6],
      compare.EXACT_KL: [0, 2],
    }
  ]
  _, _, cells = compare._exact_table({"nash_mp": {"seeds": seeds}})
  expected = ["1.00e-04"] * 3 + ["—", "1.00e+00", "2.50e-01", ".600", "2.000"]
  assert cells["nash_mp"] == expected


def rows(page):
  return [line.split(" | ")[0].strip("| ") for line in page.splitlines() if line.startswith("| ")]


def test_two_runs_of_one_algorithm_are_two_rows_told_apart_by_what_they_change(calls, tmp_path):
  c = labelled({"algorithm.kappa": 0.1, "algorithm.eta": 2.0}, {"algorithm.kappa": 0.9}, {})
  c.runs[1]["algorithm.eta"] = 2.0
  result = compare.run(c, tmp_path, progress=False)
  names = ["nash_mp, kappa = 0.1, eta = 2.0", "nash_mp, kappa = 0.9, eta = 2.0", "nash_mp"]
  assert list(result["network"]) == names
  assert calls["arenas"][0] == {name.replace(".", "_") for name in names} | {"reference"}
  assert set(result["arena"]["population"]["win_rate"]) == {*names, "reference"}
  folders = [run["seeds"][0]["folder"] for run in result["network"].values()]
  assert len(set(folders)) == 3
  assert len(calls["runs"]) == 9
  page = (tmp_path / "compare.md").read_text()
  assert set(names) <= set(rows(page))


def test_fields_whose_last_words_are_alike_are_named_in_full():
  found = comparison.name_runs([{"model.weights": "a"}, {"judge.model.weights": "a"}, {}])
  assert [run.name for run in found] == ["model.weights = a", "judge.model.weights = a", "base"]


def test_labels_of_any_kind_stay_in_the_workdir_and_keep_their_names(calls, tmp_path):
  outside = tmp_path / "outside"
  labels = ["../../x", str(outside), "a|b\n$c$", "_x", "a.b", "a_b", "A_B", "l" * 300, "$\\frac{$"]
  workdir = tmp_path / "in" / "work"
  # Each changes something, though the made-up runs do not read it.
  runs = [{"label": name, "algorithm.eta": i + 2.0} for i, name in enumerate(labels)]
  result = compare.run(labelled(*runs), workdir, progress=False)
  assert list(result["network"]) == labels
  assert set(result["arena"]["population"]["win_rate"]) == {*labels, "reference"}
  assert len(calls["arenas"][0]) == len(labels) + 1, "none takes another's place"
  assert len(calls["runs"]) == len(set(calls["runs"])) == 3 * len(labels)
  files = [path for path in tmp_path.rglob("*") if path.is_file()]
  assert all(workdir in path.parents for path in files)
  page = (workdir / "compare.md").read_text()
  assert all(c.isprintable() for c in page.replace("\n", ""))
  assert r"| a\|b\\n\$c\$ " in page


def test_rates_that_look_alike_are_two(calls, tmp_path, monkeypatch):
  near = 1.0000001e-4
  monkeypatch.setitem(ENDS, ("nash_mp", near), (0.8, 0.0))
  c = config("nash_mp")
  c.learning_rates = (1e-4, near)
  found = compare.run(c, tmp_path, progress=False)["network"]["nash_mp"]
  assert found["learning_rate"] == near
  assert list(found["tuning"]) == ["0.0001", "0.00010000001"]


def test_a_run_of_another_length_is_read_at_its_own_end(calls, tmp_path):
  c = labelled({"label": "short", "steps": 20}, {"label": "long"})
  found = compare.run(c, tmp_path, progress=False)["network"]
  assert found["short"]["seeds"][0]["steps"] == [0, 20]
  assert found["short"]["seeds"][0][compare.WIN][-1] == pytest.approx(0.74)
  assert "Steps: 20, 40, seeds: 3." in (tmp_path / "compare.md").read_text()


def edit_metrics(result, name, edit):
  path = pathlib.Path(result["network"][name]["seeds"][0]["folder"]) / "metrics.jsonl"
  path.write_text("".join(f"{line}\n" for line in edit(path.read_text().splitlines())))


@pytest.mark.parametrize(
  ("edit", "message"),
  [
    (
      lambda lines: lines[:1] + lines[2:],
      r"nash_mp/.*seed_0/metrics.jsonl: .* got 'none at \[20\]",
    ),
    (lambda lines: [], r"nash_mp/.*seed_0/metrics.jsonl: .*none at \[0, 20, 40\]"),
    (lambda lines: [*lines[:1], "{}", *lines[1:]], r"nash_mp/.*metrics.jsonl:2: expected a step"),
    (lambda lines: [*lines[:1], '{"st', *lines[1:]], r"nash_mp/.*metrics.jsonl:2: not JSON"),
  ],
)
def test_a_damaged_run_is_named(calls, tmp_path, edit, message):
  c = config("nash_mp", "reg_self_play")
  edit_metrics(compare.run(c, tmp_path, progress=False), "nash_mp", edit)
  with pytest.raises(ValueError, match=message):
    compare.run(c, tmp_path, progress=False)


def test_a_run_that_diverged_is_not_in_the_arena(calls, tmp_path):
  c = config("nash_mp", "reg_self_play")

  def diverge(lines):
    return [*lines[:2], json.dumps({"step": 40, compare.WIN: None, compare.KL: None})]

  first = compare.run(c, tmp_path, progress=False)
  edit_metrics(first, "nash_mp", diverge)
  result = compare.run(c, tmp_path, progress=False)
  assert calls["arenas"][3:] == [{"reg_self_play", "reference"}] * 3
  assert set(result["arena"]["population"]["win_rate"]) == {"reg_self_play", "reference"}
  page = (tmp_path / "compare.md").read_text()
  assert "Not in the arena, because a seed's last evaluation is not finite: nash_mp." in page
  edit_metrics(first, "reg_self_play", diverge)
  assert compare.run(c, tmp_path, progress=False)["arena"] == {}, "nobody is left"


def test_the_arena_reads_the_last_step_of_every_run(calls, tmp_path, monkeypatch):
  seen, hold = [], arena.run
  monkeypatch.setattr(
    arena, "run", lambda c, *rest, **show: seen.append(c) or hold(c, *rest, **show)
  )
  compare.run(labelled({"label": "short", "steps": 20}, {"label": "long"}), tmp_path, False)
  for seed, c in enumerate(seen):
    for name, step in (("short", 20), ("long", 40)):
      assert c.policies[name].weights == f"{tmp_path}/network/{name}/seed_{seed}@params:{step}"


def test_a_damaged_arena_is_named(calls, tmp_path):
  compare.run(config("nash_mp"), tmp_path, progress=False)
  (tmp_path / "arena" / "seed_1" / "arena.json").write_text('{"judges": {"popu')
  with pytest.raises(ValueError, match=r"seed_1/arena.json: does not parse"):
    compare.run(config("nash_mp"), tmp_path, progress=False)


def test_results_are_json_where_every_rate_diverged(calls, tmp_path, monkeypatch):
  monkeypatch.setitem(ENDS, ("nash_mp", 3e-4), (float("nan"), 0.0))
  c = config("nash_mp")
  result = compare.run(c, tmp_path, progress=False)
  text = (tmp_path / "results.json").read_text()
  assert json.loads(text, parse_constant=pytest.fail) == result
  assert result["network"]["nash_mp"]["tuning"]["0.0003"] is None

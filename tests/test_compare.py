"""Comparisons of runs on texts: what is chosen and reported of made-up records."""

import json

import pytest

from nash_jax.config import describe
from nash_jax.configs import stories_compare
from nash_jax.jobs import arena, compare, sweep

# Win rate and KL by method and learning rate: at β = .05, nats cost nash_mp its larger rate.
ENDS = {
  ("nash_mp", 1e-4): (0.74, 2.8),
  ("nash_mp", 3e-4): (0.80, 9.0),
  ("reg_self_play", 1e-4): (0.60, 2.0),
  ("reg_self_play", 3e-4): (0.70, 2.5),
}


@pytest.fixture
def calls(monkeypatch):
  """Makes runs and arenas whose figures are made up; returns which were asked for, in order."""
  calls = {"runs": [], "arenas": []}

  def run(named, workdir, policy, progress):
    for name, config in named.items():
      folder = workdir / name
      if folder.exists():
        continue
      calls["runs"].append(name)
      folder.mkdir(parents=True)
      rate, kl = ENDS[config.algorithm.name, config.optimizer.learning_rate]
      rate += config.seed % 100 / 100
      lines = [
        {
          "step": step,
          compare.WIN: 0.5 + (rate - 0.5) * step / config.steps,
          compare.KL: kl * step / config.steps,
        }
        for step in (0, 20, 40)
      ]
      (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

  def hold(config, workdir):
    calls["arenas"].append(set(config.policies))
    cell = {"mean": 0.6 + config.seed / 100, "sigma3": 0.03, "n": 96, "significant": True}
    table = {a: dict.fromkeys(config.policies, cell) for a in config.policies}
    found = {
      "judges": {"population": {"win_rate": table, "length_matched": table}},
      "config": describe(config),
    }
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "arena.json").write_text(json.dumps(found))
    return found

  monkeypatch.setattr(sweep, "run", run)
  monkeypatch.setattr(arena, "run", hold)
  # The made-up runs leave no checkpoint whose presence could be checked.
  monkeypatch.setattr(compare, "resolve", lambda config, *_: config)
  return calls


def config(*names):
  c = stories_compare.get_config("paper")
  c.runs = tuple({"algorithm.name": name} for name in names)
  c.learning_rates = tuple(sorted({rate for _, rate in ENDS}))
  return c


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
    "n": 288,
    "significant": True,
  }
  page = (tmp_path / "compare.md").read_text()
  assert page.strip() in capsys.readouterr().out
  row = next(line for line in page.splitlines() if line.startswith("| nash_mp"))
  shown = [float(cell) for cell in row.split("|")[2:-1]]
  assert shown == [1e-4, 0.75, 0.74, 0.76, 2.8, 0.61]
  assert page.index("| nash_mp") < page.index("| reg_self_play"), "the greatest win rate first"
  assert (tmp_path / "curves_network.png").read_bytes().startswith(b"\x89PNG")


def test_an_added_run_is_trained_alone_and_meets_all_others(calls, tmp_path):
  compare.run(config("nash_mp"), tmp_path, progress=False)
  compare.run(config("nash_mp"), tmp_path, progress=False)
  assert calls["arenas"] == [{"nash_mp", "reference"}] * 3, "an arena that was held is kept"
  result = compare.run(config("nash_mp", "reg_self_play"), tmp_path, progress=False)
  assert calls["arenas"][3:] == [{"nash_mp", "reg_self_play", "reference"}] * 3
  assert len(calls["runs"]) == len(set(calls["runs"])) == 10
  assert set(result["arena"]["population"]["win_rate"]) == {"nash_mp", "reg_self_play", "reference"}

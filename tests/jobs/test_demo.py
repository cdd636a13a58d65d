"""What surrounds the demo's run: its arena is checked first, and makes way for a new one."""

import json
import re

import pytest
import tiny

from nash_jax import config, report
from nash_jax.jobs import arena, demo


def test_a_demo_that_could_not_be_compared_is_refused_before_it_trains(tmp_path, monkeypatch):
  monkeypatch.setattr(demo.train, "run", lambda *_: pytest.fail("it trains"))
  c = tiny.train()  # from random weights, which the arena could not read
  with pytest.raises(ValueError, match=r"policies.base.weights: expected a weights file"):
    demo.run(c, tmp_path)
  with pytest.raises(ValueError, match="workdir: expected a folder on this machine"):
    demo.run(config.train(), "gs://bucket/x")


def cell(mean, sigma3):
  return {"mean": mean, "sigma3": sigma3, "n": 9}


@pytest.mark.parametrize(
  ("mean", "sigma3", "kl", "expected"),
  [
    (0.758, 0.04, 3.55, "beats base with 0.758 ± 0.040 under .* 0.758 under .* KL 3.5 nats"),
    (None, None, None, "beats base with — ± — under .* — under its judge, at KL — nats"),
  ],
)
def test_its_last_lines_show_what_there_is(tmp_path, mean, sigma3, kl, expected):
  """Where no verdict was valid there is no mean, after all the work."""
  rates = {"trained": dict.fromkeys(("judge", "population"), cell(mean, sigma3))}
  summary = {"steps": 6, "seconds": 1.0, "win_rate": rates, "kl_to_reference": kl}
  text = demo._epilogue({"texts": []}, summary, tmp_path)
  assert re.search(expected, text)


def test_the_arena_of_an_earlier_demo_makes_way(tmp_path):
  old, new = (config.resolve(config.arena()), config.resolve(config.arena()).unlock())
  new.samples = 3
  path = tmp_path / "arena.json"
  path.write_text(json.dumps({"config": config.describe(old), "prompts": 9}))
  assert arena.recorded_result(old, tmp_path)["prompts"] == 9
  assert arena.recorded_result(new, tmp_path) == {}
  assert not path.exists()
  assert arena.recorded_result(new, tmp_path) == {}


def test_a_report_of_no_arena_has_no_steps():
  result = {"prompts": 2, "samples": 2, "base": "a", "judges": {}, "policies": {}}
  assert "Checkpoint steps of the runs" not in report.arena(result)

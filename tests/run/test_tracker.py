"""Weights & Biases follows a run's record, and nothing that it does holds or ends the run."""

import importlib.machinery
import importlib.util
import json
import os
import pathlib
import re
import struct
import subprocess
import sys
import types

import jax
import paths
import pytest
import tiny
from metric_files import lines, run, start

import nash_jax
from nash_jax.config import resolve
from nash_jax.config.unread import unread
from nash_jax.run import tracker
from nash_jax.run.loop import run_loop

# Stands for W&B: a run keeps its step by its id, and what is logged is a line of a file.
FAKE = """
import json, os, pathlib, time
FOLDER = pathlib.Path(__file__).parent

def act(place):
  place, _, action = os.environ.get("FAKE", "").partition(place + "=")
  if action == "raise": raise RuntimeError("no such thing\\nas " + str(os.getpid()))
  if action == "hang": time.sleep(600)
  if action == "die": os._exit(9)

def note(**values):
  with (FOLDER / "log.jsonl").open("a") as file:
    file.write(json.dumps(values) + "\\n")

class Settings:
  def __init__(self, **values): self.values = values

class Table:
  def __init__(self, columns, data, allow_mixed_types): self.rows = [columns, *data]

class Run:
  url = "https://wandb.test/run"
  def __init__(self, path):
    self.path = path
    self.step = json.loads(path.read_text()) + 1 if path.exists() else 0
  def log(self, values, step):
    act("log")
    if "samples" in values: values["samples"] = values["samples"].rows
    self.step = step
    note(step=step, **values)
    self.path.write_text(json.dumps(step))
  def finish(self, exit_code):
    act("finish")
    note(exit=exit_code)

def init(**options):
  act("init")
  note(init={k: x for k, x in options.items() if k != "settings"})
  return Run(FOLDER / ("run-" + options["id"]))

act("import")
"""
CONFIG = {"job": "train", "algorithm": {"beta": 0.1}}


@pytest.fixture
def fake(tmp_path, monkeypatch):
  """Puts a module that stands for wandb where the tracker finds it; returns its folder."""
  folder = tmp_path / "path" / "wandb"
  folder.mkdir(parents=True)
  (folder / "__init__.py").write_text(FAKE)
  for name in [name for name in os.environ if name.startswith("WANDB_")]:
    monkeypatch.delenv(name)
  monkeypatch.setenv("PYTHONPATH", str(folder.parent))
  return folder


def noted(folder):
  return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_every_step_is_logged_once_with_its_samples_also_by_a_resumed_run(tmp_path, fake, caplog):
  caplog.set_level("INFO", "nash_jax.run.tracker")
  workdir = tmp_path / "runs" / "x"
  run(workdir, 0, 5, tracked=CONFIG).close()
  first = noted(fake)
  run(workdir, 3, 7, tracked=CONFIG).close()  # as from a checkpoint at 3
  second = noted(fake)[len(first) :]
  options = [record[0]["init"] for record in (first, second)]
  assert options[0] == options[1]
  assert (options[0]["name"], options[0]["config"], options[0]["resume"]) == (
    "runs/x",
    CONFIG,
    "allow",
  )
  assert options[0]["project"] == "nash_jax"
  assert options[0]["id"] == json.loads((workdir / tracker.ID).read_text())["id"]
  logged = [row for row in first + second if "step" in row]
  assert [row["step"] for row in logged] == list(range(7))
  for row, line in zip(logged, lines(workdir), strict=True):
    sample = {"step": row["step"], "prompt": "Thé", "response": f"text {row['step']}"}
    p_win = None if row["step"] == 1 else 0.5
    assert row.pop("samples") == [[*sample, "p_win"], [*sample.values(), p_win]]
    assert row["step"] >= 3 or row["loss"] == line["loss"]
    assert {*row} == {*line}
  assert first[-1] == second[-1] == {"exit": 0}
  assert caplog.text.count("W&B: https://wandb.test/run") == 2
  assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_a_record_that_began_without_a_tracker_is_sent_from_its_beginning(tmp_path, fake):
  run(tmp_path / "x", 0, 3).close()
  assert not (fake / "log.jsonl").exists()
  run(tmp_path / "x", 3, 5, tracked=CONFIG).close()
  assert [row["step"] for row in noted(fake) if "step" in row] == list(range(5))


PLACES = [(place, "raise") for place in ("import", "init", "log", "finish")]
PLACES += [(place, "hang") for place in ("init", "log", "finish")]


@pytest.mark.parametrize(("place", "action"), [*PLACES, ("log", "die")])
def test_whatever_goes_wrong_there_costs_one_warning(
  tmp_path, fake, monkeypatch, caplog, place, action
):
  caplog.set_level("WARNING", "nash_jax.run")
  if action == "hang":
    monkeypatch.setattr(tracker, "END_SECONDS", 0.2)
  monkeypatch.setenv("FAKE", f"{place}={action}")
  m = run(tmp_path / "x", 0, 40, tracked=CONFIG)
  process = m._tracker._process
  m.close()
  assert process.poll() is not None, "it has ended"
  assert len(caplog.records) == 1
  reasons = {"raise": "RuntimeError: no such thing as", "hang": "within 0.2 s", "die": "status 9"}
  assert reasons[action] in caplog.text
  assert "the run continues without it" in caplog.text
  assert [line["step"] for line in lines(tmp_path / "x")] == list(range(40))
  monkeypatch.delenv("FAKE")  # the next start sends all
  monkeypatch.undo()
  monkeypatch.setenv("PYTHONPATH", str(fake.parent))
  (fake / "log.jsonl").unlink(missing_ok=True)
  start(tmp_path / "x", 40, total=40, tracked=CONFIG).close()
  steps = [row["step"] for row in noted(fake) if "step" in row]
  assert steps == list(range(40)) or place == "finish"


def test_a_start_that_hangs_is_given_up_while_the_run_goes_on(tmp_path, fake, monkeypatch, caplog):
  monkeypatch.setattr(tracker, "START_SECONDS", 0.3)
  monkeypatch.setenv("FAKE", "init=hang")
  m = run(tmp_path / "x", 0, 3, tracked=CONFIG)
  m._tracker._process.wait(60)
  m._tracker._reader.join(60)
  assert re.findall("it did not start within 0.3 s: the run continues", caplog.text)
  m.push(3, {"loss": 0.0})
  m.close()
  assert len(caplog.records) == 1
  assert len(lines(tmp_path / "x")) == 4


def test_a_run_that_fails_or_dies_is_not_told_as_finished(tmp_path, fake, caplog):
  m = start(tmp_path / "failed", tracked=CONFIG)
  m.push(0, {"loss": float("nan")})
  with pytest.raises(FloatingPointError):
    m.close()
  assert noted(fake)[-1] == {"exit": 1}
  m = run(tmp_path / "died", 0, 3, tracked=CONFIG)
  m._tracker._process.stdin.close()  # as where the process is killed
  m._tracker._process.wait(60)
  assert [row.get("step") for row in noted(fake)[-3:]] == [0, 1, None]
  assert noted(fake)[-1] == {"exit": 1}
  m.close()


def test_the_id_of_a_run_in_a_bucket_stays_there(bucket, fake):
  run("gs://bucket/runs/x", 0, 3, tracked=CONFIG).close()
  run("gs://bucket/runs/x", 3, 5, tracked=CONFIG).close()
  known = {row["init"]["id"] for row in noted(fake) if "init" in row}
  assert known == {json.loads(bucket.cat("/bucket/runs/x/wandb.json"))["id"]}
  assert {row["init"]["name"] for row in noted(fake) if "init" in row} == {"runs/x"}
  assert [row["step"] for row in noted(fake) if "step" in row] == list(range(5))


def test_only_the_first_process_has_a_tracker_and_nobody_unasked(tmp_path, fake, monkeypatch):
  monkeypatch.setattr(tracker, "Tracker", lambda *args: pytest.fail("started"))
  run(tmp_path / "x", 0, 2).close()
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  run(tmp_path / "y", 0, 2, tracked=CONFIG).close()


def test_what_cannot_be_started_costs_a_warning(tmp_path, monkeypatch, caplog):
  def fail(*args, **options):
    raise OSError("no more processes")

  monkeypatch.setattr(subprocess, "Popen", fail)
  run(tmp_path / "x", 0, 2, tracked=CONFIG).close()
  assert "W&B cannot be started (no more processes)" in caplog.text
  assert len(lines(tmp_path / "x")) == 2


def test_a_missing_package_is_refused_with_the_command_that_installs_it(monkeypatch, tmp_path):
  find = importlib.util.find_spec
  folder = importlib.machinery.ModuleSpec("wandb", None, is_package=True)  # W&B leaves such a one
  for found in (None, folder):
    monkeypatch.setattr(
      importlib.util,
      "find_spec",
      lambda name, *x, found=found: found if name == "wandb" else find(name, *x),
    )
    for config in (tiny.train({"tracker": "wandb"}), nash_jax.config.fit()):
      config.tracker = "wandb"
      with pytest.raises(ValueError, match=r"tracker: expected .* -m pip install wandb"):
        resolve(config)
    resolve(tiny.train())


def loop_once(config, workdir):
  """Runs the loop around every loop, on one number."""

  def loop(setup, state, first_step, log, checkpoints, stop):
    for step in range(first_step, config.steps):
      log.push(step, {"loss": 0.5})
    log.flush(config.steps)
    checkpoints.save(config.steps, state)
    return state

  state = {"x": jax.numpy.zeros(1)}
  setup = types.SimpleNamespace(
    reference=None, state_spec=state, initial_state=lambda: state, inputs=dict
  )
  run_loop(config, workdir, lambda config: setup, loop, (), False, "")


def test_a_run_may_be_given_a_tracker_later_and_imports_nothing_of_it(tmp_path, fake, monkeypatch):
  monkeypatch.syspath_prepend(fake.parent)  # so that it counts as installed
  loop_once(resolve(tiny.train({"steps": 3})), tmp_path / "x")
  assert not (fake / "log.jsonl").exists()
  loop_once(resolve(tiny.train({"tracker": "wandb", "steps": 5})), tmp_path / "x")
  rows = noted(fake)
  assert rows[0]["init"]["config"]["tracker"] == "wandb"
  assert [row.get("step") for row in rows[1:]] == [*range(5), None]
  assert "wandb" not in sys.modules
  sources = (path for path in (paths.ROOT / "nash_jax").rglob("*.py"))
  assert [x.name for x in sources if "import wandb" in x.read_text("utf-8")] == ["tracker.py"]


@pytest.mark.slow  # compiles a run
def test_the_texts_of_a_run_are_tables(tmp_path, fake, monkeypatch):
  monkeypatch.syspath_prepend(fake.parent)
  nash_jax.train.run(tiny.train({"tracker": "wandb"}), tmp_path / "x", progress=False)
  rows = [row for row in noted(fake) if "samples" in row]
  assert [row["step"] for row in rows] == [0, 3, 6]
  assert [len(row["samples"]) for row in rows] == [5, 5, 5]
  assert {"prompt", "response", "reference", "p_win"} <= {*rows[0]["samples"][0]}


def test_exact_runs_of_a_comparison_have_none():
  config = nash_jax.config.compare(runs=({"algorithm.name": "nash_mp"},))
  assert "base.tracker" not in unread(config, "compare")
  config.base.evaluation.exact = True
  assert "base.tracker" in unread(config, "compare")


def records(path: pathlib.Path):
  """Returns W&B's records of a run: a log of LevelDB's, of protocol buffers."""
  from wandb.proto import wandb_internal_pb2

  data, place, part, found = path.read_bytes(), 7, b"", []
  assert data[:4] == b":W&B"
  while place + 7 <= len(data):
    left = 32768 - place % 32768
    if left < 7:
      place += left
      continue
    _, size, kind = struct.unpack_from("<IHB", data, place)
    part += data[place + 7 : place + 7 + size]
    place += 7 + size
    if kind in (1, 4):
      found.append(wandb_internal_pb2.Record.FromString(part))
      part = b""
  return found


@pytest.mark.slow  # wandb itself
def test_wandb_offline_holds_the_curves_the_texts_and_the_config(tmp_path, monkeypatch):
  if importlib.util.find_spec("wandb") is None:
    pytest.skip("wandb is not installed: pip install wandb")
  monkeypatch.setenv("WANDB_MODE", "offline")
  run(tmp_path, 0, 4, tracked=CONFIG).close()
  run(tmp_path, 2, 6, tracked=CONFIG).close()
  folders = sorted((tmp_path / "wandb").glob("offline-run-*"))
  assert len({str(folder)[-8:] for folder in folders}) == 1, "of one id"
  found = records(next(folders[-1].glob("*.wandb")))
  config = {u.key: u.value_json for r in found if r.HasField("run") for u in r.run.config.update}
  assert {k: json.loads(config[k]) for k in CONFIG} == CONFIG
  history = [
    {".".join(item.nested_key): json.loads(item.value_json) for item in r.history.item}
    | {item.key: json.loads(item.value_json) for item in r.history.item if item.key}
    for r in found
    if r.HasField("history")
  ]
  assert [row["_step"] for row in history] == list(range(6)), "the whole run, not what is new alone"
  assert [row["loss"] for row in history] == [line["loss"] for line in lines(tmp_path)]
  for step, row in enumerate(history):
    table = json.loads((folders[-1] / "files" / row["samples.path"]).read_text())
    assert table["columns"] == ["step", "prompt", "response", "p_win"]
    assert table["data"] == [[step, "Thé", f"text {step}", None if step == 1 else 0.5]]
  assert [r.exit.exit_code for r in found if r.HasField("exit")] == [0]


@pytest.mark.slow  # wandb itself, which tries for a while
@pytest.mark.parametrize("key", ["", "0" * 40])
def test_wandb_without_a_key_or_a_network_costs_a_warning(tmp_path, monkeypatch, caplog, key):
  if importlib.util.find_spec("wandb") is None:
    pytest.skip("wandb is not installed: pip install wandb")
  monkeypatch.setenv("HOME", str(tmp_path))
  monkeypatch.setenv("WANDB_API_KEY", key)
  monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
  monkeypatch.setattr(tracker, "END_SECONDS", 10)
  run(tmp_path / "x", 0, 4, tracked=CONFIG).close()
  assert len([r for r in caplog.records if r.levelname == "WARNING"]) == 1
  assert "the run continues without it" in caplog.text
  assert len(lines(tmp_path / "x")) == 4

"""The record of a run: late reads, valid lines, resume, timings, and the glossary page."""

import contextlib
import json
import logging
import re
import shutil
import sys
import types

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from metric_files import full, lines, run, sample_of, start
from paths import ROOT
from tensorboardX import record_writer

from nash_jax.run import metrics
from nash_jax.types import Mean


def test_the_record_of_a_workdir_in_a_bucket_is_copied_there(tmp_path, bucket):
  memory = bucket
  run(tmp_path, 0, 9).close()
  first = run("gs://bucket/run", 0, 6)
  first.flush(5)
  assert json.loads(memory.cat("/bucket/run/metrics.jsonl").splitlines()[-1])["step"] == 4
  run("gs://bucket/run", 5, 9).close()  # as after a death: what was not copied is written again
  for name in ("metrics.jsonl", "samples.jsonl"):
    (tmp_path / name).write_bytes(memory.cat(f"/bucket/run/{name}"))
    assert [line["step"] for line in lines(tmp_path, name)] == list(range(9))
  assert sum("/tensorboard/" in path for path in memory.store) == 2


def test_a_step_is_read_only_after_the_next_is_pushed(tmp_path, monkeypatch):
  m, pushed, read = start(tmp_path), [], []
  device_get = jax.device_get
  monkeypatch.setattr(jax, "device_get", lambda x: read.append(pushed[-1]) or device_get(x))
  for step in range(4):
    pushed.append(step)
    m.push(step, {"loss": jnp.float32(step)})
    assert [line["step"] for line in lines(tmp_path)] == list(range(step))
  assert read == [1, 2, 3], "one read a step, and none for the first"
  m.close()
  assert [line["loss"] for line in lines(tmp_path)] == [0, 1, 2, 3]


def test_a_mean_is_total_over_weight_and_null_without_weight(tmp_path):
  m = start(tmp_path)
  m.push(0, {"loss": Mean.from_values(jnp.array([1.0, 2.0, 6.0]), jnp.array([True, False, True]))})
  m.push(
    0,
    {
      "flip_rate": Mean.from_values(jnp.zeros(2), jnp.zeros(2, bool)),
      "entropy": jnp.float32(np.nan),
    },
  )
  m.close()
  assert lines(tmp_path) == [{"step": 0, "loss": 3.5, "entropy": None, "flip_rate": None}]


def test_resumed_lines_equal_the_uninterrupted_ones(tmp_path):
  def kept(workdir):
    timed = ("seconds/", "tokens_per_second/")
    return [
      {k: x for k, x in line.items() if not k.startswith(timed)} for line in lines(workdir)
    ], lines(workdir, "samples.jsonl")

  run(tmp_path / "whole", 0, 6).close()
  run(tmp_path / "cut", 0, 5).close()
  with (tmp_path / "cut" / "metrics.jsonl").open("a") as f:
    f.write('{"step": 5, "lo')  # killed in the middle of a line
  run(tmp_path / "cut", 3, 6).close()
  assert kept(tmp_path / "cut") == kept(tmp_path / "whole")
  assert len(kept(tmp_path / "cut")[0]) == 6


def test_a_line_of_samples_is_one_sample_with_its_fields(tmp_path):
  """Also of a record whose lines held all texts of a step in one list."""
  older = {"step": 0, "name": "held out", "rows": ["Lily ▸ ran ▸ home.", "Tom ▸"]}
  empty = {"step": 0, "name": "held out", "rows": []}
  (tmp_path / "samples.jsonl").write_text(f"{json.dumps(older)}\n{json.dumps(empty)}\n")
  run(tmp_path, 1, 3).close()
  assert lines(tmp_path, "samples.jsonl") == [
    {"step": 0, "prompt": "Lily", "response": " ran ▸ home."},
    {"step": 0, "prompt": "Tom", "response": ""},
    {"step": 1, "prompt": "Thé", "response": "text 1", "p_win": None},
    {"step": 2, "prompt": "Thé", "response": "text 2", "p_win": 0.5},
  ]
  assert "Thé" in (tmp_path / "samples.jsonl").read_text(encoding="utf-8"), "as a reader sees it"


def test_nothing_is_missing_after_a_kill_just_behind_a_flush(tmp_path):
  m = run(tmp_path, 0, 3)
  m.flush(3)  # before a checkpoint of step 3; then the process dies without close
  run(tmp_path, 3, 5).close()
  assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2, 3, 4]
  with pytest.raises(ValueError, match="step 2: expected a step after 2"):
    m.push(2, {"loss": 0.0})
  with pytest.raises(OSError, match="another file has taken its place"):
    m.close()


def test_a_flush_leaves_the_line_of_the_step_itself_open(tmp_path):
  m = start(tmp_path)
  m.push(0, {"loss": 1.0})
  m.push(1, {"eval/loss": 2.0})  # an evaluation, then a checkpoint, then the step
  assert m.value(1, "eval/loss") == 2
  m.flush(1)
  m.push(1, {"loss": 3.0})
  m.close()
  assert lines(tmp_path) == [{"step": 0, "loss": 1}, {"step": 1, "eval/loss": 2, "loss": 3}]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_stops_with_its_step(tmp_path, bad):
  m = start(tmp_path)
  m.push(0, {"loss": jnp.float32(1), "entropy": jnp.float32(bad)})
  m.push(1, {"loss": jnp.float32(bad)})
  with pytest.raises(FloatingPointError, match=r"'loss' is (nan|inf) at step 1"):
    m.push(2, {"loss": jnp.float32(bad)})
  m.close()
  assert [line["loss"] for line in lines(tmp_path)] == [1, None, None]


def test_an_unknown_metric_is_named(tmp_path):
  m = start(tmp_path)
  with pytest.raises(ValueError, match=r"'looss' is not in metrics.GLOSSARY.*Known: loss, "):
    m.push(0, {"looss": 1.0})
  with pytest.raises(ValueError, match="'seconds/dance' is not in"):
    m.clock(0, "dance", jnp.zeros(1))
  m.close()
  with pytest.raises(ValueError, match="'nothing' is not in"):
    start(tmp_path, show=("nothing",))


def test_phases_add_up_and_speeds_are_tokens_over_seconds(tmp_path):
  m = start(tmp_path)
  for step in range(3):
    m.clock(step, "sample", jnp.ones(3), jnp.int32(30))
    m.clock(step, "update", jnp.ones(3), 20)
    m.push(step, {"loss": 0.0})
  m.close()
  for line in lines(tmp_path):
    for phase, tokens in (("sample", 30), ("update", 20)):
      assert line[f"seconds/{phase}"] > 0
      total = line[f"seconds/{phase}"] * line[f"tokens_per_second/{phase}"]
      np.testing.assert_allclose(total, tokens, rtol=1e-12)


def test_an_error_in_the_clocks_thread_is_raised(tmp_path):
  for pushed in (True, False):
    m, x = start(tmp_path / str(pushed)), jnp.ones(3)
    x.delete()
    m.clock(0, "sample", x)
    if pushed:
      m.push(0, {"loss": 0.0})
    with pytest.raises(RuntimeError, match="deleted"):
      m.close()


def test_tensorboard_holds_the_same_numbers_and_a_resume_purges(tmp_path, monkeypatch):
  # TensorBoard's word for "read events without TensorFlow", which takes half a minute to import.
  monkeypatch.setitem(sys.modules, "tensorboard.compat.notf", types.ModuleType("notf"))
  from tensorboard.backend.event_processing import event_accumulator

  run(tmp_path, 0, 4).close()
  run(tmp_path, 2, 5).close()
  board = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
  board.Reload()
  events = board.Scalars("loss")
  assert [e.step for e in events] == [0, 1, 2, 3, 4]
  np.testing.assert_allclose([e.value for e in events], [x["loss"] for x in lines(tmp_path)])
  assert "samples/text_summary" in board.Tags()["tensors"]


DAMAGED = [b"", b"{}", b"null", b'{"step": "1"}', b'{"step": 1, "lo', b"\0" * 40, b"\xff\xfe"]


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
@pytest.mark.parametrize("bad", DAMAGED)
def test_a_damaged_line_of_the_record_costs_that_line(tmp_path, name, bad, caplog):
  caplog.set_level(logging.WARNING, "nash_jax.run.metrics")
  run(tmp_path, 0, 4).close()
  whole = (tmp_path / name).read_bytes().splitlines()
  (tmp_path / name).write_bytes(b"\n".join([*whole[:2], bad, *whole[2:]]) + b"\n")
  run(tmp_path, 4, 6).close()
  assert [line["step"] for line in lines(tmp_path, name)] == list(range(6))
  assert (tmp_path / name).read_bytes().splitlines()[:4] == whole, "the rest stays to the byte"
  assert f"{name}:3 is damaged" in caplog.text
  assert caplog.text.count("is damaged") == 1


@pytest.mark.parametrize("part", ["tensorboard", "metrics.jsonl", "samples.jsonl"])
def test_a_part_that_cannot_be_written_stops_the_run_or_is_left_behind(
  tmp_path, monkeypatch, part, caplog
):
  caplog.set_level(logging.WARNING, "nash_jax.run.metrics")

  def fail(m):
    if part == "tensorboard":
      monkeypatch.setattr(record_writer.RecordWriter, "write", full)
    else:
      monkeypatch.setitem(m._files, part, types.SimpleNamespace(write=full, close=full))

  m = run(tmp_path / "stop", 0, 3)
  fail(m)
  with pytest.raises(OSError, match=rf"stop/{part} cannot be written \(.*No space left"):
    m.push(3, {"loss": 0.0})
  m.close()
  monkeypatch.undo()
  m = run(tmp_path / "on", 0, 3, on_error="continue")
  fail(m)
  for step in range(3, 60):
    m.push(step, {"loss": 0.0})
    m.text(step, "samples", step, lambda x: [sample_of(x)])
  m.close()
  assert caplog.text.count("the run continues without it") == 1
  whole = {"metrics.jsonl", "samples.jsonl"} - {part}
  for name in whole:
    assert [line["step"] for line in lines(tmp_path / "on", name)] == list(range(60))


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
@pytest.mark.parametrize("change", ["removed", "moved", "replaced", "folder removed"])
def test_a_record_that_was_removed_meanwhile_is_not_lost_in_silence(tmp_path, change, name):
  m = run(tmp_path / "run", 0, 3)
  path = tmp_path / "run" / name
  if change == "folder removed":
    shutil.rmtree(path.parent)
  else:
    path.rename(tmp_path / "elsewhere")
    if change == "replaced":
      path.write_text("{}\n")
  reason = "another file" if change == "replaced" else "No such file"
  first = "metrics.jsonl" if change == "folder removed" else name
  with pytest.raises(OSError, match=rf"run/{first} cannot be written \(.*{reason}"):
    m.flush(3)
  with contextlib.suppress(OSError):  # of the other file, where the folder is gone
    m.close()


def test_no_thread_of_the_record_can_die_behind_the_loop(tmp_path, monkeypatch):
  """What writes events raises where the loop is; nothing waits in a queue, also not at the end."""
  monkeypatch.setattr(record_writer.RecordWriter, "flush", full)
  with pytest.raises(OSError, match="tensorboard cannot be written"):
    start(tmp_path)


def test_the_first_error_of_closing_is_raised_and_the_rest_is_closed(tmp_path, caplog, monkeypatch):
  caplog.set_level(logging.WARNING, "nash_jax.run.metrics")
  m = run(tmp_path, 0, 2)
  m.push(2, {"loss": float("nan")})
  m.push(2, {"kappa": 1.0})
  monkeypatch.setattr(record_writer.RecordWriter, "close", full)
  with pytest.raises(FloatingPointError, match="'loss' is nan at step 2"):
    m.close()
  assert "after that: " in caplog.text
  assert all(file.closed for file in m._files.values())
  assert lines(tmp_path)[-1]["step"] == 2


def test_texts_of_a_run_that_diverged_do_not_hide_its_loss(tmp_path):
  def unreadable(ids):
    raise IndexError("piece id is out of range")

  m = start(tmp_path)
  m.push(0, {"loss": jnp.float32(np.nan)})
  m.text(0, "held out", 0, unreadable)
  with pytest.raises(FloatingPointError, match="'loss' is nan at step 0"):
    m.push(1, {"loss": jnp.float32(np.nan)})
  m.text(1, "held out", 1, unreadable)
  m.close()


def test_profile_leaves_a_trace(tmp_path):
  run(tmp_path, 0, 3, profile=True).close()
  assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_the_glossary_page_and_the_glossary_agree():
  page = (ROOT / "docs" / "metrics.md").read_text()
  rows = re.findall(r"^\| `(.+?)` \| (.+?) \| (.+?) \| (.+?) \|$", page, re.MULTILINE)
  assert sorted(name for name, *_ in rows) == sorted(metrics.GLOSSARY), "each explained once"
  assert all(text.strip() for row in rows for text in row)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_stops_with_its_step(tmp_path, bad):
  """Its clipped updates are 0 or NaN: a run would learn nothing, without a word."""
  m = start(tmp_path)
  m.push(0, {"loss": jnp.float32(1), "gradient_norm": jnp.float32(bad)})
  with pytest.raises(FloatingPointError, match=r"'gradient_norm' is (nan|inf) at step 0"):
    m.push(1, {"loss": jnp.float32(1)})
  m.close()
  assert lines(tmp_path)[0] == {"step": 0, "loss": 1, "gradient_norm": None}


def test_a_run_that_goes_wrong_is_told_once_of_each(tmp_path, caplog):
  """From values that are read anyway, a step late."""
  m = start(tmp_path, kl_bound=10)
  for step in range(8):
    kl = jnp.float32(3 * step)
    m.push(step, {"flip_rate": Mean(jnp.float32(8), jnp.float32(8)), "kl_to_reference": kl})
  m.close()
  told = [record.getMessage().partition(" is ")[0] for record in caplog.records]
  assert told == ["step 2: flip_rate", "step 6: kl_to_reference"]


def test_steps_without_a_verdict_are_null_and_nought_and_told_once(tmp_path, caplog):
  nothing = Mean(jnp.float32(0), jnp.float32(0))
  m = start(tmp_path)
  for step in range(3):
    values = {"loss": nothing, "p_win": nothing, "gradient_norm": jnp.float32(0)}
    m.push(step, {**values, "valid": Mean(jnp.float32(0), jnp.float32(8))})
  m.close()
  line = {"loss": None, "p_win": None, "gradient_norm": 0, "valid": 0}
  assert [{name: x[name] for name in line} for x in lines(tmp_path)] == [line] * 3
  told = [record.message for record in caplog.records if "no verdict" in record.message]
  assert len(told) == 1
  assert told[0].startswith("step 0: no verdict could be read")

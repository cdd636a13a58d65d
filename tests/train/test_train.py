"""The online loop: what it leaves, and how it resumes after any end."""

import errno
import json
import logging
import os
import shutil
import signal

import jax
import numpy as np
import pytest
import tiny
from jax import numpy as jnp
from page_files import page_data
from tensorboardX import record_writer
from workdirs import assert_same, at, kill, lines, terminate

from nash_jax import policy, train
from nash_jax.models import gemma, logprobs
from nash_jax.run import checkpoint, metrics, signals
from nash_jax.types import Prompts


@pytest.fixture(scope="module")
def whole(start, assembled, tmp_path_factory):
  """The workdir and the end of an uninterrupted run, its step compiled by nobody before."""
  assembled.programs.train_step.clear_cache()
  workdir = tmp_path_factory.mktemp("train") / "whole"
  return workdir, start(workdir)


def test_a_run_trains_and_leaves_its_record(whole, assembled):
  workdir, done = whole
  assert (int(done.state.step), done.stopped) == (6, False)
  assert done.compilations == 1
  recorded = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  assert [line["step"] for line in recorded] == list(range(7))
  assert {name for line in recorded for name in line} - {"step"} <= set(metrics.GLOSSARY)
  assert all(recorded[step]["eval/response_length"] > 0 for step in (0, 3, 6))
  # Evaluating and saving are phases of their own: no other phase's time includes them.
  phases = [
    {name.removeprefix("seconds/") for name in line if name.startswith("seconds/")}
    for line in recorded
  ]
  step = {"sample", "judge", "update"}
  both = {"evaluate", "save"}
  assert phases == [step | {"evaluate"}, step, step, step | both, step, step, both]
  samples = lines(workdir, "samples.jsonl")
  assert [sample["step"] for sample in samples] == [step for step in (0, 3, 6) for _ in range(4)]
  prompts = [sample["prompt"] for sample in samples]
  assert prompts[:4] == prompts[4:8] == prompts[8:]
  assert all(len(sample["response"]) > 0 < len(sample["reference"]) for sample in samples)
  assert all(0 < sample["tokens"] <= 12 >= sample["reference_tokens"] > 0 for sample in samples)
  assert all(0 <= sample["p_win"] <= 1 and sample["logp"] < 0 for sample in samples)
  assert "p_win_first" not in samples[0], "the population is shown no order"
  assert {sample["log_ratio"] for sample in samples[:4]} == {0}, "it is the reference yet"
  assert 0 not in {sample["log_ratio"] for sample in samples[8:]}
  (shown,) = page_data(workdir)["texts"]
  assert [item["prompt"] for item in shown["items"]] == prompts[:4]
  assert shown["names"] == ["reference", "step 0", "step 3", "step 6"]
  moved = jax.tree.map(lambda a, b: jnp.max(jnp.abs(a - b)), done.state.params, assembled.reference)
  assert max(jax.tree.leaves(moved)) > 1e-3


def test_a_policy_begins_as_its_reference_and_target(whole):
  first = lines(whole[0])[0]
  assert abs(first["kl_to_reference"]) < 1e-5
  assert abs(first["kl_to_target"]) < 1e-5
  assert first["eval/kl_to_reference"] == 0
  assert first["logp_gap"] < 1e-4
  assert first["stopped"] + first["truncated"] == 1
  assert any(abs(line["kl_to_reference"]) > 1e-5 for line in lines(whole[0])[1:-1])


def test_the_reference_is_donated_to_nothing(whole, assembled):
  model = gemma.preset("tiny", num_embed=1024)
  assert_same(assembled.reference, policy.load_weights("", model, assembled.config.seed))


def test_a_reference_is_the_same_held_in_the_type_it_is_computed_with():
  model = gemma.preset("tiny", num_embed=1024)
  whole = policy.load_weights("", model)
  held = policy.load_weights("", model, dtype=jnp.bfloat16)
  assert_same(held, gemma.cast(whole, jnp.bfloat16))
  rng = np.random.default_rng(0)
  prompts = Prompts(rng.integers(5, 1024, (3, 4)), np.ones((3, 4), bool), np.arange(3))
  tokens, mask = rng.integers(5, 1024, (3, 2, 5)), np.ones((3, 2, 5), bool)
  logprobs_of = jax.jit(
    lambda params: logprobs.response_logprobs(
      params, model, prompts, tokens, mask, dtype=jnp.bfloat16
    )
  )
  assert_same(logprobs_of(held), logprobs_of(whole))


def test_a_killed_run_goes_on_from_its_checkpoint_as_if_never_killed(
  whole, start, assembled, tmp_path
):
  with pytest.raises(RuntimeError, match="killed"):
    start(tmp_path, sample=at(6, kill, assembled.programs.sample))
  assert (tmp_path / "checkpoints" / "00000003").exists()
  assert [line["step"] for line in lines(tmp_path)][-1] == 4
  done = start(tmp_path)
  assert_same(done.state, whole[1].state)
  assert lines(tmp_path) == lines(whole[0])
  assert lines(tmp_path, "samples.jsonl") == lines(whole[0], "samples.jsonl")


def test_a_signal_saves_leaves_cleanly_and_the_run_goes_on(whole, start, assembled, tmp_path):
  done = start(tmp_path, sample=at(2, terminate, assembled.programs.sample))
  assert done.stopped
  assert int(done.state.step) == 2
  assert checkpoint._steps(checkpoint._folder(tmp_path)) == [2]
  done = start(tmp_path)
  assert not done.stopped
  assert_same(done.state, whole[1].state)
  assert lines(tmp_path) == lines(whole[0])
  again = start(tmp_path)
  assert_same(again.state, whole[1].state)
  assert lines(tmp_path) == lines(whole[0]), "a finished run that is started again changes nothing"


def test_a_second_run_in_a_workdir_is_refused_and_the_first_goes_on(
  whole, start, assembled, tmp_path
):
  refused = []

  def intrude():
    with pytest.raises(ValueError, match=f"in use by process {os.getpid()} on ") as error:
      start(tmp_path)
    refused.append(error)

  done = start(tmp_path, sample=at(5, intrude, assembled.programs.sample))
  assert refused
  assert_same(done.state, whole[1].state)
  assert lines(tmp_path) == lines(whole[0])


def test_a_step_beyond_the_end_ends_and_the_finished_checkpoint_stays(whole, changed, tmp_path):
  shutil.copytree(whole[0], tmp_path / "run")
  less = {"steps": 4, "checkpoint.allow": ("checkpoint.keep",), "checkpoint.keep": 1}
  done = changed(tmp_path / "run", less)
  assert (int(done.state.step), done.stopped) == (6, False)
  assert_same(done.state, whole[1].state)
  assert 6 in checkpoint._steps(checkpoint._folder(tmp_path / "run"))
  assert lines(tmp_path / "run") == lines(whole[0])


def test_a_failed_first_attempt_leaves_its_folder_to_the_next(
  whole, start, changed, assembled, tmp_path
):
  """Bad data leave no config behind; a death in the first step none that counts."""
  config = tiny.train({"prompts.path": str(tmp_path / "typo.jsonl")})
  with pytest.raises(ValueError, match=r"typo.jsonl"):
    train.run(config, tmp_path / "run")
  assert not (tmp_path / "run" / "config.json").exists()
  with pytest.raises(RuntimeError, match="killed"):
    changed(tmp_path / "run", {"seed": 1}, sample=at(1, kill, assembled.programs.sample))
  done = start(tmp_path / "run")
  assert_same(done.state, whole[1].state)


def test_a_longer_run_says_where_its_learning_rate_jumps(whole, changed, tmp_path, caplog):
  caplog.set_level(logging.WARNING, "nash_jax.run.loop")
  cosine = {"optimizer.schedule": "cosine", "steps": 3}
  changed(tmp_path / "cosine", cosine)
  changed(tmp_path / "cosine", {**cosine, "steps": 4})
  assert "the learning rate jumps from 0.01 to 0.02318 at step 3" in caplog.text
  assert "schedule='cosine' over steps=4 instead of 3" in caplog.text
  caplog.clear()
  shutil.copytree(whole[0], tmp_path / "constant")
  done = changed(tmp_path / "constant", {"steps": 7})
  assert not [record for record in caplog.records if record.name == "nash_jax.run.loop"]
  assert (int(done.state.step), done.stopped) == (7, False)
  assert [line["step"] for line in lines(tmp_path / "constant")] == list(range(8))


def test_a_full_disk_under_the_record_ends_the_run_in_a_line_that_resumes(
  whole, start, changed, assembled, tmp_path, monkeypatch
):
  """TensorBoard's file cannot be written from the fifth step on."""
  write = record_writer.RecordWriter.write

  def full(self, data):
    raise OSError(errno.ENOSPC, "No space left on device")

  def fill():
    monkeypatch.setattr(record_writer.RecordWriter, "write", full)

  message = (
    r"tensorboard cannot be written .*No space left.*last good checkpoint is step 3 in .*same"
  )
  with pytest.raises(OSError, match=message):
    start(tmp_path, sample=at(5, fill, assembled.programs.sample))
  monkeypatch.setattr(record_writer.RecordWriter, "write", write)
  done = start(tmp_path)
  assert_same(done.state, whole[1].state)
  assert lines(tmp_path) == lines(whole[0])
  fields = {"on_record_error": "continue"}
  done = changed(tmp_path / "on", fields, sample=at(2, fill, assembled.programs.sample))
  assert_same(done.state, whole[1].state)
  assert lines(tmp_path / "on") == lines(whole[0])


@pytest.mark.parametrize("nohup", [False, True])
def test_a_terminal_that_closes_stops_a_run_unless_nohup_says_otherwise(nohup):
  outside = []
  handler = signal.SIG_IGN if nohup else lambda number, frame: outside.append(number)
  before = signal.signal(signal.SIGHUP, handler)
  try:
    with signals.Stop() as stop:
      os.kill(os.getpid(), signal.SIGHUP)
      assert stop.before(1) is not nohup
    assert signal.getsignal(signal.SIGHUP) is handler
  finally:
    signal.signal(signal.SIGHUP, before)
  assert not outside


def test_a_signal_while_the_last_save_is_written_costs_nothing(
  whole, start, assembled, tmp_path, monkeypatch
):
  """Signals are heeded until the checkpoints are closed, however many come."""
  close, heeded = checkpoint.Checkpoints.close, []

  def closing(self):
    heeded.append(getattr(signal.getsignal(signal.SIGTERM), "__name__", "nobody"))
    close(self)
    heeded.append(getattr(signal.getsignal(signal.SIGTERM), "__name__", "nobody"))

  monkeypatch.setattr(checkpoint.Checkpoints, "close", closing)
  before = signal.getsignal(signal.SIGTERM)

  def many():
    for _ in range(30):
      terminate()

  done = start(tmp_path, sample=at(5, many, assembled.programs.sample))
  assert done.stopped
  assert heeded == ["_handle", "_handle"]
  assert signal.getsignal(signal.SIGTERM) is before
  assert max(checkpoint._steps(checkpoint._folder(tmp_path))) == 5
  assert_same(start(tmp_path).state, whole[1].state)
  assert lines(tmp_path) == lines(whole[0])


def test_checkpoints_are_closed_whatever_else_fails(start, tmp_path, monkeypatch):
  closed = []
  close = checkpoint.Checkpoints.close
  monkeypatch.setattr(checkpoint.Checkpoints, "close", lambda self: closed.append(1) or close(self))
  log_close = metrics.Metrics.close

  def full(self):
    log_close(self)
    raise OSError("disk full")

  monkeypatch.setattr(metrics.Metrics, "close", full)
  with pytest.raises(OSError, match="disk full"):
    start(tmp_path)
  assert closed == [1]
  assert checkpoint._steps(checkpoint._folder(tmp_path)) == [3, 6]


def test_a_workdir_of_another_config_is_refused_before_anything_loads(whole, monkeypatch):
  monkeypatch.setattr(train, "set_up", lambda config: pytest.fail("weights are loaded"))
  with pytest.raises(ValueError, match="another config") as error:
    train.run(tiny.train({"algorithm.beta": 0.05}), whole[0])
  assert "algorithm.beta: 0.1 there, 0.05 here" in str(error.value)


@pytest.mark.slow
def test_a_run_starts_from_the_target_of_another_and_copies_its_own_periodically(whole, tmp_path):
  """Set up in full: its own weights, its own compilation, the other form of target."""
  config = tiny.train(
    {
      "model.weights": f"{whole[0]}@target",
      "steps": 2,
      "algorithm.target_update": "periodic",
      "algorithm.target_period": 2,
    }
  )
  done = train.run(config, tmp_path / "warm", progress=False)
  assert done.compilations == 1
  assert_same(done.state.target, done.state.params)
  first, second, _ = lines(tmp_path / "warm")
  assert abs(first["kl_to_reference"]) < 1e-5
  assert first["eval/kl_to_reference"] == 0
  assert second["kl_to_target"] == pytest.approx(second["kl_to_reference"], abs=1e-6)
  model = gemma.preset("tiny", num_embed=1024)
  assert_same(policy.load_weights(config.model.weights, model), whole[1].state.target)

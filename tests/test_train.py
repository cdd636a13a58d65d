"""The online loop: what it leaves, how it resumes after any end, when it waits for the device."""

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

from configs import short_game
from nash_jax import policy, train, weights
from nash_jax.config import resolve
from nash_jax.data import tokenizer
from nash_jax.models import gemma, logprobs
from nash_jax.run import checkpoint, inputs, metrics, signals
from nash_jax.types import Prompts


def lines(workdir, name="metrics.jsonl"):
  """Returns the record of a run without what a clock said."""
  timed = ("seconds/", "tokens_per_second/")
  return [
    {name: value for name, value in json.loads(line).items() if not name.startswith(timed)}
    for line in (workdir / name).read_text().splitlines()
  ]


def assert_same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


def at(call, action, function):
  """Returns `function` that does `action` first when it is called for the `call`-th time."""
  calls = []

  def wrapped(*args):
    calls.append(1)
    if len(calls) == call:
      action()
    return function(*args)

  return wrapped


@pytest.fixture(scope="module")
def start(assembled):
  """Returns (workdir, changed functions) -> Done of the tiny run, compiled but once."""

  def start(workdir, **functions):
    return tiny.start(assembled, tiny.train(), workdir, **functions)

  return start


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


def kill():
  raise RuntimeError("killed")


def terminate():
  os.kill(os.getpid(), signal.SIGTERM)


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


def test_the_loop_reads_nothing_of_the_step_in_hand(start, tmp_path, monkeypatch):
  """Only a checkpoint's score may: saving waits for the device anyway."""
  push, read, value = metrics.Metrics.push, metrics.Metrics.read, metrics.Metrics.value
  current, reads, scoring = [-1], [], []

  def watched_push(self, step, values):
    current[0] = step
    push(self, step, values)

  def watched_value(self, step, name):
    assert name == "eval/win_rate_vs_reference"
    assert step in (3, 6)
    scoring.append(step)
    try:
      return value(self, step, name)
    finally:
      scoring.pop()

  def watched_read(self, step, values):
    closing = step == 6
    if step >= current[0] and not scoring and not closing:
      raise AssertionError(f"values of step {step} are read in step {current[0]}")
    reads.append(step)
    return read(self, step, values)

  monkeypatch.setattr(metrics.Metrics, "push", watched_push)
  monkeypatch.setattr(metrics.Metrics, "value", watched_value)
  monkeypatch.setattr(metrics.Metrics, "read", watched_read)
  start(tmp_path)
  assert reads == [0, 1, 2, 3, 3, 4, 5, 6, 6]


def test_nothing_but_the_reader_waits_for_the_device(start, assembled, tmp_path, monkeypatch):
  """Values handed to the loop refuse to become numbers outside of metrics.py."""
  reading = []

  class Late:
    def __init__(self, array):
      self.array = array

    def __array__(self, *args, **kwargs):
      raise AssertionError("a device value is read in the loop")

    __float__ = __int__ = __bool__ = __array__

  read = metrics.Metrics.read

  def open_late(self, step, values):
    reading.append(step)
    return read(self, step, {n: v.array if isinstance(v, Late) else v for n, v in values.items()})

  def late(function):
    def wrapped(*args):
      state, values = function(*args)
      # The clock's thread waits for the gradient's norm.
      return state, {n: v if n == "gradient_norm" else Late(v) for n, v in values.items()}

    return wrapped

  monkeypatch.setattr(metrics.Metrics, "read", open_late)
  done = start(tmp_path, train_step=_Counted(late(assembled.programs.train_step)))
  assert int(done.state.step) == 6
  assert len(reading) == 9


class _Counted:
  """A function in the place of a compiled one, which tells its compilations."""

  def __init__(self, function):
    self._function = function

  def __call__(self, *args):
    return self._function(*args)

  def _cache_size(self):
    return 1


def test_a_loss_that_is_not_finite_names_step_and_last_good_checkpoint(start, assembled, tmp_path):
  calls = []

  def poison(state, ref, batch):
    state, values = assembled.programs.train_step(state, ref, batch)
    calls.append(1)
    if len(calls) == 5:
      state = state.replace(params=jax.tree.map(lambda x: x * jnp.nan, state.params))
    return state, values

  with pytest.raises(
    FloatingPointError,
    match=r"'loss' is nan at step 5; the last good checkpoint"
    r" is step 3 in .*Lower optimizer.learning_rate",
  ):
    start(tmp_path, train_step=poison)
  assert checkpoint._steps(checkpoint._folder(tmp_path)) == [3], "what is not finite is not saved"
  done = start(tmp_path)
  assert int(done.state.step) == 6, "the run goes on from the last good one"


@pytest.fixture
def changed(assembled):
  """Returns (workdir, changes by dotted name, changed functions) -> Done of the tiny run."""
  return lambda workdir, changes, **functions: tiny.start(
    assembled, tiny.train(changes), workdir, **functions
  )


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


def test_a_judge_that_is_the_reference_is_held_once(assembled, tmp_path):
  """The same weights by another name are two trees, of the same numbers and sums."""
  model_config, files = gemma.preset("tiny", num_embed=1024), [tmp_path / "a.safetensors"]
  weights.save(str(files[0]), assembled.reference, model_config, "float32", {})
  files.append(shutil.copy(files[0], tmp_path / "b.safetensors"))

  def set_up(judge_file, **changes):
    own = {"judge.name": "gemma", "judge.model.weights": str(judge_file)}
    c = tiny.train({"model.weights": str(files[0]), **own, **changes})
    return train.set_up(resolve(c))

  once, twice = map(set_up, files)
  pairs = [
    list(zip(*map(jax.tree.leaves, (x.judge.params, x.reference)), strict=True))
    for x in (once, twice)
  ]
  assert all(a is b for a, b in pairs[0])
  assert not any(a is b for a, b in pairs[1])
  assert_same(once.judge.params, twice.judge.params)
  sums = [{*x.inputs()["judge.model.weights"].values()} for x in (once, twice)]
  assert sums[0] == sums[1]
  other_type = set_up(files[0], **{"judge.model.dtype": "bfloat16"})
  assert jax.tree.leaves(other_type.judge.params)[0].dtype == "bfloat16"


def test_prompts_that_changed_are_named_at_a_resume(changed, assembled, tmp_path):
  path = tmp_path / "p.jsonl"
  path.write_text('{"prompt": "Lily saw a kite."}\n')
  fields = {"prompts.path": str(path)}
  with pytest.raises(RuntimeError, match="killed"):
    changed(tmp_path / "run", fields, sample=at(5, kill, assembled.programs.sample))
  with path.open("a") as file:
    file.write('{"prompt": "A new line."}\n')
  with pytest.raises(ValueError, match=r"prompts.path: .*p.jsonl\n.*'prompts.path'"):
    changed(tmp_path / "run", fields)
  assert lines(tmp_path / "run")[-1]["step"] == 3
  done = changed(tmp_path / "run", {**fields, "checkpoint.allow": ("prompts.path",)})
  assert int(done.state.step) == 6


def test_every_input_that_a_run_hangs_on_is_summed(assembled, tmp_path):
  """Each file in turn is changed: its config field, and no other, has another sum."""
  files = {
    "prompts.path": "prompts.jsonl", "prompts.held_out_path": "held_out.jsonl",
    "model.tokenizer": "tokenizer.model", "judge.table": "game.npy",
    "judge.template": "template.txt", "judge.model.tokenizer": "judge_tokenizer.model",
  }  # fmt: skip
  files = {field: tmp_path / name for field, name in files.items()}
  for path in files.values():
    path.write_text("1")
  config = tiny.train({field: str(path) for field, path in files.items()})
  params, parts = assembled.judge.params, (assembled.train_prompts, assembled.held_out)

  def found(judge):
    config.judge.name = judge
    return inputs.of_training(config, params, *parts)

  for judge in ("population", "table", "table_reward", "http", "gemma_text"):
    before = found(judge)
    read = {"prompts.path", "prompts.held_out_path", "model.tokenizer"}
    read |= {"judge.table"} if "table" in judge else set()
    read |= {"judge.template"} if judge in ("http", "gemma_text") else set()
    read |= {"judge.model.tokenizer"} if judge == "gemma_text" else set()
    assert set(before) == read
    for field in read:
      files[field].write_text("2")
      after = found(judge)
      assert {name for name in read if before[name] != after[name]} == {field}
      files[field].write_text("1")
  config.judge.name, config.judge.template = "gemma", "stories"
  config.judge.model.weights = "judge.safetensors"
  sums = [
    inputs.of_training(config, {"w": jnp.float32([x, 2])}, *parts)["judge.model.weights"]
    for x in (1, 1, 3)
  ]
  assert sums[0] == sums[1] != sums[2]
  config.prompts.task = "registered elsewhere"
  by_content = inputs.of_training(config, params, *parts)
  assert by_content == inputs.of_training(config, params, *parts)
  other = inputs.of_training(config, params, assembled.held_out, assembled.held_out)
  assert {name for name in other if other[name] != by_content[name]} == {"prompts.task"}


def test_a_run_begun_under_another_draw_is_refused(changed, assembled, tmp_path, monkeypatch):
  """Of a large vocabulary: a run from before ids were drawn in two levels would change its law."""
  sampling = assembled.programs.sample
  for folder, most in (("before", 2000), ("since", 1000)):
    monkeypatch.setattr(inputs.sampler, "MOST_AT_ONCE", most)  # of 1,024 ids
    with pytest.raises(RuntimeError, match="killed"):
      changed(tmp_path / folder, {}, sample=at(5, kill, sampling))
  assert int(changed(tmp_path / "since", {}).state.step) == 6
  with pytest.raises(ValueError, match=r"sampling.draw: an id of a large vocabulary\n"):
    changed(tmp_path / "before", {})
  done = changed(tmp_path / "before", {"checkpoint.allow": ("sampling.draw",)})
  assert int(done.state.step) == 6


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


@pytest.mark.parametrize("reported", ["loss", "parameters"])
def test_unreadable_texts_do_not_hide_that_a_run_diverged(
  start, assembled, tmp_path, monkeypatch, reported
):
  """The held-out texts at step 3 are ids without a piece; so is the loss, or the state, NaN."""

  def poison(state, reference, batch):
    state, values = assembled.programs.train_step(state, reference, batch)
    bad = jax.tree.map(lambda x: x * jnp.nan, state.params)
    state = state.replace(
      params=jax.tree.map(lambda a, b: jnp.where(state.step == 3, b, a), state.params, bad)
    )
    return state, values

  def no_piece(self, ids):
    raise IndexError("OUT_OF_RANGE: piece id is out of range.")

  monkeypatch.setattr(tokenizer.Tokenizer, "decode", no_piece)
  start_texts = metrics.Metrics.text
  monkeypatch.setattr(
    metrics.Metrics, "text", lambda self, step, *more: step == 3 and start_texts(self, step, *more)
  )
  functions = {"train_step": poison}
  if reported == "loss":
    functions["evaluate"] = lambda *args: assembled.programs.evaluate(*args)
    monkeypatch.setattr(checkpoint.Checkpoints, "save", lambda *args: None)
  message = "params.* is not finite after step 3" if reported == "parameters" else "'loss' is nan"
  with pytest.raises(FloatingPointError, match=f"{message}.*there is no checkpoint yet in .*Lower"):
    start(tmp_path, **functions)


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


def assert_nothing_learned(workdir, done, first):
  assert_same(done.state.params, first.params)
  assert_same(done.state.opt_state, first.opt_state)
  *steps, _ = lines(workdir)
  for line in steps:
    assert line["valid"] == line["gradient_norm"] == 0
    assert line["loss"] is line["p_win"] is None


def test_a_run_of_unreadable_verdicts_goes_on_with_the_parameters_it_has(
  start, assembled, tmp_path
):
  def unread(*args):
    verdict = assembled.programs.judge(*args)
    return verdict.replace(valid=jnp.zeros_like(verdict.valid))

  done = start(tmp_path, judge=unread)
  assert done.state.step == 6
  assert_nothing_learned(tmp_path, done, assembled.programs.init(assembled.reference))
  assert checkpoint._steps(checkpoint._folder(tmp_path)) == [3, 6]


@pytest.mark.slow
def test_a_table_that_reads_other_tokens_than_are_drawn_teaches_nothing(tmp_path):
  """The tokens drawn are 7 to 10, the table reads 11 to 14."""
  config = short_game.get_config()
  config.update_from_flattened_dict({"judge.first_token": 11, "evaluation.exact": False})
  config.update_from_flattened_dict({"steps": 4, "evaluation.every": 2, "checkpoint.every": 2})
  config.prompts.batch_size = 8
  setup = train.set_up(resolve(config))
  done = train.run(config, tmp_path, progress=False)
  assert_nothing_learned(tmp_path, done, setup.initial_state())
  assert [line.get("eval/win_rate_vs_reference", 0) for line in lines(tmp_path)] == [
    None, 0, None, 0, None
  ]  # fmt: skip


@pytest.mark.slow
def test_a_prox_weight_that_overflows_the_gradient_stops_the_run(tmp_path):
  config = tiny.train({"algorithm.eta": 1e-30})
  with pytest.raises(FloatingPointError, match=r"'gradient_norm' is (inf|nan) at step \d"):
    train.run(config, tmp_path, progress=False)

"""The run state on disk: bit for bit, verified, and never lost."""

import copy
import errno
import json
import logging
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
from typing import Any

import flax.struct
import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from etils import epath
from jax import numpy as jnp

from nash_jax.run import checkpoint, lock
from nash_jax.run.checkpoint import Checkpoints, restore_part
from nash_jax.run.signals import Stop

CONFIG = {"steps": 3, "algorithm": {"beta": 0.1, "eta": 1.0}, "checkpoint": {"allow": ()}}


@flax.struct.dataclass
class State:
  step: Any
  params: Any
  target: Any
  opt_state: Any
  copies: Any


def state(step, seed=0, target=True):
  rng = np.random.default_rng(seed + step)
  params = {
    "layer": [{"w": jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)} for _ in range(2)],
    "norm": jnp.asarray(rng.normal(size=5), jnp.bfloat16),
    "on": jnp.asarray([True, False]),
  }
  opt_state = optax.adam(1e-3).init(params["layer"])
  params2 = jax.tree.map(jnp.copy, params) if target else None
  return State(jnp.int32(step), params, params2, opt_state, {})


def start(workdir, keep=3, config=None, **kwargs):
  return Checkpoints(workdir, keep=keep, config=config or CONFIG, **kwargs)


def saved(workdir, *steps, **kwargs):
  checkpoints = start(workdir, **kwargs)
  for step in steps:
    checkpoints.save(step, state(step))
  checkpoints.close()
  return pathlib.Path(workdir) / "checkpoints"


def assert_same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.dtype == y.dtype
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def abstract(tree):
  first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=first), tree)


@pytest.mark.parametrize("target", [True, False])
def test_a_state_comes_back_bit_for_bit(tmp_path, target):
  checkpoints = start(tmp_path)
  assert checkpoints.restore(state(0, target=target)) is None
  assert checkpoints.last_good() is None
  whole = state(7, target=target)
  whole.params["layer"][0]["w"] = jnp.asarray([[-0.0, 1e-42, 3e38]])  # signs and subnormals too
  checkpoints.save(7, whole)
  for like in (whole, abstract(whole)):
    got, step = checkpoints.restore(like)
    assert step == checkpoints.last_good() == 7
    assert_same(got, whole)
  checkpoints.close()


def test_buffers_may_be_donated_as_soon_as_save_returns(tmp_path):
  spoil = jax.jit(lambda tree: jax.tree.map(lambda x: -x - 1, tree), donate_argnums=0)
  checkpoints, x = start(tmp_path), {"params": {"w": jnp.arange(200_000.0)}}
  checkpoints.save(1, x)
  after = spoil(x)
  checkpoints.save(2, after)
  checkpoints.wait()
  (first, _), (second, _) = (restore_part(tmp_path, "params", after["params"], s) for s in (1, 2))
  np.testing.assert_array_equal(first["w"], np.arange(200_000.0))
  np.testing.assert_array_equal(second["w"], -np.arange(200_000.0) - 1)
  checkpoints.close()


def test_the_last_checkpoints_and_the_best_are_kept(tmp_path):
  checkpoints = start(tmp_path, keep=2)
  for step, score in enumerate([0.1, 0.9, 0.9, float("nan"), 0.2, None]):
    checkpoints.save(step, state(step), score)
  checkpoints.close()
  # The best is the later of equals; a score that is no number is none.
  assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == [2, 4, 5]
  like = state(0).params
  for kwargs, step in (({}, 5), ({"best": True}, 2), ({"step": 4}, 4)):
    got, found = restore_part(tmp_path, "params", like, **kwargs)
    assert found == step
    assert_same(got, state(step).params)


def test_a_part_is_read_without_the_others(tmp_path):
  folder = saved(tmp_path, 3)
  for other in ("target", "opt_state", "step"):
    shutil.rmtree(folder / "00000003" / other)
  got, step = restore_part(tmp_path, "params", abstract(state(0).params))
  assert step == 3
  assert_same(got, state(3).params)


def test_parts_that_are_not_there_are_named(tmp_path):
  like = state(0).params
  with pytest.raises(ValueError, match="expected one, found none"):
    restore_part(tmp_path, "params", like)
  saved(tmp_path, 3)
  with pytest.raises(ValueError, match=r"expected 4, found \[3\]"):
    restore_part(tmp_path, "params", like, step=4)
  with pytest.raises(ValueError, match=r"expected the best by a score, found \[3\]"):
    restore_part(tmp_path, "params", like, best=True)
  with pytest.raises(ValueError, match=r"parms.layer.0.w: expected float32\[3, 4\], got absent"):
    restore_part(tmp_path, "parms", like)


def test_nothing_wrong_is_read_whatever_file_is_damaged(tmp_path):
  """Each file of the newest checkpoint is cut, deleted, or has a bit turned."""
  states = {step: {"params": state(step).params} for step in (1, 2)}
  checkpoints = start(tmp_path)
  for step in states:
    checkpoints.save(step, states[step])
  checkpoints.close()
  folder, seen = checkpoint._folder(tmp_path), set()
  with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
    for path in [p for p in pathlib.Path(folder / "00000002").rglob("*") if p.is_file()]:
      whole = path.read_bytes()
      bit = bytearray(whole)
      bit[len(bit) // 2] ^= 1
      for damage, data in (("cut", whole[: len(whole) // 2]), ("bit", bit), ("deleted", None)):
        path.unlink() if data is None else path.write_bytes(data)
        got, step, bad = checkpoint._restore_newest(reader, folder, [1, 2], states[1])
        assert_same(got, states[step])
        assert bad == ([2] if step == 1 else [])
        if bad:
          seen.add((damage, path.relative_to(folder / "00000002").parts[0]))
        path.write_bytes(whole)
  kinds = {(damage, what) for damage in ("cut", "deleted") for what in ("manifest", "params")}
  assert seen >= kinds | {("bit", "params")}


def test_a_damaged_newest_checkpoint_is_named_and_set_aside(tmp_path, caplog):
  folder = saved(tmp_path, 1, 2)
  for path in (folder / "00000002" / "opt_state" / "d").iterdir():
    path.write_bytes(path.read_bytes()[:-9])
  checkpoints = start(tmp_path)
  got, step = checkpoints.restore(state(0))
  assert step == 1
  assert_same(got, state(1))
  assert "{2: " in caplog.text
  assert "1 is used instead" in caplog.text
  checkpoints.save(2, state(2))  # its step is free again
  assert checkpoints.last_good() == 2
  checkpoints.close()
  assert len(list(folder.glob("00000002.damaged-*"))) == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_state_that_is_not_finite_is_never_saved_nor_displaces_a_good_one(tmp_path, bad):
  checkpoints = start(tmp_path, keep=1)
  checkpoints.save(1, state(1))
  broken = state(2)
  broken.params["layer"][1]["w"] = broken.params["layer"][1]["w"].at[2, 1].set(bad)
  with pytest.raises(FloatingPointError, match=r"params.layer.1.w is not finite after step 2"):
    checkpoints.save(2, broken)
  assert checkpoints.last_good() == 1
  got, step = checkpoints.restore(state(0))
  assert step == 1
  assert_same(got, state(1))
  checkpoints.close()


def test_a_save_that_was_cut_off_is_named(tmp_path, caplog):
  folder = saved(tmp_path, 1)
  shutil.copytree(folder / "00000001", folder / "00000002.orbax-checkpoint-tmp")
  (folder / "00000002.orbax-checkpoint-tmp" / "_CHECKPOINT_METADATA").unlink()
  checkpoints = start(tmp_path)
  assert checkpoints.restore(state(0))[1] == 1
  assert "00000002.orbax-checkpoint-tmp was never finished: step 1 is used" in caplog.text
  checkpoints.save(2, state(2))
  assert checkpoints.restore(state(0))[1] == 2
  checkpoints.close()


def test_without_a_good_checkpoint_the_run_does_not_start_over(tmp_path):
  folder = saved(tmp_path, 1, 2)
  for path in folder.iterdir():
    shutil.rmtree(path / "params")
  checkpoints = start(tmp_path)
  with pytest.raises(ValueError, match=r"no checkpoint in .* is good.*\{2: .*1: .*start again"):
    checkpoints.restore(state(0))
  checkpoints.close()
  assert sorted(path.name for path in folder.iterdir()) == ["00000001", "00000002"]


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda s: s.replace(target=None), r"target.layer.0.w: expected absent, got float32\[3, 4\]"),
    (
      lambda s: s.replace(params={**s.params, "z": s.step}),
      r"params.z: expected int32\[\], got absent",
    ),
    (lambda s: s.replace(step=jnp.zeros(2)), r"step: expected float32\[2\], got int32\[\]"),
  ],
)
def test_the_first_leaf_that_differs_is_named(tmp_path, change, message):
  saved(tmp_path, 1)
  checkpoints = start(tmp_path)
  with pytest.raises(ValueError, match=message):
    checkpoints.restore(change(state(0)))
  assert checkpoints.restore(state(0))[1] == 1, "a misfit is no damage"
  checkpoints.close()


def test_checksums_tell_states_apart_whatever_the_dtype():
  rng = np.random.default_rng(0)
  for dtype in (bool, np.int8, np.int32, jnp.bfloat16, np.float16, np.float32):
    x = rng.integers(0, 2, (4, 6)).astype(dtype)
    changed = x.copy()
    changed[2, 3] = 1 - x[2, 3]
    variants = [x, changed, np.roll(x, 1, axis=0), np.roll(x, 1, axis=1)]
    assert len({v.tobytes() for v in variants}) == 4
    assert len({int(checkpoint._checksums({"x": jnp.asarray(v)})["x"][0]) for v in variants}) == 4


def test_another_config_is_refused_field_by_field(tmp_path):
  config = copy.deepcopy(CONFIG)
  start(tmp_path, config=config).close()
  config["checkpoint"]["allow"] = []  # a list is a tuple, once read from JSON
  start(tmp_path, config=config).close()
  config["algorithm"]["beta"], config["steps"] = 0.05, 9
  with pytest.raises(ValueError, match="another config") as error:
    start(tmp_path, config=config, allow=("eta",))
  assert "algorithm.beta: 0.1 there, 0.05 here" in str(error.value)
  assert str(error.value).endswith("add --config.checkpoint.allow=\"('eta', 'algorithm.beta')\"")
  assert "steps: 3" not in str(error.value)
  assert json.loads((tmp_path / "config.json").read_text())["steps"] == 3, (
    "a refusal writes nothing"
  )
  config["checkpoint"]["allow"] = ("algorithm",)
  start(tmp_path, config=config, allow=("algorithm",)).close()
  assert json.loads((tmp_path / "config.json").read_text())["algorithm"]["beta"] == 0.05
  assert "jax" in json.loads((tmp_path / "versions.json").read_text())


def test_a_workdir_that_cannot_be_used_is_refused(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(
    ValueError, match=r"workdir .*file/run: expected a folder that can be written"
  ):
    start(tmp_path / "file" / "run")
  with pytest.raises(ValueError, match="keep: expected at least 1, got 0"):
    start(tmp_path, keep=0)
  (tmp_path / "config.json").write_text("{")
  with pytest.raises(ValueError, match=r"config.json: does not parse"):
    start(tmp_path)


def test_signals_ask_for_a_stop_and_the_second_interrupt_is_at_once(capfd):
  before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
  with Stop() as stop:
    assert not stop.requested
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.requested
  with Stop() as stop:
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.requested
    with pytest.raises(KeyboardInterrupt):
      signal.raise_signal(signal.SIGINT)
  assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
  assert capfd.readouterr().err.count("stopping after this step") == 2


def failing(times, function, error):
  """Returns `function` that raises `error` the first so many times it is called."""
  calls = []

  def wrapped(*args, **kwargs):
    calls.append(1)
    if len(calls) <= times:
      raise error
    return function(*args, **kwargs)

  return wrapped


EIO = OSError(errno.EIO, "Input/output error")


def unreadable(monkeypatch, part, times):
  """Lets the first so many reads of files with `part` in their path fail; returns those."""
  monkeypatch.setattr(checkpoint, "READ_AGAIN", (0.0,), raising=False)
  reads, path_type = [], epath.gpath.PosixGPath

  def patched(function):
    def read(path, *args, **kwargs):
      if part in str(path) and len(reads) < times:
        reads.append(path)
        raise EIO
      return function(path, *args, **kwargs)

    return read

  for name in ("read_bytes", "read_text", "open"):
    monkeypatch.setattr(path_type, name, patched(getattr(path_type, name)))
  return reads


@pytest.mark.parametrize("where", ["manifest", "arrays"])
def test_a_read_error_that_passes_is_no_damage(tmp_path, monkeypatch, where):
  folder = saved(tmp_path, 1, 2)
  checkpoints = start(tmp_path)
  if where == "manifest":
    checkpoints.wait()
    monkeypatch.setattr(checkpoints, "wait", lambda: None)  # which reads it too
    reads = unreadable(monkeypatch, "00000002/manifest", 1)
  else:
    reads = [1]
    restore = failing(1, checkpoints._orbax.restore, ValueError("[OS error 5: EIO]"))
    monkeypatch.setattr(checkpoints._orbax, "restore", restore)
  got, step = checkpoints.restore(state(0))
  assert step == 2
  assert reads
  assert_same(got, state(2))
  assert sorted(path.name for path in folder.iterdir()) == ["00000001", "00000002"]
  monkeypatch.undo()
  checkpoints.close()


def test_a_read_error_that_stays_is_raised_and_changes_nothing(tmp_path, monkeypatch):
  folder = saved(tmp_path, 1, 2)
  checkpoints = start(tmp_path)
  monkeypatch.setattr(checkpoints, "wait", lambda: None)  # which reads manifests too
  unreadable(monkeypatch, "00000002/manifest", 99)
  with pytest.raises(OSError, match=r"00000002 cannot be read .*nothing is changed"):
    checkpoints.restore(state(0))
  assert sorted(path.name for path in folder.iterdir()) == ["00000001", "00000002"]
  monkeypatch.undo()
  checkpoints.close()


def test_an_unreadable_manifest_does_not_cost_its_checkpoint(tmp_path, monkeypatch):
  """While old checkpoints are deleted the best one's manifest cannot be read, once."""
  checkpoints = start(tmp_path, keep=1)
  checkpoints.save(1, state(1), 0.9)
  checkpoints.save(2, state(2), 0.1)
  checkpoints.wait()
  reads = unreadable(monkeypatch, "00000001/manifest", 1)
  checkpoints.wait()
  assert reads
  assert checkpoint._steps(checkpoint._folder(tmp_path)) == [1, 2]
  checkpoints.close()


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"null", "expected a JSON object, got None: restore it or move it"),
    (b"[1]", "expected a JSON object"),
    (b'{"a": "caf\xe9"}', "does not parse .*utf-8.*: restore it or move it"),
    (b'{"steps": 3', "does not parse .*: restore it or move it"),
    (b"", "does not parse .*: restore it or move it"),
    (b"[" * 100_000, "does not parse .*: restore it or move it"),
  ],
)
def test_a_damaged_file_of_a_workdir_is_one_line_that_names_it(tmp_path, content, message):
  for name, read in (
    ("config.json", lambda: start(tmp_path)),
    ("base.json", lambda: checkpoint.verify_base(tmp_path, {"w": jnp.ones(1)})),
    ("inputs.json", lambda: checkpoint.verify_inputs(tmp_path, {})),
  ):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}.*{message}") as error:
      read()
    assert "\n" not in str(error.value)
    (tmp_path / name).unlink()


@pytest.mark.parametrize(
  "content", [b"null", b"[]", b"{}", b'{"leaves": 1}', b'{"leaves": {"step": 1}}', b"\xff", b""]
)
def test_a_damaged_manifest_is_damage(tmp_path, content):
  folder = saved(tmp_path, 1, 2)
  (folder / "00000002" / "manifest" / "metadata").write_bytes(content)
  checkpoints = start(tmp_path)
  assert checkpoints.last_good() == 1
  assert checkpoints.restore(state(0))[1] == 1
  checkpoints.close()
  assert len(list(folder.glob("00000002.damaged-*"))) == 1


def test_what_is_no_checkpoint_is_left_alone_in_a_line(tmp_path, caplog):
  folder = saved(tmp_path, 1, 2)
  for name in ("50", "²", "000000007", "notes"):
    (folder / name).mkdir()
  for name in ("x.orbax-checkpoint-tmp", "51", "00000049"):
    (folder / name).write_text("")
  checkpoints = start(tmp_path)
  assert checkpoints.restore(state(0))[1] == 2
  for name in ("50", "²", "000000007", "notes", "51", "x.orbax-checkpoint-tmp"):
    assert f"{name} is no checkpoint of this program" in caplog.text
  assert len(list(folder.glob("00000049.damaged-*"))) == 1, "its step can be saved"
  checkpoints.save(50, state(50))
  assert checkpoints.restore(state(0))[1] == 50
  checkpoints.close()


def test_a_file_in_place_of_the_checkpoints_is_one_line(tmp_path):
  (tmp_path / "checkpoints").write_text("")
  checkpoints = start(tmp_path)
  for read in (checkpoints.restore, lambda like: restore_part(tmp_path, "params", like)):
    with pytest.raises(
      ValueError, match="checkpoints: expected a folder, got a file: move it away"
    ):
      read(state(0))


def test_a_half_written_checkpoint_does_not_fill_the_disk_for_ever(tmp_path):
  folder = saved(tmp_path, 1)
  shutil.copytree(folder / "00000001", folder / "00000002.orbax-checkpoint-tmp")
  checkpoints = start(tmp_path)
  checkpoints.restore(state(0))
  checkpoints.close()
  assert [path.name for path in folder.iterdir()] == ["00000001"]


def test_a_reader_follows_a_run_that_deletes_what_it_reads(tmp_path, monkeypatch):
  """With checkpoint.keep=1 the newest checkpoint of a moment ago is gone: there is a newer one."""
  folder = saved(tmp_path, 1, keep=1)
  restore = checkpoint._restore_verified

  def as_the_run_goes_on(reader, folder_, step, spec, field):
    if step == 1:
      saved(tmp_path, 2, keep=1)
      assert not (folder / "00000001").exists()
    return restore(reader, folder_, step, spec, field)

  monkeypatch.setattr(checkpoint, "_restore_verified", as_the_run_goes_on)
  got, step = restore_part(tmp_path, "params", state(0).params)
  assert step == 2
  assert_same(got, state(2).params)


def test_an_old_checkpoint_that_cannot_be_deleted_does_not_end_a_run(tmp_path, monkeypatch, caplog):
  checkpoints = start(tmp_path, keep=1)
  checkpoints.save(1, state(1))
  monkeypatch.setattr(epath.gpath.PosixGPath, "rmtree", failing(1, lambda path: None, EIO))
  checkpoints.save(2, state(2))
  checkpoints.wait()
  assert "00000001 stays behind" in caplog.text
  monkeypatch.undo()
  checkpoints.close()
  assert checkpoint._steps(checkpoint._folder(tmp_path)) == [2]


def test_a_checkpoint_that_cannot_be_written_says_so(tmp_path, monkeypatch):
  checkpoints = start(tmp_path)
  checkpoints.save(1, state(1))
  full = ValueError("NOT_FOUND: No space left on device\nmore lines")
  monkeypatch.setattr(checkpoints._orbax, "save", failing(1, lambda: None, full))
  message = r"the checkpoint of step 2 in .* cannot be written: NOT_FOUND: No space left on device$"
  with pytest.raises(OSError, match=message):
    checkpoints.save(2, state(2))
  assert checkpoints.last_good() == 1
  checkpoints.close()


def test_a_field_that_is_newer_than_a_run_counts_as_what_it_then_meant():
  old, differences = {"prompts": {"path": "x"}}, checkpoint.differences
  new = {"prompts": {"path": "x", "duplicates": "keep"}, "on_record_error": "stop"}
  assert differences(old, new) == {}
  assert list(differences(old, {**new, "on_record_error": "continue"})) == ["on_record_error"]
  assert list(differences(old, {**new, "judge": {"floor": 0.1}})) == ["judge.floor"]


def test_inputs_that_changed_are_named_and_can_be_permitted(tmp_path):
  first = {"prompts.path": {"p.jsonl": "sha256:1"}, "judge.table": {"t.npy": "sha256:2"}}
  checkpoint.verify_inputs(tmp_path, first)
  checkpoint.verify_inputs(tmp_path, first)
  moved = {**first, "prompts.path": {"elsewhere/p.jsonl": "sha256:1"}}
  checkpoint.verify_inputs(tmp_path, moved)
  changed = {**first, "judge.table": {"t.npy": "sha256:3"}}
  with pytest.raises(ValueError, match="not those that it began with") as error:
    checkpoint.verify_inputs(tmp_path, changed, ("steps",))
  assert "\n  judge.table: t.npy\n" in str(error.value)
  flag = "--config.checkpoint.allow=\"('steps', 'judge.table')\""
  assert str(error.value).endswith(f"add {flag}"), "as a shell takes it"
  assert "p.jsonl" not in str(error.value)
  checkpoint.verify_inputs(tmp_path, changed, ("judge",))
  checkpoint.verify_inputs(tmp_path, changed)


def test_weights_of_another_type_cannot_be_compared_but_of_the_same_are(tmp_path):
  def weights(text):
    return {"judge.model.weights": {"judge.safetensors": text}}

  checkpoint.verify_inputs(tmp_path, weights("float32:1"))
  with pytest.raises(ValueError, match=r"judge.model.weights: judge.safetensors"):
    checkpoint.verify_inputs(tmp_path, weights("float32:2"))
  checkpoint.verify_inputs(tmp_path, weights("bfloat16:7"))


def test_a_base_that_changed_can_be_permitted(tmp_path):
  checkpoint.verify_base(tmp_path, {"w": jnp.ones(3)}, record=True)
  with pytest.raises(
    ValueError, match=r"""add --config.checkpoint.allow="\('model.weights',\)" """
  ):
    checkpoint.verify_base(tmp_path, {"w": jnp.zeros(3)}, record=True)
  checkpoint.verify_base(tmp_path, {"w": jnp.zeros(3)}, record=True, changed=True)
  checkpoint.verify_base(tmp_path, {"w": jnp.zeros(3)}, record=True)


def test_a_stop_survives_a_terminal_that_is_gone(monkeypatch):
  monkeypatch.setattr(os, "write", failing(1, os.write, OSError(errno.ENOSPC, "No space left")))
  with Stop() as stop:
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.requested


HOLD = """
import sys, time
from nash_jax.run import lock
with lock.hold(sys.argv[1]):
  print("held", flush=True)
  time.sleep(600)
"""


def test_a_workdir_has_one_writer_and_a_death_frees_it(tmp_path):
  holder = subprocess.Popen(
    [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
  )
  try:
    assert holder.stdout.readline() == "held\n"
    message = rf"in use by process {holder.pid} on {re.escape(socket.gethostname())}, since 20\d\d-"
    with pytest.raises(ValueError, match=message), lock.hold(tmp_path):
      pytest.fail("two hold it")
  finally:
    holder.kill()
    holder.wait()
  with lock.hold(tmp_path):
    assert json.loads((tmp_path / "owner.json").read_text())["pid"] == os.getpid()
    with pytest.raises(ValueError, match=f"process {os.getpid()} on"), lock.hold(tmp_path):
      pytest.fail("two hold it")
  assert not (tmp_path / "owner.json").exists()


def test_an_owner_that_has_not_left_a_bucket_is_named(tmp_path, caplog, monkeypatch):
  monkeypatch.setattr(lock.epath, "Path", lambda path: pathlib.Path(tmp_path))
  with lock.hold("gs://bucket/run"):
    assert "signed off" not in caplog.text
    with lock.hold("gs://bucket/run"):
      assert f"not signed off by process {os.getpid()} on" in caplog.text


@pytest.fixture(autouse=True)
def _warnings(caplog):
  caplog.set_level(logging.WARNING, "nash_jax.run.checkpoint")


def test_the_cause_of_a_failed_write_is_not_cut_off_behind_a_long_path():
  path = "/".join(["folder"] * 100)
  text = f'RESOURCE_EXHAUSTED: Error writing "x" at local file "{path}": Failed to write 80 bytes'
  error = ValueError(f"{text} to file 9: No space left on device [os_error_code='28']\nmore")
  assert checkpoint._cause(error) == "No space left on device"
  assert checkpoint._cause(ValueError("x" * 400 + "\nmore")) == "x" * 300

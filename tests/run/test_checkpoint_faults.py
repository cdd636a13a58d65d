"""Checkpoints under faults: damage is named, disks that fail, saves that were cut off."""

import pathlib
import shutil

import orbax.checkpoint as ocp
import pytest
from etils import epath
from jax import numpy as jnp
from saved_states import EIO, assert_same, failing, saved, start, state

from nash_jax.run import checkpoint
from nash_jax.run.checkpoint import restore_part


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


def unreadable(monkeypatch, part, times):
  """Lets the first so many reads of files with `part` in their path fail; returns those."""
  monkeypatch.setattr(checkpoint, "READ_AGAIN", (0.0,))
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
  with pytest.raises(OSError, match=r"00000002 cannot be read .*nothing has changed"):
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


def test_an_old_checkpoint_that_cannot_be_deleted_does_not_end_a_run(tmp_path, monkeypatch, caplog):
  checkpoints = start(tmp_path, keep=1)
  checkpoints.save(1, state(1))
  monkeypatch.setattr(epath.gpath.PosixGPath, "rmtree", failing(1, lambda path: None, EIO))
  checkpoints.save(2, state(2))
  checkpoints.wait()
  assert "00000001 could not be deleted" in caplog.text
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


def test_all_errors_of_one_save_are_one(tmp_path, monkeypatch):
  """Orbax keeps those of the arrays and those of the metadata apart, one for each call."""
  checkpoints = start(tmp_path)
  checkpoints.save(1, state(1))
  checkpoints.wait()
  full, finish = OSError(28, "No space left on device"), checkpoints._orbax.wait_until_finished
  left = [full, full, full]

  def wait():
    if left:
      raise left.pop()
    finish()

  monkeypatch.setattr(checkpoints._orbax, "wait_until_finished", wait)
  message = r"the checkpoint of step 1 in .* cannot be written: .*No space left on device$"
  with pytest.raises(OSError, match=message):
    checkpoints.close()
  assert not left
  assert checkpoints.last_good() == 1


def test_the_cause_of_a_failed_write_is_not_cut_off_behind_a_long_path():
  path = "/".join(["folder"] * 100)
  text = f'RESOURCE_EXHAUSTED: Error writing "x" at local file "{path}": Failed to write 80 bytes'
  error = ValueError(f"{text} to file 9: No space left on device [os_error_code='28']\nmore")
  assert checkpoint._cause(error) == "No space left on device"
  assert checkpoint._cause(ValueError("x" * 400 + "\nmore")) == "x" * 300

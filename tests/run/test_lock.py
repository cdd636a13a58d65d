"""A workdir has one writer."""

import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import threading

import filelock
import pytest

from nash_jax.run import lock

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


def test_an_owner_that_holds_a_workdir_but_is_not_named_yet_is_waited_for(tmp_path):
  owner = {"pid": 7, "host": "elsewhere", "since": "2000-01-01"}
  with filelock.FileLock(tmp_path / ".lock"):
    (tmp_path / "owner.json").write_text('{"pid": 7, ')
    threading.Timer(0.5, (tmp_path / "owner.json").write_text, [json.dumps(owner)]).start()
    message = "in use by process 7 on elsewhere, since 2000-01-01"
    with pytest.raises(ValueError, match=message), lock.hold(tmp_path):
      pytest.fail("two hold it")


def test_an_owner_that_leaves_is_waited_for(tmp_path):
  leaving = filelock.FileLock(tmp_path / ".lock", thread_local=False)
  leaving.acquire()
  threading.Timer(0.5, leaving.release).start()
  with lock.hold(tmp_path):
    assert json.loads((tmp_path / "owner.json").read_text())["pid"] == os.getpid()


def test_an_owner_that_never_says_its_name_is_an_error_too(tmp_path, monkeypatch):
  monkeypatch.setattr(lock, "NAMED_WITHIN", 0.2)
  message = "in use by process unknown on unknown"
  other = filelock.FileLock(tmp_path / ".lock")
  with other, pytest.raises(ValueError, match=message), lock.hold(tmp_path):
    pytest.fail("two hold it")


def test_an_owner_that_has_not_left_a_bucket_is_named(tmp_path, caplog, monkeypatch):
  monkeypatch.setattr(lock.epath, "Path", lambda path: pathlib.Path(tmp_path))
  with lock.hold("gs://bucket/run"):
    assert "may still be in use" not in caplog.text
    with lock.hold("gs://bucket/run"):
      assert f"may still be in use by process {os.getpid()} on" in caplog.text

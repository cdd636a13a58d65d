"""Runs under faults at many moments: none hangs, none loses what a checkpoint held, all go on.

A full disk is a small tmpfs; reads fail through an audit hook, which sees every file that Python
opens; signals come from a timer. The end is compared with an uninterrupted run's, bit for bit.
"""

import contextlib
import errno
import functools
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import paths
import pytest
import tiny
import tiny_runs
from workdirs import assert_same, at, kill, lines

from nash_jax.run import checkpoint

pytestmark = pytest.mark.slow
MOMENTS = 20
STEPS = {"steps": 12, "checkpoint.every": 2, "evaluation.every": 4}


@pytest.fixture(scope="module")
def start(assembled):
  """Returns (workdir, changed functions) -> Done of twelve steps with six checkpoints."""
  return lambda workdir, **functions: tiny_runs.start(
    assembled, tiny.train(STEPS), workdir, **functions
  )


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
  """The workdir and the end of an uninterrupted run, and its seconds once it is compiled."""
  folder = tmp_path_factory.mktemp("faults")
  start(folder / "warm")
  began = time.monotonic()
  return folder / "whole", start(folder / "whole"), time.monotonic() - began


@pytest.fixture(autouse=True)
def _no_hang():
  """Every test may take two minutes at its longest moment; each moment starts its time anew."""

  def late(number, frame):
    raise AssertionError("it hangs")

  before = signal.signal(signal.SIGALRM, late)
  yield
  signal.alarm(0)
  signal.signal(signal.SIGALRM, before)


def good(workdir):
  """Returns the steps of the checkpoints that can be restored."""
  return sorted(checkpoint._scores(checkpoint._folder(workdir)))


def assert_goes_on(start, workdir, whole):
  held = good(workdir)
  signal.alarm(60)
  done = start(workdir)
  assert (int(done.state.step), done.stopped) == (12, False)
  assert_same(done.state, whole[1].state)
  assert lines(workdir) == lines(whole[0])
  assert lines(workdir, "samples.jsonl") == lines(whole[0], "samples.jsonl")
  names = sorted(path.name for path in (workdir / "checkpoints").iterdir())
  assert all(map(checkpoint._is_step, names)), f"damaged or half written: {names}"
  assert names[-1] == "00000012"
  return held


@pytest.fixture
def disk(tmp_path):
  """Returns resize(bytes) -> a folder on a disk of that size."""
  folder = tmp_path / "disk"
  folder.mkdir()

  def mount(option):
    command = ["mount", "-t", "tmpfs", "-o", option, "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True, text=True)

  if (failed := mount("size=1m")).returncode:
    pytest.skip(f"no disk of its own size: {failed.stderr.strip()}")

  def resize(size):
    assert mount(f"remount,size={size}").returncode == 0
    return folder

  yield resize
  subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_at_any_moment_ends_the_run_in_a_line_and_it_goes_on(
  start, whole, assembled, disk
):
  used = int(
    subprocess.run(["du", "-sk", whole[0]], capture_output=True, text=True).stdout.split()[0]
  )
  reached, ends = [], []

  def fill(folder):
    with contextlib.suppress(OSError), (folder / "filler").open("wb", 0) as file:
      while True:
        file.write(bytes(512))

  # From a disk on which nothing fits to one of the right size; then one that is filled at a step.
  for i, size in enumerate([*np.linspace(8, used, MOMENTS - 12), *[8 * used] * 12]):
    workdir = disk(f"{int(size)}k") / f"run{i}"
    sample = assembled.programs.sample
    if (step := i - (MOMENTS - 12)) >= 0:
      sample = at(step + 1, functools.partial(fill, workdir.parent), sample)
    signal.alarm(60)
    try:
      start(workdir, sample=sample)
      ends.append("")
    except (OSError, ValueError) as error:
      ends.append(str(error))
    if ends[-1]:
      assert "No space left" in ends[-1] or "written" in ends[-1]
      assert "\n" not in ends[-1]
      assert str(workdir) in ends[-1]
    disk("64m")
    (workdir.parent / "filler").unlink(missing_ok=True)
    reached.append(max(assert_goes_on(start, workdir, whole), default=0))
    shutil.rmtree(workdir)
  print(reached, *ends, sep="\n")
  assert len({*reached}) > 3, "the disk was full at different moments"
  assert sum(map(bool, ends)) >= MOMENTS - 2
  for end, step in zip(ends, reached, strict=True):  # what it names is what a resume finds
    named = re.search(r"last good checkpoint is step (\d+)", end)
    assert named is None or int(named[1]) == step, end
  assert sum("last good checkpoint is step" in end for end in ends) > 3


READING, FAILED = {"after": 0, "folder": "", "error": 0}, []


def _fail_a_read(event, args):
  if event != "open" or not READING["folder"] or not isinstance(args[0], str | bytes | os.PathLike):
    return
  path, flags = os.fsdecode(args[0]), args[2]
  if not path.startswith(READING["folder"]) or flags & (os.O_WRONLY | os.O_RDWR):
    return
  READING["after"] -= 1
  if READING["after"] == 0:
    FAILED.append(path)
    raise OSError(errno.EIO, "Input/output error", path)


@pytest.fixture(scope="module")
def reading():
  """Returns (folder, n): the n-th time a file below it is opened to be read fails, once."""
  sys.addaudithook(_fail_a_read)

  def fail(folder, after):
    READING.update(folder=str(folder), after=after)

  yield fail
  fail("", 0)


def test_a_read_error_at_any_read_is_no_damage(start, whole, assembled, reading, tmp_path):
  with pytest.raises(RuntimeError, match="killed"):
    start(tmp_path / "cut", sample=at(8, kill, assembled.programs.sample))
  held, raised = good(tmp_path / "cut"), []
  assert held == [4, 6]
  for i in range(1, MOMENTS + 1):
    workdir = shutil.copytree(tmp_path / "cut", tmp_path / f"run{i}")
    reading(workdir, i)
    signal.alarm(60)
    try:
      start(workdir)
    except (OSError, ValueError) as error:
      raised.append(str(error))
      assert good(workdir) == held
    reading("", 0)
    assert_goes_on(start, workdir, whole)
    assert not list((workdir / "checkpoints").glob("*damaged*"))
  print(FAILED, raised)
  assert all("Input/output error" in line and "\n" not in line for line in raised)
  assert len(FAILED) == MOMENTS


@pytest.mark.parametrize("count", [1, 30])
def test_signals_at_any_moment_save_once_and_the_run_goes_on(start, whole, count, tmp_path):
  outside, stopped = [], []
  before = signal.signal(signal.SIGTERM, lambda number, frame: outside.append(number))
  try:
    for i, moment in enumerate(np.linspace(0, whole[2], MOMENTS)):
      workdir, sent = tmp_path / f"run{i}", []

      def burst(moment=moment, sent=sent):
        time.sleep(moment)
        for _ in range(count):
          sent.append(time.monotonic())
          os.kill(os.getpid(), signal.SIGTERM)
          time.sleep(0.005)

      thread = threading.Thread(target=burst)
      signal.alarm(60)
      thread.start()
      done = start(workdir)
      ended = time.monotonic()
      thread.join()
      if done.stopped:
        stopped.append(int(done.state.step))
        assert max(good(workdir), default=0) == stopped[-1]
        assert ended - sent[0] < 10
      assert_goes_on(start, workdir, whole)
      shutil.rmtree(workdir)
  finally:
    signal.signal(signal.SIGTERM, before)
  print(stopped, len(outside))
  assert len({*stopped}) > 3


def command(workdir, *flags):
  return subprocess.Popen(
    [
      sys.executable, "-c", "from nash_jax import main; main.run()", "train",
      "--config=tests/configs/tiny.py", f"--workdir={workdir}", "--config.steps=60",
      "--config.checkpoint.every=10", "--config.evaluation.every=30", *flags,
    ],
    cwd=paths.ROOT, env={**os.environ, "PYTHONPATH": paths.PYTHONPATH},
    stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
  )  # fmt: skip


def test_a_command_that_thirty_signals_stop_says_so_and_goes_on(tmp_path):
  whole = command(tmp_path / "whole")
  assert whole.wait(300) == 0
  running = command(tmp_path / "cut")
  record = tmp_path / "cut" / "metrics.jsonl"
  while not record.exists() or record.read_bytes().count(b"\n") < 13:
    assert running.poll() is None, running.stderr.read()
    time.sleep(0.01)
  for _ in range(30):
    running.send_signal(signal.SIGTERM)
    time.sleep(0.005)
  _, errors = running.communicate(timeout=60)
  assert running.returncode == 75, errors
  (step,) = {checkpoint.newest_step(tmp_path / "cut")} - {0}
  assert step < 60
  assert errors.splitlines()[-1] == f"stopped at step {step} of 60; the same command resumes it"
  again = command(tmp_path / "cut")
  intruder = command(tmp_path / "cut")
  ends = sorted([again, intruder], key=lambda process: process.wait(300))
  assert [process.returncode for process in ends] == [0, 2]
  assert f"is in use by process {ends[0].pid} on" in ends[1].stderr.read()
  assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
  folders = [checkpoint._folder(tmp_path / name) for name in ("cut", "whole")]
  ours, theirs = (checkpoint._manifest(folder, 60)["leaves"] for folder in folders)
  assert ours == theirs


def test_a_command_on_a_full_disk_ends_in_one_line(disk):
  workdir = pathlib.Path(disk("400k")) / "run"
  running = command(workdir)
  _, errors = running.communicate(timeout=300)
  assert running.returncode == 1
  assert "nash_jax/main.py" not in errors, "its own errors are no tracebacks"
  assert errors.splitlines()[-1].startswith("nash-jax train: ")
  assert "No space left" in errors.splitlines()[-1], errors[-3000:]

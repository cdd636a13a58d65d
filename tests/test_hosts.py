"""Several processes, as several hosts: what one does, whatever becomes of any of them."""

import dataclasses
import functools
import json
import os
import pathlib
import signal
import time

import host_program
import jax
import numpy as np
import pytest
import tiny
from host_processes import assert_alike, hosts, measured
from safetensors.numpy import load_file

from nash_jax.config import resolve
from nash_jax.models import gemma
from nash_jax.run import checkpoint


@pytest.fixture(scope="module")
def one(assembled, tmp_path_factory):
  """What one process with one device measures."""
  two_steps = dataclasses.replace(assembled, config=resolve(tiny.train({"steps": 2})))
  return host_program.measure(two_steps, tmp_path_factory.mktemp("one") / "run")


def test_eight_devices_do_what_one_device_does(one, tmp_path):
  """Loss and gradients on fixed responses, in two micro-batches; and a run of two steps."""
  assert_alike(measured(1, 8, tmp_path / "eight", tiny.EIGHT), one)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("count", "devices", "changes"),
  [
    (1, 4, {"mesh.data": 2, "mesh.fsdp": 2}),
    (2, 4, tiny.EIGHT),
    (2, 2, {}),
    (4, 1, {"mesh.data": 1, "mesh.fsdp": 2, "mesh.tensor": 2}),
  ],
)
def test_any_hosts_do_what_one_device_does(one, tmp_path, count, devices, changes):
  assert_alike(measured(count, devices, tmp_path / "run", changes), one)


@pytest.mark.slow
def test_a_judge_is_laid_out_in_its_own_way(tmp_path):
  gemma_judge = {"judge.name": "gemma"}
  split = {**gemma_judge, "mesh.data": 4, "judge.mesh.data": 2, "judge.mesh.tensor": 2}
  found = measured(2, 2, tmp_path / "two", split)
  assert_alike(found, measured(1, 1, tmp_path / "one", gemma_judge))
  assert np.ptp([found[name] for name in found if "win_rate" in name]) > 0, "the judge was asked"


JOB = ["-c", "from nash_jax import main; main.run()"]


def end(running, seconds):
  """Waits for the processes and returns their exit statuses and their errors."""
  deadline = time.monotonic() + seconds
  output = [p.communicate(timeout=max(1, deadline - time.monotonic()))[1] for p in running]
  return [process.returncode for process in running], "\n".join(output)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["sft", "judge", "reward"])
def test_hosts_fit_what_one_device_fits(loss, tmp_path):
  exports = []
  for count, devices in ((1, 1), (2, 2)):
    folder = tmp_path / str(count)
    folder.mkdir()
    flags = [
      f"--config=tests/configs/tiny.py:{folder},{loss}",
      f"--workdir={folder / 'run'}",
      f"--config.export={folder / 'out.safetensors'}",
      "--config.export_dtype=float32",
      "--config.optimizer.eps=1.0",
      "--config.optimizer.learning_rate=0.1",
    ]
    with hosts(count, devices, [*JOB, "fit", *flags]) as running:
      codes, output = end(running, 600)
    assert codes == [0] * count, output[-5000:]
    exports.append(load_file(folder / "out.safetensors"))
  one, two = exports
  assert set(one) == set(two)
  assert ("head/w" in one) == (loss == "reward")
  for name in one:
    np.testing.assert_allclose(two[name], one[name], rtol=1e-4, atol=1e-5, err_msg=name)


def steps(workdir):
  """Returns the steps of the record so far."""
  path = pathlib.Path(workdir) / "metrics.jsonl"
  lines = path.read_text().split("\n")[:-1] if path.exists() else []
  return [json.loads(line)["step"] for line in lines]


def written(workdir, step, moment=np.inf):
  """Whether the record has got to a step, or the clock to a moment."""
  return max(steps(workdir), default=-1) >= step or time.monotonic() > moment


def record(workdir):
  """Returns the lines of the record without what a clock measured."""
  return [
    {name: value for name, value in json.loads(line).items() if "second" not in name}
    for line in (workdir / "metrics.jsonl").read_text().splitlines()
  ]


def online(workdir, *flags):
  return [*JOB, "train", "--config=tests/configs/tiny.py", f"--workdir={workdir}", *flags]


def wait_for(condition, running, seconds=600):
  deadline = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < deadline
    assert all(process.poll() is None for process in running), end(running, 60)[1][-5000:]
    time.sleep(0.01)


def last_state(workdir, step):
  """Returns a finished run's policy, target and moments, on this machine."""
  model = gemma.preset("tiny", num_embed=1024)
  return {
    part: checkpoint.restore_part(workdir, part, gemma.shapes(model), step)[0]
    for part in ("params", "target")
  }


@pytest.mark.slow
def test_a_signal_to_one_host_saves_once_on_all_and_other_hosts_go_on(tmp_path):
  length = ("--config.steps=40", "--config.checkpoint.every=100", "--config.evaluation.every=20")
  with hosts(1, 4, online(tmp_path / "whole", *length)) as running:
    codes, output = end(running, 600)
  assert codes == [0], output[-5000:]
  with hosts(2, 2, online(tmp_path / "cut", *length)) as running:
    wait_for(lambda: len(steps(tmp_path / "cut")) > 5, running)
    running[1].send_signal(signal.SIGTERM)
    codes, output = end(running, 120)
  assert codes == [75, 75], output[-5000:]
  (saved,) = checkpoint._steps(checkpoint._folder(tmp_path / "cut"))
  assert 5 < saved < 40
  assert steps(tmp_path / "cut") == list(range(saved))
  with hosts(4, 1, online(tmp_path / "cut", *length)) as running:
    codes, output = end(running, 600)
  assert codes == [0] * 4, output[-5000:]
  assert steps(tmp_path / "cut") == list(range(41))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    *(last_state(tmp_path / name, 40) for name in ("cut", "whole")),
  )


@pytest.mark.slow
def test_where_a_host_hangs_the_others_stop_and_say_so(tmp_path):
  command = online(tmp_path, "--config.steps=100000")
  with hosts(2, 1, command, NASH_JAX_HEARTBEAT="10") as running:
    wait_for(lambda: len(steps(tmp_path)) > 3, running)
    running[1].send_signal(signal.SIGSTOP)
    codes, output = end(running[:1], 60)
  assert codes[0] != 0
  assert "stopped sending heartbeats" in output


@pytest.mark.slow
@pytest.mark.parametrize("job", ["train", "fit"])
def test_a_run_survives_twenty_kills_of_any_host_at_any_moment(job, tmp_path):
  """Nothing that a checkpoint holds is lost, and the end is that of an uninterrupted run."""
  every, seed = 3, int(os.environ.get("NASH_JAX_TEST_SEED", time.time_ns() % 2**32))
  kills = int(os.environ.get("NASH_JAX_TEST_KILLS", 20))
  print(f"NASH_JAX_TEST_SEED={seed} NASH_JAX_TEST_KILLS={kills}")
  rng = np.random.default_rng(seed)
  config = "tests/configs/tiny.py" if job == "train" else f"tests/configs/tiny.py:{tmp_path},sft"

  def start(workdir):
    flags = [
      f"--config={config}",
      f"--workdir={tmp_path / workdir}",
      "--config.steps=150",
      f"--config.checkpoint.every={every}",
      "--config.evaluation.every=50",
    ]
    return hosts(2, 1, [*JOB, job, *flags], NASH_JAX_HEARTBEAT="20")

  def finish(running):
    codes, output = end(running, 900)
    assert codes == [0, 0], output[-5000:]

  began, workdir = time.monotonic(), tmp_path / "killed"
  with start("whole") as running:
    wait_for(lambda: written(tmp_path / "whole", 1), running)
    startup = time.monotonic() - began
    finish(running)
  for kill in range(kills):
    wanted, victim = max(steps(workdir), default=-1) + int(rng.integers(1, 7)), rng.integers(2)
    with start("killed") as running:
      if kill % 4 == 0:  # anywhere on the way to the first step
        moment = time.monotonic() + rng.uniform(0, startup)
        wait_for(functools.partial(written, workdir, wanted, moment), running)
      else:
        wait_for(functools.partial(written, workdir, wanted), running)
        time.sleep(rng.uniform(0, 0.05))
      running[victim].kill()
      codes, output = end(running, 120)
    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] != 0, output[-3000:]
    reached = max(steps(workdir), default=-1)
    saved = max(checkpoint._steps(checkpoint._folder(workdir)), default=0)
    print(f"kill {kill + 1}: process {victim}, record up to {reached}, checkpoint {saved}")
    # One checkpoint may still be on its way to the disk.
    assert reached - saved <= 2 * every
  with start("killed") as running:
    finish(running)
  folders = [checkpoint._folder(path) for path in (workdir, tmp_path / "whole")]
  assert not list(folders[0].glob("*damaged*"))
  # Of every leaf the sum that tells any two states apart.
  ours, theirs = (checkpoint._manifest(folder, 150)["leaves"] for folder in folders)
  assert ours == theirs
  assert record(workdir) == record(tmp_path / "whole")

"""Several processes on this machine, by launch/local.sh."""

import os
import re
import signal
import subprocess

import pytest
from launch_scripts import LOCAL, script

# launch/local.sh


@pytest.fixture
def local(tmp_path):
  """Returns start(program, *arguments) of launch/local.sh with `program` as nash-jax."""

  def start(program, *arguments, **more):
    script(tmp_path / "nash-jax", f"#!/usr/bin/env bash\n{program}\n")
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", **more}
    return subprocess.Popen(
      [LOCAL, *arguments], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )

  return start


SAY = 'echo "$NASH_JAX_PROCESS_ID/$NASH_JAX_PROCESSES $NASH_JAX_COORDINATOR $# $2 $XLA_FLAGS"'


def test_local_processes_know_each_other(local):
  output, _ = (process := local(SAY, "3", "train", "--workdir=a b", DEVICES="2")).communicate(
    timeout=30
  )
  assert process.returncode == 0
  lines = sorted(line for line in output.splitlines() if "ended" not in line)
  port = re.search(r"127.0.0.1:(\d+)", lines[0])[1]
  for i, line in enumerate(lines):
    assert line.startswith(f"[{i}] {i}/3 127.0.0.1:{port} 2 --workdir=a b ")
    assert line.endswith("--xla_force_host_platform_device_count=2")
  assert len(lines) == 3


def test_where_one_local_process_fails_all_end(local):
  process = local("((NASH_JAX_PROCESS_ID)) && exec sleep 60; exit 5", "2", "train")
  output, _ = process.communicate(timeout=30)
  assert process.returncode == 5
  assert "[0] ended with status 5" in output
  assert "[1] ended with status 143" in output


def test_a_stopped_run_lets_every_local_process_save(local):
  """All are stopped together: those that are slower are not sent a second signal."""
  slow = "trap 'echo disturbed' TERM; ((NASH_JAX_PROCESS_ID)) && sleep 1; exit 75"
  process = local(slow, "2", "train")
  output, _ = process.communicate(timeout=30)
  assert process.returncode == 75
  assert "disturbed" not in output
  assert output.count("ended with status 75") == 2


def test_signals_reach_every_local_process(local):
  process = local(
    "trap 'echo saved; exit 0' TERM; echo up; while sleep 0.1; do :; done", "2", "train"
  )
  for _ in range(2):
    assert process.stdout.readline().endswith("up\n")
  process.send_signal(signal.SIGTERM)
  output, _ = process.communicate(timeout=30)
  assert process.returncode == 0
  assert sorted(re.findall(r"\[\d\] saved", output)) == ["[0] saved", "[1] saved"]


@pytest.mark.parametrize("arguments", [["0", "train"], ["two", "train"], ["2"]])
def test_local_arguments_are_checked(local, arguments):
  process = local("echo called", *arguments)
  assert "expected a number of processes and a job" in process.communicate(timeout=30)[0]
  assert process.returncode == 2

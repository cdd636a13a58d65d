"""Several processes, as several hosts: what one does, whatever becomes of any of them."""

import contextlib
import dataclasses
import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import tiny

from nash_jax import config as configs


@contextlib.contextmanager
def hosts(count, devices, command, **more):
  """Starts `command` in processes that find each other, each with so many devices."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
  env = {
    **os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(tiny.ROOT),
    "NASH_JAX_COORDINATOR": f"127.0.0.1:{port}", "NASH_JAX_PROCESSES": str(count), **more,
  }  # fmt: skip
  running = [
    subprocess.Popen(
      [sys.executable, *command], env={**env, "NASH_JAX_PROCESS_ID": str(i)}, cwd=tiny.ROOT,
      stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )
    for i in range(count)
  ]  # fmt: skip
  try:
    yield running
  finally:
    for process in running:
      process.kill()


def measured(count, devices, out, changes):
  """Returns what tests/tiny.py measures on so many hosts."""
  with hosts(count, devices, [tiny.__file__, str(out), json.dumps(changes)]) as running:
    said = [process.communicate(timeout=600)[1] for process in running]
  assert [process.returncode for process in running] == [0] * count, "\n".join(said)[-5000:]
  return np.load(f"{out}.npz")


def assert_alike(found, expected):
  assert set(found) == set(expected)
  sizes = [np.abs(expected[name]).max() for name in expected if name.startswith("gradient")]
  assert max(sizes) > 1e-2
  assert np.ptp(expected["text"]) > 1e-3
  for name in expected:
    np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.fixture(scope="module")
def one(assembled, tmp_path_factory):
  """What one process with one device measures."""
  two_steps = dataclasses.replace(assembled, config=configs.resolve(tiny.train({"steps": 2})))
  return tiny.measure(two_steps, tmp_path_factory.mktemp("one") / "run")


def test_two_hosts_of_four_devices_do_what_one_device_does(one, tmp_path):
  """Loss and gradients on fixed responses, in two micro-batches; and a run of two steps."""
  assert_alike(measured(2, 4, tmp_path / "two", tiny.EIGHT), one)

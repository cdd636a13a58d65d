"""Processes that are each a host, and what a tiny run computes on them."""

import contextlib
import json
import os
import socket
import subprocess
import sys

import host_program
import numpy as np
import paths


@contextlib.contextmanager
def hosts(count, devices, command, **more):
  """Starts `command` in processes that find each other, each with so many devices."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
  env = {
    **os.environ,
    "XLA_FLAGS": flags,
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": paths.PYTHONPATH,
    "NASH_JAX_COORDINATOR": f"127.0.0.1:{port}",
    "NASH_JAX_PROCESSES": str(count),
    **more,
  }
  running = [
    subprocess.Popen(
      [sys.executable, *command],
      env={**env, "NASH_JAX_PROCESS_ID": str(i)},
      cwd=paths.ROOT,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(count)
  ]
  try:
    yield running
  finally:
    for process in running:
      process.kill()


def measured(count, devices, out, changes):
  """Returns what tests/programs/host_program.py measures on so many hosts."""
  with hosts(count, devices, [host_program.__file__, str(out), json.dumps(changes)]) as running:
    output = [process.communicate(timeout=600)[1] for process in running]
  assert [process.returncode for process in running] == [0] * count, "\n".join(output)[-5000:]
  return np.load(f"{out}.npz")


def assert_alike(found, expected):
  assert set(found) == set(expected)
  sizes = [np.abs(expected[name]).max() for name in expected if name.startswith("gradient")]
  assert max(sizes) > 1e-2
  assert np.ptp(expected["text"]) > 1e-3
  for name in expected:
    np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-5, err_msg=name)

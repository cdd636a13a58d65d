"""What runs leave behind, and functions that end them at a chosen call."""

import json
import os
import signal

import jax
import numpy as np


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


def kill():
  raise RuntimeError("killed")


def terminate():
  os.kill(os.getpid(), signal.SIGTERM)

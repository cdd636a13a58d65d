"""The record of a run of made-up steps, written and read."""

import errno
import json
import math

from jax import numpy as jnp

from nash_jax.run import metrics
from nash_jax.types import Mean


def start(workdir, first=0, total=10, **kwargs):
  return metrics.Metrics(workdir, first_step=first, total_steps=total, progress=False, **kwargs)


def lines(workdir, name="metrics.jsonl"):
  def refuse(token):
    raise AssertionError(f"{token} is not JSON")

  text = (workdir / name).read_text().splitlines()
  return [json.loads(line, parse_constant=refuse) for line in text]


def sample_of(x):
  return {"prompt": "Thé", "response": f"text {int(x)}", "p_win": math.nan if x == 1 else 0.5}


def run(workdir, first, last, **kwargs):
  m = start(workdir, first, **kwargs)
  for step in range(first, last):
    m.clock(step, "update", jnp.float32(step), 7)
    m.push(step, {"loss": Mean(jnp.float32(step / 3), jnp.float32(3)), "kappa": 0.1})
    m.text(step, "samples", jnp.int32(step), lambda x: [sample_of(x)])
  return m


FULL = OSError(errno.ENOSPC, "No space left on device")


def full(*args):
  raise FULL

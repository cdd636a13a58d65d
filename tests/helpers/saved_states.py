"""Small states of a run, saved in a workdir."""

import errno
import pathlib
from typing import Any

import flax.struct
import jax
import numpy as np
import optax
from jax import numpy as jnp

from nash_jax.run.checkpoint import Checkpoints

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

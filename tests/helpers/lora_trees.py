"""Trees of adapters of drawn numbers, and a model's output with them."""

import functools

import jax
import numpy as np
from jax import numpy as jnp

from nash_jax.models import gemma

RANK, SCALE = 3, 2.0


CHANGES = {"model.lora.rank": RANK, "algorithm.reference_period": 2, "optimizer.learning_rate": 0.3}


def normal(tree, seed, scale=0.3):
  draw = np.random.default_rng(seed).normal
  return jax.device_put(jax.tree.map(lambda x: draw(0, scale, x.shape).astype("f"), tree))


@functools.cache
def forward(config, dtype):
  tokens = np.random.default_rng(2).integers(4, 64, (3, 12))
  mask = np.arange(12)[None] >= np.array([0, 3, 7])[:, None]

  @jax.jit
  def run(params):
    positions, visible = gemma.positions_of(mask), gemma.causal_mask(mask)
    x, _ = gemma.forward(params, config, tokens, positions, visible, dtype=dtype)
    return jnp.where(mask[..., None], gemma.logits(params, config, x), 0)

  return run


def size(tree):
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))

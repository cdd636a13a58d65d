"""A policy small enough to check by hand, one row of logits, and its update."""

import jax
import numpy as np
import optax
import tiny
from jax import numpy as jnp

from nash_jax import update
from nash_jax.objectives import algorithms
from nash_jax.types import Prompts, Responses, Verdict

B, K, L, V = 8, 2, 3, 5


def logits(seed, scale=1.0):
  return {"w": scale * jax.random.normal(jax.random.key(seed), (V,))}


def batch():
  rng = np.random.default_rng(0)
  mask = np.arange(L)[None, None] < rng.integers(1, L + 1, (B, K, 1))
  tokens, zeros = rng.integers(0, V, (B, K, L)), np.zeros((B, K, L), np.float32)
  valid = np.broadcast_to(~np.eye(K, dtype=bool), (B, K, K)).copy()
  valid[[1, 4, 5]] = False  # so that micro-batches differ in weight
  prompts = Prompts(np.zeros((B, 1), np.int32), np.ones((B, 1), bool), np.arange(B))
  responses = Responses(tokens, mask, zeros, zeros, mask[..., 0])
  verdict = Verdict(rng.random((B, K, K), np.float32), valid, rng.random((B, K), np.float32))
  return update.Batch(prompts, responses, verdict)


def logprobs(params, *, prompts, tokens, mask):
  logp = jax.nn.log_softmax(params["w"])
  entropy = jnp.broadcast_to(-jnp.sum(jnp.exp(logp) * logp), tokens.shape)
  return jnp.where(mask, logp[tokens], 0.0), entropy


def make(**changes):
  """Returns the Update of a changed config with a compiled train_step, of the one-row policy."""
  named = {name.replace("__", "."): value for name, value in changes.items()}
  config = tiny.train(named)
  algorithms.fill_defaults(config.algorithm)
  rule = update.make_update(config, logprobs)
  return rule._replace(train_step=jax.jit(rule.train_step))


def gradient(state):
  """After a first step Adam's mean is (1 - b1) of the gradient."""
  return optax.tree_utils.tree_get(state.opt_state, "mu")["w"] / 0.1

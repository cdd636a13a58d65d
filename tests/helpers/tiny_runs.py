"""Runs of a tiny policy on functions that are compiled already, and a batch for it."""

import dataclasses
import functools
from unittest import mock

import numpy as np

import nash_jax
from nash_jax import update
from nash_jax.config import resolve
from nash_jax.objectives import algorithms
from nash_jax.types import Responses, Verdict


def needs(name):
  """Returns the changes without which a method does not run in any config."""
  method = algorithms.get(name)
  judge = {"judge.name": "table_reward"} if method.needs_rewards else {}
  # Of a file that nothing reads before the run starts, only that it is there is asked.
  return judge | ({"pairs.path": "assets:stories/prompts.jsonl"} if method.offline else {})


def no_logprobs(params, **responses):
  """Stands for a policy's log-probabilities where nothing asks for them."""
  raise AssertionError("log-probabilities are asked for")


def batch(setup: nash_jax.train.Setup):
  """Returns made-up responses of ragged lengths, some verdicts missing."""
  rng, size = np.random.default_rng(0), setup.config.prompts.batch_size
  mask = np.arange(12)[None, None] < rng.integers(1, 12, (size, 2, 1))
  tokens = np.where(mask, rng.integers(5, 1024, mask.shape), 0).astype(np.int32)
  logp = np.zeros(mask.shape, np.float32)
  valid = np.broadcast_to(~np.eye(2, dtype=bool), (size, 2, 2)).copy()
  valid[3] = False
  responses = Responses(tokens, mask, logp, logp, mask[..., 0])
  p_win = rng.random((size, 2, 2), np.float32)
  return update.Batch(setup.train_prompts.batch(0, size), responses, Verdict(p_win, valid))


def start(setup: nash_jax.train.Setup, config, workdir, **functions) -> nash_jax.train.Done:
  """Runs a config on functions that are compiled already, some of them replaced."""
  setup = dataclasses.replace(
    setup,
    config=resolve(config),
    # Setting it up would compile it again.
    initial_state=functools.partial(setup.programs.init, setup.reference),
    programs=setup.programs._replace(**functions),
  )
  with mock.patch.object(nash_jax.train, "set_up", return_value=setup):
    return nash_jax.train.run(config, workdir, progress=False)

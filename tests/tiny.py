"""A tiny random policy's run: its config, also for --config=tests/tiny.py, and a batch for it."""

import dataclasses
import functools
import pathlib
from unittest import mock

import numpy as np

import nash_jax
from nash_jax import update
from nash_jax.config import resolve
from nash_jax.objectives import algorithms
from nash_jax.types import Responses, Verdict

ROOT = pathlib.Path(__file__).resolve().parents[1]
EIGHT = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2, "optimizer.micro_batches": 2}


def train(changes=()):
  """Returns the config of six steps of a two-layer policy, with changes by dotted name."""
  c = nash_jax.config.train()
  c.model.update({"preset": "tiny", "weights": ""})
  c.model.changes = {"num_embed": 1024}
  c.prompts.update({"batch_size": 8, "max_tokens": 12, "overflow": "cut"})
  c.sampling.max_tokens = 12
  c.judge.name = "population"
  c.judge.model = c.model.copy_and_resolve_references()
  c.steps, c.checkpoint.every = 6, 3
  c.evaluation.update({"every": 3, "prompts": 16})
  # Nearly gradient descent: Adam's own division would make steps of rounding errors.
  c.optimizer.update({"learning_rate": 0.1, "eps": 1.0, "clip_norm": 1e9})
  c.update_from_flattened_dict(dict(changes))
  return c


def needs(name):
  """Returns the changes without which a method does not run in any config."""
  method = algorithms.get(name)
  judge = {"judge.name": "table_reward"} if method.needs_rewards else {}
  # Of a file that nothing reads before the run starts, only that it is there is asked.
  return judge | ({"pairs.path": "assets:stories/prompts.jsonl"} if method.offline else {})


def no_logprobs(params, **responses):
  """Stands for a policy's log-probabilities where nothing asks for them."""
  raise AssertionError("log-probabilities are asked for")


def get_config(kind=""):
  """Returns the same for `--config=tests/tiny.py`; a fit's for tests/tiny.py:FOLDER,LOSS."""
  if not kind:
    return train()
  from test_fit import settings

  folder, loss = kind.split(",")
  return settings(pathlib.Path(folder), loss)


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

"""A tiny random policy's run; as a script, what it computes on the hosts that there are."""

import dataclasses
import functools
import json
import pathlib
import sys
from unittest import mock

import jax
import numpy as np
import optax

import nash_jax
from nash_jax import fit, judges, main, update
from nash_jax.config import resolve
from nash_jax.models import sharding
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


def get_config(kind=""):
  """Returns the same for `--config=tests/tiny.py`; a fit's for tests/tiny.py:FOLDER,LOSS."""
  if not kind:
    return train()
  from test_fit import settings

  folder, loss = kind.split(",")
  return settings(pathlib.Path(folder), loss)


def batch(setup: nash_jax.train.Setup):
  """Returns responses that no device has drawn, of ragged lengths, some verdicts missing."""
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


def through_text(setup: nash_jax.train.Setup, x: update.Batch) -> Verdict:
  """Returns what the policy itself says as a judge that reads text."""
  config = train({"judge.name": "gemma_text", "judge.max_tokens": 48}).judge
  config.model.update(setup.config.model)
  mesh = setup.shardings.batch.mesh
  judge = judges.make(config, setup.tokenizer, setup.reference, mesh)
  ask = jax.jit(judge.fn, out_shardings=sharding.replicated(mesh))
  return ask(judge.params, x.prompts, x.responses, None)


def measure(setup: nash_jax.train.Setup, workdir) -> dict[str, np.ndarray]:
  """Returns loss and gradients on fixed responses, then the state and record of a two-step run."""
  ref = jax.jit(lambda tree: jax.tree.map(lambda x: x * 1.1, tree))(setup.reference)
  rows = functools.partial(fit._rows, batch(setup))
  x = sharding.global_batch(setup.shardings.batch, setup.config.prompts.batch_size, rows)
  state, metrics = setup.programs.train_step(setup.programs.init(setup.reference), ref, x)
  out = {"fixed/loss": metrics["loss"].value(), "fixed/kl": metrics["kl_to_reference"].value()}
  out["text"] = through_text(setup, x).p_win
  trees = {"gradient": optax.tree_utils.tree_get(state.opt_state, "mu")}
  done = start(setup, setup.config, workdir)
  trees |= {"params": done.state.params, "target": done.state.target}
  trees = jax.jit(lambda tree: tree, out_shardings=setup.shardings.replicated)(trees)
  for name, leaf in jax.tree.leaves_with_path(trees):
    out[jax.tree_util.keystr(name, simple=True, separator="/")] = leaf
  for line in (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines():
    for name, value in json.loads(line).items():
      if "second" not in name and value is not None:
        out[f"line/{json.loads(line)['step']}/{name}"] = value
  return {name: np.asarray(value) for name, value in out.items()}


if __name__ == "__main__":
  main._join_processes()
  setup = nash_jax.train.set_up(resolve(train({"steps": 2, **json.loads(sys.argv[2])})))
  found = measure(setup, sys.argv[1])
  if jax.process_index() == 0:
    np.savez(f"{sys.argv[1]}.npz", **found)

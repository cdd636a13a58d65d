"""What a tiny run computes on however many hosts there are; test_hosts.py starts one a host.

python tests/programs/host_program.py WORKDIR CHANGES writes WORKDIR.npz; CHANGES are JSON, by
dotted name.
"""

import functools
import json
import pathlib
import sys

import jax
import numpy as np
import optax
import tiny
import tiny_runs

import nash_jax
from nash_jax import fit, judges, main, update
from nash_jax.config import resolve
from nash_jax.models import sharding
from nash_jax.types import Verdict


def through_text(setup: nash_jax.train.Setup, x: update.Batch) -> Verdict:
  """Returns the verdict of the policy itself as a judge that reads text."""
  config = tiny.train({"judge.name": "gemma_text", "judge.max_tokens": 48}).judge
  config.model.update(setup.config.model)
  mesh = setup.shardings.batch.mesh
  judge = judges.make(config, setup.tokenizer, setup.reference, mesh)
  ask = jax.jit(judge.fn, out_shardings=sharding.replicated(mesh))
  return ask(judge.params, x.prompts, x.responses, None)


def measure(setup: nash_jax.train.Setup, workdir) -> dict[str, np.ndarray]:
  """Returns loss and gradients on fixed responses, then the state and record of a two-step run."""
  ref = jax.jit(lambda tree: jax.tree.map(lambda x: x * 1.1, tree))(setup.reference)
  read_rows = functools.partial(fit._rows, tiny_runs.batch(setup))
  x = sharding.global_batch(setup.shardings.batch, setup.config.prompts.batch_size, read_rows)
  state, metrics = setup.programs.train_step(setup.programs.init(setup.reference), ref, x)
  out = {"fixed/loss": metrics["loss"].value(), "fixed/kl": metrics["kl_to_reference"].value()}
  out["text"] = through_text(setup, x).p_win
  trees = {"gradient": optax.tree_utils.tree_get(state.opt_state, "mu")}
  done = tiny_runs.start(setup, setup.config, workdir)
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
  setup = nash_jax.train.set_up(resolve(tiny.train({"steps": 2, **json.loads(sys.argv[2])})))
  measured = measure(setup, sys.argv[1])
  if jax.process_index() == 0:
    np.savez(f"{sys.argv[1]}.npz", **measured)

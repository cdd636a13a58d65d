"""A tiny random policy's run, also for --config=tests/configs/tiny.py."""

import pathlib

import nash_jax

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
  """Returns the same for `--config=tests/configs/tiny.py`; a fit's for `:FOLDER,LOSS` behind it."""
  if not kind:
    return train()
  from fits import settings

  folder, loss = kind.split(",")
  return settings(pathlib.Path(folder), loss)

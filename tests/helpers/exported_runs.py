"""What a run leaves behind, drawn and not trained, and exports of it."""

import json
import pathlib

import jax
import numpy as np
import tiny
from weight_files import random

from nash_jax import weights
from nash_jax.config import describe, resolve
from nash_jax.configs.export import get_config
from nash_jax.jobs import export
from nash_jax.models import gemma, lora
from nash_jax.run import checkpoint

MODEL = gemma.preset("tiny", num_embed=1024)


STEP, EVALUATION = 4, {"eval/win_rate_vs_reference": 0.75, "eval/kl_to_reference": 2.5}


def make_run(folder: pathlib.Path, changes=(), base=None):
  """Writes what a run leaves behind whose parameters are drawn, not trained; returns its state."""
  file = folder / "gemma-3-tiny" / "model.safetensors"
  base = random(MODEL, 0, 0.3) if base is None else base
  weights.save(str(file), base, MODEL, "float32", {})
  config = resolve(tiny.train({"model.weights": str(file), **dict(changes)}))
  init, _ = lora.init_and_join(config)
  shapes = jax.eval_shape(init, gemma.shapes(MODEL))

  def draw(seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jax.numpy.asarray(rng.normal(0, 0.1, x.shape), "float32"), shapes)

  state, workdir = {"params": draw(1), "target": draw(2)}, folder / "run"
  checkpoints = checkpoint.Checkpoints(workdir, keep=2, config=describe(config))
  checkpoints.save(STEP, state)
  checkpoints.close()
  lines = [{"step": 0, **EVALUATION, "eval/kl_to_reference": 0.0}, {"step": STEP, **EVALUATION}]
  lines += [{"step": STEP + 1, "eval/kl_to_reference": 99.0}]
  (workdir / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
  return state


def write(run, to, **fields):
  config = get_config()
  config.update({"run": run, "to": to, **fields})
  export.run(config)

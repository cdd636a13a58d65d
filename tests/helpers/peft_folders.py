"""PEFT's folders of adapters, of drawn numbers."""

import functools
import json

import jax
import numpy as np
from lora_trees import normal
from safetensors.numpy import load_file, save_file
from weight_files import MODELS

from nash_jax.models import gemma, lora
from nash_jax.weights import adapters

UNGROUPED = gemma.preset("tiny", num_kv_heads=2)  # queries, keys and values are one weight


ARCHITECTURES = {**MODELS, "ungrouped": UNGROUPED}


RANK, ALPHA = 3, 6.0


shapes_of = functools.cache(gemma.shapes)


@functools.cache
def drawn(name, seed=0):
  """Returns adapters of numbers without meaning, none of them 0."""
  shapes = shapes_of(ARCHITECTURES[name])
  made = jax.eval_shape(functools.partial(lora.init, rank=RANK), jax.random.key(0), shapes)
  return jax.device_get(normal(made, seed))


def write(folder, name, multimodal=False, tree=None):
  adapters.write(
    folder, tree or drawn(name), ARCHITECTURES[name], ALPHA, "google/gemma", multimodal
  )
  return str(folder)


def change(folder, tensors=None, **config):
  """Rewrites parts of a folder: tensors by a function of them all, fields of its config."""
  file = folder / adapters.WEIGHTS
  if tensors:
    save_file(tensors(load_file(file)), file, metadata={"format": "pt"})
  saved = json.loads((folder / adapters.CONFIG).read_text())
  (folder / adapters.CONFIG).write_text(json.dumps({**saved, **config}))


def redrawn(tensors):
  """Returns A's that differ everywhere, as PEFT trains them."""
  rng = np.random.default_rng(7)
  return {name: rng.normal(size=x.shape).astype(np.float32) for name, x in tensors.items()}


def only_some(tensors):
  """Returns what PEFT adapts of a Llama by default."""
  return {name: x for name, x in redrawn(tensors).items() if "q_proj" in name or "v_proj" in name}

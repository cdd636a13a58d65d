"""Parameters in and out of files, under the library's names and shapes."""

import json
import pathlib

import jax
import numpy as np
from jax import numpy as jnp

from nash_jax.models import gemma
from nash_jax.types import Params


def _flatten(params: Params) -> dict:
  leaves, _ = jax.tree.flatten_with_path(params)
  return {"/".join(entry.key for entry in path): leaf for path, leaf in leaves}


def save(path: str, params: Params, config: gemma.GemmaConfig, dtype, card: dict) -> None:
  """Writes a `.safetensors` file of the unstacked tree in `dtype`, with `card` as its metadata.

  A head beside the blocks (`params["head"]`, of reward models) is kept as it is.
  """
  from safetensors.flax import save_file

  library = gemma.unstack(params, config)
  if "head" in params:
    library["head"] = params["head"]
  leaves = {name: jnp.asarray(leaf, dtype) for name, leaf in _flatten(library).items()}
  target = pathlib.Path(path)
  target.parent.mkdir(parents=True, exist_ok=True)
  part = target.with_suffix(".part")
  save_file(leaves, str(part), metadata={"card": json.dumps(card)})
  part.replace(target)


def load(path: str, config: gemma.GemmaConfig, dtype=jnp.float32) -> Params:
  """Returns the stacked tree from a `.safetensors` file written by `save`.

  Raises:
    ValueError: not such a file, or its first leaf that is missing, unknown or of another shape.
  """
  from safetensors import SafetensorError
  from safetensors.flax import load_file

  try:
    found = load_file(path)
  except (OSError, SafetensorError) as error:
    raise ValueError(f"weights {path}: expected a .safetensors file, got {error}") from error
  shapes = gemma.shapes(config)
  expected = _flatten(jax.eval_shape(lambda p: gemma.unstack(p, config), shapes))
  head = {name: leaf for name, leaf in found.items() if name.startswith("head/")}
  for name, leaf in expected.items():
    if name not in found:
      raise ValueError(f"weights {path}: no leaf {name}; is model.preset right for this file?")
    if found[name].shape != leaf.shape:
      raise ValueError(
        f"weights {path}: leaf {name} expected shape {leaf.shape}, got {found[name].shape};"
        " is model.preset right for this file?"
      )
  unknown = sorted(set(found) - set(expected) - set(head))
  if unknown:
    raise ValueError(f"weights {path}: unknown leaf {unknown[0]}; is model.preset right?")
  tree: Params = {}
  for name in [*expected, *head]:
    *parents, last = name.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = np.asarray(found[name]).astype(dtype)
  params = gemma.stack(tree, config)
  return {**params, "head": tree["head"]} if head else params

"""Sharding rules: one for every parameter, none idle."""

import functools
import re

import jax
import numpy as np
import optax
import pytest
import tiny
from flax import traverse_util
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from nash_jax import update
from nash_jax.data.tokenizer import BUNDLED, Tokenizer
from nash_jax.judges import bradley_terry, population
from nash_jax.models import gemma, lora, sharding

AXES = ("data", "fsdp", "tensor")


def mesh(*sizes):
  return AbstractMesh(sizes, AXES)


def trees():
  """Returns the shapes of every tree of parameters that is ever placed on a mesh."""
  found = {name: gemma.shapes(gemma.preset(name)) for name in gemma.PRESETS}
  # A library variant whose queries, keys and values are one array.
  found["joint"] = gemma.shapes(gemma.preset("tiny", num_kv_heads=2))
  found["reward"] = jax.eval_shape(bradley_terry.add_head, found["tiny"], jax.random.key(0))
  for name in ("gemma2_2b", "gemma4_e2b", "gemma4_12b", "joint"):
    adapters = functools.partial(lora.init, rank=16)
    found[f"lora {name}"] = jax.eval_shape(adapters, jax.random.key(0), found[name])
  found["population"] = population.judge(Tokenizer(BUNDLED, "plain")).params
  found["table"] = jax.ShapeDtypeStruct((3, 4, 4), np.float32)
  return found


def names(tree):
  return [
    jax.tree_util.keystr(path, simple=True, separator="/")
    for path, _ in jax.tree.leaves_with_path(tree)
  ]


def test_every_parameter_has_one_rule_and_every_rule_a_parameter():
  used = set()
  for tree in trees().values():
    for name in names(tree):
      matches = [pattern for pattern, _ in sharding.RULES if re.search(pattern, name)]
      assert len(matches) == 1, name
      used.add(matches[0])
  assert used == {pattern for pattern, _ in sharding.RULES}


@pytest.mark.parametrize("preset", ["gemma2_2b", "gemma2_9b", "gemma3_4b", "gemma4_31b"])
def test_large_presets_divide_over_a_pod_with_their_optimiser_state(preset):
  params = gemma.shapes(gemma.preset(preset))
  pod = mesh(1, 32, 4)
  for name in ("adamw", "adafactor", "sgd"):
    config = tiny.train({"optimizer.name": name}).optimizer
    state = jax.eval_shape(update.make_optimizer(config, 10).init, params)
    specs = sharding.shardings({"params": params, "opt_state": state}, pod)
    if name == "adamw":
      mu = optax.tree_utils.tree_get(specs["opt_state"], "mu")
      assert jax.tree.leaves(mu) == jax.tree.leaves(specs["params"])
  share = [
    leaf.size / np.prod([pod.shape[axis] for axis in jax.tree.leaves(tuple(spec.spec)) if axis])
    for leaf, spec in zip(jax.tree.leaves(params), jax.tree.leaves(specs["params"]), strict=True)
  ]
  whole = sum(leaf.size for leaf in jax.tree.leaves(params))
  assert sum(share) < 1.1 * whole / 128, "no large array is left whole"


@pytest.mark.parametrize("preset", ["gemma2_9b", "gemma4_e2b", "gemma4_12b"])
def test_adapters_are_split_as_their_weights_are(preset):
  params = gemma.shapes(gemma.preset(preset))
  adapters = jax.eval_shape(functools.partial(lora.init, rank=16), jax.random.key(0), params)
  weights, pairs = (
    traverse_util.flatten_dict(sharding.shardings(tree, mesh(1, 4, 4)), sep="/")
    for tree in (params, adapters)
  )
  paths = {path.removesuffix("/a") for path in pairs if path.endswith("/a")}
  assert paths
  for path in paths:
    a, b, axes = lora.FACTORS[path.split("/", 2)[2]]
    split = dict(zip(axes, weights[path].spec[1:], strict=True)) | {"r": None}
    assert pairs[f"{path}/a"].spec[1:] == tuple(split[axis] for axis in a), path
    assert pairs[f"{path}/b"].spec[1:] == tuple(split[axis] for axis in b), path


def test_few_key_value_heads_are_held_everywhere():
  specs = sharding.shardings(gemma.shapes(gemma.preset("gemma3_1b")), mesh(1, 4, 4))
  attention = specs["layers"]["0"]["attn"]
  assert attention["q_einsum"]["w"].spec == P(None, "tensor", "fsdp", None)
  assert attention["kv_einsum"]["w"].spec == P(None, None, None, "fsdp", None)


def test_a_dimension_that_does_not_divide_proposes_a_mesh():
  with pytest.raises(
    ValueError,
    match=r"parameter embedder/input_embedding: dimension 64 does not "
    r"divide over tensor=6; use mesh.tensor=2",
  ):
    sharding.shardings(gemma.shapes(gemma.preset("tiny")), mesh(1, 1, 6))


def test_a_parameter_without_a_rule_is_named():
  with pytest.raises(ValueError, match="parameter adapter/w: expected exactly one sharding rule"):
    sharding.shardings({"adapter": {"w": jax.ShapeDtypeStruct((3, 2), "float32")}}, mesh(1, 1, 1))

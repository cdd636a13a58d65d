"""PEFT's folders of adapters: written, read, and what is more than LoRA."""

import functools
import json
import math
import pathlib
import re

import jax
import numpy as np
import pytest
from flax import traverse_util
from peft_folders import (
  ALPHA,
  ARCHITECTURES,
  RANK,
  change,
  drawn,
  only_some,
  redrawn,
  shapes_of,
  write,
)
from safetensors.numpy import load_file
from weight_files import MODELS, NAMES, random, same

from nash_jax import weights
from nash_jax.models import gemma, lora
from nash_jax.weights import adapters, names, safetensors

ATTENTION = [f"self_attn.{x}_proj" for x in "qkvo"]


MLP = [f"mlp.{x}_proj" for x in ("gate", "up", "down")]


def updates(tensors, config):
  """Returns what PEFT adds to each matrix, by its own rule: scale·B·A."""
  found = {}
  for name in (x for x in tensors if ".lora_A." in x):
    a, b = tensors[name], tensors[name.replace("lora_A", "lora_B")]
    scale = config["lora_alpha"] / (math.sqrt(len(a)) if config.get("use_rslora") else len(a))
    module = name.removeprefix("base_model.model.").split(".lora_A")[0]
    found[f"{module}.weight"] = scale * b @ a
  return found


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_is_written_is_read_again_to_the_last_bit(name, tmp_path):
  write(tmp_path, name)
  same(adapters.read(str(tmp_path), ARCHITECTURES[name], RANK, ALPHA / RANK), drawn(name))
  assert adapters.base_of(str(tmp_path)) == "google/gemma"


def matrices(model, layer):
  """Returns {module: (inputs, outputs)} of a layer."""
  kv_heads, size = model.kv_shape(model.attention_types[layer])
  heads, kv_heads, width, hidden = 4 * size, kv_heads * size, 32, 48
  found = dict(
    zip(ATTENTION, [(width, heads), *[(width, kv_heads)] * 2, (heads, width)], strict=True)
  )
  if model.k_eq_v_global and model.attention_types[layer] == gemma.GLOBAL:
    del found["self_attn.v_proj"]
  if layer >= model.num_kv_layers:
    del found["self_attn.k_proj"], found["self_attn.v_proj"]
    hidden = model.override_kv_shared_ffw_hidden or hidden
  found |= dict(zip(MLP, [(width, hidden), (width, hidden), (hidden, width)], strict=True))
  if model.per_layer_input_dim:
    found |= {"per_layer_input_gate": (width, 6), "per_layer_projection": (6, width)}
  return found


@pytest.mark.parametrize("name", NAMES)
def test_names_and_shapes_are_those_of_peft(name, tmp_path):
  """Layers beyond the last period of the pattern among them."""
  model, got = MODELS[name], load_file(pathlib.Path(write(tmp_path, name)) / adapters.WEIGHTS)
  expected = {}
  for layer in range(model.num_layers):
    for module, (inputs, outputs) in matrices(model, layer).items():
      name = f"base_model.model.model.layers.{layer}.{module}"
      expected[f"{name}.lora_A.weight"] = (RANK, inputs)
      expected[f"{name}.lora_B.weight"] = (outputs, RANK)
  assert {name: x.shape for name, x in got.items()} == expected
  assert {str(x.dtype) for x in got.values()} == {"float32"}
  config = json.loads((tmp_path / adapters.CONFIG).read_text())
  modules = {
    module.split(".")[-1] for n in range(model.num_layers) for module in matrices(model, n)
  }
  assert config["target_modules"] == sorted(modules)
  assert (config["r"], config["lora_alpha"], config["task_type"]) == (RANK, 6, "CAUSAL_LM")
  assert config["modules_to_save"] is None


@pytest.mark.parametrize("name", ["hf_gemma3", pytest.param("hf_gemma2", marks=pytest.mark.slow)])
def test_base_and_update_are_what_merging_gives(name, tmp_path):
  """In Hugging Face's matrices: PEFT's own rule on what is written, against our merge, exported."""
  model, base = MODELS[name], random(MODELS[name], 1)
  merged = lora.merge(lora.join(base, drawn(name), ALPHA / RANK))
  files = {}
  for part, params in (("base", base), ("merged", merged)):
    weights.export(str(tmp_path / part), params, model, "float32")
    files[part] = load_file(tmp_path / part / "model.safetensors")
  write(tmp_path, name)
  config = json.loads((tmp_path / adapters.CONFIG).read_text())
  added = updates(load_file(tmp_path / adapters.WEIGHTS), config)
  assert len(added) == 7 * model.num_layers
  for tensor, x in files["merged"].items():
    expected = files["base"][tensor] + added.get(tensor, 0.0)
    np.testing.assert_allclose(x, expected, rtol=0, atol=2e-5)


def test_of_a_multimodal_base_only_the_text_model_is_adapted(tmp_path):
  write(tmp_path, "hf_gemma3", multimodal=True)
  pattern = json.loads((tmp_path / adapters.CONFIG).read_text())["target_modules"]
  found = [name for name in load_file(tmp_path / adapters.WEIGHTS) if "lora_A" in name]
  assert all(".model.language_model.layers." in name for name in found)
  for name in found:
    assert re.fullmatch(pattern, name.removeprefix("base_model.model.").split(".lora_A")[0])
  assert not re.fullmatch(pattern, "model.vision_tower.encoder.layers.0.self_attn.q_proj")
  got = adapters.read(str(tmp_path), MODELS["hf_gemma3"], RANK, ALPHA / RANK)
  same(got, drawn("hf_gemma3"))


def test_a_head_comes_along(tmp_path):
  head = np.arange(32, dtype=np.float32)
  write(tmp_path, "hf_gemma2", tree={**drawn("hf_gemma2"), "head": {"w": head}})
  assert load_file(tmp_path / adapters.WEIGHTS)["base_model.model.score.weight"].shape == (1, 32)
  config = json.loads((tmp_path / adapters.CONFIG).read_text())
  assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["classifier", "score"])
  got = adapters.read(str(tmp_path), MODELS["hf_gemma2"], RANK, ALPHA / RANK)
  np.testing.assert_array_equal(got["head"]["w"], head)


def test_a_head_of_vectors_comes_along_and_one_of_two_tensors_is_refused(tmp_path):
  head = {"v": np.arange(32 * 6, dtype=np.float32).reshape(32, 6)}
  write(tmp_path, "hf_gemma2", tree={**drawn("hf_gemma2"), "head": head})
  assert load_file(tmp_path / adapters.WEIGHTS)["base_model.model.score.weight"].shape == (6, 32)
  got = adapters.read(str(tmp_path), MODELS["hf_gemma2"], RANK, ALPHA / RANK)
  np.testing.assert_array_equal(got["head"]["v"], head["v"])
  head["scale"] = np.zeros((32, 3), np.float32)
  with pytest.raises(ValueError, match=r"head of one tensor, got 'head/scale too'. Set gpm.prompt"):
    write(tmp_path, "hf_gemma2", tree={**drawn("hf_gemma2"), "head": head})


def of_two_ranks(tensors):
  tensors = redrawn(tensors)
  for name in tensors:
    if "k_proj" in name or "layers.1.mlp.up" in name:
      tensors[name] = tensors[name][:1] if "lora_A" in name else tensors[name][:, :1].copy()
  return tensors


@pytest.mark.parametrize(
  ("tensors", "config", "rank"),
  [
    (redrawn, {}, 6),
    (only_some, {}, 3),
    (of_two_ranks, {"rank_pattern": {"k_proj": 1}}, 6),
    (None, {"use_rslora": True}, 3),
    (redrawn, {"lora_alpha": 5}, 6),
  ],
)
def test_what_others_trained_changes_each_matrix_as_there(tensors, config, rank, tmp_path):
  model = MODELS["hf_gemma3"]
  write(tmp_path, "hf_gemma3")
  change(tmp_path, tensors, **config)
  got = traverse_util.flatten_dict(adapters.read(str(tmp_path), model, scale=0.5), sep="/")
  assert {x.shape[-1] for path, x in got.items() if path.endswith("/a")} == {rank}
  merged = traverse_util.flatten_dict(shapes_of(model), sep="/")
  for path, x in merged.items():
    merged[path] = np.zeros(x.shape, np.float32)
    name = path.split("/", 2)[-1]
    if name in lora.FACTORS:
      a, b, axes = (f"...{letters}" for letters in lora.FACTORS[name])
      merged[path] = 0.5 * np.einsum(f"{a},{b}->{axes}", got[f"{path}/a"], got[f"{path}/b"])
  params = traverse_util.unflatten_dict(merged, sep="/")
  config = json.loads((tmp_path / adapters.CONFIG).read_text())
  expected = updates(load_file(tmp_path / adapters.WEIGHTS), config)
  matrices = dict(safetensors.tensors(params, model, names.hugging_face, "float32", 64))
  assert len(expected) == sum(np.any(x != 0) for x in matrices.values()) > 0
  for tensor, x in matrices.items():
    added = expected.get(f"model.{tensor}", np.zeros(x.shape))
    np.testing.assert_allclose(x, added, rtol=0, atol=2e-5)


def test_a_modules_own_alpha_counts(tmp_path):
  write(tmp_path, "hf_gemma2")
  change(tmp_path, alpha_pattern={r"layers\.1\.self_attn\.q_proj": 12.0, "down_proj": 3})
  got = adapters.read(str(tmp_path), MODELS["hf_gemma2"], RANK, ALPHA / RANK)
  for path, x in jax.tree.leaves_with_path(got):
    expected = functools.reduce(lambda tree, key: tree[key.key], path, drawn("hf_gemma2"))
    factors = np.ones(len(x) if "layers" in str(path) else 1)
    if path[-1].key == "b":
      factors[1:2] = 2 if "q_einsum" in str(path) else 1
      factors *= 0.5 if "linear" in str(path) else 1
    factors = factors.reshape(-1, *[1] * (x.ndim - 1)) if len(factors) > 1 else factors[0]
    np.testing.assert_array_equal(x, expected * factors)


@pytest.mark.parametrize(
  ("config", "message"),
  [
    ({"use_dora": True}, "use_dora: expected false or null, got True. Merge them with PEFT"),
    ({"bias": "all"}, "bias: expected \"none\" or null, got 'all'"),
    ({"lora_bias": True}, "lora_bias: expected"),
    ({"fan_in_fan_out": True}, "fan_in_fan_out: expected"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights: expected true"),
    ({"peft_type": "IA3"}, "peft_type: expected LORA, got 'IA3'"),
    ({"modules_to_save": ["embed_tokens"]}, "modules_to_save: expected none, or score"),
    ({"r": 0}, "r: expected a number above 0, got 0"),
    ({"lora_alpha": "x"}, "lora_alpha: expected a number above 0"),
    ({"alpha_pattern": [1]}, "alpha_pattern: expected numbers by module"),
  ],
)
def test_more_than_lora_is_refused(config, message, tmp_path):
  write(tmp_path, "hf_gemma2")
  change(tmp_path, **config)
  with pytest.raises(ValueError, match=f"adapter_config.json: {message}") as raised:
    adapters.read(str(tmp_path), MODELS["hf_gemma2"])
  assert "\n" not in str(raised.value)


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def renamed(new):
  return lambda x: {**{n: t for n, t in x.items() if n != FIRST}, new: x[FIRST]}


@pytest.mark.parametrize(
  ("tensors", "message"),
  [
    (
      renamed("base_model.model.model.embed_tokens.lora_embedding_A"),
      "projections of 5 layers, got 'base",
    ),
    (renamed("base_model.model.lm_head.lora_A.weight"), "expected adapters of the projections"),
    (
      renamed(FIRST.replace(".0.", ".5.")),
      r"of 5 layers, got 'base_model.model.model.layers.5.self",
    ),
    (renamed(FIRST.replace("_A.weight", "_magnitude_vector")), "expected adapters of the"),
    (
      lambda x: {n: t for n, t in x.items() if n != FIRST},
      "layer 0, self_attn.q_proj: expected A and B",
    ),
    (
      lambda x: {**x, FIRST: x[FIRST][:1]},
      "layer 0, self_attn.q_proj: expected A and B of one rank",
    ),
    (
      lambda x: {**x, FIRST: x[FIRST][:, 1:].copy()},
      r"q_proj.lora_A.weight: expected 'shape \[r, 32\]|shape \[r, 32\]",
    ),
    (lambda x: {**x, FIRST: x[FIRST] * np.nan}, "expected finite numbers, got 'NaN or infinity'"),
    (lambda x: {**x, FIRST: x[FIRST].astype(np.int8)}, "expected F32, BF16 or F16, got I8"),
    (lambda x: {}, "expected adapters, got 'none'"),
  ],
)
def test_tensors_of_another_model_or_none_are_named(tensors, message, tmp_path):
  write(tmp_path, "hf_gemma2")
  change(tmp_path, tensors)
  with pytest.raises(ValueError, match=message):
    adapters.read(str(tmp_path), MODELS["hf_gemma2"])


def test_a_rank_that_is_too_small_is_said_with_the_one_that_is_not(tmp_path):
  write(tmp_path, "hf_gemma2")
  change(tmp_path, redrawn)
  with pytest.raises(ValueError, match=r"a rank of at most 5, got 6. Set model.lora.rank=6"):
    adapters.read(str(tmp_path), MODELS["hf_gemma2"], rank=5)

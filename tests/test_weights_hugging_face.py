"""Weights files: what is written comes back, and what does not fit is named."""

import dataclasses
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import traverse_util
from jax import numpy as jnp
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from nash_jax import policy, weights
from nash_jax.models import gemma
from nash_jax.run.checkpoint import Checkpoints
from nash_jax.weights import hugging_face, names, safetensors

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
LAYOUTS = {
  "gemma2": {},
  "transposed": {"transpose_gating_einsum": True, "use_qk_norm": True},
  "ungrouped": {"num_kv_heads": 2},
}
L, G = gemma.preset("tiny").attention_types
SHAPE = {
  "num_embed": 64,
  "embed_dim": 32,
  "hidden_dim": 48,
  "num_heads": 4,
  "num_kv_heads": 2,
  "sliding_window_size": 6,
}
# The architectures of fixtures/make_hf.py.
MODELS = {
  "hf_gemma2": gemma.preset(
    "tiny", **SHAPE, attention_types=(L, G, L, G, L), attn_logits_soft_cap=5.0
  ),
  "hf_gemma3": gemma.preset(
    "tiny",
    **SHAPE,
    attention_types=(L,) * 5 + (G, L),
    final_logit_softcap=None,
    attn_logits_soft_cap=None,
    use_qk_norm=True,
    transpose_gating_einsum=True,
    global_base_frequency=1_000_000,
    global_scale_factor=8.0,
  ),
}


def same(got, expected):
  jax.tree.map(np.testing.assert_array_equal, got, expected)


def half(params):
  return gemma.cast(jax.device_get(params), jnp.bfloat16)


def random(config, seed=0):
  rng = np.random.default_rng(seed)
  return jax.device_put(
    jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), gemma.shapes(config))
  )


def logits(params, config, tokens):
  mask = jnp.ones(tokens.shape, bool)
  positions = gemma.positions_of(mask)
  x, _ = gemma.forward(params, config, tokens, positions, gemma.causal_mask(mask))
  return gemma.logits(params, config, x)


@pytest.fixture(scope="module", params=MODELS)
def theirs(request):
  """A folder that transformers wrote, our config of it, and the parameters loaded from it."""
  folder, config = FIXTURES / request.param, MODELS[request.param]
  return folder, config, weights.load(str(folder), config)


@pytest.fixture
def folder(tmp_path):
  """A copy of the sharded fixture that may be damaged, and the config."""
  where = tmp_path / "model"
  shutil.copytree(FIXTURES / "hf_gemma3", where)
  return where, MODELS["hf_gemma3"]


@pytest.fixture
def file(tmp_path):
  """A file of the tiny preset, its config and parameters."""
  config = gemma.preset("tiny")
  params, path = random(config), str(tmp_path / "new" / "w.safetensors")
  weights.save(path, params, config, "float32", {"step": 3})
  return path, config, params


@pytest.mark.parametrize("name", ["tiny", "gemma2_9b", "gemma3_4b", "ungrouped"])
def test_the_table_of_names_is_the_models_own_tree(name):
  config = gemma.preset("tiny", num_kv_heads=2) if name == "ungrouped" else gemma.preset(name)
  ours = traverse_util.flatten_dict(gemma.shapes(config), sep="/")
  sizes = names.sizes(config)
  listed = {
    path: (len(place.layers),) * place.stacked + names.shape(place.tensor.axes, sizes)
    for path, place in names.places(config).items()
  }
  assert listed == {path: leaf.shape for path, leaf in ours.items()}


# Our own files.


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("head", [False, True])
def test_parameters_come_back(tmp_path, layout, dtype, head):
  config = gemma.preset("tiny", **LAYOUTS[layout])
  params = random(config)
  if head:
    params["head"] = {"w": np.arange(16, dtype=np.float32)}
  path = tmp_path / "w.safetensors"
  weights.save(str(path), params, config, dtype, {"seed": 7})
  same(
    weights.load(str(path), config),
    jax.tree.map(lambda x: x.astype(dtype).astype(np.float32), jax.device_get(params)),
  )
  with safe_open(str(path), "np") as f:
    assert f.metadata() == {"card": '{"seed": 7}'}
    # Under the library's names and shapes, in its own gating layout.
    gating = f.get_slice("layer_1/mlp/gating_einsum").get_shape()
  assert gating == ([2, 32, 16] if layout == "transposed" else [2, 16, 32])
  assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def test_parameters_are_held_in_the_dtype_asked_for(file):
  path, config, params = file
  got = weights.load(path, config, jnp.bfloat16)
  assert {x.dtype for x in jax.tree.leaves(got)} == {jnp.dtype("bfloat16")}
  same(got, half(params))


@pytest.mark.parametrize("damage", ["cut", "text", "absent", "pointer"])
def test_a_file_that_cannot_be_read_is_named(file, damage):
  path, config, _ = file
  whole = pathlib.Path(path).read_bytes()
  found = {
    "cut": whole[:-50],
    "text": b"these are no weights",
    "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00",
  }
  pathlib.Path(path).unlink()
  if damage in found:
    pathlib.Path(path).write_bytes(found[damage])
  why = "git lfs pull" if damage == "pointer" else ""
  with pytest.raises(
    ValueError, match=rf"weights .*w.safetensors: expected a .safetensors file.*{why}"
  ):
    weights.load(path, config)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      {"hidden_dim": 48},
      r"leaf layer_0/mlp/gating_einsum expected shape \(2, 16, 48\), got "
      r"\(2, 16, 32\); is model.preset right",
    ),
    ({"num_embed": 65}, r"leaf embedder/input_embedding expected shape \(65, 16\), got \(64, 16\)"),
    ({"use_qk_norm": True}, r"no leaf layer_0/attn/\w+norm/scale; is model.preset right"),
  ],
)
def test_the_first_leaf_that_does_not_fit_is_named(file, changes, message):
  with pytest.raises(ValueError, match=message):
    weights.load(file[0], gemma.preset("tiny", **changes))


def test_a_leaf_of_another_architecture_is_named(tmp_path):
  config, path = gemma.preset("tiny", use_qk_norm=True), str(tmp_path / "w.safetensors")
  weights.save(path, random(config), config, "float32", {})
  with pytest.raises(ValueError, match=r"unknown leaf layer_0/attn/\w+norm/scale; is model.preset"):
    weights.load(path, gemma.preset("tiny"))


def test_a_write_that_fails_leaves_the_old_file(file, monkeypatch):
  import safetensors.numpy

  def fail(leaves, path, metadata):
    open(path, "w").close()
    raise OSError("disk full")

  path, config, params = file
  monkeypatch.setattr(safetensors.numpy, "save_file", fail)
  with pytest.raises(OSError, match="disk full"):
    weights.save(path, params, config, "float32", {})
  same(weights.load(path, config), params)


# Hugging Face's.


def test_logits_are_those_of_transformers(theirs):
  folder, config, params = theirs
  expected = np.load(folder / "logits.npz")
  assert np.ptp(expected["logits"]) > 5  # so that 1e-4 is a small part of what is compared
  got = jax.jit(logits, static_argnums=1)(params, config, expected["tokens"])
  np.testing.assert_allclose(got, expected["logits"], rtol=0, atol=1e-4)


def test_export_of_an_import_is_the_file_that_transformers_wrote(theirs, tmp_path):
  folder, config, params = theirs
  weights.export(str(tmp_path / "out"), params, config, "float32")
  original = {}
  for shard in folder.glob("*.safetensors"):
    original.update(load_file(shard))
  got = load_file(tmp_path / "out" / "model.safetensors")
  assert got.keys() == original.keys()
  for name, x in original.items():
    assert got[name].dtype == x.dtype
    np.testing.assert_array_equal(got[name], x)
  same(weights.load(str(tmp_path / "out"), config), params)
  # What config.json says of the architecture is what transformers says; it spells rope otherwise.
  ours, told = (
    hugging_face.fields(json.loads((at / "config.json").read_text()))
    for at in (tmp_path / "out", folder)
  )
  assert ours.pop("torch_dtype") == told.pop("dtype")
  assert ours == {name: told[name] for name in ours}


def test_large_exports_come_in_files_with_an_index(theirs, tmp_path):
  _, config, params = theirs
  weights.export(str(tmp_path), params, config, "bfloat16", shard_bytes=20_000)
  index = json.loads((tmp_path / hugging_face.INDEX).read_text())
  files = {name: load_file(tmp_path / name) for name in set(index["weight_map"].values())}
  assert len(files) > 3
  assert sorted(files) == sorted(p.name for p in tmp_path.glob("*.safetensors"))
  sizes = [sum(x.nbytes for x in found.values()) for found in files.values()]
  assert max(sizes) <= 20_000
  assert sum(sizes) == index["metadata"]["total_size"]
  assert index["weight_map"] == {n: name for name, found in files.items() for n in found}
  same(weights.load(str(tmp_path), config, jnp.bfloat16), half(params))
  # The index alone names the folder too.
  got = weights.load(str(tmp_path / hugging_face.INDEX), config, jnp.bfloat16)
  same(got, half(params))


def test_rows_without_a_piece_are_cut_and_padded(tmp_path):
  # The library's Gemma 2 has 256,128 rows; its tokenizer, and Hugging Face, 256,000.
  config = gemma.preset("tiny", num_embed=256_128, embed_dim=4, hidden_dim=4)
  params = random(config)
  weights.export(str(tmp_path), params, config, "float32")
  assert json.loads((tmp_path / "config.json").read_text())["vocab_size"] == 256_000
  got = weights.load(str(tmp_path), config)["embedder"]["input_embedding"]
  expected = np.array(params["embedder"]["input_embedding"])
  expected[256_000:] = 0
  np.testing.assert_array_equal(got, expected)
  # And a file with more rows than the library's: a multimodal Gemma 3's.
  fewer = gemma.preset("tiny", num_embed=255_936, embed_dim=4, hidden_dim=4)
  got = weights.load(str(tmp_path), fewer)["embedder"]["input_embedding"]
  np.testing.assert_array_equal(got, expected[:255_936])
  with pytest.raises(ValueError, match=r"embed_tokens.weight expected shape \(255871, 4\)"):
    weights.load(str(tmp_path), gemma.preset("tiny", num_embed=255_871, embed_dim=4, hidden_dim=4))


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model.", ""])
def test_the_text_model_is_found_in_a_multimodal_one(theirs, tmp_path, prefix):
  _, config, params = theirs
  weights.export(str(tmp_path / "text"), params, config, "float32")
  text = load_file(tmp_path / "text" / "model.safetensors")
  found = {name.replace("model.", prefix, 1): x for name, x in text.items()}
  if prefix:
    vision = "vision_tower.encoder.x" if prefix[0] == "l" else "model.vision_tower.encoder.x"
    found |= {vision: np.ones(3, np.float32)}
    found[f"{'language_model.' * (prefix[0] == 'l')}lm_head.weight"] = np.ones(3, np.float32)
  path = tmp_path / "w.safetensors"
  save_file(found, str(path))
  same(weights.load(str(path), config), params)


def test_transformers_reads_exports_again(theirs, tmp_path):
  python = os.environ.get("NASH_JAX_TRANSFORMERS")
  if not python:
    pytest.skip("set NASH_JAX_TRANSFORMERS to a Python that has torch and transformers")
  _, config, params = theirs
  params = jax.tree.map(lambda x: x * 1.01, params)  # not what transformers has seen before
  weights.export(str(tmp_path / "out"), params, config, "float32", shard_bytes=50_000)
  tokens = np.random.default_rng(0).integers(0, 64, (2, 20))
  np.savez(tmp_path / "out" / "logits.npz", tokens=tokens, logits=logits(params, config, tokens))
  script = str(FIXTURES / "make_hf.py")
  env = {**os.environ, "HF_HUB_OFFLINE": "1"}
  done = subprocess.run(
    [python, script, "--check", str(tmp_path)], capture_output=True, text=True, env=env
  )
  assert done.returncode == 0, done.stdout + done.stderr
  assert done.stdout.startswith("out: Gemma")


def _rewrite(path, change):
  found = load_file(path)
  change(found)
  save_file(found, str(path))


def _damage(where, how):
  shard = where / "model-00002-of-00003.safetensors"
  index = where / hugging_face.INDEX
  config = json.loads((where / "config.json").read_text())
  if how == "shard missing":
    shard.unlink()
  elif how == "shard cut":
    shard.write_bytes(shard.read_bytes()[:-8])
  elif how == "index cut":
    index.write_text(index.read_text()[:100])
  elif how == "no index":
    index.unlink()
  elif how == "shard without a tensor":
    _rewrite(shard, lambda found: found.pop(min(found)))
  elif how == "quantised":
    _rewrite(shard, lambda found: found.update({n: x.astype(np.int8) for n, x in found.items()}))
  elif how == "soft-cap":
    config["attn_logit_softcapping"] = 50.0
  elif how == "rope":
    config["rope_parameters"]["full_attention"]["factor"] = 1.0
  elif how == "untied":
    config["tie_word_embeddings"] = False
  elif how == "config cut":
    (where / "config.json").write_text("{")
  if how in ("soft-cap", "rope", "untied"):
    (where / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
  ("how", "message"),
  [
    ("shard missing", r"shard model-00002-of-00003.safetensors is missing \(1 of 3"),
    ("shard cut", r"model-00002-of-00003.safetensors: expected a .safetensors file"),
    ("index cut", r"model.safetensors.index.json: expected JSON with a weight_map"),
    ("no index", r"expected one .safetensors file or model.safetensors.index.json, got 3 files"),
    (
      "shard without a tensor",
      r"00002-of-00003.safetensors: no tensor model.layers.\d\S+, which model.safetensors.index",
    ),
    ("quantised", r"tensor model.layers\S+ expected F32, BF16 or F16, got I8; quantised"),
    ("soft-cap", r"config.json: attn_logit_softcapping is 50.0, but model.preset .* has None"),
    ("rope", r"config.json: rope factor is 1.0, but model.preset with its changes has 8.0"),
    ("untied", r"config.json: tie_word_embeddings is False"),
    ("config cut", r"config.json: expected JSON"),
  ],
)
def test_a_folder_that_cannot_be_read_says_why(folder, how, message, monkeypatch):
  where, config = folder
  _damage(where, how)
  monkeypatch.setattr(safetensors, "_read", lambda *args: pytest.fail("a tensor is read"))
  with pytest.raises(ValueError, match=message):
    weights.load(str(where), config)


# As published: sparse where a multimodal model wraps the text model, and without layer_types.
PUBLISHED = {
  "gemma2_2b": {
    "model_type": "gemma2",
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "head_dim": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_hidden_layers": 26,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "rope_theta": 10000.0,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "rms_norm_eps": 1e-06,
  },
  "gemma3_1b": {
    "model_type": "gemma3_text",
    "hidden_size": 1152,
    "num_hidden_layers": 26,
    "attn_logit_softcapping": None,
    "rope_theta": 1000000,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
  },
  "gemma3_4b": {
    "model_type": "gemma3",
    "text_config": {
      "model_type": "gemma3_text",
      "hidden_size": 2560,
      "intermediate_size": 10240,
      "num_hidden_layers": 34,
      "sliding_window": 1024,
      "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    },
  },
}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_presets_are_what_published_configs_say(tmp_path, preset):
  (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[preset]))
  hugging_face.check_config(str(tmp_path), gemma.preset(preset))
  for other in PUBLISHED.keys() - {preset}:
    with pytest.raises(ValueError, match=r"config.json: \w+ is .* but model.preset"):
      hugging_face.check_config(str(tmp_path), gemma.preset(other))
  changed = gemma.preset(preset, global_scale_factor=2.0, local_scale_factor=2.0)
  with pytest.raises(ValueError, match="expected an architecture of Gemma 2"):
    hugging_face.check_config(str(tmp_path), changed)


def test_a_tensor_that_does_not_fit_is_named(folder):
  where, config = folder
  (where / "config.json").unlink()
  with pytest.raises(ValueError, match=r"leaf model.layers.0.self_attn.q_proj.weight expected"):
    weights.load(str(where), dataclasses.replace(config, num_heads=8))
  with pytest.raises(ValueError, match=r"no leaf model.layers.7.self_attn"):
    weights.load(
      str(where), dataclasses.replace(config, attention_types=(*config.attention_types, L))
    )
  with pytest.raises(ValueError, match=r"unknown leaf model.layers.0.self_attn.k_norm.weight"):
    weights.load(str(where), dataclasses.replace(config, use_qk_norm=False))


def test_exports_that_would_mislead_are_refused(tmp_path):
  config = gemma.preset("tiny")
  params = random(config)
  weights.export(str(tmp_path), params, config)
  with pytest.raises(ValueError, match="expected a folder without weights"):
    weights.export(str(tmp_path), params, config)
  with pytest.raises(ValueError, match="a reward model's head"):
    weights.export(str(tmp_path / "x"), {**params, "head": {"w": np.ones(16)}}, config)
  mixed = gemma.preset("tiny", use_qk_norm=True)
  with pytest.raises(ValueError, match="expected an architecture of Gemma 2"):
    weights.export(str(tmp_path / "x"), random(mixed), mixed)
  assert not (tmp_path / "x").exists()


def test_a_folder_without_weights_is_named(tmp_path):
  with pytest.raises(ValueError, match=r"expected .safetensors files or one of Gemma's Orbax"):
    weights.load(str(tmp_path), gemma.preset("tiny"))
  (tmp_path / "w.safetensors").write_bytes(b"")
  save_file({"a": np.ones(2, np.float32)}, str(tmp_path / "w.safetensors"))
  with pytest.raises(ValueError, match=r"expected the tensors of a Gemma text model, got 1 others"):
    weights.load(str(tmp_path), gemma.preset("tiny"))


def test_a_spec_is_a_folder_of_weights_or_a_run(file, tmp_path):
  path, config, params = file
  weights.export(str(tmp_path / "hub"), params, config, "float32")
  same(policy.load_weights(str(tmp_path / "hub"), config), params)
  run = Checkpoints(tmp_path / "run", keep=1, config={})
  run.save(1, {"params": gemma.cast(params, jnp.bfloat16)})
  run.close()
  shutil.copy(path, tmp_path / "run")  # what a run exports into its workdir is not the run
  with pytest.raises(ValueError, match="bfloat16"):
    policy.load_weights(str(tmp_path / "run"), config)


# The gemma library's Orbax checkpoints.


PERIOD = {False: 2, True: 6}  # of the attention pattern, of Gemma 2 and 3


def _flat(nested):
  """The layout of the published checkpoints: a folder a key, and /w behind the MLP's."""
  out = {}
  for path, x in traverse_util.flatten_dict(nested, sep="/").items():
    path = path + "/w" if "/mlp/" in path else path
    folder, leaf = path.rsplit("/", 1)
    out.setdefault(f"transformer/{folder}", {})[leaf] = x
  return out


def _stacked(nested, period):
  """The flat layout with every period-th layer in one array."""
  out = {}
  for name, leaves in _flat(nested).items():
    _, layer, *rest = name.split("/")
    if not layer.startswith("layer_"):
      out[name] = leaves
      continue
    kind = int(layer[6:]) % period
    name = "/".join(["transformer/stacked_layers", f"attention_type_{kind}", *rest])
    stack = out.setdefault(name, {})
    for leaf, x in leaves.items():
      stack.setdefault(leaf, []).append(x)
  return jax.tree.map(
    lambda x: np.stack(x) if isinstance(x, list) else x, out, is_leaf=lambda x: isinstance(x, list)
  )


def checkpoint(path, params, config, layout, **more):
  nested = jax.tree.map(np.asarray, gemma.unstack(jax.device_get(params), config))
  period = PERIOD[config.use_qk_norm]
  layouts = {"nested": lambda x: x, "flat": _flat, "stacked": lambda x: _stacked(x, period)}
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(path, {**layouts[layout](nested), **more})
  return str(path)


@pytest.mark.parametrize("layout", ["nested", "flat", "stacked"])
def test_every_layout_of_the_library_is_read(theirs, tmp_path, layout):
  _, config, params = theirs
  vision = {"nested": "vision_encoder"}.get(layout, "SigLiPFromPatches_0/x")
  path = checkpoint(tmp_path / "c", params, config, layout, **{vision: {"a": np.ones(2)}})
  assert weights.kind(path) == "orbax"
  if layout == "flat":
    same(weights.load(path, config, jnp.bfloat16), half(params))
  else:
    same(weights.load(path, config), params)


@pytest.mark.parametrize("layout", ["nested", "stacked"])
def test_the_library_reads_the_same_from_what_it_wrote(theirs, tmp_path, layout):
  from gemma.gm import ckpts
  from gemma.gm.ckpts import _checkpoint

  _, config, params = theirs
  nested = gemma.unstack(jax.device_get(params), config)
  tree = nested
  if layout == "stacked":
    tree = _checkpoint._nested_to_stacked(nested, PERIOD[config.use_qk_norm])
  ckpts.save_params(tree, tmp_path / "c", wait_until_finished=True)
  same(ckpts.load_params(tmp_path / "c"), nested)
  same(weights.load(str(tmp_path / "c"), config), params)


@pytest.mark.parametrize("layout", ["nested", "flat", "stacked"])
def test_a_checkpoint_that_does_not_fit_is_named(tmp_path, layout):
  config = MODELS["hf_gemma2"]
  path = checkpoint(tmp_path / "c", random(config), config, layout)
  first = "stacked_layers/attention_type_0" if layout == "stacked" else "layer_0"
  with pytest.raises(ValueError, match=rf"leaf {first}/attn/q_einsum/w expected shape .*8, 32, 8"):
    weights.load(path, dataclasses.replace(config, num_heads=8))
  with pytest.raises(ValueError, match=rf"no leaf {first}/attn/_query_norm/scale"):
    weights.load(path, dataclasses.replace(config, use_qk_norm=True))
  deeper = dataclasses.replace(config, attention_types=(L, G) * 3)
  deep = "type_1/attn/q_einsum/w expected shape .3, 4" if layout == "stacked" else "no leaf layer_5"
  with pytest.raises(ValueError, match=deep):
    weights.load(path, deeper)
  strange = checkpoint(tmp_path / "d", random(config), config, layout, strange={"a": np.ones(2)})
  with pytest.raises(ValueError, match="unknown leaf strange/a"):
    weights.load(strange, config)


@pytest.mark.parametrize("lost", ["_METADATA", "data"])
def test_a_damaged_checkpoint_is_named(tmp_path, lost):
  config = gemma.preset("tiny")
  path = pathlib.Path(checkpoint(tmp_path / "c", random(config), config, "nested"))
  if lost == "_METADATA":
    (path / lost).write_text("{")
  else:
    for file in path.rglob("d/*"):
      file.write_bytes(file.read_bytes()[:40])
  with pytest.raises(ValueError, match=r"weights .*/c.*: expected an Orbax checkpoint, got "):
    weights.load(str(path), config)


# Several hosts.

TWO = """
import sys
import jax, numpy as np
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from jax.experimental import multihost_utils
import test_weights_hugging_face
from flax import traverse_util
from nash_jax import weights
from nash_jax.models import sharding
from nash_jax.weights import names, safetensors

config = test_weights_hugging_face.MODELS["hf_gemma2"]
mesh = sharding.make_mesh({"data": 1, "fsdp": 2, "tensor": 2})
sizes = names.sizes(config)
# Not gemma.shapes: it would bring TensorFlow.
like = {
  path: jax.ShapeDtypeStruct((1,) * place.stacked + names.shape(place.tensor.axes, sizes), "f")
  for path, place in names.places(config).items()
}
slots = sharding.shardings(traverse_util.unflatten_dict(like, sep="/"), mesh)
read = {}
whole = safetensors._slice

def counted(found, cut):
  x = whole(found, cut)
  read[id(found)] = read.get(id(found), 0) + x.nbytes
  return x

safetensors._slice = counted
params = weights.load(sys.argv[3], config, shardings=slots)
assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding == s, params, slots))
total = sum(x.nbytes for x in jax.tree.leaves(params))
assert not params["embedder"]["input_embedding"].is_fully_addressable
# Norms and the like are read by all; of the rest each host reads its half.
assert 0.4 < sum(read.values()) / total < 0.6, (sum(read.values()), total)
orbax = weights.load(sys.argv[4], config, shardings=slots)
assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding == s, orbax, slots))
gathered = [multihost_utils.process_allgather(x, tiled=True) for x in (params, orbax)]
jax.tree.map(np.testing.assert_array_equal, *gathered)
weights.export(sys.argv[5], params, config, "float32")
weights.save(sys.argv[5] + "/own.st", params, config, "float32", {})
multihost_utils.sync_global_devices("written")
"""


def test_hosts_read_their_own_parts_and_write_one_file(tmp_path):
  config, source = MODELS["hf_gemma2"], FIXTURES / "hf_gemma2"
  params = weights.load(str(source), config)
  stacked = checkpoint(tmp_path / "c", params, config, "stacked")
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  env = {
    **os.environ,
    "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    "PYTHONPATH": str(FIXTURES.parent),
    "JAX_PLATFORMS": "cpu",
  }
  out = str(tmp_path / "out")
  started = [
    subprocess.Popen(
      [sys.executable, "-c", TWO, address, str(i), str(source), stacked, out],
      env=env,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for i in range(2)
  ]
  said = [process.communicate(timeout=120)[0] for process in started]
  assert [process.returncode for process in started] == [0, 0], "\n".join(said)
  own = tmp_path / "out" / "own.st"
  moved = own.rename(tmp_path / "own.safetensors")
  same(weights.load(out, config), params)
  same(weights.load(str(moved), config), params)

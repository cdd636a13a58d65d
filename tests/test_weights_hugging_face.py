"""Hugging Face's folders: read and written as transformers does, and what does not fit is named."""

import dataclasses
import json
import os
import shutil
import subprocess

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from safetensors.numpy import load_file, save_file
from weight_files import FIXTURES, MODELS, L, half, hugging_face_model, random, same

from nash_jax import weights
from nash_jax.models import gemma
from nash_jax.weights import hf_config, safetensors


def logits(params, config, tokens):
  mask = jnp.ones(tokens.shape, bool)
  positions = gemma.positions_of(mask)
  x, _ = gemma.forward(params, config, tokens, positions, gemma.causal_mask(mask))
  return gemma.logits(params, config, x)


@pytest.fixture(scope="module", params=MODELS)
def from_transformers(request):
  return hugging_face_model(request.param)


@pytest.fixture
def folder(tmp_path):
  """A copy of the sharded fixture that may be damaged, and the config."""
  where = tmp_path / "model"
  shutil.copytree(FIXTURES / "hf_gemma3", where)
  return where, MODELS["hf_gemma3"]


def test_logits_are_those_of_transformers(from_transformers):
  folder, config, params = from_transformers
  expected = np.load(folder / "logits.npz")
  assert np.ptp(expected["logits"]) > 5  # so that 1e-4 is a small part of what is compared
  got = jax.jit(logits, static_argnums=1)(params, config, expected["tokens"])
  np.testing.assert_allclose(got, expected["logits"], rtol=0, atol=1e-4)


def test_export_of_an_import_is_the_file_that_transformers_wrote(from_transformers, tmp_path):
  folder, config, params = from_transformers
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
  ours, theirs = (
    hf_config.fields(json.loads((at / "config.json").read_text()))
    for at in (tmp_path / "out", folder)
  )
  assert ours.pop("torch_dtype") == theirs.pop("dtype")
  assert ours == {name: theirs[name] for name in ours}


def test_large_exports_come_in_files_with_an_index(from_transformers, tmp_path):
  _, config, params = from_transformers
  weights.export(str(tmp_path), params, config, "bfloat16", shard_bytes=20_000)
  index = json.loads((tmp_path / hf_config.INDEX).read_text())
  files = {name: load_file(tmp_path / name) for name in set(index["weight_map"].values())}
  assert len(files) > 3
  assert sorted(files) == sorted(p.name for p in tmp_path.glob("*.safetensors"))
  sizes = [sum(x.nbytes for x in found.values()) for found in files.values()]
  assert max(sizes) <= 20_000
  assert sum(sizes) == index["metadata"]["total_size"]
  assert index["weight_map"] == {n: name for name, found in files.items() for n in found}
  same(weights.load(str(tmp_path), config, jnp.bfloat16), half(params))
  # The index alone names the folder too.
  got = weights.load(str(tmp_path / hf_config.INDEX), config, jnp.bfloat16)
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
def test_the_text_model_is_found_in_a_multimodal_one(from_transformers, tmp_path, prefix):
  _, config, params = from_transformers
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


def test_transformers_reads_exports_again(from_transformers, tmp_path):
  python = os.environ.get("NASH_JAX_TRANSFORMERS")
  if not python:
    pytest.skip("set NASH_JAX_TRANSFORMERS to a Python that has torch and transformers")
  _, config, params = from_transformers
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
  index = where / hf_config.INDEX
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
  hf_config.check_config(str(tmp_path), gemma.preset(preset))
  for other in PUBLISHED.keys() - {preset}:
    with pytest.raises(ValueError, match=r"config.json: \w+ is .* but model.preset"):
      hf_config.check_config(str(tmp_path), gemma.preset(other))
  changed = gemma.preset(preset, global_scale_factor=2.0, local_scale_factor=2.0)
  with pytest.raises(ValueError, match="expected an architecture of Gemma 2"):
    hf_config.check_config(str(tmp_path), changed)


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

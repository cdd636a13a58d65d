"""Hugging Face's folders: read as transformers does, and what does not fit is named."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from paths import FIXTURES
from safetensors.numpy import load_file, save_file
from weight_files import EMBEDDING, MODELS, L, hugging_face_model, logits, random, same

from nash_jax import weights
from nash_jax.models import gemma
from nash_jax.weights import hf_config, names, safetensors


def test_logits_are_those_of_transformers(from_transformers):
  folder, config, params = from_transformers
  expected = np.load(folder / "logits.npz")
  assert np.ptp(expected["logits"]) > 5  # so that 1e-4 is a small part of what is compared
  got = jax.jit(logits, static_argnums=1)(params, config, expected["tokens"])
  np.testing.assert_allclose(got, expected["logits"], rtol=0, atol=1e-4)


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
    head = f"{'language_model.' * (prefix[0] == 'l')}lm_head.weight"
    found[head] = found[f"{prefix}embed_tokens.weight"].copy()
    encoders = ("audio_tower.x", "embed_audio.x", "embed_vision.x", "vision_embedder.x")
    found |= {f"model.{name}": np.ones(3, np.float32) for name in encoders}
  # Keys of layers that read another's are in published files; nobody reads them.
  unread = names.unread(config, names.hugging_face)
  assert bool(unread) == (config.num_kv_shared_layers > 0)
  found |= {prefix + name: np.ones(3, np.float32) for name in unread}
  path = tmp_path / "w.safetensors"
  save_file(found, str(path))
  same(weights.load(str(path), config), params)


@pytest.fixture
def untied(tmp_path):
  """Writes the single-file fixture with its tensors changed; returns the folder."""
  where = tmp_path / "untied"

  def write(change):
    shutil.copytree(FIXTURES / "hf_gemma2", where, dirs_exist_ok=True)
    _rewrite(where / "model.safetensors", change)
    return str(where)

  return write


@pytest.mark.parametrize(
  "other",
  [
    lambda x: x[::-1],
    lambda x: x[:-1],
    lambda x: x * np.float32(1 + 1e-6),
    lambda x: np.where(np.arange(len(x))[:, None] == len(x) - 1, 0, x),
  ],
  ids=["rows turned", "a row less", "nearly equal", "last row"],
)
def test_a_head_that_differs_from_the_embedding_is_refused(untied, other):
  path = untied(lambda x: x.update({"lm_head.weight": np.ascontiguousarray(other(x[EMBEDDING]))}))
  with pytest.raises(ValueError, match=r"untied: lm_head.weight differs from model.embed_tokens"):
    weights.load(path, MODELS["hf_gemma2"])


@pytest.mark.parametrize("kept", ["both", "head alone"])
def test_a_head_that_is_the_embedding_is_read_as_it(untied, kept):
  def change(x):
    x["lm_head.weight"] = x[EMBEDDING].copy() if kept == "both" else x.pop(EMBEDDING)

  same(weights.load(untied(change), MODELS["hf_gemma2"]), hugging_face_model("hf_gemma2")[2])


def test_a_model_without_an_embedding_names_it(untied):
  with pytest.raises(ValueError, match=r"no leaf model.embed_tokens.weight"):
    weights.load(untied(lambda x: x.pop(EMBEDDING)), MODELS["hf_gemma2"])


def test_a_head_of_another_type_is_compared_by_its_numbers(untied):
  def change(x):
    x[EMBEDDING] = x[EMBEDDING].astype(jnp.bfloat16)
    x["lm_head.weight"] = x[EMBEDDING].astype(np.float32)

  got = weights.load(untied(change), MODELS["hf_gemma2"])["embedder"]["input_embedding"]
  expected = load_file(FIXTURES / "hf_gemma2" / "model.safetensors")[EMBEDDING]
  np.testing.assert_array_equal(got, expected.astype(jnp.bfloat16).astype(np.float32))


def test_adapters_alone_are_no_model(tmp_path):
  name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
  save_file({name: np.ones((2, 4), np.float32)}, str(tmp_path / "adapter_model.safetensors"))
  with pytest.raises(ValueError, match=r"expected a whole model, got adapters \(LoRA\): merge"):
    weights.load(str(tmp_path), MODELS["hf_gemma2"])


def _rewrite(path, change):
  found = load_file(path)
  change(found)
  save_file(found, str(path))


ELSEWHERE = ("..", "below", "absolute", "number", "null", "list")


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
  elif how == "shard with a tensor more":
    _rewrite(shard, lambda found: found.update({"lm_head.weight": np.ones(3, np.float32)}))
  elif how == "shards that share a tensor":
    found = load_file(where / "model-00001-of-00003.safetensors")
    _rewrite(shard, lambda other: other.update({min(found): found[min(found)]}))
  elif how == "single file beside the index":
    shutil.copy(shard, where / "model.safetensors")
  elif how in ELSEWHERE:
    shard.rename(where.parent / shard.name)
    listed = json.loads(index.read_text())
    place = {"..": "../", "below": "../model/../", "absolute": f"{where.parent}/"}.get(how)
    named = f"{place}{shard.name}" if place else {"number": 3, "null": None, "list": [1]}[how]
    for name, file in listed["weight_map"].items():
      listed["weight_map"][name] = named if file == shard.name else file
    index.write_text(json.dumps(listed))
  elif how == "names in a list":
    index.write_text(json.dumps({"weight_map": [["a", shard.name]]}))
  elif how == "a name twice":
    index.write_text('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}')
  elif how == "index pointer":
    index.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00")
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
    *(
      (how, r"index.json: expected the name of a file of this folder for model\.\S+, got ")
      for how in ELSEWHERE
    ),
    ("names in a list", r"index.json: expected JSON with a weight_map, got \[\['a'"),
    ("a name twice", r"index.json: expected JSON with a weight_map, got 'a' twice"),
    ("index pointer", r"index.json: expected JSON .* got a Git LFS pointer: run `git lfs pull`"),
    (
      "shard with a tensor more",
      r"00002-of-00003.safetensors: tensor lm_head.weight, which model.safetensors.index.json says"
      " is in no file",
    ),
    (
      "shards that share a tensor",
      r"00002-of-00003.safetensors: tensor model\.\S+, which model.safetensors.index.json says is"
      " in model-00001-of-00003.safetensors",
    ),
    (
      "single file beside the index",
      "got both model.safetensors and model.safetensors.index.json, which does not name it",
    ),
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


def test_a_folder_without_weights_is_named(tmp_path):
  with pytest.raises(ValueError, match=r"expected .safetensors files or one of Gemma's Orbax"):
    weights.load(str(tmp_path), gemma.preset("tiny"))
  (tmp_path / "w.safetensors").write_bytes(b"")
  save_file({"a": np.ones(2, np.float32)}, str(tmp_path / "w.safetensors"))
  with pytest.raises(ValueError, match=r"expected the tensors of a Gemma text model, got 1 others"):
    weights.load(str(tmp_path), gemma.preset("tiny"))


def test_rows_that_a_file_lacks_are_never_a_pieces(tmp_path):
  """A piece without a row would be a word whose embedding is zero."""
  config = gemma.preset("tiny")
  weights.export(str(tmp_path), random(config), config, "float32")
  with pytest.raises(ValueError, match=r"embed_tokens.weight expected shape \(80, 16\), got \(64"):
    weights.load(str(tmp_path), gemma.preset("tiny", num_embed=80))

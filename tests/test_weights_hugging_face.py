"""Hugging Face's folders: read and written as transformers does, and what does not fit is named."""

import dataclasses
import functools
import json
import os
import re
import shutil
import subprocess

import jax
import numpy as np
import pytest
import transformers_values
from jax import numpy as jnp
from real_gemma_texts import TEXTS, TURNS
from safetensors.numpy import load_file, save_file
from weight_files import FIXTURES, MODELS, L, half, hugging_face_model, random, same

from nash_jax import weights
from nash_jax.data.chat_template import TEMPLATES
from nash_jax.data.tokenizer import BUNDLED, Tokenizer
from nash_jax.models import gemma, lora
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
    head = f"{'language_model.' * (prefix[0] == 'l')}lm_head.weight"
    found[head] = found[f"{prefix}embed_tokens.weight"].copy()
  path = tmp_path / "w.safetensors"
  save_file(found, str(path))
  same(weights.load(str(path), config), params)


EMBEDDING = "model.embed_tokens.weight"


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


def _like_gemma3_27b():
  """Five local layers to a global one twice and some over, queries scaled by another width."""
  config = gemma.preset("gemma3_27b")
  assert config.query_pre_attn_scalar != config.head_dim
  return dataclasses.replace(
    config,
    num_embed=64,
    embed_dim=32,
    hidden_dim=48,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    query_pre_attn_scalar=21,
    sliding_window_size=6,
    attention_types=config.attention_types[:14],
  )


@pytest.fixture
def python():
  """An interpreter that has transformers."""
  named = os.environ.get("NASH_JAX_TEST_TRANSFORMERS")
  if not named:
    packages = "torch, transformers, sentencepiece and protobuf"
    pytest.skip(f"set NASH_JAX_TEST_TRANSFORMERS to a Python with {packages}")
  return named


def test_transformers_reads_an_exports_tokenizer_and_stops(python, tmp_path):
  tokenizer = Tokenizer(BUNDLED, "gemma")
  config = gemma.preset("tiny", num_embed=tokenizer.size)
  weights.export(str(tmp_path / "out"), random(config), config, "float32", tokenizer=tokenizer)
  got = json.loads(transformers_values.run(python, "--reread", tmp_path / "out"))
  assert got["english"] == [tokenizer.bos_id, *tokenizer.encode(TEXTS["english"])]
  assert got["turns"] == tokenizer.prompt(TURNS)
  assert got["lengths"] == transformers_values.LENGTHS


def test_transformers_reads_exports_again(python, tmp_path):
  exported = {name: hugging_face_model(name)[1:] for name in MODELS}
  exported["like_27b"] = _like_gemma3_27b(), random(_like_gemma3_27b(), scale=0.3)
  run, tokens = jax.jit(logits, static_argnums=1), np.random.default_rng(0).integers(0, 64, (2, 20))
  for name, (config, params) in exported.items():
    params = jax.tree.map(lambda x: x * 1.01, params)  # not what transformers has seen before
    weights.export(str(tmp_path / name), params, config, "float32", shard_bytes=50_000)
    expected = run(params, config, tokens)
    assert np.ptp(expected) > 5
    np.savez(tmp_path / name / "logits.npz", tokens=tokens, logits=expected)
  # The width that scales queries counts: by the head's size this is another model.
  by_size = dataclasses.replace(config, query_pre_attn_scalar=None)
  assert np.abs(run(params, by_size, tokens) - expected).max() > 0.05
  script = str(FIXTURES / "make_hf.py")
  env = {**os.environ, "HF_HUB_OFFLINE": "1"}
  done = subprocess.run(
    [python, script, "--check", str(tmp_path)], capture_output=True, text=True, env=env
  )
  assert done.returncode == 0, done.stdout + done.stderr
  print(done.stdout)
  assert re.findall(r"^(\w+): Gemma\d", done.stdout, re.MULTILINE) == sorted(exported)


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
  "gemma3_12b": {
    "model_type": "gemma3",
    "text_config": {
      "model_type": "gemma3_text",
      "hidden_size": 3840,
      "intermediate_size": 15360,
      "num_attention_heads": 16,
      "num_hidden_layers": 48,
      "num_key_value_heads": 8,
      "sliding_window": 1024,
      "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    },
  },
  "gemma3_27b": {
    "model_type": "gemma3",
    "text_config": {
      "model_type": "gemma3_text",
      "head_dim": 128,
      "hidden_size": 5376,
      "intermediate_size": 21504,
      "num_attention_heads": 32,
      "num_hidden_layers": 62,
      "num_key_value_heads": 16,
      "query_pre_attn_scalar": 168,
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


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"null", "expected JSON with fields, got None"),
    (b"[]", r"expected JSON with fields, got \[\]"),
    (b'{"hidden_size": "32"}', "hidden_size is '32', but model.preset with its changes has 32"),
    (b'{"hidden_size": NaN}', "hidden_size is nan, but"),
    (b'{"rms_norm_eps": null}', "rms_norm_eps is None, but"),
    (b'{"text_config": 3}', "text_config is 3, expected fields in braces"),
    (b'{"rope_parameters": [1]}', r"rope_parameters is \[1\], expected fields"),
    (b'{"rope_scaling": "linear"}', "rope_scaling is 'linear', expected fields"),
    (b'{"rope_parameters": {"sliding_attention": {}, "full_attention": 1}}', "full_attention is 1"),
    (
      b'{"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0,'
      b' "rope_theta": 1e6}, "sliding_attention": {"rope_type": "linear", "factor": 2.0,'
      b' "rope_theta": 1e4}}}',
      r"local rope is \(2.0, 'linear'\)",
    ),
    (b'{"rope_parameters": {"sliding_attention": {"rope_theta": 1e4}}}', "rope_theta is None"),
    (b'{"rope_scaling": {"rope_type": "yarn", "factor": 8.0}}', "rope type is 'yarn'.* 'linear'"),
    (b'{"rope_scaling": {"type": "linear", "factor": 4.0}}', "rope factor is 4.0.* has 8.0"),
    (b'{"use_bidirectional_attention": true}', "use_bidirectional_attention is True.* has False"),
    (b'{"sliding_window_pattern": 4}', r"layer_types is \['sliding_attention', "),
    (b'{"sliding_window_pattern": "x"}', "layer_types is 'x'"),
    (b'{"tie_word_embeddings": false, "text_config": {}}', "tie_word_embeddings is False"),
    (
      b'{"hidden_size": 32, "hidden_size": 64}',
      "expected JSON with fields, got 'hidden_size' twice",
    ),
    (b'{"a": "caf\xe9"}', "can't decode byte 0xe9"),
    ('{"a": 1}'.encode("utf-16"), "UTF-16 or UTF-32, expected UTF-8"),
    (b"[" * 100_000, "RecursionError"),
    (b"", "got an empty file"),
    (b"version https://git-lfs.github.com/spec/v1\noid", "a Git LFS pointer"),
    (b"<!DOCTYPE html><html>", "a web page: download the file itself"),
  ],
)
def test_a_config_that_says_otherwise_or_nothing_is_refused(tmp_path, content, message):
  (tmp_path / "config.json").write_bytes(content)
  with pytest.raises(ValueError, match=rf"config.json: .*{message}") as raised:
    hf_config.check_config(str(tmp_path), MODELS["hf_gemma3"])
  assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
  "content",
  [
    b'\xef\xbb\xbf{"hidden_size": 32}',
    b'{"text_config": null, "rope_scaling": null, "rope_parameters": null}',
    b'{"rope_scaling": {"type": "linear", "factor": 8}}',
    b'{"sliding_window_pattern": 6, "use_bidirectional_attention": null}',
  ],
)
def test_a_config_that_says_the_same_passes(tmp_path, content):
  (tmp_path / "config.json").write_bytes(content)
  hf_config.check_config(str(tmp_path), MODELS["hf_gemma3"])


def test_a_config_that_vanishes_or_cannot_be_read_is_named(tmp_path):
  (tmp_path / "config.json").symlink_to(tmp_path / "absent")
  with pytest.raises(
    ValueError, match=r"config.json: expected JSON with fields, got .*No such file"
  ):
    hf_config.check_config(str(tmp_path), MODELS["hf_gemma3"])
  (tmp_path / "config.json").unlink()
  (tmp_path / "config.json").mkdir()
  with pytest.raises(ValueError, match=r"config.json: expected JSON with fields, got .*directory"):
    hf_config.check_config(str(tmp_path), MODELS["hf_gemma3"])


def _exported(folder):
  return [
    json.loads((folder / name).read_text()) for name in ("config.json", "generation_config.json")
  ]


def test_an_export_says_where_to_stop_and_how_long_it_may_be(from_transformers, tmp_path):
  folder, config, params = from_transformers
  weights.export(str(tmp_path / "out"), params, config)
  ours, generation = _exported(tmp_path / "out")
  theirs = json.loads((folder / "config.json").read_text())
  names = ("eos_token_id", "bos_token_id", "pad_token_id", "max_position_embeddings")
  assert {name: ours[name] for name in names} == {name: theirs[name] for name in names}
  # Left out are the version that wrote it, and what is there by another name.
  other_names = {"transformers_version", "use_bidirectional_attention", "rope_parameters", "dtype"}
  assert theirs.keys() - ours.keys() <= {*other_names, "_sliding_window_pattern"}
  assert generation == {name: ours[name] for name in names[:3]}
  if theirs["model_type"] == "gemma2":
    assert ours["hidden_act"] == theirs["hidden_activation"]


@pytest.mark.parametrize(
  ("preset", "stops", "positions"),
  [
    ("gemma2_2b", [1, 107], 8192),
    ("gemma3_270m", [1, 106], 32_768),
    ("gemma3_1b", [1, 106], 32_768),
    ("gemma3_4b", [1, 106], 131_072),
  ],
)
def test_published_models_stop_as_published(preset, stops, positions):
  config = hf_config.export_json(gemma.preset(preset), "bfloat16")["config.json"]
  ids = {"bos_token_id": 2, "eos_token_id": stops, "pad_token_id": 0}
  assert {name: config[name] for name in ids} == ids
  assert config["max_position_embeddings"] == positions


def test_an_export_with_a_tokenizer_has_its_ids_and_its_pieces_rows(tmp_path):
  tokenizer = Tokenizer(BUNDLED, "gemma")
  padded = gemma.preset("tiny", num_embed=tokenizer.size + 64)
  params = random(padded)
  weights.export(str(tmp_path / "out"), params, padded, "float32", tokenizer=tokenizer)
  config, generation = _exported(tmp_path / "out")
  end = tokenizer.id_of("<end_of_turn>")
  assert generation == {"bos_token_id": 2, "eos_token_id": [1, end], "pad_token_id": 0}
  assert config["vocab_size"] == tokenizer.size
  got = load_file(tmp_path / "out" / "model.safetensors")[EMBEDDING]
  np.testing.assert_array_equal(got, params["embedder"]["input_embedding"][: tokenizer.size])
  small = gemma.preset("tiny", num_embed=tokenizer.size - 1)
  with pytest.raises(ValueError, match="has 1024 pieces, the model only 1023 vocabulary rows"):
    weights.export(str(tmp_path / "x"), random(small), small, tokenizer=tokenizer)
  assert not (tmp_path / "x").exists()


def test_rows_that_a_file_lacks_are_never_a_pieces(tmp_path):
  """A piece without a row would be a word whose embedding is zero."""
  config = gemma.preset("tiny")
  weights.export(str(tmp_path), random(config), config, "float32")
  with pytest.raises(ValueError, match=r"embed_tokens.weight expected shape \(80, 16\), got \(64"):
    weights.load(str(tmp_path), gemma.preset("tiny", num_embed=80))


def test_an_export_joins_what_lies_in_its_folder_and_replaces_nothing(tmp_path):
  config = gemma.preset("tiny")
  out, params = tmp_path / "out", random(config)
  out.mkdir()
  (out / "tokenizer.model").write_text("pieces")
  weights.export(str(out), params, config, "float32", shard_bytes=2000)
  assert (out / "tokenizer.model").read_text() == "pieces"
  same(weights.load(str(out), config), params)
  assert [path.name for path in tmp_path.iterdir()] == ["out"]
  for name in ("config.json", "generation_config.json"):
    other = tmp_path / name / "out"
    other.mkdir(parents=True)
    (other / name).write_text("{}")
    with pytest.raises(ValueError, match=f"expected a folder without {name}; move it away"):
      weights.export(str(other), params, config)
    assert [path.name for path in other.iterdir()] == [name]


@pytest.mark.parametrize("template", ["plain", "gemma"])
def test_an_export_brings_its_tokenizer(tmp_path, template):
  """Without tokenizer_config.json, transformers puts no <bos> before a text."""
  tokenizer, out = Tokenizer(BUNDLED, template), tmp_path / "out"
  config = gemma.preset("tiny", num_embed=tokenizer.size)
  weights.export(str(out), random(config), config, tokenizer=tokenizer)
  copied = Tokenizer(str(out / "tokenizer.model"), template)
  assert copied.prompt("A cat.") == tokenizer.prompt("A cat.")
  written = json.loads((out / "tokenizer_config.json").read_text())
  assert (written["add_bos_token"], written["bos_token"]) == (True, "<bos>")
  assert written.get("chat_template", "") == TEMPLATES[template].jinja
  assert ("chat_template" in written) == (template == "gemma")


@pytest.mark.parametrize("name", ["tokenizer_config.json", "tokenizer.model"])
def test_an_export_leaves_files_of_the_tokenizer_that_are_there(tmp_path, name):
  tokenizer = Tokenizer(BUNDLED, "gemma")
  config = gemma.preset("tiny", num_embed=tokenizer.size)
  (tmp_path / name).write_text("mine")
  weights.export(str(tmp_path), random(config), config, tokenizer=tokenizer)
  assert (tmp_path / name).read_text() == "mine"
  found = {path.name for path in tmp_path.glob("tokenizer*")}
  assert found == {"tokenizer_config.json", "tokenizer.model"}


@pytest.mark.parametrize("there", [False, True])
def test_an_export_that_fails_leaves_no_half_of_a_folder(tmp_path, monkeypatch, there):
  import safetensors.numpy as library

  config, out, save = gemma.preset("tiny"), tmp_path / "out", library.save_file
  params = random(config)
  if there:
    out.mkdir()
    (out / "tokenizer.model").write_text("pieces")

  def fail(leaves, path, metadata):
    if "00002" in path:
      raise OSError("disk full")
    save(leaves, path, metadata)

  monkeypatch.setattr(library, "save_file", fail)
  with pytest.raises(OSError, match="disk full"):
    weights.export(str(out), params, config, "float32", shard_bytes=2000)
  assert [path.name for path in tmp_path.rglob("*")] == ["out", "tokenizer.model"] * there
  monkeypatch.undo()
  weights.export(str(out), params, config, "float32", shard_bytes=2000)
  same(weights.load(str(out), config), params)


def test_an_export_may_be_read_by_whom_new_files_are_for(tmp_path):
  config, before = gemma.preset("tiny"), os.umask(0o027)
  try:
    weights.export(str(tmp_path / "out"), random(config), config)
  finally:
    os.umask(before)
  assert {oct(path.stat().st_mode)[-3:] for path in (tmp_path / "out").iterdir()} == {"640"}
  assert oct((tmp_path / "out").stat().st_mode)[-3:] == "750"


@pytest.mark.parametrize("number", [np.nan, np.inf, 1e30])
def test_an_export_of_numbers_that_its_type_cannot_hold_is_refused(tmp_path, number):
  config = gemma.preset("tiny")
  params = random(config)
  params["final_norm"]["scale"] = params["final_norm"]["scale"].at[3].set(number)
  for write in (weights.export, functools.partial(weights.save, card={})):
    with pytest.raises(ValueError, match=r"finite numbers in float16, got NaN .* final_norm/scale"):
      write(str(tmp_path / "out"), params, config, dtype="float16")
  assert not [*tmp_path.iterdir()]


def test_parameters_of_another_tree_are_not_exported(tmp_path):
  """Adapters that were not merged would be lost in silence."""
  config = gemma.preset("tiny")
  params = random(config)
  joined = lora.join(params, lora.init(jax.random.key(0), params, 2), 1.0)
  for write in (weights.export, functools.partial(weights.save, dtype="float32", card={})):
    with pytest.raises(ValueError, match=r"unknown leaf layers/0/lora/attn"):
      write(str(tmp_path / "out"), joined, config)
  with pytest.raises(ValueError, match=r"leaf layers/0/attn/q_einsum/w expected shape"):
    weights.export(str(tmp_path / "out"), params, gemma.preset("tiny", num_layers=1))

"""Exports to Hugging Face's layout: what transformers reads, whole or not at all."""

import dataclasses
import functools
import json
import os
import re
import subprocess

import jax
import numpy as np
import pytest
import transformers_values
from jax import numpy as jnp
from other_python import python_with
from paths import ROOT
from real_gemma_texts import TEXTS, TURNS
from safetensors.numpy import load_file
from weight_files import EMBEDDING, MODELS, half, hugging_face_model, logits, random, same

from nash_jax import weights
from nash_jax.data.chat_template import TEMPLATES
from nash_jax.data.tokenizer import BUNDLED, Tokenizer
from nash_jax.models import gemma, lora
from nash_jax.weights import hf_config


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
  return python_with()


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
  script = str(ROOT / "tests" / "programs" / "make_hf.py")
  env = {**os.environ, "HF_HUB_OFFLINE": "1"}
  done = subprocess.run(
    [python, script, "--check", str(tmp_path)], capture_output=True, text=True, env=env
  )
  assert done.returncode == 0, done.stdout + done.stderr
  print(done.stdout)
  assert re.findall(r"^(\w+): Gemma\d", done.stdout, re.MULTILINE) == sorted(exported)


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
  other_names |= {"per_layer_config", "num_experts", "top_k_experts", "moe_intermediate_size"}
  if not config.per_layer_input_dim:
    other_names.add("vocab_size_per_layer_input")
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

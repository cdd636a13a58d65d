"""Our own .safetensors files: what is written comes back, and what does not fit is named."""

import gzip
import os
import pathlib
import pickle
import shutil

import jax
import numpy as np
import pytest
from flax import traverse_util
from jax import numpy as jnp
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from weight_files import half, random, same

import nash_jax
from nash_jax import policy, weights
from nash_jax.config import resolve
from nash_jax.data.tokenizer import BUNDLED
from nash_jax.models import gemma
from nash_jax.run.checkpoint import Checkpoints
from nash_jax.validation import asset_path
from nash_jax.weights import names

LAYOUTS = {
  "gemma2": {},
  "transposed": {"transpose_gating_einsum": True, "use_qk_norm": True},
  "ungrouped": {"num_kv_heads": 2},
}


@pytest.fixture
def file(tmp_path):
  """A file of the tiny preset, its config and parameters."""
  config = gemma.preset("tiny")
  params, path = random(config), str(tmp_path / "new" / "w.safetensors")
  weights.save(path, params, config, "float32", {"step": 3})
  return path, config, params


@pytest.mark.parametrize(
  "name", ["tiny", "gemma2_9b", "gemma3_4b", "gemma4_e2b", "gemma4_31b", "ungrouped"]
)
def test_the_table_of_names_is_the_models_own_tree(name):
  config = gemma.preset("tiny", num_kv_heads=2) if name == "ungrouped" else gemma.preset(name)
  ours = traverse_util.flatten_dict(gemma.shapes(config), sep="/")
  listed = {path: place.shape for path, place in names.places(config).items()}
  assert listed == {path: leaf.shape for path, leaf in ours.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("head", [{}, {"w": 16}, {"v": (16, 6)}, {"v": (16, 4), "scale": (16, 2)}])
def test_saved_parameters_come_back(tmp_path, layout, dtype, head):
  config = gemma.preset("tiny", **LAYOUTS[layout])
  params = random(config)
  if head:
    params["head"] = {name: np.full(shape, 1.5, np.float32) for name, shape in head.items()}
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


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("leaf", ["final_norm/scale", "layer_1/mlp/linear", "head/w"])
def test_numbers_that_are_not_finite_are_refused(file, leaf, number):
  path, config, params = file
  weights.save(path, {**params, "head": {"w": np.ones(16)}}, config, "float32", {})
  found = load_file(path)
  found[leaf].flat[-1] = number
  save_file(found, path)
  place = r"layers/0/mlp/linear \(place 1 of its stack\)" if leaf.startswith("layer") else leaf
  with pytest.raises(ValueError, match=rf"w.safetensors: .*got NaN or infinity in leaf {place}"):
    weights.load(path, config)


def test_numbers_that_the_dtype_asked_for_cannot_hold_are_refused(file):
  path, config, _ = file
  found = load_file(path)
  found["final_norm/scale"][0] = 1e5
  save_file(found, path)
  assert weights.load(path, config, jnp.bfloat16)["final_norm"]["scale"][0] > 9e4
  with pytest.raises(ValueError, match=r"finite numbers in float16, got NaN or infinity in leaf"):
    weights.load(path, config, jnp.float16)


@pytest.mark.parametrize("dtype", [np.float64, np.int8, np.int64, np.bool_, np.uint16])
def test_a_tensor_of_another_type_is_refused(file, dtype):
  path, config, _ = file
  found = load_file(path)
  save_file({**found, "final_norm/scale": found["final_norm/scale"].astype(dtype)}, path)
  with pytest.raises(ValueError, match=r"tensor final_norm/scale expected F32, BF16 or F16, got "):
    weights.load(path, config)


OTHERS = {
  "gz": (gzip.compress(b"x" * 100), "compressed .gzip.: unpack it"),
  "pickle": (pickle.dumps({"a": 1}), "a pickle: convert it to safetensors"),
  "archive": (b"PK\x03\x04" + bytes(60), "a PyTorch or NumPy archive: convert it"),
  "gguf": (b"GGUF" + bytes(60), "a GGUF file: convert it"),
  "page": (b"<!DOCTYPE html>\n<html>", "a web page: download the file itself"),
  "empty": (b"", "an empty file"),
  "header too long": (
    (1 << 40).to_bytes(8, "little") + b"{}",
    "SafetensorError: .*header too large",
  ),
  "NUL bytes": (bytes(400), "SafetensorError: "),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_file_of_another_kind_is_said_to_be_one(file, other):
  content, message = OTHERS[other]
  pathlib.Path(file[0]).write_bytes(content)
  expected = rf"w.safetensors: expected a .safetensors file, got {message}"
  with pytest.raises(ValueError, match=expected):
    weights.load(*file[:2])


def test_a_damaged_file_is_not_taken_for_another_kind(file):
  """Its first bytes are the length of its header, which may be any number."""
  for start in (b"\x80\x02", b"\x1f\x8b\x08", b"<!"):
    pathlib.Path(file[0]).write_bytes(start.ljust(8, b"\0") + b'{"a": {}}')
    with pytest.raises(ValueError, match=r"expected a .safetensors file, got SafetensorError"):
      weights.load(*file[:2])


def test_a_folder_of_another_format_says_so(tmp_path):
  (tmp_path / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
  with pytest.raises(ValueError, match=r"pytorch_model.bin is of another format: convert it"):
    weights.load(str(tmp_path), gemma.preset("tiny"))


def test_a_leaf_with_a_line_break_in_its_name_is_shown_on_one_line(file):
  path, config, _ = file
  save_file({**load_file(path), "two\nlines": np.ones(2, np.float32)}, path)
  with pytest.raises(ValueError, match=r"unknown leaf two\\nlines"):
    weights.load(path, config)


@pytest.mark.parametrize("path", ["foo://bar", "http://host/x.safetensors"])
def test_an_address_is_no_path(path):
  config = gemma.preset("tiny")
  for load in (weights.load, policy.load_weights):
    with pytest.raises(ValueError, match=rf"weights {path}: expected a local path, got an address"):
      load(path, config)


def test_a_file_is_for_whom_new_files_are_for(file):
  path, config, params = file
  before = os.umask(0o022)
  try:
    weights.save(path, params, config, "float32", {})
  finally:
    os.umask(before)
  assert oct(os.stat(path).st_mode)[-3:] == "644"
  same(weights.load(path, config), params)


def test_a_folder_is_not_overwritten_by_a_file(tmp_path):
  config = gemma.preset("tiny")
  with pytest.raises(ValueError, match="expected the name of a file, got a folder"):
    weights.save(str(tmp_path), random(config), config, "float32", {})
  c = nash_jax.config.fit()
  c.export = str(tmp_path)
  with pytest.raises(ValueError, match="export: expected a file's name, or '', got"):
    resolve(c)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A run's workdir with an @ in its name, and its parameters at steps 1 and 2."""
  config = gemma.preset("tiny")
  workdir, steps = tmp_path_factory.mktemp("a@b") / "me@run", [random(config, n) for n in (1, 2)]
  checkpoints = Checkpoints(workdir, keep=2, config={})
  for step, params in enumerate(steps, 1):
    checkpoints.save(step, {"params": params, "target": gemma.cast(params, jnp.float32)})
  checkpoints.close()
  return str(workdir), config, steps


def test_an_at_sign_in_a_folders_name_is_part_of_it(run, file, tmp_path):
  workdir, config, (first, second) = run
  for spec, expected in (("", second), ("@target", second), ("@params:1", first), ("@:1", first)):
    same(policy.load_weights(workdir + spec, config), expected)
  where = tmp_path / "x@target" / "a@b.safetensors"
  where.parent.mkdir()
  shutil.copy(file[0], where)
  same(policy.load_weights(str(where), config), file[2])


def test_a_config_takes_an_at_sign_as_loading_does(run, file, tmp_path):
  workdir, _, _ = run
  where = tmp_path / "x@target" / "a@b.safetensors"
  where.parent.mkdir()
  shutil.copy(file[0], where)
  tokenizer = shutil.copy(asset_path(BUNDLED), tmp_path / "x@target" / "tokenizer.model")
  for spec in (workdir, f"{workdir}@target", f"{workdir}@params:1", str(where)):
    arena = nash_jax.config.arena()
    arena.policies.base.weights = spec
    resolve(arena)
    train = nash_jax.config.train()
    train.model.weights, train.model.tokenizer = spec, str(tokenizer)
    assert resolve(train).model.weights == spec


@pytest.mark.parametrize(
  ("part", "message"),
  [
    ("@opt_state", r"after @: got 'opt_state', expected one of params, target"),
    ("@params:bset", r"after :: expected a step or best, got 'bset'"),
    ("@params:²", r"after :: expected a step or best, got '²'"),
    ("@params:-1", r"after :: expected a step or best, got '-1'"),
  ],
)
def test_a_part_that_no_run_has_is_refused(run, part, message):
  workdir, config, _ = run
  with pytest.raises(ValueError, match=f"weights, {message}"):
    policy.load_weights(workdir + part, config)
  c = nash_jax.config.train()
  c.model.weights = workdir + part
  with pytest.raises(ValueError, match=f"model.weights, {message}"):
    resolve(c)


def test_a_file_has_no_parts(file):
  with pytest.raises(ValueError, match=r"weights: expected a run's workdir before @, got .*@t"):
    policy.load_weights(f"{file[0]}@target", file[1])


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

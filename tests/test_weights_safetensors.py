"""Our own .safetensors files: what is written comes back, and what does not fit is named."""

import pathlib
import shutil

import jax
import numpy as np
import pytest
from flax import traverse_util
from jax import numpy as jnp
from safetensors import safe_open
from weight_files import half, random, same

from nash_jax import policy, weights
from nash_jax.models import gemma
from nash_jax.run.checkpoint import Checkpoints
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


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("head", [False, True])
def test_saved_parameters_come_back(tmp_path, layout, dtype, head):
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

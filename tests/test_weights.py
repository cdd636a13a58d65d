"""Weights files: what is written comes back, and what does not fit is named."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from nash_jax.models import gemma, weights

LAYOUTS = {"gemma2": {}, "transposed": {"transpose_gating_einsum": True, "use_qk_norm": True}}


def random(config, seed=0):
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), gemma.shapes(config)
  )


@pytest.fixture
def file(tmp_path):
  """A file of the tiny preset, its config and parameters."""
  config = gemma.preset("tiny")
  params, path = random(config), str(tmp_path / "new" / "w.safetensors")
  weights.save(path, params, config, "float32", {"step": 3})
  return path, config, params


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("head", [False, True])
def test_parameters_come_back(tmp_path, layout, dtype, head):
  from safetensors import safe_open

  config = gemma.preset("tiny", **LAYOUTS[layout])
  params = random(config)
  if head:
    params["head"] = {"w": jnp.arange(16.0)}
  path = tmp_path / "w.safetensors"
  weights.save(str(path), params, config, dtype, {"seed": 7})
  got = weights.load(str(path), config)
  rounded = jax.tree.map(lambda x: x.astype(dtype).astype(jnp.float32), params)
  jax.tree.map(np.testing.assert_array_equal, got, rounded)
  with safe_open(str(path), "flax") as f:
    assert f.metadata() == {"card": '{"seed": 7}'}
    # Under the library's names and shapes, in its own gating layout.
    gating = f.get_slice("layer_1/mlp/gating_einsum").get_shape()
  assert gating == ([2, 32, 16] if layout == "transposed" else [2, 16, 32])
  assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


@pytest.mark.parametrize("damage", ["cut", "text", "absent"])
def test_a_file_that_cannot_be_read_is_named(file, damage):
  import pathlib

  path, config, _ = file
  whole = pathlib.Path(path).read_bytes()
  if damage == "absent":
    pathlib.Path(path).unlink()
  else:
    pathlib.Path(path).write_bytes(whole[:-50] if damage == "cut" else b"these are no weights")
  with pytest.raises(ValueError, match=r"weights .*w.safetensors: expected a .safetensors file"):
    weights.load(path, config)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"hidden_dim": 48}, r"leaf layer_0/mlp/gating_einsum expected shape \(2, 16, 48\), got "
     r"\(2, 16, 32\); is model.preset right"),
    ({"num_embed": 65}, r"leaf embedder/input_embedding expected shape \(65, 16\), got \(64, 16\)"),
    ({"use_qk_norm": True}, r"no leaf layer_0/attn/\w+norm/scale; is model.preset right"),
  ],
)  # fmt: skip
def test_the_first_leaf_that_does_not_fit_is_named(file, changes, message):
  with pytest.raises(ValueError, match=message):
    weights.load(file[0], gemma.preset("tiny", **changes))


def test_a_leaf_of_another_architecture_is_named(tmp_path):
  config, path = gemma.preset("tiny", use_qk_norm=True), str(tmp_path / "w.safetensors")
  weights.save(path, random(config), config, "float32", {})
  with pytest.raises(ValueError, match=r"unknown leaf layer_0/attn/\w+norm/scale; is model.preset"):
    weights.load(path, gemma.preset("tiny"))


def test_a_write_that_fails_leaves_the_old_file(file, monkeypatch):
  import safetensors.flax

  def fail(leaves, path, metadata):
    open(path, "w").close()
    raise OSError("disk full")

  path, config, params = file
  monkeypatch.setattr(safetensors.flax, "save_file", fail)
  with pytest.raises(OSError, match="disk full"):
    weights.save(path, params, config, "float32", {})
  jax.tree.map(np.testing.assert_array_equal, weights.load(path, config), params)

"""The gemma library's Orbax checkpoints: every layout is read, and what does not fit is named."""

import dataclasses
import pathlib

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax import numpy as jnp
from weight_files import MODELS, G, L, checkpoint, half, library_tree, period, random, same

from nash_jax import weights
from nash_jax.models import gemma


@pytest.mark.parametrize("layout", ["nested", "flat", "stacked"])
def test_every_layout_of_the_library_is_read(from_transformers, tmp_path, layout):
  _, config, params = from_transformers
  vision = {"nested": "vision_encoder"}.get(layout, "SigLiPFromPatches_0/x")
  if layout == "stacked" and config.override_kv_shared_ffw_hidden:
    pytest.skip("MLPs of two widths cannot be one stack")
  path = checkpoint(tmp_path / "c", params, config, layout, **{vision: {"a": np.ones(2)}})
  assert weights.kind(path) == "orbax"
  if layout == "flat":
    same(weights.load(path, config, jnp.bfloat16), half(params))
  else:
    same(weights.load(path, config), params)


@pytest.mark.parametrize("layout", ["nested", "stacked"])
def test_the_library_reads_the_same_from_what_it_wrote(from_transformers, tmp_path, layout):
  from gemma.gm import ckpts
  from gemma.gm.ckpts import _checkpoint

  _, config, params = from_transformers
  if layout == "stacked" and config.override_kv_shared_ffw_hidden:
    pytest.skip("MLPs of two widths cannot be one stack")
  tree = nested = library_tree(params, config)
  if layout == "stacked":
    tree = _checkpoint._nested_to_stacked(nested, period(config))
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


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda x: x.at[1].set(np.nan), "got NaN or infinity in leaf final_norm/scale"),
    (lambda x: x.astype(jnp.int32), "tensor final_norm/scale expected F32, BF16 or F16, got int32"),
  ],
  ids=["NaN", "integers"],
)
def test_numbers_that_are_none_of_a_models_are_refused(tmp_path, change, message):
  config = gemma.preset("tiny")
  params = random(config)
  params["final_norm"]["scale"] = change(params["final_norm"]["scale"])
  path = checkpoint(tmp_path / "c", params, config, "nested")
  with pytest.raises(ValueError, match=f"weights {path}: .*{message}"):
    weights.load(path, config)


def test_a_part_that_was_not_copied_is_missed(tmp_path):
  """Without OCDBT, as older checkpoints are, every chunk is a file: one that is absent is not 0."""
  config, path = gemma.preset("tiny"), tmp_path / "c"
  nested = jax.tree.map(np.asarray, gemma.unstack(jax.device_get(random(config)), config))
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
    checkpointer.save(path, nested)
  weights.load(str(path), config)
  (path / "layer_0.attn.q_einsum.w" / "0.0.0").unlink()
  with pytest.raises(ValueError, match=rf"weights {path}, leaf layer_0/attn/q_einsum/w: expected"):
    weights.load(str(path), config)


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

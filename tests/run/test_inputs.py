"""A run and its inputs: what changed is named, and can be permitted."""

import pytest
from jax import numpy as jnp

from nash_jax.run import checkpoint


def test_inputs_that_changed_are_named_and_can_be_permitted(tmp_path):
  first = {"prompts.path": {"p.jsonl": "sha256:1"}, "judge.table": {"t.npy": "sha256:2"}}
  checkpoint.verify_inputs(tmp_path, first)
  checkpoint.verify_inputs(tmp_path, first)
  moved = {**first, "prompts.path": {"elsewhere/p.jsonl": "sha256:1"}}
  checkpoint.verify_inputs(tmp_path, moved)
  changed = {**first, "judge.table": {"t.npy": "sha256:3"}}
  with pytest.raises(ValueError, match="not those that it started with") as error:
    checkpoint.verify_inputs(tmp_path, changed, ("steps",))
  assert "\n  judge.table: t.npy\n" in str(error.value)
  flag = "--config.checkpoint.allow=\"('steps', 'judge.table')\""
  assert str(error.value).endswith(f"add {flag}"), "as a shell takes it"
  assert "p.jsonl" not in str(error.value)
  checkpoint.verify_inputs(tmp_path, changed, ("judge",))
  checkpoint.verify_inputs(tmp_path, changed)


def test_weights_of_another_type_cannot_be_compared_but_of_the_same_are(tmp_path):
  def weights(text):
    return {"judge.model.weights": {"judge.safetensors": text}}

  checkpoint.verify_inputs(tmp_path, weights("float32:1"))
  with pytest.raises(ValueError, match=r"judge.model.weights: judge.safetensors"):
    checkpoint.verify_inputs(tmp_path, weights("float32:2"))
  checkpoint.verify_inputs(tmp_path, weights("bfloat16:7"))


def test_a_base_that_changed_can_be_permitted(tmp_path):
  checkpoint.verify_base(tmp_path, {"w": jnp.ones(3)}, record=True)
  with pytest.raises(
    ValueError, match=r"""add --config.checkpoint.allow="\('model.weights',\)" """
  ):
    checkpoint.verify_base(tmp_path, {"w": jnp.zeros(3)}, record=True)
  checkpoint.verify_base(tmp_path, {"w": jnp.zeros(3)}, record=True, changed=True)
  checkpoint.verify_base(tmp_path, {"w": jnp.zeros(3)}, record=True)

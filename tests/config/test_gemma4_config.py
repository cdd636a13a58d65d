"""Gemma 4 in configs: its kinds of layers are checked, and what is not supported is named."""

import dataclasses
import json

import pytest
from weight_files import G, L

import nash_jax
from nash_jax import train
from nash_jax.config import resolve
from nash_jax.configs import gemma4_e2b
from nash_jax.models import gemma
from nash_jax.plan import memory
from nash_jax.run import card
from nash_jax.weights import hf_config, names


@pytest.mark.parametrize("field", ["model", "judge.model"])
def test_a_mixture_of_experts_is_refused_by_what_it_is(field):
  config = nash_jax.config.train()
  config.judge.name = "gemma"
  config.update_from_flattened_dict({f"{field}.preset": "gemma4_26b_a4b"})
  with pytest.raises(ValueError, match=f"{field}.preset: .*experts are not supported yet: use"):
    resolve(config)


def test_weights_of_experts_are_refused_before_their_shapes(tmp_path):
  (tmp_path / "config.json").write_text(json.dumps({"text_config": {"enable_moe_block": True}}))
  with pytest.raises(ValueError, match=r"enable_moe_block is true: .* not supported yet"):
    hf_config.check_config(str(tmp_path), gemma.preset("gemma4_31b"))
  for name in ("layers.0.experts.down_proj", "layers.0.router.scale", "layer_0/mlp2/linear"):
    with pytest.raises(ValueError, match=rf"w: {name} belongs to experts: .* not supported yet"):
      names.check_experts("w", ["embed_tokens.weight", name])


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"num_kv_shared_layers": 1}, "expected whole patterns of 2 layers before and among"),
    ({"num_kv_shared_layers": 4}, "expected whole patterns of 2 layers before and among"),
    ({"attention_types": (L, G, L, G, L)}, "expected whole patterns of 2 layers before and among"),
    ({"global_key_size": 7}, "expected an even global_key_size"),
    ({"num_global_kv_heads": 3}, "expected num_global_kv_heads to divide num_heads"),
    (
      {"value_norm": False},
      "expected value_norm with global_key_size, per_layer_input_dim, num_kv",
    ),
    ({"per_layer_input_dim": -1}, "per_layer_input_dim: expected a whole number in"),
    ({"use_qk_norm": False}, "expected use_qk_norm and no query_pre_attn_scalar"),
    ({"query_pre_attn_scalar": 16}, "expected use_qk_norm and no query_pre_attn_scalar"),
  ],
)
def test_changes_that_make_no_model_are_refused(changes, message):
  config = gemma4_e2b.get_config("smoke")
  resolve(config)
  config.model.changes.update(changes)
  with pytest.raises(ValueError, match=rf"model\.changes.*{message}"):
    resolve(config)


def test_an_estimate_counts_the_table_where_it_is_held_and_nowhere_else():
  config = gemma4_e2b.get_config("smoke")
  table = 1024 * 4 * 8 * 4  # rows, layers, columns, bytes
  with_table = memory.estimate(config)
  config.model.changes.per_layer_input_dim = 0
  without = memory.estimate(config)
  more = {name: with_table[name] - without[name] for name in with_table}
  rest = more["gradient and update"] / 2  # what a gate and a projection of each layer add
  assert 0 < rest < table / 4
  for name in ("parameters", "target and copies"):
    assert more[name] == table + rest
  assert more["optimiser state"] == 2 * rest
  assert more["reference"] == more["parameters"] / 2
  assert more["weights for decoding"] == rest / 2


def test_a_card_names_the_licence_of_its_base():
  model = card.Model(
    "runs/x", "params", 1, nash_jax.config.train().to_dict(), "google/gemma-4-E2B-it", False, ""
  )
  for preset, licence in (("gemma4_e2b", "apache-2.0"), ("gemma3_1b", "gemma"), ("tiny", None)):
    config = {**model.config, "model": {**model.config["model"], "preset": preset}}
    front = card._front_matter(dataclasses.replace(model, config=config))
    assert (f'license: "{licence}"' in front) == (licence is not None)
    assert ("license" in front) == (licence is not None)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["smoke", "lora,smoke", "lora,self,smoke"])
def test_a_smoke_of_the_config_trains(tmp_path, kind):
  c = gemma4_e2b.get_config(kind)
  c.steps = 1
  assert int(train.run(c, str(tmp_path), progress=False).state.step) == 1

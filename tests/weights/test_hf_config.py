"""Hugging Face's config.json: the presets are the published ones, another model is refused."""

import json

import pytest
from weight_files import MODELS

from nash_jax.models import gemma
from nash_jax.weights import hf_config

GEMMA4_ROPE = {
  "full_attention": {
    "partial_rotary_factor": 0.25, "rope_theta": 1000000.0, "rope_type": "proportional"
  },
  "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
}  # fmt: skip
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
  "gemma4_e2b": {
    "model_type": "gemma4",
    "audio_config": {"model_type": "gemma4_audio", "hidden_size": 1024},
    "vision_config": {"model_type": "gemma4_vision", "hidden_size": 768},
    "text_config": {
      "model_type": "gemma4_text",
      "attention_k_eq_v": False,
      "enable_moe_block": False,
      "global_head_dim": 512,
      "head_dim": 256,
      "hidden_size": 1536,
      "hidden_size_per_layer_input": 256,
      "intermediate_size": 6144,
      "layer_types": [*["sliding_attention"] * 4, "full_attention"] * 7,
      "num_attention_heads": 8,
      "num_hidden_layers": 35,
      "num_key_value_heads": 1,
      "num_kv_shared_layers": 20,
      "rope_parameters": GEMMA4_ROPE,
      "sliding_window": 512,
      "use_bidirectional_attention": None,
      "use_double_wide_mlp": True,
    },
  },
  "gemma4_12b": {
    "model_type": "gemma4_unified",
    "text_config": {
      "model_type": "gemma4_unified_text",
      "attention_k_eq_v": True,
      "final_logit_softcapping": 30.0,
      "global_head_dim": 512,
      "hidden_size": 3840,
      "intermediate_size": 15360,
      "num_attention_heads": 16,
      "num_global_key_value_heads": 1,
      "num_hidden_layers": 48,
      "num_key_value_heads": 8,
      "num_kv_shared_layers": 0,
      "rope_parameters": GEMMA4_ROPE,
      "sliding_window": 1024,
      "use_bidirectional_attention": "vision",
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
  with pytest.raises(ValueError, match=r"expected an architecture of Gemma [24]"):
    hf_config.check_config(str(tmp_path), changed)


@pytest.mark.parametrize(
  ("layers", "message"),
  [
    ({"04": {"head_dim": 512}}, "expected the same for all global layers"),
    ({f"{i:02}": {"head_dim": 256} for i in range(4, 35, 5)}, "global_head_dim is 256"),
    ({f"{i:02}": {"head_dim": 512} for i in range(4, 35, 5)}, ""),
    ({f"{i:02}": {"head_dim": 512 + i} for i in range(4, 35, 5)}, "expected the same for all"),
    ([512], "per_layer_config is .512., expected fields in braces"),
  ],
)
def test_what_differs_in_global_layers_is_read_in_the_newer_form_too(tmp_path, layers, message):
  text = {**PUBLISHED["gemma4_e2b"]["text_config"], "per_layer_config": layers}
  del text["global_head_dim"]
  (tmp_path / "config.json").write_text(json.dumps({"text_config": text}))
  if not message:
    return hf_config.check_config(str(tmp_path), gemma.preset("gemma4_e2b"))
  with pytest.raises(ValueError, match=rf"config.json: .*{message}"):
    hf_config.check_config(str(tmp_path), gemma.preset("gemma4_e2b"))


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

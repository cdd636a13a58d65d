"""An architecture as Hugging Face's config.json, written and checked."""

import json
import pathlib
from typing import Any

from nash_jax.models import gemma

INDEX = "model.safetensors.index.json"
# The library pads Gemma 2's embedding to more rows than its tokenizer and Hugging Face have.
_PIECES = {256_128: 256_000}


def rows(model_config: gemma.GemmaConfig) -> int:
  """Returns how many rows of the embedding an export keeps."""
  return _PIECES.get(model_config.num_embed, model_config.num_embed)


def config_json(model_config: gemma.GemmaConfig, dtype: str) -> dict[str, Any]:
  """Returns config.json's fields; ValueError where neither Gemma 2 nor Gemma 3 is such a model."""
  soft_caps = (model_config.final_logit_softcap, model_config.attn_logits_soft_cap)
  local_scale, scale = model_config.local_scale_factor, model_config.global_scale_factor
  norms, one_rope = model_config.use_qk_norm, model_config.one_rope
  gemma2 = None not in soft_caps and one_rope and scale == 1 and not norms
  gemma3 = soft_caps == (None, None) and norms and local_scale == 1
  if not (gemma2 or gemma3):
    raise ValueError(
      "config.json: expected an architecture of Gemma 2 (both soft-caps, one rope) or Gemma 3 (no"
      f" soft-cap, query and key norms), got {model_config}"
    )
  config: dict[str, Any] = {
    "architectures": ["Gemma2ForCausalLM" if gemma2 else "Gemma3ForCausalLM"],
    "model_type": "gemma2" if gemma2 else "gemma3_text", "vocab_size": rows(model_config),
    "hidden_size": model_config.embed_dim, "intermediate_size": model_config.hidden_dim,
    "num_hidden_layers": model_config.num_layers, "num_attention_heads": model_config.num_heads,
    "num_key_value_heads": model_config.num_kv_heads, "head_dim": model_config.head_dim,
    "query_pre_attn_scalar": model_config.head_dim,
    "layer_types": [
      "sliding_attention" if attn_type == gemma.LOCAL else "full_attention"
      for attn_type in model_config.attention_types
    ],
    "sliding_window": model_config.sliding_window_size,
    "final_logit_softcapping": model_config.final_logit_softcap,
    "attn_logit_softcapping": model_config.attn_logits_soft_cap,
    "rope_theta": float(model_config.global_base_frequency),
    "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6, "attention_bias": False,
    "tie_word_embeddings": True, "torch_dtype": dtype,
  }  # fmt: skip
  if gemma3:
    config["rope_local_base_freq"] = float(model_config.local_base_frequency)
    config["rope_scaling"] = None if scale == 1 else {"rope_type": "linear", "factor": scale}
  return config


def check_config(path: str, model_config: gemma.GemmaConfig) -> None:
  """Compares the config.json beside the weights, if any, with ours: shapes do not tell it all.

  Raises:
    ValueError: not JSON, or its first field of another value. Fields that it lacks pass.
  """
  folder = pathlib.Path(path)
  file = (folder if folder.is_dir() else folder.parent) / "config.json"
  if not file.exists():
    return
  try:
    got = fields(json.loads(file.read_text()))
  except (ValueError, AttributeError) as error:
    raise ValueError(f"{file}: expected JSON with fields, got {error}") from error
  for name, value in fields(config_json(model_config, "")).items():
    compared = name not in ("architectures", "torch_dtype", "vocab_size")
    if compared and name in got and got[name] != value:
      raise ValueError(
        f"{file}: {name} is {got[name]!r}, but model.preset with its changes has {value!r}"
      )


def fields(config: dict[str, Any]) -> dict[str, Any]:
  """Returns the text model's fields, with rope's in one form for every version of transformers."""
  config = dict(config.get("text_config", config))
  ropes = config.pop("rope_parameters", None) or {}
  scaling = config.pop("rope_scaling", None) or {}
  full_rope = ropes.get("full_attention", ropes)
  if full_rope:
    config["rope_theta"] = full_rope.get("rope_theta")
    scaling = full_rope
  if "sliding_attention" in ropes:
    config["rope_local_base_freq"] = ropes["sliding_attention"]["rope_theta"]
  if scaling or "rope_theta" in config:
    config["rope factor"] = scaling.get("factor", 1.0)
  return config

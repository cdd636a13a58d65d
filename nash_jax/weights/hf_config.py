"""Writes and checks an architecture as Hugging Face's config.json."""

import json
import os
import pathlib
from typing import Any

from nash_jax.data.chat_template import TEMPLATES
from nash_jax.data.tokenizer import Tokenizer
from nash_jax.models import gemma
from nash_jax.weights import files

INDEX = "model.safetensors.index.json"
CHAT_TEMPLATE, _TOKENIZER = "chat_template.jinja", "tokenizer_config.json"
# Files that may accompany a published tokenizer.model.
_BESIDE = ("tokenizer.json", _TOKENIZER, "special_tokens_map.json", "added_tokens.json")
# {rows of the library's padded Gemma 2 embedding: pieces of its tokenizer, rows at Hugging Face}
_PIECES = {256_128: 256_000}
# {pieces of a published tokenizer: id of <end_of_turn>}; <pad>, <eos> and <bos> are 0, 1 and 2.
_END_OF_TURN = {256_000: 107, 262_144: 106}
_NOT_COMPARED = ("architectures", "torch_dtype", "vocab_size", "vocab_size_per_layer_input")
_UNIFIED = "gemma4_unified_text"  # its text model's architecture is gemma4_text's
_TOOL_RESPONSE = 50  # where a Gemma 4 waits for a tool


def rows(model_config: gemma.GemmaConfig, tokenizer: Tokenizer | None = None) -> int:
  """Returns how many embedding rows an export keeps: those with a piece of the tokenizer.

  Without a tokenizer, assumes the published one if its size is known, and otherwise keeps all rows.
  """
  if tokenizer:
    tokenizer.check_rows(model_config.num_embed)
    return tokenizer.size
  return _PIECES.get(model_config.num_embed, model_config.num_embed)


def special_ids(model_config: gemma.GemmaConfig, tokenizer: Tokenizer | None) -> dict[str, Any]:
  """Returns the ids that begin, pad and stop a text, as in config.json.

  Without a tokenizer they are Gemma's, which are also the defaults of transformers.
  """
  if tokenizer:
    pad_id, bos_id, stop_ids = tokenizer.pad_id, tokenizer.bos_id, tokenizer.stop_ids
  else:
    end_of_turn = _END_OF_TURN.get(rows(model_config))
    pad_id, bos_id, stop_ids = 0, 2, (1,) if end_of_turn is None else (1, end_of_turn)
    if end_of_turn and model_config.value_norm:
      stop_ids = (*stop_ids, _TOOL_RESPONSE)
  eos_token_id = list(stop_ids) if len(stop_ids) > 1 else stop_ids[0]
  return {"bos_token_id": bos_id, "eos_token_id": eos_token_id, "pad_token_id": pad_id}


def export_json(
  model_config: gemma.GemmaConfig, dtype: str, tokenizer: Tokenizer | None = None
) -> dict[str, dict[str, Any]]:
  """Returns {name: content} of the JSON files of an export.

  config.json has the architecture and the fields that servers read; generation_config.json says
  where to stop.
  """
  config, ids = config_json(model_config, dtype), special_ids(model_config, tokenizer)
  gemma2, stretched = config["model_type"] == "gemma2", model_config.global_scale_factor > 1
  long = stretched or model_config.value_norm
  for name in {"vocab_size", "vocab_size_per_layer_input"} & config.keys():
    config[name] = rows(model_config, tokenizer)
  # As published. Positions are rotary, so nothing depends on this number.
  config["max_position_embeddings"] = 8192 if gemma2 else 131_072 if long else 32_768
  config |= {"attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True}
  if gemma2:
    config["hidden_act"] = config["hidden_activation"]  # the name that older readers expect
  return {"config.json": config | ids, "generation_config.json": ids}


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, bytes]:
  """Returns {name: content} of a tokenizer's files.

  They are the files beside its model, except that the chat template is the one of `tokenizer`, or
  none. If the model has no files beside it, a tokenizer_config.json is made, without which
  transformers would add no <bos>.
  """
  path = pathlib.Path(tokenizer.path)
  found = {name: path.with_name(name) for name in _BESIDE if path.with_name(name).is_file()}
  contents = {name: file.read_bytes() for name, file in {**found, path.name: path}.items()}
  contents["tokenizer.model"] = contents.pop(path.name)
  if config := found.get(_TOKENIZER):
    said = files.read_json(config, "JSON with fields")
  else:
    said = _tokenizer_json(tokenizer)
  template = TEMPLATES[tokenizer.template].jinja
  said = {name: value for name, value in said.items() if name != "chat_template"}
  said |= {"chat_template": template} if template else {}
  contents[_TOKENIZER] = (json.dumps(said, indent=2, ensure_ascii=False) + "\n").encode()
  # Current versions of transformers read this first; older ones read tokenizer_config.json.
  return contents | ({CHAT_TEMPLATE: template.encode()} if template else {})


def _tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
  """Returns tokenizer_config.json for a tokenizer that consists of its model only."""
  pieces = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk")}
  markers = [marker.piece for marker in TEMPLATES[tokenizer.template].markers]
  special = {piece: tokenizer.id_of(piece) for piece in (*pieces.values(), *markers)}
  plain = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
  added = {str(i): {"content": piece, **plain, "special": True} for piece, i in special.items()}
  config = {"tokenizer_class": "GemmaTokenizer", "add_bos_token": True, **pieces}
  return {**config, "added_tokens_decoder": added}


def config_json(model_config: gemma.GemmaConfig, dtype: str) -> dict[str, Any]:
  """Returns config.json's fields.

  Raises:
    ValueError: neither Gemma 2, 3 nor 4 has this architecture.
  """
  return (_gemma4_json if model_config.value_norm else _gemma2_or_3_json)(model_config, dtype)


def _shared_json(model_config: gemma.GemmaConfig, dtype: str, name: str) -> dict[str, Any]:
  """Returns the fields that all generations have; `name` is that of transformers' classes."""
  return {
    "architectures": [f"{name}ForCausalLM"], "vocab_size": rows(model_config),
    "hidden_size": model_config.embed_dim, "intermediate_size": model_config.hidden_dim,
    "num_hidden_layers": model_config.num_layers, "num_attention_heads": model_config.num_heads,
    "num_key_value_heads": model_config.num_kv_heads, "head_dim": model_config.head_dim,
    "layer_types": [
      "sliding_attention" if attn_type == gemma.LOCAL else "full_attention"
      for attn_type in model_config.attention_types
    ],
    "sliding_window": model_config.sliding_window_size,
    "final_logit_softcapping": model_config.final_logit_softcap,
    "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6, "attention_bias": False,
    "tie_word_embeddings": True, "torch_dtype": dtype,
  }  # fmt: skip


def _gemma4_json(model_config: gemma.GemmaConfig, dtype: str) -> dict[str, Any]:
  local_scale, scale = model_config.local_scale_factor, model_config.global_scale_factor
  width, wide = model_config.hidden_dim, model_config.override_kv_shared_ffw_hidden
  if not (
    local_scale == scale == 1 and model_config.attn_logits_soft_cap is None
    and model_config.use_qk_norm and model_config.query_pre_attn_scalar is None
    and wide in (None, width, 2 * width)
    and model_config.attention_types[-1] == gemma.GLOBAL
    and (model_config.k_eq_v_global or model_config.num_global_kv_heads is None)
  ):  # fmt: skip
    raise ValueError(
      "config.json: expected an architecture of Gemma 4 (query and key norms, no soft-cap of"
      " attention, no scaled rope, a global layer last, MLPs of one width or twice as wide where"
      " keys are shared, and key-value heads of global layers only where keys are their values),"
      f" got {model_config}"
    )
  full_rope = {
    "rope_type": "proportional", "rope_theta": float(model_config.global_base_frequency),
    "partial_rotary_factor": model_config.global_rope_proportion,
  }  # fmt: skip
  local_rope = {"rope_type": "default", "rope_theta": float(model_config.local_base_frequency)}
  columns = model_config.per_layer_input_dim
  table = {"vocab_size_per_layer_input": rows(model_config)} if columns else {}
  return _shared_json(model_config, dtype, "Gemma4") | table | {
    "model_type": "gemma4_text", "enable_moe_block": False,
    "global_head_dim": model_config.kv_shape(gemma.GLOBAL)[1],
    "num_global_key_value_heads": model_config.num_global_kv_heads,
    "attention_k_eq_v": model_config.k_eq_v_global,
    "num_kv_shared_layers": model_config.num_kv_shared_layers,
    "use_double_wide_mlp": wide == 2 * width,
    "hidden_size_per_layer_input": columns,
    "rope_parameters": {"full_attention": full_rope, "sliding_attention": local_rope},
  }  # fmt: skip


def _gemma2_or_3_json(model_config: gemma.GemmaConfig, dtype: str) -> dict[str, Any]:
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
  config = _shared_json(model_config, dtype, "Gemma2" if gemma2 else "Gemma3") | {
    "model_type": "gemma2" if gemma2 else "gemma3_text",
    "query_pre_attn_scalar": model_config.query_pre_attn_scalar or model_config.head_dim,
    "attn_logit_softcapping": model_config.attn_logits_soft_cap,
    "rope_theta": float(model_config.global_base_frequency),
  }
  if gemma3:
    config["rope_local_base_freq"] = float(model_config.local_base_frequency)
    config["rope_scaling"] = None if scale == 1 else {"rope_type": "linear", "factor": scale}
  return config


def check_config(path: str, model_config: gemma.GemmaConfig) -> None:
  """Checks the config.json beside the weights, if any, since shapes do not determine a model.

  Raises:
    ValueError: not JSON, or a field with another value (names the first). Missing fields pass.
  """
  folder = pathlib.Path(path)
  file = (folder if folder.is_dir() else folder.parent) / "config.json"
  if not os.path.lexists(file):
    return
  found, ours = files.read_json(file, "JSON with fields"), fields(config_json(model_config, ""))
  ours |= {"local rope": (1.0, "default"), "use_bidirectional_attention": False}
  try:
    got = fields(found)
  except ValueError as error:
    raise ValueError(f"{file}: {error}") from error
  if got.get("enable_moe_block"):
    raise ValueError(f"{file}: enable_moe_block is true: {gemma.NO_EXPERTS}")
  period = got.get("sliding_window_pattern")  # older form of layer_types
  if period is not None and "layer_types" not in got:
    got["layer_types"] = _layer_types(period, model_config.num_layers)
  for name, value in ours.items():
    compared = name not in _NOT_COMPARED
    if compared and name in got and got[name] != value:
      raise ValueError(
        f"{file}: {name} is {got[name]!r}, but model.preset with its changes has {value!r}"
      )


def _layer_types(period: Any, count: int) -> Any:
  if not isinstance(period, int) or period < 1:
    return period
  kinds = ["sliding_attention"] * (period - 1) + ["full_attention"] if period <= count else []
  return [kinds[i % period] if kinds else "sliding_attention" for i in range(count)]


def fields(config: dict[str, Any]) -> dict[str, Any]:
  """Returns the text model's fields, with those of rope in the same form for all transformers.

  Raises:
    ValueError: a field should contain other fields but does not (names it).
  """
  text = _group(config, "text_config") or config
  # A multimodal model's own setting for its head takes precedence.
  tied = {name: config[name] for name in ("tie_word_embeddings",) if name in config}
  config = {**text, **tied}
  ropes, scaling = _group(config, "rope_parameters"), _group(config, "rope_scaling")
  full_rope = _group(ropes, "full_attention") or ropes
  local_rope = _group(ropes, "sliding_attention")
  other_forms = ("rope_parameters", "rope_scaling", "hidden_act")
  config = {name: x for name, x in config.items() if name not in other_forms}
  if full_rope:
    config["rope_theta"] = full_rope.get("rope_theta")
    scaling = full_rope
  if local_rope:
    config["rope_local_base_freq"] = local_rope.get("rope_theta")
    config["local rope"] = _scaling(local_rope)
  if scaling or "rope_theta" in config:
    config["rope factor"], config["rope type"] = _scaling(scaling)
    config["rope share"] = scaling.get("partial_rotary_factor", 1.0)
  if "use_bidirectional_attention" in config:  # Gemma's embedding models have it
    both_ways = config["use_bidirectional_attention"] or False
    # Among the tokens of an image only, which a text model has none of.
    config["use_bidirectional_attention"] = False if both_ways == "vision" else both_ways
  if config.get("model_type") == _UNIFIED:
    config["model_type"] = "gemma4_text"
  return _by_kind(config)


def _by_kind(config: dict[str, Any]) -> dict[str, Any]:
  """Returns a config with the head sizes and key-value heads of global layers in the older form.

  The newer one is per_layer_config, {layer: fields that differ there}.
  """
  layers = _group(config, "per_layer_config")
  if not layers:
    return config
  differ = [_group(layers, layer) for layer in sorted(layers)]
  kinds = config.get("layer_types")
  listed = kinds if isinstance(kinds, list) else []
  is_full = {i for i, kind in enumerate(listed) if kind == "full_attention"}
  if {int(i) for i in layers if i.isdecimal()} != is_full or any(x != differ[0] for x in differ):
    raise ValueError(f"per_layer_config is {layers!r:.80}, expected the same for all global layers")
  config = {name: x for name, x in config.items() if name != "per_layer_config"}
  own, heads = differ[0], "num_key_value_heads"
  named = {"global_head_dim": own.get("head_dim"), "num_global_key_value_heads": own.get(heads)}
  return config | named


def _group(config: dict[str, Any], name: str) -> dict[str, Any]:
  """Returns the fields within a field; {} if it is absent or null."""
  found = config.get(name)
  if found is not None and not isinstance(found, dict):
    raise ValueError(f"{name} is {found!r:.80}, expected fields in braces")
  return found or {}


def _scaling(rope: dict[str, Any]) -> tuple[Any, Any]:
  """Returns rope's (factor, type); a linear factor of 1 counts as the default type."""
  kind = rope.get("rope_type", rope.get("type", "linear" if "factor" in rope else "default"))
  factor = 1.0 if kind == "default" else rope.get("factor", 1.0)
  return factor, "default" if (factor, kind) == (1, "linear") else kind

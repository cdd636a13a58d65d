"""Small Gemmas 4, of the architectures of programs/make_hf.py."""

from nash_jax.models import gemma

L, G = gemma.preset("tiny").attention_types
SHAPE = {
  "num_embed": 64,
  "embed_dim": 32,
  "hidden_dim": 48,
  "num_heads": 4,
  "num_kv_heads": 2,
  "head_dim": 8,
  "global_key_size": 16,
  "sliding_window_size": 6,
}
MODELS4 = {
  "hf_gemma4": gemma.preset(
    "gemma4_12b", **SHAPE, attention_types=(G, L, G, L, G), num_global_kv_heads=1
  ),
  "hf_gemma4_e2b": gemma.preset(
    "gemma4_e2b",
    **{**SHAPE, "num_kv_heads": 1},
    attention_types=(L, L, G) * 4,
    num_kv_shared_layers=6,
    per_layer_input_dim=6,
    override_kv_shared_ffw_hidden=96,
  ),
  "hf_gemma4_e4b": gemma.preset(
    "gemma4_e4b", **SHAPE, attention_types=(L, G) * 4, num_kv_shared_layers=4, per_layer_input_dim=6
  ),
}
# Everything at once: values that are keys, other layers' keys and values, and inputs by layer.
ALL = gemma.preset(
  "gemma4_e2b",
  num_embed=64,
  embed_dim=16,
  hidden_dim=24,
  num_heads=4,
  num_kv_heads=2,
  num_global_kv_heads=1,
  head_dim=8,
  global_key_size=16,
  k_eq_v_global=True,
  sliding_window_size=4,
  attention_types=(L, G) * 4,
  num_kv_shared_layers=4,
  override_kv_shared_ffw_hidden=40,
  per_layer_input_dim=6,
)

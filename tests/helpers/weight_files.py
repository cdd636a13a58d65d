"""Small Gemmas of several architectures, and files of their weights in every layout."""

import functools

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util
from jax import numpy as jnp
from paths import FIXTURES

from nash_jax import weights
from nash_jax.models import gemma

L, G = gemma.preset("tiny").attention_types
SHAPE = {
  "num_embed": 64,
  "embed_dim": 32,
  "hidden_dim": 48,
  "num_heads": 4,
  "num_kv_heads": 2,
  "sliding_window_size": 6,
}
# The architectures of programs/make_hf.py.
MODELS = {
  "hf_gemma2": gemma.preset(
    "tiny", **SHAPE, attention_types=(L, G, L, G, L), attn_logits_soft_cap=5.0
  ),
  "hf_gemma3": gemma.preset(
    "tiny",
    **SHAPE,
    attention_types=(L,) * 5 + (G, L),
    final_logit_softcap=None,
    attn_logits_soft_cap=None,
    use_qk_norm=True,
    transpose_gating_einsum=True,
    global_base_frequency=1_000_000,
    global_scale_factor=8.0,
  ),
}


def same(got, expected):
  jax.tree.map(np.testing.assert_array_equal, got, expected)


def half(params):
  return gemma.cast(jax.device_get(params), jnp.bfloat16)


def random(config, seed=0, scale=1.0):
  rng = np.random.default_rng(seed)

  def draw(x):
    return rng.normal(scale=scale, size=x.shape).astype(np.float32)

  return jax.device_put(jax.tree.map(draw, gemma.shapes(config)))


PERIOD = {False: 2, True: 6}  # of the attention pattern, of Gemma 2 and 3


def _flat(nested):
  """The layout of the published checkpoints: a folder a key, and /w behind the MLP's."""
  out = {}
  for path, x in traverse_util.flatten_dict(nested, sep="/").items():
    path = path + "/w" if "/mlp/" in path else path
    folder, leaf = path.rsplit("/", 1)
    out.setdefault(f"transformer/{folder}", {})[leaf] = x
  return out


def _stacked(nested, period):
  """The flat layout with every period-th layer in one array."""
  out = {}
  for name, leaves in _flat(nested).items():
    _, layer, *rest = name.split("/")
    if not layer.startswith("layer_"):
      out[name] = leaves
      continue
    kind = int(layer[6:]) % period
    name = "/".join(["transformer/stacked_layers", f"attention_type_{kind}", *rest])
    stack = out.setdefault(name, {})
    for leaf, x in leaves.items():
      stack.setdefault(leaf, []).append(x)
  return jax.tree.map(
    lambda x: np.stack(x) if isinstance(x, list) else x, out, is_leaf=lambda x: isinstance(x, list)
  )


def checkpoint(path, params, config, layout, **more):
  nested = jax.tree.map(np.asarray, gemma.unstack(jax.device_get(params), config))
  period = PERIOD[config.use_qk_norm]
  layouts = {"nested": lambda x: x, "flat": _flat, "stacked": lambda x: _stacked(x, period)}
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(path, {**layouts[layout](nested), **more})
  return str(path)


@functools.cache
def hugging_face_model(name):
  """Returns a folder that transformers wrote, our config of it, and the parameters loaded."""
  folder, config = FIXTURES / name, MODELS[name]
  return folder, config, weights.load(str(folder), config)


def logits(params, config, tokens):
  mask = jnp.ones(tokens.shape, bool)
  positions = gemma.positions_of(mask)
  x, _ = gemma.forward(params, config, tokens, positions, gemma.causal_mask(mask))
  return gemma.logits(params, config, x)


EMBEDDING = "model.embed_tokens.weight"

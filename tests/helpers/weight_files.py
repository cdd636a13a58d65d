"""Small Gemmas of several architectures, and files of their weights in every layout."""

import functools

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import traverse_util
from gemma4_models import MODELS4
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
  **MODELS4,
}
# Their names: the last one differs from the one before in sizes.
NAMES = [*[*MODELS][:-1], pytest.param([*MODELS][-1], marks=pytest.mark.slow)]


def same(got, expected):
  jax.tree.map(np.testing.assert_array_equal, got, expected)


def half(params):
  return gemma.cast(jax.device_get(params), jnp.bfloat16)


def random(config, seed=0, scale=1.0):
  rng = np.random.default_rng(seed)

  def draw(x):
    return rng.normal(scale=scale, size=x.shape).astype(np.float32)

  return jax.device_put(jax.tree.map(draw, gemma.shapes(config)))


def period(config):
  """Returns the period of the attention pattern."""
  types = config.attention_types
  return next(n for n in range(1, 7) if types == (types[:n] * len(types))[: len(types)])


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


def library_tree(params, config):
  """Returns the library's own tree: layers that read another's keys have some that nobody reads."""
  nested = jax.tree.map(np.asarray, gemma.unstack(jax.device_get(params), config))
  for n in range(config.num_kv_layers, config.num_layers):
    attn, own = nested[f"layer_{n}"]["attn"], nested[f"layer_{config.donor(n)}"]["attn"]
    attn |= {name: own[name] for name in own if name.startswith("k")}
  return nested


def checkpoint(path, params, config, layout, **more):
  nested = library_tree(params, config)
  layouts = {"nested": lambda x: x, "flat": _flat, "stacked": lambda x: _stacked(x, period(config))}
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

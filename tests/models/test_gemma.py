"""Our Gemma computes what the gemma library's own Transformer does."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import scipy
from gemma import gm
from gemma.gm.nn.gemma4 import _config as gemma4_config
from gemma.gm.nn.gemma4 import _modules as gemma4_modules
from gemma.gm.nn.gemma4 import _transformer as gemma4_transformer
from jax import numpy as jnp

import nash_jax
from nash_jax.config import resolve
from nash_jax.models import gemma, logprobs

LOCAL, GLOBAL = gm.nn.AttentionType.LOCAL_SLIDING, gm.nn.AttentionType.GLOBAL
# Windows are shorter than the sequences; attention multi-head, grouped and multi-query; both
# gating layouts; a pattern that leaves layers over.
SMALL4 = {
  "num_embed": 64,
  "embed_dim": 16,
  "hidden_dim": 32,
  "num_heads": 4,
  "head_dim": 8,
  "global_key_size": 16,
  "sliding_window_size": 4,
}
GENERATIONS = {
  "gemma2_multihead": {
    "preset": "tiny",
    "num_heads": 2,
    "num_kv_heads": 2,
    "transpose_gating_einsum": True,
  },
  "gemma2_grouped": {"preset": "tiny", "num_heads": 4, "num_kv_heads": 2},
  "gemma3_with_tail": {
    "preset": "gemma3_270m",
    "num_embed": 64,
    "embed_dim": 16,
    "hidden_dim": 32,
    "num_heads": 4,
    "head_dim": 8,
    "sliding_window_size": 4,
    "global_scale_factor": 8.0,
    "query_pre_attn_scalar": 4,  # embed_dim / num_heads, as in 27B, and not head_dim
    "attention_types": (LOCAL, LOCAL, GLOBAL, LOCAL, LOCAL, GLOBAL, LOCAL),
  },
  # Values that are keys, with a tail; then layers that share keys and values, with wider MLPs.
  "gemma4_dense": {
    **SMALL4,
    "preset": "gemma4_31b",
    "num_kv_heads": 2,
    "num_global_kv_heads": 1,
    "attention_types": (LOCAL, LOCAL, GLOBAL) * 2 + (LOCAL,),
  },
  "gemma4_sharing": {
    **SMALL4,
    "preset": "gemma4_e2b",
    "attention_types": (LOCAL, LOCAL, GLOBAL) * 4,
    "num_kv_shared_layers": 6,
    "override_kv_shared_ffw_hidden": 48,
    "per_layer_input_dim": 6,
  },
}


def library_config(config):
  """The library's config of an architecture of ours."""
  fields = dataclasses.asdict(config)
  shared, value_norm = fields.pop("num_kv_shared_layers"), fields.pop("value_norm")
  if value_norm:
    for name in ("query_pre_attn_scalar", "use_qk_norm", "transpose_gating_einsum"):
      fields.pop(name)
    types = gemma4_modules.AttentionType
    fields["attention_types"] = tuple(types[kind.name] for kind in config.attention_types)
    sharing = gemma4_config.KVCacheSharingConfig(shared / config.num_layers, True, True)
    return gemma4_config.TransformerConfig(
      use_post_attn_norm=True,
      use_post_ffw_norm=True,
      local_rope_proportion=1.0,
      kv_cache_sharing_config=sharing if shared else None,
      **fields,
    )
  for name in (
    "global_key_size",
    "num_global_kv_heads",
    "k_eq_v_global",
    "global_rope_proportion",
    "per_layer_input_dim",
    "override_kv_shared_ffw_hidden",
  ):
    fields.pop(name)
  norms = gm.nn.config.QueryPreAttentionNormalisation
  norm = norms.BY_ONE_OVER_SQRT_HEAD_DIM
  if scalar := fields.pop("query_pre_attn_scalar"):
    assert scalar == config.embed_dim / config.num_heads
    norm = norms.BY_ONE_OVER_SQRT_EMBED_DIM_DIV_NUM_HEADS
  return gm.nn.config.TransformerConfig(
    use_post_attn_norm=True, use_post_ffw_norm=True, query_pre_attn_norm=norm, **fields
  )


@pytest.fixture(scope="module", params=GENERATIONS)
def model(request):
  fields = dict(GENERATIONS[request.param])
  config = gemma.preset(fields.pop("preset"), **fields)
  # Random norms, where the library starts them at zero, make a forgotten norm visible; numpy
  # makes them, for compiling the initialiser would cost more than the test.
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: (0.1 * rng.normal(size=x.shape)).astype(x.dtype), gemma.shapes(config)
  )
  module = gemma4_transformer if config.value_norm else gm.nn
  library = module.Transformer(config=library_config(config), dtype=jnp.float32)
  return config, jax.device_put(params), library


def unstack(params, config, **options):
  """On the host, where slices compile nothing."""
  return jax.device_put(gemma.unstack(jax.device_get(params), config, **options))


def library_params(params, config):
  """With the tensors that the library has in sharing layers and never reads, in which 9s are."""
  out = unstack(params, config)
  for n in range(config.num_kv_layers, config.num_layers):
    heads, size = config.kv_shape(config.attention_types[n])
    unread = {
      "kv_einsum": {"w": np.full((2, heads, config.embed_dim, size), 9.0, np.float32)},
      "key_norm": {"scale": np.full(size, 9.0, np.float32)},
    }
    out[f"layer_{n}"]["attn"] |= unread
  return out


def tokens_and_mask():
  tokens = np.random.default_rng(2).integers(4, 64, (3, 20), np.int32)
  return tokens, np.ones_like(tokens, bool)


def test_logits_are_the_gemma_librarys(model):
  config, params, library = model
  tokens, mask = tokens_and_mask()
  with jax.numpy_rank_promotion("allow"):
    expected = library.apply({"params": library_params(params, config)}, tokens).logits

  @jax.jit
  def ours(p):
    x, _ = gemma.forward(p, config, tokens, gemma.positions_of(mask), gemma.causal_mask(mask))
    return gemma.logits(p, config, x)

  for layout in (params, unstack(params, config, library_gating=False)):
    np.testing.assert_allclose(ours(layout), expected, atol=2e-5)


def test_logits_of_cached_decoding_are_the_gemma_librarys(model):
  """Prefill eight left-padded columns, then one token at a time."""
  config, params, library = model
  tokens, mask = tokens_and_mask()
  with jax.numpy_rank_promotion("allow"):
    expected = library.apply({"params": library_params(params, config)}, tokens).logits
  unstacked = unstack(params, config, library_gating=False)

  @jax.jit
  def run():
    cache = gemma.init_cache(config, 3, 20, jnp.float32)
    positions, visible = gemma.positions_of(mask), gemma.causal_mask(mask)
    x, cache = gemma.forward(
      params, config, tokens[:, :8], positions[:, :8], visible[:, :8], cache=cache
    )

    def one(cache, t):
      cut = lambda a: jax.lax.dynamic_slice_in_dim(a, t, 1, axis=1)  # noqa: E731
      x, cache = gemma.forward(
        unstacked, config, cut(tokens), cut(positions), cut(visible), cache=cache
      )
      return cache, x[:, 0]

    _, rest = jax.lax.scan(one, cache, jnp.arange(8, 20))
    return gemma.logits(params, config, jnp.concatenate([x, jnp.moveaxis(rest, 0, 1)], axis=1))

  np.testing.assert_allclose(run(), expected, atol=2e-5)


@pytest.mark.parametrize("model", ["gemma2_grouped"], indirect=True)
def test_remat_and_bfloat16_change_no_structure(model):
  config, params, _ = model
  tokens, mask = tokens_and_mask()

  def loss(p, **options):
    return jnp.sum(logprobs.token_logprobs(p, config, tokens, mask, **options)[0])

  plain = jax.jit(jax.grad(loss))(params)
  remat = jax.jit(jax.grad(lambda p: loss(p, remat=True, chunk=5)))(params)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), plain, remat)
  half, logits = jax.eval_shape(
    lambda p: (
      x := gemma.forward(p, config, tokens, mask * 1, mask[:, None], dtype=jnp.bfloat16)[0],
      gemma.logits(p, config, x),
    ),
    params,
  )
  assert half.dtype == jnp.bfloat16
  assert logits.dtype == jnp.float32


@pytest.mark.parametrize(
  ("name", "library"),
  [
    ("gemma2_2b", "Gemma2_2B"),
    ("gemma2_9b", "Gemma2_9B"),
    ("gemma3_270m", "Gemma3_270M"),
    ("gemma3_1b", "Gemma3_1B"),
    ("gemma3_4b", "Gemma3_4B"),
    ("gemma3_12b", "Gemma3_12B"),
    ("gemma3_27b", "Gemma3_27B"),
    ("gemma4_e2b", "Gemma4_E2B"),
    ("gemma4_e4b", "Gemma4_E4B"),
    ("gemma4_31b", "Gemma4_31B"),
  ],
)
def test_full_size_presets_have_the_gemma_librarys_names_and_shapes(name, library):
  config = gemma.preset(name)
  text_only = {"text_only": True} if name in ("gemma3_4b", "gemma3_12b", "gemma3_27b") else {}
  model = getattr(gm.nn, library)(dtype=jnp.float32, **text_only)
  of_images = {"use_bidirectional_attention": None} if config.value_norm else {}
  assert library_config(config) == dataclasses.replace(model.config, **of_images)
  with jax.numpy_rank_promotion("allow"):
    expected = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
  got = jax.eval_shape(lambda p: gemma.unstack(p, config), gemma.shapes(config))
  shapes = jax.tree.map(jnp.shape, expected["params"])
  for n in range(config.num_kv_layers, config.num_layers):  # never read
    del shapes[f"layer_{n}"]["attn"]["kv_einsum"], shapes[f"layer_{n}"]["attn"]["key_norm"]
  assert jax.tree.map(jnp.shape, got) == shapes


def test_unknown_preset_lists_the_choices():
  with pytest.raises(ValueError, match="gemma2_2b"):
    gemma.preset("gemma9_900b")


def test_padding_changes_nothing(model):
  """Left padding, whatever it holds, leaves log-probabilities alone."""
  config, params, _ = model
  tokens, mask = tokens_and_mask()
  logp_of = jax.jit(
    lambda t, m, f: logprobs.token_logprobs(params, config, t, m, f)[0], static_argnums=2
  )
  plain = logp_of(tokens, mask, 8)
  for filler in (0, 17):
    pad = np.full((3, 6), filler, np.int32)
    padded = logp_of(np.concatenate([pad, tokens], 1), np.concatenate([pad > 99, mask], 1), 14)
    np.testing.assert_allclose(padded, plain, atol=2e-5)
  right = np.asarray(
    logp_of(
      np.concatenate([tokens, np.full((3, 4), 9, np.int32)], 1),
      np.concatenate([mask, np.zeros((3, 4), bool)], 1),
      8,
    )
  )
  np.testing.assert_allclose(right[:, :12], plain, atol=2e-5)
  np.testing.assert_array_equal(right[:, 12:], 0)


@pytest.mark.parametrize("model", ["gemma2_grouped"], indirect=True)
def test_a_token_sees_only_the_past(model):
  """Causality through gradients: no log-probability depends on a later embedding."""
  config, params, _ = model
  tokens, mask = tokens_and_mask()
  logp_of = jax.jit(lambda t: logprobs.token_logprobs(params, config, t, mask)[0])
  changed = tokens.copy()
  changed[:, 12] = (tokens[:, 12] + 1) % 60 + 4
  before, after = np.asarray(logp_of(tokens)), np.asarray(logp_of(changed))
  np.testing.assert_array_equal(before[:, :11], after[:, :11])
  assert not np.allclose(before[:, 12:], after[:, 12:])


@pytest.mark.parametrize("model", ["gemma2_grouped"], indirect=True)
def test_forbidden_ids_have_no_probability(model):
  config, params, _ = model
  tokens, mask = tokens_and_mask()
  forbidden = np.arange(64) >= 50
  options = {"forbidden": forbidden, "temperature": 0.7, "normaliser": True}
  logp, entropy, log_z = jax.jit(
    lambda p: logprobs.token_logprobs(p, config, tokens, mask, **options)
  )(params)

  @jax.jit
  def logits(p):
    x, _ = gemma.forward(p, config, tokens, gemma.positions_of(mask), gemma.causal_mask(mask))
    return gemma.logits(p, config, x)

  tempered = np.asarray(logits(params))[:, :-1, :50] / 0.7
  allowed = scipy.special.log_softmax(tempered, axis=-1)
  own = np.take_along_axis(allowed, np.minimum(tokens[:, 1:], 49)[..., None], -1)[..., 0]
  np.testing.assert_allclose(
    np.where(tokens[:, 1:] < 50, logp, 0), np.where(tokens[:, 1:] < 50, own, 0), atol=2e-5
  )
  np.testing.assert_array_less(np.where(tokens[:, 1:] >= 50, logp, -1e9), -1e8)
  np.testing.assert_allclose(entropy, -np.sum(np.exp(allowed) * allowed, -1), atol=2e-5)
  np.testing.assert_allclose(log_z, scipy.special.logsumexp(tempered, axis=-1), atol=2e-5)


def test_float16_is_refused_as_a_type_to_compute_in():
  """The mask's constant is infinite in it: a row of padding, and all after it, would be NaN."""
  config = gemma.preset("tiny")
  params, tokens = gemma.shapes(config), jnp.zeros((1, 3), jnp.int32)
  visible = jnp.zeros((1, 3, 3), bool)
  for dtype in ("float16", jnp.float16, np.dtype("float16")):
    with pytest.raises(ValueError, match=r"dtype: expected float32 or bfloat16, got 'float16'\."):
      gemma.forward(params, config, tokens, tokens, visible, dtype=dtype)


def test_left_padding_gives_the_logits_of_the_unpadded_row_in_bfloat16():
  config = gemma.preset("tiny")
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda x: 0.3 * rng.normal(size=x.shape), gemma.shapes(config))
  params, tokens = gemma.cast(jax.device_put(params), jnp.float32), jnp.array([[5, 9, 7, 11]])

  @functools.partial(jax.jit, static_argnames="padding")
  def last(padding):
    mask = jnp.arange(4 + padding)[None] >= padding
    x, _ = gemma.forward(
      params, config, jnp.pad(tokens, ((0, 0), (padding, 0))), gemma.positions_of(mask),
      gemma.causal_mask(mask), dtype=jnp.bfloat16,
    )  # fmt: skip
    return gemma.logits(params, config, x[:, -1])

  np.testing.assert_allclose(last(3), last(0), atol=0.1)


@pytest.mark.parametrize(
  ("job", "field"),
  [
    ("train", "model"),
    ("train", "judge.model"),
    ("fit", "model"),
    ("arena", "model"),
    ("arena", "judges.judge.model"),
    ("collect", "model"),
    ("sample", "model"),
    ("compare", "base.model"),
    ("compare", "base.judge.model"),
  ],
)
def test_float16_is_for_files_in_every_jobs_config(job, field):
  config = getattr(nash_jax.config, job)()
  if job == "compare":
    config.runs = ({},)
  if job == "collect":
    config.judge.name = "gemma"
  config.update_from_flattened_dict({f"{field}.dtype": "float16"})
  path = field.removeprefix("base.")
  expected = (
    rf"{path}.dtype: expected bfloat16 or float32, got 'float16'. float16 is only for files"
  )
  with pytest.raises(ValueError, match=expected):
    resolve(config)

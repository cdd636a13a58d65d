"""Gemma 4's text models compute what transformers does, by every path through them."""

import functools
import os
import subprocess
import sys

import jax
import numpy as np
import paths
import pytest
import tiny
from gemma4_models import ALL, MODELS4
from jax import numpy as jnp
from lora_trees import normal

from nash_jax import sampler, update, weights
from nash_jax.models import decoding, gemma, logprobs, lora
from nash_jax.types import Mean, Prompts, TrainState

PADDING, LENGTH, PREFILL = (0, 3, 6), 20, 8  # columns of padding on the left of three rows
MASK = np.arange(LENGTH) >= np.array(PADDING)[:, None]
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("hf_gemma4", "hf_gemma4_e4b")]


@functools.cache
def transformers_model(name):
  """Returns config, parameters, rows of tokens padded on the left, and their logits."""
  found, config = np.load(paths.FIXTURES / name / "logits.npz"), MODELS4[name]
  tokens, logits = np.full((3, LENGTH), 17, np.int32), np.zeros((3, LENGTH, 64), np.float32)
  for row, left in enumerate(PADDING):
    tokens[row, left:] = found["tokens"][row, : LENGTH - left]
    logits[row, left:] = found["logits"][row, : LENGTH - left]
  return config, weights.load(str(paths.FIXTURES / name), config), tokens, logits


@functools.partial(jax.jit, static_argnames=("config", "remat"))
def logits_of(params, config, tokens, remat=False):
  positions, visible = gemma.positions_of(MASK), gemma.causal_mask(MASK)
  x, _ = gemma.forward(params, config, tokens, positions, visible, remat=remat)
  return jnp.where(MASK[..., None], gemma.logits(params, config, x), 0)


@functools.partial(jax.jit, static_argnames="config")
def logits_by_token(params, config, tokens):
  """The same as the sampler does: a prefill, then a token at a time over its cache."""
  positions, visible = gemma.positions_of(MASK), gemma.causal_mask(MASK)[:, :PREFILL, :PREFILL]
  first, start = tokens[:, :PREFILL], positions[:, :PREFILL]
  cache = gemma.init_cache(config, 3, PREFILL, jnp.float32)
  x, cache = gemma.forward(params, config, first, start, visible, cache=cache)
  own = decoding.inputs_first(gemma.unstack(params, config, library_gating=False))

  def step(cache, t):
    columns = MASK & (jnp.arange(LENGTH)[None] <= t)
    x, cache = decoding.forward(
      own, config, tokens[:, t], positions[:, t], columns, cache, jnp.float32
    )
    return cache, x

  grown = decoding.grow(cache, LENGTH - PREFILL, 1)
  _, rest = jax.lax.scan(step, grown, jnp.arange(PREFILL, LENGTH))
  x = jnp.concatenate([x, jnp.moveaxis(rest, 0, 1)], axis=1)
  return jnp.where(MASK[..., None], gemma.logits(params, config, x), 0)


@pytest.mark.parametrize("name", MODELS4)
def test_logits_of_padded_rows_are_those_of_transformers(name):
  config, params, tokens, expected = transformers_model(name)
  assert np.ptp(expected) > 5  # so that 1e-4 is a small part of what is compared
  np.testing.assert_allclose(logits_of(params, config, tokens), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["hf_gemma4_e2b", *SLOW])
def test_logits_token_by_token_over_a_cache_are_those_of_transformers(name):
  config, params, tokens, expected = transformers_model(name)
  np.testing.assert_allclose(logits_by_token(params, config, tokens), expected, rtol=0, atol=1e-4)


def test_only_layers_with_keys_of_their_own_have_a_cache():
  cache = jax.eval_shape(lambda: gemma.init_cache(ALL, 3, 5, jnp.float32))
  assert [layer["k"].shape[2:] for layer in cache] == [(2, 8), (1, 16)] * 2


def test_layers_that_share_read_the_last_layer_of_their_kind_that_does_not():
  """As transformers and the library say of the published models."""
  for name, owners, local, full in (("gemma4_e2b", 15, 13, 14), ("gemma4_e4b", 24, 22, 23)):
    config = gemma.preset(name)
    donors = [config.donor(n) for n in range(config.num_layers)]
    kinds = config.attention_types[owners:]
    assert donors[:owners] == [None] * owners
    assert donors[owners:] == [full if kind == gemma.GLOBAL else local for kind in kinds]


def test_12b_has_as_many_numbers_as_the_published_file_without_its_encoders():
  shapes = jax.tree.leaves(gemma.shapes(gemma.preset("gemma4_12b")))
  # In the file: positions, patches, their norms and projections, and a projection of sound.
  encoders = 1120 * 2 * 3840 + 6912 * (3840 + 2) + 3840 * (5 + 3840 + 640)
  assert sum(x.size for x in shapes) == 11_959_730_224 - encoders


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS4)
def test_remat_changes_no_logit_and_no_gradient(name):
  config, params, tokens, _ = transformers_model(name)

  def loss(params, remat):
    return jnp.sum(logprobs.token_logprobs(params, config, tokens, MASK, remat=remat)[0])

  plain, again = (
    jax.jit(jax.value_and_grad(loss), static_argnums=1)(params, r) for r in (False, True)
  )
  for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * max(1, np.max(np.abs(b))))


def with_leaf(tree, path, value):
  first, *rest = path
  return {**tree, first: with_leaf(tree[first], rest, value) if rest else value}


def test_gradients_reach_the_layers_whose_keys_and_values_are_shared():
  """The donors' own attention is cut, so that what they give to others is all that they do.

  Against finite differences in float64, for their keys and values and for the inputs by layer.
  """
  rng = np.random.default_rng(0)
  tokens = rng.integers(4, 64, (2, 9), np.int32)
  with jax.enable_x64(True):
    params = jax.tree.map(lambda x: rng.normal(size=x.shape) * 0.5, gemma.shapes(ALL))
    for place in ("0", "1"):  # of the pattern; its last repeat is the donor
      params["layers"][place]["attn"]["attn_vec_einsum"]["w"][-1] = 0
    mask = np.ones_like(tokens, bool)
    positions, visible = gemma.positions_of(mask), gemma.causal_mask(mask)

    @jax.jit
    def loss(params):
      x, _ = gemma.forward(params, ALL, tokens, positions, visible, dtype=jnp.float64)
      return jnp.sum(jnp.sin(x))

    gradient = jax.jit(jax.grad(loss))(params)
    for path, leaf in (
      (("layers", "0", "attn", "kv_einsum", "w"), -1),
      (("layers", "0", "attn", "key_norm", "scale"), -1),
      (("layers", "1", "attn", "k_einsum", "w"), -1),
      (("layers", "1", "attn", "key_norm", "scale"), -1),
      (("embedder", "per_layer_embeddings"), slice(None)),
      (("embedder", "per_layer_model_projection", "w"), slice(None)),
    ):
      at = functools.partial(functools.reduce, lambda tree, key: tree[key], path)
      direction = np.zeros(at(params).shape)
      direction[leaf] = rng.normal(size=direction[leaf].shape)

      up, down = (with_leaf(params, path, at(params) + e * direction) for e in (1e-6, -1e-6))
      expected = (loss(up) - loss(down)) / 2e-6
      assert abs(expected) > 1e-3, path
      np.testing.assert_allclose(np.sum(at(gradient) * direction), expected, rtol=1e-5)


@functools.cache
def adapted():
  """Returns the base of ALL, adapters as they start, and adapters that are moved a little."""
  base = normal(gemma.shapes(ALL), 0)
  start = jax.jit(functools.partial(lora.init, rank=3))(jax.random.key(1), base)
  return base, start, normal(start, 3, 0.05)


@functools.partial(jax.jit, static_argnames="config")
def token_logps(params, config, tokens):
  return logprobs.token_logprobs(params, config, tokens, MASK)[0]


def test_adapters_are_on_every_projection_and_merged_they_compute_the_same():
  base, start, moved = adapted()
  tokens = np.random.default_rng(2).integers(4, 64, (3, LENGTH))
  fresh, joined = lora.join(base, start, 2.0), lora.join(base, moved, 2.0)
  plain = token_logps(base, ALL, tokens)
  np.testing.assert_array_equal(token_logps(fresh, ALL, tokens), plain)
  got, merged = token_logps(joined, ALL, tokens), lora.merge(joined)
  assert np.max(np.abs(got - plain)) > 0.1
  np.testing.assert_allclose(token_logps(merged, ALL, tokens), got, atol=2e-4)
  names = lambda tree: {keystr(path) for path, _ in jax.tree.leaves_with_path(tree)}  # noqa: E731
  keystr = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
  weights = {path for path in names(base) if path.endswith(("/w", "gating_einsum", "linear"))}
  embedder = {"embedder/per_layer_model_projection/w"}
  assert {path[:-2] for path in names(start)} == weights - embedder


def test_the_sampler_and_the_trainer_agree_on_padded_prompts():
  base, _, moved = adapted()
  params, rng = lora.join(base, moved, 2.0), np.random.default_rng(3)
  mask = np.arange(6)[None] >= np.array([0, 2, 5])[:, None]
  prompts = Prompts(rng.integers(4, 60, (3, 6)), mask, np.arange(3))
  options = {"max_tokens": 8, "samples": 2, "stop_ids": (5, 6, 7), "pad_id": 0}
  got = jax.jit(sampler.make_sampler(ALL, **options))(params, prompts, jax.random.key(4))
  again, _ = jax.jit(functools.partial(logprobs.response_logprobs, model_config=ALL))(
    params, prompts=prompts, tokens=got.tokens, mask=got.mask
  )
  assert got.mask[..., 6:].any()  # past the window
  np.testing.assert_allclose(got.logp, again, rtol=0, atol=1e-5)


def test_the_table_of_inputs_by_layer_is_frozen_and_has_no_moments():
  base, tokens = adapted()[0], np.random.default_rng(2).integers(4, 64, (4, LENGTH))

  def loss(params, tokens):
    return {"loss": Mean.from_values(logprobs.token_logprobs(params, ALL, tokens, tokens > 0)[0])}

  optimizer = update.make_optimizer(tiny.train().optimizer, 10)
  state = TrainState(np.int32(0), base, None, optimizer.init(lora.split(base)[0]), {})

  @jax.jit
  def step(state):
    grads, metrics = update.gradients(loss, state.params, tokens, 2)
    return update.apply_gradients(optimizer, grads, state, metrics["loss"]), grads

  (params, opt_state), grads = step(state)
  table = base["embedder"]["per_layer_embeddings"].shape
  assert table not in {x.shape for x in jax.tree.leaves((grads, opt_state))}
  moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), params, base)
  assert not moved["embedder"].pop("per_layer_embeddings")
  assert all(jax.tree.leaves(moved))


@pytest.mark.slow
def test_eight_devices_compute_what_one_does(tmp_path):
  """Log-probabilities, their gradient by adapters, and samples, over fsdp and tensor axes."""
  flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
  done = subprocess.run(
    [sys.executable, "-c", DEVICES, str(tmp_path)],
    capture_output=True, text=True, timeout=500, cwd=paths.ROOT / "tests" / "helpers",
    env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
  )  # fmt: skip
  assert done.returncode == 0, done.stderr[-3000:]
  one, eight = (np.load(tmp_path / f"{count}.npz") for count in (1, 8))
  assert sorted(one) == sorted(eight)
  for name in one:
    np.testing.assert_allclose(eight[name], one[name], rtol=0, atol=1e-5, err_msg=name)


DEVICES = """
import functools, pathlib, sys
import jax, numpy as np
from gemma4_models import ALL
from lora_trees import normal
from nash_jax import sampler
from nash_jax.models import gemma, logprobs, lora, sharding
from nash_jax.types import Prompts
base = normal(gemma.shapes(ALL), 0)
init = functools.partial(lora.init, rank=4)
adapters = normal(jax.eval_shape(init, jax.random.key(0), base), 1, 0.05)
tokens = np.random.default_rng(0).integers(4, 64, (8, 12))
mask = np.arange(12) >= np.arange(8)[:, None] // 2
prompts = Prompts(tokens, mask, np.arange(8))

def mean(adapters, base):
  logp = logprobs.token_logprobs(lora.join(base, adapters, 2.0), ALL, tokens, mask, remat=True)[0]
  return logp.mean(), logp

sample = sampler.make_sampler(ALL, max_tokens=6, samples=2, stop_ids=(5, 6), pad_id=0)
for sizes in ({"data": 1, "fsdp": 1, "tensor": 1}, {"data": 2, "fsdp": 2, "tensor": 2}):
  count = int(np.prod(list(sizes.values())))
  mesh = jax.make_mesh(
    tuple(sizes.values()), tuple(sizes), devices=jax.devices()[:count],
    axis_types=(jax.sharding.AxisType.Auto,) * 3,
  )
  placed = [sharding.shard(jax.device_get(tree), mesh) for tree in (adapters, base)]
  (_, logp), grads = sharding.jit(mesh, jax.value_and_grad(mean, has_aux=True))(*placed)
  drawn = sharding.jit(mesh, sample)(lora.join(*placed[::-1], 2.0), prompts, jax.random.key(4))
  found = {jax.tree_util.keystr(path): x for path, x in jax.tree.leaves_with_path(grads)}
  found |= {"logp": logp, "tokens": drawn.tokens, "drawn": drawn.logp}
  np.savez(pathlib.Path(sys.argv[1]) / f"{count}.npz", **jax.device_get(found))
"""

"""Adapters: nothing until B moves, then the same policy whether joined or merged."""

import functools

import jax
import numpy as np
import pytest
from gemma import gm
from jax import numpy as jnp

from nash_jax import sampler
from nash_jax.models import gemma, logprobs, lora
from nash_jax.types import Prompts

LOCAL, GLOBAL = gm.nn.AttentionType.LOCAL_SLIDING, gm.nn.AttentionType.GLOBAL
# Keys and values of their own for every head, and few; layers over, and norms of queries.
MODELS = {
  "joint": {"num_kv_heads": 2},
  "grouped": {"num_heads": 4, "num_kv_heads": 2},
  "tail": {"attention_types": (LOCAL, GLOBAL, LOCAL), "use_qk_norm": True},
}
RANK, SCALE = 3, 2.0


def normal(tree, seed, scale=0.3):
  draw = np.random.default_rng(seed).normal
  return jax.tree.map(lambda x: jnp.asarray(draw(0, scale, x.shape), jnp.float32), tree)


@pytest.fixture(scope="module", params=MODELS)
def trees(request):
  """Architecture, base, adapters as they start, and adapters with every entry moved."""
  config = gemma.preset("tiny", **MODELS[request.param])
  base = normal(gemma.shapes(config), 0)
  start = jax.jit(functools.partial(lora.init, rank=RANK))(jax.random.key(1), base)
  return config, base, start, normal(start, 2)


def forward(config, dtype):
  tokens = jax.random.randint(jax.random.key(2), (3, 12), 4, 64)
  mask = jnp.arange(12)[None] >= jnp.array([0, 3, 7])[:, None]

  @jax.jit
  def run(params):
    positions, visible = gemma.positions_of(mask), gemma.causal_mask(mask)
    x, _ = gemma.forward(params, config, tokens, positions, visible, dtype=dtype)
    return jnp.where(mask[..., None], gemma.logits(params, config, x), 0)

  return run


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fresh_adapters_change_nothing_to_the_last_bit(trees, dtype):
  config, base, start, moved = trees
  run = forward(config, jnp.dtype(dtype))
  joined = lora.join(base, start, SCALE)
  np.testing.assert_array_equal(run(joined), run(base))
  jax.tree.map(np.testing.assert_array_equal, lora.merge(joined), base)
  assert jnp.max(jnp.abs(run(lora.join(base, moved, SCALE)) - run(base))) > 1


def test_every_projection_is_adapted_and_nothing_else(trees):
  _, base, start, moved = trees
  changed = jax.tree.map(
    lambda a, b: bool(jnp.all(jnp.any(a != b, axis=range(1, a.ndim)))),
    lora.merge(lora.join(base, moved, SCALE)), base,
  )  # fmt: skip
  for stack in ("layers", "tail"):
    for layer in changed.pop(stack, {}).values():
      norms = [layer.pop(name) for name in list(layer) if name.endswith("_norm")]
      attn = layer.pop("attn")
      norms += [attn.pop(name) for name in list(attn) if name.endswith("_norm")]
      assert not any(jax.tree.leaves(norms))
      assert all(jax.tree.leaves((attn, layer)))
  assert not any(jax.tree.leaves(changed)), "embedding and final norm"
  assert {x.dtype for x in jax.tree.leaves(start)} == {np.dtype("float32")}
  for path, x in jax.tree.leaves_with_path(start):
    assert bool(jnp.any(x != 0)) == (path[-1].key == "a")


def test_joined_and_merged_agree(trees):
  config, base, _, moved = trees
  joined = lora.join(base, normal(moved, 3, 0.05), SCALE)
  run = forward(config, jnp.float32)
  merged = lora.merge(joined)
  assert jax.tree.structure(merged) == jax.tree.structure(base)
  np.testing.assert_allclose(run(joined), run(merged), atol=2e-4)
  unstacked = functools.partial(gemma.unstack, config=config, library_gating=False)
  # Merging and unstacking commute.
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6),
               lora.merge(unstacked(joined)), unstacked(merged))  # fmt: skip
  np.testing.assert_allclose(run(unstacked(joined)), run(joined), atol=1e-5)


def test_responses_of_a_joined_policy_are_those_of_the_merged_one():
  """The sampler merges: what it draws and says of it is what the joined model says."""
  config = gemma.preset("tiny")
  base = normal(gemma.shapes(config), 0)
  adapters = jax.eval_shape(functools.partial(lora.init, rank=RANK), jax.random.key(1), base)
  joined = lora.join(base, normal(adapters, 2, 0.1), SCALE)
  mask = jnp.arange(6)[None] >= jnp.array([0, 2, 5])[:, None]
  prompts = Prompts(jax.random.randint(jax.random.key(3), (3, 6), 4, 60), mask, jnp.arange(3))
  sample = jax.jit(
    sampler.make_sampler(config, max_tokens=8, samples=2, stop_ids=(5, 6, 7), pad_id=0)
  )
  y = sample(joined, prompts, jax.random.key(4))
  same, other = (sample(p, prompts, jax.random.key(4)) for p in (lora.merge(joined), base))
  np.testing.assert_array_equal(y.tokens, same.tokens)
  assert jnp.any(y.tokens != other.tokens)
  logp, _ = jax.jit(functools.partial(logprobs.response_logprobs, config=config))(
    joined, prompts=prompts, tokens=y.tokens, mask=y.mask
  )
  for own in (y, same):
    np.testing.assert_allclose(own.logp, logp, atol=2e-4)


def test_a_block_with_adapters_is_the_librarys(trees):
  """gm.nn.LoRA has the same factors, under other names, and no scale."""
  config, base, _, moved = trees
  block = gemma.block(config, LOCAL)
  x = jax.random.normal(jax.random.key(0), (2, 5, config.embed_dim))
  args = (x, jnp.arange(5)[None].repeat(2, 0), None, jnp.tril(jnp.ones((2, 5, 5), bool)))
  joined = jax.tree.map(lambda x: x[0], lora.join(base, moved, 1.0)["layers"]["0"])
  library = gm.nn.LoRA(rank=RANK, model=block, dtype=jnp.float32)
  shapes = jax.eval_shape(library.init, jax.random.key(0), *args)["params"]

  def ours_at(path, leaf):
    """attn/q_einsum/_LoRAEinsum_0/lora/a, mlp/_LoRAEinsum_linear/lora/a; the rest as here."""
    part, name, *rest = (key.key for key in path)
    if name.startswith("_LoRA"):
      return joined["lora"][part][name.removeprefix("_LoRAEinsum_")][rest[-1]]
    if len(rest) > 1:
      return joined["lora"][part][name]["w"][rest[-1]]
    return joined[part][name][rest[0]] if rest else joined[part][name]

  params = jax.tree.map_with_path(ours_at, shapes)
  _, expected = library.apply({"params": params}, *args)
  _, ours = lora.apply(block, joined, *args)
  np.testing.assert_allclose(ours, expected, atol=1e-5)

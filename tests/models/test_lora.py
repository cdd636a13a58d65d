"""Adapters: nothing until B moves, then the same policy whether joined or merged."""

import functools

import jax
import numpy as np
import pytest
import tiny
import tiny_runs
from gemma import gm
from jax import numpy as jnp
from lora_trees import CHANGES, RANK, SCALE, forward, normal

from nash_jax import sampler, update
from nash_jax.config import resolve
from nash_jax.models import gemma, logprobs, lora
from nash_jax.objectives import algorithms
from nash_jax.types import Prompts

LOCAL, GLOBAL = gm.nn.AttentionType.LOCAL_SLIDING, gm.nn.AttentionType.GLOBAL


# Keys and values of their own for every head, and few; layers over, and norms of queries.
MODELS = {
  "joint": {"num_kv_heads": 2},
  "grouped": {"num_heads": 4, "num_kv_heads": 2},
  "tail": {"attention_types": (LOCAL, GLOBAL, LOCAL), "use_qk_norm": True},
}


join, merge = jax.jit(lora.join), jax.jit(lora.merge)


@pytest.fixture(scope="module", params=MODELS)
def trees(request):
  """Architecture, base, adapters as they start, and adapters with every entry moved."""
  config = gemma.preset("tiny", **MODELS[request.param])
  base = normal(gemma.shapes(config), 0)
  start = jax.jit(functools.partial(lora.init, rank=RANK))(jax.random.key(1), base)
  return config, base, start, normal(start, 2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fresh_adapters_change_nothing_to_the_last_bit(trees, dtype):
  config, base, start, moved = trees
  run = forward(config, dtype)
  joined = join(base, start, SCALE)
  np.testing.assert_array_equal(run(joined), run(base))
  jax.tree.map(np.testing.assert_array_equal, merge(joined), base)
  assert np.max(np.abs(np.subtract(run(join(base, moved, SCALE)), run(base)))) > 1


def test_every_projection_is_adapted_and_nothing_else(trees):
  _, base, start, moved = trees
  changed = jax.tree.map(
    lambda a, b: bool(np.all(np.any(np.not_equal(a, b), axis=tuple(range(1, a.ndim))))),
    merge(join(base, moved, SCALE)),
    base,
  )
  for stack in ("layers", "tail"):
    for layer in changed.pop(stack, {}).values():
      norms = [layer.pop(name) for name in list(layer) if name.endswith("_norm")]
      attn = layer.pop("attn")
      norms += [attn.pop(name) for name in list(attn) if name.endswith("_norm")]
      assert not any(jax.tree.leaves(norms))
      assert all(jax.tree.leaves((attn, layer)))
  assert not any(jax.tree.leaves(changed)), "embedding and final norm"
  assert {x.dtype for x in jax.tree.leaves(start)} == {np.dtype("float32")}
  for path, x in jax.tree.leaves_with_path(jax.device_get(start)):
    assert np.any(x) == (path[-1].key == "a")


def test_joined_and_merged_models_agree(trees):
  config, base, _, moved = trees
  joined = jax.device_get(join(base, normal(moved, 3, 0.05), SCALE))
  run = forward(config, "float32")
  merged = jax.device_get(merge(joined))
  assert jax.tree.structure(merged) == jax.tree.structure(base)
  np.testing.assert_allclose(run(joined), run(merged), atol=2e-4)
  unstacked = functools.partial(gemma.unstack, model_config=config, library_gating=False)
  # Merging and unstacking commute.
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, atol=1e-6),
    merge(unstacked(joined)),
    unstacked(merged),
  )
  np.testing.assert_allclose(run(unstacked(joined)), run(joined), atol=1e-5)


@pytest.mark.slow
def test_responses_of_a_joined_policy_are_those_of_the_merged_one():
  """The sampler merges: its tokens and log-probabilities are those of the joined model."""
  config = gemma.preset("tiny")
  base = normal(gemma.shapes(config), 0)
  adapters = jax.eval_shape(functools.partial(lora.init, rank=RANK), jax.random.key(1), base)
  joined = join(base, normal(adapters, 2, 0.1), SCALE)
  mask = np.arange(6)[None] >= np.array([0, 2, 5])[:, None]
  prompts = Prompts(np.random.default_rng(3).integers(4, 60, (3, 6)), mask, np.arange(3))
  sample = jax.jit(
    sampler.make_sampler(config, max_tokens=8, samples=2, stop_ids=(5, 6, 7), pad_id=0)
  )
  y = sample(joined, prompts, jax.random.key(4))
  same, other = (sample(p, prompts, jax.random.key(4)) for p in (merge(joined), base))
  np.testing.assert_array_equal(y.tokens, same.tokens)
  assert np.any(np.not_equal(y.tokens, other.tokens))
  logp, _ = jax.jit(functools.partial(logprobs.response_logprobs, model_config=config))(
    joined, prompts=prompts, tokens=y.tokens, mask=y.mask
  )
  for own in (y, same):
    np.testing.assert_allclose(own.logp, logp, atol=2e-4)


def test_a_block_with_adapters_computes_what_the_gemma_librarys_does(trees):
  """gm.nn.LoRA has the same factors, under other names, and no scale."""
  config, base, _, moved = trees
  block = gemma.block(config, LOCAL)
  x = np.random.default_rng(0).normal(size=(2, 5, config.embed_dim)).astype(np.float32)
  args = (x, np.arange(5)[None].repeat(2, 0), None, np.tril(np.ones((2, 5, 5), bool)))
  joined = jax.device_get(join(base, moved, 1.0)["layers"]["0"])
  joined = jax.tree.map(lambda x: x[0], joined)
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
  _, expected = jax.jit(library.apply)({"params": params}, *args)
  _, ours = jax.jit(functools.partial(lora.apply, block))(joined, *args)
  np.testing.assert_allclose(ours, expected, atol=1e-5)


@pytest.mark.parametrize("name", algorithms.ALGORITHMS)
def test_every_algorithm_keeps_copies_of_adapters(name):
  """And every player that it names can be made of them."""
  config = tiny.train({**CHANGES, "algorithm.name": name, "algorithm.samples": 4})
  algorithms.fill_defaults(config.algorithm)
  rule, base = update.make_update(config, tiny_runs.no_logprobs), gemma.shapes(gemma.preset("tiny"))
  state = jax.eval_shape(rule.init, base)
  widest = max(x.size for x in jax.tree.leaves(state.params))
  assert all(x.size <= widest for x in jax.tree.leaves(state))
  for step in range(1, 3):
    state = jax.eval_shape(
      functools.partial(rule.apply_copies, copies=rule.copies_due(step)), state
    )
  method = algorithms.get(name)
  players = jax.eval_shape(rule.players, state, base)
  for player in {
    method.player,
    method.opponent or method.player,
    *method.role_weights(config.algorithm),
  } - {"reference", "data"}:
    trees = players[player][:1] if player == "mixture" else [players[player]]
    for tree in trees:
      assert "lora" in tree["layers"]["0"], player
      assert jax.tree.structure(jax.eval_shape(lora.merge, tree)) == jax.tree.structure(base)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      {"model.lora.rank": -1},
      r"model.lora.rank: expected a whole number in .*, or 0 \(all .* trained\)",
    ),
    (
      {"model.lora.alpha": 0.0},
      "model.lora.alpha: expected a number in .*, got 0.0. The default is 32",
    ),
    ({"judge.name": "gemma", "judge.model.lora.rank": 4}, "judge.model.lora.rank: expected 0"),
  ],
)
def test_bad_fields_are_named(changes, message):
  with pytest.raises(ValueError, match=message):
    resolve(tiny.train(changes))


def test_a_policy_that_is_no_network_has_no_adapters():
  rule = update.make_update(tiny.train(CHANGES), tiny_runs.no_logprobs)
  with pytest.raises(ValueError, match=r"expected a Gemma's projections .* got \['logits'\]"):
    rule.init({"logits": np.zeros((2, 3))})

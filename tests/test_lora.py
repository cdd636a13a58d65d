"""Adapters: nothing until B moves, then the same policy whether joined or merged."""

import dataclasses
import functools
import json
import shutil

import jax
import numpy as np
import optax
import pytest
import test_fit
import test_hosts
import test_train
import tiny
from gemma import gm
from jax import numpy as jnp

from nash_jax import config as configs
from nash_jax import fit, policy, sampler, train, update, weights
from nash_jax.config import resolve
from nash_jax.jobs import arena, sample
from nash_jax.models import gemma, logprobs, lora
from nash_jax.objectives import algorithms
from nash_jax.run import checkpoint
from nash_jax.types import Prompts
from nash_jax.weights import names

LOCAL, GLOBAL = gm.nn.AttentionType.LOCAL_SLIDING, gm.nn.AttentionType.GLOBAL
# Keys and values of their own for every head, and few; layers over, and norms of queries.
MODELS = {
  "joint": {"num_kv_heads": 2},
  "grouped": {"num_heads": 4, "num_kv_heads": 2},
  "tail": {"attention_types": (LOCAL, GLOBAL, LOCAL), "use_qk_norm": True},
}
RANK, SCALE = 3, 2.0
join, merge = jax.jit(lora.join), jax.jit(lora.merge)


def normal(tree, seed, scale=0.3):
  draw = np.random.default_rng(seed).normal
  return jax.device_put(jax.tree.map(lambda x: draw(0, scale, x.shape).astype("f"), tree))


@pytest.fixture(scope="module", params=MODELS)
def trees(request):
  """Architecture, base, adapters as they start, and adapters with every entry moved."""
  config = gemma.preset("tiny", **MODELS[request.param])
  base = normal(gemma.shapes(config), 0)
  start = jax.jit(functools.partial(lora.init, rank=RANK))(jax.random.key(1), base)
  return config, base, start, normal(start, 2)


@functools.cache
def forward(config, dtype):
  tokens = np.random.default_rng(2).integers(4, 64, (3, 12))
  mask = np.arange(12)[None] >= np.array([0, 3, 7])[:, None]

  @jax.jit
  def run(params):
    positions, visible = gemma.positions_of(mask), gemma.causal_mask(mask)
    x, _ = gemma.forward(params, config, tokens, positions, visible, dtype=dtype)
    return jnp.where(mask[..., None], gemma.logits(params, config, x), 0)

  return run


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


def test_joined_and_merged_agree(trees):
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


def test_responses_of_a_joined_policy_are_those_of_the_merged_one():
  """The sampler merges: what it draws and says of it is what the joined model says."""
  config = gemma.preset("tiny")
  base = normal(gemma.shapes(config), 0)
  adapters = jax.eval_shape(functools.partial(lora.init, rank=RANK), jax.random.key(1), base)
  joined = join(base, normal(adapters, 2, 0.1), SCALE)
  mask = np.arange(6)[None] >= np.array([0, 2, 5])[:, None]
  prompts = Prompts(np.random.default_rng(3).integers(4, 60, (3, 6)), mask, np.arange(3))
  draw = jax.jit(
    sampler.make_sampler(config, max_tokens=8, samples=2, stop_ids=(5, 6, 7), pad_id=0)
  )
  y = draw(joined, prompts, jax.random.key(4))
  same, other = (draw(p, prompts, jax.random.key(4)) for p in (merge(joined), base))
  np.testing.assert_array_equal(y.tokens, same.tokens)
  assert np.any(np.not_equal(y.tokens, other.tokens))
  logp, _ = jax.jit(functools.partial(logprobs.response_logprobs, model_config=config))(
    joined, prompts=prompts, tokens=y.tokens, mask=y.mask
  )
  for own in (y, same):
    np.testing.assert_allclose(own.logp, logp, atol=2e-4)


def test_a_block_with_adapters_is_the_librarys(trees):
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


CHANGES = {"model.lora.rank": RANK, "algorithm.reference_period": 2, "optimizer.learning_rate": 0.3}


@pytest.fixture(scope="module")
def setup():
  """A run with adapters whose reference follows, assembled."""
  return train.set_up(resolve(tiny.train(CHANGES)))


@pytest.fixture(scope="module")
def whole(setup, tmp_path_factory):
  """The workdir and the end of its six steps."""
  setup.programs.train_step.clear_cache()
  workdir = tmp_path_factory.mktemp("lora") / "whole"
  return workdir, tiny.start(setup, setup.config, workdir)


def size(tree):
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def test_all_that_training_holds_beside_the_base_is_adapters(setup, assembled):
  model = gemma.preset("tiny", num_embed=1024)
  sizes, count = names.sizes(model), 0
  for name, place in names.places(model).items():
    if any(name.endswith(weight) for weight in lora.FACTORS):
      axes = place.tensor.axes.split()
      inputs = {"attn_vec_einsum": "NH", "linear": "F"}.get(name.split("/")[-1 - ("attn" in name)])
      inputs = [axis for axis in axes if axis in (inputs or "D")]
      outputs = [axis for axis in axes if axis not in inputs]
      across = sum(np.prod([sizes[axis] for axis in part]) for part in (inputs, outputs))
      count += RANK * across * max(1, len(place.layers))
  state = setup.initial_state()
  assert size(state.params) == 4 * count
  assert size(state.target) == size(state.copies["reference"]) == 4 * count
  assert size(state.opt_state) == 2 * 4 * count + 8, "two moments, two counters"
  assert (
    size(assembled.programs.init(assembled.reference).opt_state) == 2 * size(setup.reference) + 8
  )
  assert {x.shape for x in jax.tree.leaves(setup.reference)}.isdisjoint(
    {x.shape for x in jax.tree.leaves(state)}
  )


def test_the_step_compiles_once(whole):
  assert whole[1].compilations == 1


def test_a_step_moves_adapters_and_nothing_else(setup):
  before = jax.tree.map(np.asarray, (setup.initial_state(), setup.reference))
  fresh = setup.initial_state()
  state, values = setup.programs.train_step(
    fresh, setup.reference, jax.device_put(tiny.batch(setup), setup.shardings.batch)
  )
  jax.tree.map(np.testing.assert_array_equal, setup.reference, before[1])
  assert jax.tree.structure(state) == jax.tree.structure(before[0])
  assert values["gradient_norm"] > 1e-3
  moments = optax.tree.get(state.opt_state, "mu")
  assert jax.tree.structure(moments) == jax.tree.structure(state.params)
  for path, new in jax.tree.leaves_with_path(state.params):
    old = functools.reduce(lambda tree, key: tree[key.key], path, before[0].params)
    # Where B is 0 no gradient reaches A.
    assert np.all(np.any(np.not_equal(new, old), axis=-1)) == (path[-1].key == "b")


@pytest.fixture(scope="module")
def scores(setup):
  """From a state to log-probabilities of fixed responses by player."""
  score, _ = policy.make_policy(
    setup.config.model, setup.config.sampling, setup.tokenizer, gemma.preset("tiny", num_embed=1024)
  )
  rule, x = update.make_update(setup.config, score), tiny.batch(setup)

  @jax.jit
  def run(state, ref):
    who = rule.players(state, ref)
    who["policy of mixture"], who["reference of mixture"] = who.pop("mixture")
    return {
      name: score(p, prompts=x.prompts, tokens=x.responses.tokens, mask=x.responses.mask)[0]
      for name, p in who.items()
    }

  return lambda state: run(state, setup.reference)


def test_players_share_the_base_and_differ_by_their_adapters(setup, whole, scores):
  state = whole[1].state.replace(copies=setup.initial_state().copies)  # as before a first refresh
  logp = scores(state)
  plain = scores(setup.initial_state())["policy"]
  np.testing.assert_array_equal(logp["reference"], plain)
  np.testing.assert_array_equal(logp["reference of mixture"], plain)
  np.testing.assert_array_equal(logp["policy of mixture"], logp["policy"])
  for one, other in (("policy", "reference"), ("policy", "target"), ("target", "reference")):
    assert np.max(np.abs(np.subtract(logp[one], logp[other]))) > 1e-3, (one, other)
  rule = update.make_update(resolve(tiny.train({"model.lora.rank": RANK})), None)
  assert (
    rule.players(setup.initial_state().replace(copies={}), setup.reference)["reference"]
    is setup.reference
  )


def test_a_refreshed_reference_has_adapters_of_its_own(whole, scores):
  state = whole[1].state
  kept = state.copies["reference"]
  assert jax.tree.structure(kept) == jax.tree.structure(state.params)
  jax.tree.map(np.testing.assert_array_equal, kept, state.params)  # six steps: refreshed just now
  logp = scores(state)
  np.testing.assert_array_equal(logp["reference"], logp["policy"])
  kl = [line["kl_to_reference"] for line in test_train.lines(whole[0])[:-1]]
  assert all(abs(kl[step]) < 1e-5 < abs(kl[step + 1]) for step in (0, 2, 4))


@pytest.fixture(scope="module")
def plain(setup):
  """From a base and adapters to the model that they make."""
  _, join = lora.init_and_join(setup.config)
  return jax.jit(lambda base, trained: lora.merge(join(base, trained)))


def test_the_target_is_the_average_of_adapters(setup, plain):
  """Which is not the average of what they make: B A is not linear in the two together."""
  fresh = setup.initial_state()
  state = fresh.replace(params=normal(fresh.params, 1), target=normal(fresh.params, 2))
  state = jax.device_put(state, setup.shardings.state)
  centre = jax.tree.map(np.array, state.target)
  after, _ = setup.programs.train_step(
    state, setup.reference, jax.device_put(tiny.batch(setup), setup.shardings.batch)
  )
  after = jax.device_get(after)
  moved = optax.incremental_update(after.params, centre, setup.config.algorithm.kappa)
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), after.target, moved)

  kappa = setup.config.algorithm.kappa
  new, old, moved = (
    np.asarray(plain(setup.reference, tree)["layers"]["0"]["mlp"]["linear"])
    for tree in (after.params, centre, after.target)
  )
  pairs = [tree["layers"]["0"]["mlp"]["linear"] for tree in (after.params, centre)]
  a, b = (pairs[0][name] - pairs[1][name] for name in "ab")
  short = kappa * (1 - kappa) * setup.config.model.lora.alpha / RANK * a @ b
  np.testing.assert_allclose(kappa * new + (1 - kappa) * old - moved, short, atol=1e-5)
  assert np.max(np.abs(short)) > 0.1


@pytest.mark.parametrize("name", algorithms.ALGORITHMS)
def test_every_algorithm_keeps_copies_of_adapters(name):
  """And every player of its row can be made of them."""
  config = tiny.train({**CHANGES, "algorithm.name": name, "algorithm.samples": 4})
  algorithms.fill_defaults(config.algorithm)
  rule, base = update.make_update(config, None), gemma.shapes(gemma.preset("tiny"))
  state = jax.eval_shape(rule.init, base)
  widest = max(x.size for x in jax.tree.leaves(state.params))
  assert all(x.size <= widest for x in jax.tree.leaves(state))
  for step in range(1, 3):
    state = jax.eval_shape(
      functools.partial(rule.apply_copies, copies=rule.copies_due(step)), state
    )
  method = algorithms.get(name)
  who = jax.eval_shape(rule.players, state, base)
  for player in {
    method.player,
    method.opponent or method.player,
    *method.role_weights(config.algorithm),
  } - {"reference"}:
    trees = who[player][:1] if player == "mixture" else [who[player]]
    for tree in trees:
      assert "lora" in tree["layers"]["0"], player
      assert jax.tree.structure(jax.eval_shape(lora.merge, tree)) == jax.tree.structure(base)


@pytest.mark.slow
def test_eight_devices_train_adapters_as_one_does(setup, tmp_path):
  one = dataclasses.replace(setup, config=resolve(tiny.train({**CHANGES, "steps": 2})))
  eight = test_hosts.measured(1, 8, tmp_path / "eight", {**CHANGES, **tiny.EIGHT, "steps": 2})
  test_hosts.assert_alike(eight, tiny.measure(one, tmp_path / "one"))
  eight, one = (  # and one device reads what eight have written
    policy.load_weights(f"{tmp_path / name}@target", gemma.preset("tiny", num_embed=1024))
    for name in ("eight", "one")
  )
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4), eight, one)


def test_a_killed_run_goes_on_as_if_never_killed(setup, whole, tmp_path):
  sample = test_train.at(6, test_train.kill, setup.programs.sample)
  with pytest.raises(RuntimeError, match="killed"):
    tiny.start(setup, setup.config, tmp_path, sample=sample)
  done = tiny.start(setup, setup.config, tmp_path)
  test_train.assert_same(done.state, whole[1].state)
  assert test_train.lines(tmp_path) == test_train.lines(whole[0])


@pytest.fixture(scope="module")
def merged(setup, whole, plain):
  """The run's policy and target as plain models."""
  state = whole[1].state
  return {part: plain(setup.reference, getattr(state, part)) for part in ("params", "target")}


def test_a_runs_folder_gives_plain_models(setup, whole, merged):
  model = gemma.preset("tiny", num_embed=1024)
  for spec, part in (("", "params"), ("@params:6", "params"), ("@target", "target")):
    got = policy.load_weights(f"{whole[0]}{spec}", model)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), got, merged[part])
  earlier = policy.load_weights(f"{whole[0]}@params:3", model)
  moved = jax.tree.map(lambda a, b: np.max(np.abs(np.subtract(a, b))), earlier, merged["params"])
  assert max(jax.tree.leaves(moved)) > 1e-3


def test_adapters_whose_base_has_changed_are_refused(whole, tmp_path):
  """In another base they would be another policy."""
  folder, c = tmp_path / "run", tiny.train(CHANGES)
  shutil.copytree(whole[0], folder)
  ran = json.loads((folder / "config.json").read_text())
  (folder / "config.json").write_text(json.dumps({**ran, "seed": 1}))
  model = gemma.preset("tiny", num_embed=1024)
  with pytest.raises(ValueError, match=r"model.weights of .*run: expected what the run began with"):
    policy.load_weights(str(folder), model)
  c.seed, c.checkpoint.allow = 1, ("seed",)
  with pytest.raises(ValueError, match=r"model.weights of .*run: expected what the run began with"):
    train.run(c, folder)
  (folder / "base.json").unlink()
  policy.load_weights(str(folder), model)


def test_exports_are_plain_models_with_the_policys_logits(setup, whole, merged, tmp_path):
  model, (_, join) = gemma.preset("tiny", num_embed=1024), lora.init_and_join(setup.config)
  run = forward(model, "float32")
  expected = run(jax.jit(join)(setup.reference, whole[1].state.params))
  weights.save(str(tmp_path / "own.safetensors"), merged["params"], model, "float32", {})
  weights.export(str(tmp_path / "theirs"), merged["params"], model, "float32")
  for name in ("own.safetensors", "theirs"):
    got = run(weights.load(str(tmp_path / name), model))
    np.testing.assert_allclose(got, expected, atol=1e-4)
  assert np.max(np.abs(np.subtract(run(setup.reference), expected))) > 1e-2


def test_the_arena_and_sampling_play_a_runs_policies(setup, whole, merged, tmp_path, capsys):
  file = str(tmp_path / "merged.safetensors")
  weights.save(file, merged["params"], gemma.preset("tiny", num_embed=1024), "float32", {})
  c = configs.arena()
  for part in ("model", "prompts", "sampling"):
    c[part] = setup.config[part].copy_and_resolve_references()  # adapters are of training alone
  c.update({"max_prompts": 4, "resamples": 10, "texts": 1, "base": "file", "select_judge": "own"})
  specs = {"file": file, "run": str(whole[0]), "target": f"{whole[0]}@target"}
  c.policies = {name: {"weights": spec, "best_of": 1} for name, spec in specs.items()}
  c.judges = {"own": setup.config.judge.to_dict()}
  who = arena.run(c, tmp_path / "arena")["policies"]
  assert abs(who["run"]["kl_to_reference"]) < 1e-4
  assert abs(who["target"]["kl_to_reference"]) > 1e-3
  capsys.readouterr()

  c, said = configs.sample(), []
  c.model = setup.config.model.copy_and_resolve_references()
  c.sampling.max_tokens, c.prompt = 8, "Once"
  for spec in (str(whole[0]), file):
    c.model.weights = spec
    sample.run(c)
    said.append(capsys.readouterr().out)
  assert said[0] == said[1]
  assert "Once ▸" in said[0]


@pytest.mark.slow
def test_the_base_is_held_in_the_type_that_is_computed_with(tmp_path):
  c = tiny.train({**CHANGES, "model.dtype": "bfloat16", "steps": 2, "checkpoint.every": 2})
  setup = train.set_up(resolve(c))
  done = tiny.start(setup, c, tmp_path)
  assert {str(x.dtype) for x in jax.tree.leaves(setup.reference)} == {"bfloat16"}
  learned = (done.state.params, done.state.target, optax.tree.get(done.state.opt_state, "mu"))
  assert {str(x.dtype) for x in jax.tree.leaves(learned)} == {"float32"}
  lines = test_train.lines(tmp_path)
  assert abs(lines[1]["kl_to_reference"]) > 1e-3
  assert all(line["logp_gap"] < 0.05 for line in lines[:-1])
  model, (_, join) = gemma.preset("tiny", num_embed=1024), lora.init_and_join(setup.config)
  merged = lora.merge(join(policy.load_weights("", model, c.seed), done.state.params))
  got = policy.load_weights(str(tmp_path), model)  # in full, as the base's file is
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), got, merged)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"model.lora.rank": -1}, r"model.lora.rank: expected 0 \(all .* trained\) or a rank"),
    ({"model.lora.alpha": 0.0}, "model.lora.alpha: expected a positive number, got 0.0. Try 32"),
    ({"judge.name": "gemma", "judge.model.lora.rank": 4}, "judge.model.lora.rank: expected 0"),
  ],
)
def test_bad_fields_are_named(changes, message):
  with pytest.raises(ValueError, match=message):
    resolve(tiny.train(changes))


def test_a_policy_that_is_no_network_has_no_adapters():
  rule = update.make_update(tiny.train(CHANGES), None)
  with pytest.raises(ValueError, match=r"expected a Gemma's projections .* got \['logits'\]"):
    rule.init({"logits": np.zeros((2, 3))})


@pytest.mark.parametrize(
  "loss", ["sft", *(pytest.param(loss, marks=pytest.mark.slow) for loss in ("judge", "reward"))]
)
def test_a_fit_trains_adapters_and_exports_a_plain_model(loss, tmp_path, monkeypatch):
  c = test_fit.settings(tmp_path, loss)
  c.export, c.export_dtype = str(tmp_path / "out.safetensors"), "float32"
  c.model.lora.rank, c.model.weights = RANK, str(tmp_path / "base.safetensors")
  model = gemma.preset("tiny", num_embed=1024)
  weights.save(c.model.weights, normal(gemma.shapes(model), 0), model, "float32", {})
  assemble, kept = fit.set_up, []
  monkeypatch.setattr(fit, "set_up", lambda config: kept.append(assemble(config)) or kept[0])
  figures = fit.run(c, tmp_path / "run", progress=False)
  first = test_fit.lines(tmp_path / "run")[0]
  assert figures["eval/loss"] < 0.8 * first["eval/loss"]
  setup = kept[0]
  assert size(setup.state_spec) < 0.4 * size(gemma.shapes(model)), (
    "two moments of adapters among them"
  )
  got = weights.load(c.export, model)
  assert jax.tree.structure({**got, "head": 0}) == jax.tree.structure(
    {**gemma.shapes(model), "head": 0}
  )
  again = fit._floats(setup.evaluate(got))
  assert again == pytest.approx(figures, rel=1e-5)
  # The adapters that were trained say the same as the file they were merged into.
  trained, _ = checkpoint.restore_part(
    tmp_path / "run", "params", setup.state_spec.params, best=True
  )
  assert fit._floats(setup.evaluate(setup.join(trained))) == pytest.approx(figures, rel=1e-3)
  if loss == "reward":
    head = setup.initial_state().params["head"]["w"]
    assert np.all(np.not_equal(head, got["head"]["w"])), "the head is trained itself"
  else:
    from_run = policy.load_weights(f"{tmp_path / 'run'}@params:best", model)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), from_run, got)


def test_a_stopped_fit_of_adapters_goes_on_as_if_never_stopped(tmp_path, monkeypatch):
  c = test_fit.settings(tmp_path)
  c.model.lora.rank = RANK
  setup = fit.set_up(resolve(c))
  calls, step = [], setup.train_step

  def stopped(state, batch):
    if len(calls) == 15:
      raise RuntimeError("killed")
    calls.append(1)
    return step(state, batch)

  monkeypatch.setattr(fit, "set_up", lambda config: setup._replace(train_step=stopped))
  with pytest.raises(RuntimeError, match="killed"):
    fit.run(c, tmp_path / "cut", progress=False)
  monkeypatch.setattr(fit, "set_up", lambda config: setup)
  states = []
  for name in ("cut", "whole"):
    fit.run(c, tmp_path / name, progress=False)
    states.append(checkpoint.restore_part(tmp_path / name, "params", setup.state_spec.params)[0])
  test_train.assert_same(*states)

"""Online runs of adapters: players, copies, resuming, exports, and the jobs that load them."""

import dataclasses
import functools
import json
import shutil

import host_processes
import host_program
import jax
import numpy as np
import optax
import pytest
import tiny
import tiny_runs
import workdirs
from lora_trees import CHANGES, RANK, forward, normal, size

import nash_jax
from nash_jax import policy, train, update, weights
from nash_jax.config import resolve
from nash_jax.jobs import arena, sample
from nash_jax.models import gemma, lora
from nash_jax.weights import names


@pytest.fixture(scope="module")
def setup():
  """A run of adapters whose reference is refreshed, set up."""
  return train.set_up(resolve(tiny.train(CHANGES)))


@pytest.fixture(scope="module")
def finished(setup, tmp_path_factory):
  """The workdir and the last state of its six steps."""
  setup.programs.train_step.clear_cache()
  workdir = tmp_path_factory.mktemp("lora") / "whole"
  return workdir, tiny_runs.start(setup, setup.config, workdir)


def test_all_that_training_holds_beside_the_base_is_adapters(setup, assembled):
  model = gemma.preset("tiny", num_embed=1024)
  sizes, count = names.sizes(model, layer=0), 0
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


def test_the_step_compiles_once(finished):
  assert finished[1].compilations == 1


def test_a_step_moves_adapters_and_nothing_else(setup):
  before = jax.tree.map(np.asarray, (setup.initial_state(), setup.reference))
  fresh = setup.initial_state()
  state, values = setup.programs.train_step(
    fresh, setup.reference, jax.device_put(tiny_runs.batch(setup), setup.shardings.batch)
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
def logprobs_by_player(setup):
  """From a state to log-probabilities of fixed responses by player."""
  logprobs, _ = policy.make_policy(
    setup.config.model, setup.config.sampling, setup.tokenizer, gemma.preset("tiny", num_embed=1024)
  )
  rule, x = update.make_update(setup.config, logprobs), tiny_runs.batch(setup)

  @jax.jit
  def run(state, ref):
    players = rule.players(state, ref)
    players["policy of mixture"], players["reference of mixture"] = players.pop("mixture")
    return {
      name: logprobs(p, prompts=x.prompts, tokens=x.responses.tokens, mask=x.responses.mask)[0]
      for name, p in players.items()
    }

  return lambda state: run(state, setup.reference)


def test_players_share_the_base_and_differ_by_their_adapters(setup, finished, logprobs_by_player):
  # As before a first refresh.
  state = finished[1].state.replace(copies=setup.initial_state().copies)
  logp = logprobs_by_player(state)
  plain = logprobs_by_player(setup.initial_state())["policy"]
  np.testing.assert_array_equal(logp["reference"], plain)
  np.testing.assert_array_equal(logp["reference of mixture"], plain)
  np.testing.assert_array_equal(logp["policy of mixture"], logp["policy"])
  for one, other in (("policy", "reference"), ("policy", "target"), ("target", "reference")):
    assert np.max(np.abs(np.subtract(logp[one], logp[other]))) > 1e-3, (one, other)
  rule = update.make_update(resolve(tiny.train({"model.lora.rank": RANK})), tiny_runs.no_logprobs)
  assert (
    rule.players(setup.initial_state().replace(copies={}), setup.reference)["reference"]
    is setup.reference
  )


def test_a_refreshed_reference_has_adapters_of_its_own(finished, logprobs_by_player):
  state = finished[1].state
  kept = state.copies["reference"]
  assert jax.tree.structure(kept) == jax.tree.structure(state.params)
  jax.tree.map(np.testing.assert_array_equal, kept, state.params)  # six steps: refreshed just now
  logp = logprobs_by_player(state)
  np.testing.assert_array_equal(logp["reference"], logp["policy"])
  kl = [line["kl_to_reference"] for line in workdirs.lines(finished[0])[:-1]]
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
    state, setup.reference, jax.device_put(tiny_runs.batch(setup), setup.shardings.batch)
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


@pytest.mark.slow
def test_eight_devices_train_adapters_as_one_does(setup, tmp_path):
  one = dataclasses.replace(setup, config=resolve(tiny.train({**CHANGES, "steps": 2})))
  eight = host_processes.measured(1, 8, tmp_path / "eight", {**CHANGES, **tiny.EIGHT, "steps": 2})
  host_processes.assert_alike(eight, host_program.measure(one, tmp_path / "one"))
  eight, one = (  # and one device reads what eight have written
    policy.load_weights(f"{tmp_path / name}@target", gemma.preset("tiny", num_embed=1024))
    for name in ("eight", "one")
  )
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4), eight, one)


def test_a_killed_run_goes_on_as_if_never_killed(setup, finished, tmp_path):
  sample = workdirs.at(6, workdirs.kill, setup.programs.sample)
  with pytest.raises(RuntimeError, match="killed"):
    tiny_runs.start(setup, setup.config, tmp_path, sample=sample)
  done = tiny_runs.start(setup, setup.config, tmp_path)
  workdirs.assert_same(done.state, finished[1].state)
  assert workdirs.lines(tmp_path) == workdirs.lines(finished[0])


@pytest.fixture(scope="module")
def merged(setup, finished, plain):
  """The run's policy and target as plain models."""
  state = finished[1].state
  return {part: plain(setup.reference, getattr(state, part)) for part in ("params", "target")}


def test_a_runs_folder_gives_plain_models(setup, finished, merged):
  model = gemma.preset("tiny", num_embed=1024)
  for spec, part in (("", "params"), ("@params:6", "params"), ("@target", "target")):
    got = policy.load_weights(f"{finished[0]}{spec}", model)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), got, merged[part])
  earlier = policy.load_weights(f"{finished[0]}@params:3", model)
  moved = jax.tree.map(lambda a, b: np.max(np.abs(np.subtract(a, b))), earlier, merged["params"])
  assert max(jax.tree.leaves(moved)) > 1e-3


def test_adapters_whose_base_has_changed_are_refused(finished, tmp_path):
  """In another base they would be another policy."""
  folder, c = tmp_path / "run", tiny.train(CHANGES)
  shutil.copytree(finished[0], folder)
  ran = json.loads((folder / "config.json").read_text())
  (folder / "config.json").write_text(json.dumps({**ran, "seed": 1}))
  model = gemma.preset("tiny", num_embed=1024)
  with pytest.raises(
    ValueError, match=r"model.weights of .*run: expected what the run started with"
  ):
    policy.load_weights(str(folder), model)
  c.seed, c.checkpoint.allow = 1, ("seed",)
  with pytest.raises(
    ValueError, match=r"model.weights of .*run: expected what the run started with"
  ):
    train.run(c, folder)
  (folder / "base.json").unlink()
  policy.load_weights(str(folder), model)


def test_exports_are_plain_models_with_the_policys_logits(setup, finished, merged, tmp_path):
  model, (_, join) = gemma.preset("tiny", num_embed=1024), lora.init_and_join(setup.config)
  run = forward(model, "float32")
  expected = run(jax.jit(join)(setup.reference, finished[1].state.params))
  weights.save(str(tmp_path / "own.safetensors"), merged["params"], model, "float32", {})
  weights.export(str(tmp_path / "theirs"), merged["params"], model, "float32")
  for name in ("own.safetensors", "theirs"):
    got = run(weights.load(str(tmp_path / name), model))
    np.testing.assert_allclose(got, expected, atol=1e-4)
  assert np.max(np.abs(np.subtract(run(setup.reference), expected))) > 1e-2


def test_the_arena_and_sampling_load_a_runs_policies(setup, finished, merged, tmp_path, capsys):
  file = str(tmp_path / "merged.safetensors")
  weights.save(file, merged["params"], gemma.preset("tiny", num_embed=1024), "float32", {})
  c = nash_jax.config.arena()
  for part in ("model", "prompts", "sampling"):
    c[part] = setup.config[part].copy_and_resolve_references()  # adapters are of training alone
  c.update({"max_prompts": 4, "resamples": 10, "texts": 1, "base": "file", "select_judge": "own"})
  specs = {"file": file, "run": str(finished[0]), "target": f"{finished[0]}@target"}
  c.policies = {name: {"weights": spec, "best_of": 1} for name, spec in specs.items()}
  c.judges = {"own": setup.config.judge.to_dict()}
  policies = arena.run(c, tmp_path / "arena")["policies"]
  assert abs(policies["run"]["kl_to_reference"]) < 1e-4
  assert abs(policies["target"]["kl_to_reference"]) > 1e-3
  capsys.readouterr()

  c, printed = nash_jax.config.sample(), []
  c.model = setup.config.model.copy_and_resolve_references()
  c.sampling.max_tokens, c.prompt = 8, "Once"
  for spec in (str(finished[0]), file):
    c.model.weights = spec
    sample.run(c)
    printed.append(capsys.readouterr().out)
  assert printed[0] == printed[1]
  assert "Once ▸" in printed[0]


@pytest.mark.slow
def test_the_base_is_held_in_the_type_that_is_computed_with(tmp_path):
  c = tiny.train({**CHANGES, "model.dtype": "bfloat16", "steps": 2, "checkpoint.every": 2})
  setup = train.set_up(resolve(c))
  done = tiny_runs.start(setup, c, tmp_path)
  assert {str(x.dtype) for x in jax.tree.leaves(setup.reference)} == {"bfloat16"}
  learned = (done.state.params, done.state.target, optax.tree.get(done.state.opt_state, "mu"))
  assert {str(x.dtype) for x in jax.tree.leaves(learned)} == {"float32"}
  lines = workdirs.lines(tmp_path)
  assert abs(lines[1]["kl_to_reference"]) > 1e-3
  assert all(line["logp_gap"] < 0.05 for line in lines[:-1])
  model, (_, join) = gemma.preset("tiny", num_embed=1024), lora.init_and_join(setup.config)
  merged = lora.merge(join(policy.load_weights("", model, c.seed), done.state.params))
  got = policy.load_weights(str(tmp_path), model)  # in full, as the base's file is
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), got, merged)

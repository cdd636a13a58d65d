"""Policies of an arena that are other policies, realigned; and what cannot be one is refused."""

import json

import jax
import numpy as np
import pytest
from arenas import SMALL, small
from commands import command

import nash_jax
from nash_jax import policy, report, weights
from nash_jax.config import describe, resolve
from nash_jax.configs import realign
from nash_jax.jobs import arena, sample
from nash_jax.models import gemma
from nash_jax.run.checkpoint import differences


def realigned(files, **realign):
  """A small arena in which a policy is realigned by these λ."""
  config = small(files)
  config.samples, config.prompts.batch_size = 4, 25
  config.policies = {name: config.policies[name] for name in ("base", "other")}
  config.policies.third = {**config.policies.other, "weights": str(files / "third.safetensors")}
  config.policies.mixed = {**config.policies.base, "realign": realign}
  return config


@pytest.fixture(scope="module")
def third(files):
  """A third policy."""
  model = gemma.preset("tiny", **SMALL)
  params = jax.tree.map(
    lambda x: np.random.default_rng(2).normal(0, 0.3, x.shape), gemma.shapes(model)
  )
  weights.save(str(files / "third.safetensors"), params, model, "float32", {})


@pytest.mark.slow
def test_an_arena_scores_a_mixture_as_it_was_sampled(files, third, tmp_path, monkeypatch):
  """At λ = 0 it is the reference; KL and the share of tokens outside the base's grow with λ."""
  found, evaluate = [], arena.evaluate
  monkeypatch.setattr(arena, "evaluate", lambda *args: found.append(args[-1]) or evaluate(*args))
  config = realigned(files, other=0.5, third=0.7)
  for name, strength in (("none", 0.0), ("half", 0.5), ("beyond", 2.0)):
    config.policies[name] = {**config.policies.base, "realign": {"other": strength, "third": 0.0}}
  result = arena.run(config, tmp_path)
  (judged,), policies = found, result["policies"]
  places = {name: slice(4 * i, 4 * i + 4) for i, name in enumerate(config.policies)}
  model = gemma.preset("tiny", **SMALL)
  tokenizer, _ = policy.tokenizer_and_model(config.model)
  logprobs = policy.make_policy(config.model, config.sampling, tokenizer, model).logprobs
  base = weights.load(config.policies.base.weights, model)
  for name in ("mixed", "half", "beyond"):
    y = jax.tree.map(lambda x, name=name: x[:, places[name]], judged.responses)
    own, _ = jax.jit(logprobs)(base, prompts=judged.prompts, tokens=y.tokens, mask=y.mask)
    expected = np.sum(y.logp - own, axis=-1)
    np.testing.assert_allclose(judged.log_ratios[name], expected, atol=1e-3)
  kl = {name: policies[name]["kl_to_reference"] for name in policies}
  assert abs(kl["none"]) < 1e-5 < 0.01 < kl["half"] < kl["beyond"]
  outside = {name: policies[name]["outside_base"] for name in policies}
  assert outside["base"] < 0.05 < outside["beyond"]
  assert policies["mixed"]["realign"] == {"other": 0.5, "third": 0.7}
  assert policies["base"]["realign"] is None
  page = report.arena(result)
  assert "that together have .99" in page
  assert f"beyond {report.number(outside['beyond'])}" in page


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"realign": {"other": -0.5}}, r"mixed.realign.other: expected a number in \[0, 1000\], got -"),
    ({"realign": {"other": float("nan")}}, r"mixed.realign.other: expected a number in .*got nan"),
    ({"realign": {"other": "x"}}, r"mixed.realign.other: expected a number in .*got 'x'"),
    ({"realign": {"othr": 0.5}}, "policies of weights alone: got 'othr', .*did you mean 'other'"),
    ({"realign": {"mixed": 0.5}}, "got 'mixed', expected one of base, other, third"),
    ({"realign": 0.5}, "mixed.realign: expected a group of fields, got 0.5"),
    ({"outputs": "x.json"}, "mixed.realign: expected nothing with outputs"),
  ],
)
def test_what_is_no_realignment_is_refused(files, changes, message):
  config = realigned(files, other=0.5)
  config.policies.mixed = {**config.policies.mixed, **changes}
  config.prompts.task = "alpaca_eval" if "outputs" in changes else config.prompts.task
  with pytest.raises(ValueError, match=message):
    resolve(config)


def test_the_best_of_n_is_no_policy_to_realign_towards(files):
  config = realigned(files, other=0.5)
  config.policies.other.best_of = 2
  with pytest.raises(ValueError, match=r"other\.best_of: expected 1, to realign"):
    resolve(config)


def run_of(folder, tokenizer, rows):
  """What the workdir of a run says of its vocabulary."""
  (folder / "checkpoints" / "00000001").mkdir(parents=True)
  model = {"preset": "tiny", "changes": {"num_embed": rows}}
  (folder / "config.json").write_text(json.dumps({"model": model}))
  inputs = {"model.tokenizer": {"x": tokenizer}} if tokenizer else {}
  (folder / "inputs.json").write_text(json.dumps(inputs))
  return str(folder)


def test_models_of_other_vocabularies_are_refused_before_weights_load(
  files, third, tmp_path, monkeypatch
):
  wide = gemma.preset("tiny", **{**SMALL, "num_embed": 512})
  params = jax.tree.map(lambda x: np.zeros(x.shape), gemma.shapes(wide))
  weights.save(str(tmp_path / "wide.safetensors"), params, wide, "float32", {})
  monkeypatch.setattr(arena, "load_weights_and_step", None)
  monkeypatch.setattr(sample, "load_weights", None)
  for spec, message in (
    (str(tmp_path / "wide.safetensors"), r"embedding.*\(1024, .*got \(512, "),
    (run_of(tmp_path / "a", "sha256:0", 1024), "a: model.tokenizer: expected a run with .*one voc"),
    (run_of(tmp_path / "b", "", 512), "b: vocabulary: expected 1024 rows, got 512.*one vocabulary"),
  ):
    config = realigned(files, other=0.5)
    config.policies.other.weights = spec
    with pytest.raises(ValueError, match=message):
      arena.run(config, tmp_path / "arena")
    config = nash_jax.config.sample()
    config.model.preset, config.model.changes = "tiny", SMALL
    config.model.weights = str(files / "one.safetensors")
    config.reference, config.realign, config.prompt = spec, 2.0, "Once"
    with pytest.raises(ValueError, match=message):
      sample.run(config)


def test_an_arena_from_before_policies_could_be_realigned_has_the_same_config(files):
  config = describe(resolve(small(files)))
  old = json.loads(json.dumps(config))
  for entry in old["policies"].values():
    del entry["realign"]
  assert differences(old, config) == {}
  config["policies"]["twin"]["realign"] = {"other": 0.5}
  assert "policies.twin.realign.other" in differences(old, config)


@pytest.mark.slow
def test_the_configs_smoke_trains_again_and_realigns(tmp_path):
  runs = command("compare", "--config=realign:retrain,smoke", "--workdir=runs/realign_smoke/runs",
                 folder=tmp_path)  # fmt: skip
  assert runs.returncode == 0, runs.stderr[-3000:]
  done = command("arena", "--config=realign:smoke", "--workdir=arena", folder=tmp_path)
  assert done.returncode == 0, done.stderr[-3000:]
  policies = json.loads((tmp_path / "arena" / "arena.json").read_text())["policies"]
  assert {"base", "trained", "realigned 4", "retrained 1/2"} <= {*policies}


@pytest.mark.parametrize("run", ["runs/smoke", "runs/my_smoke"])
def test_a_run_whose_folder_is_called_smoke_is_compared_in_full(run):
  whole, small = realign.get_config(run), realign.get_config(f"{run},smoke")
  assert whole.policies.trained.weights == small.policies.trained.weights == run
  assert (whole.max_prompts, small.max_prompts) == (0, 12)
  assert realign.get_config("smoke").policies.trained.weights.startswith("runs/realign_smoke/")

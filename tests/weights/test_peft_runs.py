"""Adapters of runs: exported as PEFT's folders, and runs that start from such."""

import functools
import json

import exported_runs
import jax
import numpy as np
import pytest
import tiny
from peft_folders import ALPHA, RANK, change, drawn, only_some, write
from weight_files import MODELS, random, same

from nash_jax import policy, train
from nash_jax.config import resolve
from nash_jax.models import lora
from nash_jax.run import checkpoint
from nash_jax.weights import adapters


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
  """A LoRA run that was drawn, and its target's adapters: (workdir, PEFT's folder, its state)."""
  folder = tmp_path_factory.mktemp("run")
  state = exported_runs.make_run(folder, {"model.lora.rank": RANK, "model.lora.alpha": ALPHA})
  exported_runs.write(f"{folder / 'run'}@target", str(folder / "adapters"), adapter=True)
  return folder / "run", folder / "adapters", state


def test_a_runs_adapters_are_exported_with_a_card(exported):
  workdir, folder, state = exported
  found = {path.name for path in folder.iterdir()}
  assert found == {"README.md", "adapter_config.json", "adapter_model.safetensors", "nash_jax.json"}
  same(adapters.read(str(folder), exported_runs.MODEL, RANK, ALPHA / RANK), state["target"])
  card = (folder / "README.md").read_text()
  assert 'library_name: "peft"' in card
  assert 'base_model_relation: "adapter"' in card
  assert f"--run={workdir}@target --to={folder} --adapter\n" in card
  base = json.loads((workdir / "config.json").read_text())["model"]["weights"]
  assert adapters.base_of(str(folder)) == base
  assert f"PEFT needs the base as a Hugging Face folder, which {base} is not" in card


def test_what_adapters_do_not_have_is_refused(exported, tmp_path):
  for field, value in (("dtype", "bfloat16"), ("tokenizer", "x.model")):
    with pytest.raises(ValueError, match=f"{field}: expected no value with --adapter, got"):
      exported_runs.write(str(exported[0]), str(tmp_path / "x"), adapter=True, **{field: value})


def test_a_run_of_the_whole_model_has_no_adapters(tmp_path):
  exported_runs.make_run(tmp_path)
  with pytest.raises(ValueError, match=r"run: expected one with model.lora.rank > 0, got"):
    exported_runs.write(str(tmp_path / "run"), str(tmp_path / "out"), adapter=True)


def test_a_folder_of_adapters_is_a_policy_wherever_weights_are_named(exported, tmp_path):
  workdir, folder, _ = exported
  got = policy.load_weights(str(folder), exported_runs.MODEL)
  expected = policy.load_weights(f"{workdir}@target", exported_runs.MODEL)
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), got, expected)
  write_to = tmp_path / "adapters"
  write_to.mkdir()
  write(write_to, "hf_gemma2")
  with pytest.raises(ValueError, match=r"base_model_name_or_path: expected a path that exists"):
    policy.load_weights(str(write_to), MODELS["hf_gemma2"])


def test_a_run_starts_from_the_adapters_that_it_is_given(exported, assembled, monkeypatch):
  workdir, folder, state = exported
  prompts = assembled.train_prompts, assembled.held_out
  monkeypatch.setattr(train, "load_prompts", lambda *_: prompts)
  base = json.loads((workdir / "config.json").read_text())["model"]["weights"]
  lora_fields = {"rank": RANK, "alpha": ALPHA, "init": str(folder)}
  changes = {f"model.lora.{name}": value for name, value in lora_fields.items()}
  setup = train.set_up(resolve(tiny.train({"model.weights": base, **changes})))
  start = setup.initial_state()
  same(start.params, state["target"])
  same(start.target, state["target"])
  assert "lora" not in setup.reference["layers"]["0"], "the reference is the base"


def test_a_policy_does_not_start_from_a_reward_model(tmp_path):
  write(tmp_path, "hf_gemma2", tree={**drawn("hf_gemma2"), "head": {"w": np.ones(32, np.float32)}})
  c = tiny.train({"model.lora.rank": RANK, "model.lora.init": str(tmp_path)})
  with pytest.raises(ValueError, match=r"model.lora.init: expected adapters of a language model"):
    policy.read_start(c.model, MODELS["hf_gemma2"])
  start = policy.read_start(c.model, MODELS["hf_gemma2"], head=True)
  assert "head" in start(random(MODELS["hf_gemma2"]))


def test_columns_that_others_lack_are_drawn_so_that_they_learn(tmp_path):
  """And change nothing yet."""
  model, base = MODELS["hf_gemma2"], random(MODELS["hf_gemma2"], 1)
  write(tmp_path, "hf_gemma2")
  change(tmp_path, only_some)
  read = adapters.read(str(tmp_path), model, RANK + 1, ALPHA / RANK)
  made = lora.init(jax.random.key(0), lora.join(base, read, 1.0), RANK + 1)
  fresh = lora.init(jax.random.key(0), base, RANK + 1)
  assert jax.tree.map(np.shape, made) == jax.tree.map(np.shape, fresh)
  for path, x in jax.tree.leaves_with_path(made):
    given, new = (
      np.asarray(functools.reduce(lambda tree, key: tree[key.key], path, tree))
      for tree in (read, fresh)
    )
    kept = RANK if "q_einsum" in str(path) or "kv_einsum" in str(path) else 0
    if path[-1].key == "b":
      np.testing.assert_array_equal(x, given)
      continue
    np.testing.assert_array_equal(x[..., :kept], given[..., :kept])
    np.testing.assert_array_equal(x[..., kept:], new[..., kept:])
    assert np.all(np.any(np.asarray(x) != 0, axis=-2))


def test_what_a_run_cannot_start_from_is_said_before_weights_load(exported, tmp_path, monkeypatch):
  monkeypatch.setattr(train, "load_weights", lambda *args, **options: pytest.fail("loaded"))
  _, folder, _ = exported
  for changes, message in (
    ({"model.lora.init": str(folder)}, "model.lora.init: expected none if lora.rank = 0"),
    ({"model.lora.rank": 2, "model.lora.init": str(folder)}, "a rank of at most 2, got 3"),
    ({"model.lora.rank": 2, "model.lora.init": "none"}, "model.lora.init: expected a file that"),
    ({"model.lora.rank": 2, "model.lora.init": str(tmp_path)}, "expected PEFT's config of LoRA"),
  ):
    with pytest.raises(ValueError, match=message):
      train.run(tiny.train(changes), tmp_path / "run", progress=False)


def test_runs_from_before_there_were_starts_are_the_same_runs():
  saved = {"job": "compare", "base": {"model": {"x": 1}}, "model": {"lora": {"rank": 2}}}
  new = {
    "job": "compare",
    "base": {"model": {"x": 1, "lora": {"init": ""}}},
    "model": {"lora": {"rank": 2, "init": ""}},
  }
  assert checkpoint.differences(saved, new) == {}
  new["model"]["lora"]["init"] = "other"
  assert list(checkpoint.differences(saved, new)) == ["model.lora.init"]

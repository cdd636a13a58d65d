"""The inputs of an online run: what changed in between is named at a resume."""

import shutil

import jax
import pytest
import tiny
from jax import numpy as jnp
from workdirs import assert_same, at, kill, lines

from nash_jax import train, weights
from nash_jax.config import resolve
from nash_jax.models import gemma
from nash_jax.run import inputs


def test_a_judge_that_is_the_reference_is_held_once(assembled, tmp_path):
  """The same weights by another name are two trees, of the same numbers and sums."""
  model_config, files = gemma.preset("tiny", num_embed=1024), [tmp_path / "a.safetensors"]
  weights.save(str(files[0]), assembled.reference, model_config, "float32", {})
  files.append(shutil.copy(files[0], tmp_path / "b.safetensors"))

  def set_up(judge_file, **changes):
    own = {"judge.name": "gemma", "judge.model.weights": str(judge_file)}
    c = tiny.train({"model.weights": str(files[0]), **own, **changes})
    return train.set_up(resolve(c))

  once, twice = map(set_up, files)
  pairs = [
    list(zip(*map(jax.tree.leaves, (x.judge.params, x.reference)), strict=True))
    for x in (once, twice)
  ]
  assert all(a is b for a, b in pairs[0])
  assert not any(a is b for a, b in pairs[1])
  assert_same(once.judge.params, twice.judge.params)
  sums = [{*x.inputs()["judge.model.weights"].values()} for x in (once, twice)]
  assert sums[0] == sums[1]
  other_type = set_up(files[0], **{"judge.model.dtype": "bfloat16"})
  assert jax.tree.leaves(other_type.judge.params)[0].dtype == "bfloat16"


def test_prompts_that_changed_are_named_at_a_resume(changed, assembled, tmp_path):
  path = tmp_path / "p.jsonl"
  path.write_text('{"prompt": "Lily saw a kite."}\n')
  fields = {"prompts.path": str(path)}
  with pytest.raises(RuntimeError, match="killed"):
    changed(tmp_path / "run", fields, sample=at(5, kill, assembled.programs.sample))
  with path.open("a") as file:
    file.write('{"prompt": "A new line."}\n')
  with pytest.raises(ValueError, match=r"prompts.path: .*p.jsonl\n.*'prompts.path'"):
    changed(tmp_path / "run", fields)
  assert lines(tmp_path / "run")[-1]["step"] == 3
  done = changed(tmp_path / "run", {**fields, "checkpoint.allow": ("prompts.path",)})
  assert int(done.state.step) == 6


def test_every_input_that_a_run_hangs_on_is_summed(assembled, tmp_path):
  """Each file in turn is changed: its config field, and no other, has another sum."""
  files = {
    "prompts.path": "prompts.jsonl", "prompts.held_out_path": "held_out.jsonl",
    "model.tokenizer": "tokenizer.model", "judge.table": "game.npy",
    "judge.template": "template.txt", "judge.model.tokenizer": "judge_tokenizer.model",
  }  # fmt: skip
  files = {field: tmp_path / name for field, name in files.items()}
  for path in files.values():
    path.write_text("1")
  config = tiny.train({field: str(path) for field, path in files.items()})
  params, parts = assembled.judge.params, (assembled.train_prompts, assembled.held_out)

  def found(judge):
    config.judge.name = judge
    return inputs.of_training(config, params, *parts)

  for judge in ("population", "table", "table_reward", "http", "gemma_text"):
    before = found(judge)
    read = {"prompts.path", "prompts.held_out_path", "model.tokenizer"}
    read |= {"judge.table"} if "table" in judge else set()
    read |= {"judge.template"} if judge in ("http", "gemma_text") else set()
    read |= {"judge.model.tokenizer"} if judge == "gemma_text" else set()
    assert set(before) == read
    for field in read:
      files[field].write_text("2")
      after = found(judge)
      assert {name for name in read if before[name] != after[name]} == {field}
      files[field].write_text("1")
  config.judge.name, config.judge.template = "gemma", "stories"
  config.judge.model.weights = "judge.safetensors"
  sums = [
    inputs.of_training(config, {"w": jnp.float32([x, 2])}, *parts)["judge.model.weights"]
    for x in (1, 1, 3)
  ]
  assert sums[0] == sums[1] != sums[2]
  config.prompts.task = "registered elsewhere"
  by_content = inputs.of_training(config, params, *parts)
  assert by_content == inputs.of_training(config, params, *parts)
  other = inputs.of_training(config, params, assembled.held_out, assembled.held_out)
  assert {name for name in other if other[name] != by_content[name]} == {"prompts.task"}


def test_a_run_begun_under_another_draw_is_refused(changed, assembled, tmp_path, monkeypatch):
  """Of a large vocabulary: a run from before ids were drawn in two levels would change its law."""
  sampling = assembled.programs.sample
  for folder, most in (("before", 2000), ("since", 1000)):
    monkeypatch.setattr(inputs.sampler, "MOST_AT_ONCE", most)  # of 1,024 ids
    with pytest.raises(RuntimeError, match="killed"):
      changed(tmp_path / folder, {}, sample=at(5, kill, sampling))
  assert int(changed(tmp_path / "since", {}).state.step) == 6
  with pytest.raises(ValueError, match=r"sampling.draw: an id of a large vocabulary\n"):
    changed(tmp_path / "before", {})
  done = changed(tmp_path / "before", {"checkpoint.allow": ("sampling.draw",)})
  assert int(done.state.step) == 6

"""The run state on disk: bit for bit, and never of another run."""

import copy
import json
import shutil

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from saved_states import CONFIG, abstract, assert_same, saved, start, state

from nash_jax.run import checkpoint
from nash_jax.run.checkpoint import restore_part


@pytest.mark.parametrize("target", [True, False])
def test_a_state_comes_back_bit_for_bit(tmp_path, target):
  checkpoints = start(tmp_path)
  assert checkpoints.restore(state(0, target=target)) is None
  assert checkpoints.last_good() is None
  whole = state(7, target=target)
  whole.params["layer"][0]["w"] = jnp.asarray([[-0.0, 1e-42, 3e38]])  # signs and subnormals too
  checkpoints.save(7, whole)
  for like in (whole, abstract(whole)):
    got, step = checkpoints.restore(like)
    assert step == checkpoints.last_good() == 7
    assert_same(got, whole)
  checkpoints.close()


def test_buffers_may_be_donated_as_soon_as_save_returns(tmp_path):
  spoil = jax.jit(lambda tree: jax.tree.map(lambda x: -x - 1, tree), donate_argnums=0)
  checkpoints, x = start(tmp_path), {"params": {"w": jnp.arange(200_000.0)}}
  checkpoints.save(1, x)
  after = spoil(x)
  checkpoints.save(2, after)
  checkpoints.wait()
  (first, _), (second, _) = (restore_part(tmp_path, "params", after["params"], s) for s in (1, 2))
  np.testing.assert_array_equal(first["w"], np.arange(200_000.0))
  np.testing.assert_array_equal(second["w"], -np.arange(200_000.0) - 1)
  checkpoints.close()


def test_the_last_checkpoints_and_the_best_are_kept(tmp_path):
  checkpoints = start(tmp_path, keep=2)
  for step, score in enumerate([0.1, 0.9, 0.9, float("nan"), 0.2, None]):
    checkpoints.save(step, state(step), score)
  checkpoints.close()
  # The best is the later of equals; a score that is no number is none.
  assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == [2, 4, 5]
  like = state(0).params
  for kwargs, step in (({}, 5), ({"best": True}, 2), ({"step": 4}, 4)):
    got, found = restore_part(tmp_path, "params", like, **kwargs)
    assert found == step
    assert_same(got, state(step).params)


def test_a_part_is_read_without_the_others(tmp_path):
  folder = saved(tmp_path, 3)
  for other in ("target", "opt_state", "step"):
    shutil.rmtree(folder / "00000003" / other)
  got, step = restore_part(tmp_path, "params", abstract(state(0).params))
  assert step == 3
  assert_same(got, state(3).params)


def test_parts_that_are_not_there_are_named(tmp_path):
  like = state(0).params
  with pytest.raises(ValueError, match="expected one, found none"):
    restore_part(tmp_path, "params", like)
  saved(tmp_path, 3)
  with pytest.raises(ValueError, match=r"expected 4, found \[3\]"):
    restore_part(tmp_path, "params", like, step=4)
  with pytest.raises(ValueError, match=r"expected the best by a score, found \[3\]"):
    restore_part(tmp_path, "params", like, best=True)
  with pytest.raises(ValueError, match=r"parms.layer.0.w: expected float32\[3, 4\], got absent"):
    restore_part(tmp_path, "parms", like)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_state_that_is_not_finite_is_never_saved_nor_displaces_a_good_one(tmp_path, bad):
  checkpoints = start(tmp_path, keep=1)
  checkpoints.save(1, state(1))
  broken = state(2)
  broken.params["layer"][1]["w"] = broken.params["layer"][1]["w"].at[2, 1].set(bad)
  with pytest.raises(FloatingPointError, match=r"params.layer.1.w is not finite after step 2"):
    checkpoints.save(2, broken)
  assert checkpoints.last_good() == 1
  got, step = checkpoints.restore(state(0))
  assert step == 1
  assert_same(got, state(1))
  checkpoints.close()


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda s: s.replace(target=None), r"target.layer.0.w: expected absent, got float32\[3, 4\]"),
    (
      lambda s: s.replace(params={**s.params, "z": s.step}),
      r"params.z: expected int32\[\], got absent",
    ),
    (lambda s: s.replace(step=jnp.zeros(2)), r"step: expected float32\[2\], got int32\[\]"),
  ],
)
def test_the_first_leaf_that_differs_is_named(tmp_path, change, message):
  saved(tmp_path, 1)
  checkpoints = start(tmp_path)
  with pytest.raises(ValueError, match=message):
    checkpoints.restore(change(state(0)))
  assert checkpoints.restore(state(0))[1] == 1, "a misfit is no damage"
  checkpoints.close()


def test_checksums_tell_states_apart_whatever_the_dtype():
  rng = np.random.default_rng(0)
  for dtype in (bool, np.int8, np.int32, jnp.bfloat16, np.float16, np.float32):
    x = rng.integers(0, 2, (4, 6)).astype(dtype)
    changed = x.copy()
    changed[2, 3] = 1 - x[2, 3]
    variants = [x, changed, np.roll(x, 1, axis=0), np.roll(x, 1, axis=1)]
    assert len({v.tobytes() for v in variants}) == 4
    assert len({int(checkpoint._checksums({"x": jnp.asarray(v)})["x"][0]) for v in variants}) == 4


def test_another_config_is_refused_field_by_field(tmp_path):
  config = copy.deepcopy(CONFIG)
  start(tmp_path, config=config).close()
  config["checkpoint"]["allow"] = []  # a list is a tuple, once read from JSON
  start(tmp_path, config=config).close()
  config["algorithm"]["beta"], config["steps"] = 0.05, 9
  with pytest.raises(ValueError, match="another config") as error:
    start(tmp_path, config=config, allow=("eta",))
  assert "algorithm.beta: 0.1 there, 0.05 here" in str(error.value)
  assert str(error.value).endswith("add --config.checkpoint.allow=\"('eta', 'algorithm.beta')\"")
  assert "steps: 3" not in str(error.value)
  assert json.loads((tmp_path / "config.json").read_text())["steps"] == 3, (
    "a refusal writes nothing"
  )
  config["checkpoint"]["allow"] = ("algorithm",)
  start(tmp_path, config=config, allow=("algorithm",)).close()
  assert json.loads((tmp_path / "config.json").read_text())["algorithm"]["beta"] == 0.05
  assert "jax" in json.loads((tmp_path / "versions.json").read_text())


def test_a_workdir_that_cannot_be_used_is_refused(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(
    ValueError, match=r"workdir .*file/run: expected a folder that can be written"
  ):
    start(tmp_path / "file" / "run")
  with pytest.raises(ValueError, match="keep: expected at least 1, got 0"):
    start(tmp_path, keep=0)
  (tmp_path / "config.json").write_text("{")
  with pytest.raises(ValueError, match=r"config.json: does not parse"):
    start(tmp_path)


def test_what_is_no_checkpoint_is_left_alone_in_a_line(tmp_path, caplog):
  folder = saved(tmp_path, 1, 2)
  for name in ("50", "²", "000000007", "notes"):
    (folder / name).mkdir()
  for name in ("x.orbax-checkpoint-tmp", "51", "00000049"):
    (folder / name).write_text("")
  checkpoints = start(tmp_path)
  assert checkpoints.restore(state(0))[1] == 2
  for name in ("50", "²", "000000007", "notes", "51", "x.orbax-checkpoint-tmp"):
    assert f"{name} is not a checkpoint of this program" in caplog.text
  assert len(list(folder.glob("00000049.damaged-*"))) == 1, "its step can be saved"
  checkpoints.save(50, state(50))
  assert checkpoints.restore(state(0))[1] == 50
  checkpoints.close()


def test_a_reader_follows_a_run_that_deletes_what_it_reads(tmp_path, monkeypatch):
  """With checkpoint.keep=1 the newest checkpoint of a moment ago is gone: there is a newer one."""
  folder = saved(tmp_path, 1, keep=1)
  restore = checkpoint._restore_verified

  def as_the_run_goes_on(reader, folder_, step, spec, field):
    if step == 1:
      saved(tmp_path, 2, keep=1)
      assert not (folder / "00000001").exists()
    return restore(reader, folder_, step, spec, field)

  monkeypatch.setattr(checkpoint, "_restore_verified", as_the_run_goes_on)
  got, step = restore_part(tmp_path, "params", state(0).params)
  assert step == 2
  assert_same(got, state(2).params)


def test_a_field_that_is_newer_than_a_run_counts_as_what_it_then_meant():
  old, differences = {"prompts": {"path": "x"}}, checkpoint.differences
  new = {"prompts": {"path": "x", "duplicates": "keep"}, "on_record_error": "stop"}
  assert differences(old, new) == {}
  assert list(differences(old, {**new, "on_record_error": "continue"})) == ["on_record_error"]
  assert list(differences(old, {**new, "judge": {"floor": 0.1}})) == ["judge.floor"]

"""An arena's files: any names, nothing overwritten, damage named, checkpoints that change."""

import json
import resource

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from arenas import SMALL, small
from jax import numpy as jnp

from nash_jax import judges, policy, weights
from nash_jax.jobs import arena
from nash_jax.models import gemma
from nash_jax.run import checkpoint
from nash_jax.types import TrainState


def test_a_judge_that_can_read_nothing_ends_an_arena_with_counts(
  files, made_up, tmp_path, monkeypatch, caplog
):
  """Whatever the judge: a table whose digits no policy writes, rewards that are no numbers."""
  sample_and_judge, checked = arena._sample_and_judge, []

  def unread(*args):
    judged = sample_and_judge(*args)
    verdict = judged.verdicts["judge"]
    checked.append(
      judged._replace(verdicts={"judge": verdict.replace(valid=verdict.valid & False)})
    )
    return checked[0]

  monkeypatch.setattr(arena, "_sample_and_judge", unread)
  expected = r"judge 'judge': expected .* some of 700 pairs, got 'none'.*first_token"
  with pytest.raises(ValueError, match=expected):
    arena.run(small(files), tmp_path)
  assert not (tmp_path / "arena.json").exists()
  verdict = checked[0].verdicts["judge"]
  verdict = verdict.replace(valid=np.broadcast_to((np.arange(25) > 4)[:, None, None], (25, 8, 8)))
  judged = checked[0]._replace(verdicts={"judge": verdict})
  arena._check_read(judged, {"judge": judges.Judge(None, None)})
  assert "judge 'judge': 140 of 700 pairs have no verdict" in caplog.text


def renamed(config, policies=("base", "other"), judges=("judge",)):
  """The same arena with two policies, and one judge under several names."""
  entries, judge = list(config.policies.values()), config.judges.judge
  config.policies = {
    name: {"weights": entry.weights, "best_of": 1}
    for name, entry in zip(policies, (entries[0], entries[2]), strict=True)
  }
  config.base, config.judges = policies[0], dict.fromkeys(judges, judge)
  config.select_judge, config.max_prompts, config.resamples = judges[0], 4, 20
  return config


def test_judges_and_policies_may_have_any_name(files, made_up, tmp_path, capsys):
  policies = ("$\\frac{$ _x", "a|b\n**c**\x1b[31m")
  judges = ("a/b", "x" * 300)
  workdir = tmp_path / "in" / "work"
  result = arena.run(renamed(small(files), policies, judges), workdir)
  assert set(result["policies"]) == {*policies}
  assert set(result["judges"]) == {*judges}
  assert json.loads((workdir / "arena.json").read_text()) == result
  pictures = list(workdir.glob("arena_*.png"))
  assert len({path.name.casefold() for path in pictures}) == len(judges)
  assert [path for path in tmp_path.rglob("*") if path.is_file() and path.parent != workdir] == []
  page, printed = (workdir / "arena.md").read_text(), capsys.readouterr().out
  for text in (page, printed):
    assert r"a\|b\\n\*\*c\*\*\\x1b" in text
    assert all(c.isprintable() for c in text.replace("\n", ""))


def test_an_arena_is_not_overwritten_by_one_of_another_config(files, made_up, tmp_path):
  config = renamed(small(files))
  arena.run(config, tmp_path)
  before = (tmp_path / "arena.json").read_bytes()
  config.samples = 3
  with pytest.raises(ValueError, match=r"arena.json: expected an arena of this config.*samples"):
    arena.run(config, tmp_path)
  assert (tmp_path / "arena.json").read_bytes() == before
  assert made_up["sampled"] == 1, "it is refused before anything is sampled"
  config.samples = 2
  arena.run(config, tmp_path)
  assert made_up["sampled"] == 2, "the same one may be held again"


def test_a_damaged_result_is_named(files, made_up, tmp_path):
  (tmp_path / "arena.json").write_text('{"prompts": 4, "sam')
  with pytest.raises(ValueError, match=r"arena.json: does not parse .*move it away"):
    arena.run(renamed(small(files)), tmp_path)
  assert not made_up["sampled"]


def test_a_full_disk_leaves_the_last_whole_result(files, made_up, tmp_path):
  config = renamed(small(files))
  arena.run(config, tmp_path)
  before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  made_up["before_end"] = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
  try:
    with pytest.raises(ValueError, match=r"arena.json: expected a file that can be written"):
      arena.run(config, tmp_path)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("workdir", ["gs://bucket/x", "file:///tmp/x"])
def test_an_arena_in_a_bucket_is_refused(files, made_up, workdir, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ValueError, match="workdir: expected a folder on this machine"):
    arena.run(renamed(small(files)), workdir)
  assert list(tmp_path.iterdir()) == [], "least of all as a folder of that name"


def run_that_goes_on(files, folder, keep):
  """Returns a run's checkpoints, and a function that saves its next step."""
  one = weights.load(str(files / "one.safetensors"), gemma.preset("tiny", **SMALL))
  run, steps = checkpoint.Checkpoints(folder, keep=keep, config={}), iter(range(1, 100))

  def go_on():
    step = next(steps)
    params = jax.tree.map(lambda x: x * step, one)
    run.save(step, TrainState(jnp.int32(step), params, params, {}, {}))
    run.wait()

  go_on()
  return run, go_on


def test_an_arena_records_the_steps_that_it_read(files, made_up, tmp_path):
  run, go_on = run_that_goes_on(files, tmp_path / "run", keep=2)
  go_on()
  config, where = renamed(small(files)), str(tmp_path / "run")
  one, two = config.policies.base, config.policies.other
  config.policies = {"base": one, "new": {**one, "weights": where}}
  config.policies.old = {**two, "weights": f"{where}@target:1"}
  # The run goes on while the arena is held: what was read is what counts.
  made_up["before_end"] = go_on
  result = arena.run(config, tmp_path / "arena")
  run.close()
  steps = {name: policy["step"] for name, policy in result["policies"].items()}
  assert steps == {"base": None, "new": 2, "old": 1}
  assert json.loads((tmp_path / "arena" / "arena.json").read_text()) == result
  page = (tmp_path / "arena" / "arena.md").read_text()
  assert "Checkpoint steps of the runs: new 2, old 1." in page


@pytest.mark.parametrize("saves", [1, 3])
def test_a_checkpoint_that_a_run_replaces_meanwhile_is_read_anew(
  files, tmp_path, monkeypatch, saves
):
  run, go_on = run_that_goes_on(files, tmp_path / "run", keep=1)
  left, restore = [saves], ocp.Checkpointer.restore

  def replaced(self, *args, **options):
    if left[0]:
      left[0] -= 1
      go_on()
    return restore(self, *args, **options)

  monkeypatch.setattr(ocp.Checkpointer, "restore", replaced)
  model = gemma.preset("tiny", **SMALL)
  params = policy.load_weights(str(tmp_path / "run"), model)
  run.close()
  one = weights.load(str(files / "one.safetensors"), model)["embedder"]["input_embedding"]
  newest = (saves + 1) * one
  np.testing.assert_allclose(params["embedder"]["input_embedding"], newest, rtol=1e-6)


def test_a_run_that_is_always_faster_is_named(files, tmp_path, monkeypatch):
  run, go_on = run_that_goes_on(files, tmp_path / "run", keep=1)
  restore = ocp.Checkpointer.restore
  monkeypatch.setattr(ocp.Checkpointer, "restore", lambda *a, **k: (go_on(), restore(*a, **k)))
  with pytest.raises(ValueError, match=r"run/checkpoints: a run replaced .* checkpoint.keep"):
    policy.load_weights(str(tmp_path / "run"), gemma.preset("tiny", **SMALL))
  run.close()

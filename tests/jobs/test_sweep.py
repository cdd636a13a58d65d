"""A sweep leaves alone what is complete, and nothing else; its runs stay in its workdir."""

import json
import os
import types

import pytest
import tiny

import nash_jax
from nash_jax import train
from nash_jax.config import describe, resolve
from nash_jax.configs import short_compare, votes
from nash_jax.jobs import arena, collect, compare, short_game, sweep
from nash_jax.run import lock
from nash_jax.validation import file_name


@pytest.fixture
def trained(monkeypatch):
  """Makes train.run leave a record as `trained.how` says; counts the runs by folder."""
  calls = types.SimpleNamespace(folders=[], how=lambda folder, config: None, stopped=False)

  def run(config, workdir, progress):
    calls.folders.append(workdir)
    write(workdir, config, [0, 3, 6])
    calls.how(workdir, config)
    return types.SimpleNamespace(stopped=calls.stopped)

  monkeypatch.setattr(train, "run", run)
  return calls


def write(folder, config, steps, checkpoints=(3, 6)):
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "config.json").write_text(json.dumps(describe(config)))
  lines = [json.dumps({"step": step, "eval/kl_to_reference": 0.1}) + "\n" for step in steps]
  (folder / "metrics.jsonl").write_text("".join(lines))
  for step in checkpoints:
    (folder / "checkpoints" / f"{step:08d}").mkdir(parents=True, exist_ok=True)


def run(tmp_path, config=None, **options):
  sweep.run({"a": config or tiny.train()}, tmp_path, progress=False, **options)


def test_a_run_of_any_name_stays_in_the_workdir(trained, tmp_path):
  workdir, names = tmp_path / "in" / "work", ["../../x", f"{tmp_path}/y", "a/seed_0", "A/seed_0"]
  sweep.run(dict.fromkeys(names, tiny.train()), workdir, progress=False)
  assert len({str(folder).casefold() for folder in trained.folders}) == len(names)
  assert all(workdir in folder.resolve().parents for folder in trained.folders)
  assert workdir / "a" / "seed_0" in trained.folders


def test_a_complete_run_is_left_alone(trained, tmp_path):
  run(tmp_path)
  run(tmp_path)
  assert len(trained.folders) == 1
  changed = tiny.train()
  changed.algorithm.beta = 0.2
  with pytest.raises(ValueError, match=r"a: expected a run of this config.*algorithm.beta"):
    run(tmp_path, changed)


@pytest.mark.parametrize("left", [[], [0], [0, 3], [0, 3, 6]])
def test_a_run_that_was_stopped_is_not_complete(trained, tmp_path, left):
  """Neither by its metrics, nor where the last checkpoint was not saved any more."""
  write(tmp_path / "a", resolve(tiny.train()), left, checkpoints=(3,))
  run(tmp_path)
  assert trained.folders == [tmp_path / "a"]


def test_a_run_whose_last_line_is_cut_is_not_complete(trained, tmp_path):
  write(tmp_path / "a", resolve(tiny.train()), [0, 3])
  with (tmp_path / "a" / "metrics.jsonl").open("a") as file:
    file.write('{"step": 6')
  run(tmp_path)
  assert trained.folders == [tmp_path / "a"]


def test_a_stop_ends_the_sweep(trained, tmp_path):
  trained.stopped = True
  with pytest.raises(KeyboardInterrupt, match="stopped in a"):
    sweep.run(dict.fromkeys("ab", tiny.train()), tmp_path, progress=False)
  assert trained.folders == [tmp_path / "a"]


def test_a_run_that_diverged_is_not_made_again(trained, tmp_path):
  def diverge(folder, config):
    write(folder, config, [0, 3], checkpoints=(3,))
    raise FloatingPointError("metric 'loss' is nan at step 4")

  trained.how = diverge
  run(tmp_path)
  run(tmp_path)
  assert len(trained.folders) == 1
  assert "loss" in (tmp_path / "a" / sweep.DIVERGED).read_text()
  changed = tiny.train()
  changed.optimizer.learning_rate = 1e-5
  trained.how = lambda folder, config: None
  run(tmp_path, changed)  # train.run knows what may differ in a run that goes on
  assert len(trained.folders) == 2
  assert not (tmp_path / "a" / sweep.DIVERGED).exists()


@pytest.fixture
def batched(monkeypatch):
  calls = []
  monkeypatch.setattr(sweep, "_run_batched", lambda group, *_: calls.append(len(group)))
  return calls


def exact():
  c = short_compare.get_config("smoke").base
  c.steps, c.evaluation.every = 4, 2
  return c


def test_the_folder_of_an_exact_run_is_not_taken_by_one_of_more_steps(batched, tmp_path):
  write(tmp_path / "a", resolve(exact()), [0, 2, 4])
  longer = exact()
  longer.steps = 6
  with pytest.raises(ValueError, match=r"a: expected a run of this config.* steps"):
    run(tmp_path, longer)
  run(tmp_path, exact())
  assert not batched


@pytest.mark.parametrize("steps", [5, 9])
def test_a_run_of_a_comparison_does_not_go_on_over_other_steps(trained, tmp_path, steps):
  """Alone it would; here its schedule and its end would not be those of the other runs."""
  write(tmp_path / "a", resolve(tiny.train()), [0, 3, 6])
  with pytest.raises(ValueError, match=r"a: expected a run of this config.* steps"):
    run(tmp_path, tiny.train({"steps": steps}))
  assert not trained.folders


@pytest.mark.parametrize("line", ["{}", '{"ste', "null", "3", "\x00\x00"])
def test_a_damaged_exact_run_is_named(batched, tmp_path, line):
  write(tmp_path / "a", resolve(exact()), [0, 2])
  with (tmp_path / "a" / "metrics.jsonl").open("a") as file:
    file.write(line + "\n")
  with pytest.raises(ValueError, match=r"a/metrics.jsonl:3: expected a step and its metrics"):
    run(tmp_path, exact())


def test_steps_of_all_runs_are_checked_before_the_first(batched, trained, tmp_path):
  odd = exact()
  odd.steps = 5
  with pytest.raises(ValueError, match=r"evaluation.every: expected a divisor of steps = 5"):
    sweep.run({"a": tiny.train(), "b": exact(), "c": odd}, tmp_path, progress=False)
  assert not batched
  assert not trained.folders


@pytest.mark.parametrize("job", [sweep.run, short_game.run])
def test_a_bucket_is_refused(job, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ValueError, match="workdir: expected a folder on this machine"):
    job({} if job is sweep.run else exact(), "gs://bucket/x")
  assert not list(tmp_path.iterdir())


def meeting():
  c = nash_jax.config.arena()
  base = c.model.weights or nash_jax.config.train().model.weights
  c.policies = {name: {"weights": base, "best_of": 1} for name in ("base", "other")}
  return c


@pytest.mark.parametrize(
  ("job", "config"),
  [
    (arena, meeting),
    (collect, votes.get_config),
    (compare, lambda: short_compare.get_config("smoke")),
    (short_game, exact),
    (sweep, lambda: {"a": tiny.train()}),
  ],
)
def test_a_job_is_refused_where_another_writes(job, config, trained, tmp_path):
  with lock.hold(tmp_path), pytest.raises(ValueError, match=f"in use by process {os.getpid()} on "):
    job.run(config(), tmp_path)
  assert not trained.folders
  assert {path.name for path in tmp_path.iterdir()} <= {".lock"}, "nothing else was written"


def test_two_names_of_one_folder_are_refused(trained, tmp_path):
  names = ["A", file_name("A")]
  with pytest.raises(ValueError, match="names of runs: expected a folder for each"):
    sweep.run(dict.fromkeys(names, tiny.train()), tmp_path, progress=False)
  assert not trained.folders


def test_folders_of_a_comparison_stay(trained, tmp_path):
  folder = f"{file_name('../../x')}/rate_1e-05/seed_0"
  sweep.run({folder: tiny.train()}, tmp_path, progress=False)
  assert trained.folders == [tmp_path / folder]

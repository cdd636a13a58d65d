"""The command: quick to answer, and bad input refused in a line."""

import importlib.util
import os
import subprocess
import sys

import pytest
from tiny import ROOT

import nash_jax
from nash_jax import main

HEAVY = ("jax", "tensorflow", "gemma", "orbax", "matplotlib", "seqio")


def python(code):
  """Runs code in a fresh interpreter, which then prints the heavy libraries it has imported."""
  code = f"import sys\n{code}\nprint('imported:', [m for m in {HEAVY} if m in sys.modules])"
  done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True)
  assert done.returncode == 0, done.stderr
  return done.stdout


def command(*arguments, folder=ROOT):
  """Runs nash-jax with these arguments, in a folder."""
  code = f"import sys; sys.argv = {['nash-jax', *arguments]!r}; from nash_jax import main"
  path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
  return subprocess.run(
    [sys.executable, "-c", f"{code}; main.run()"],
    cwd=folder,
    text=True,
    capture_output=True,
    env={**os.environ, "PYTHONPATH": path},
  )


@pytest.mark.parametrize("flag", ["--help", None])
def test_help_lists_every_job_with_a_line_and_imports_nothing_heavy(flag):
  arguments = ["nash-jax", flag] if flag else ["nash-jax"]
  out = python(f"sys.argv = {arguments!r}\nfrom nash_jax import main\nmain.run()")
  assert "imported: []" in out
  for job, (_, _, what) in main.JOBS.items():
    assert f"  {job:10} {what}\n" in out


def test_a_jobs_help_lists_its_flags_and_fields_and_imports_nothing_heavy():
  out = python("sys.argv = ['nash-jax', 'train', '--help']\nfrom nash_jax import main\nmain.run()")
  assert "imported: []" in out
  assert main.JOBS["train"][2] in out
  assert all(name in out for name in ("--config:", "--workdir:", "beta: 0.", "runs/train"))


def test_every_job_is_a_module_with_a_config_file():
  for module, config, _ in main.JOBS.values():
    assert importlib.util.find_spec(f"nash_jax.{module}") is not None
    assert (ROOT / "configs" / f"{config}.py").exists()


def test_an_unknown_job_lists_the_jobs(monkeypatch, capsys):
  monkeypatch.setattr(sys, "argv", ["nash-jax", "tran"])
  with pytest.raises(SystemExit) as left:
    main.run()
  assert left.value.code == 2
  assert capsys.readouterr().err == f"nash-jax: no job 'tran'; jobs are {', '.join(main.JOBS)}\n"


@pytest.mark.parametrize(
  ("argument", "message"),
  [
    ("--config.algorithm.beta=-1", "algorithm.beta: expected a number in [1e-9, 1e6], got -1.0"),
    ("--config.algorithm.btea=1", 'Did you mean "beta" instead of "btea"'),
    ("--config.colour=1", "nash-jax train: the config has no such field: 'colour' (`nash-jax"),
    ("--config.algorithm.beta=much", "could not convert string to float: 'much'"),
    ("--config=none.py", "No such file or directory: 'none.py'"),
  ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, argument, message):
  done = command("train", argument, f"--workdir={tmp_path / 'run'}")
  assert done.returncode == 2
  assert done.stdout == ""
  assert message in done.stderr
  assert done.stderr.startswith("nash-jax train: ")
  assert done.stderr.count("\n") == 1, done.stderr
  assert not (tmp_path / "run").exists()


RUN = """
import os, sys, types
steps, end = {steps}, {end!r}
def run(config, workdir):
  if end == "signal":
    os.makedirs(workdir + "/checkpoints/00000003")
    return
  raise {{"disk": OSError(28, "No space left on device", "x"),
         "interrupt": KeyboardInterrupt(), "sweep": KeyboardInterrupt("stopped in a; the same"),
         "nan": FloatingPointError("metric 'loss' is nan at step 5")}}[end]
sys.modules["nash_jax.train"] = types.SimpleNamespace(run=run)  # the real one imports for seconds
sys.argv = ["nash-jax", "train", f"--config.steps={{steps}}", "--workdir={workdir}"]
from nash_jax import main
main.run()
"""


@pytest.mark.parametrize(
  ("end", "steps", "status", "last"),
  [
    ("signal", 9, 75, "stopped at step 3 of 9; the same command goes on"),
    pytest.param("signal", 3, 0, "", marks=pytest.mark.slow),
    ("disk", 9, 1, "nash-jax train: [Errno 28] No space left on device: 'x'"),
    pytest.param(
      "nan", 9, 1, "nash-jax train: metric 'loss' is nan at step 5", marks=pytest.mark.slow
    ),
    ("interrupt", 9, 130, "nash-jax train: interrupted"),
    ("sweep", 9, 75, "nash-jax train: stopped in a; the same"),
  ],
)
def test_a_status_says_how_a_run_ended(tmp_path, end, steps, status, last):
  code = RUN.format(steps=steps, end=end, workdir=tmp_path / "run")
  done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True)
  assert done.returncode == status, done.stderr
  assert "Traceback" not in done.stderr
  assert done.stderr.splitlines()[-1:] == [last] * bool(last)


def test_the_package_imports_its_jobs_when_they_are_named():
  out = python("import nash_jax\nassert 'train' in dir(nash_jax)\nnash_jax.config.train()")
  assert "imported: []" in out
  assert {"train", "fit", "collect", "sample", "arena"} <= set(nash_jax.__all__)
  assert nash_jax.train.run.__module__ == "nash_jax.train"
  with pytest.raises(AttributeError, match="nash_jax has no attribute 'tran'"):
    nash_jax.tran  # noqa: B018


def test_a_process_of_several_knows_which_it_is(monkeypatch):
  joined = []
  monkeypatch.setattr(
    "jax.distributed.initialize", lambda *where, **more: joined.append((where, more))
  )
  main._join_processes()
  assert not joined, "alone unless the environment says otherwise"
  monkeypatch.setenv("NASH_JAX_COORDINATOR", "auto")
  main._join_processes()
  monkeypatch.setenv("NASH_JAX_COORDINATOR", "127.0.0.1:9000")
  monkeypatch.setenv("NASH_JAX_PROCESSES", "2")
  with pytest.raises(ValueError, match="expected whole numbers beside NASH_JAX_COORDINATOR, got"):
    main._join_processes()
  monkeypatch.setenv("NASH_JAX_PROCESS_ID", "1")
  main._join_processes()
  monkeypatch.setenv("NASH_JAX_HEARTBEAT", "7")
  main._join_processes()
  last = ("127.0.0.1:9000", 2, 1)
  seconds = [
    {"heartbeat_timeout_seconds": n, "initialization_timeout": 3 * n} for n in (100, 100, 7)
  ]
  assert joined == list(zip([(), last, last], seconds, strict=True))

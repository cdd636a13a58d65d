"""The command: quick to answer, and bad input refused in a line."""

import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
from commands import command
from paths import ROOT

import nash_jax
from nash_jax import main, report
from nash_jax.run import lock

HEAVY = ("jax", "tensorflow", "gemma", "orbax", "matplotlib", "seqio")


def python(code):
  """Runs code in a fresh interpreter, which then prints the heavy libraries it has imported."""
  code = f"import sys\n{code}\nprint('imported:', [m for m in {HEAVY} if m in sys.modules])"
  done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True)
  assert done.returncode == 0, done.stderr
  return done.stdout


def test_help_lists_what_there_is_and_imports_nothing_heavy():
  asked = (["--help"], [], ["train", "--help"])
  code = "from nash_jax import main"
  code += "".join(
    f"\nsys.argv = {['nash-jax', *words]!r}; main.run(); print('###')" for words in asked
  )
  *texts, imported = python(code).split("###")
  assert "imported: []" in imported
  for text in texts[:2]:
    for job, (_, _, what) in main.JOBS.items():
      assert f"  {job:10} {what}\n" in text
  assert main.JOBS["train"][2] in texts[2]
  assert all(name in texts[2] for name in ("--config:", "--workdir:", "beta: 0.", "runs/train"))


def test_help_lists_the_short_flags_of_a_job():
  shown = command("sample", "--help").stdout
  assert "--run: short for --config.model.weights\n" in shown
  assert "--output: short for --config.output\n" in shown


def test_every_job_is_a_module_with_a_config_file():
  for module, config, _ in main.JOBS.values():
    assert importlib.util.find_spec(f"nash_jax.{module}") is not None
    assert (ROOT / "configs" / f"{config}.py").exists()


def test_an_unknown_job_lists_the_jobs(monkeypatch, capsys):
  monkeypatch.setattr(sys, "argv", ["nash-jax", "tran"])
  with pytest.raises(SystemExit) as left:
    main.run()
  assert left.value.code == 2
  assert (
    capsys.readouterr().err == f"nash-jax: no job 'tran'; the jobs are {', '.join(main.JOBS)}\n"
  )


def test_compiled_programs_are_kept_where_the_user_keeps_caches(tmp_path, monkeypatch):
  """Unless jax is told where, or there is no place to write."""
  name = "JAX_COMPILATION_CACHE_DIR"
  monkeypatch.delenv(name)
  (tmp_path / "file").write_text("")
  for home in (tmp_path / "file", "relative"):
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    main.keep_compiled_programs()
    assert name not in os.environ
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
  main.keep_compiled_programs()
  folder = pathlib.Path(os.environ[name])
  assert folder.is_dir()
  assert folder.parent == tmp_path / "caches" / "nash_jax"
  for told in ("", "elsewhere"):
    monkeypatch.setenv(name, told)
    main.keep_compiled_programs()
    assert os.environ[name] == told


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_demo_keeps_programs_where_the_command_finds_them():
  """What it leaves to the command is in the user's folder; what the user sets stays."""
  name = "JAX_COMPILATION_CACHE_DIR"
  asked = ["make", "--no-print-directory", "--eval", f"demo-cache: ; @echo $${name}", "demo-cache"]
  others = {key: value for key, value in os.environ.items() if key != name}
  for environment, kept in ((others, ""), ({**others, name: "mine"}, "mine")):
    done = subprocess.run(asked, cwd=ROOT, text=True, capture_output=True, env=environment)
    assert done.stdout == f"{kept}\n", done.stderr


def test_a_run_that_ends_leaves_its_curves_where_it_has_any(tmp_path, monkeypatch, caplog):
  drawn = []
  monkeypatch.setattr(report, "curves", drawn.append)
  main._leave_curves(str(tmp_path))
  assert not drawn, "nothing was recorded"
  (tmp_path / "metrics.jsonl").write_text('{"step": 0, "loss": 1.0}\n')
  main._leave_curves(str(tmp_path))
  assert drawn == [str(tmp_path)]
  (tmp_path / "metrics.jsonl").write_text("{}\n")
  monkeypatch.undo()
  main._leave_curves(str(tmp_path))
  assert "metrics.jsonl:1: expected a step and its metrics" in caplog.text
  assert "curves.png could not be drawn" in caplog.text


# Of one interpreter that has imported everything, a child for each command: (its module train or
# None, arguments). Prints their exit statuses.
CHILDREN = """
import json, os, sys, types
import ml_collections.config_flags, nash_jax.config.checks, nash_jax.run.checkpoint
from nash_jax import main, report
commands, statuses = json.loads(sys.argv[1]), []
def act(end):
  def run(config, workdir):
    if end == "signal":
      os.makedirs(workdir + "/checkpoints/00000003")
      return
    raise {"disk": OSError(28, "No space left on device", "x"),
           "interrupt": KeyboardInterrupt(), "sweep": KeyboardInterrupt("stopped in a; the same"),
           "nan": FloatingPointError("metric 'loss' is nan at step 5")}[end]
  return types.SimpleNamespace(run=run)
for number, (end, arguments) in enumerate(commands):
  if child := os.fork():
    statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    continue
  for stream, name in ((1, "out"), (2, "err")):
    os.dup2(os.open(f"{number}.{name}", os.O_CREAT | os.O_WRONLY), stream)
  if end:
    sys.modules["nash_jax.train"] = act(end)
  sys.argv = ["nash-jax", *arguments, f"--workdir=run{number}"]
  try:
    main.run()
    status = 0
  except SystemExit as end:
    status = end.code or 0
  sys.stdout.flush(), sys.stderr.flush()
  os._exit(status)  # an interpreter's own end takes most of a second
print(json.dumps(statuses))
"""


ENDS = (
  ("signal", 9, 75, "stopped at step 3 of 9; the same command resumes it"),
  ("signal", 3, 0, ""),
  ("disk", 9, 1, "nash-jax train: [Errno 28] No space left on device: 'x'"),
  ("nan", 9, 1, "nash-jax train: metric 'loss' is nan at step 5"),
  ("interrupt", 9, 130, "nash-jax train: interrupted"),
  ("sweep", 9, 75, "nash-jax train: stopped in a; the same"),
)


BAD = (
  ("train --config.algorithm.beta=-1", "beta: expected a number in [1e-9, 1e6], got -1.0"),
  ("train --config.algorithm.btea=1", 'Did you mean "beta" instead of "btea"'),
  ("train --config.colour=1", "the config has no such field: 'colour' (`nash-jax"),
  ("train --config.algorithm.beta=much", "could not convert string to float: 'much'"),
  ("train --config=none.py", "No such file or directory: 'none.py'"),
  ("train --config=storis", "did you mean 'stories'?"),
  (
    "train --config=stories:mild",
    "train: --config=stories:mild: expected nothing after the colon, got 'mild'\n",
  ),
  (
    "train --config=gemma3_270m:smock",
    "train: --config=gemma3_270m:smock: the word after the colon: got 'smock', expected one of"
    " lora, self, smoke, nothing; did you mean 'smoke'?\n",
  ),
  ("train --config=own.py", "train: --config=own.py: expected a word after a colon, got ''\n"),
  (
    "train --config=own.py:two",
    "train: --config=own.py:two: invalid literal for int() with base 10: 'two' (own.py, line 2)\n",
  ),
  (
    "train --config own.py:0",
    "train: --config=own.py:0: TypeError: object of type 'int' has no len() (own.py, line 2)\n",
  ),
  ("train --config=own.py:7", "train: --config=own.py: KeyError: 7 (own.py, line 2)\n"),
  ("train --config=none_of_it.py", "none_of_it.py: expected a function get_config, got none\n"),
  (
    "train --config.optimizer.name=sgd --config.optimizer.weight_decay=0.5",
    "train: optimizer.weight_decay: expected no value, because optimizer.name = sgd does not read"
    " it, got 0.5. Leave it out, or choose what reads it.\n",
  ),
  ("sample --realign=-2 --prompt=x", "sample: realign: expected a number in [0, 1000], got -2.0"),
  (
    "sample --run=none --prompt=x",
    "sample: model.weights: expected a file that exists, got 'none'",
  ),
)


def test_how_a_run_ended_and_bad_input_have_a_status_and_a_line(tmp_path):
  (tmp_path / "own.py").write_text("def get_config(word):\n  return {}[int(word) or len(0)]\n")
  (tmp_path / "none_of_it.py").write_text("steps = 3\n")
  commands = [(end, ["train", f"--config.steps={steps}"]) for end, steps, *_ in ENDS]
  commands += [(None, words.split()) for words, _ in BAD]
  path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
  done = subprocess.run(
    [sys.executable, "-c", CHILDREN, json.dumps(commands)], cwd=tmp_path, text=True,
    capture_output=True, env={**os.environ, "PYTHONPATH": path},
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  out, err = (
    [(tmp_path / f"{n}.{x}").read_text() for n in range(len(commands))] for x in ("out", "err")
  )
  assert json.loads(done.stdout) == [*(status for *_, status, _ in ENDS), *[2] * len(BAD)], err
  for (*_, last), said in zip(ENDS, err, strict=False):
    assert "Traceback" not in said
    assert said.splitlines()[-1:] == [last] * bool(last)
  for number, (words, message) in enumerate(BAD, len(ENDS)):
    assert out[number] == ""
    assert message in err[number]
    assert err[number].startswith(f"nash-jax {words.split()[0]}: ")
    assert err[number].count("\n") == 1, err[number]
    assert not (tmp_path / f"run{number}").exists()


@pytest.mark.slow  # a process of its own; the jobs that hold it themselves are in test_sweep.py
def test_games_are_refused_where_another_writes(tmp_path):
  with lock.hold(tmp_path):
    done = command("games", "--config=games/theorem:smoke", f"--workdir={tmp_path}")
  assert done.returncode == 2
  assert f"in use by process {os.getpid()} on " in done.stderr.splitlines()[-1]
  assert not list(tmp_path.glob("*.csv"))


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
  with pytest.raises(ValueError, match="expected whole numbers with NASH_JAX_COORDINATOR, got"):
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

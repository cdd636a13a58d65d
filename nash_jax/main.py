"""The `nash-jax` command, with one sub-command per job."""

import ast
import contextlib
import faulthandler
import importlib
import importlib.util
import os
import pathlib
import re
import signal
import socket
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator
from typing import Any

from nash_jax.validation import file_name, one_of, require

# {job: (module with run(config, workdir), default config, description)}
JOBS = {
  "train": ("train", "stories", "fine-tune a policy online against a judge"),
  "fit": ("fit", "storyteller", "train on data: next token, pairwise judge or reward model"),
  "collect": ("jobs.collect", "votes", "sample pairs of responses, and let a judge vote on them"),
  "design": ("jobs.design", "design", "compare designs: which pairs to label"),
  "convert": ("jobs.convert", "convert", "convert records of other programs to ours"),
  "sample": ("jobs.sample", "sample", "continue prompts, typed or from a file"),
  "arena": ("jobs.arena", "arena", "compare policies: win rates with intervals"),
  "agreement": ("jobs.agreement", "agreement", "compare judges with people's own comparisons"),
  "vote": ("jobs.vote", "vote", "serve a page on which people judge pairs of responses"),
  "export": (
    "jobs.export",
    "export",
    "export a run as a folder for transformers, with a model card",
  ),
  "compare": ("jobs.compare", "short_compare", "compare methods, each at its best learning rate"),
  "sweep": ("jobs.compare", "ablations/kappa", "run an ablation: kappa, beta or eta"),
  "plan": ("plan", "gemma2_2b", "plan memory and time of a run on TPUs that you need not have"),
  "short_game": (
    "jobs.short_game",
    "short_game",
    "make the bundled short games and their reference policy",
  ),
  "games": ("games.study", "games/theorem", "study exact games: solvers, rates, figures"),
  "demo": ("jobs.demo", "stories", "train the bundled storyteller, then run the arena"),
}

MULTI_PROCESS = ("train", "fit")  # jobs that may run as several processes
RESUMED = ("train", "fit", "demo")  # jobs that stop between two steps on a signal
# Exit statuses of bad input and of a run that was stopped (EX_TEMPFAIL of sysexits.h).
BAD_INPUT, STOPPED = 2, 75
# Jobs that take another job's config.
CONFIG_OF = {"sweep": "compare", "plan": "train", "short_game": "train", "demo": "train"}

# Flags of jobs that have no --workdir, since they write nothing there: {flag: (default, help)}.
FLAGS = {
  "plan": {"topology": ("v5e:4x4", "TPU topology, such as v5e:4x4 or v5e-16; local: this machine."),
           "json": ("", "A file for the plan as JSON.")},
  "convert": {}, "export": {},
}  # fmt: skip

# Flags that set a field of the config: --realign=1.5 is --config.realign=1.5.
SHORT_FLAGS = {
  "convert": {"from": "source", "to": "output"} | {x: x for x in ("task", "bad", "seed")},
  "export": {
    x: x for x in ("run", "to", "dtype", "adapter", "base_model", "tokenizer", "arena")
  },
  "vote": {"from": "source"} | {x: x for x in ("host", "port", "export", "by")},
  "sample": {
    **{name: name for name in ("prompt", "file", "output", "realign")}, "run": "model.weights",
  },
}  # fmt: skip


def _config_folder() -> pathlib.Path:
  spec = importlib.util.find_spec("nash_jax.configs")
  if spec is None:
    raise ValueError("configs: not found; install nash_jax with `pip install --editable .`")
  return pathlib.Path(str(spec.origin)).parent


def config_names() -> list[str]:
  """Returns the names of the bundled configs, such as "ablations/kappa"."""
  folder = _config_folder()
  files = (path.relative_to(folder) for path in folder.rglob("*.py") if path.stem != "__init__")
  return sorted(path.with_suffix("").as_posix() for path in files)


def config_file(spec: str) -> str:
  """Returns "FILE.py" or "FILE.py:ARGUMENT" for a config by name, "NAME" or "NAME:ARGUMENT".

  Raises:
    ValueError: an unknown name; lists the names.
  """
  name, colon, argument = spec.partition(":")
  if name.endswith(".py"):
    return spec
  one_of("config (a name, or a .py file)", name, config_names())
  return f"{_config_folder() / name}.py{colon}{argument}"


def usage() -> str:
  """Returns the text of `nash-jax --help`."""
  jobs = "\n".join(f"  {name:10} {description}" for name, (_, _, description) in JOBS.items())
  return (
    "usage: nash-jax JOB --config=NAME [--config.FIELD=VALUE ...] --workdir=FOLDER\n\n"
    f"jobs:\n{jobs}\n\n"
    f"configs: {', '.join(config_names())}; or your own file, --config=FILE.py.\n"
    "`nash-jax JOB --help` lists the flags of a job and the fields of its config.\n"
    "Example: nash-jax train --config=stories --config.algorithm.beta=0.05 --workdir=runs/x\n"
  )


def run() -> None:
  """Entry point of the console script."""
  arguments = sys.argv[1:]
  job = arguments[0] if arguments else "--help"
  if job in ("-h", "--help", "help", "--helpfull"):
    print(usage(), end="")
    return
  if job not in JOBS:
    print(f"nash-jax: no job {job!r}; the jobs are {', '.join(JOBS)}", file=sys.stderr)
    sys.exit(BAD_INPUT)
  keep_compiled_programs()
  try:
    _run_job(job, _expand_arguments(job, arguments[1:]))
  except (ValueError, OSError, FloatingPointError) as error:
    from absl import logging

    # The user needs only this line, which a traceback would bury; --verbosity=1 shows both.
    logging.debug("the job failed", exc_info=True)
    print(f"nash-jax {job}: {error}", file=sys.stderr)
    sys.exit(BAD_INPUT if isinstance(error, ValueError) else 1)
  except KeyboardInterrupt as error:
    print(f"nash-jax {job}: {str(error) or 'interrupted'}", file=sys.stderr)
    sys.exit(STOPPED if str(error) else 128 + signal.SIGINT)


def keep_compiled_programs() -> None:
  """Sets jax's compilation cache to the user's cache folder, unless the environment sets it.

  Call it before jax is imported. Every host has its own folder, because a program compiled here may
  not run on another processor.
  """
  home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
  folder = os.path.join(home, "nash_jax", file_name(socket.gethostname()))
  if "JAX_COMPILATION_CACHE_DIR" in os.environ or not os.path.isabs(folder):
    return
  with contextlib.suppress(OSError):  # without a cache, each run compiles again
    os.makedirs(folder, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder


def _expand_arguments(job: str, arguments: list[str]) -> list[str]:
  """Returns the arguments with short flags and names of configs expanded."""
  expanded = []
  for previous, argument in zip(["", *arguments], arguments, strict=False):
    name, equals, value = argument.removeprefix("--").partition("=")
    field = SHORT_FLAGS.get(job, {}).get(name) if argument.startswith("--") else None
    if argument.startswith("--config="):
      argument = f"--config={config_file(argument.removeprefix('--config='))}"
    elif previous == "--config":
      argument = config_file(argument)
    expanded.append(f"--config.{field}{equals}{value}" if field else argument)
  return expanded


def _join_processes() -> None:
  """Joins the processes that the environment describes; launch/ sets it.

  NASH_JAX_COORDINATOR is host:port, or "auto" on TPU slices, which know it. NASH_JAX_PROCESSES is
  the number of processes, and NASH_JAX_PROCESS_ID the index of this one. If a process sends no
  heartbeat for NASH_JAX_HEARTBEAT seconds (100), it counts as dead and the others stop. At the
  start they wait three times as long for each other.
  """
  coordinator = os.environ.get("NASH_JAX_COORDINATOR", "")
  if not coordinator:
    return
  import jax
  from jax.experimental import multihost_utils

  seconds = int(os.environ.get("NASH_JAX_HEARTBEAT", "100"))
  patience: dict[str, Any] = {"heartbeat_timeout_seconds": seconds}
  patience["initialization_timeout"] = 3 * seconds
  if coordinator == "auto":
    jax.distributed.initialize(**patience)
  else:
    names = ("NASH_JAX_PROCESSES", "NASH_JAX_PROCESS_ID")
    try:
      count, index = (int(os.environ[name]) for name in names)
    except (KeyError, ValueError) as error:
      raise ValueError(
        f"{' and '.join(names)}: expected whole numbers with NASH_JAX_COORDINATOR, got {error}."
        " launch/local.sh sets all three."
      ) from error
    jax.distributed.initialize(coordinator, count, index, **patience)
  # CPUs connect at the first collective, and wait 30 s for each other: now all are here.
  multihost_utils.sync_global_devices("the processes have joined")
  faulthandler.disable()  # its dump would bury what jax says when another process died


@contextlib.contextmanager
def _leave_at_once(job: str) -> Iterator[None]:
  """Ends a process at once if it fails and is one of several, since the others wait for it."""
  if not os.environ.get("NASH_JAX_COORDINATOR"):
    yield
    return
  _join_processes()
  import jax
  from absl import logging

  index, count = jax.process_index(), jax.process_count()
  if index:
    logging.set_verbosity(logging.WARNING)  # process 0 logs for all
  try:
    if count > 1 and job not in MULTI_PROCESS:
      jobs = ", ".join(MULTI_PROCESS)
      raise ValueError(f"expected one process, got {count}; only {jobs} run on several")
    yield
  except BaseException as error:
    if not isinstance(error, ValueError):
      traceback.print_exc()
    print(
      f"nash-jax {job}: {error}\nprocess {index} of {count} stops. If another failed first, its log"
      " says why. The same command resumes from the last checkpoint.",
      file=sys.stderr,
      flush=True,
    )
    # Python's own exit would wait for the others at a barrier.
    os._exit(2 if isinstance(error, ValueError) else 1)


def _run_job(job: str, arguments: list[str]) -> None:
  # absl's flags are global, so they are defined only once the job is known.
  from absl import app, flags, logging
  from ml_collections import config_flags

  from nash_jax.config import refuse_unread
  from nash_jax.config.fields import DECLARED

  module, default, description = JOBS[job]
  with _as_value_error(job):
    text, argv = f"Name or file of the config (default {default}).", ["nash-jax", *arguments]
    config = config_flags.DEFINE_config_file(
      "config", config_file(default), text, lock_config=False, sys_argv=argv
    )
  workdir = {"workdir": (f"runs/{job}", "Folder for everything the job writes.")}
  others = [flags.DEFINE_string(name, *rest) for name, rest in FLAGS.get(job, workdir).items()]

  def parse(argv):
    with _as_value_error(job):
      rest = flags.FLAGS(argv)
      list(config.value)  # a config file that cannot be read fails only when used
    return rest

  def main(rest):
    if rest[1:]:
      raise app.UsageError(f"unexpected argument {rest[1]!r}; set fields with --config.NAME=VALUE")
    logging.set_verbosity(logging.INFO)
    handler = logging.get_absl_handler()
    handler.setFormatter(None)
    handler.addFilter(_shorten)
    threading.excepthook = _tell_of_thread
    expected = CONFIG_OF.get(job, job)
    got = config.value.job if "job" in config.value else expected
    require(got == expected, "config.job", expected, got, f"Run it with `nash-jax {got}`.")
    with contextlib.ExitStack() as on_exit:
      on_exit.enter_context(_leave_at_once(job))
      if job == "games":  # games/ imports nothing of run/; other jobs lock their own workdirs
        from nash_jax.run import files, lock

        on_exit.enter_context(lock.hold(files.make_folder(others[0].value)))
      if expected in DECLARED:
        given = config_flags.get_override_values(flags.FLAGS["config"])
        refuse_unread(config.value, expected, [*given])
      importlib.import_module(f"nash_jax.{module}").run(config.value, *(f.value for f in others))
    if job in MULTI_PROCESS:
      _leave_curves(others[0].value)
    return _exit_status(config.value.steps, others[0].value) if job in RESUMED else 0

  if {"-h", "--help"} & {*arguments}:
    parse(["nash-jax", *(a for a in arguments if a not in ("-h", "--help"))])
    print(f"nash-jax {job}: {description}\n")
    for flag in (config, *others):
      print(f"  --{flag.name}: {flags.FLAGS[flag.name].help} [{flags.FLAGS[flag.name].value}]")
    for short, field in SHORT_FLAGS.get(job, {}).items():
      print(f"  --{short}: short for --config.{field}")
    return
  app.run(main, argv=argv, flags_parser=parse)


def _shorten(record: Any) -> bool:
  """Passes this program's own messages, and libraries' warnings without their tracebacks.

  Orbax logs every read, and a failed save once for each of its tasks; its error is raised anyway.
  """
  if record.pathname.startswith(os.path.dirname(__file__)):
    return True
  record.exc_info = record.exc_text = None
  return record.levelno > 20 and record.name != "asyncio"


def _tell_of_thread(failed: threading.ExceptHookArgs) -> None:
  """Logs in one line why a thread ended; the code that needs its result raises the error again."""
  from absl import logging

  name = failed.thread.name if failed.thread else "unknown"
  lines = str(failed.exc_value).splitlines() or [""]
  logging.warning("thread %s ended: %s: %.300s", name, failed.exc_type.__name__, lines[0])
  logging.debug("its traceback", exc_info=failed.exc_value)


def _leave_curves(workdir: str) -> None:
  """Draws curves.png from the metrics of a run that ended, if its workdir is on this machine."""
  import jax
  from absl import logging

  from nash_jax import report

  if jax.process_index() or not os.path.exists(os.path.join(workdir, "metrics.jsonl")):
    return
  try:
    report.curves(workdir)
  except (OSError, ValueError) as error:
    logging.warning("%s/curves.png could not be drawn: %s", workdir, error)


def _exit_status(steps: int, workdir: str) -> int:
  """Returns 0 if a run reached its last step; otherwise prints a line and returns STOPPED."""
  from nash_jax.run import checkpoint

  if (step := checkpoint.newest_step(workdir)) >= steps:
    return 0
  for number in (signal.SIGTERM, signal.SIGHUP):  # everything is saved, and the process is ending
    signal.signal(number, signal.SIG_IGN)
  line = f"stopped at step {step} of {steps}; the same command resumes it"
  with contextlib.suppress(OSError):  # the terminal is gone
    print(line, file=sys.stderr, flush=True)
  return STOPPED


@contextlib.contextmanager
def _as_value_error(job: str) -> Iterator[None]:
  """Turns the errors that ml_collections and absl raise for bad flags into ValueError."""
  from absl import flags

  try:
    yield
  except (AttributeError, KeyError, OSError, flags.Error) as error:
    if text := _of_config_file(error):
      raise ValueError(text) from error
    text = str(error)
    if isinstance(error, AttributeError | KeyError):
      with contextlib.suppress(SyntaxError, ValueError):
        text = str(ast.literal_eval(text))  # a KeyError's text is a repr
      text = f"the config has no such field: {text}"
    text = " ".join(text.replace("\\n", " ").split())
    raise ValueError(f"{text} (`nash-jax {job} --help` lists the fields)") from error


def _of_config_file(error: BaseException) -> str:
  """Returns in one line what a config's file raised, or "" if it raised nothing.

  ml_collections puts the traceback of a ValueError or TypeError into a message, which absl raises
  again; other errors arrive as they are.
  """
  wrapped = re.match(r"flag --config=(.*): Error whilst parsing config file:", str(error))
  raised: BaseException | None = error
  while wrapped and raised and not str(raised).startswith("Error whilst parsing config file:"):
    raised = raised.__context__
  raised = raised.__context__ if wrapped and raised else raised
  if isinstance(raised, AttributeError) and raised.name == "get_config":
    return f"{getattr(raised.obj, '__file__', 'config')}: expected a function get_config, got none"
  places = [
    (frame.f_code.co_filename, line)
    for frame, line in traceback.walk_tb(raised.__traceback__ if raised else None)
    if frame.f_globals.get("__name__") == "config_config"  # ml_collections calls the module so
  ]
  if not places and not wrapped:
    return ""
  spec = wrapped[1] if wrapped else places[-1][0]
  bundled = spec.startswith(f"{_config_folder()}{os.sep}")
  name = os.path.relpath(spec, _config_folder()).replace(".py", "", 1) if bundled else spec
  if not places:  # the call itself failed
    _, colon, word = spec.partition(":")
    expected = "nothing after the colon" if colon else "a word after a colon"
    return f"--config={name}: expected {expected}, got {word!r}"
  what = "" if isinstance(raised, ValueError) else f"{type(raised).__name__}: "
  where = "" if bundled else " ({}, line {})".format(*places[-1])
  return f"--config={name}: {what}{' '.join(str(raised).split())}{where}"

"""The `nash-jax` command: one sub-command a job."""

import contextlib
import faulthandler
import importlib
import importlib.util
import os
import pathlib
import sys
import traceback

from nash_jax.validation import one_of, require

# Job: (module whose run(config, workdir) does it, its default config, what it does).
JOBS = {
  "train": ("train", "stories", "fine-tune a policy online against a judge"),
  "fit": ("fit", "storyteller", "supervised: next token, pairwise judge, reward model"),
  "collect": ("jobs.collect", "votes", "sample pairs of responses and have a judge vote"),
  "sample": ("jobs.sample", "sample", "print continuations, interactive or from a file"),
  "arena": ("jobs.arena", "arena", "policies against policies: win rates and intervals"),
  "compare": ("jobs.compare", "short_compare", "methods side by side, each at its best rate"),
  "sweep": ("jobs.compare", "ablations/kappa", "an ablation: kappa, beta or eta"),
  "plan": ("plan", "gemma2_2b", "memory and time of a run on TPUs that are not here"),
  "short_game": ("jobs.short_game", "short_game", "draw the short games and their reference"),
  "games": ("games.study", "games/theorem", "exact games: solvers, rates, figures"),
  "demo": ("jobs.demo", "stories", "train the bundled storyteller, then hold the arena"),
}

SEVERAL = ("train", "fit")  # jobs that several processes do together
# Jobs that take the config of another job.
CONFIG_OF = {"sweep": "compare", "plan": "train", "short_game": "train", "demo": "train"}

# Flags of a job instead of --workdir, since it leaves nothing there: (default, help).
FLAGS = {
  "plan": {
    "topology": ("v5e:4x4", "A TPU topology, v5e:4x4 or v5e-16; local for this machine."),
    "json": ("", "File for the plan as JSON."),
  }
}

# Fields of a job that are also flags: --realign=1.5 is --config.realign=1.5.
SHORT = {"sample": ("prompt", "file", "realign")}


def _configs() -> pathlib.Path:
  spec = importlib.util.find_spec("nash_jax.configs")
  assert spec, "nash_jax is installed without its configs"
  return pathlib.Path(str(spec.origin)).parent


def config_names() -> list[str]:
  """Returns the names of the configs that come with nash_jax, such as "ablations/kappa"."""
  folder = _configs()
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
  return f"{_configs() / name}.py{colon}{argument}"


def usage() -> str:
  """Returns the text of `nash-jax --help`."""
  jobs = "\n".join(f"  {name:10} {what}" for name, (_, _, what) in JOBS.items())
  return (
    "usage: nash-jax JOB --config=NAME [--config.FIELD=VALUE ...] --workdir=FOLDER\n\n"
    f"jobs:\n{jobs}\n\n"
    f"configs: {', '.join(config_names())}; or a file of your own, --config=FILE.py.\n"
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
    print(f"nash-jax: no job {job!r}; jobs are {', '.join(JOBS)}", file=sys.stderr)
    sys.exit(2)
  try:
    _run_job(job, _expand_arguments(job, arguments[1:]))
  except ValueError as error:
    from absl import logging

    # What the user can mend is said in one line; a trace would bury it: --verbosity=1 shows it.
    logging.debug("bad input", exc_info=True)
    print(f"nash-jax {job}: {error}", file=sys.stderr)
    sys.exit(2)


def _expand_arguments(job: str, arguments: list[str]) -> list[str]:
  """Returns the arguments with short flags and the names of configs written out."""
  out = []
  for before, argument in zip(["", *arguments], arguments, strict=False):
    name = argument.removeprefix("--")
    short = name != argument and name.partition("=")[0] in SHORT.get(job, ())
    if argument.startswith("--config="):
      argument = f"--config={config_file(argument.removeprefix('--config='))}"
    elif before == "--config":
      argument = config_file(argument)
    out.append(f"--config.{name}" if short else argument)
  return out


def _join() -> None:
  """Makes this process one of several, as launch/ sets the environment.

  NASH_JAX_COORDINATOR is host:port, or "auto" on TPU slices, which know; NASH_JAX_PROCESSES and
  NASH_JAX_PROCESS_ID are how many there are and which this is. One that has said nothing for
  NASH_JAX_HEARTBEAT seconds (100) counts as dead, and the others stop; they wait three times as
  long for one that has not come yet.
  """
  coordinator = os.environ.get("NASH_JAX_COORDINATOR", "")
  seconds = int(os.environ.get("NASH_JAX_HEARTBEAT", "100"))
  patience = {"heartbeat_timeout_seconds": seconds, "initialization_timeout": 3 * seconds}
  if coordinator == "auto":
    import jax

    jax.distributed.initialize(**patience)
  elif coordinator:
    import jax

    names = ("NASH_JAX_PROCESSES", "NASH_JAX_PROCESS_ID")
    try:
      count, this = (int(os.environ[name]) for name in names)
    except (KeyError, ValueError) as error:
      raise ValueError(
        f"{' and '.join(names)}: expected whole numbers beside NASH_JAX_COORDINATOR, got {error}."
        " launch/local.sh sets all three."
      ) from error
    jax.distributed.initialize(coordinator, count, this, **patience)
  if coordinator:
    faulthandler.disable()  # where another died, jax says so and aborts: a dump would bury it


@contextlib.contextmanager
def _together(job: str):
  """Has one of several processes that fails leave at once: the others wait for its part."""
  if not os.environ.get("NASH_JAX_COORDINATOR"):
    yield
    return
  _join()
  import jax
  from absl import logging

  here, count = jax.process_index(), jax.process_count()
  if here:
    logging.set_verbosity(logging.WARNING)  # the first one speaks for all
  try:
    if count > 1 and job not in SEVERAL:
      raise ValueError(f"expected one process, got {count}; on several run {', '.join(SEVERAL)}")
    yield
  except BaseException as error:
    if not isinstance(error, ValueError):
      traceback.print_exc()
    print(
      f"nash-jax {job}: {error}\nprocess {here} of {count} stops. If another failed first, its log"
      " says why. The same command goes on from the last checkpoint.",
      file=sys.stderr,
      flush=True,
    )
    # Without Python's own end, which would wait for the others at a barrier.
    os._exit(2 if isinstance(error, ValueError) else 1)


def _check_job(job: str, config) -> None:
  """Raises ValueError where a config names another job than the one that takes it."""
  expected = CONFIG_OF.get(job, job)
  got = config.job if "job" in config else expected
  require(got == expected, "config.job", expected, got, f"Run it with `nash-jax {got}`.")


def _run_job(job: str, arguments: list[str]) -> None:
  # absl's flags are global: they are defined only once a job is known.
  from absl import app, flags, logging
  from ml_collections import config_flags

  module, default, what = JOBS[job]
  with _as_value_error(job):
    config = config_flags.DEFINE_config_file(
      "config",
      config_file(default),
      f"Name or file of the run's config (default {default}).",
      sys_argv=["nash-jax", *arguments],
    )
  workdir = {"workdir": (f"runs/{job}", "Folder for everything the job leaves.")}
  others = [flags.DEFINE_string(name, *rest) for name, rest in FLAGS.get(job, workdir).items()]

  def parse(argv):
    with _as_value_error(job):
      rest = flags.FLAGS(argv)
      list(config.value)  # a file that could not be read says so only when it is used
    return rest

  def main(rest):
    if rest[1:]:
      raise app.UsageError(f"unexpected argument {rest[1]!r}; fields are --config.NAME=VALUE")
    logging.set_verbosity(logging.INFO)
    handler = logging.get_absl_handler()
    handler.setFormatter(None)
    # Orbax reports every read; a user wants this program's own notes, and everybody's warnings.
    handler.addFilter(lambda r: r.levelno > 20 or "nash_jax" in r.pathname)
    _check_job(job, config.value)
    with _together(job):
      importlib.import_module(f"nash_jax.{module}").run(config.value, *(f.value for f in others))

  if any(a in ("-h", "--help") for a in arguments):
    parse(["nash-jax", *(a for a in arguments if a not in ("-h", "--help"))])
    print(f"nash-jax {job}: {what}\n")
    for flag in (config, *others):
      print(f"  --{flag.name}: {flags.FLAGS[flag.name].help} [{flags.FLAGS[flag.name].value}]")
    return
  app.run(main, argv=["nash-jax", *arguments], flags_parser=parse)


@contextlib.contextmanager
def _as_value_error(job: str):
  """Raises ValueError for what ml_collections and absl say, in their ways, of bad flags."""
  from absl import flags

  try:
    yield
  except (AttributeError, KeyError, OSError, flags.Error) as error:
    text = " ".join(str(error).replace("\\n", " ").split())
    raise ValueError(f"{text} (`nash-jax {job} --help` lists the fields)") from error

"""The documentation's code blocks: read as GitHub reads them, run, and asked for their commands."""

import dataclasses
import functools
import json
import os
import pathlib
import re
import subprocess
import sys
from unittest import mock

import markdown_it
from absl import flags
from ml_collections import ConfigDict, config_flags
from paths import ROOT

from nash_jax import main, train

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
NOTEBOOKS = sorted((ROOT / "colab").glob("*.ipynb"))
RUN = ("bash", "python")
LANGUAGES = (*RUN, "bibtex", "diff", "ini", "json", "jsonl", "text", "toml", "xml", "yaml")
MARK = re.compile(r"<!-- (needs|slow): (\S.*) -->")
FILE = re.compile(r"# (\w+\.py)\n")


@dataclasses.dataclass(frozen=True)
class Block:
  """A block of code of a page.

  Attributes:
    line: of the page, from 1.
    language: "" where it is indented, or fenced without one.
    needs: what running it takes that is not here; "" where it is run.
    slow: why it is run by the slow tests alone; "" where it is run by all.
  """

  page: pathlib.Path
  line: int
  language: str
  code: str
  needs: str = ""
  slow: str = ""

  @property
  def runs(self) -> str:
    """Which tests run it: "always", "slow" or "" for none."""
    if self.language not in RUN or self.needs:
      return ""
    return "slow" if self.slow or self.language == "bash" else "always"

  def __str__(self) -> str:
    return f"{self.page.relative_to(ROOT)}:{self.line}"


@functools.cache
def blocks(page: pathlib.Path) -> tuple[Block, ...]:
  """Returns the blocks of a page, in their order."""
  text = page.read_text(encoding="utf-8")
  lines, found = text.splitlines(), []
  for token in markdown_it.MarkdownIt("commonmark").parse(text):
    if token.type in ("fence", "code_block"):
      assert token.map
      first = token.map[0]
      language = token.info.split()[0] if token.info else ""
      mark = MARK.fullmatch(lines[first - 1].strip()) if first else None
      reason = {mark[1]: mark[2]} if mark else {}
      found.append(Block(page, first + 1, language, token.content, **reason))
  return tuple(found)


# The nash-jax of a page: of a training run it makes two steps.
_SHORT = f"""#!/bin/sh
case $1 in
  train | demo) set -- "$@" --config.steps=2 --config.evaluation.prompts=4 ;;
esac
exec {pathlib.Path(sys.executable).with_name("nash-jax")} "$@"
"""


def _short(config: ConfigDict, workdir: str, run=train.run) -> object:
  """Has `train.run`, as Python calls it, make two steps."""
  config = config.copy_and_resolve_references().unlock()
  config.update_from_flattened_dict({"steps": 2, "evaluation.prompts": 4})
  return run(config, workdir)


@mock.patch.object(train, "run", _short)
def run_blocks(page: pathlib.Path, folder: pathlib.Path, slow: bool) -> None:
  """Runs the blocks of a page in a folder. Those of Python share their names.

  A block of Python whose first line is a comment with a file's name is that file as well. Of a
  training run two steps are made.

  Args:
    slow: all that can be run here; else Python's that are not slow.
  """
  names = {"__name__": "page"}
  programs = folder / ".venv" / "bin"
  programs.mkdir(parents=True)
  (programs / "nash-jax").write_text(_SHORT)
  (programs / "nash-jax").chmod(0o755)
  for block in blocks(page):
    if not block.runs or (block.runs == "slow" and not slow):
      continue
    if block.language == "python":
      if file := FILE.match(block.code):
        (folder / file[1]).write_text(block.code, encoding="utf-8")
      exec(compile("\n" * block.line + block.code, str(page), "exec"), names)
    else:
      path = f"{programs}:{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
      done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.code], cwd=folder, capture_output=True,
        text=True, env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)},
      )  # fmt: skip
      assert done.returncode == 0, f"{block}\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}"


# Has bash expand a block, with a program that writes its arguments down in the place of each that
# runs nash-jax, and nothing in the place of every other.
_SHELL = r"""
command_not_found_handle() { :; }
record() { printf '%s\0' "$@" >> "$RECORD"; printf '\n\0' >> "$RECORD"; }
nash-jax() { record "$@"; }
.venv/bin/nash-jax() { record "$@"; }
launch/tpu.sh() { if [[ $1 == start ]]; then shift; [[ $1 == -- ]] && shift; record "$@"; fi; }
launch/local.sh() { shift; record "$@"; }
sleep() { ((++slept < 3)); }  # of a loop that waits for what is not here
PATH=/nonexistent
"""


def commands(code: str, folder: pathlib.Path) -> list[list[str]]:
  """Returns the arguments of every nash-jax that a block of bash starts.

  Raises:
    ValueError: it is not a program of bash.
  """
  record = folder / "commands"
  record.unlink(missing_ok=True)
  checked = subprocess.run(["bash", "-n"], input=code, capture_output=True, text=True)
  if checked.returncode:
    raise ValueError(checked.stderr)
  subprocess.run(
    ["bash"], input=_SHELL + code, cwd=folder, capture_output=True, text=True, timeout=20,
    env={"RECORD": str(record), "HOME": str(folder)},
  )  # fmt: skip
  found = record.read_text(encoding="utf-8").split("\n\0") if record.exists() else []
  return [command.split("\0")[:-1] for command in found if command]


def shown(block: Block) -> str:
  """Returns the commands that a block which is not of bash shows, as lines "$ nash-jax ..."."""
  joined = block.code.replace("\\\n", " ")
  return "\n".join(re.findall(r"^\$ (.*)$", joined, re.MULTILINE))


def of_notebook(path: pathlib.Path) -> str:
  """Returns the commands of a notebook's cells, and those that its text names with a config."""
  cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
  code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
  text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
  lines = re.findall(r"^!(nash-jax .*)$", "\n".join(code), re.MULTILINE)
  return "\n".join(lines + re.findall(r"`(nash-jax \w+ --config=[^`…]*)`", text))


def parse(arguments: list[str]) -> tuple[str, ConfigDict, list[str], flags.FlagValues]:
  """Returns job, config, the fields that were given, and all flags of a command's arguments.

  Raises:
    ValueError: no such job or config.
    flags.Error, AttributeError: a flag or field that does not exist, or a value of another type.
  """
  job, *rest = arguments
  if job not in main.JOBS:
    raise ValueError(f"no job {job!r}")
  argv = ["nash-jax", *main._expand_arguments(job, rest)]
  values = flags.FlagValues()
  config = config_flags.DEFINE_config_file(
    "config", main.config_file(main.JOBS[job][1]), lock_config=False, flag_values=values,
    sys_argv=argv,
  )  # fmt: skip
  for name, (default, text) in main.FLAGS.get(job, {"workdir": ("", "")}).items():
    flags.DEFINE_string(name, default, text, flag_values=values)
  left = values(argv)[1:]
  if left:
    raise ValueError(f"arguments that nothing reads: {left}")
  return job, config.value, [*config_flags.get_override_values(values["config"])], values

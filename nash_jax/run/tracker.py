"""Sends the record of a run to Weights & Biases, from a separate process.

The run writes metrics.jsonl and samples.jsonl as usual and never waits. This file, run as a
program, reads them and logs what is new; only this process imports wandb. If it fails or hangs, or
the network is down, the run only logs a warning, and the next start sends the rest.

The run writes to its stdin: a JSON object at the start and a word at the end. If the word is
missing, the run has died. What the process prints goes to the run's log.
"""

import contextlib
import json
import logging
import os
import pathlib
import secrets
import signal
import subprocess
import sys
import threading
from typing import Any

log = logging.getLogger(__name__)
ID = "wandb.json"  # holds the W&B id of a workdir's run
START_SECONDS, END_SECONDS = 120, 20  # time limits for W&B
POLL_SECONDS = 2
_WARNING = "warning: "
_AGAIN = "the record in the workdir is complete, and the next start of the same command sends it"


class Tracker:
  """The run's side: starts the process, logs what it prints, and ends it."""

  def __init__(self, folder: pathlib.Path, name: str, config: dict[str, Any]):
    path = folder / ID
    if not path.exists():
      new = os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
      path.write_text(json.dumps({"id": new}) + "\n", encoding="utf-8")
    known = json.loads(path.read_text(encoding="utf-8"))
    start = {"folder": str(folder), "name": name, "config": config, "pid": os.getpid()}
    start |= {"id": known["id"], "seconds": START_SECONDS}
    # In its own session, Ctrl-C reaches only the run. -P keeps the current folder off sys.path.
    self._process = subprocess.Popen(
      [sys.executable, "-P", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL, text=True, encoding="utf-8", start_new_session=True,
    )  # fmt: skip
    self._warned = False
    self._reader = threading.Thread(target=self._pass_on, name="wandb", daemon=True)
    self._reader.start()
    self._write(json.dumps(start) + "\n")

  def _write(self, text: str) -> None:
    assert self._process.stdin is not None
    with contextlib.suppress(OSError, ValueError):  # the process ended; `_pass_on` logs it
      self._process.stdin.write(text)
      self._process.stdin.flush()

  def _pass_on(self) -> None:
    assert self._process.stdout is not None
    for line in self._process.stdout:
      text = line.strip()
      if text.startswith(_WARNING):
        self._warn(text.removeprefix(_WARNING))
      else:
        log.info("W&B: %s", text)
    if status := self._process.wait():
      self._warn(f"its process ended with status {status}")

  def _warn(self, problem: str) -> None:
    if not self._warned:
      log.warning("W&B: %s: the run continues without it; %s", problem, _AGAIN)
    self._warned = True

  def close(self, failed: bool) -> None:
    """Lets the process send the rest, for at most END_SECONDS."""
    assert self._process.stdin is not None
    self._write("failed" if failed else "finished")
    with contextlib.suppress(OSError):
      self._process.stdin.close()
    try:
      self._process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
      self._warn(f"not everything was sent within {END_SECONDS} s of the end")
      with contextlib.suppress(ProcessLookupError):
        os.killpg(self._process.pid, signal.SIGKILL)
    self._reader.join(END_SECONDS)


class _Lines:
  """Reads complete lines of a file while another process writes it."""

  def __init__(self, path: pathlib.Path):
    self._path, self._place = path, 0

  def read(self) -> list[dict[str, Any]]:
    """Returns the new objects, without damaged lines."""
    if not self._path.exists():
      return []
    with self._path.open("rb") as file:
      file.seek(self._place)
      whole, end, _ = file.read().rpartition(b"\n")
    self._place += len(whole + end)
    rows = []
    for line in whole.splitlines():
      with contextlib.suppress(ValueError):
        rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and "step" in row]


def _follow(wandb: Any, run: Any, folder: pathlib.Path, ended: threading.Event) -> None:
  """Logs the record's steps, each with its samples, until the run has ended.

  The samples of a step follow its line of metrics, so a step is logged when the next line arrives.
  """
  metrics, samples = _Lines(folder / "metrics.jsonl"), _Lines(folder / "samples.jsonl")
  waiting: list[dict[str, Any]] = []
  texts: dict[int, list[dict[str, Any]]] = {}
  last = False
  while not last:
    last = ended.wait(POLL_SECONDS)
    waiting += metrics.read()
    for row in samples.read():
      texts.setdefault(row["step"], []).append(row)
    ready, waiting = (waiting, []) if last else (waiting[:-1], waiting[-1:])
    for row in ready:
      step = row.pop("step")
      values = {name: x for name, x in row.items() if x is not None}
      if rows := texts.pop(step, []):
        columns = [*rows[0]]
        data = [[sample.get(name) for name in columns] for sample in rows]
        values["samples"] = wandb.Table(columns=columns, data=data, allow_mixed_types=True)
      if step >= run.step:  # W&B already has earlier steps
        run.log(values, step=step)


def _print(text: str) -> None:
  print(" ".join(text.split())[:500], flush=True)


def main() -> None:
  """Reads the run's settings from stdin, starts or resumes it at W&B, and follows its record."""
  start = json.loads(sys.stdin.readline())
  folder, ended, said = pathlib.Path(start["folder"]), threading.Event(), []

  def wait_for_end() -> None:
    said.append(sys.stdin.read())
    ended.set()

  def give_up() -> None:
    _print(f"{_WARNING}it did not start within {start['seconds']} s")
    os._exit(1)

  threading.Thread(target=wait_for_end, daemon=True).start()
  timer = threading.Timer(start["seconds"], give_up)
  timer.daemon = True
  timer.start()
  try:
    import wandb

    run = wandb.init(
      project=os.environ.get("WANDB_PROJECT", "nash_jax"), id=start["id"], resume="allow",
      name=os.environ.get("WANDB_NAME", start["name"]), config=start["config"],
      dir=os.environ.get("WANDB_DIR", str(folder)), allow_val_change=True,
      settings=wandb.Settings(
        console="off", silent=True, init_timeout=start["seconds"] - 10, x_stats_pid=start["pid"]
      ),
    )  # fmt: skip
    timer.cancel()
    _print(run.url or f"offline; later `wandb sync {pathlib.Path(run.dir).parent}`")
    _follow(wandb, run, folder, ended)
    run.finish(exit_code=0 if said == ["finished"] else 1)
  except BaseException as error:  # goes to the run's log
    _print(f"{_WARNING}{type(error).__name__}: {error}")
    os._exit(1)  # without waiting for W&B's exit handlers


if __name__ == "__main__":
  main()

"""The record of a run: JSON lines, TensorBoard and a progress bar; read one step late."""

import itertools
import json
import math
import os
import pathlib
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent import futures
from typing import Any, TextIO

import jax
import tensorboardX
import tqdm
from absl import logging
from etils import epath

from nash_jax.types import Mean

Value = Mean | jax.Array | float
PHASES = ("sample", "judge", "update", "evaluate", "save")
# Meaning, unit and healthy range of each: docs/metrics.md, which a test compares. The values are
# made in update.py, iteration.py, fit.py, exact.py and judges/.
GLOSSARY = (
  "loss", "p_win", "kl_to_reference", "kl_to_target", "log_ratio_to_reference",
  "log_ratio_to_target", "entropy",
  "response_length", "stopped", "truncated", "flip_rate", "tie_mass", "valid",
  "judge_cut", "judge_cut_tokens",
  "logp_gap", "gradient_norm", "learning_rate", "kappa", "accuracy", "tokens",
  "eval/win_rate_vs_reference", "eval/kl_to_reference", "eval/log_ratio_to_reference",
  "eval/response_length",
  "eval/loss", "eval/accuracy", "eval/bits_per_byte",
  "exact/suboptimality", "exact/kl_to_equilibrium",
  *(f"{quantity}/{phase}" for quantity in ("seconds", "tokens_per_second") for phase in PHASES),
)  # fmt: skip


def number(x: Value) -> float | None:
  """Returns a host value as a float; None for a mean over nothing."""
  if isinstance(x, Mean):
    return float(x.total) / float(x.weight) if x.weight else None
  return float(x)


def _check_names(names: Iterable[str]) -> None:
  for name in names:
    if name not in GLOSSARY:
      raise ValueError(
        f"metric {name!r} is not in metrics.GLOSSARY: add it there, and its meaning, unit and "
        f"healthy range to docs/metrics.md. Known: {', '.join(GLOSSARY)}"
      )


def _reopen(path: pathlib.Path, first_step: int) -> TextIO:
  """Opens JSON lines for appending, without those that a run from `first_step` writes again."""
  # A line without its end is one in whose middle the run was killed.
  lines = path.read_text().split("\n")[:-1] if path.exists() else []
  part = path.with_suffix(".part")
  part.write_text("".join(f"{x}\n" for x in lines if json.loads(x)["step"] < first_step))
  part.replace(path)
  return path.open("a", buffering=1)


class Metrics:
  """The record of a run in its workdir: metrics.jsonl, samples.jsonl and tensorboard/.

  A line holds all values of a step and is written when the next step's first values are pushed.
  Process 0 writes; every process reads, so that all of them stop at a loss that is not finite.
  Files in a bucket cannot be appended to: the record of a workdir in one is kept on this machine,
  and copied there before every checkpoint and at the end.

  Args:
    first_step: where the run starts or resumes; an earlier record from there on is dropped.
    show: names for the progress bar.
    profile: leave a trace of the run's third and fourth step in workdir/profile.
  """

  def __init__(
    self,
    workdir: str | os.PathLike[str],
    *,
    first_step: int,
    total_steps: int,
    show: tuple[str, ...] = (),
    progress: bool = True,
    profile: bool = False,
  ):
    _check_names(show)
    self._first_step, self._show, self._profile = first_step, show, profile
    self._shown: dict[str, str] = {}
    self._pending: tuple[int, dict[str, Value]] | None = None
    self._texts: list[tuple[int, str, Any, Callable[[Any], list[str]]]] = []
    self._clocks: dict[int, list[tuple[str, Value | None, futures.Future[float]]]] = {}
    self._clock, self._waiter = time.perf_counter(), futures.ThreadPoolExecutor(1, "clock")
    self._written, self._failed, self._tracing = first_step - 1, False, False
    self._warned = False
    self._writes = jax.process_index() == 0
    self._bucket = bucket = epath.Path(workdir) if "://" in str(workdir) else None
    folder = pathlib.Path(tempfile.mkdtemp(prefix="nash_jax_") if bucket else workdir)
    self._folder = folder
    if self._writes:
      folder.mkdir(parents=True, exist_ok=True)
      for path in [bucket / name for name in ("metrics.jsonl", "samples.jsonl")] if bucket else ():
        if path.exists():
          (folder / path.name).write_bytes(path.read_bytes())
      self._lines = _reopen(folder / "metrics.jsonl", first_step)
      self._samples = _reopen(folder / "samples.jsonl", first_step)
      suffix = f".{first_step:08d}"  # a run that is resumed within one second must not share a file
      self._board = tensorboardX.SummaryWriter(
        str(folder / "tensorboard"), purge_step=first_step or None, filename_suffix=suffix
      )
    self._bar = tqdm.tqdm(
      total=total_steps, initial=first_step, disable=not (progress and self._writes), unit="step",
      mininterval=0.5 if sys.stderr.isatty() else 30,
    )  # fmt: skip

  def push(self, step: int, values: Mapping[str, Value]) -> None:
    """Takes a step's values; pushes of one step join in one line.

    Raises:
      FloatingPointError: the step before had a loss or gradient that is not finite.
      ValueError: a name that GLOSSARY lacks, or a step whose line is written.
    """
    _check_names(values)
    if step <= self._written:
      raise ValueError(f"metrics of step {step}: expected a step after {self._written}, written")
    if self._pending is not None and self._pending[0] == step:
      self._pending[1].update(values)
      return
    self._write_pending((step, dict(values)))
    if self._profile and step == self._first_step + 1:
      jax.profiler.start_trace(str(self._folder / "profile"))
      self._tracing = True
    elif self._tracing and step >= self._first_step + 4:
      self._stop_trace()

  def _stop_trace(self) -> None:
    if self._tracing:
      jax.profiler.stop_trace()
    self._tracing = False

  def flush(self, step: int) -> None:
    """Writes the line before `step`; a loop calls it before it saves a checkpoint of that step.

    Saving waits for the device anyway; so a run that is killed and resumed there lacks no line,
    and a state behind a loss that is not finite is not saved.
    """
    if self._pending is not None and self._pending[0] < step:
      self._write_pending(None)
    if self._bucket and self._writes:
      self._board.flush()
      for path in (path for path in self._folder.rglob("*") if path.is_file()):
        copy = self._bucket / path.relative_to(self._folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())

  def read(self, step: int, values: dict[str, Value]) -> dict[str, float | None]:
    """Waits for a step's values and returns them as floats: the loop's only device read."""
    return {name: number(x) for name, x in jax.device_get(values).items()}

  def clock(self, step: int, phase: str, arrays: Any, tokens: Value | None = None) -> None:
    """Times a phase of a step without waiting: a thread waits for `arrays`, in order.

    The time runs from the end of the phase clocked before. An error in the thread is raised when
    the step's line is written.

    Args:
      phase: a name in PHASES.
      arrays: small outputs of the phase, such as a mask or a metric: never a buffer that is donated
        later, which the thread could find deleted.
      tokens: processed in the phase; a device scalar is read with the step's metrics.
    """
    _check_names([f"seconds/{phase}"])
    end = self._waiter.submit(lambda: (jax.block_until_ready(arrays), time.perf_counter())[1])
    self._clocks.setdefault(step, []).append((phase, tokens, end))

  def _write_pending(self, following: tuple[int, dict[str, Value]] | None) -> None:
    """Writes the pending line, if there is one; `following` is pending from now on."""
    pending, self._pending = self._pending, following
    if pending is None:
      return
    step, values = pending
    self._written = step
    clocks = self._clocks.pop(step, [])
    counts = {f"tokens_per_second/{p}": tokens for p, tokens, _ in clocks if tokens is not None}
    row = self.read(step, {**values, **counts})
    while self._texts and self._texts[0][0] <= step:
      number, name, arrays, decode = self._texts.pop(0)
      if self._writes:
        texts = decode(jax.device_get(arrays))
        self._samples.write(json.dumps({"step": number, "name": name, "rows": texts}) + "\n")
        self._board.add_text(name, "\n\n---\n\n".join(texts), number)
    for phase, _, end in clocks:
      start, self._clock = self._clock, end.result()
      row[f"seconds/{phase}"] = seconds = self._clock - start
      if (count := row.get(f"tokens_per_second/{phase}")) is not None:
        row[f"tokens_per_second/{phase}"] = count / seconds
    finite = {name: x for name, x in row.items() if x is not None and math.isfinite(x)}
    if self._writes:
      self._lines.write(json.dumps({"step": step, **{n: finite.get(n) for n in row}}) + "\n")
      for name, x in finite.items():
        self._board.add_scalar(name, x, step)
    self._shown |= {name: f"{finite[name]:.3g}" for name in self._show if name in finite}
    self._bar.set_postfix(self._shown, refresh=False)
    self._bar.update(min(step + 1, self._bar.total) - self._bar.n)
    if row.get("valid") == 0 and not self._warned:
      self._warned = True
      logging.warning(
        "step %d: no verdict could be read, so nothing is learned; see `valid` in metrics.jsonl. "
        "Expected answers that the judge can give, and responses that it can read",
        step,
      )
    for name in ("loss", "gradient_norm"):
      value = row.get(name)
      if value is not None and not math.isfinite(value) and not self._failed:
        self._failed = True
        raise FloatingPointError(f"metric {name!r} is {value} at step {step}")

  def value(self, step: int, name: str) -> float | None:
    """Waits for a value of the current step: the score of a checkpoint, which waits anyway."""
    assert self._pending is not None, "a value is read after it is pushed"
    return self.read(step, {name: self._pending[1][name]})[name]

  def text(self, step: int, name: str, arrays: Any, decode: Callable[[Any], list[str]]) -> None:
    """Records sample texts with the line of `step`: decode(arrays on the host) gives the rows."""
    self._texts.append((step, name, arrays, decode))

  def close(self) -> None:
    """Writes the last line; closes files and threads."""
    try:
      self.flush(sys.maxsize)
      for _, _, end in itertools.chain(*self._clocks.values()):
        end.result()
    finally:
      self._stop_trace()
      self._waiter.shutdown()
      self._bar.close()
      if self._writes:
        self._lines.close()
        self._samples.close()
        self._board.close()
      if self._bucket:
        shutil.rmtree(self._folder)

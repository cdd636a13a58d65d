"""The record of a run: JSON lines, TensorBoard and a progress bar; read one step late.

The loop itself writes all of it, so no queue can fill and no thread can die unnoticed. Weights &
Biases follows the files (tracker.py).
"""

import functools
import itertools
import json
import logging
import math
import os
import pathlib
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent import futures
from typing import Any, TextIO

import jax
import tqdm
from etils import epath
from tensorboardX import summary
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import RecordWriter, directory_check

from nash_jax.run import advice, files, tracker
from nash_jax.types import Mean

log = logging.getLogger(__name__)
FLUSH_SECONDS = 120  # how long TensorBoard's events may stay in memory

Value = Mean | jax.Array | float
Decode = Callable[[Any], list[dict[str, Any]]]
PHASES = ("sample", "judge", "update", "evaluate", "save")
# docs/metrics.md gives the meaning, unit and healthy range of each; a test compares the names. The
# values come from update.py, iteration.py, fit.py, exact.py and judges/.
GLOSSARY = (
  "loss", "p_win", "kl_to_reference", "kl_to_target", "log_ratio_to_reference",
  "log_ratio_to_target", "entropy",
  "response_length", "stopped", "truncated", "flip_rate", "tie_mass", "valid",
  "judge_cut", "judge_cut_tokens",
  "pair_accuracy", "delta", "logp_chosen", "logp_rejected",
  "logp_gap", "gradient_norm", "learning_rate", "kappa", "accuracy", "tokens",
  "eval/win_rate_vs_reference", "eval/kl_to_reference", "eval/log_ratio_to_reference",
  "eval/response_length",
  "eval/loss", "eval/accuracy", "eval/bits_per_byte", "eval/pair_accuracy", "eval/delta",
  "exact/suboptimality", "exact/kl_to_equilibrium", "exact/gap",
  "exact/win_rate_vs_reference", "exact/kl_to_reference",
  *(f"{quantity}/{phase}" for quantity in ("seconds", "tokens_per_second") for phase in PHASES),
)  # fmt: skip
OWN = "judge/"  # prefix of metrics of a user's own judge


def is_known(name: str) -> bool:
  """Returns whether a metric may be recorded: it is in GLOSSARY or of a user's own judge."""
  return name in GLOSSARY or name.startswith(OWN)


def number(x: Value) -> float | None:
  """Returns a host value as a float; None for a mean over nothing."""
  if isinstance(x, Mean):
    return float(x.total) / float(x.weight) if x.weight else None
  return float(x)


def _check_names(names: Iterable[str]) -> None:
  for name in names:
    if not is_known(name):
      raise ValueError(
        f"metric {name!r} is not in metrics.GLOSSARY: add it there, and its meaning, unit and "
        f"healthy range to docs/metrics.md. Known: {', '.join(GLOSSARY)}"
      )


def step_of(line: bytes) -> int | None:
  """Returns the step of a line of a record; None if the line is damaged."""
  try:
    row = json.loads(line)
  except (ValueError, RecursionError):  # ValueError includes text that is not UTF-8
    return None
  step = row.get("step") if isinstance(row, dict) else None
  return step if isinstance(step, int) and not isinstance(step, bool) else None


def _separated(line: bytes) -> list[bytes]:
  """Returns a line of a record as lines of one sample each; an old line holds all of a step."""
  row = json.loads(line)
  if not isinstance(row.get("rows"), list):
    return [line]
  texts = (str(text).partition(" ▸") for text in row["rows"])
  samples = [{"step": row["step"], "prompt": x, "response": y} for x, _, y in texts]
  return [json.dumps(sample, ensure_ascii=False).encode() for sample in samples]


def _reopen(path: pathlib.Path, first_step: int) -> TextIO:
  """Opens JSON lines for appending, without the lines that a run from `first_step` rewrites."""
  # The run was killed in the middle of a last line without a line break.
  lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
  kept = []
  for number, line in enumerate(lines, 1):
    step = step_of(line)
    if step is None:
      log.warning("%s:%d is damaged and dropped: %r", path, number, line[:60])
    elif step < first_step:
      kept += [part + b"\n" for part in _separated(line)]
  part = path.with_suffix(".part")
  part.write_bytes(b"".join(kept))
  part.replace(path)
  return path.open("a", buffering=1, encoding="utf-8")


class _Board:
  """An events file of TensorBoard's."""

  def __init__(self, folder: str, first_step: int):
    directory_check(folder)
    # A run that is resumed within a second must not share a file.
    name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{first_step:08d}"
    self._file, self._due = RecordWriter(os.path.join(folder, name)), 0.0
    self._write(event_pb2.Event(file_version="brain.Event:2"))
    if first_step:  # hides what an earlier process wrote from this step on
      start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
      self._write(event_pb2.Event(step=first_step, session_log=start))

  def _write(self, event: event_pb2.Event) -> None:
    event.wall_time = time.time()
    self._file.write(event.SerializeToString())
    if time.monotonic() > self._due:
      self.flush()

  def add(self, step: int, values: Sequence[summary.Summary]) -> None:
    for value in values:
      self._write(event_pb2.Event(step=step, summary=value))

  def flush(self) -> None:
    self._due = time.monotonic() + FLUSH_SECONDS
    self._file.flush()

  def close(self) -> None:
    self._file.close()


class _Lines:
  """A file or pipe for a progress bar: each of its states becomes a line."""

  def __init__(self, stream: TextIO):
    self._stream, self.encoding, self.flush = stream, stream.encoding, stream.flush

  def write(self, text: str) -> None:
    if state := text.strip():
      self._stream.write(f"{state}\n")


def progress_bar(*args: Any, **options: Any) -> tqdm.tqdm:
  """Returns tqdm(*args, **options), which redraws a line on a terminal and adds lines elsewhere."""
  on_screen = sys.stderr.isatty()
  stream = sys.stderr if on_screen else _Lines(sys.stderr)
  return tqdm.tqdm(*args, file=stream, mininterval=0.5 if on_screen else 30, **options)


class Metrics:
  """The record of a run in its workdir: metrics.jsonl, samples.jsonl and tensorboard/.

  A line holds all values of a step, and is written when the first values of the next step arrive.
  Process 0 writes; every process reads, so that all of them stop at a loss that is not finite.
  Files in a bucket cannot be appended to, so the record of a workdir in a bucket is kept on this
  machine and copied to the bucket before every checkpoint and at the end.

  Args:
    first_step: where the run starts or resumes; an earlier record from this step on is dropped.
    show: metrics for the progress bar.
    profile: write a trace of the run's third and fourth step to workdir/profile.
    on_error: when a part cannot be written, "stop" or "continue" without it.
    kl_bound: of kl_to_reference; see advice.recommend.
    pairs: write pairs.jsonl, what `pairs` is given.
    tracked: the run's config if Weights & Biases shall follow the record.

  Raises:
    OSError: a part cannot be written.
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
    on_error: str = "stop",
    kl_bound: float = math.inf,
    pairs: bool = False,
    tracked: dict[str, Any] | None = None,
  ):
    _check_names(show)
    self._on_error, self._lost = on_error, set[str]()
    self._first_step, self._show, self._profile = first_step, show, profile
    self._shown: dict[str, str] = {}
    self._pending: tuple[int, dict[str, Value]] | None = None
    self._texts: list[tuple[int, str, str, Any, Decode]] = []
    self._clocks: dict[int, list[tuple[str, Value | None, futures.Future[float]]]] = {}
    self._started = time.perf_counter()
    self._clock, self._waiter = time.perf_counter(), futures.ThreadPoolExecutor(1, "clock")
    self._written, self._failed, self._tracing = first_step - 1, False, False
    self._history, self._said = dict[str, list[float]](), set[str]()
    self._kl_bound = kl_bound
    self._writes = jax.process_index() == 0
    self._bucket = bucket = epath.Path(workdir) if "://" in str(workdir) else None
    folder = pathlib.Path(tempfile.mkdtemp(prefix="nash_jax_") if bucket else workdir)
    self._folder = folder
    self._files: dict[str, TextIO] = {}
    self._board: _Board | None = None
    self._tracker: tracker.Tracker | None = None
    if self._writes:
      self._record(".", lambda: folder.mkdir(parents=True, exist_ok=True))
      for name in ("metrics.jsonl", "samples.jsonl", *(("pairs.jsonl",) if pairs else ())):
        self._record(name, functools.partial(self._open, name))
      self._record("tensorboard", self._open_board)
      if tracked is not None:
        self._track(workdir, tracked)
    compiles = "compiling for the first step" if first_step < total_steps else ""
    self._bar = progress_bar(
      desc=compiles, total=total_steps, initial=first_step, unit="step",
      disable=not (progress and self._writes),
    )  # fmt: skip

  def _open(self, name: str) -> None:
    path = self._folder / name
    if self._bucket and (self._bucket / name).exists():
      path.write_bytes((self._bucket / name).read_bytes())
    self._files[name] = _reopen(path, self._first_step)

  def _open_board(self) -> None:
    self._board = _Board(str(self._folder / "tensorboard"), self._first_step)

  def _track(self, workdir: str | os.PathLike[str], config: dict[str, Any]) -> None:
    """Makes Weights & Biases follow the record; if it fails to start, logs a warning."""
    known = self._bucket / tracker.ID if self._bucket else None
    name = "/".join(pathlib.PurePath(workdir).parts[-2:])
    try:
      if known and known.exists():
        (self._folder / tracker.ID).write_bytes(known.read_bytes())
      self._tracker = tracker.Tracker(self._folder, name, config)
    except Exception as error:  # a bucket's library raises its own types
      log.warning("W&B cannot be started (%s): the run continues without it", error)

  def _record(self, part: str, write: Callable[[], object]) -> None:
    """Writes to a part of the record; on failure stops or goes on without the part."""
    if not self._writes or part in self._lost:
      return
    try:
      write()
    except OSError as error:
      self._fail(part, error)

  def _fail(self, part: str, error: OSError) -> None:
    if part in self._lost:
      return
    problem = f"{self._folder / part} cannot be written ({error})"
    self._lost.add(part)  # never written again, since half a line may be there
    if self._on_error == "stop":
      raise OSError(problem) from error
    log.warning("%s: the run continues without it", problem)

  def _line(self, name: str, row: dict[str, Any]) -> None:
    self._record(name, lambda: self._files[name].write(f"{json.dumps(row, ensure_ascii=False)}\n"))

  def _events(self, step: int, values: Iterable[summary.Summary]) -> None:
    if self._board is not None:
      self._record("tensorboard", functools.partial(self._board.add, step, list(values)))

  def push(self, step: int, values: Mapping[str, Value]) -> None:
    """Takes values of a step; all values of a step go to one line.

    Raises:
      FloatingPointError: the loss or gradient of the previous step is not finite.
      ValueError: a name that GLOSSARY lacks, or a step whose line is already written.
    """
    _check_names(values)
    if step <= self._written:
      raise ValueError(f"metrics of step {step}: expected a step after {self._written}, the last")
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

    So a run that is killed and resumed there lacks no line, and a state after a loss that is not
    finite is never saved. Saving waits for the device anyway.
    """
    if self._pending is not None and self._pending[0] < step:
      self._write_pending(None)
    for name in self._files:
      self._record(name, functools.partial(self._check_place, name))
    if self._board is not None:
      self._record("tensorboard", self._board.flush)
    if self._bucket:
      self._record(".", self._copy)

  def _check_place(self, name: str) -> None:
    """Raises OSError if a file was removed or moved; writing to it would silently lose data."""
    written, there = os.fstat(self._files[name].fileno()), os.stat(self._folder / name)
    if not os.path.samestat(written, there):
      raise OSError("another file has taken its place")

  def _copy(self) -> None:
    assert self._bucket is not None
    for path in (path for path in self._folder.rglob("*") if path.is_file()):
      copy = self._bucket / path.relative_to(self._folder)
      try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
      except Exception as error:  # a bucket's library raises its own types
        raise OSError(f"{copy}: {error}") from error

  def read(self, step: int, values: dict[str, Value]) -> dict[str, float | None]:
    """Waits for a step's values and returns them as floats: the loop's only device read."""
    return {name: number(x) for name, x in jax.device_get(values).items()}

  def clock(self, step: int, phase: str, arrays: Any, tokens: Value | None = None) -> None:
    """Times a phase of a step without blocking: a thread waits for `arrays`, in order.

    The time runs from the end of the previous phase. An error in the thread is raised when the
    step's line is written.

    Args:
      phase: a name in PHASES.
      arrays: small outputs of the phase, such as a mask or a metric. Never pass a buffer that is
        donated later, since the thread could find it deleted.
      tokens: number of tokens processed; a device scalar is read with the step's metrics.
    """
    _check_names([f"seconds/{phase}"])
    end = self._waiter.submit(lambda: (jax.block_until_ready(arrays), time.perf_counter())[1])
    self._clocks.setdefault(step, []).append((phase, tokens, end))

  def _write_pending(self, following: tuple[int, dict[str, Value]] | None) -> None:
    """Writes the pending line, if there is one; `following` becomes the pending one."""
    pending, self._pending = self._pending, following
    if pending is None:
      return
    step, values = pending
    self._written = step
    clocks = self._clocks.pop(step, [])
    counts = {f"tokens_per_second/{p}": tokens for p, tokens, _ in clocks if tokens is not None}
    row = self.read(step, {**values, **counts})
    for phase, _, end in clocks:
      start, self._clock = self._clock, end.result()
      row[f"seconds/{phase}"] = seconds = self._clock - start
      if (count := row.get(f"tokens_per_second/{phase}")) is not None:
        row[f"tokens_per_second/{phase}"] = count / seconds
    finite = {name: x for name, x in row.items() if x is not None and math.isfinite(x)}
    self._line("metrics.jsonl", {"step": step, **{name: finite.get(name) for name in row}})
    self._events(step, (summary.scalar(name, x) for name, x in finite.items()))
    self._show_progress(step, finite)
    self._advise(step, finite)
    for name in ("loss", "gradient_norm"):
      value = row.get(name)
      if value is not None and not math.isfinite(value) and not self._failed:
        self._failed = True
        raise FloatingPointError(f"metric {name!r} is {value} at step {step}")
    # After the check of the loss: samples of a policy that is not finite may not decode.
    while self._texts and self._texts[0][0] <= step and not self._failed:
      number, file, name, arrays, decode = self._texts.pop(0)
      if self._writes:
        rows = [files.without_nan(row) for row in decode(jax.device_get(arrays))]
        for row in rows:
          self._line(file, {"step": number, **row})
        if name:
          texts = (f"{row['prompt']} ▸{row['response']}" for row in rows)
          self._events(number, [summary.text(name, "\n\n---\n\n".join(texts))])

  def _advise(self, step: int, finite: dict[str, float]) -> None:
    """Logs each recommendation once, from values that are on the host already."""
    for name, value in finite.items():
      self._history.setdefault(name, []).append(value)
    for name, line in advice.recommend(self._history, self._kl_bound).items():
      if name not in self._said and self._writes:
        self._on_bar(self._bar.clear)  # frees the line for the message
        log.warning("step %d: %s", step, line)
      self._said.add(name)

  def _show_progress(self, step: int, finite: dict[str, float]) -> None:
    if not self._bar.disable and self._bar.desc:
      seconds = time.perf_counter() - self._started
      self._on_bar(self._bar.clear)
      log.info("step %d took %.0f s, compilation included", step, seconds)
      self._bar.set_description_str("", refresh=False)
    self._shown |= {name: f"{finite[name]:.3g}" for name in self._show if name in finite}
    self._bar.set_postfix(self._shown, refresh=False)
    self._on_bar(self._bar.update, min(step + 1, self._bar.total) - self._bar.n)

  def _on_bar(self, change: Callable, *args: Any) -> None:
    try:
      change(*args)
    except OSError as error:  # such as a log file on a full disk
      self._bar.disable = True
      log.warning("the progress bar cannot be written: %s", error)

  def value(self, step: int, name: str) -> float | None:
    """Waits for a value of the current step, such as a checkpoint's score; saving waits anyway."""
    assert self._pending is not None, "a value is read after it is pushed"
    return self.read(step, {name: self._pending[1][name]})[name]

  def text(self, step: int, name: str, arrays: Any, decode: Decode) -> None:
    """Records samples with the line of `step`, in samples.jsonl and TensorBoard.

    Args:
      decode: arrays on the host -> the fields of each sample, including the texts "prompt" and
        "response".
    """
    self._texts.append((step, "samples.jsonl", name, arrays, decode))

  def pairs(self, step: int, arrays: Any, decode: Decode) -> None:
    """Records the pairs of a step with its line, in pairs.jsonl."""
    self._texts.append((step, "pairs.jsonl", "", arrays, decode))

  def close(self) -> None:
    """Writes the last line; closes files and threads."""
    ends: list[Callable[[], object]] = [lambda: self.flush(sys.maxsize), self._wait_for_clocks]
    ends += [self._stop_trace, self._waiter.shutdown, lambda: self._on_bar(self._bar.close)]
    ends += [functools.partial(self._end, name, file) for name, file in self._files.items()]
    ends += [functools.partial(self._end, "tensorboard", self._board)] if self._board else []
    if self._tracker is not None:  # after the record is complete
      ends.append(self._end_tracker)
    ends += [lambda: shutil.rmtree(self._folder)] if self._bucket else []
    errors: list[Exception] = []
    for end in ends:  # all of them, even if some fail
      try:
        end()
      except Exception as error:
        errors.append(error)
    for later in errors[1:]:
      log.warning("after that: %s", later)
    if errors:
      raise errors[0]

  def _end_tracker(self) -> None:
    assert self._tracker is not None
    self._tracker.close(self._failed or (bool(self._lost) and self._on_error == "stop"))
    if self._bucket:  # copies the files of W&B's offline mode
      self._record(".", self._copy)

  def _wait_for_clocks(self) -> None:
    for _, _, end in itertools.chain(*self._clocks.values()):
      end.result()

  def _end(self, part: str, file: TextIO | _Board) -> None:
    """Closes a part; a part that could not be written loses what is still in memory."""
    try:
      file.close()
    except OSError as error:
      self._fail(part, error)

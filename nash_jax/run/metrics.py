"""What a run says of itself: JSON lines, TensorBoard, a progress bar; read one step late."""

import concurrent.futures
import itertools
import json
import math
import pathlib
import shutil
import sys
import tempfile
import time
from collections.abc import Callable

import jax
import tensorboardX
import tqdm
from etils import epath

from nash_jax.types import Mean

PHASES = ("sample", "judge", "update", "evaluate", "save")
# What each name means, its unit and its healthy range: docs/metrics.md, which a test holds to this.
GLOSSARY = (
  "loss", "p_win", "kl_to_reference", "kl_to_target", "entropy",
  "response_length", "stopped", "truncated", "flip_rate", "tie_mass", "valid",
  "judge_cut", "judge_cut_tokens",
  "logp_gap", "gradient_norm", "learning_rate", "kappa", "accuracy", "tokens",
  "eval/win_rate_vs_reference", "eval/kl_to_reference", "eval/response_length",
  "eval/loss", "eval/accuracy", "eval/bits_per_byte",
  "exact/suboptimality", "exact/kl_to_equilibrium",
  *(f"{what}/{phase}" for what in ("seconds", "tokens_per_second") for phase in PHASES),
)  # fmt: skip


def _number(x) -> float | None:
  """Returns a host value as a float; None for a mean of nothing."""
  if isinstance(x, Mean):
    return float(x.total) / float(x.weight) if x.weight else None
  return float(x)


def _open(path: pathlib.Path, first_step: int):
  """Opens JSON lines for appending, without what a run resumed at `first_step` will write again."""
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
  Files in a bucket cannot grow: of a workdir there, the record is kept here and copied before every
  checkpoint and at the end.

  Args:
    first_step: where the run begins or goes on; what it wrote from there on before is dropped.
    show: names for the progress bar.
    profile: leave a trace of the third and fourth step from there in workdir/profile.
  """

  def __init__(
    self,
    workdir,
    *,
    first_step: int,
    total_steps: int,
    show: tuple[str, ...] = (),
    progress: bool = True,
    profile: bool = False,
  ):
    self._known(show)
    self._first, self._show, self._shown = first_step, show, {}
    self._pending, self._written, self._failed = None, first_step - 1, False
    self._clocks, self._clock = {}, time.perf_counter()
    self._texts = []
    self._waiter = concurrent.futures.ThreadPoolExecutor(1, "clock")
    self._writes = jax.process_index() == 0
    self._bucket = epath.Path(workdir) if "://" in str(workdir) else None
    self._profile, self._tracing = profile, False
    if self._bucket:
      workdir = tempfile.mkdtemp(prefix="nash_jax_")
    self._workdir = workdir = pathlib.Path(workdir)
    if self._writes:
      workdir.mkdir(parents=True, exist_ok=True)
      for name in ("metrics.jsonl", "samples.jsonl") if self._bucket else ():
        if (self._bucket / name).exists():
          (workdir / name).write_bytes((self._bucket / name).read_bytes())
      self._lines = _open(workdir / "metrics.jsonl", first_step)
      self._samples = _open(workdir / "samples.jsonl", first_step)
      self._board = tensorboardX.SummaryWriter(
        # A run that is resumed within one second must not share a file.
        str(workdir / "tensorboard"),
        purge_step=first_step or None,
        filename_suffix=f".{first_step:08d}",
      )
    self._bar = tqdm.tqdm(
      total=total_steps,
      initial=first_step,
      disable=not (progress and self._writes),
      unit="step",
      mininterval=0.5 if sys.stderr.isatty() else 30,
    )

  def _known(self, names) -> None:
    for name in names:
      if name not in GLOSSARY:
        raise ValueError(
          f"metric {name!r} is not in metrics.GLOSSARY: add it there, and its meaning, unit and "
          f"healthy range to docs/metrics.md. Known: {', '.join(GLOSSARY)}"
        )

  def push(self, step: int, values: dict[str, Mean | jax.Array | float]) -> None:
    """Takes a step's values; pushes of one step join in one line.

    Raises:
      FloatingPointError: the step before had a loss that is not finite.
      ValueError: a name that GLOSSARY lacks, or a step whose line is written.
    """
    self._known(values)
    if step <= self._written:
      raise ValueError(f"metrics of step {step}: expected a step after {self._written}, written")
    if self._pending is not None and self._pending[0] == step:
      self._pending[1].update(values)
      return
    before, self._pending = self._pending, (step, dict(values))
    self._write(before)
    if self._profile and step == self._first + 1:
      jax.profiler.start_trace(str(self._workdir / "profile"))
      self._tracing = True
    elif self._tracing and step >= self._first + 4:
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
      before, self._pending = self._pending, None
      self._write(before)
    if self._bucket and self._writes:
      self._board.flush()
      for path in (path for path in self._workdir.rglob("*") if path.is_file()):
        there = self._bucket / path.relative_to(self._workdir)
        there.parent.mkdir(parents=True, exist_ok=True)
        there.write_bytes(path.read_bytes())

  def read(self, step: int, values: dict) -> dict[str, float | None]:
    """Waits for a step's values and returns them as floats: the loop's only device read."""
    return {name: _number(x) for name, x in jax.device_get(values).items()}

  def clock(self, step: int, phase: str, arrays, tokens: int | jax.Array | None = None) -> None:
    """Times a phase of a step without waiting: a thread waits for `arrays`, in order.

    The time is that from the end of the phase clocked before. What goes wrong in the thread is
    raised when the step's line is written.

    Args:
      phase: a name in PHASES.
      arrays: small outputs of the phase, such as a mask or a metric: never a buffer that is donated
        later, which the thread could find deleted.
      tokens: processed in the phase; a device scalar is read with the step's metrics.
    """
    self._known([f"seconds/{phase}"])
    end = self._waiter.submit(lambda: (jax.block_until_ready(arrays), time.perf_counter())[1])
    self._clocks.setdefault(step, []).append((phase, tokens, end))

  def _write(self, entry: tuple[int, dict] | None) -> None:
    if entry is None:
      return
    step, values = entry
    self._written = step
    clocks = self._clocks.pop(step, [])
    speeds = {f"tokens_per_second/{p}": tokens for p, tokens, _ in clocks if tokens is not None}
    row = self.read(step, {**values, **speeds})
    self._write_texts(step)
    for phase, tokens, end in clocks:
      start, self._clock = self._clock, end.result()
      row[f"seconds/{phase}"] = self._clock - start
      if tokens is not None:
        row[f"tokens_per_second/{phase}"] /= self._clock - start
    finite = {name: x for name, x in row.items() if x is not None and math.isfinite(x)}
    if self._writes:
      self._lines.write(json.dumps({"step": step, **{n: finite.get(n) for n in row}}) + "\n")
      for name, x in finite.items():
        self._board.add_scalar(name, x, step)
    self._shown |= {name: f"{finite[name]:.3g}" for name in self._show if name in finite}
    self._bar.set_postfix(self._shown, refresh=False)
    self._bar.update(min(step + 1, self._bar.total) - self._bar.n)
    loss = row.get("loss")
    if loss is not None and not math.isfinite(loss) and not self._failed:
      self._failed = True
      raise FloatingPointError(f"metric 'loss' is {loss} at step {step}")

  def value(self, step: int, name: str) -> float | None:
    """Waits for a value of the step in hand: the score of a checkpoint, which waits anyway."""
    return self.read(step, {name: self._pending[1][name]})[name]

  def text(self, step: int, name: str, arrays, decode: Callable) -> None:
    """Records sample texts with the line of `step`: decode(arrays on the host) gives the rows."""
    self._texts.append((step, name, arrays, decode))

  def _write_texts(self, step: int) -> None:
    while self._texts and self._texts[0][0] <= step:
      number, name, arrays, decode = self._texts.pop(0)
      if self._writes:
        rows = decode(jax.device_get(arrays))
        self._samples.write(json.dumps({"step": number, "name": name, "rows": rows}) + "\n")
        self._board.add_text(name, "\n\n---\n\n".join(rows), number)

  def close(self) -> None:
    """Writes the last line and lets go of files and threads."""
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
        shutil.rmtree(self._workdir)

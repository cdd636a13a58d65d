"""What every training loop shares: start or resume, record, save, and stop cleanly."""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from ml_collections import ConfigDict

from nash_jax import update
from nash_jax.config import describe
from nash_jax.config.unread import unread
from nash_jax.run import checkpoint, lock, metrics, page, signals
from nash_jax.run.advice import kl_bound, of_config
from nash_jax.run.inputs import Inputs
from nash_jax.types import Params, TrainState

log = logging.getLogger(__name__)


class Setup(Protocol):
  """The part of a loop's setup that `run_loop` uses.

  Attributes:
    reference: parameters that the run never changes, or None.
    state_spec: the state's shapes and shardings.
    initial_state: returns the state of a new run.
    inputs: returns checksums of everything that the run has read.
  """

  @property
  def reference(self) -> Params: ...
  @property
  def state_spec(self) -> TrainState: ...
  @property
  def initial_state(self) -> Callable[[], TrainState]: ...
  def inputs(self) -> Inputs: ...


# (setup, state, first step, log, checkpoints, stop) -> the last state.
type Loop[SetupT] = Callable[
  [SetupT, TrainState, int, metrics.Metrics, checkpoint.Checkpoints, signals.Stop], TrainState
]


def run_loop[SetupT: Setup](
  config: Any,
  workdir: checkpoint.Workdir,
  set_up: Callable[[Any], SetupT],
  loop: Loop[SetupT],
  show: tuple[str, ...],
  progress: bool,
  advice: str,
) -> tuple[SetupT, TrainState]:
  """Sets up a run, restores its last checkpoint, and loops to the end or until a signal.

  The workdir is locked. Signals are handled until the last checkpoint is on disk, so that none can
  interrupt its save.

  Args:
    config: a resolved config.
    set_up: config -> Setup; called after the workdir is known to belong to the run.
    show: metrics of the progress bar.
    advice: what to change if the loss is not finite.

  Returns:
    The setup and the last state.

  Raises:
    ValueError: the workdir belongs to another run, is in use or cannot be written; inputs changed.
    FloatingPointError: the loss is not finite; names the step and the last good checkpoint.
    OSError: a file cannot be read or written; names the last good checkpoint.
  """
  with lock.hold(workdir):
    saved = _saved_config(config, workdir)
    setup = set_up(config)
    with signals.Stop() as stop, _closing(_begin(config, workdir, setup, saved)) as checkpoints:
      state, first_step = checkpoints.restore(setup.state_spec) or (setup.initial_state(), 0)
      _warn(config, saved, first_step)
      try:
        record = metrics.Metrics(
          workdir, first_step=first_step, total_steps=config.steps, show=show, progress=progress,
          profile=config.profile, on_error=config.on_record_error,
          kl_bound=kl_bound(config), pairs=bool(config.get("record_pairs")),
          tracked=describe(config) if config.tracker == "wandb" else None,
        )  # fmt: skip
        with _closing(record):
          end = loop(setup, state, first_step, record, checkpoints, stop)
          checkpoints.wait()  # so that an error of the last save names the last good one, too
          return setup, end
      except FloatingPointError as error:
        raise FloatingPointError(
          f"{error}; {_last_good(checkpoints, workdir)}. {advice}"
        ) from error
      except OSError as error:
        raise OSError(
          f"{error}; {_last_good(checkpoints, workdir)}: once this is fixed, the same command"
          " resumes from there"
        ) from error
      finally:  # the page shows what was recorded, however the run ended
        page.leave(page.write_run, workdir)


def _saved_config(config, workdir: checkpoint.Workdir) -> dict[str, Any]:
  """Returns the config of the run in a workdir; {} if there is no run to resume."""
  if not checkpoint.holds_run(workdir):
    return {}
  allow, ignored = tuple(config.checkpoint.allow), unread(config, config.job)
  return checkpoint.check_config(workdir, describe(config), allow, ignored)


def _begin(
  config, workdir: checkpoint.Workdir, setup: Setup, saved: dict[str, Any]
) -> checkpoint.Checkpoints:
  """Opens a run's checkpoints after checking that its inputs are those it started with."""
  allow = tuple(config.checkpoint.allow)
  if not saved and not checkpoint.holds_run(workdir):
    checkpoint.forget(workdir)
  checkpoint.verify_inputs(workdir, setup.inputs(), allow)
  if setup.reference is not None:
    changed = checkpoint.permits(allow, "model.weights")
    checkpoint.verify_base(workdir, setup.reference, record=True, changed=changed)
  return checkpoint.Checkpoints(
    workdir,
    keep=config.checkpoint.keep,
    config=describe(config),
    allow=allow,
    unread=unread(config, config.job),
  )


def _warn(config, saved: dict[str, Any], first_step: int) -> None:
  """Warns of a late warm-up, a run past its last step, and a learning rate that jumps."""
  for line in of_config(config):
    log.warning("%s", line)
  if first_step > config.steps:
    log.warning("step %d is beyond steps=%d: nothing is left to do", first_step, config.steps)
  if not saved or not 0 < first_step < config.steps:
    return
  now = describe(config)["optimizer"]
  before = ConfigDict({**now, **saved.get("optimizer", {})})
  old, new = (
    float(update.make_schedule(optimizer, steps)(first_step))
    for optimizer, steps in (
      (before, saved.get("steps", config.steps)),
      (config.optimizer, config.steps),
    )
  )
  if not math.isclose(old, new, rel_tol=1e-5):
    log.warning(
      "the learning rate jumps from %.4g to %.4g at step %d: optimizer.schedule=%r over steps=%d"
      " instead of %d", old, new, first_step, config.optimizer.schedule, config.steps,
      saved.get("steps", config.steps),
    )  # fmt: skip


def _last_good(checkpoints: checkpoint.Checkpoints, workdir: checkpoint.Workdir) -> str:
  """Returns a text on the checkpoint that a failed run can resume from; never raises."""
  try:
    checkpoints.wait()
  except Exception as error:  # of a save in progress
    log.warning("after that: %s", error)
  try:
    step = checkpoints.last_good()
  except Exception as error:
    return f"its checkpoints in {workdir} cannot be read: {error}"
  found = (
    "there is no checkpoint yet" if step is None else f"the last good checkpoint is step {step}"
  )
  return f"{found} in {workdir}"


@contextlib.contextmanager
def _closing[T: (metrics.Metrics, checkpoint.Checkpoints)](thing: T) -> Iterator[T]:
  """Closes `thing` at the end; an error while closing never hides an earlier error."""
  try:
    yield thing
  except BaseException:
    try:
      thing.close()
    except Exception as error:
      log.warning("after that: %s", error)
    raise
  thing.close()

"""What every long run does with its folder: start or continue, record, save, and stop cleanly."""

import contextlib
from collections.abc import Callable
from typing import Any, Protocol

from etils import epath

from nash_jax.config import describe
from nash_jax.run import checkpoint, metrics, signals
from nash_jax.types import Params, TrainState


class Setup(Protocol):
  """What a loop works with, as far as `run_loop` knows it.

  Attributes:
    reference: parameters that the run never changes, or None.
    state_spec: the state's shapes and shardings.
    initial_state: makes the state in which a fresh run starts.
  """

  @property
  def reference(self) -> Params: ...
  @property
  def state_spec(self) -> TrainState: ...
  @property
  def initial_state(self) -> Callable[[], TrainState]: ...


def run_loop[SetupT: Setup](
  config,
  workdir,
  set_up: Callable[[Any], SetupT],
  loop: Callable[..., TrainState],
  *,
  show: tuple[str, ...],
  progress: bool,
  advice: str,
) -> tuple[SetupT, TrainState]:
  """Sets up a run, restores what its folder holds, and loops to the end or until a signal.

  Args:
    config: resolved.
    set_up: config -> Setup; called once the folder is known to be the run's own.
    loop: (setup, state, first step, metrics, checkpoints, stop) -> the last state.
    show: metrics of the progress bar.
    advice: what to change where the loss is not finite.

  Returns:
    The setup and the last state.

  Raises:
    ValueError: a folder of another run, or one that cannot be written.
    FloatingPointError: a loss that is not finite; names the step and the last good checkpoint.
  """
  workdir = epath.Path(workdir)
  checkpoints = checkpoint.Checkpoints(
    workdir,
    keep=config.checkpoint.keep,
    config=describe(config),
    allow=tuple(config.checkpoint.allow),
  )
  with contextlib.closing(checkpoints):
    setup = set_up(config)
    if setup.reference is not None:
      checkpoint.verify_base(workdir, setup.reference, record=True)
    state, first_step = checkpoints.restore(setup.state_spec) or (setup.initial_state(), 0)
    log = metrics.Metrics(
      workdir,
      first_step=first_step,
      total_steps=config.steps,
      show=show,
      progress=progress,
      profile=config.profile,
    )
    try:
      with contextlib.closing(log), signals.Stop() as stop:
        return setup, loop(setup, state, first_step, log, checkpoints, stop)
    except FloatingPointError as error:
      raise FloatingPointError(
        f"{error}; the last good checkpoint is step {checkpoints.last_good()} in {workdir}."
        f" {advice}"
      ) from error

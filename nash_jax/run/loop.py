"""What surrounds every training loop: start or resume, record, save, and stop cleanly."""

import contextlib
from collections.abc import Callable
from typing import Any, Protocol

from etils import epath

from nash_jax.config import describe
from nash_jax.run import checkpoint, metrics, signals
from nash_jax.types import Params, TrainState


class Setup(Protocol):
  """The part of a loop's setup that `run_loop` uses.

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
  """Sets up a run, restores what its workdir holds, and loops to the end or until a signal.

  Args:
    config: resolved.
    set_up: config -> Setup; called once the workdir is known to belong to the run.
    show: metrics of the progress bar.
    advice: what to change if the loss is not finite.

  Returns:
    The setup and the last state.

  Raises:
    ValueError: a workdir of another run, or one that cannot be written.
    FloatingPointError: a loss that is not finite; names the step and the last good checkpoint.
  """
  workdir, keep, allow = epath.Path(workdir), config.checkpoint.keep, tuple(config.checkpoint.allow)
  checkpoints = checkpoint.Checkpoints(workdir, keep=keep, config=describe(config), allow=allow)
  with contextlib.closing(checkpoints):
    setup = set_up(config)
    if setup.reference is not None:
      checkpoint.verify_base(workdir, setup.reference, record=True)
    state, first_step = checkpoints.restore(setup.state_spec) or (setup.initial_state(), 0)
    log = metrics.Metrics(
      workdir, first_step=first_step, total_steps=config.steps, show=show, progress=progress,
      profile=config.profile,
    )  # fmt: skip
    try:
      with contextlib.closing(log), signals.Stop() as stop:
        return setup, loop(setup, state, first_step, log, checkpoints, stop)
    except FloatingPointError as error:
      good = f"the last good checkpoint is step {checkpoints.last_good()} in {workdir}"
      raise FloatingPointError(f"{error}; {good}. {advice}") from error

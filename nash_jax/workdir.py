"""What every long run does with its folder: start or go on, record, save, and stop cleanly."""

import contextlib
from collections.abc import Callable
from typing import Any

from etils import epath

from nash_jax import checkpoint, metrics
from nash_jax import config as configs
from nash_jax.types import TrainState


def play(
  config, workdir, assemble: Callable, loop: Callable, *, show: tuple[str, ...], progress: bool,
  advice: str,
) -> tuple[Any, TrainState]:  # fmt: skip
  """Assembles a run, restores what its folder holds, and loops to the end or until a signal.

  Args:
    config: resolved.
    assemble: from the config to the run, whose `ref` are parameters that never change, or None,
      `like` the state's shapes and shardings, and `begin()` the state of a fresh one; called once
      the folder is known to be the run's own.
    loop: (run, state, first step, metrics, checkpoints, stop) -> the last state.
    show: metrics of the progress bar.
    advice: what to change where the loss is not finite.

  Returns:
    The run and its last state.

  Raises:
    ValueError: a folder of another run, or one that cannot be written.
    FloatingPointError: a loss that is not finite; names the step and the last good checkpoint.
  """
  workdir = epath.Path(workdir)
  checkpoints = checkpoint.Checkpoints(
    workdir, keep=config.checkpoint.keep, config=configs.describe(config),
    allow=tuple(config.checkpoint.allow),
  )  # fmt: skip
  with contextlib.closing(checkpoints):
    it = assemble(config)
    if it.ref is not None:
      checkpoint.verify_base(workdir, it.ref, record=True)
    state, first = checkpoints.restore(it.like) or (it.begin(), 0)
    log = metrics.Metrics(
      workdir, first_step=first, total_steps=config.steps, show=show, progress=progress,
      profile=config.profile,
    )  # fmt: skip
    try:
      with contextlib.closing(log), checkpoint.Stop() as stop:
        return it, loop(it, state, first, log, checkpoints, stop)
    except FloatingPointError as error:
      raise FloatingPointError(
        f"{error}; the last good checkpoint is step {checkpoints.last_good()} in {workdir}."
        f" {advice}"
      ) from error

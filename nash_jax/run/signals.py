"""Signals that stop a run between two steps, at the same step on all hosts."""

import contextlib
import os
import signal
import threading
import types
from typing import Any

import jax
from jax.experimental import multihost_utils


class Stop:
  """Turns SIGTERM, SIGHUP and Ctrl-C into a step before which all hosts stop.

  With several processes, jax's preemption service handles the signal: in the background it agrees
  on a step with all processes, and none waits for a device. A second Ctrl-C raises
  KeyboardInterrupt at once. Outside the main thread, where Python allows no handlers, signals keep
  their usual effect.
  """

  def __init__(self) -> None:
    self.requested = False
    self._previous: dict[int, Any] = {}

  def _handle(self, number: int, frame: types.FrameType | None) -> None:
    if self.requested and number == signal.SIGINT:
      raise KeyboardInterrupt
    self.requested = True
    if jax.process_count() > 1:
      os.kill(os.getpid(), signal.SIGTERM)  # to the service's handler
    # No logging here: the interrupted code may hold its lock.
    with contextlib.suppress(OSError):  # the terminal is gone, or the log's disk is full
      os.write(2, b"\nstopping after this step, then saving; press Ctrl-C again to quit at once\n")

  def before(self, step: int) -> bool:
    """Returns whether to stop before `step`; every process must call it once per step."""
    if jax.process_count() == 1:
      return self.requested
    return multihost_utils.reached_preemption_sync_point(step)

  def __enter__(self) -> "Stop":
    if threading.current_thread() is threading.main_thread():
      alone = jax.process_count() == 1
      numbers = {signal.SIGINT, signal.SIGHUP} | ({signal.SIGTERM} if alone else set())
      if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # nohup: outlives its terminal
        numbers.remove(signal.SIGHUP)
      for number in numbers:
        self._previous[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, *exc: object) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)

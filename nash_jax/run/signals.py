"""Signals that end a run: it stops between two steps, on all hosts at the same one."""

import contextlib
import os
import signal
import threading
import types
from typing import Any

import jax
from jax.experimental import multihost_utils


class Stop:
  """Turns SIGTERM, Ctrl-C and a terminal that closes into one step before which all hosts stop.

  With several processes, jax's preemption service takes the signal: beside the loop it asks all of
  them which step they are at, and no process waits for a device. A second Ctrl-C raises
  KeyboardInterrupt at once. Outside the main thread, where Python allows no handlers, nothing
  changes.
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
    # No logging here: its lock may be held by the very code that was interrupted.
    with contextlib.suppress(OSError):  # a terminal that is gone, or a log on a full disk
      os.write(2, b"\nstopping after this step, then saving; press Ctrl-C again to quit at once\n")

  def before(self, step: int) -> bool:
    """Returns whether to stop before `step`; every process calls it once at every step."""
    if jax.process_count() == 1:
      return self.requested
    return multihost_utils.reached_preemption_sync_point(step)

  def __enter__(self) -> "Stop":
    if threading.current_thread() is threading.main_thread():
      alone = jax.process_count() == 1
      numbers = {signal.SIGINT, signal.SIGHUP} | ({signal.SIGTERM} if alone else set())
      if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # nohup: it is to outlive its terminal
        numbers.remove(signal.SIGHUP)
      for number in numbers:
        self._previous[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, *exc: object) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)

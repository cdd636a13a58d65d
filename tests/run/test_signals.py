"""Signals ask a run to stop, wherever its messages go."""

import errno
import os
import signal

import pytest
from saved_states import failing

from nash_jax.run.signals import Stop


def test_signals_ask_for_a_stop_and_the_second_interrupt_is_at_once(capfd):
  before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
  with Stop() as stop:
    assert not stop.requested
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.requested
  with Stop() as stop:
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.requested
    with pytest.raises(KeyboardInterrupt):
      signal.raise_signal(signal.SIGINT)
  assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
  assert capfd.readouterr().err.count("stopping after this step") == 2


def test_a_stop_survives_a_terminal_that_is_gone(monkeypatch):
  monkeypatch.setattr(os, "write", failing(1, os.write, OSError(errno.ENOSPC, "No space left")))
  with Stop() as stop:
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.requested

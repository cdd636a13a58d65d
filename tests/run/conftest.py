"""Fixtures that tests of a run's files use."""

import logging

import pytest


@pytest.fixture(autouse=True)
def _warnings(caplog):
  caplog.set_level(logging.WARNING, "nash_jax.run.checkpoint")

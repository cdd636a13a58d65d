"""Fixtures of the tests of the online loop."""

import pytest
import tiny
import tiny_runs


@pytest.fixture(scope="module")
def start(assembled):
  """Returns (workdir, changed functions) -> Done of the tiny run, compiled but once."""

  def start(workdir, **functions):
    return tiny_runs.start(assembled, tiny.train(), workdir, **functions)

  return start


@pytest.fixture
def changed(assembled):
  """Returns (workdir, changes by dotted name, changed functions) -> Done of the tiny run."""
  return lambda workdir, changes, **functions: tiny_runs.start(
    assembled, tiny.train(changes), workdir, **functions
  )

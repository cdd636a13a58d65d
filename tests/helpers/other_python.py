"""The Python of another environment, which has transformers."""

import os

import pytest


def python_with(packages="torch, transformers, sentencepiece and protobuf", purpose=""):
  """Returns that interpreter's path; where none is named, skips the test and says what it needs."""
  named = os.environ.get("NASH_JAX_TEST_TRANSFORMERS")
  if not named:
    needed = f"set NASH_JAX_TEST_TRANSFORMERS to a Python with {packages}"
    pytest.skip(f"{needed}: {purpose}" if purpose else needed)
  return named

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def _float64():
  """The games are checked to 1e-12: float64 here, and only here."""
  with jax.enable_x64(True):
    yield


@pytest.fixture(scope="module")
def games_dir(request):
  """The measured matrix games, or a skip that says where they were looked for."""
  import os
  import pathlib

  data = os.environ.get("NASH_JAX_TEST_DATA", request.config.rootpath.parent / "shared" / "data")
  path = pathlib.Path(data) / "matrix_games"
  if not path.is_dir():
    pytest.skip(f"no measured games at {path}; set NASH_JAX_TEST_DATA to the data folder")
  return path

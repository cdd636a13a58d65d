"""Fixtures every test file may use, and a cache of compiled programs they all share."""

import gc
import importlib
import os
import pathlib
import signal
from unittest import mock

# Tests compile much and run little: a quarter less time without LLVM's optimisations.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"

import fsspec
import hypothesis
import jax
import jaxtyping
import numpy as np
import pytest
from etils import epath
from paths import ROOT

# What an assert compared is printed where it stands in a helper, too.
HELPERS = {path.stem for path in (ROOT / "tests" / "helpers").glob("*.py")}
pytest.register_assert_rewrite(*sorted(HELPERS - {"paths"}))
jax.config.update("jax_numpy_rank_promotion", "raise")
# What crosses rooms has the types and shapes that its annotations state: see shapes.py.
CHECKED = ("iteration", "judges", "sampler", "update", "exact", "policy")
CHECKED += ("data.judge_template", "models.gemma", "models.logprobs", "objectives.losses")
# The exact games check values themselves, and are checked behind that.
hook = jaxtyping.install_import_hook
with (
  mock.patch.object(jaxtyping, "Array", jax.Array | np.ndarray),  # what jit takes
  hook([f"nash_jax.{name}" for name in CHECKED], "shapes.typechecker"),
  hook("nash_jax.games", "shapes.typechecker_after"),
):
  for name in (*CHECKED, "types", "games.study"):  # which imports all the games
    importlib.import_module(f"nash_jax.{name}")
# A shell has programs in its background ignore Ctrl-C, and what they start: here it is pressed.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
  signal.signal(signal.SIGINT, signal.default_int_handler)
# In the environment too: for the processes that tests start.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
# Small programs too: there are a thousand of 15 ms each, which both workers need.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update(
  "jax_persistent_cache_min_compile_time_secs",
  float(os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"]),
)
# A busy machine is no fault of what is tested.
hypothesis.settings.register_profile("tests", deadline=None)
hypothesis.settings.load_profile("tests")
# Modules and compiled programs stay: looking through them for garbage is a twentieth of the time.
gc.set_threshold(100_000, 50, 100)


@pytest.fixture(scope="session")
def data_dir() -> pathlib.Path:
  """The folder of real data; tests that need it skip, and say why, where it does not exist."""
  named = os.environ.get("NASH_JAX_TEST_DATA")
  for folder in [pathlib.Path(named)] if named else [ROOT.parent / "shared" / "data"]:
    if folder.is_dir():
      return folder
  pytest.skip("no real data: set NASH_JAX_TEST_DATA to the folder that holds it")


@pytest.fixture(scope="session")
def assembled():
  """The run of tests/configs/tiny.py, assembled: compiled functions for all tests that train."""
  import tiny

  from nash_jax import train
  from nash_jax.config import resolve

  return train.set_up(resolve(tiny.train()))


@pytest.fixture
def serve():
  """Starts a server that judges, and returns it with the config of a judge that asks it."""
  import judge_server

  with judge_server.serving() as start:
    yield start


@pytest.fixture
def bucket(monkeypatch):
  """Has gs:// be in memory; returns that file system."""
  memory = fsspec.filesystem("memory")
  memory.store.clear()
  monkeypatch.setattr(memory, "_strip_protocol", lambda path: path.replace("gs://", "/"))
  monkeypatch.setattr(epath.backend.fsspec_backend, "_get_filesystem", lambda name: memory)
  monkeypatch.setattr(epath.gpath, "_is_tf_installed", lambda: False)
  return memory

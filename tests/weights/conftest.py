"""Fixtures that tests of weights use."""

import shutil

import pytest
from paths import FIXTURES
from weight_files import MODELS, NAMES, hugging_face_model


@pytest.fixture(scope="module", params=NAMES)
def from_transformers(request):
  return hugging_face_model(request.param)


@pytest.fixture
def folder(tmp_path):
  """A copy of the sharded fixture that may be damaged, and the config."""
  where = tmp_path / "model"
  shutil.copytree(FIXTURES / "hf_gemma3", where)
  return where, MODELS["hf_gemma3"]

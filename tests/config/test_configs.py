"""The configs that come with nash_jax: found by name in any folder, and in an installed wheel."""

import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import runpy
import shutil
import subprocess
import sys
import zipfile

import pytest
from bundled_configs import load, make_local_files
from commands import command
from paths import ROOT

from nash_jax import main
from nash_jax.config import checks, fields, resolve
from nash_jax.configs import gemma2_2b
from nash_jax.data.tokenizer import Tokenizer
from nash_jax.plan import memory
from nash_jax.validation import asset_path

TRUE_SIZE = {
  "gemma3_270m": ("gemma-3-270m-it", "gemma-3-1b-it"),
  "gemma3_1b": ("gemma-3-1b-it", "gemma-3-4b-it"),
  "gemma3_4b": ("gemma-3-4b-it", None),
  "gemma2_2b": ("gemma-2-2b-it", "gemma-2-9b-it"),
  "gemma4_e2b": ("gemma-4-E2B-it", "gemma-4-E4B-it"),
}


def test_every_config_has_a_name():
  files = (path.relative_to(ROOT / "configs") for path in (ROOT / "configs").rglob("*.py"))
  names = {path.with_suffix("").as_posix() for path in files if path.stem != "__init__"}
  assert set(main.config_names()) == names
  assert {"stories", "ablations/kappa", "games/theorem"} < names


@pytest.mark.parametrize("name", main.config_names())
def test_a_config_loads_by_its_name_in_any_folder_and_resolves_for_its_job(
  name, tmp_path, monkeypatch
):
  """Where the weights and runs are there that it names by their paths from this folder."""
  monkeypatch.chdir(tmp_path)
  config = load(name)
  assert config.job in main.JOBS
  if config.job not in fields.DECLARED:  # which check their configs themselves
    assert config.job == name.split("/")[0]
    return
  make_local_files(config, tmp_path)
  resolved = resolve(config, config.job)
  assert resolved.is_locked
  assert resolved.job == config.job


def test_a_config_takes_its_argument_after_a_colon():
  assert main.config_file("short_game:strong") == f"{main.config_file('short_game')}:strong"
  assert main.config_file("mine/own.py:strong") == "mine/own.py:strong"


@pytest.mark.parametrize("name", sorted({*main.config_names()} - {"realign"}))
def test_a_config_refuses_a_word_that_it_does_not_know(name):
  """A mistyped ":smoke" would start a study of hours. After realign's colon any run may stand."""
  get_config = runpy.run_path(main.config_file(name))["get_config"]
  with pytest.raises((ValueError, TypeError)) as error:
    get_config("smock")
  assert "got 'smock'" in str(error.value) or "takes 0 positional arguments" in str(error.value)


@pytest.mark.parametrize("name", TRUE_SIZE)
def test_a_smoke_of_true_size_cuts_no_prompt(name):
  c = resolve(runpy.run_path(main.config_file(name))["get_config"]("smoke"), "train")
  tokenizer = Tokenizer(c.model.tokenizer, c.model.template)
  lines = pathlib.Path(asset_path(c.prompts.path)).read_text().splitlines()
  longest = max(len(tokenizer.prompt(json.loads(line)["prompt"])) for line in lines)
  assert longest == c.prompts.max_tokens


def test_an_unknown_name_lists_the_names_and_the_nearest():
  message = r"config \(a name, or a \.py file\): got 'storis', expected one of ablations/"
  with pytest.raises(ValueError, match=message) as error:
    main.config_file("storis")
  assert all(name in str(error.value) for name in main.config_names())
  assert "did you mean 'stories'" in str(error.value)


@pytest.mark.parametrize("spec", ["mine/own.py", "mine/own.py:0.25", "short_game:strong"])
def test_a_config_by_path_or_name_works_in_another_folder(spec, tmp_path):
  (tmp_path / "mine").mkdir()
  (tmp_path / "mine" / "own.py").write_text(
    "from nash_jax import config\n\n\n"
    "def get_config(beta='0.125'):\n"
    "  c = config.train()\n"
    "  c.algorithm.beta = float(beta)\n"
    "  return c\n"
  )
  done = command("train", f"--config={spec}", "--help", folder=tmp_path)
  assert done.returncode == 0, done.stderr
  beta = {"mine/own.py": 0.125, "mine/own.py:0.25": 0.25, "short_game:strong": 0.01}[spec]
  assert f"beta: {beta}\n" in done.stdout


# Trains a step from an empty folder, then lists the files of nash_jax that were imported.
PROGRAM = """
import sys
import nash_jax.configs
from nash_jax import main
try:
  main.run()
finally:
  modules = [module for name, module in sys.modules.items() if name.split(".")[0] == "nash_jax"]
  print(*sorted(f"imported {module.__file__}" for module in modules), sep="\\n")
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
  """A folder with what a wheel of this checkout holds."""
  if not importlib.util.find_spec("pip"):
    pytest.skip("no pip in this environment, which builds the wheel")
  try:
    version = importlib.metadata.version("setuptools")
  except importlib.metadata.PackageNotFoundError:
    version = "0"
  if int(version.split(".")[0]) < 77:
    pytest.skip(f"setuptools {version}: pyproject.toml needs 77 to build without the network")
  folder = tmp_path_factory.mktemp("wheel")
  source = folder / "source"  # a copy: setuptools leaves what it builds beside pyproject.toml
  source.mkdir()
  for name in ("nash_jax", "configs"):
    shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
  for name in ("pyproject.toml", "README.md", "LICENSE"):
    shutil.copy(ROOT / name, source)
  flags = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
  build = [sys.executable, "-m", "pip", "wheel", *flags, f"--wheel-dir={folder}", str(source)]
  done = subprocess.run(build, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  (file,) = folder.glob("nash_jax-*.whl")
  with zipfile.ZipFile(file) as archive:
    archive.extractall(folder / "installed")
  return folder / "installed"


@pytest.mark.slow
def test_a_wheel_trains_by_a_configs_name_in_an_empty_folder(wheel, tmp_path):
  """PYTHONPATH lies before the finder of an editable installation, which comes last."""
  arguments = [
    "train",
    "--config=stories",
    "--config.steps=1",
    "--config.prompts.batch_size=4",
    "--config.evaluation.prompts=4",
    "--config.sampling.max_tokens=8",
    f"--workdir={tmp_path / 'run'}",
  ]
  empty = tmp_path / "empty"
  empty.mkdir()
  done = subprocess.run(
    [sys.executable, "-c", PROGRAM, *arguments],
    cwd=empty,
    env={**os.environ, "PYTHONPATH": str(wheel)},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  imported = re.findall(r"^imported (.*)$", done.stdout, re.M)
  assert f"{wheel}/nash_jax/__init__.py" in imported
  assert f"{wheel}/nash_jax/configs/__init__.py" in imported
  assert [file for file in imported if not file.startswith(f"{wheel}/")] == []
  lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
  assert [json.loads(line)["step"] for line in lines] == [0, 1]
  assert not any(empty.iterdir())


@pytest.mark.parametrize("kind", ["", "lora", "self", "lora,self"])
@pytest.mark.parametrize("name", TRUE_SIZE)
def test_one_start_says_everything_that_a_config_of_true_size_lacks(
  name, kind, tmp_path, monkeypatch
):
  """Both weights, the tokenizers and the prompts, each with how to get it; then nothing is left."""
  monkeypatch.chdir(tmp_path)
  config = runpy.run_path(main.config_file(name))["get_config"](kind)
  policy, judge = TRUE_SIZE[name]
  judge = None if "self" in kind else judge
  with pytest.raises(ValueError, match="5 files that this run reads are missing") as error:
    resolve(config, "train")
  lines = str(error.value).splitlines()[1:]
  fields = ("model.tokenizer", "model.weights", "judge.model.tokenizer", "judge.model.weights")
  for field, line, model in zip(
    fields, lines, (policy, policy, policy, judge or policy), strict=False
  ):
    assert line.startswith(f"  {field}: expected a file that exists, got 'weights/{model}")
    assert f"hf download google/{model} --local-dir weights/{model}" in line
  assert lines[4].startswith("  prompts.path: no data file 'data/rlhflow.jsonl'")
  make_local_files(config, tmp_path)
  assert checks.judged_by_reference(resolve(config, "train"), memory.ONE_DEVICE) is (judge is None)


def test_an_arena_without_its_runs_says_how_to_name_others(tmp_path, monkeypatch):
  """Also a run that has saved nothing yet, before any weights load."""
  monkeypatch.chdir(tmp_path)
  config = runpy.run_path(main.config_file("arena"))["get_config"]()
  with pytest.raises(ValueError, match="2 files that this run reads are missing") as error:
    resolve(config, "arena")
  for name, line in zip(("target", "trained"), str(error.value).splitlines()[1:], strict=True):
    assert line.startswith(f"  policies.{name}.weights: expected a weights file or a run's workdir")
    assert line.endswith("--config=arena:mine=runs/x names the policies that meet the base.")
  (tmp_path / "runs" / "stories").mkdir(parents=True)
  with pytest.raises(ValueError, match=r"policies\.trained\.weights 'runs/stories': .* found none"):
    resolve(config, "arena")


def test_a_judges_fields_follow_the_policys_until_they_are_set():
  config = gemma2_2b.get_config("self")
  config.update_from_flattened_dict({"model.weights": "mine", "model.tokenizer": "mine.model"})
  assert config.judge.model.weights == "mine"
  assert config.judge.model.tokenizer == "mine.model"
  config.judge.model.weights = "other"
  assert (config.model.weights, config.judge.model.weights) == ("mine", "other")

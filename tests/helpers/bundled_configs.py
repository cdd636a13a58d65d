"""The configs that come with nash_jax, loaded, with the files that they name."""

import pathlib
import runpy

from ml_collections import ConfigDict

from nash_jax import main


def load(name: str) -> ConfigDict:
  return runpy.run_path(main.config_file(name))["get_config"]()


def local_files(config: ConfigDict) -> set[str]:
  """Returns the files of the user's own that a config names, or the folders they lie in."""
  files = set()
  for value in config.values():
    if isinstance(value, ConfigDict | dict):
      files |= local_files(value)
    elif isinstance(value, tuple):
      files |= local_files(dict(enumerate(value)))
    elif isinstance(value, str) and value.startswith(("weights/", "runs/", "data/")):
      files.add(value.split("@")[0])
  return files


def make_local_files(config: ConfigDict, folder: pathlib.Path) -> None:
  """Makes what `local_files` returns: files to read lines from, runs and weights that are empty."""
  for file in local_files(config):
    if file.endswith((".jsonl", ".safetensors")):
      (folder / file).parent.mkdir(parents=True, exist_ok=True)
      (folder / file).touch()
    else:
      inside = "checkpoints/00000001" if file.startswith("runs/") else "model.safetensors"
      (folder / file / inside).mkdir(parents=True, exist_ok=True)

"""Checks that the files a job reads exist: lists all missing ones, with how to get each."""

import os
import pathlib
from collections.abc import Iterator

from ml_collections import ConfigDict

from nash_jax.data import corpus, preferences, prompts
from nash_jax.judges import MODELS
from nash_jax.models import gemma
from nash_jax.objectives import algorithms
from nash_jax.policy import check_saved, parse_weights
from nash_jax.validation import asset_path, printable, require

_POLICY = "Give runs/x, runs/x@target, runs/x@params:50 or a file."
_ARENA = f"{_POLICY} --config=arena:mine=runs/x names the policies that meet the base."
_OUTPUTS = "Give AlpacaEval's model_outputs.json or Arena-Hard's model_answer/x.jsonl."
_LOCAL = "Give a local path, or assets:<file> for a bundled one; docs/weights.md: getting Gemma's."
_SELF = " With only one model, its own start can judge: docs/true_size.md."
_PROMPTS = "docs/true_size.md and docs/data.md list files to download, and the form of your own."


def require_present(config: ConfigDict, job: str) -> None:
  """Raises a ValueError that lists every missing file of a checked config."""
  missing = [*_missing(config, job)]
  if missing:
    count = f"{len(missing)} files that this run reads are missing:\n  "
    raise ValueError((count if len(missing) > 1 else "") + "\n  ".join(missing))


def _missing(config: ConfigDict, job: str) -> Iterator[str]:
  """Yields a message for each missing file."""
  read_weights = job in ("train", "fit", "sample")
  yield from _of_model(config.model, "model", parts=True, weights=read_weights)
  if job == "sample" and config.realign != 1:
    yield from _of_policy(config.reference, "reference")
  judges = {f"judges.{printable(name)}": judge for name, judge in config.get("judges", {}).items()}
  for path, judge in judges.items() or [("judge", config.get("judge"))]:
    if judge is not None and judge.name in MODELS:
      yield from _of_model(judge.model, f"{path}.model")
  if job == "collect" and config.design != "uniform":
    yield from _of_model(config.features.model, "features.model")
  for group in ("policies", "sources"):
    for name, policy in config.get(group, {}).items():
      path, optional = f"{group}.{printable(name)}", group == "sources"
      if outputs := policy.get("outputs"):
        yield from _text(f"{path}.outputs", "a file", outputs, _OUTPUTS, os.path.isfile(outputs))
      else:
        fix = _POLICY if optional else _ARENA
        yield from _of_policy(policy.weights, f"{path}.weights", optional, fix)
  tasks_of = {"prompts": prompts.TASKS, "data": preferences.TASKS}
  if job == "train" and algorithms.get(config.algorithm.name).offline:
    tasks_of["pairs"] = preferences.TASKS
  for group, tasks in tasks_of.items():
    if group in config and config[group].task in tasks:
      yield from _of_data(config[group], group)


def _text(what: str, expected: str, got: str, fix: str, present: bool) -> Iterator[str]:
  try:
    require(present, what, expected, got, fix)
  except ValueError as error:
    yield str(error)


def _of_model(
  model: ConfigDict, path: str, parts: bool = False, weights: bool = True
) -> Iterator[str]:
  """Yields a message for each missing file of a policy's or a judge's model.

  Args:
    parts: the weights may be a part of a run, such as "runs/x@target".
  """
  expected, files = "a file that exists", {"tokenizer": model.tokenizer}
  if weights and model.weights:
    files["weights"] = model.weights
  if weights and parts and model.lora.init:
    files["lora.init"] = model.lora.init
  for field, spec in files.items():
    what = f"{path}.{field}"
    file = parse_weights(spec, what).path if parts and field == "weights" else asset_path(spec)
    fix = _download(spec, model.preset) or _LOCAL
    if field == "weights" and not parts:
      fix += _SELF
    yield from _text(what, expected, spec, fix, os.path.exists(file))


def _download(spec: str, preset: str) -> str:
  """Returns how to download a folder that is named like a published Gemma; "" for any other."""
  path = pathlib.PurePath(spec)
  folder = path.parent if path.suffix in (".model", ".safetensors") else path
  licence = gemma.licence(preset)
  if not (licence and folder.name.startswith("gemma-")):
    return ""
  download = f"hf download google/{folder.name} --local-dir {folder}"
  if licence != "gemma":
    return f"Download it: {download} (docs/gemma4.md has the tokenizer's address)."
  return f"Accept Gemma's terms, then: {download} (docs/weights.md: getting Gemma's)."


def _of_policy(spec: str, what: str, optional: bool = False, fix: str = _POLICY) -> Iterator[str]:
  path = parse_weights(spec, what).path
  present = os.path.exists(path) or (optional and not path)
  yield from _text(what, "a weights file or a run's workdir", spec, fix, present)
  try:
    check_saved(spec, what)
  except ValueError as error:
    yield str(error)


def _of_data(data: ConfigDict, group: str) -> Iterator[str]:
  for field in ("path", "held_out_path"):
    try:
      if data.get(field):
        corpus.parse_paths(data[field])
    except ValueError as error:
      yield f"{group}.{field}: {error}. {_PROMPTS}"

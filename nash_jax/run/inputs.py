"""Checksums of what a run reads, so that a resumed run notices changed inputs."""

import hashlib
from collections.abc import Iterable

import jax
import numpy as np

from nash_jax import sampler
from nash_jax.data import corpus, judge_template, prompts
from nash_jax.data.corpus import Examples
from nash_jax.judges import own
from nash_jax.judges.base import MODELS
from nash_jax.models import gemma
from nash_jax.objectives import algorithms
from nash_jax.run import checkpoint
from nash_jax.types import Params
from nash_jax.validation import asset_path

Inputs = dict[str, dict[str, str]]  # {config field: {file: checksum}}


def _files(paths: Iterable[str]) -> dict[str, str]:
  sums = {}
  for path in paths:
    with open(path, "rb") as file:
      sums[path] = f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
  return sums


def _data(config, path: str, parts: Iterable[Examples] = ()) -> Inputs:
  """Returns the checksums of a data set's files, or of the examples of a registered task."""
  if parts:
    content = hashlib.sha256()
    for part in parts:
      for name, column in sorted(part.columns.items()):
        content.update(f"{name} {len(column)} ".encode())
        for x in map(np.asarray, column):
          content.update(f"{x.dtype}{x.shape}".encode() + x.tobytes())
    return {f"{path}.task": {config.task: f"sha256:{content.hexdigest()}"}}
  fields = [field for field in ("path", "held_out_path") if config.get(field)]
  return {
    f"{path}.{field}": _files(file for file, _ in corpus.parse_paths(config[field]))
    for field in fields
  }


def _template(template: str, field: str) -> Inputs:
  """Returns the checksum of a judge's template if it is a file."""
  return {} if template in judge_template.TEMPLATES else {field: _files([asset_path(template)])}


def _judge(config, params: Params) -> Inputs:
  """Returns the checksums of a judge's files and of its parameters' values."""
  found: Inputs = {}
  weights = config.model.weights  # "" for random ones, which the seed determines
  if own.is_own(config.name):
    path = own.file(config.name)
    found["judge.name"] = _files([path] if path else [])
    if jax.tree.leaves(params):
      found["judge.name"]["its parameters"] = f"sum:{checkpoint.checksum(params)[1]}"
  if config.name in ("table", "table_reward"):
    found["judge.table"] = _files([asset_path(config.table)])
  if config.name in MODELS and weights:
    found["judge.model.weights"] = {weights: "{}:{}".format(*checkpoint.checksum(params))}
  if config.name in ("gemma", "gemma_text", "http"):
    found |= _template(config.template, "judge.template")
  if config.name == "gemma_text":
    found["judge.model.tokenizer"] = _files([asset_path(config.model.tokenizer)])
  return found


def _draw(model) -> Inputs:
  """Returns how a token is drawn if the vocabulary is sampled in two levels."""
  vocabulary = gemma.preset(model.preset, **model.changes).num_embed
  if vocabulary <= sampler.MOST_AT_ONCE:
    return {}
  return {"sampling.draw": {"an id of a large vocabulary": "levels:2"}}


def of_training(config, judge_params: Params, train: Examples, held_out: Examples) -> Inputs:
  """Returns the checksums of an online run's inputs; the base's are in base.json."""
  registered = config.prompts.task not in prompts.TASKS
  return {
    "model.tokenizer": _files([asset_path(config.model.tokenizer)]),
    **_data(config.prompts, "prompts", (train, held_out) if registered else ()),
    **(_data(config.pairs, "pairs") if algorithms.get(config.algorithm.name).offline else {}),
    **_draw(config.model),
    **_judge(config.judge, judge_params),
  }


def of_fit(config) -> Inputs:
  """Returns the checksums of a fit's inputs."""
  return {
    "model.tokenizer": _files([asset_path(config.model.tokenizer)]),
    **_data(config.data, "data"),
    **(_template(config.template, "template") if config.loss == "judge" else {}),
  }

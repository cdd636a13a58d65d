"""Configs: the fields of each job with their defaults, and all checks on them."""

import dataclasses
import enum
from collections.abc import Collection
from typing import Any

from ml_collections import ConfigDict

from nash_jax.config.fields import (
  agreement,
  arena,
  collect,
  compare,
  fit,
  model,
  optimizer,
  sample,
  train,
  vote,
)

__all__ = [
  "agreement", "arena", "collect", "compare", "describe", "fit", "model", "optimizer",
  "refuse_unread", "resolve", "sample", "train", "vote",
]  # fmt: skip


def resolve(config: ConfigDict, job: str = "", devices: int | None = None) -> ConfigDict:
  """Returns a checked, frozen copy of a job's config with the method's defaults filled in.

  Logs the fields that are set but never read. A locked config was resolved before, so it gets no
  such line.

  Args:
    job: the job that will run it; by default `config.job`.
    devices: number of devices of an online run; by default those of this machine.

  Raises:
    ValueError: what, expected, got and how to fix it, before any weights load.
  """
  from nash_jax.config import checks  # here, because it imports jax and the gemma library

  return checks.resolve(config, job, devices)


def refuse_unread(config: ConfigDict, job: str, given: Collection[str]) -> None:
  """Raises ValueError if one of the `given` fields, such as "optimizer.b1", is never read."""
  from nash_jax.config import checks

  checks.refuse_unread(config, job, given)


def describe(config: ConfigDict) -> dict[str, Any]:
  """Returns the config as plain JSON types, for run records."""

  def plain(value: Any) -> Any:
    if isinstance(value, ConfigDict):
      return {name: plain(value[name]) for name in value}
    if isinstance(value, list | tuple):
      return [plain(item) for item in value]
    if isinstance(value, enum.Enum):
      return value.name
    is_record = dataclasses.is_dataclass(value) and not isinstance(value, type)
    return dataclasses.asdict(value) if is_record else value

  return plain(config)

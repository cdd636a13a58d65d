"""The runs of a comparison: their names on screen and on disk, and their configs."""

import collections
from collections.abc import Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from nash_jax.config import fields
from nash_jax.validation import file_name, one_of, printable, require

_OPEN = ("changes", *fields.ENTRIES)  # groups whose entries the user names
REFERENCE = "reference"  # in the arena, the name of the policy that all runs start from


class Run(NamedTuple):
  """A run of a comparison.

  Attributes:
    name: its "label", or its changes; unique.
    folder: the name of its folder; unique.
    changes: {dotted field: value}.
  """

  name: str
  folder: str
  changes: dict[str, Any]


def label(changes: ConfigDict | dict[str, Any]) -> str:
  """Returns the name of a run: its "label", its algorithm, or its changes."""
  values = dict[str, Any](changes)
  shown = ", ".join(f"{k.rpartition('.')[2]} = {v}" for k, v in values.items() if k != "label")
  return values.get("label", values.get("algorithm.name") or shown or "base")


def name_runs(runs: Sequence[dict[str, Any]]) -> list[Run]:
  """Returns the runs with names; runs whose names are equal get their differences added.

  Raises:
    ValueError: a run that is not a dict, a label that is not text, two runs with one name.
  """
  for i, changes in enumerate(runs, 1):
    keys = isinstance(changes, dict | ConfigDict) and all(isinstance(key, str) for key in changes)
    fix = 'Write {"algorithm.name": "egpo", "label": "EGPO"}.'
    require(keys, f"run {i}", "a dict of values by dotted field", changes, fix)
    good = isinstance(label(changes), str) and label(changes) != ""
    require(good, f"run {i}: label", "text", label(changes), "Name it, or leave the label out.")
  named, seen = [], dict[str, str]()
  by_name = collections.defaultdict(list)
  for changes in runs:
    by_name[label(changes)].append(changes)
  for i, changes in enumerate(runs, 1):
    name = label(changes)
    alike = by_name[name]
    if len(alike) > 1 and "label" not in changes:
      name = _distinct(changes, alike)
    folder = _folder(changes, name)
    what = f"run {i}, {printable(name)!r}"
    expected = f"a unique name, even without spaces, but {seen.get(folder)} has it"
    require(folder not in seen, what, expected, dict(changes), "Give one of the two another label.")
    seen[folder] = what
    named.append(Run(name, folder, dict(changes)))
  return named


def _distinct(changes: dict[str, Any], alike: list[dict[str, Any]]) -> str:
  """Returns the algorithm, if a run sets one, and the changes in which runs of one name differ."""
  names = dict.fromkeys(field for other in alike for field in other if field != "label")
  missing = object()
  differ = [f for f in names if any(o.get(f, missing) != alike[0].get(f, missing) for o in alike)]
  short = {field: field.rpartition(".")[2] for field in differ}
  # Fields of two groups may have the same last part.
  shown = short if len({*short.values()}) == len(short) else dict.fromkeys(differ)
  values = (f"{shown[f] or f} = {changes[f]}" for f in differ if f in changes)
  algorithm = [changes["algorithm.name"]] if "algorithm.name" in changes else []
  return ", ".join([*algorithm, *values]) or "base"


def _folder(changes: dict[str, Any], name: str) -> str:
  """Returns the name of a run's folder: the run's name, without spaces if made of its changes."""
  compact = name.replace(" ", "").replace(",", "_")
  made = "label" not in changes and file_name(compact) == compact
  return compact if made else file_name(name)


def rate_name(rate: float) -> str:
  """Returns a learning rate as text: short if exact, so that different rates look different."""
  return f"{rate:g}" if float(f"{rate:g}") == rate else repr(rate)


def run_config(
  base: ConfigDict, changes: dict[str, Any], rate: float | None, seed: int, steps: int = 0
) -> ConfigDict:
  """Returns the base config with a run's changes, learning rate, seed and steps (0: unchanged).

  Raises:
    ValueError: a change to an unknown field, or to a value of another type.
  """
  c = base.copy_and_resolve_references().unlock()
  for field, value in changes.items():
    if field != "label":
      _change(c, field, value)
  c.seed = seed
  if rate is not None:
    c.optimizer.learning_rate = rate
  c.steps = steps or c.steps
  return c.lock()  # fields that no run reads are reported once, for the whole comparison


def _change(config: ConfigDict, field: str, value: Any) -> None:
  *groups, last = field.split(".")
  current: Any = config
  for i, name in enumerate((*groups, last)):
    what = f"config field {printable('.'.join(field.split('.')[: i + 1]))}"
    if not isinstance(current, ConfigDict):
      raise ValueError(f"{what}: {'.'.join(groups[:i])} is a value, not a group of fields")
    if i and groups[i - 1] in _OPEN:
      break
    one_of(what, name, current)
    current = current[name]
  else:
    is_group = isinstance(current, ConfigDict) and last not in _OPEN
    require(not is_group, what, "one field", value, f"Write {field}.<field> for each in the group.")
    is_flag = current is not None and isinstance(value, bool) != isinstance(current, bool)
    require(not is_flag, what, f"a value like {current!r}", value, "Change its type.")
  try:
    config.update_from_flattened_dict({field: value})
  except (AttributeError, KeyError, TypeError) as error:
    expected = f"a value like {current!r}"
    raise ValueError(f"{what}: expected {expected}, got {value!r}: {error.args[0]}") from None

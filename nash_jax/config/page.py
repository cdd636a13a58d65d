"""Writes docs/fields.md: `python -m nash_jax.config.page > docs/fields.md`."""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from nash_jax.config import fields, meanings

HEAD = """# Every field of every config

Set a field in a config (`c.algorithm.beta = 0.05`) or on the command line
(`--config.algorithm.beta=0.05`). The tables list the fields of each job: what a field means, its
default, and the values it may have.

- `[0, 1)` includes 0 and excludes 1.
- No field may be NaN. A field may be infinite only where its row says so.
- Some rules concern several fields, such as `algorithm.step` ≤ 1 / `algorithm.beta`. The error
  that names such a rule also says what to set.

The page on jobs has [an overview of the fields of `train`](jobs.md#fields-of-a-run-of-train).

<!-- Written by `python -m nash_jax.config.page > docs/fields.md`: edit nash_jax/config/fields.py
and nash_jax/config/meanings.py. -->"""
TABLE = "| field | meaning | default; may be |\n|---|---|---|\n"
# Groups that the page lists elsewhere.
ELSEWHERE = {
  "changes": "fields of [`model.changes`](#modelchanges)",
  "realign": "a number in [0, 1000] for each of them",
  "judges.NAME": "as `judge` of [`train`](#train)",
  "features.model": "as `judge.model` of [`train`](#train)",
  "base": "the fields of [`train`](#train)", "arena": "the fields of [`arena`](#arena)",
}  # fmt: skip


def page() -> str:
  """Returns the page's text; fields that are the same as in `train` are listed only there."""
  parts, listed = [HEAD], {*_rows("train", fields.DECLARED["train"]())}
  for job, declared in fields.DECLARED.items():
    rows = [row for row in _rows(job, declared()) if job == "train" or row not in listed]
    shared = (
      "" if job == "train" else "Fields that are the same as in `train` are not repeated.\n\n"
    )
    parts.append(f"## `{job}`\n\n{shared}{TABLE}" + "\n".join(rows))
  job = "model.changes"
  rows = [
    _row(job, name, "the preset's", "or `False`, `True`" if isinstance(x, bool) else _may_be(x))
    for name, x in fields.CHANGES.items()
  ]
  parts.append(f"## `{job}`\n\n{TABLE}" + "\n".join(rows))
  return "\n\n".join(parts) + "\n"


def _rows(job: str, group: ConfigDict, path: str = "") -> Iterator[str]:
  """Yields the rows of a group's table; if the user names its entries, those of one entry."""
  for name, field in group.items():
    if name in fields.ENTRIES:
      field = ConfigDict({"NAME": fields.ENTRIES[name]()})
    elsewhere = ELSEWHERE.get(name) or ELSEWHERE.get(f"{path}{name}")
    if isinstance(field, ConfigDict) and elsewhere:
      yield _row(job, f"{path}{name}", "", elsewhere)
    elif isinstance(field, ConfigDict):
      yield from _rows(job, field, f"{path}{name}.")
    elif name != "job":
      declared = isinstance(field, fields.Number | fields.Choice)
      default = field.default if declared else field
      yield _row(job, f"{path}{name}", f"`{default!r}`", _may_be(field))


def _row(job: str, field: str, default: str, may_be: str) -> str:
  values = f"{default}; {may_be}" if default else may_be
  return f"| `{field}` | {meanings.meaning(job, field)} | {values} |"


def _may_be(field: Any) -> str:
  """Returns what else than its default a field may be."""
  if isinstance(field, fields.Number):
    return field.describe()
  if isinstance(field, fields.Choice):
    return "or " + ", ".join(f"`{name!r}`" for name in field.choices if name != field.default)
  return {bool: f"or `{not field}`", str: "text", tuple: "a tuple"}[type(field)]


if __name__ == "__main__":
  print(page(), end="")

"""Writes docs/fields.md: `python -m nash_jax.config.page > docs/fields.md`."""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from nash_jax.config import fields

HEAD = """# Every field, its default and what it may be

Written by `python -m nash_jax.config.page > docs/fields.md` from `nash_jax/config/fields.py`,
which says what the fields mean. `[0, 1)` is without 1. NaN is in no range, and infinity only where
it is named. What fields must be together, such as `algorithm.step` ≤ 1 / `algorithm.beta`, is
checked in `nash_jax/config/checks.py`."""
TABLE = "| field | default | may be |\n|---|---|---|\n"
# Groups that the page lists elsewhere.
ELSEWHERE = {
  "changes": "fields of `model.changes`, below", "judges.NAME": "as `judge` of `train`",
  "base": "as the job `train`", "arena": "as the job `arena`",
}  # fmt: skip


def page() -> str:
  """Returns the page's text; fields that are the same as in `train` are listed only there."""
  parts, listed = [HEAD], set(_rows(fields.DECLARED["train"]()))
  for job, declared in fields.DECLARED.items():
    rows = [row for row in _rows(declared()) if job == "train" or row not in listed]
    rest = "" if job == "train" else "; what is not listed is as in `train`"
    parts.append(f"## `{job}`{rest}\n\n{TABLE}" + "\n".join(rows))
  changes = [f"| `{name}` | the preset's | {_may_be(x)} |" for name, x in fields.CHANGES.items()]
  parts.append(f"## `model.changes`\n\n{TABLE}" + "\n".join(changes))
  return "\n\n".join(parts) + "\n"


def _rows(group: ConfigDict, path: str = "") -> Iterator[str]:
  """Yields the rows of a group's table; if the user names its entries, those of one entry."""
  for name, field in group.items():
    if name in fields.ENTRIES:
      field = ConfigDict({"NAME": fields.ENTRIES[name]()})
    elsewhere = ELSEWHERE.get(name) or ELSEWHERE.get(f"{path}{name}")
    if isinstance(field, ConfigDict) and elsewhere:
      yield f"| `{path}{name}` | | {elsewhere} |"
    elif isinstance(field, ConfigDict):
      yield from _rows(field, f"{path}{name}.")
    elif name != "job":
      declared = isinstance(field, fields.Number | fields.Choice)
      default = field.default if declared else field
      yield f"| `{path}{name}` | `{default!r}` | {_may_be(field)} |"


def _may_be(field: Any) -> str:
  if isinstance(field, fields.Number):
    return field.describe()
  if isinstance(field, fields.Choice):
    return ", ".join(f"`{name}`" for name in field.choices)
  return {bool: "`False`, `True`", str: "text", tuple: "a tuple"}[type(field)]


if __name__ == "__main__":
  print(page(), end="")

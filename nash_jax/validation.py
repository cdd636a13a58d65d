"""What every error about bad input says: what, expected, got and how to fix it."""

import difflib
import pathlib
from collections.abc import Collection
from typing import Any

ASSETS = pathlib.Path(__file__).parent / "assets"


def require(condition: bool, what: str, expected: str, got: Any, fix: str) -> None:
  """Raises ValueError that says what, expected, got and how to fix it, unless `condition` holds."""
  if not condition:
    raise ValueError(f"{what}: expected {expected}, got {got!r}. {fix}")


def one_of(what: str, got: str, choices: Collection[str]) -> None:
  """Raises ValueError that lists the choices, unless `got` is one of them."""
  if got not in choices:
    listed = ", ".join(sorted(choices))
    raise ValueError(f"{what}: got {got!r}, expected one of {listed}{did_you_mean(got, choices)}")


def did_you_mean(got: str, choices: Collection[str]) -> str:
  """Returns "; did you mean 'x'?" for the closest choice, or "" where none is close."""
  close = difflib.get_close_matches(str(got), list(choices), 1)
  return f"; did you mean {close[0]!r}?" if close else ""


def asset_path(name: str) -> str:
  """Expands `assets:` to the folder of bundled files."""
  return str(ASSETS / name.removeprefix("assets:")) if name.startswith("assets:") else name

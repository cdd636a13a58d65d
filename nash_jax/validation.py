"""Input from outside: what an error about it says, and what a name is on screen and on disk."""

import difflib
import hashlib
import pathlib
import re
import unicodedata
from collections.abc import Collection
from typing import Any

ASSETS = pathlib.Path(__file__).parent / "assets"
# Names that are files as they are. One that ends like the digest below is none of them, nor is one
# that Windows keeps for a device, whatever its ending.
_PLAIN_NAME = re.compile(r"[a-z0-9_](?:[a-z0-9_.=+-]{0,78}[a-z0-9_=+])?")
_DIGEST = re.compile(r"-[0-9a-f]{16}$")
_DEVICE = re.compile(r"(?:con|prn|aux|nul|com[0-9]|lpt[0-9])(?:\.|$)")


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


def printable(text: str) -> str:
  """Returns a text on one line, with escapes for what a terminal would act on or not show."""
  return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def is_file_name(name: str) -> bool:
  """Returns whether a name is safe as a file's, such as those that `file_name` returns."""
  return bool(_PLAIN_NAME.fullmatch(name)) and not _DEVICE.match(name)


def file_name(name: str) -> str:
  """Returns the name of a file or folder for a name that may be anything; two never share one.

  At most 80 characters: small Latin letters, digits and _.=+-, so that no file system takes two of
  them for one, a folder for its parent, or a file for an option. A name that is all of this stays
  as it is; another is cut to what can stay of it and ends in a digest.
  """
  if is_file_name(name) and not _DIGEST.search(name):
    return name
  digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:16]
  letters = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
  kept = re.sub(r"[^a-z0-9=+-]+", "_", letters)[:60].strip("_-")
  return f"{kept or 'name'}-{digest}"

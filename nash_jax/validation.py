"""Input from outside: texts, what an error about them says, and names on screen and on disk."""

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
# How files begin that are neither texts nor weights, and what to do with them.
_FOREIGN = {
  b"version https://git-lfs": "a Git LFS pointer: run `git lfs pull` in its folder",
  b"\x1f\x8b": "compressed (gzip): unpack it",
  b"PK\x03\x04": "compressed (zip): unpack it",
  b"BZh91AY&SY": "compressed (bzip2): unpack it",
  b"\xfd7zXZ\0": "compressed (xz): unpack it",
  b"\x28\xb5\x2f\xfd": "compressed (zstd): unpack it",
  b"\x04\x22\x4d\x18": "compressed (lz4): unpack it",
  b"7z\xbc\xaf\x27\x1c": "compressed (7z): unpack it",
  b"PAR1": "a parquet file: write its rows as JSON lines",
  b"ARROW1": "an Arrow file: write its rows as JSON lines",
  b"\xff\xfe": "UTF-16 or UTF-32, expected UTF-8: convert it",
  b"\xfe\xff": "UTF-16, expected UTF-8: convert it",
}


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


def foreign(data: bytes) -> str:
  """Returns what a file that begins so is, and what to do with it; "" where that is not known."""
  return next((what for start, what in _FOREIGN.items() if data.startswith(start)), "")


def decode(path: str | pathlib.Path, data: bytes) -> str:
  """Returns the text of a file's bytes.

  Raises:
    ValueError: a file that `foreign` knows; a byte that is not UTF-8, or NUL, with its line.
  """
  if what := foreign(data):
    raise ValueError(f"{path}: {what}")
  try:
    text = data.decode("utf-8")
    place, byte = data.find(0), 0
  except UnicodeDecodeError as error:
    text, place, byte = "", error.start, data[error.start]
  if place >= 0:
    line = len(re.split(rb"\r\n|\r|\n", data[:place]))
    what = "is not UTF-8" if byte else "(NUL) is no text"
    raise ValueError(f"{path}:{line}: byte {byte:#04x} {what}: convert the file to UTF-8")
  return text


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
  kept = re.sub(r"[^a-z0-9=+-]+", "_", letters)[:60].strip("_-").lstrip("=+_-")
  return f"{kept or 'name'}-{digest}"

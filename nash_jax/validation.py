"""Checks of input: error messages, decoding of text files, and safe names on screen and disk."""

import difflib
import hashlib
import pathlib
import re
import unicodedata
from collections.abc import Collection
from typing import Any

ASSETS = pathlib.Path(__file__).parent / "assets"
# Names used for files unchanged, unless they end like a digest or Windows reserves them for a
# device, whatever their extension.
_PLAIN_NAME = re.compile(r"[a-z0-9_](?:[a-z0-9_.=+-]{0,78}[a-z0-9_=+])?")
_DIGEST = re.compile(r"-[0-9a-f]{16}$")
_DEVICE = re.compile(r"(?:con|prn|aux|nul|com[0-9]|lpt[0-9])(?:\.|$)")
# First bytes of files that are neither text nor weights, and what to do with such files.
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
  """Unless `condition` holds, raises a ValueError: what, expected, got and how to fix it."""
  if not condition:
    raise ValueError(f"{what}: expected {expected}, got {got!r}. {fix}")


def one_of(what: str, got: str, choices: Collection[str]) -> None:
  """Raises a ValueError that lists the choices unless `got` is one of them."""
  if got not in choices:
    listed = ", ".join([*sorted(filter(None, choices)), *(["nothing"] if "" in choices else [])])
    raise ValueError(f"{what}: got {got!r}, expected one of {listed}{did_you_mean(got, choices)}")


def did_you_mean(got: str, choices: Collection[str]) -> str:
  """Returns "; did you mean 'x'?" for the closest choice, or "" if none is close."""
  close = difflib.get_close_matches(str(got), list(choices), 1)
  return f"; did you mean {close[0]!r}?" if close else ""


def foreign(data: bytes) -> str:
  """Returns what kind of file starts with these bytes and what to do with it; "" if unknown."""
  return next((what for start, what in _FOREIGN.items() if data.startswith(start)), "")


def decode(path: str | pathlib.Path, data: bytes) -> str:
  """Decodes a text file.

  Raises:
    ValueError: a kind of file that `foreign` knows; a byte that is NUL or not UTF-8 (names its
      line).
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
    what = "is not UTF-8" if byte else "(NUL) is not text"
    raise ValueError(f"{path}:{line}: byte {byte:#04x} {what}: convert the file to UTF-8")
  return text


def asset_path(name: str) -> str:
  """Replaces a leading "assets:" by the folder of bundled files."""
  return str(ASSETS / name.removeprefix("assets:")) if name.startswith("assets:") else name


def printable(text: str) -> str:
  """Returns a text on one line, with control and invisible characters escaped."""
  return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def is_file_name(name: str) -> bool:
  """Returns whether a name is safe as a file name, as results of `file_name` are."""
  return bool(_PLAIN_NAME.fullmatch(name)) and not _DEVICE.match(name)


def file_name(name: str) -> str:
  """Returns a safe file or folder name for any name; different names get different files.

  The result has at most 80 characters: lower-case Latin letters, digits and _.=+-. So no file
  system confuses two of them, and none reads as a parent folder or a command-line option. A name
  that is already safe stays as it is; any other keeps its safe characters and gets a digest.
  """
  if is_file_name(name) and not _DIGEST.search(name):
    return name
  digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:16]
  letters = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
  kept = re.sub(r"[^a-z0-9=+-]+", "_", letters)[:60].strip("_-").lstrip("=+_-")
  return f"{kept or 'name'}-{digest}"

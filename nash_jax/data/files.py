"""Text files that others made: read as UTF-8, or refused in one line that names file and line."""

import json
import pathlib
import re
import reprlib
from collections.abc import Callable, Iterator
from typing import Any

# How files begin that are no text, and what to do with them.
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


shorten = reprlib.Repr(maxstring=80, maxother=80).repr  # a value's repr, for one line


def read_bytes(path: str | pathlib.Path) -> bytes:
  """Returns a file's bytes.

  Raises:
    ValueError: a file that cannot be read, or that check_beginning refuses.
  """
  try:
    data = pathlib.Path(path).read_bytes()
  except OSError as error:
    raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from error
  check_beginning(path, data)
  return data


def check_beginning(path: str | pathlib.Path, data: bytes) -> None:
  """Raises ValueError for a Git LFS pointer, and for a file that is compressed or UTF-16."""
  for beginning, advice in _FOREIGN.items():
    if data.startswith(beginning):
      raise ValueError(f"{path}: {advice}")


def read_text(path: str | pathlib.Path) -> str:
  """Returns a file's text, its lines ended by one newline each, without byte-order marks.

  A mark is left out at the beginning of any line: files that are joined have one in the middle.

  Raises:
    ValueError: as for read_bytes; a byte that is not UTF-8, or NUL, with its line.
  """
  data = read_bytes(path)
  try:
    text = data.decode("utf-8")
    place, byte = data.find(0), 0
  except UnicodeDecodeError as error:
    text, place, byte = "", error.start, data[error.start]
  if place >= 0:
    line = len(re.split(rb"\r\n|\r|\n", data[:place]))
    what = "is not UTF-8" if byte else "(NUL) is no text"
    raise ValueError(f"{path}:{line}: byte {byte:#04x} {what}: convert the file to UTF-8")
  text = text.replace("\r\n", "\n").replace("\r", "\n")
  return re.sub("^\ufeff+", "", text, flags=re.MULTILINE)


def read_records(
  path: str | pathlib.Path, parse: Callable[[str], Any] = json.loads
) -> Iterator[tuple[str, Any]]:
  """Yields "file:line" and the record of each line of a file, blank lines skipped.

  Raises:
    ValueError: as for read_text; a line that does not parse.
  """
  text = read_text(path)
  if parse is json.loads and text.lstrip().startswith("["):
    fix = "write one object a line, as `jq -c '.[]'` does"
    raise ValueError(f"{path}:1: a JSON array, expected JSON lines: {fix}")
  # Not splitlines: a text may hold U+2028 and other marks that only that takes for ends of lines.
  for number, line in enumerate(text.split("\n"), 1):
    if line.strip():
      place = f"{path}:{number}"
      try:
        record = parse(line)
      except json.JSONDecodeError as error:
        message = f"{place}: not JSON ({error}); expected one object a line"
        raise ValueError(message) from None
      except RecursionError:
        raise ValueError(f"{place}: JSON is nested too deeply") from None
      except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
      yield place, record


def check_text(text: str) -> str:
  """Returns a text, or raises ValueError where it holds what no tokenizer takes.

  That is half of a surrogate pair, which JSON can spell and a cut at a number of UTF-16 units
  leaves, or NUL.
  """
  if bad := re.search("[\ud800-\udfff\0]", text):
    what = "NUL" if bad[0] == "\0" else "half of a surrogate pair"
    raise ValueError(f"{bad[0]!a} in {shorten(text)} is {what}, no text: remove it")
  return text

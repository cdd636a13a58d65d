"""Reads files that others made, or refuses them in one line with file and line number."""

import gzip
import json
import pathlib
import re
import reprlib
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from nash_jax.validation import decode, foreign, require

Placed = tuple[str, Any]  # (place "file:line", record)
Skip = Callable[[ValueError], None]  # called with the reason for leaving a record out
SUFFIXES = (".jsonl", ".json", ".parquet", ".jsonl.gz", ".json.gz")  # of files of records
_PACKED = (".zip", ".bz2", ".xz", ".zst", ".lz4", ".7z")  # compressed, and not supported
_ROWS = 1024  # rows of a parquet file that are Python objects at the same time
shorten = reprlib.Repr(maxstring=80, maxother=80).repr  # short repr for one line


def read_bytes(path: str | pathlib.Path) -> bytes:
  """Returns a file's bytes.

  Raises:
    ValueError: the file cannot be read, or is compressed, UTF-16 or a Git LFS pointer.
  """
  data = _read(path)
  if what := foreign(data):
    raise ValueError(f"{path}: {what}")
  return data


def _read(path: str | pathlib.Path) -> bytes:
  try:
    return pathlib.Path(path).read_bytes()
  except OSError as error:
    raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from error


def read_text(path: str | pathlib.Path) -> str:
  """Returns a file's text with "\\n" line ends, without byte-order marks; unpacks gzip.

  Marks are removed at the start of every line, since joined files have them in the middle.

  Raises:
    ValueError: as for read_bytes; a byte that is NUL or not UTF-8 (names its line).
  """
  data = _read(path)
  try:
    data = gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data
  except (OSError, EOFError, zlib.error) as error:
    raise ValueError(f"{path}: not a readable gzip file: {error}") from None
  text = decode(path, data)
  text = text.replace("\r\n", "\n").replace("\r", "\n")
  return re.sub("^\ufeff+", "", text, flags=re.MULTILINE)


def placed(place: str, error: ValueError | TypeError) -> ValueError:
  """Returns the error with the place of the record added."""
  return ValueError(f"{place}: {error}").with_traceback(error.__traceback__)


def in_folder(folder: str | pathlib.Path) -> list[str]:
  """Returns the files of records in a folder and its subfolders, sorted by name.

  Raises:
    ValueError: there are none, or some have an unsupported compression.
  """
  found = [path for path in sorted(pathlib.Path(folder).rglob("*")) if path.is_file()]
  shards = [str(path) for path in found if path.name.endswith(SUFFIXES)]
  packed = [path.name for path in found if path.suffix in _PACKED and path.stem.endswith(SUFFIXES)]
  require(
    not packed,
    f"files in {str(folder)!r}",
    "none with unsupported compression",
    packed[:3],
    "Unpack them.",
  )
  got, fix = [path.name for path in found[:3]] or "an empty folder", "Give another one."
  require(len(shards) > 0, f"files in {str(folder)!r}", f"some in {', '.join(SUFFIXES)}", got, fix)
  return shards


def read_records(
  path: str | pathlib.Path, parse: Callable[[str], Any] = json.loads, skip: Skip | None = None
) -> Iterator[Placed]:
  """Yields ("file:line", record) for each line of a file that is not blank.

  The file may be compressed by gzip. If `parse` is json.loads, a JSON array or a parquet file works
  too; the places of their records are "file, row 1" and so on.

  Args:
    skip: called with the reason for each line that does not parse, which is then left out.

  Raises:
    ValueError: as for read_text; a file that does not parse, or, without `skip`, a line.
  """
  if parse is json.loads and _head(path).startswith(b"PAR1"):
    yield from _parquet_rows(path)
    return
  begun = False
  # Not splitlines, which would also split at U+2028 and other characters within a text.
  for number, line in enumerate(_lines(path), 1):
    if not line.strip():
      continue
    if not begun and parse is json.loads and line.lstrip().startswith("["):
      yield from _array(path, read_text(path))
      return
    begun, place = True, f"{path}:{number}"
    try:
      record = _parsed(line, place, parse)
    except ValueError as error:
      if skip is None:
        raise
      skip(error)
      continue
    yield place, record


def _lines(path: str | pathlib.Path) -> Iterator[str]:
  """Yields the lines of read_text without holding the whole file."""
  head = _head(path)
  packed = head.startswith(b"\x1f\x8b")
  if foreign(head) and not packed:
    read_text(path)  # raises an error that says what it is
  opened = gzip.open if packed else open
  try:
    with opened(path, "rt", encoding="utf-8") as file:
      for line in file:
        if "\0" in line:
          raise ValueError("NUL")
        yield line.lstrip("\ufeff").removesuffix("\n")
  except (OSError, EOFError, zlib.error, ValueError) as error:
    read_text(path)  # raises an error with the line
    raise ValueError(f"{path}: cannot be read: {error}") from error


def _parsed(line: str, place: str, parse: Callable[[str], Any]) -> Any:
  try:
    return parse(line)
  except json.JSONDecodeError as error:
    message = f"{place}: not JSON ({error}); expected one object a line"
    raise ValueError(message) from None
  except RecursionError:
    raise ValueError(f"{place}: JSON is nested too deeply") from None
  except ValueError as error:
    raise ValueError(f"{place}: {error}") from None


def _head(path: str | pathlib.Path) -> bytes:
  try:
    with open(path, "rb") as file:
      return file.read(64)
  except OSError:
    return b""  # reading the whole file raises the error


def _array(path: str | pathlib.Path, text: str) -> Iterator[Placed]:
  try:
    rows = json.loads(text)
  except json.JSONDecodeError as error:
    expected = "expected an array of objects, or one object a line"
    raise ValueError(f"{path}:{error.lineno}: not JSON ({error}); {expected}") from None
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{path}: not readable JSON: {error}") from None
  yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows, 1))


def _parquet_rows(path: str | pathlib.Path) -> Iterator[Placed]:
  import pyarrow
  from pyarrow import parquet

  try:
    number = 0
    for batch in parquet.ParquetFile(path).iter_batches(batch_size=_ROWS):
      for row in batch.to_pylist():
        number += 1
        yield f"{path}, row {number}", row
  except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
    reason = " ".join(str(error).split())
    raise ValueError(f"{path}: not a readable parquet file: {reason}") from error


def check_text(text: str) -> str:
  """Returns a text, or raises ValueError if it has NUL or a lone surrogate.

  No tokenizer accepts these. JSON can spell a lone surrogate; cuts by UTF-16 length produce them.
  """
  fine = text.isascii() and "\0" not in text  # the quick check settles most texts
  if not fine and (bad := re.search("[\ud800-\udfff\0]", text)):
    what = "NUL" if bad[0] == "\0" else "half of a surrogate pair"
    raise ValueError(f"{bad[0]!a} in {shorten(text)} is {what}, not text: remove it")
  return text

"""Files that others made: read, or refused in one line that names file and line."""

import gzip
import json
import pathlib
import re
import reprlib
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from nash_jax.validation import decode, foreign, require

Placed = tuple[str, Any]  # a record behind where it lies, "file:line"
Skip = Callable[[ValueError], None]  # is told why a record is left out
SUFFIXES = (".jsonl", ".json", ".parquet", ".jsonl.gz", ".json.gz")  # of files of records
_PACKED = (".zip", ".bz2", ".xz", ".zst", ".lz4", ".7z")  # which are not unpacked here
_ROWS = 1024  # of a parquet file that are Python objects at a time
shorten = reprlib.Repr(maxstring=80, maxother=80).repr  # a value's repr, for one line


def read_bytes(path: str | pathlib.Path) -> bytes:
  """Returns a file's bytes.

  Raises:
    ValueError: a file that cannot be read, or that is compressed, UTF-16 or a Git LFS pointer.
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
  """Returns a file's text, its lines ended by one newline each, without byte-order marks.

  A mark is left out at the beginning of any line: files that are joined have one in the middle. A
  file that gzip has packed is unpacked.

  Raises:
    ValueError: as for read_bytes; a byte that is not UTF-8, or NUL, with its line.
  """
  data = _read(path)
  try:
    data = gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data
  except (OSError, EOFError, zlib.error) as error:
    raise ValueError(f"{path}: not a gzip file that can be read: {error}") from None
  text = decode(path, data)
  text = text.replace("\r\n", "\n").replace("\r", "\n")
  return re.sub("^\ufeff+", "", text, flags=re.MULTILINE)


def placed(place: str, error: ValueError | TypeError) -> ValueError:
  """Returns an error that also says where the record lies."""
  return ValueError(f"{place}: {error}").with_traceback(error.__traceback__)


def in_folder(folder: str | pathlib.Path) -> list[str]:
  """Returns the files of records in a folder and those in it, by name.

  Raises:
    ValueError: there are none, or some that nothing here unpacks.
  """
  found = [path for path in sorted(pathlib.Path(folder).rglob("*")) if path.is_file()]
  shards = [str(path) for path in found if path.name.endswith(SUFFIXES)]
  packed = [path.name for path in found if path.suffix in _PACKED and path.stem.endswith(SUFFIXES)]
  require(
    not packed, f"files in {str(folder)!r}", "none that are packed", packed[:3], "Unpack them."
  )
  got, fix = [path.name for path in found[:3]] or "an empty folder", "Give another one."
  require(len(shards) > 0, f"files in {str(folder)!r}", f"some in {', '.join(SUFFIXES)}", got, fix)
  return shards


def read_records(
  path: str | pathlib.Path, parse: Callable[[str], Any] = json.loads, skip: Skip | None = None
) -> Iterator[Placed]:
  """Yields "file:line" and the record of each line of a file, blank lines skipped.

  The file may be packed by gzip. A JSON array and a parquet file are read too, where lines would be
  JSON: "file, row 1" and so on are the places of their records.

  Args:
    skip: is told why a line does not parse, which is then left out.

  Raises:
    ValueError: as for read_text; a line that does not parse, without `skip`; a file that does not.
  """
  if parse is json.loads and _head(path).startswith(b"PAR1"):
    yield from _parquet_rows(path)
    return
  begun = False
  # Not splitlines: a text may hold U+2028 and other marks that only that takes for ends of lines.
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
  """Yields the lines of read_text one after the other; the file is never held as a whole."""
  head = _head(path)
  packed = head.startswith(b"\x1f\x8b")
  if foreign(head) and not packed:
    read_text(path)  # which says what it is
  opened = gzip.open if packed else open
  try:
    with opened(path, "rt", encoding="utf-8") as file:
      for line in file:
        if "\0" in line:
          raise ValueError("NUL")
        yield line.lstrip("\ufeff").removesuffix("\n")
  except (OSError, EOFError, zlib.error, ValueError) as error:
    read_text(path)  # which says what is wrong, and in which line
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
    return b""  # whoever reads all of it says why


def _array(path: str | pathlib.Path, text: str) -> Iterator[Placed]:
  try:
    rows = json.loads(text)
  except json.JSONDecodeError as error:
    expected = "expected an array of objects, or one object a line"
    raise ValueError(f"{path}:{error.lineno}: not JSON ({error}); {expected}") from None
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{path}: not JSON that can be read: {error}") from None
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
    raise ValueError(f"{path}: not a parquet file that can be read: {reason}") from error


def check_text(text: str) -> str:
  """Returns a text, or raises ValueError where it holds what no tokenizer takes.

  That is half of a surrogate pair, which JSON can spell and a cut at a number of UTF-16 units
  leaves, or NUL.
  """
  fine = text.isascii() and "\0" not in text  # at once, of most texts
  if not fine and (bad := re.search("[\ud800-\udfff\0]", text)):
    what = "NUL" if bad[0] == "\0" else "half of a surrogate pair"
    raise ValueError(f"{bad[0]!a} in {shorten(text)} is {what}, no text: remove it")
  return text

"""Text files that others made: read as UTF-8, or refused in one line that names file and line."""

import json
import pathlib
import re
import reprlib
from collections.abc import Callable, Iterator
from typing import Any

from nash_jax.validation import decode, foreign

shorten = reprlib.Repr(maxstring=80, maxother=80).repr  # a value's repr, for one line


def read_bytes(path: str | pathlib.Path) -> bytes:
  """Returns a file's bytes.

  Raises:
    ValueError: a file that cannot be read, or that is compressed, UTF-16 or a Git LFS pointer.
  """
  try:
    data = pathlib.Path(path).read_bytes()
  except OSError as error:
    raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from error
  if what := foreign(data):
    raise ValueError(f"{path}: {what}")
  return data


def read_text(path: str | pathlib.Path) -> str:
  """Returns a file's text, its lines ended by one newline each, without byte-order marks.

  A mark is left out at the beginning of any line: files that are joined have one in the middle.

  Raises:
    ValueError: as for read_bytes; a byte that is not UTF-8, or NUL, with its line.
  """
  text = decode(path, read_bytes(path)).replace("\r\n", "\n").replace("\r", "\n")
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

"""Atomic writes of files on this machine, and JSON."""

import contextlib
import json
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

from nash_jax.validation import require


def make_folder(path: str | os.PathLike[str]) -> pathlib.Path:
  """Creates a folder for a job's results if needed, and returns it.

  Raises:
    ValueError: the folder is not on this machine, or cannot be written.
  """
  folder = pathlib.Path(path)
  fix = "Buckets are for train and fit; give a local folder."
  require("://" not in str(path), "workdir", "a folder on this machine", str(path), fix)
  try:
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()
  except OSError as error:
    raise ValueError(f"workdir {folder}: expected a folder that can be written: {error}") from None
  return folder


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
  """Names the file in errors of writing to it, which the error of a full disk does not do.

  Raises:
    ValueError: the file cannot be written.
  """
  try:
    yield
  except OSError as error:
    raise ValueError(f"{path}: expected a file that can be written: {error}") from error


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
  """Yields a temporary file to write to, which then replaces `path`.

  Raises:
    ValueError: the file cannot be written; the old one is unchanged.
  """
  path = pathlib.Path(path)
  part = path.with_name(f"{path.name}.{os.getpid()}.part")
  try:
    with writing(path):
      yield part
      with part.open("rb+") as file:  # sync before the rename, so that a crash leaves a whole file
        os.fsync(file.fileno())
      part.replace(path)
  finally:
    with contextlib.suppress(NotADirectoryError):  # its folder is a file
      part.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
  """Replaces a text file; see `replacing`."""
  with replacing(path) as part:
    part.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
  """Replaces a JSON file; see `replacing`. Numbers that are not finite become null."""
  write_text(path, json.dumps(without_nan(value), indent=1) + "\n")


def without_nan(value: Any) -> Any:
  """Returns a value as plain JSON types, with None for numbers that are not finite."""
  return json.loads(json.dumps(value, default=_plain), parse_constant=lambda _: None)


def _plain(value: Any) -> Any:
  return value.item() if hasattr(value, "item") else str(value)


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
  """Returns the object in a JSON file; {} if there is no such file.

  Raises:
    ValueError: it does not parse or is no object.
  """
  try:
    return parse_object(path, pathlib.Path(path).read_bytes())
  except FileNotFoundError:
    return {}
  except OSError as error:
    raise ValueError(f"{path}: cannot be read ({error}): restore it or move it away") from error


def parse_object(path: str | os.PathLike[str], data: bytes) -> dict[str, Any]:
  """Returns the object in the bytes of a JSON file; `path` is for errors.

  Raises:
    ValueError: they do not parse or are no object.
  """
  try:
    value = json.loads(data)
  except (ValueError, RecursionError) as error:  # ValueError includes text that is not UTF-8
    raise ValueError(f"{path}: does not parse ({error}): restore it or move it away") from error
  if not isinstance(value, dict):
    got = f"{value!r:.60}: restore it or move it away"
    raise ValueError(f"{path}: expected a JSON object, got {got}")
  return value

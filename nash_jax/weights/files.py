"""Reads JSON from elsewhere, and recognises files of other kinds."""

import json
import pathlib
from typing import Any

from nash_jax.validation import foreign

_PROTOCOLS = (b"\x02", b"\x03", b"\x04", b"\x05")  # of pickle files
# First bytes of other kinds of weights, and what to do. Used only for files that cannot be read.
_KINDS = (
  (b"PK\x03\x04", "a PyTorch or NumPy archive: convert it to safetensors"),
  *((b"\x80" + protocol, "a pickle: convert it to safetensors") for protocol in _PROTOCOLS),
  (b"GGUF", "a GGUF file: convert it to safetensors, or download the original"),
  (b"\x89HDF", "an HDF5 file: convert it to safetensors"),
  *((start, "a web page: download the file itself") for start in (b"<!", b"<html", b"<?xml")),
)
OTHERS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".npz")  # unread formats


def explain(path: pathlib.Path, error: Exception) -> str:
  """Returns what kind of file could not be read, or the first line of the error."""
  try:
    with open(path, "rb") as file:
      head = file.read(40)
  except (OSError, ValueError) as unreadable:
    return str(unreadable)
  if not head:
    return "an empty file"
  kind = next((what for start, what in _KINDS if head.startswith(start)), foreign(head))
  if kind and head[8:9] != b"{":  # a .safetensors file has "{" after its header's length
    return kind
  kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
  return f"{kind}{error}".splitlines()[0]


def others(folder: pathlib.Path) -> str:
  """Returns "; x.bin is …" if a folder has weights of another format, otherwise ""."""
  found = sorted(file.name for file in folder.glob("*") if file.suffix in OTHERS)
  return f"; {found[0]} is of another format: convert it to safetensors" if found else ""


def read_json(path: pathlib.Path, expected: str) -> dict[str, Any]:
  """Returns the object in a JSON file, which may start with a byte-order mark.

  Raises:
    ValueError: the file cannot be read, is not UTF-8 or JSON, is no object, or has a key twice.
  """
  try:
    found = json.loads(path.read_bytes().decode("utf-8-sig"), object_pairs_hook=_unique)
    if not isinstance(found, dict):
      raise ValueError(f"{found!r:.40}")
  except (OSError, ValueError, RecursionError) as error:
    raise ValueError(f"weights {path}: expected {expected}, got {explain(path, error)}") from error
  return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  found = dict(pairs)
  if len(found) < len(pairs):
    names = [name for name, _ in pairs]
    raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} twice")
  return found

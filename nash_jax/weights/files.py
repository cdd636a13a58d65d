"""Files as they come from elsewhere: JSON read with care, and what another kind of file is."""

import json
import pathlib
from typing import Any

from nash_jax.validation import foreign

_PROTOCOLS = (b"\x02", b"\x03", b"\x04", b"\x05")  # of pickles
# Other weights by their first bytes, and what to do. Only asked of a file that could not be read.
_KINDS = (
  (b"PK\x03\x04", "a PyTorch or NumPy archive: convert it to safetensors"),
  *((b"\x80" + protocol, "a pickle: convert it to safetensors") for protocol in _PROTOCOLS),
  (b"GGUF", "a GGUF file: convert it to safetensors, or download the original"),
  (b"\x89HDF", "an HDF5 file: convert it to safetensors"),
  *((start, "a web page: download the file itself") for start in (b"<!", b"<html", b"<?xml")),
)
OTHERS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".npz")  # of weights


def explain(path: pathlib.Path, error: Exception) -> str:
  """Returns what a file that could not be read is, or else the first line of the error."""
  try:
    with open(path, "rb") as file:
      head = file.read(40)
  except (OSError, ValueError) as unreadable:
    return str(unreadable)
  if not head:
    return "an empty file"
  kind = next((what for start, what in _KINDS if head.startswith(start)), foreign(head))
  if kind and head[8:9] != b"{":  # as a .safetensors file has it, whatever its length before
    return kind
  kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
  return f"{kind}{error}".splitlines()[0]


def others(folder: pathlib.Path) -> str:
  """Returns a word on weights of another format in a folder, if there are any: "; x.bin is …"."""
  found = sorted(file.name for file in folder.glob("*") if file.suffix in OTHERS)
  return f"; {found[0]} is of another format: convert it to safetensors" if found else ""


def read_json(path: pathlib.Path, expected: str) -> dict[str, Any]:
  """Returns the object in a JSON file, which may begin with a byte-order mark.

  Raises:
    ValueError: naming the file: not to be read, not UTF-8, no JSON, no object, or one with a key
      that comes twice.
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

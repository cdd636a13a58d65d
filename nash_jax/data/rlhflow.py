"""RLHFlow's prompt collection as our JSON lines: `python -m nash_jax.data.rlhflow INPUT OUTPUT`.

Also sets of instructions (self-instruct, Alpaca), and lines that are a text each (OpenAssistant).

INPUT: a parquet, JSON or JSON-lines file, or a folder of them. OUTPUT: the file to write, such as
data/rlhflow.jsonl, which the Gemma configs read. docs/data.md has more.
"""

import contextlib
import json
import os
import pathlib
import sys
from typing import Any

from nash_jax.data import files
from nash_jax.data.chat_template import turns
from nash_jax.data.corpus import field, has
from nash_jax.run.files import replacing
from nash_jax.validation import require

_COMPRESSED = (".zip", ".bz2", ".xz", ".zst", ".lz4", ".7z")


def convert(source: str, output: str) -> dict[str, int]:
  """Writes the collection as the JSON lines that docs/data.md describes.

  Args:
    source: a parquet, JSON or JSON-lines file, or a folder of them. A row's conversation is its
      "context_messages", or else its "prompt".
    output: the file to write, once all rows are read; one that lies in the folder is no input.

  Returns:
    How many rows were written, and how many skipped, since they are no conversation that waits for
    an answer.

  Raises:
    ValueError: no such files, or one that cannot be read (names the file and the row), or none to
      write.
  """
  counts = {"written": 0, "skipped": 0}
  inputs = _inputs(pathlib.Path(source), pathlib.Path(output))
  with contextlib.suppress(OSError):  # replacing says what is wrong
    pathlib.Path(output).parent.mkdir(parents=True, exist_ok=True)
  with replacing(output) as part, part.open("w", encoding="utf-8") as lines:
    for place, row in (pair for file in inputs for pair in files.read_records(file)):
      if messages := _messages(row):
        try:
          line = json.dumps({"messages": messages}, ensure_ascii=False, allow_nan=False)
          for text in (line, *(turn.system + turn.text for turn in turns(messages))):
            files.check_text(text)
          lines.write(line + "\n")
        except ValueError as error:
          raise ValueError(f"{place}: {error}") from None
      counts["written" if messages else "skipped"] += 1
    expected = "a conversation that waits for an answer, as context_messages or prompt"
    require(counts["written"] > 0, str(source), expected, counts, "docs/data.md has its form.")
  return counts


def _inputs(source: pathlib.Path, output: pathlib.Path) -> list[pathlib.Path]:
  """Returns the files to read, the output not among them."""
  require(source.exists(), "input", "a file or a folder that exists", str(source), "Give its path.")
  found = [path for path in sorted(source.rglob("*")) if path.is_file()]
  found = found if source.is_dir() else [source]
  packed = [str(path) for path in found if path.suffix in _COMPRESSED and _is_input(path.stem)]
  require(not packed, "input", "files that are not compressed", packed[:3], "Unpack them.")
  own = [path for path in found if output.exists() and os.path.samefile(path, output)]
  fix = "Give the output a name of its own."
  require(own != [source], "output", "a file other than the input", str(output), fix)
  inputs = [path for path in found if _is_input(path.name) and path not in own]
  require(
    len(inputs) > 0, "input", f"files in {', '.join(files.SUFFIXES)}", str(source), "Download them."
  )
  return inputs


def _is_input(name: str) -> bool:
  return name.endswith(files.SUFFIXES)


def _messages(row: Any) -> list[dict] | None:
  """Returns a row's conversation, or None where that does not wait for an answer."""
  try:
    row = _with_prompt(row)
    filled = has(row, "context_messages") and row["context_messages"] not in ("", [])
    name = "context_messages" if filled else "prompt"
    messages = field(row, name, (str, list))
    if isinstance(messages, str):
      messages = [{"role": "user", "content": messages}]
    turns(messages)
  except ValueError:
    return None
  return messages


def _with_prompt(row: Any) -> Any:
  """Returns a text, or an instruction with its input, as a row with a prompt; others as they are.

  Instructions as self-instruct ("instances", of which the first counts) and Alpaca have them.
  """
  if isinstance(row, str):
    return {"prompt": row}
  if not isinstance(row, dict) or "prompt" in row or not isinstance(row.get("instruction"), str):
    return row
  instances = row.get("instances")
  source = instances[0] if isinstance(instances, list) and instances else row
  given = source.get("input") if isinstance(source, dict) else ""
  parts = (row["instruction"], given if isinstance(given, str) else "")
  return {"prompt": "\n\n".join(part for part in parts if part.strip())}


def main(*arguments: str) -> int:
  """Converts, prints the counts or a line that says what is wrong, and returns the exit status."""
  if {"-h", "--help"} & {*arguments}:
    print(__doc__, end="")
    return 0
  try:
    require(len(arguments) == 2, "arguments", "INPUT OUTPUT", list(arguments), "Try --help.")
    print(convert(*arguments))
  except ValueError as error:
    print(f"rlhflow: {error}", file=sys.stderr)
    return 2
  return 0


if __name__ == "__main__":
  sys.exit(main(*sys.argv[1:]))

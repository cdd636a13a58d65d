"""RLHFlow's prompt collection as our JSON lines: `python -m nash_jax.data.rlhflow INPUT OUTPUT`."""

import json
import pathlib
import sys
from collections.abc import Iterator

from nash_jax.data.chat_template import turns
from nash_jax.data.corpus import field


def convert(source: str, output: str) -> dict[str, int]:
  """Writes the collection as the JSON lines that docs/data.md describes.

  Args:
    source: a parquet, JSON or JSON-lines file, or a folder of them. A row's conversation is its
      "context_messages", or else its "prompt".
    output: the file to write.

  Returns:
    How many rows were written, and how many skipped, since they are no conversation that waits for
    an answer.
  """
  path = pathlib.Path(source)
  counts = {"written": 0, "skipped": 0}
  with open(output, "w", encoding="utf-8") as lines:
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
      for row in _rows(file):
        name = "context_messages" if "context_messages" in row else "prompt"
        try:
          messages = field(row, name, (str, list))
          if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
          turns(messages)
        except ValueError:
          counts["skipped"] += 1
          continue
        lines.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
        counts["written"] += 1
  return counts


def _rows(path: pathlib.Path) -> Iterator[dict]:
  """Yields the rows of one file; one of another kind (a README, say) has none."""
  if path.suffix == ".parquet":
    import pyarrow.parquet

    for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
      yield from batch.to_pylist()
  elif path.suffix in (".json", ".jsonl"):
    text = path.read_text("utf-8")
    lines = filter(str.strip, text.split("\n"))
    yield from json.loads(text) if text.lstrip().startswith("[") else map(json.loads, lines)


if __name__ == "__main__":
  print(convert(*sys.argv[1:]))

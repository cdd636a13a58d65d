"""Published data sets as our JSON lines: `python -m nash_jax.convert KIND INPUT OUTPUT`."""

import gzip
import json
import pathlib
import re
from collections.abc import Iterator

from nash_jax.corpus import field
from nash_jax.tokenizer import turns


def rlhflow(row: dict) -> dict:
  """RLHFlow's prompt collection: the conversation is "context_messages", or else "prompt"."""
  messages = field(row, "context_messages" if "context_messages" in row else "prompt", (str, list))
  if isinstance(messages, str):
    messages = [{"role": "user", "content": messages}]
  return {"messages": messages}


def hh_rlhf(row: dict) -> dict:
  """Anthropic's HH-RLHF: two transcripts that differ in the assistant's last turn."""
  chosen, rejected = (
    re.split(r"\n\n(Human|Assistant): ?", field(row, name))[1:] for name in ("chosen", "rejected")
  )
  if chosen[:-1] != rejected[:-1]:
    raise ValueError("the two transcripts differ before their last turn")
  said = zip(chosen[:-2:2], chosen[1:-2:2], strict=True)
  messages = [{"role": "user" if who == "Human" else "assistant", "content": t} for who, t in said]
  return {"messages": messages, "chosen": chosen[-1], "rejected": rejected[-1]}


def oasst(row: dict) -> dict:
  """OpenAssistant pairs: {"prompt": [{"role", "text"}], "chosen", "rejected"}."""
  roles = {"prompter": "user", "assistant": "assistant"}
  said = field(row, "prompt", list)
  messages = [{"role": roles[turn["role"]], "content": turn["text"]} for turn in said]
  return {"messages": messages, "chosen": row["chosen"], "rejected": row["rejected"]}


def pandalm(row: dict) -> dict:
  """PandaLM's test set: three annotators say 1, 2, or 0 for a tie."""
  votes = [field(row, f"annotator{i}", int) for i in (1, 2, 3)]
  prompt = "\n\n".join(filter(None, (row["instruction"], row["input"])))
  return {
    "messages": [{"role": "user", "content": prompt}],
    "response_a": row["response1"],
    "response_b": row["response2"],
    "votes_a": votes.count(1),
    "votes_b": votes.count(2),
    "ties": votes.count(0),
  }


KINDS = {row.__name__: row for row in (rlhflow, hh_rlhf, oasst, pandalm)}


def convert(kind: str, source: str, output: str) -> dict[str, int]:
  """Writes a published data set as the JSON lines that docs/data.md describes.

  Args:
    kind: one of KINDS.
    source: a parquet, JSON or JSON-lines file (.gz too), or a folder of them.
    output: the file to write.

  Returns:
    How many rows were written, and how many skipped, since they are no conversation that waits for
    an answer or no two answers to one prompt.
  """
  if kind not in KINDS:
    raise ValueError(f"unknown kind {kind!r}: choose one of {', '.join(KINDS)}")
  path = pathlib.Path(source)
  counts = {"written": 0, "skipped": 0}
  with open(output, "w", encoding="utf-8") as lines:
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
      for row in _rows(file):
        try:
          record = KINDS[kind](row)
          turns(record["messages"])
        except ValueError:
          counts["skipped"] += 1
          continue
        lines.write(json.dumps(record, ensure_ascii=False) + "\n")
        counts["written"] += 1
  return counts


def _rows(path: pathlib.Path) -> Iterator[dict]:
  """Yields the rows of one file; one of another kind (a README, say) has none."""
  if path.suffix == ".parquet":
    import pyarrow.parquet

    for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
      yield from batch.to_pylist()
  elif path.name.removesuffix(".gz").endswith((".json", ".jsonl")):
    text = (gzip.open if path.suffix == ".gz" else open)(path, "rb").read().decode("utf-8")
    lines = filter(str.strip, text.split("\n"))
    yield from json.loads(text) if text.lstrip().startswith("[") else map(json.loads, lines)


if __name__ == "__main__":
  import argparse

  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("kind", choices=KINDS)
  parser.add_argument("source")
  parser.add_argument("output")
  print(convert(**vars(parser.parse_args())))

"""Files of preferences and texts, and configs that read them."""

import json

from ml_collections import ConfigDict

from nash_jax.data.tokenizer import BUNDLED, Tokenizer

TOKENIZER = Tokenizer(BUNDLED, "plain")


CHAT = Tokenizer(BUNDLED, "gemma")


def write(path, records):
  path.write_text("\n".join(map(json.dumps, records)))
  return str(path)


def configure(task, path, **fields):
  budgets = {"max_tokens": 16, "max_response_tokens": 12, "held_out_path": ""}
  budgets |= {"duplicates": "keep", "bad": "stop"}
  return ConfigDict(
    {"task": task, "path": path, "held_out": 1, "overflow": "drop", **budgets} | fields
  )

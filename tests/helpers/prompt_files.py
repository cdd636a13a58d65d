"""Files of prompts, configs that read them, and the texts read."""

import json

from ml_collections import ConfigDict

from nash_jax.data import prompts
from nash_jax.data.tokenizer import BUNDLED, Tokenizer

TOKENIZER = Tokenizer(BUNDLED, "plain")


CHAT = Tokenizer(BUNDLED, "gemma")


def configure(
  path="",
  task="json_lines",
  max_tokens=16,
  overflow="drop",
  held_out=3,
  held_out_path="",
  duplicates="keep",
  bad="stop",
):
  return ConfigDict(locals())


def texts_of(part):
  return [TOKENIZER.decode(row) for row in part.all().tokens]


def write(path, records):
  path.write_text("\n".join(map(json.dumps, records)) + "\n")
  return str(path)


def load_all(path, tokenizer=TOKENIZER, **fields):
  """Returns every prompt of a file, as text."""
  config = configure(str(path), **{"held_out": 0, "max_tokens": 64, **fields})
  batch = prompts.load_prompts(config, tokenizer, seed=0)[0].all()
  return [
    tokenizer._model.decode([int(i) for i in row[mask][1:]])
    for row, mask in zip(batch.tokens, batch.mask, strict=True)
  ]

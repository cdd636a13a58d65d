"""Files of AlpacaEval's and Arena-Hard's form: prompts, and answers to them."""

import json

import numpy as np

import nash_jax
from nash_jax.data.tokenizer import BUNDLED, Tokenizer

TOKENIZER = Tokenizer(BUNDLED, "plain")


WORDS = ("the", "cat", "saw", "a", "big", "dog", "and", "Tom", "was", "happy")


TASKS = ("alpaca_eval", "arena_hard")


def text_of(seed, most=12):
  rng = np.random.default_rng(seed)
  return " ".join(rng.choice(WORDS, rng.integers(2, most))) + "."


def questions(task, count=60):
  """A benchmark's records."""
  texts = [f"Tell a story {i}. {text_of(i)}" for i in range(count)]
  if task == "alpaca_eval":
    return [{"instruction": text, "dataset": f"set {i % 3}"} for i, text in enumerate(texts)]
  return [{"uid": f"u{i}", "category": "hard", "prompt": text} for i, text in enumerate(texts)]


def answers_of(task, records, model="gpt", seed=100):
  """A file of answers that another program wrote, as text."""
  said = [text_of(seed + i) for i in range(len(records))]
  if task == "alpaca_eval":
    rows = [
      {"dataset": "x", "instruction": r["instruction"], "output": text, "generator": model}
      for r, text in zip(records, said, strict=True)
    ]
    return json.dumps(rows)
  rows = [
    {
      "uid": r["uid"],
      "model": model,
      "messages": [
        {"role": "user", "content": r["prompt"]},
        {"role": "assistant", "content": {"answer": text}},
      ],
    }
    for r, text in zip(records, said, strict=True)
  ]
  return "\n".join(map(json.dumps, rows))


def write_questions(path, task, records):
  array = task == "alpaca_eval"
  path.write_text(json.dumps(records) if array else "\n".join(map(json.dumps, records)))
  return path


def read_rows(path):
  text = path.read_text(encoding="utf-8")
  return json.loads(text) if path.suffix == ".json" else list(map(json.loads, text.splitlines()))


def configure(path, task, **fields):
  config = nash_jax.config.arena().prompts
  config.update({"path": str(path), "task": task, "held_out": 5, "max_tokens": 60, **fields})
  return config

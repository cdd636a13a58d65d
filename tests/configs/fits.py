"""A fit of a tiny policy to a few short texts or pairs."""

import json

import nash_jax

TEXTS = [
  f"The {size} {animal} ran home."
  for size in ("big", "sad", "red")
  for animal in ("cat", "dog", "bird", "mouse", "bear", "frog")
]


def settings(folder, loss="sft", **data):
  if loss == "sft":
    records = [{"text": text} for text in TEXTS]
  else:
    records = [
      {"prompt": f"{text} It was", "chosen": " happy.", "rejected": " a wet day."} for text in TEXTS
    ]
  path = folder / f"{loss}.jsonl"
  path.write_text("\n".join(map(json.dumps, records)))
  c = nash_jax.config.fit()
  c.model.update({"preset": "tiny", "weights": ""})
  c.model.changes = {"num_embed": 1024}
  c.loss, c.steps, c.checkpoint.every = loss, 24, 12
  c.data.update(
    {
      "path": str(path),
      "held_out": 6,
      "batch_size": 4,
      "max_tokens": 16,
      "max_response_tokens": 8,
      "task": "text" if loss == "sft" else "preferences",
    }
  )
  c.data.update(data)
  c.optimizer.update({"learning_rate": 2e-2, "warmup_steps": 2})
  c.evaluation.every = 12
  return c

"""A judge, or a Bradley-Terry reward, fitted from Gemma 3 270M to people's comparisons.

Question: how much of what people prefer do a pairwise judge and a reward learn from the same pairs?
Command:  nash-jax fit --config=gemma3_270m_judge --workdir=runs/judge_a
          (:b for the other half of the pairs, :reward for Bradley-Terry, :reward,b). Then
          nash-jax agreement --config=gemma3_270m_judge:agreement --workdir=runs/agreement
Data:     data/pairs_a.jsonl, data/pairs_b.jsonl and, held out, data/pairs_held.jsonl, made as in
          docs/real_gemma.md; the pretrained weights and their tokenizer.model are in
          weights/gemma-3-270m (see docs/weights.md).
Cost:     two minutes on one H200, mostly compilation.
Expected: docs/real_gemma.md
"""

from nash_jax import config
from nash_jax.configs.gemma3_270m_compare import WEIGHTS
from nash_jax.validation import one_of

KINDS = ("", "a", "b", "reward", "agreement")
EXPORTS = "runs/{loss}_{part}.safetensors"


def model(c, weights=WEIGHTS):
  """Sets a `model` group to Gemma 3 270M in bfloat16."""
  c.update(preset="gemma3_270m", weights=weights, tokenizer=f"{WEIGHTS}/tokenizer.model")
  c.dtype = "bfloat16"


def data(c):
  c.update(task="preferences", held_out_path="data/pairs_held.jsonl", batch_size=16)
  c.update(max_tokens=256, max_response_tokens=256)


def get_config(kind=""):
  kinds = kind.split(",")
  for name in kinds:
    one_of("the word after the colon", name, KINDS)
  if "agreement" in kinds:
    return agreement()
  c, part = config.fit(), "b" if "b" in kinds else "a"
  c.loss = "reward" if "reward" in kinds else "judge"
  model(c.model)
  c.model.update(template="gemma", remat=True)
  if c.loss == "judge":
    c.template = "gemma"
  data(c.data)
  c.data.path = f"data/pairs_{part}.jsonl"
  c.steps = 300  # three epochs
  c.optimizer.update(learning_rate=1e-5, warmup_steps=20)
  c.evaluation.every = c.checkpoint.every = 50
  c.export, c.export_dtype = EXPORTS.format(loss=c.loss, part=part), "float32"
  return c


def agreement():
  """Returns the config in which the four fits and the unfitted model judge the held-out pairs."""
  c = config.agreement()
  data(c.data)
  c.data.path = "data/pairs_a.jsonl"
  c.model.update(preset="gemma3_270m", tokenizer=f"{WEIGHTS}/tokenizer.model", template="gemma")
  del c.judges["judge"]
  for name, loss, part in (
    ("judge_a", "judge", "a"), ("judge_b", "judge", "b"),
    ("reward_a", "reward", "a"), ("reward_b", "reward", "b"), ("unfitted", "judge", ""),
  ):  # fmt: skip
    c.judges[name] = config.train().judge
    c.judges[name].name = "bradley_terry" if loss == "reward" else "gemma"
    weights = EXPORTS.format(loss=loss, part=part) if part else WEIGHTS
    model(c.judges[name].model, weights)
    if loss == "judge":
      c.judges[name].template = "gemma"
  return c

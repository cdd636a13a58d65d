"""The bundled judge: the storyteller, fitted to the population's votes on pairs.

Question: how much of a cyclic population can a small pairwise judge learn? And how much of it a
          judge that reads each response once: a general preference model (:gpm), or a reward model
          (:reward), which cannot cycle?
Command:  nash-jax fit --config=judge --workdir=runs/judge
          --config.export=nash_jax/assets/stories/judge.safetensors
          nash-jax fit --config=judge:gpm --workdir=runs/gpm --config.export=runs/gpm.safetensors
Data:     runs/votes/pairs.jsonl, from configs/votes.py; the last 1,000 pairs are held out.
Expected: docs/judges.md
"""

from nash_jax import config
from nash_jax.validation import one_of


def get_config(loss="judge"):
  one_of("the word after the colon", loss, ("judge", "gpm", "reward"))
  c = config.fit()
  c.loss = loss
  c.model.weights = "assets:stories/policy.safetensors"
  c.data.task = "tokens"
  c.data.path = "runs/votes/pairs.jsonl"
  c.data.held_out = 1000
  c.data.max_tokens = 32
  c.data.max_response_tokens = 56
  c.data.batch_size = 16
  c.steps = 1200
  c.optimizer.learning_rate = 1e-3
  c.checkpoint.every = 200
  c.evaluation.every = 200
  c.evaluation.batches = 40
  return c

"""The bundled judge: the storyteller, fitted to the population's votes on pairs.

Question: how much of a cyclic population can a small pairwise judge learn?
Command:  nash-jax fit --config=judge --workdir=runs/judge
          --config.export=nash_jax/assets/stories/judge.safetensors
Data:     runs/votes/pairs.jsonl, from configs/votes.py; the last 1,000 pairs are held out.
"""

from nash_jax import config


def get_config():
  c = config.fit()
  c.loss = "judge"
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

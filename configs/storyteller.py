"""The bundled storyteller: next-token fitting of a 1.1M-parameter Gemma on TinyStories.

Question: what can a model of a few megabytes tell?
Command:  nash-jax fit --config=storyteller --config.data.path=tinystories.jsonl
          --config.export=nash_jax/assets/stories/policy.safetensors --workdir=runs/storyteller
Data:     JSON lines of {"text": ...}; the last 600 stories are held out.
"""

from nash_jax import config


def get_config():
  c = config.fit()
  c.steps = 3000
  c.data.max_tokens = 129  # 128 predictions a window
  c.data.batch_size = 32
  c.optimizer.learning_rate = 3e-3
  c.optimizer.weight_decay = 0.1
  c.model.logit_chunk = 16
  c.checkpoint.every = 500
  c.evaluation.every = 500
  return c

"""Continuations from a policy.

Question: what does it write?
Command:  nash-jax sample --prompt="Lily saw a red kite."
          To sample from a run's policy, with its settings: --run=runs/demo
          To read prompts from a file: --file=prompts.jsonl --output=continuations.jsonl
          To go further from the base than trained: --realign=1.5; less far: --realign=0.5
"""

from nash_jax import config


def get_config():
  return config.sample()

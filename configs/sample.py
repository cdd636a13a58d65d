"""Continuations from a policy.

Question: what does it write?
Command:  nash-jax sample --prompt="Lily saw a red kite."
          A run's policy, as that run has it: --run=runs/demo
          Prompts of a file, into another: --file=prompts.jsonl --output=continuations.jsonl
          Further from the base than it was trained to be: --realign=1.5; nearer: --realign=0.5
"""

from nash_jax import config


def get_config():
  return config.sample()

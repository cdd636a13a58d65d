"""Continuations from a policy.

Question: what does it write?
Command:  nash-jax sample --config=configs/sample.py --config.prompt="Lily saw a red kite."
          (another policy: --config.model.weights=runs/demo@params)
"""

from nash_jax import config


def get_config():
  return config.sample()

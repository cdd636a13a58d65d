"""Continuations from a policy.

Question: what does it write?
Command:  nash-jax sample --config=sample --config.prompt="Lily saw a red kite."
          Another policy: --config.model.weights=runs/demo@params
          Further from the base than it was trained to be: --realign=1.5; nearer: --realign=0.5
"""

from nash_jax import config


def get_config():
  return config.sample()

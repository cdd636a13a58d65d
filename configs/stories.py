"""NashMP on the bundled storyteller against the bundled judge: the demo's run.

Question: does a small policy move towards what a population with cyclic tastes prefers, if it is
          trained only against a judge fitted to that population's votes?
Command:  nash-jax train --config=stories --workdir=runs/stories
Cost:     minutes on two CPU cores.
"""

from nash_jax import config


def get_config():
  c = config.train()
  c.steps = 80
  c.prompts.batch_size = 32
  c.prompts.max_tokens = 32
  c.sampling.max_tokens = 56
  c.sampling.temperature = 0.8
  c.algorithm.beta = 0.05
  c.algorithm.eta = 1.0
  c.algorithm.kappa = 0.1
  c.optimizer.learning_rate = 1e-4
  c.evaluation.every = 20
  c.evaluation.prompts = 64
  c.checkpoint.every = 20
  return c

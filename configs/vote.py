"""A page on which people judge pairs of responses.

Question: which of two responses would people rather have?
Command:  nash-jax vote --from=runs/x --workdir=runs/vote      (a run, an arena, collect, or files)
          nash-jax vote --workdir=runs/vote --export=votes.jsonl
Cost:     a person judges some hundred short pairs an hour. docs/votes.md shows the way to a judge.
"""

from nash_jax import config


def get_config():
  return config.vote()

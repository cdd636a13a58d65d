"""Question: how far does a judge prefer what people prefer?

    nash-jax agreement --config=agreement --workdir=runs/agreement

Compares the bundled judge with votes of the population that it was fitted to: the last 1,000 pairs
of runs/votes/pairs.jsonl (from configs/votes.py), which the fit of configs/judge.py did not see.
For another judge, with people's comparisons in your own file:

    nash-jax agreement --workdir=runs/agreement --config.data.task=preferences \\
      --config.data.path=comparisons.jsonl --config.data.held_out=0 --config.judges.judge.model...

Cost: a minute on 2 cores. Expected: docs/judges.md.
"""

from nash_jax import config


def get_config():
  c = config.agreement()
  c.data.update(task="tokens", path="runs/votes/pairs.jsonl", held_out=1000, batch_size=16)
  c.data.update(max_tokens=32, max_response_tokens=56)
  return c

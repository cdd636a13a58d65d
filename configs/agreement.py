"""Question: how far does a judge prefer what people prefer?

    nash-jax agreement --config=agreement --workdir=runs/agreement

Compares the bundled judge with votes of the population that it was fitted to: the last 1,000 pairs
of runs/votes/pairs.jsonl (from configs/votes.py), which the fit of configs/judge.py did not see.
For another judge, with people's comparisons in your own file:

    nash-jax agreement --workdir=runs/agreement --config.data.task=preferences \\
      --config.data.path=comparisons.jsonl --config.data.held_out=0 --config.judges.judge.model...

With :fits, beside it runs/gpm.safetensors and runs/reward.safetensors, which are fitted to the same
votes by configs/judge.py, :gpm and :reward.

Cost: a minute on 2 cores. Expected: docs/judges.md.
"""

from nash_jax import config
from nash_jax.validation import one_of

FITS = {"gpm": "gpm", "reward": "bradley_terry"}  # file in runs/: the judge that reads it


def get_config(judges=""):
  one_of("the word after the colon", judges, ("", "fits"))
  c = config.agreement()
  c.data.update(task="tokens", path="runs/votes/pairs.jsonl", held_out=1000, batch_size=16)
  c.data.update(max_tokens=32, max_response_tokens=56)
  for file, name in FITS.items() if judges else ():
    c.judges[file] = config.train().judge
    c.judges[file].name = name
    c.judges[file].model.weights = f"runs/{file}.safetensors"
  return c

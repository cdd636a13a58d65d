"""Question: does the trained storyteller beat the one it came from, and best-of-4 of that one?

    nash-jax arena --config=arena --workdir=runs/stories/arena
    nash-jax arena --config=arena:a=runs/a,b=runs/b@target:50 --workdir=runs/a_b

After the colon: name=weights of the policies that play, any number, or name=answers.json, what
another model answered (docs/arena.md); by default the policy and the target of runs/stories. They
meet the bundled base and the best of 4 of it, under the judge that the storyteller was trained by
and under the population that this judge was fitted to.

Cost: about a minute on 2 cores. Expected: row "trained", column "base" clear of one half under both
judges, and lower under the population, which the fitted judge only approximates.
"""

from nash_jax import config as configs


def get_config(policies="trained=runs/stories,target=runs/stories@target"):
  config = configs.arena()
  config.sampling.max_tokens, config.sampling.temperature = 56, 0.8  # as configs/stories.py trains
  for entry in policies.split(","):
    name, _, weights = entry.partition("=")
    answers = weights.endswith((".json", ".jsonl"))
    config.policies[name] = {"outputs": weights} if answers else {"weights": weights, "best_of": 1}
  return config

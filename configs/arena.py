"""Question: does the trained storyteller beat the one it came from, and best-of-4 of that one?

    nash-jax arena --config=arena --workdir=runs/stories/arena
    nash-jax arena --config=arena:a=runs/a,b=runs/b@target:50 --workdir=runs/a_b

After the colon come any number of policies as name=weights, or name=answers.json for another
model's answers (docs/arena.md); by default the policy and the target of runs/stories. They meet the
bundled base and its best of 4, under the judge that trained the storyteller and under the
population that this judge was fitted to.

Cost: about a minute on 2 cores. Expected: in row "trained", column "base", a win rate above one
half under both judges, lower under the population, which the fitted judge only approximates.
"""

from nash_jax import config as configs
from nash_jax.validation import require


def get_config(policies="trained=runs/stories,target=runs/stories@target"):
  config = configs.arena()
  config.sampling.max_tokens, config.sampling.temperature = 56, 0.8  # as configs/stories.py trains
  for entry in policies.split(","):
    name, _, weights = entry.partition("=")
    fix = "For example --config=arena:mine=runs/x."
    require(bool(name and weights), "a policy after the colon", "name=weights", entry, fix)
    answers = weights.endswith((".json", ".jsonl"))
    config.policies[name] = {"outputs": weights} if answers else {"weights": weights, "best_of": 1}
  return config

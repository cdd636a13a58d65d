"""All methods on the bundled storyteller: equal prompts, samples, judge and tuning, then an arena.

Question: whom does a population with cyclic tastes prefer, if every method is trained against a
          judge fitted to its votes, each at its best learning rate?
Command:  nash-jax compare --config=stories_compare --workdir=runs/stories_compare
          (:paper for only the five methods of NashMP's table, :smoke for a minute)
Cost:     on two CPU cores 80 s a run; 5 x 6 runs for :paper, 22 x 6 for all.
          For all, gpo and best_of_two need the votes: nash-jax collect --config=votes
          --workdir=runs/votes. rlhf needs a Bradley-Terry reward fitted to them:
          nash-jax fit --config=judge --config.loss=reward --workdir=runs/reward
            --config.export=runs/reward.safetensors
Expected: docs/compare.md.
"""

from nash_jax import config
from nash_jax.configs import stories
from nash_jax.objectives import algorithms
from nash_jax.validation import one_of

PAPER = ("nash_mp", "reg_self_play", "nash_md", "online_ipo", "online_dpo")
PAIRS = {"pairs.task": "tokens", "pairs.path": "runs/votes/pairs.jsonl"}
REWARD = {"judge.name": "bradley_terry", "judge.model.weights": "runs/reward.safetensors"}
# What methods need besides their name; all have 64 responses a step, egpo's in threes.
NEEDS = {
  "egpo": {
    "algorithm.samples": 3,
    "prompts.batch_size": 21,
    "algorithm.behaviour_temperature": 1.25,
  },
  "mpo": {"algorithm.reference_period": 20, "algorithm.target_period": 5},
  "nash_mp_two_step": {"algorithm.target_period": 5},
  "inpo": {"algorithm.target_period": 5},
  "sppo": {"algorithm.target_period": 5},
  "gpo": PAIRS,
  "best_of_two": PAIRS,
  "mnpo": {"algorithm.target_period": 5},
  "grpo": {"algorithm.samples": 8, "prompts.batch_size": 8},
  **dict.fromkeys(("rlhf", "agro", "shiq"), REWARD),
}


def get_config(size="all"):
  one_of("the word after the colon", size, ("all", "paper", "smoke"))
  b = stories.get_config()
  b.steps = 40
  # The first 64 held-out prompts tune, the last 96 decide.
  b.prompts.held_out, b.evaluation.prompts = 160, 64
  b.evaluation.every, b.checkpoint.every, b.checkpoint.keep = 20, 40, 1
  names = list(algorithms.ALGORITHMS) if size == "all" else list(PAPER)
  if size == "smoke":
    names, b.steps = names[:2], 2
    b.prompts.batch_size, b.evaluation.prompts, b.evaluation.every = 4, 8, 2
    b.sampling.max_tokens = 8
  runs = [{"algorithm.name": name, **NEEDS.get(name, {})} for name in names]
  c = config.compare(b, runs, learning_rates=(3e-5, 1e-4, 3e-4), seeds=3)
  if size == "smoke":
    c.seeds, c.learning_rates = 1, (1e-4,)
  return meet(c, prompts=96, most=8 if size == "smoke" else 0)


def meet(c, prompts, most):
  """Adds an arena under the population on the last `prompts` held-out prompts, at most `most`."""
  for part in ("model", "prompts", "sampling"):
    c.arena[part] = c.base[part].copy_and_resolve_references()
  c.arena.model.weights, c.arena.model.lora.rank = "", 0  # each policy has its own, merged
  c.arena.prompts.held_out, c.arena.prompts.batch_size, c.arena.max_prompts = prompts, 4, most
  c.arena.judges = {"population": {**c.base.judge.to_dict(), "name": "population"}}
  c.arena.select_judge = "population"
  return c

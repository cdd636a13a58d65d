"""Every method on the short-response game, each at the best learning rate of one grid.

Question: whose last iterate is nearest the equilibrium, with mild and with strong cycles?
Command:  nash-jax compare --config=short_compare:mild --workdir=runs/short_mild
          (:strong; :mild,network and :strong,network for Gemma policies, with tabular ones under
          the same optimiser and rate; :smoke in half a minute; :mild,offline adds the methods that
          learn from a file of pairs: nash-jax collect --config=online_offline:reference
          --workdir=runs/online_offline/reference makes it; for :strong,offline use
          :strong,reference and runs/online_offline_strong/reference; :mild,gap has the methods
          that aim at the game without β, each at the rate that is best there)
Cost:     about half an hour of one CPU core, forty minutes with networks.
Expected: docs/short_game.md
"""

from nash_jax import config
from nash_jax.configs import online_offline, short_game
from nash_jax.objectives import algorithms
from nash_jax.validation import one_of

# What methods need besides their name; all have the same budget of 512 responses a step.
NEEDS = {
  "egpo": {
    "algorithm.samples": 3,
    "prompts.batch_size": 170,
    "algorithm.behaviour_temperature": 2.0,
  },
  "mpo": {"algorithm.reference_period": 1000, "algorithm.target_period": 10},
  "rlhf": {"judge.name": "table_reward"},
  # Groups of eight; with two and without `normalise` it is reg_self_play.
  "grpo": {"algorithm.samples": 8, "prompts.batch_size": 64},
  "agro": {"judge.name": "table_reward"},
  "shiq": {"judge.name": "table_reward"},
}
# Two that read the same groups: 28 judged pairs to a prompt in place of one.
GROUPS = (
  {"label": "nash_mp, groups", "algorithm.name": "nash_mp", **NEEDS["grpo"]},
  {
    "label": "grpo, normalised",
    "algorithm.name": "grpo",
    "algorithm.normalise": "group",
    **NEEDS["grpo"],
  },
)
# Settings that solve the regularised game a few times, each time from the last solution.
REFRESHED = (
  {"label": "Nash-PG", "algorithm.name": "reg_self_play", "algorithm.reference_period": 1000},
  {"label": "COMAL", "algorithm.name": "inpo", "algorithm.reference_period": 1000},
)
# What aims at an equilibrium of the game without β.
UNREGULARISED = ("mpo", "sppo", "emagnet")
WITH = ("network", "offline", "gap")  # words after the comma


def _offline(strength):
  """What methods need that learn from a file of pairs."""
  path = online_offline.folder(strength)
  return {"pairs.task": "tokens", "pairs.path": f"{path}/reference/pairs.jsonl"}


def get_config(kind="mild"):
  strength, *rest = kind.split(",")
  one_of("the word after the colon", strength, (*short_game.BETA, "smoke"))
  for word in rest:
    one_of("the word after the comma", word, WITH)
  offline = {name for name, method in algorithms.ALGORITHMS.items() if method.offline}
  names = [x for x in algorithms.ALGORITHMS if "offline" in rest or x not in offline]
  names = UNREGULARISED if "gap" in rest else names
  needs = {**NEEDS, **dict.fromkeys(offline, _offline(strength))}
  b = short_game.get_config("mild" if strength == "smoke" else strength)
  runs = [{"algorithm.name": name, **needs.get(name, {})} for name in names]
  runs += [*REFRESHED] if "gap" in rest else [*GROUPS, *REFRESHED]
  c = config.compare(b, runs, kinds=("tabular",))
  c.tuning_metric = "gap" if "gap" in rest else "regularised"
  # Plain gradient descent, as in the games, because Adam's division would hide what the losses do.
  b.optimizer = config.optimizer(name="sgd", clip_norm=1e9)
  c.learning_rates = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
  c.seeds = 5
  if "network" in rest:
    b.optimizer = config.optimizer(b1=0.0, clip_norm=1e9)
    c.kinds, c.learning_rates, c.seeds = ("network", "tabular"), (1e-3,), 1
  if strength == "smoke":
    b.steps, b.evaluation.every = 20, 10
    c.seeds, c.learning_rates = 2, (1.0, 3.0)
  return c

"""Decoding-time realignment: one training at β, sampled from as if it had been trained at β/λ.

Question: which λ is best, and how close does realigning come to training again at β/λ?
Command:  nash-jax arena --config=realign:runs/x --workdir=runs/x_realigned
          compares several λ for a run of your own on the storyteller. With models that are trained
          again: nash-jax compare --config=realign:retrain --workdir=runs/realign/runs, then
          nash-jax arena --config=realign --workdir=runs/realign/arena
          (a minute with :retrain,smoke in runs/realign_smoke/runs, then :smoke)
Cost:     on two CPU cores 80 s for each of the four runs, and minutes for the arena.
Expected: docs/arena.md
"""

from fractions import Fraction

from nash_jax import config
from nash_jax.configs import stories

RETRAINED = ("1", "1/2", "2", "4")  # λ; the first run is realigned, the others are at its β/λ
REALIGNED = ("1/2", "3/2", "2", "3", "4")
BETA = stories.get_config().algorithm.beta


def get_config(kind=""):
  smoke = f",{kind}".endswith(",smoke")  # a run's folder may end so too
  kind = f",{kind}".removesuffix(",smoke").removeprefix(",")
  return _retrain(smoke) if kind == "retrain" else _arena(kind, smoke)


def _beta(strength):
  return BETA / float(Fraction(strength))


def _retrain(smoke):
  """NashMP at β/λ; the last 96 of the held-out prompts are left to the arena."""
  b = stories.get_config()
  b.steps = 40
  b.prompts.held_out, b.evaluation.prompts = 160, 64
  b.evaluation.every, b.checkpoint.every, b.checkpoint.keep = 20, 40, 1
  strengths = RETRAINED
  if smoke:
    b.steps = b.evaluation.every = b.checkpoint.every = 2
    b.prompts.batch_size, b.evaluation.prompts, b.sampling.max_tokens = 4, 8, 8
    strengths = RETRAINED[:2]
  return config.compare(b, [{"algorithm.beta": _beta(x)} for x in strengths], seeds=1)


def _arena(run, smoke):
  c = config.arena()
  c.sampling.max_tokens, c.sampling.temperature = 56, 0.8  # as configs/stories.py trains
  base = c.policies.base
  folder = f"runs/realign{'_smoke' if smoke else ''}/runs/network"
  retrained = {x: f"{folder}/beta={_beta(x):g}/seed_0" for x in RETRAINED[: 2 if smoke else None]}
  c.policies = {"base": base, "trained": {"weights": run or retrained["1"], "best_of": 1}}
  for x in REALIGNED:
    c.policies[f"realigned {x}"] = {**base, "realign": {"trained": float(Fraction(x))}}
  for x, weights in () if run else [*retrained.items()][1:]:
    c.policies[f"retrained {x}"] = {"weights": weights, "best_of": 1}
  # The truth, which is also the cheaper judge: ten policies make 190 pairs a prompt.
  c.judges, c.select_judge = {"population": c.judges.population}, "population"
  if smoke:
    c.sampling.max_tokens, c.max_prompts = 8, 12
  return c

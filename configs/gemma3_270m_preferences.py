"""Gemma 3 270M in its chat template, against a judge fitted to people's comparisons.

Question: does a policy that NashMP trains against one fitted judge also please another one, fitted
          to other people's comparisons?
Command:  nash-jax compare --config=gemma3_270m_preferences --workdir=runs/gemma3_270m_preferences
          after the fits of configs/gemma3_270m_judge.py, which make the two judges.
Data:     data/prompts.jsonl, OpenAssistant's and self-instruct's, made as in docs/real_gemma.md.
Cost:     on one H200 about a minute a run.
Expected: docs/real_gemma.md
"""

from nash_jax import config
from nash_jax.configs import gemma3_270m_compare, gemma3_270m_judge, stories_compare


def judge(c, part):
  c.name, c.template = "gemma", "gemma"
  weights = gemma3_270m_judge.EXPORTS.format(loss="judge", part=part)
  gemma3_270m_judge.model(c.model, weights)


def get_config():
  b = gemma3_270m_compare.base()
  b.model.template = "gemma"
  b.prompts.update(task="rlhflow", path="data/prompts.jsonl", max_tokens=128, held_out=160)
  b.prompts.update(batch_size=16, overflow="drop")
  b.sampling.max_tokens = 64
  b.steps, b.evaluation.prompts = 40, 64
  judge(b.judge, "a")
  c = config.compare(b, gemma3_270m_compare.RUNS, learning_rates=(3e-5, 1e-4, 3e-4), seeds=3)
  c.tuning_steps = 10
  stories_compare.meet(c, prompts=96, most=0)
  c.arena.prompts.batch_size = 16
  c.arena.judges = {part: b.judge.to_dict() for part in ("a", "b")}
  for part in ("a", "b"):
    judge(c.arena.judges[part], part)
  c.arena.select_judge = "a"
  return c

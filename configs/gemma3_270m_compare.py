"""NashMP, Online DPO and Nash-MD on a real Gemma 3 270M that continues openings of stories.

Question: does a real language model, with its 262,144 ids, move towards what a population with
          cyclic tastes prefers; whom does the population prefer of three methods, and what do the
          prox centre's extremes (kappa = 0 and 1) do there?
Command:  nash-jax compare --config=gemma3_270m_compare --workdir=runs/gemma3_270m_compare
          (:paper for the five methods of NashMP's table, :smoke for the storyteller, in a
          minute). The pretrained weights and their tokenizer.model are in weights/gemma-3-270m; see
          docs/weights.md.
Cost:     on two CPU cores about 40 s a step: two hours for nine pilots of ten steps and three runs
          of thirty; on one H200 .4 s a step and 20 s of compiling a run. The same command resumes
          it after a stop.
Expected: docs/real_gemma.md

The training judge is the population itself, with its probabilities. A run trains adapters of rank
16, on 12 prompts x 2 responses of at most 40 tokens a step. Each method's rate is that of its best
pilot on 24 held-out prompts; the arena is on 48 others.
"""

from nash_jax import config
from nash_jax.configs import stories, stories_compare
from nash_jax.validation import one_of

RUNS = (
  {"algorithm.name": "nash_mp"},
  {"algorithm.name": "online_dpo"},
  {"algorithm.name": "nash_md"},
)
PAPER = (*RUNS, {"algorithm.name": "reg_self_play"}, {"algorithm.name": "online_ipo"})
WEIGHTS = "weights/gemma-3-270m"


def base():
  """Returns the run that the methods share."""
  c = stories.get_config()
  c.model.update(preset="gemma3_270m", weights=WEIGHTS, tokenizer=f"{WEIGHTS}/tokenizer.model")
  c.model.logit_chunk = 8  # a column has 262,144 logits
  c.model.lora.rank = 16
  c.judge.name = "population"
  c.prompts.update(batch_size=12, held_out=72)
  c.sampling.update(max_tokens=40, temperature=1.0)
  c.algorithm.update(beta=0.02, eta=1.0, kappa=0.1)
  c.optimizer.update(learning_rate=1e-4, micro_batches=2)
  c.steps = 30
  c.evaluation.update(every=10, prompts=24)
  c.checkpoint.update(every=10, keep=1)
  return c


def get_config(size="all"):
  one_of("the word after the colon", size, ("all", "paper", "smoke"))
  b = base()
  runs = PAPER if size == "paper" else RUNS
  c = config.compare(b, runs, learning_rates=(3e-5, 1e-4, 3e-4), tuning_steps=10, seeds=1)
  if size == "smoke":
    b.model = stories.get_config().model
    b.model.lora.rank, b.sampling.max_tokens, b.prompts.batch_size, b.steps = 2, 8, 4, 2
    b.evaluation.every, b.evaluation.prompts, b.checkpoint.every = 2, 4, 2
    c.runs, c.tuning_steps, c.learning_rates = RUNS[:2], 1, (1e-4, 3e-4)
  return stories_compare.meet(c, prompts=48, most=4 if size == "smoke" else 0)

"""NashMP's published experiment: Gemma-2 2B against a Gemma-2 9B judge on RLHFlow's prompts.

Question: does NashMP beat Online DPO, Online IPO, Nash-MD and regularised self-play at true size?
Command:  nash-jax train --config=gemma2_2b --workdir=gs://my-bucket/runs/gemma2_2b
          (:lora for adapters of rank 16, :self for the policy's own start as judge, :lora,self for
          both, :smoke for tiny random models on a CPU). docs/true_size.md has every command from an
          empty machine on, docs/tpu.md those for a TPU slice. Select another method with
          --config.algorithm.name=online_dpo; each needs its own tuned rate.
Cost:     9.1 of 15.75 GiB a chip and 1.9 s a step at best on v5e-16, by docs/plan.md:
          nash-jax plan --config=gemma2_2b --topology=v5e-16.
Expected: published win rates of NashMP, kappa = .1, over SFT .8717, Online DPO .5608, Online IPO
          .5294, Nash-MD .6395, regularised self-play .5380 (3 sigma about .0115; Tiapkin et al.
          2505.19731). Not run here yet.

The two models, the collection of prompts and kappa are as published. Our choices are beta, eta,
AdamW and its rate, 1,000 steps of 32 prompts, 256 + 256 tokens, temperature 1, and the judge's
template.
"""

from nash_jax import config
from nash_jax.validation import one_of

KINDS = ("", "lora", "self", "smoke")


def get_config(kind=""):
  return experiment("gemma2_2b", "gemma-2-2b-it", "gemma2_9b", "gemma-2-9b-it", kind)


def experiment(policy, weights, judge, judge_weights, kind, template="gemma"):
  """Returns the experiment for two models by preset and folder.

  Args:
    template: the chat template and the judge's question, which have the same names.
    kind: one of KINDS, or several such as "lora,self". "" is the experiment itself; "lora" trains
      adapters; "self" has the policy's own start as judge, which needs no second model; "smoke" has
      tiny random models.
  """
  kinds = kind.split(",")
  for name in kinds:
    one_of("the word after the colon", name, KINDS)
  c = config.train()
  for part, preset, name in ((c.model, policy, weights), (c.judge.model, judge, judge_weights)):
    part.update(preset=preset, weights=f"weights/{name}", dtype="bfloat16")
  c.model.tokenizer = f"weights/{weights}/tokenizer.model"
  follow(c, "tokenizer")
  if "self" in kinds:
    judge_by_own_start(c)
  c.model.update(template=template, remat=True, logit_chunk=16)
  c.judge.template = template
  c.prompts.update(
    task="rlhflow", path="data/rlhflow.jsonl", held_out=512, max_tokens=256, batch_size=32
  )
  c.sampling.max_tokens = 256
  c.algorithm.update(name="nash_mp", beta=0.05, eta=1.0, kappa=0.1)
  c.optimizer.update(learning_rate=1e-6, warmup_steps=50)
  c.mesh.update(data=1, fsdp=-1, tensor=1)
  c.steps, c.checkpoint.every = 1000, 100
  c.evaluation.update(every=100, prompts=128)
  if "lora" in kinds:
    c.model.lora.rank, c.optimizer.learning_rate = 16, 1e-5
  return smoke(c) if "smoke" in kinds else c


def follow(c, *fields):
  """Makes fields of the judge's model follow the policy's until they are set."""
  for field in fields:
    c.judge.model[field] = c.model.get_oneway_ref(field)


def judge_by_own_start(c):
  """Makes the policy before training the judge; its weights are then in memory only once."""
  follow(c, "preset", "weights", "tokenizer", "dtype")


def smoke(c):
  """Shrinks an experiment so that a CPU runs its code within a minute."""
  for part in (c.model, c.judge.model):
    part.update(weights="", tokenizer="assets:stories/tokenizer.model")
    part.changes = {
      "num_layers": 2,
      "num_embed": 1024,
      "embed_dim": 32,
      "hidden_dim": 64,
      "num_heads": 2,
      "num_kv_heads": 1,
      "head_dim": 16,
    }
  c.prompts.update(  # the longest has 40 tokens
    task="stories", path="assets:stories/prompts.jsonl", held_out=8, max_tokens=40, batch_size=8
  )
  c.sampling.max_tokens, c.steps, c.checkpoint.every = 16, 2, 2
  c.optimizer.warmup_steps = 0
  c.evaluation.update(every=2, prompts=8)
  return c

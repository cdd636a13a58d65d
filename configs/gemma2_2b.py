"""NashMP's published experiment: Gemma-2 2B against a Gemma-2 9B judge on RLHFlow's prompts.

Question: does NashMP beat Online DPO, Online IPO, Nash-MD and regularised self-play at true size?
Command:  nash-jax train --config=configs/gemma2_2b.py --workdir=gs://my-bucket/runs/gemma2_2b
          (:lora for adapters of rank 16, :smoke for seconds on a CPU with tiny random models)
          Prompts: nash-jax's converter makes data/rlhflow.jsonl (docs/data.md); weights as in
          docs/weights.md; a slice of TPUs as in docs/tpu.md.
Cost:     `nash-jax plan --config=configs/gemma2_2b.py --topology=v5e:4x4`; docs/plan.md
Expected: published, kappa .1, row beats column: SFT .8717, Online DPO .5608, Online IPO .5294,
          Nash-MD .6395, regularised self-play .5380, each ± 3 sigma of about .0115 (Tiapkin et al.
          2505.19731). Not run here.

Published: the two models, the prompts' collection, kappa = .1. Everything else is our choice: beta,
eta, AdamW and its rate, 1,000 steps of 32 prompts, 256 + 256 tokens, temperature 1, and the
judge's template. Other methods: --config.algorithm.name=online_dpo, each with a tuned rate.
"""

from nash_jax import config


def get_config(kind=""):
  c = config.train()
  for part, name in ((c.model, "gemma-2-2b-it"), (c.judge.model, "gemma-2-9b-it")):
    part.update(
      preset="gemma2_2b" if part is c.model else "gemma2_9b",
      weights=f"weights/{name}", tokenizer="weights/gemma-2-2b-it/tokenizer.model",
      template="gemma", dtype="bfloat16",
    )  # fmt: skip
  c.model.remat = True
  c.judge.template = "gemma"
  c.prompts.update(
    task="rlhflow", path="data/rlhflow.jsonl", held_out=512, max_tokens=256, batch_size=32
  )
  c.sampling.max_tokens = 256
  c.algorithm.update(name="nash_mp", beta=0.05, eta=1.0, kappa=0.1)
  c.optimizer.update(learning_rate=1e-6, warmup_steps=50)
  c.mesh.update(data=1, fsdp=-1, tensor=1)
  c.steps, c.checkpoint.every = 1000, 100
  c.evaluation.update(every=100, prompts=128)
  return c

"""NashMP on one accelerator of a notebook: the bundled storyteller, or a small Gemma of one's own.

Question: does it run where people try things first, and what does a policy learn there?
Command:  colab/nash_mp_on_gemma.ipynb, or nash-jax train --config=colab:gemma3_270m,T4
          --config.model.weights=weights/gemma-3-270m-it and likewise model.tokenizer, judge.model
Cost:     the storyteller a few minutes on two CPU cores or any accelerator.
"""

from nash_jax.configs import stories


def get_config(kind="stories,T4"):
  model, _, device = kind.partition(",")
  c = stories.get_config()
  if model == "stories":
    return c
  for part in (c.model, c.judge.model):
    # Without native bfloat16 a T4 is slower in it; Gemma's activations overflow float16.
    part.update(
      preset=model,
      dtype="float32" if device == "T4" else "bfloat16",
      weights=f"weights/{model}",
      tokenizer=f"weights/{model}/tokenizer.model",
    )
  c.judge.template = "gemma"  # the model itself, asked for A or B
  # Of 256 thousand logits a column.
  c.model.update(template="gemma", remat=True, logit_chunk=8)
  c.prompts.batch_size = 16
  c.evaluation.prompts = 16
  c.optimizer.update(name="adafactor", learning_rate=2e-6, micro_batches=4)
  c.checkpoint.keep = 1
  return c


def experiment(model, device, weights="", tokenizer=""):
  """Returns the config of a form: policy and judge from the same files where there are any."""
  c = get_config(f"{model},{device}")
  for name, path in (("weights", weights), ("tokenizer", tokenizer)):
    if path:
      c.model[name] = c.judge.model[name] = path
  return c

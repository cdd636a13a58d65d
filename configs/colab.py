"""NashMP in a notebook: the bundled storyteller, or a small Gemma.

Question: does it run where people try things first, and what does a policy learn there?
Command:  colab/nash_mp_on_gemma.ipynb (Colab), colab/nash_mp_on_kaggle.ipynb, or
          nash-jax train --config=colab:gemma3_270m,T4; without a device, the one that jax finds.
          docs/true_size.md has the weights, tokenizer and prompts.
Cost:     the storyteller a few minutes on two CPU cores or any accelerator.
"""

import os

from nash_jax.configs import gemma2_2b, stories
from nash_jax.plan import memory
from nash_jax.validation import one_of

# {preset: folder of the published weights}
MODELS = {
  "gemma3_270m": "gemma-3-270m-it",
  "gemma3_1b": "gemma-3-1b-it",
  "gemma3_4b": "gemma-3-4b-it",
  "gemma2_2b": "gemma-2-2b-it",
}


def get_config(kind="stories"):
  model, _, device = kind.partition(",")
  return experiment(model, memory.named(device) if device else memory.detect())


def experiment(model, device, folder="", prompts="", judge="", judge_folder="", lora=True):
  """Returns the config for a notebook's form.

  Args:
    model: "stories", or one of MODELS.
    device: from memory.detect() or memory.named().
    folder: the weights' folder, with tokenizer.model; by default weights/ and the published name.
    prompts: a JSON-lines file of {"prompt": "..."}; "" for the bundled openings of stories, which
      suit only the storyteller.
    judge: a preset with the policy's tokenizer; "" for the policy's own start.
    lora: train adapters, which take a tenth of the memory.
  """
  one_of("model", model, ("stories", *MODELS))
  c = stories.get_config()
  c.mesh.update(data=1, fsdp=-1)
  if model != "stories":
    _gemma(c, model, device, folder or f"weights/{MODELS[model]}", lora)
  if judge:
    one_of("judge", judge, MODELS)
    c.judge.model.update(preset=judge, weights=judge_folder or f"weights/{MODELS[judge]}")
  if prompts:
    c.prompts.update(task="json_lines", path=prompts, held_out=32, overflow="drop", max_tokens=128)
    c.evaluation.prompts = 32
  return c


def _gemma(c, model, device, folder, lora):
  c.model.update(
    preset=model,
    weights=folder,
    tokenizer=os.path.join(folder, "tokenizer.model"),
    # Emulated bfloat16 is slower than float32; Gemma's activations overflow float16.
    dtype="bfloat16" if device.native_bfloat16 else "float32",
    template="gemma",
    remat=True,
    logit_chunk=8,  # a column has 256 thousand logits
  )
  gemma2_2b.judge_by_own_start(c)
  c.judge.template = "gemma"  # the model itself, asked for A or B
  c.prompts.batch_size = 16
  c.evaluation.prompts = 16
  micro = max(1, 4 // device.number)
  c.optimizer.update(name="adafactor", learning_rate=2e-6, micro_batches=micro)
  if lora:
    c.model.lora.rank = 16
    c.optimizer.update(name="adamw", learning_rate=1e-4)
  c.checkpoint.keep = 1


def overview(device):
  """Returns a Markdown table of which models fit a device, and what to change so that they do."""
  rows = []
  for model in MODELS:
    cells = [model]
    for lora in (True, False):
      c = experiment(model, device, lora=lora)
      needed = memory.peak(memory.estimate(c, device.mesh, device.kind))
      cells.append(f"{needed / memory.GIB:.1f} GiB{_fits(c, device, needed)}")
    rows.append(cells)
  header = ["model", "adapters (LoRA 16)", "all parameters"]
  return f"{memory.describe(device)}\n\n{memory.report.markdown_table(header, rows)}"


def _fits(c, device, needed):
  if not device.room:
    return ""
  if needed <= device.room:
    return ": fits"
  if not c.model.lora.rank:
    return ": too large"
  lines = memory.advice(c, device.mesh, needed, device.room, device.kind)
  if lines[-1] != "Then it fits.":
    return ": too large"
  changes = ", ".join(line.partition(":")[0] for line in lines[:-1])
  return f": fits with {changes}"

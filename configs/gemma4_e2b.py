"""NashMP on Gemma-4 E2B, text only, against an E4B judge.

Question: does a game against a larger model of its own family improve the smallest Gemma 4?
Command:  nash-jax train --config=gemma4_e2b --workdir=runs/gemma4_e2b
          (:lora for adapters of rank 16, :self for the policy's own start as judge, :smoke for tiny
          random models on a CPU). docs/gemma4.md says what has been checked, and where the weights
          and the tokenizer come from.
Cost:     :lora,self holds 9 GiB on one device and :lora 23; docs/gemma4.md has what fits. On a
          slice: nash-jax plan --config=gemma4_e2b:lora --topology=v6e-8.
Expected: nothing is published for these models, and nothing has been run here yet.

Everything is as in gemma2_2b.py, except the models and their form of a conversation. The embeddings
of each layer's own input are not trained; `:lora` is the way to start.
"""

from nash_jax.configs import gemma2_2b
from nash_jax.models import gemma

# As small as in gemma2_2b.py: the second half of the layers reads keys and values of the first.
_TINY = {
  "attention_types": (gemma.LOCAL, gemma.GLOBAL) * 2, "num_kv_shared_layers": 2,
  "global_key_size": 32, "per_layer_input_dim": 8, "sliding_window_size": 16,
}  # fmt: skip


def get_config(kind=""):
  c = gemma2_2b.experiment(
    "gemma4_e2b", "gemma-4-E2B-it", "gemma4_e4b", "gemma-4-E4B-it", kind, template="gemma4"
  )
  if "smoke" in kind.split(","):
    # The bundled tokenizer has the markers of Gemma 2 and 3.
    c.model.template, c.judge.template = "gemma", "gemma"
    for part in (c.model, c.judge.model):
      del part.changes.num_layers
      part.changes.update(_TINY)
      if part.preset == "gemma4_e2b":
        part.changes.override_kv_shared_ffw_hidden = 128
  return c

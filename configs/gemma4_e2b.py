"""NashMP on Gemma-4 E2B, text only, against an E4B judge.

Question: does a game against a larger model of its own family improve the smallest Gemma 4?
Command:  nash-jax train --config=gemma4_e2b --workdir=runs/gemma4_e2b
          (:lora for adapters of rank 16, :self for the policy's own start as judge, :smoke for tiny
          random models on a CPU). docs/gemma4.md says what has been checked, and where the weights
          and the tokenizer come from.
Cost:     COST
Expected: nothing is published for these models, and nothing has been run here yet.

Everything is as in gemma2_2b.py, except the models and their form of a conversation. The embeddings
of each layer's own input are not trained; `:lora` is the way to start.
"""

from nash_jax.configs import gemma2_2b

# As small as in gemma2_2b.py, with two patterns of layers: the second reads keys of the first.
_TINY = {"global_key_size": 32, "per_layer_input_dim": 8, "sliding_window_size": 16}
_SMALL = {
  "gemma4_e2b": {
    "num_layers": 10, "num_kv_shared_layers": 5, "override_kv_shared_ffw_hidden": 128
  },
  "gemma4_e4b": {"num_layers": 12, "num_kv_shared_layers": 6},
}  # fmt: skip


def get_config(kind=""):
  c = gemma2_2b.experiment(
    "gemma4_e2b", "gemma-4-E2B-it", "gemma4_e4b", "gemma-4-E4B-it", kind, template="gemma4"
  )
  if "smoke" in kind.split(","):
    # The bundled tokenizer has the markers of Gemma 2 and 3.
    c.model.template, c.judge.template = "gemma", "gemma"
    for part in (c.model, c.judge.model):
      part.changes.update({**_TINY, **_SMALL[part.preset]})
  return c

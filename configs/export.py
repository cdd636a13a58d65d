"""Exports a run as a folder for other programs: weights, tokenizer, chat template, model card.

Question: how does the policy do in transformers, or on a server?
Command:  nash-jax export --run=runs/x@target --to=FOLDER
          To write only the adapters of a LoRA run: --adapter
"""

from ml_collections import ConfigDict


def get_config():
  return ConfigDict({
    "job": "export",
    "run": "",  # a run, such as runs/x@target or runs/x@params:50, or a file that fit exported
    "to": "",  # the folder to write; replaces an earlier export
    "dtype": "float32",  # of the weights; or float16, bfloat16
    "adapter": False,  # of a LoRA run, write only the adapters, for PEFT
    "base_model": "",  # the base's name at Hugging Face; "" takes the name of its weights' folder
    "tokenizer": "",  # the new path of the run's tokenizer, if it has moved
    "arena": "",  # the workdir of an arena with this policy, for win rates on the card
  })  # fmt: skip

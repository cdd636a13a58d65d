"""A run as a folder that other programs load: weights, tokenizer, chat template, model card.

Question: what does transformers make of it, or a server?
Command:  nash-jax export --run=runs/x@target --to=FOLDER
          Of a LoRA run the adapters alone: --adapter
"""

from ml_collections import ConfigDict


def get_config():
  return ConfigDict({
    "job": "export",
    "run": "",  # a run's workdir, as in runs/x@target or runs/x@params:50; a file that fit exported
    "to": "",  # the folder to write; an earlier export is replaced
    "dtype": "float32",  # of the weights; or float16, bfloat16
    "adapter": False,  # of a LoRA run, write the adapters alone, as PEFT reads them
    "base_model": "",  # the base's name at Hugging Face; "": as the folder of its weights is called
    "tokenizer": "",  # where the run's tokenizer lies now, if it has moved
    "arena": "",  # the workdir of an arena that this policy was in: win rates for the card
  })  # fmt: skip

"""The transformers side of decode.py: `generate`, once for each line of standard input.

Runs in an environment with torch, transformers and safetensors, without nash_jax. Prints a JSON
line of versions when ready, then one with the seconds of each call.
"""

import argparse
import json
import os
import sys
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  add = parser.add_argument
  add("--weights", required=True)
  add("--batch", type=int, required=True)
  add("--prompt", type=int, required=True)
  add("--tokens", type=int, required=True)
  args = parser.parse_args()

  # Keep the libraries' output apart from the answers.
  answers, sys.stdout = sys.stdout, sys.stderr
  torch.manual_seed(1)
  model = transformers.AutoModelForCausalLM.from_pretrained(args.weights, dtype=torch.float32)
  ids = torch.randint(4, model.config.vocab_size, (args.batch, args.prompt))
  options = {
    "attention_mask": torch.ones_like(ids),
    "do_sample": True,
    "temperature": 1.0,
    "top_k": 0,  # from the whole distribution, like ours
    "top_p": 1.0,
    "min_new_tokens": args.tokens,  # no row ends early
    "max_new_tokens": args.tokens,
  }
  versions = {library.__name__: library.__version__ for library in (transformers, torch)}
  print(json.dumps(versions), file=answers, flush=True)
  for _ in sys.stdin:
    start = time.perf_counter()
    with torch.inference_mode():
      tokens = model.generate(ids, **options)
    assert tokens.shape == (args.batch, args.prompt + args.tokens)
    print(json.dumps(time.perf_counter() - start), file=answers, flush=True)


if __name__ == "__main__":
  main()

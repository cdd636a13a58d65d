"""The TRL side of nash_md.py: a trainer's own loop, one step for each line of standard input.

Runs in an environment with torch, transformers and trl 1.0.0, without nash_jax. Prints a JSON line
of versions when ready, then one with the seconds of each step. These include forward, backward,
optimiser and the trainer's own statistics, but not its logging or the fetching of a batch.
"""

import argparse
import json
import os
import sys
import tempfile
import time

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import tokenizers
import torch
import transformers
import trl
from datasets import Dataset
from trl.experimental.judges import BasePairwiseJudge
from trl.experimental.nash_md import NashMDConfig, NashMDTrainer
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer


class Constant(BasePairwiseJudge):
  """Gives a constant answer: Nash-MD asks for a probability, Online DPO for the better response."""

  def judge(self, prompts, completions, shuffle_order=True, return_scores=False):
    return [0.75 if return_scores else 0] * len(prompts)


class OnRequest(transformers.TrainerCallback):
  """Starts a step when a line is read, and writes its seconds."""

  def __init__(self, answers):
    self.answers = answers

  def on_step_begin(self, args, state, control, **kwargs):
    sys.stdin.readline()
    self.start = time.perf_counter()

  def on_step_end(self, args, state, control, **kwargs):
    print(json.dumps(time.perf_counter() - self.start), file=self.answers, flush=True)


def make_tokenizer(size):
  """Returns a tokenizer in which every piece is a word."""
  words = {name: i for i, name in enumerate(["<pad>", "<eos>", "<bos>", "<unk>"])}
  words |= {f"w{i}": i for i in range(4, size)}
  model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
  model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=model,
    pad_token="<pad>",
    eos_token="<eos>",
    bos_token="<bos>",
    unk_token="<unk>",
    padding_side="left",
  )


def make_model(size):
  """Returns the architecture of nash_jax's preset "stories", with random weights."""
  torch.manual_seed(0)
  config = transformers.Gemma2Config(
    vocab_size=size,
    hidden_size=128,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    query_pre_attn_scalar=32,
    sliding_window=128,
    pad_token_id=0,
    eos_token_id=1,
    bos_token_id=2,
    attn_implementation="eager",  # Gemma 2's soft-cap needs it
  )
  return transformers.Gemma2ForCausalLM(config)


def load(folder):
  """Returns the model of a folder in float32."""
  return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  add = parser.add_argument
  add("--batch", type=int, required=True)
  add("--prompt", type=int, required=True)
  add("--tokens", type=int, required=True)
  add("--vocabulary", type=int, required=True)
  add("--steps", type=int, required=True)
  add("--method", choices=("nash_md", "online_dpo"), required=True)
  add("--weights", required=True, help="a Hugging Face folder; empty for random weights")
  add("--precision", choices=("bfloat16", "float32"), default="bfloat16")
  args = parser.parse_args()

  # Keep the libraries' output apart from the answers.
  answers, sys.stdout = sys.stdout, sys.stderr
  torch.manual_seed(1)
  words = torch.randint(4, args.vocabulary, (args.batch * args.steps, args.prompt - 1)).tolist()
  with tempfile.TemporaryDirectory() as folder:
    # TRL's own rematerialisation makes Nash-MD sample without a cache. With a cache it would be
    # faster but wrong, because both models of the mixture write to the same one. Online DPO samples
    # with one.
    nash_md = args.method == "nash_md"
    options = {
      "output_dir": folder,
      "bf16": args.precision == "bfloat16",
      "gradient_checkpointing": nash_md,
      "per_device_train_batch_size": args.batch,
      "max_steps": args.steps,
      "max_new_tokens": args.tokens,
      "max_length": 2 * (args.prompt + args.tokens),
      "temperature": 1.0,
      "beta": 0.1,
      "learning_rate": 1e-4,
      "lr_scheduler_type": "constant",
      "generation_kwargs": {"suppress_tokens": [1, 106]},  # no row ends early
      "use_cpu": True,
      "report_to": [],
      "save_strategy": "no",
      "logging_strategy": "no",
      "disable_tqdm": True,
    }
    config = NashMDConfig(mixture_coef=0.25, **options) if nash_md else OnlineDPOConfig(**options)
    trainer = (NashMDTrainer if nash_md else OnlineDPOTrainer)(
      model=make_model(args.vocabulary) if not args.weights else load(args.weights),
      judge=Constant(),
      args=config,
      processing_class=make_tokenizer(args.vocabulary),
      train_dataset=Dataset.from_dict(
        {"prompt": [" ".join(f"w{i}" for i in row) for row in words]}
      ),
      callbacks=[OnRequest(answers)],
    )
    versions = {m.__name__: m.__version__ for m in (trl, transformers, torch)}
    print(json.dumps(versions), file=answers, flush=True)
    trainer.train()


if __name__ == "__main__":
  main()

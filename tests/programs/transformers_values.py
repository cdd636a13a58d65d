"""The transformers side of test_real_gemma.py.

Runs in an environment with torch, transformers, sentencepiece and protobuf, and needs nothing of
nash_jax:

  cd tests/programs
  python transformers_values.py FOLDER OUT.npz    # writes what transformers computes
  python transformers_values.py --reread FOLDER   # prints what an export of ours gives
  python transformers_values.py --adapters A BASE # what adapters of ours give, by PEFT

The first, with OUT tests/fixtures/real_gemma.npz and FOLDER that of a Gemma 3 270M, makes the
values that are stored (transformers 5.24.0, torch 2.13.0 on a CPU); a sum says of which weights.
"""

import argparse
import hashlib
import json
import os
import pathlib
import subprocess

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from real_gemma_texts import LONG, NEW_TOKENS, PROMPTS, SHORT, TEXTS, TURNS

# Of 8 new tokens the third is forced (see reread): what ends a text, and nothing else, ends one.
LENGTHS = {"<eos>": 3, "<end_of_turn>": 3, "a": 8}


def weights_sum(folder) -> str:
  """Returns the SHA-256 of a folder's weights, of all files in the order of their names."""
  content = hashlib.sha256()
  for path in sorted(pathlib.Path(folder).glob("*.safetensors")):
    with path.open("rb") as file:
      while block := file.read(1 << 24):
        content.update(block)
  return content.hexdigest()


def run(python, *args) -> str:
  """Returns what this program prints when another interpreter runs it."""
  command = [python, __file__, *map(str, args)]
  done = subprocess.run(command, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout + done.stderr
  return done.stdout


class Reader:
  """A folder's Gemma in transformers, and its tokenizer in sentencepiece."""

  def __init__(self, folder, tokenizer=None):
    import sentencepiece
    import torch
    import transformers

    self.torch, self.folder = torch, folder
    path = tokenizer or f"{folder}/tokenizer.model"
    self.pieces = sentencepiece.SentencePieceProcessor(model_file=path)
    self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    self.stops = [self.pieces.piece_to_id(piece) for piece in ("<eos>", "<end_of_turn>")]
    self.versions = f"transformers {transformers.__version__}, torch {torch.__version__}"

  def ids(self, text):
    """Returns <bos> and the text's ids."""
    return [self.pieces.piece_to_id("<bos>"), *self.pieces.encode(text)][:LONG]

  def logprobs(self, ids):
    """Returns the float32 log-probability of every id after the first."""
    torch, model = self.torch, self.model
    cap = getattr(model.config, "final_logit_softcapping", None)
    with torch.inference_mode():
      hidden = model.model(torch.tensor([ids])).last_hidden_state[0, :-1]
      found = []
      for at in range(0, len(hidden), 64):  # 2,000 rows of a whole vocabulary would be 2 GiB
        logits = model.lm_head(hidden[at : at + 64]).float()
        logits = logits if cap is None else torch.tanh(logits / cap) * cap
        labels = torch.tensor(ids[at + 1 :][: len(logits)])[:, None]
        found.append(torch.log_softmax(logits, dim=-1).gather(1, labels)[:, 0])
    return torch.cat(found).numpy()

  def generate(self, ids, **options):
    """Returns the greedy continuation and the logits that each of its ids was taken from."""
    tokens = self.torch.tensor([ids])
    with self.torch.inference_mode():
      out = self.model.generate(
        tokens,
        attention_mask=self.torch.ones_like(tokens),
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
      )
    return out.sequences[0, len(ids) :].tolist(), self.torch.cat(out.logits).float()


def values(folder) -> dict:
  """Returns what the tests compare with, by name: ids, log-probabilities, greedy continuations."""
  reader = Reader(folder)
  found = {"sum": weights_sum(folder), "versions": reader.versions}
  for name, text in TEXTS.items():
    ids = found[f"{name}/ids"] = reader.ids(text)
    found[f"{name}/logp"] = reader.logprobs(ids)
  options = {"max_new_tokens": NEW_TOKENS, "eos_token_id": reader.stops, "pad_token_id": 0}
  for i, prompt in enumerate(PROMPTS):
    tokens, logits = reader.generate(reader.ids(prompt), **options)
    first, second = logits.topk(2).values.T
    found[f"greedy{i}/tokens"], found[f"greedy{i}/margin"] = tokens, (first - second).numpy()
    found[f"greedy{i}/logp"] = logits.log_softmax(-1).max(-1).values.numpy()
  reader.model.to(reader.torch.bfloat16)
  for name in SHORT:
    found[f"{name}/bfloat16"] = reader.logprobs(found[f"{name}/ids"])
  return found


def reread(folder) -> dict:
  """Returns what a user of an exported folder gets, all of its files taken as they are."""
  import transformers

  reader = Reader(folder)
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  ids = reader.ids(TEXTS["english"])
  lengths = {}
  for piece in LENGTHS:
    forced = reader.pieces.piece_to_id(piece)

    def force(tokens, scores, forced=forced):
      """Makes `forced` the third new token."""
      if tokens.shape[1] == len(ids) + 2:
        scores = scores.clone()
        scores[:, forced] = scores.max() + 1
      return scores

    tokens, _ = reader.generate(ids, max_new_tokens=8, logits_processor=[force])
    lengths[piece] = len(tokens)
  return {
    "logp": reader.logprobs(ids).tolist(),
    "lengths": lengths,
    "english": tokenizer(TEXTS["english"])["input_ids"],
    "turns": tokenizer.apply_chat_template(TURNS, add_generation_prompt=True, return_dict=False),
  }


def adapted(base, folder) -> dict:
  """Returns log-probabilities of a text under adapters of ours, as PEFT applies them."""
  from peft import PeftModel

  reader = Reader(base)
  ids = reader.ids(TEXTS["english"])
  model = PeftModel.from_pretrained(reader.model, folder)
  unmerged = reader.logprobs(ids).tolist()
  reader.model = model.merge_and_unload()
  return {"unmerged": unmerged, "merged": reader.logprobs(ids).tolist()}


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("folder")
  parser.add_argument("out", nargs="?", help="the .npz file to write")
  parser.add_argument("--reread", action="store_true", help="print what an exported folder gives")
  parser.add_argument("--adapters", default="", help="a folder of PEFT's for FOLDER, its base")
  args = parser.parse_args()
  if args.adapters:
    print(json.dumps(adapted(args.folder, args.adapters)))
  elif args.reread:
    print(json.dumps(reread(args.folder)))
  else:
    import numpy as np

    np.savez_compressed(args.out, **values(args.folder))

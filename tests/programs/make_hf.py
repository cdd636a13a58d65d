"""Small random Gemma 2 and Gemma 3 models as Hugging Face's transformers writes and runs them.

Run in an environment of its own, with torch and transformers (made with torch 2.13.0 on a CPU and
transformers 5.23.0; the files are committed, so the tests need neither):

  python tests/programs/make_hf.py            # writes tests/fixtures/hf_gemma2 and hf_gemma3
  python tests/programs/make_hf.py --check D  # reads every folder under D again: an export of ours

Beside the weights lies logits.npz: token rows, and the model's logits for them. `--check` loads a
folder as anybody would, runs the rows, and prints the largest difference; over 1e-4 it fails.
"""

import argparse
import pathlib
import sys

import numpy as np
import torch
import transformers

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"
SHAPE = {
  "vocab_size": 64,
  "hidden_size": 32,
  "intermediate_size": 48,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "head_dim": 8,
  "query_pre_attn_scalar": 8,
  "sliding_window": 6,
}


def models():
  """Yields (folder, model, most bytes of a file). Each pattern leaves a layer over."""
  config = transformers.Gemma2Config(
    **SHAPE, num_hidden_layers=5, final_logit_softcapping=30.0, attn_logit_softcapping=5.0
  )
  yield "hf_gemma2", transformers.Gemma2ForCausalLM(config), "1GB"
  config = transformers.Gemma3TextConfig(
    **SHAPE,
    num_hidden_layers=7,
    layer_types=["sliding_attention"] * 5 + ["full_attention", "sliding_attention"],
    rope_parameters={
      "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
      "full_attention": {"rope_type": "linear", "rope_theta": 1_000_000.0, "factor": 8.0},
    },
  )
  yield "hf_gemma3", transformers.Gemma3ForCausalLM(config), "80KB"


def make() -> None:
  """Writes the fixtures; the same files on every run."""
  generator = torch.Generator().manual_seed(0)
  for folder, model, size in models():
    with torch.no_grad():
      for name, x in model.named_parameters():
        # Wide enough that soft-caps, norms, rope and windows all show in the logits.
        scale = 0.3 if name.endswith("norm.weight") else 2 * x.shape[-1] ** -0.5
        x.copy_(torch.randn(x.shape, generator=generator) * scale)
    where = FIXTURES / folder
    model.save_pretrained(where, max_shard_size=size)
    (where / "generation_config.json").unlink(missing_ok=True)
    tokens = torch.randint(0, SHAPE["vocab_size"], (3, 20), generator=generator)
    np.savez_compressed(where / "logits.npz", tokens=tokens.numpy(), logits=run(model, tokens))
    print(where, sum(file.stat().st_size for file in where.iterdir()), "bytes")


def run(model, tokens) -> np.ndarray:
  """Returns float32 logits, attention in plain arithmetic."""
  model.set_attn_implementation("eager")
  with torch.no_grad():
    return model.eval()(tokens).logits.float().numpy()


def check(folder: str) -> None:
  """Re-reads every exported folder under `folder`; exits with 1 where one differs."""
  bad = False
  for file in sorted(pathlib.Path(folder).rglob("logits.npz")):
    wanted = np.load(file)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
      file.parent, dtype=torch.float32, output_loading_info=True
    )
    strange = {name: found for name, found in info.items() if found}
    gap = np.abs(run(model, torch.tensor(wanted["tokens"])) - wanted["logits"]).max()
    print(f"{file.parent.name}: {type(model).__name__}, largest difference {gap:.1e}, {strange}")
    bad |= bool(strange) or not gap < 1e-4
  sys.exit(bad)


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--check", metavar="FOLDER", help="re-read the exports under FOLDER")
  arguments = parser.parse_args()
  check(arguments.check) if arguments.check else make()

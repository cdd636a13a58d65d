"""Small random models of Gemma 2, 3 and 4 as Hugging Face's transformers writes and runs them.

Run in an environment of its own, with torch and transformers (made with torch 2.13.0 on a CPU and
transformers 5.23.0, Gemma 4 with 5.24.0; the files are committed, so the tests need neither):

  python tests/programs/make_hf.py            # writes the folders tests/fixtures/hf_gemma*
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
  # Keys of global layers are their values, of one head; one layer is left over.
  shape = {**SHAPE, "global_head_dim": 16, "final_logit_softcapping": 30.0}
  del shape["query_pre_attn_scalar"]
  local, full = "sliding_attention", "full_attention"
  config = transformers.Gemma4TextConfig(
    **shape,
    num_hidden_layers=5,
    layer_types=[full, local, full, local, full],
    attention_k_eq_v=True,
    num_global_key_value_heads=1,
    hidden_size_per_layer_input=0,
  )
  yield "hf_gemma4", transformers.Gemma4ForCausalLM(config), "1GB"
  # Half of the layers read another's keys and values, and have wider MLPs.
  config = transformers.Gemma4TextConfig(
    **{**shape, "num_key_value_heads": 1},
    num_hidden_layers=12,
    layer_types=[local, local, full] * 4,
    num_kv_shared_layers=6,
    use_double_wide_mlp=True,
    hidden_size_per_layer_input=6,
    vocab_size_per_layer_input=SHAPE["vocab_size"],
  )
  yield "hf_gemma4_e2b", transformers.Gemma4ForCausalLM(config), "300KB"
  config = transformers.Gemma4TextConfig(
    **shape,
    num_hidden_layers=8,
    layer_types=[local, full] * 4,
    num_kv_shared_layers=4,
    hidden_size_per_layer_input=6,
    vocab_size_per_layer_input=SHAPE["vocab_size"],
  )
  yield "hf_gemma4_e4b", transformers.Gemma4ForCausalLM(config), "1GB"


def make() -> None:
  """Writes the fixtures; the same files on every run."""
  generator = torch.Generator().manual_seed(0)
  for folder, model, size in models():
    with torch.no_grad():
      scalars = [(n, x) for n, x in model.named_buffers() if n.endswith("layer_scalar")]
      multiplies = folder.startswith("hf_gemma4")  # by its norms' weights; the others by 1 + weight
      for name, x in [*model.named_parameters(), *scalars]:
        # Wide enough that soft-caps, norms, rope and windows all show in the logits, but not so
        # wide that a rounding error does.
        flat = name.endswith(("norm.weight", "layer_scalar"))
        wide = 1 if multiplies and "embed_tokens" not in name else 2
        scale = 0.3 if flat else wide * x.shape[-1] ** -0.5
        centre = (
          (0.5 if "self_attn" in name or "post_" in name else 1) if flat and multiplies else 0
        )
        x.copy_(torch.randn(x.shape, generator=generator) * scale + centre)
    where = FIXTURES / folder
    model.save_pretrained(where, max_shard_size=size)
    (where / "generation_config.json").unlink(missing_ok=True)
    tokens = torch.randint(0, SHAPE["vocab_size"], (3, 20), generator=generator)
    logits = run(model, tokens)
    np.testing.assert_allclose(run_cached(model, tokens), logits, atol=1e-4)
    np.savez_compressed(where / "logits.npz", tokens=tokens.numpy(), logits=logits)
    print(where, sum(file.stat().st_size for file in where.iterdir()), "bytes")


def run(model, tokens) -> np.ndarray:
  """Returns float32 logits, attention in plain arithmetic."""
  model.set_attn_implementation("eager")
  with torch.no_grad():
    return model.eval()(tokens).logits.float().numpy()


def run_cached(model, tokens) -> np.ndarray:
  """Returns the same, token by token with a cache."""
  cache, out = None, []
  with torch.no_grad():
    for t in range(tokens.shape[1]):
      found = model.eval()(tokens[:, t : t + 1], cache=cache, use_cache=True)
      cache = found.cache
      out.append(found.logits.float().numpy())
  return np.concatenate(out, axis=1)


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

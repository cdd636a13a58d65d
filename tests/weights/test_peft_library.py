"""PEFT itself reads what we write, and we what it writes."""

import json
import os
import subprocess

import exported_runs
import fits
import jax
import numpy as np
import pytest
from other_python import python_with
from peft_folders import ALPHA, RANK, drawn, write
from weight_files import MODELS, random
from weight_files import logits as hf_logits

from nash_jax import fit, weights
from nash_jax.judges import bradley_terry
from nash_jax.models import lora
from nash_jax.types import Answers, Prompts
from nash_jax.weights import adapters


def run_peft(program, *arguments):
  """Runs a program in an environment that has PEFT; returns what it prints."""
  python = python_with("torch, transformers and peft")
  done = subprocess.run(
    [python, "-c", program, *map(str, arguments)],
    capture_output=True,
    text=True,
    env={**os.environ, "HF_HUB_OFFLINE": "1"},
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


PEFT = """
import sys, json, torch, numpy as np
from peft import PeftModel, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
base, folder, theirs = sys.argv[1:4]
tokens = torch.tensor(np.load(base + "/tokens.npy"))
def logits(model):
  with torch.inference_mode():
    return model.eval()(tokens).logits.float().numpy()
load = lambda: AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
plain = load()
found = {"base": logits(plain)}
model = PeftModel.from_pretrained(plain, folder)
found["unmerged"] = logits(model)
found["merged"] = logits(model.merge_and_unload())
# One of PEFT's own making: other A's, some modules, another scale.
torch.manual_seed(0)
kind = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=10, use_rslora=True,
                  target_modules=["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"],
                  rank_pattern={"up_proj": 2}, alpha_pattern={"q_proj": 5})
model = get_peft_model(load(), kind)
for name, x in model.named_parameters():
  if "lora_" in name:
    torch.nn.init.normal_(x, std=0.3)
found["theirs"] = logits(model)
model.save_pretrained(theirs)
np.savez(theirs + "/logits.npz", **found)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_pefts_logits_are_ours(name, tmp_path):
  """Unmerged and merged of what we write; and ours of what PEFT writes."""
  model, base = MODELS[name], random(MODELS[name], 1, 0.3)
  weights.export(str(tmp_path / "base"), base, model, "float32")
  tokens = np.random.default_rng(0).integers(4, 64, (2, 20))
  np.save(tmp_path / "base" / "tokens.npy", tokens)
  ours = jax.tree.map(lambda x: x * np.float32(0.3), drawn(name))
  (tmp_path / "ours").mkdir()
  write(tmp_path / "ours", name, tree=ours)
  run_peft(PEFT, tmp_path / "base", tmp_path / "ours", tmp_path / "theirs")
  got = dict(np.load(tmp_path / "theirs" / "logits.npz"))
  run = jax.jit(hf_logits, static_argnums=1)
  theirs = adapters.read(str(tmp_path / "theirs"), model, scale=1.5)
  expected = {
    "base": run(base, model, tokens),
    "unmerged": run(lora.join(base, ours, ALPHA / RANK), model, tokens),
    "merged": run(lora.merge(lora.join(base, ours, ALPHA / RANK)), model, tokens),
    "theirs": run(lora.join(base, theirs, 1.5), model, tokens),
  }
  for what, x in expected.items():
    print(f"{name}, {what}: largest difference {np.abs(got[what] - x).max():.1e}")
    np.testing.assert_allclose(got[what], x, rtol=0, atol=1e-4)
    assert what == "base" or np.abs(x - expected["base"]).max() > 0.5


MULTIMODAL = """
import sys, warnings, torch, numpy as np
from peft import PeftModel
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration
base, folder = sys.argv[1:3]
text = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
              image_size=28, patch_size=14)
config = Gemma3Config(text_config=text.config.to_dict(), vision_config=vision,
                      mm_tokens_per_image=4)
model = Gemma3ForConditionalGeneration(config)
model.model.language_model.load_state_dict(text.model.state_dict())
model.tie_weights()
with warnings.catch_warnings(record=True) as told:
  warnings.simplefilter("always")
  model = PeftModel.from_pretrained(model, folder).eval()
assert not [x for x in told if "adapter" in str(x.message)], told  # of keys that it misses
adapted = [name for name, _ in model.named_parameters() if "lora_" in name]
assert len(adapted) == 14 * 7 and not [name for name in adapted if "vision" in name], adapted
with torch.inference_mode():
  np.save(folder + "/logits.npy", model(torch.tensor(np.load(base + "/tokens.npy"))).logits.numpy())
"""


@pytest.mark.slow
def test_peft_adapts_the_text_model_of_a_multimodal_one_as_ours(tmp_path):
  model, base = MODELS["hf_gemma3"], random(MODELS["hf_gemma3"], 1, 0.3)
  weights.export(str(tmp_path / "base"), base, model, "float32")
  tokens = np.random.default_rng(0).integers(4, 64, (2, 20))
  np.save(tmp_path / "base" / "tokens.npy", tokens)
  ours = jax.tree.map(lambda x: x * np.float32(0.3), drawn("hf_gemma3"))
  (tmp_path / "ours").mkdir()
  write(tmp_path / "ours", "hf_gemma3", multimodal=True, tree=ours)
  run_peft(MULTIMODAL, tmp_path / "base", tmp_path / "ours")
  expected = hf_logits(lora.join(base, ours, ALPHA / RANK), model, tokens)
  np.testing.assert_allclose(np.load(tmp_path / "ours" / "logits.npy"), expected, atol=1e-4)


REWARD = """
import sys, json, torch, numpy as np
from peft import PeftModel
from transformers import AutoModelForSequenceClassification
base, folder = sys.argv[1:3]
model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
model = PeftModel.from_pretrained(model, folder).eval()
with torch.inference_mode():
  scores = [model(torch.tensor([row])).logits[0, 0].item() for row in json.loads(sys.argv[3])]
print(json.dumps(scores))
"""


@pytest.mark.slow
def test_a_reward_models_adapters_and_head_score_as_here(tmp_path):
  model, c = exported_runs.MODEL, fits.settings(tmp_path, "reward")
  base = random(model, 0, 0.3)
  weights.save(str(tmp_path / "base.safetensors"), base, model, "float32", {})
  c.model.weights, c.model.lora.rank = str(tmp_path / "base.safetensors"), RANK
  fit.run(c, tmp_path / "run", progress=False)
  exported_runs.write(str(tmp_path / "run"), str(tmp_path / "adapters"), adapter=True)
  weights.export(str(tmp_path / "base"), base, model, "float32")
  scale = c.model.lora.alpha / RANK
  read = adapters.read(str(tmp_path / "adapters"), model, RANK, scale)
  assert np.any(read["head"]["w"] != 0)
  tokens = np.random.default_rng(0).integers(5, 1000, (4, 12)).astype(np.int32)
  full = np.ones((4, 6), bool)
  prompts = Prompts(tokens[:, :6], full, np.arange(4, dtype=np.int32))
  answers = Answers(tokens[:, 6:], full)
  ours = bradley_terry.rewards(lora.join(base, read, scale), model, prompts, answers)
  rows = json.dumps(tokens.tolist())
  said = run_peft(REWARD, tmp_path / "base", tmp_path / "adapters", rows)
  got = json.loads(said.splitlines()[-1])
  print(f"rewards {got}, largest difference {np.abs(np.subtract(got, ours)).max():.1e}")
  assert np.ptp(got) > 0.01
  np.testing.assert_allclose(got, ours, rtol=0, atol=1e-4)
  with pytest.raises(
    ValueError, match="run: expected a language model, got 'a judge, fitted with loss = reward'"
  ):
    exported_runs.write(str(tmp_path / "run"), str(tmp_path / "whole"))

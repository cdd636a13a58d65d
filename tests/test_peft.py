"""PEFT's folders of adapters: written, read, started from, and what is more than LoRA."""

import functools
import json
import math
import os
import pathlib
import re
import subprocess

import jax
import numpy as np
import pytest
import test_export
import test_fit
import tiny
from flax import traverse_util
from safetensors.numpy import load_file, save_file
from test_lora import normal
from test_weights_hugging_face import logits as hf_logits
from weight_files import MODELS, random, same

from nash_jax import fit, policy, train, weights
from nash_jax.config import resolve
from nash_jax.judges import bradley_terry
from nash_jax.models import gemma, lora
from nash_jax.run import checkpoint
from nash_jax.types import Answers, Prompts
from nash_jax.weights import adapters, names, safetensors

ATTENTION = [f"self_attn.{x}_proj" for x in "qkvo"]
MODULES = [*ATTENTION, *(f"mlp.{x}_proj" for x in ("gate", "up", "down"))]
UNGROUPED = gemma.preset("tiny", num_kv_heads=2)  # queries, keys and values are one weight
ARCHITECTURES = {**MODELS, "ungrouped": UNGROUPED}
RANK, ALPHA = 3, 6.0
shapes_of = functools.cache(gemma.shapes)


@functools.cache
def drawn(name, seed=0):
  """Returns adapters of numbers without meaning, none of them 0."""
  shapes = shapes_of(ARCHITECTURES[name])
  made = jax.eval_shape(functools.partial(lora.init, rank=RANK), jax.random.key(0), shapes)
  return jax.device_get(normal(made, seed))


def write(folder, name, multimodal=False, tree=None):
  adapters.write(
    folder, tree or drawn(name), ARCHITECTURES[name], ALPHA, "google/gemma", multimodal
  )
  return str(folder)


def change(folder, tensors=None, **config):
  """Rewrites parts of a folder: tensors by a function of them all, fields of its config."""
  file = folder / adapters.WEIGHTS
  if tensors:
    save_file(tensors(load_file(file)), file, metadata={"format": "pt"})
  saved = json.loads((folder / adapters.CONFIG).read_text())
  (folder / adapters.CONFIG).write_text(json.dumps({**saved, **config}))


def updates(tensors, config):
  """Returns what PEFT adds to each matrix, by its own rule: scale·B·A."""
  found = {}
  for name in (x for x in tensors if ".lora_A." in x):
    a, b = tensors[name], tensors[name.replace("lora_A", "lora_B")]
    scale = config["lora_alpha"] / (math.sqrt(len(a)) if config.get("use_rslora") else len(a))
    module = name.removeprefix("base_model.model.").split(".lora_A")[0]
    found[f"{module}.weight"] = scale * b @ a
  return found


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_is_written_is_read_again_to_the_last_bit(name, tmp_path):
  write(tmp_path, name)
  same(adapters.read(str(tmp_path), ARCHITECTURES[name], RANK, ALPHA / RANK), drawn(name))
  assert adapters.base_of(str(tmp_path)) == "google/gemma"


@pytest.mark.parametrize("name", MODELS)
def test_names_and_shapes_are_those_of_peft(name, tmp_path):
  """Layers beyond the last period of the pattern among them."""
  model, got = MODELS[name], load_file(pathlib.Path(write(tmp_path, name)) / adapters.WEIGHTS)
  heads, kv_heads, width = 4 * 8, 2 * 8, 32
  sizes = {
    "q": (width, heads), "k": (width, kv_heads), "v": (width, kv_heads), "o": (heads, width),
    "gate": (width, 48), "up": (width, 48), "down": (48, width),
  }  # fmt: skip
  expected = {}
  for layer in range(model.num_layers):
    for module in MODULES:
      inputs, outputs = sizes[module.split(".")[1].removesuffix("_proj")]
      name = f"base_model.model.model.layers.{layer}.{module}"
      expected[f"{name}.lora_A.weight"] = (RANK, inputs)
      expected[f"{name}.lora_B.weight"] = (outputs, RANK)
  assert {name: x.shape for name, x in got.items()} == expected
  assert {str(x.dtype) for x in got.values()} == {"float32"}
  config = json.loads((tmp_path / adapters.CONFIG).read_text())
  assert config["target_modules"] == sorted(module.split(".")[1] for module in MODULES)
  assert (config["r"], config["lora_alpha"], config["task_type"]) == (RANK, 6, "CAUSAL_LM")
  assert config["modules_to_save"] is None


@pytest.mark.parametrize("name", ["hf_gemma3", pytest.param("hf_gemma2", marks=pytest.mark.slow)])
def test_base_and_update_are_what_merging_gives(name, tmp_path):
  """In Hugging Face's matrices: PEFT's own rule on what is written, against our merge, exported."""
  model, base = MODELS[name], random(MODELS[name], 1)
  merged = lora.merge(lora.join(base, drawn(name), ALPHA / RANK))
  files = {}
  for part, params in (("base", base), ("merged", merged)):
    weights.export(str(tmp_path / part), params, model, "float32")
    files[part] = load_file(tmp_path / part / "model.safetensors")
  write(tmp_path, name)
  config = json.loads((tmp_path / adapters.CONFIG).read_text())
  added = updates(load_file(tmp_path / adapters.WEIGHTS), config)
  assert len(added) == 7 * model.num_layers
  for tensor, x in files["merged"].items():
    expected = files["base"][tensor] + added.get(tensor, 0.0)
    np.testing.assert_allclose(x, expected, rtol=0, atol=2e-5)


def test_of_a_multimodal_base_only_the_text_model_is_adapted(tmp_path):
  write(tmp_path, "hf_gemma3", multimodal=True)
  pattern = json.loads((tmp_path / adapters.CONFIG).read_text())["target_modules"]
  found = [name for name in load_file(tmp_path / adapters.WEIGHTS) if "lora_A" in name]
  assert all(".model.language_model.layers." in name for name in found)
  for name in found:
    assert re.fullmatch(pattern, name.removeprefix("base_model.model.").split(".lora_A")[0])
  assert not re.fullmatch(pattern, "model.vision_tower.encoder.layers.0.self_attn.q_proj")
  got = adapters.read(str(tmp_path), MODELS["hf_gemma3"], RANK, ALPHA / RANK)
  same(got, drawn("hf_gemma3"))


def test_a_head_comes_along(tmp_path):
  head = np.arange(32, dtype=np.float32)
  write(tmp_path, "hf_gemma2", tree={**drawn("hf_gemma2"), "head": {"w": head}})
  assert load_file(tmp_path / adapters.WEIGHTS)["base_model.model.score.weight"].shape == (1, 32)
  config = json.loads((tmp_path / adapters.CONFIG).read_text())
  assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["classifier", "score"])
  got = adapters.read(str(tmp_path), MODELS["hf_gemma2"], RANK, ALPHA / RANK)
  np.testing.assert_array_equal(got["head"]["w"], head)


def redrawn(tensors):
  """Returns A's that differ everywhere, as PEFT trains them."""
  rng = np.random.default_rng(7)
  return {name: rng.normal(size=x.shape).astype(np.float32) for name, x in tensors.items()}


def only_some(tensors):
  """Returns what PEFT adapts of a Llama by default."""
  return {name: x for name, x in redrawn(tensors).items() if "q_proj" in name or "v_proj" in name}


def of_two_ranks(tensors):
  tensors = redrawn(tensors)
  for name in tensors:
    if "k_proj" in name or "layers.1.mlp.up" in name:
      tensors[name] = tensors[name][:1] if "lora_A" in name else tensors[name][:, :1].copy()
  return tensors


@pytest.mark.parametrize(
  ("tensors", "config", "rank"),
  [
    (redrawn, {}, 6),
    (only_some, {}, 3),
    (of_two_ranks, {"rank_pattern": {"k_proj": 1}}, 6),
    (None, {"use_rslora": True}, 3),
    (redrawn, {"lora_alpha": 5}, 6),
  ],
)
def test_what_others_trained_changes_each_matrix_as_there(tensors, config, rank, tmp_path):
  model = MODELS["hf_gemma3"]
  write(tmp_path, "hf_gemma3")
  change(tmp_path, tensors, **config)
  got = traverse_util.flatten_dict(adapters.read(str(tmp_path), model, scale=0.5), sep="/")
  assert {x.shape[-1] for path, x in got.items() if path.endswith("/a")} == {rank}
  merged = traverse_util.flatten_dict(shapes_of(model), sep="/")
  for path, x in merged.items():
    merged[path] = np.zeros(x.shape, np.float32)
    name = path.split("/", 2)[-1]
    if name in lora.FACTORS:
      a, b, axes = (f"...{letters}" for letters in lora.FACTORS[name])
      merged[path] = 0.5 * np.einsum(f"{a},{b}->{axes}", got[f"{path}/a"], got[f"{path}/b"])
  params = traverse_util.unflatten_dict(merged, sep="/")
  config = json.loads((tmp_path / adapters.CONFIG).read_text())
  expected = updates(load_file(tmp_path / adapters.WEIGHTS), config)
  matrices = dict(safetensors.tensors(params, model, names.hugging_face, "float32", 64))
  assert len(expected) == sum(np.any(x != 0) for x in matrices.values()) > 0
  for tensor, x in matrices.items():
    added = expected.get(f"model.{tensor}", np.zeros(x.shape))
    np.testing.assert_allclose(x, added, rtol=0, atol=2e-5)


def test_a_modules_own_alpha_counts(tmp_path):
  write(tmp_path, "hf_gemma2")
  change(tmp_path, alpha_pattern={r"layers\.1\.self_attn\.q_proj": 12.0, "down_proj": 3})
  got = adapters.read(str(tmp_path), MODELS["hf_gemma2"], RANK, ALPHA / RANK)
  for path, x in jax.tree.leaves_with_path(got):
    expected = functools.reduce(lambda tree, key: tree[key.key], path, drawn("hf_gemma2"))
    factors = np.ones(len(x) if "layers" in str(path) else 1)
    if path[-1].key == "b":
      factors[1:2] = 2 if "q_einsum" in str(path) else 1
      factors *= 0.5 if "linear" in str(path) else 1
    factors = factors.reshape(-1, *[1] * (x.ndim - 1)) if len(factors) > 1 else factors[0]
    np.testing.assert_array_equal(x, expected * factors)


@pytest.mark.parametrize(
  ("config", "message"),
  [
    ({"use_dora": True}, "use_dora: expected false or null, got True. Merge them with PEFT"),
    ({"bias": "all"}, "bias: expected \"none\" or null, got 'all'"),
    ({"lora_bias": True}, "lora_bias: expected"),
    ({"fan_in_fan_out": True}, "fan_in_fan_out: expected"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights: expected true"),
    ({"peft_type": "IA3"}, "peft_type: expected LORA, got 'IA3'"),
    ({"modules_to_save": ["embed_tokens"]}, "modules_to_save: expected none, or score"),
    ({"r": 0}, "r: expected a number above 0, got 0"),
    ({"lora_alpha": "x"}, "lora_alpha: expected a number above 0"),
    ({"alpha_pattern": [1]}, "alpha_pattern: expected numbers by module"),
  ],
)
def test_more_than_lora_is_refused(config, message, tmp_path):
  write(tmp_path, "hf_gemma2")
  change(tmp_path, **config)
  with pytest.raises(ValueError, match=f"adapter_config.json: {message}") as raised:
    adapters.read(str(tmp_path), MODELS["hf_gemma2"])
  assert "\n" not in str(raised.value)


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def renamed(new):
  return lambda x: {**{n: t for n, t in x.items() if n != FIRST}, new: x[FIRST]}


@pytest.mark.parametrize(
  ("tensors", "message"),
  [
    (
      renamed("base_model.model.model.embed_tokens.lora_embedding_A"),
      "projections of 5 layers, got 'base",
    ),
    (renamed("base_model.model.lm_head.lora_A.weight"), "expected adapters of the projections"),
    (
      renamed(FIRST.replace(".0.", ".5.")),
      r"of 5 layers, got 'base_model.model.model.layers.5.self",
    ),
    (renamed(FIRST.replace("_A.weight", "_magnitude_vector")), "expected adapters of the"),
    (
      lambda x: {n: t for n, t in x.items() if n != FIRST},
      "layer 0, self_attn.q_proj: expected A and B",
    ),
    (
      lambda x: {**x, FIRST: x[FIRST][:1]},
      "layer 0, self_attn.q_proj: expected A and B of one rank",
    ),
    (
      lambda x: {**x, FIRST: x[FIRST][:, 1:].copy()},
      r"q_proj.lora_A.weight: expected 'shape \[r, 32\]|shape \[r, 32\]",
    ),
    (lambda x: {**x, FIRST: x[FIRST] * np.nan}, "expected finite numbers, got 'NaN or infinity'"),
    (lambda x: {**x, FIRST: x[FIRST].astype(np.int8)}, "expected F32, BF16 or F16, got I8"),
    (lambda x: {}, "expected adapters, got 'none'"),
  ],
)
def test_tensors_of_another_model_or_none_are_named(tensors, message, tmp_path):
  write(tmp_path, "hf_gemma2")
  change(tmp_path, tensors)
  with pytest.raises(ValueError, match=message):
    adapters.read(str(tmp_path), MODELS["hf_gemma2"])


def test_a_rank_that_is_too_small_is_said_with_the_one_that_is_not(tmp_path):
  write(tmp_path, "hf_gemma2")
  change(tmp_path, redrawn)
  with pytest.raises(ValueError, match=r"a rank of at most 5, got 6. Set model.lora.rank=6"):
    adapters.read(str(tmp_path), MODELS["hf_gemma2"], rank=5)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
  """A LoRA run that was drawn, and its target's adapters: (workdir, PEFT's folder, its state)."""
  folder = tmp_path_factory.mktemp("run")
  state = test_export.make_run(folder, {"model.lora.rank": RANK, "model.lora.alpha": ALPHA})
  test_export.write(f"{folder / 'run'}@target", str(folder / "adapters"), adapter=True)
  return folder / "run", folder / "adapters", state


def test_a_runs_adapters_are_exported_with_a_card(exported):
  workdir, folder, state = exported
  found = {path.name for path in folder.iterdir()}
  assert found == {"README.md", "adapter_config.json", "adapter_model.safetensors", "nash_jax.json"}
  same(adapters.read(str(folder), test_export.MODEL, RANK, ALPHA / RANK), state["target"])
  card = (folder / "README.md").read_text()
  assert 'library_name: "peft"' in card
  assert 'base_model_relation: "adapter"' in card
  assert f"--run={workdir}@target --to={folder} --adapter\n" in card
  base = json.loads((workdir / "config.json").read_text())["model"]["weights"]
  assert adapters.base_of(str(folder)) == base
  assert f"PEFT needs the base as a folder of Hugging Face's, which {base} is not" in card


def test_what_adapters_do_not_have_is_refused(exported, tmp_path):
  for field, value in (("dtype", "bfloat16"), ("tokenizer", "x.model")):
    with pytest.raises(ValueError, match=f"{field}: expected no value with --adapter, got"):
      test_export.write(str(exported[0]), str(tmp_path / "x"), adapter=True, **{field: value})


def test_a_run_of_the_whole_model_has_no_adapters(tmp_path):
  test_export.make_run(tmp_path)
  with pytest.raises(ValueError, match=r"run: expected one of model.lora.rank > 0, got"):
    test_export.write(str(tmp_path / "run"), str(tmp_path / "out"), adapter=True)


def test_a_folder_of_adapters_is_a_policy_wherever_weights_are_named(exported, tmp_path):
  workdir, folder, _ = exported
  got = policy.load_weights(str(folder), test_export.MODEL)
  expected = policy.load_weights(f"{workdir}@target", test_export.MODEL)
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), got, expected)
  write_to = tmp_path / "adapters"
  write_to.mkdir()
  write(write_to, "hf_gemma2")
  with pytest.raises(ValueError, match=r"base_model_name_or_path: expected a path that exists"):
    policy.load_weights(str(write_to), MODELS["hf_gemma2"])


def test_a_run_starts_from_the_adapters_that_it_is_given(exported, assembled, monkeypatch):
  workdir, folder, state = exported
  prompts = assembled.train_prompts, assembled.held_out
  monkeypatch.setattr(train, "load_prompts", lambda *_: prompts)
  base = json.loads((workdir / "config.json").read_text())["model"]["weights"]
  lora_fields = {"rank": RANK, "alpha": ALPHA, "init": str(folder)}
  changes = {f"model.lora.{name}": value for name, value in lora_fields.items()}
  setup = train.set_up(resolve(tiny.train({"model.weights": base, **changes})))
  start = setup.initial_state()
  same(start.params, state["target"])
  same(start.target, state["target"])
  assert "lora" not in setup.reference["layers"]["0"], "the reference is the base"


def test_a_policy_does_not_start_from_a_reward_model(tmp_path):
  write(tmp_path, "hf_gemma2", tree={**drawn("hf_gemma2"), "head": {"w": np.ones(32, np.float32)}})
  c = tiny.train({"model.lora.rank": RANK, "model.lora.init": str(tmp_path)})
  with pytest.raises(ValueError, match=r"model.lora.init: expected adapters of a language model"):
    policy.read_start(c.model, MODELS["hf_gemma2"])
  start = policy.read_start(c.model, MODELS["hf_gemma2"], head=True)
  assert "head" in start(random(MODELS["hf_gemma2"]))


def test_columns_that_others_lack_are_drawn_so_that_they_learn(tmp_path):
  """And change nothing yet."""
  model, base = MODELS["hf_gemma2"], random(MODELS["hf_gemma2"], 1)
  write(tmp_path, "hf_gemma2")
  change(tmp_path, only_some)
  read = adapters.read(str(tmp_path), model, RANK + 1, ALPHA / RANK)
  made = lora.init(jax.random.key(0), lora.join(base, read, 1.0), RANK + 1)
  fresh = lora.init(jax.random.key(0), base, RANK + 1)
  assert jax.tree.map(np.shape, made) == jax.tree.map(np.shape, fresh)
  for path, x in jax.tree.leaves_with_path(made):
    given, new = (
      np.asarray(functools.reduce(lambda tree, key: tree[key.key], path, tree))
      for tree in (read, fresh)
    )
    kept = RANK if "q_einsum" in str(path) or "kv_einsum" in str(path) else 0
    if path[-1].key == "b":
      np.testing.assert_array_equal(x, given)
      continue
    np.testing.assert_array_equal(x[..., :kept], given[..., :kept])
    np.testing.assert_array_equal(x[..., kept:], new[..., kept:])
    assert np.all(np.any(np.asarray(x) != 0, axis=-2))


def test_what_a_run_cannot_start_from_is_said_before_weights_load(exported, tmp_path, monkeypatch):
  monkeypatch.setattr(train, "load_weights", lambda *args, **options: pytest.fail("loaded"))
  _, folder, _ = exported
  for changes, message in (
    ({"model.lora.init": str(folder)}, "model.lora.init: expected none where lora.rank = 0"),
    ({"model.lora.rank": 2, "model.lora.init": str(folder)}, "a rank of at most 2, got 3"),
    ({"model.lora.rank": 2, "model.lora.init": "none"}, "model.lora.init: expected a file that"),
    ({"model.lora.rank": 2, "model.lora.init": str(tmp_path)}, "expected PEFT's config of LoRA"),
  ):
    with pytest.raises(ValueError, match=message):
      train.run(tiny.train(changes), tmp_path / "run", progress=False)


def test_runs_from_before_there_were_starts_are_the_same_runs():
  saved = {"job": "compare", "base": {"model": {"x": 1}}, "model": {"lora": {"rank": 2}}}
  new = {
    "job": "compare",
    "base": {"model": {"x": 1, "lora": {"init": ""}}},
    "model": {"lora": {"rank": 2, "init": ""}},
  }
  assert checkpoint.differences(saved, new) == {}
  new["model"]["lora"]["init"] = "other"
  assert list(checkpoint.differences(saved, new)) == ["model.lora.init"]


def run_peft(program, *arguments):
  """Runs a program in an environment that has PEFT; returns what it prints."""
  python = os.environ.get("NASH_JAX_TEST_TRANSFORMERS")
  if not python:
    pytest.skip("set NASH_JAX_TEST_TRANSFORMERS to a Python with torch, transformers and peft")
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
  model, c = test_export.MODEL, test_fit.settings(tmp_path, "reward")
  base = random(model, 0, 0.3)
  weights.save(str(tmp_path / "base.safetensors"), base, model, "float32", {})
  c.model.weights, c.model.lora.rank = str(tmp_path / "base.safetensors"), RANK
  fit.run(c, tmp_path / "run", progress=False)
  test_export.write(str(tmp_path / "run"), str(tmp_path / "adapters"), adapter=True)
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
  with pytest.raises(ValueError, match="run: expected a language model, got 'a reward model'"):
    test_export.write(str(tmp_path / "run"), str(tmp_path / "whole"))

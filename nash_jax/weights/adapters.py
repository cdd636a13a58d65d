"""Reads and writes PEFT's adapter folders: adapter_model.safetensors and adapter_config.json.

PEFT's A [r, inputs] and B [outputs, r] belong to one matrix. Ours belong to one einsum, so keys and
values share A, and so do gate and up. Writing repeats a shared A. Reading shares equal A; if they
differ, it stacks their columns, and each B is 0 in the columns of the other A.
"""

import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from nash_jax.models import gemma, lora
from nash_jax.types import Params
from nash_jax.validation import printable, require
from nash_jax.weights import files, names, safetensors

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_SCORE = "base_model.model.score.weight"  # our head of a judge: its reward or vector
_NAME = re.compile(
  r"(?:base_model\.model\.)?(?:model\.|language_model\.)*layers\.(\d+)\.(\w+(?:\.\w+)?)"
  r"\.lora_([AB])(?:\.default)?\.weight"
)
_SAVED: tuple[set[str], ...] = (
  {"score"},
  {"classifier", "score"},
  set(),
)  # modules_to_save that are read
# Config fields that can change what adapters compute, with the values at which they don't.
_PLAIN: dict[str, tuple[Any, ...]] = {
  "use_dora": (False, None), "bias": ("none", None), "lora_bias": (False, None),
  "fan_in_fan_out": (False, None), "layer_replication": (None,), "use_qalora": (False, None),
  "alora_invocation_tokens": (None,), "trainable_token_indices": (None,),
  "target_parameters": (None, []), "use_bdlora": (None, False),
  # Other values move a part of the base into the adapters.
  "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Weight:
  """One of our weights in one layer: PEFT's modules for it, and the axes of A and of each B."""

  modules: tuple[str, ...]
  inputs: names.Shape
  outputs: names.Shape


def is_folder(path: str) -> bool:
  """Returns whether this is a PEFT folder."""
  return (pathlib.Path(path) / CONFIG).is_file()


def write(
  folder: pathlib.Path,
  adapters: Params,
  model_config: gemma.GemmaConfig,
  alpha: float,
  base: str,
  multimodal: bool = False,
) -> None:
  """Writes both files, in float32, into an existing folder.

  Args:
    adapters: the trained parameters of a run, including a reward model's head.
    alpha: B is scaled by alpha / rank.
    base: the adapted model's name at Hugging Face, or its path.
    multimodal: whether the base is a Gemma 3 or 4 with encoders, whose text model has another name.
  """
  tensors = dict(_tensors(adapters, model_config, multimodal))
  rank = next(len(x) for name, x in tensors.items() if name.endswith("lora_A.weight"))
  modules = sorted({name.split(".")[-3] for name in tensors if ".lora_" in name})
  # By name alone, PEFT would adapt the vision model's projections too.
  in_text = rf".*language_model.*\.({'|'.join(modules)})"
  has_head = "head" in adapters
  config = {
    "peft_type": "LORA", "task_type": "SEQ_CLS" if has_head else "CAUSAL_LM",
    "base_model_name_or_path": base, "r": rank, "lora_alpha": _whole(alpha), "lora_dropout": 0.0,
    "bias": "none", "target_modules": in_text if multimodal else modules, "inference_mode": True,
    "modules_to_save": ["classifier", "score"] if has_head else None,
  }  # fmt: skip
  safetensors.write(folder / WEIGHTS, tensors, {"format": "pt"})
  (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _whole(number: float) -> float:
  return int(number) if number == int(number) else number


def _weights(model_config: gemma.GemmaConfig) -> Iterator[tuple[str, names.Place, _Weight]]:
  """Yields (path, place, PEFT's modules) of every weight that has adapters."""
  for path, place in names.places(model_config).items():
    if place.tensor.name in lora.FACTORS:
      a, b, _ = lora.FACTORS[place.tensor.name]
      modules = tuple(name.removesuffix(".weight") for name in place.tensor.hf_names)
      inputs, outputs = (tuple(place.sizes[x] for x in axes if x in place.sizes) for axes in (a, b))
      yield path, place, _Weight(modules, inputs, outputs)


def _tensors(
  adapters: Params, model_config: gemma.GemmaConfig, multimodal: bool
) -> Iterator[tuple[str, np.ndarray]]:
  leaves = traverse_util.flatten_dict(jax.device_get(adapters), sep="/")
  inner = "model.language_model" if multimodal else "model"
  for path, place, weight in _weights(model_config):
    a, b = (np.asarray(leaves[f"{path}/{part}"], np.float32) for part in "ab")
    for repeat, layer in enumerate(place.layers):
      layer_a, layer_b = (x[repeat] if place.stacked else x for x in (a, b))
      rank = len(layer_b)
      outputs = layer_b.reshape(rank, len(weight.modules), -1)
      for c, module in enumerate(weight.modules):
        name = f"base_model.model.{inner}.layers.{layer}.{module}"
        yield f"{name}.lora_A.weight", np.array(layer_a.reshape(-1, rank).T, order="C")
        yield f"{name}.lora_B.weight", np.array(outputs[:, c].T, order="C")
  if "head" in adapters:
    fix = "Set gpm.prompt_scale=False, or export the whole model."
    require("head/scale" not in leaves, "adapters", "a head of one tensor", "head/scale too", fix)
    head = leaves["head/w"][None] if "head/w" in leaves else leaves["head/v"].T
    yield _SCORE, np.array(head, np.float32, order="C")


def base_of(folder: str) -> str:
  """Returns the name or path of the model that a folder's adapters belong to."""
  return str(_config(pathlib.Path(folder)).get("base_model_name_or_path") or "")


def read(folder: str, model_config: gemma.GemmaConfig, rank: int = 0, scale: float = 1.0) -> Params:
  """Returns the adapters of a PEFT folder, float32 on the host, including a head if there is one.

  Args:
    rank: our rank; missing columns become 0. By default the smallest that fits.
    scale: the factor that our B will be multiplied by, alpha / rank.

  Raises:
    ValueError: files that are missing, damaged or of another model; more than plain LoRA; a rank
      above `rank`.
  """
  path = pathlib.Path(folder)
  config, found = _config(path), safetensors.open_all(str(path / WEIGHTS))
  names.check_dtypes(folder, {name: tensor.get_dtype() for name, tensor in found.items()})
  parts, head = _parts(folder, found, model_config)
  needed = {1}
  blocks: dict[str, list[_Block]] = {}
  for name, place, weight in _weights(model_config):
    blocks[name] = [_block(folder, config, parts, layer, weight, scale) for layer in place.layers]
    needed |= {len(b) for _, b in blocks[name]}
  fix = "Keys and values share A here, and so do gate and up, so their A's in PEFT are stacked."
  fix = f"Set model.lora.rank={max(needed)}. {fix}"
  require(not rank or max(needed) <= rank, folder, f"a rank of at most {rank}", max(needed), fix)
  rank, adapters = rank or max(needed), {}
  for name, place, weight in _weights(model_config):
    a, b = zip(*(_widened(*block, rank, weight) for block in blocks[name]), strict=True)
    adapters[f"{name}/a"] = np.stack(a) if place.stacked else a[0]
    adapters[f"{name}/b"] = np.stack(b) if place.stacked else b[0]
  return traverse_util.unflatten_dict(adapters | head, sep="/")


_Block = tuple[np.ndarray, np.ndarray]  # A [inputs, r] and B [r, matrices, outputs of each]


def _config(path: pathlib.Path) -> dict[str, Any]:
  """Returns adapter_config.json; raises ValueError unless it describes plain adapters."""
  config = files.read_json(path / CONFIG, "PEFT's config of LoRA adapters")
  what, fix = f"{path / CONFIG}: ", "Merge them with PEFT, and give the merged model."
  kind = config.get("peft_type")
  require(kind == "LORA", f"{what}peft_type", "LORA", kind, fix)
  for field, values in _PLAIN.items():
    got = config.get(field)
    expected = " or ".join(dict.fromkeys(json.dumps(value) for value in values))
    require(any(got is x or got == x for x in values), what + field, expected, got, fix)
  saved = config.get("modules_to_save") or []
  expected = "none, or score, the head of a reward model"
  known = isinstance(saved, list) and {*map(str, saved)} in _SAVED
  require(known, f"{what}modules_to_save", expected, saved, fix)
  for field in ("r", "lora_alpha"):
    got = config.get(field)
    number = isinstance(got, int | float) and not isinstance(got, bool) and 0 < got < math.inf
    require(number, what + field, "a number above 0", got, "Restore the file.")
  for field in ("rank_pattern", "alpha_pattern"):
    got = config.get(field) or {}
    good = isinstance(got, dict) and all(isinstance(x, int | float) for x in got.values())
    require(good, what + field, "numbers by module", got, "Restore the file.")
  return config


def _parts(
  folder: str, found: dict[str, Any], model_config: gemma.GemmaConfig
) -> tuple[dict[tuple[int, str, str], np.ndarray], dict[str, np.ndarray]]:
  """Returns every A and B, shapes checked, by (layer, module, "A" or "B"), and the head."""
  widths = {
    (layer, module): (math.prod(weight.inputs), math.prod(weight.outputs))
    for _, place, weight in _weights(model_config)
    for layer in place.layers
    for module in weight.modules
  }
  parts: dict[tuple[int, str, str], np.ndarray] = {}
  head: dict[str, np.ndarray] = {}
  for name, tensor in found.items():
    match, shape = _NAME.fullmatch(name), list(tensor.get_shape())
    if name == _SCORE:
      width = model_config.embed_dim
      good = len(shape) == 2 and shape[1] == width and (shape[0] == 1 or shape[0] % 2 == 0)
      expected: Any = f"shape [1, {width}], or an even number of rows"
      require(good, f"{folder}: {name}", expected, shape, "Is it of another model?")
      x = np.asarray(tensor[:], np.float32)
      head |= {"head/w": x[0]} if len(x) == 1 else {"head/v": x.T}
      continue
    fix = "Embeddings, heads, norms and a vision model cannot have adapters here."
    known = match is not None and (int(match[1]), match[2]) in widths
    expected = f"adapters of the projections of {model_config.num_layers} layers"
    require(known, folder, expected, printable(name), f"Is model.preset right for it? {fix}")
    assert match
    layer, module, part = int(match[1]), match[2], match[3]
    width = widths[layer, module][part == "B"]
    good = len(shape) == 2 and shape[part == "A"] == width and min(shape) > 0
    expected = f"shape [r, {width}]" if part == "A" else f"shape [{width}, r]"
    require(good, f"{folder}: {printable(name)}", expected, shape, "Is model.preset right for it?")
    parts[layer, module, part] = np.asarray(tensor[:], np.float32)
  require(len(parts) > 0, folder, "adapters", "none", "Is it complete?")
  for layer, module, part in parts:
    pair = [parts.get((layer, module, x)) for x in "AB"]
    good = pair[0] is not None and pair[1] is not None and len(pair[0]) == pair[1].shape[1]
    what = f"{folder}: layer {layer}, {module}"
    require(good, what, "A and B of one rank", f"only lora_{part}", "Is the file complete?")
  for place, x in [*parts.items(), *head.items()]:
    require(bool(np.isfinite(x).all()), f"{folder}: {place}", "finite numbers", "NaN or infinity",
            "It is damaged.")  # fmt: skip
  return parts, head


def _block(
  folder: str, config: dict[str, Any], parts: dict, layer: int, weight: _Weight, scale: float
) -> _Block:
  """Returns A and B of one of our weights in one layer, at the smallest possible rank."""
  each = math.prod(weight.outputs)
  columns = [np.zeros((0, math.prod(weight.inputs)), np.float32)]
  rows = [np.zeros((0, len(weight.modules), each), np.float32)]
  for c, module in enumerate(weight.modules):
    a, b = (parts.get((layer, module, part)) for part in "AB")
    if a is None or b is None:
      continue
    factor = _scale(config, f"layers.{layer}.{module}", len(a)) / scale
    if not any(np.array_equal(a, other) for other in columns):
      columns.append(a)
      rows.append(np.zeros((len(a), len(weight.modules), each), np.float32))
    place = next(i for i, other in enumerate(columns) if np.array_equal(a, other))
    rows[place][:, c] = b.T * np.float32(factor)
  return np.concatenate(columns).T, np.concatenate(rows)


def _scale(config: dict[str, Any], module: str, rank: int) -> float:
  """Returns the factor that PEFT applies to a module's B·A."""
  alpha = config["lora_alpha"]
  for pattern, value in (config.get("alpha_pattern") or {}).items():
    if re.match(rf"(.*\.)?({pattern})$", module):
      alpha = value
      break
  return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _widened(a: np.ndarray, b: np.ndarray, rank: int, weight: _Weight) -> _Block:
  """Returns A and B in our axes, padded with zeros to a rank."""
  missing = rank - len(b)
  a, b = np.pad(a, ((0, 0), (0, missing))), np.pad(b, ((0, missing), (0, 0), (0, 0)))
  matrices = (len(weight.modules),) if len(weight.modules) > 1 else ()
  return a.reshape(*weight.inputs, rank), b.reshape(rank, *matrices, *weight.outputs)

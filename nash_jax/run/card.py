"""The model card of an export (README.md), from the record of its run."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from ml_collections import ConfigDict

from nash_jax.models import gemma
from nash_jax.objectives import algorithms
from nash_jax.report import escaped, markdown_table, number
from nash_jax.run.metrics import step_of

# What the papers call the fields of an algorithm's config.
_SYMBOLS = {
  "beta": "β, weight of KL to the base", "eta": "η; β/η weighs KL to the target",
  "kappa": "κ, rate of the target", "mixture": "weight of the base in the mixture",
  "step": "s, mirror step", "target_period": "steps between copies to the target",
  "reference_period": "steps after which the policy becomes the reference",
}  # fmt: skip
_TERMS = (
  "Gemma is provided under and subject to the [Gemma Terms of Use]"
  "(https://ai.google.dev/gemma/terms)."
)


@dataclasses.dataclass(frozen=True)
class Model:
  """What a card describes.

  Attributes:
    spec: what was exported, such as "runs/x@target".
    field: the field of the run's state, "params" or "target".
    step: completed steps; None if the record does not say.
    config: the run's config, as plain types.
    base: the base's name at Hugging Face, or "".
    adapter: whether the files hold only adapters.
    dtype: the dtype of the files.
    note: a sentence on what the dtype loses of the run, or what the files need; or "".
    contests: lines about an arena that this model was in.
  """

  spec: str
  field: str
  step: int | None
  config: dict[str, Any]
  base: str
  adapter: bool
  dtype: str
  note: str = ""
  contests: Sequence[str] = ()


def text(model: Model, workdir: pathlib.Path | None, command: str) -> str:
  """Returns the card as Markdown, front matter included.

  Args:
    workdir: the run's, for its metrics; None if there is none.
    command: the command that made the folder.
  """
  run = "fit" if "loss" in model.config else "train"
  parts = [_front_matter(model), f"# {escaped(_title(model.spec))}", _what(model, run)]
  rows = [[name, value] for name, value in _facts(model, run)]
  parts.append(markdown_table(["", ""], rows))
  measured = [*_measured(model, workdir), *model.contests]
  none = "The run recorded no evaluation up to this step, and no arena was named."
  parts += ["## Measured", "\n".join(f"- {line}" for line in measured) or none]
  parts += [f"## The files\n\n{_files(model)}", f"## How to make it again\n\n{_again(run)}"]
  parts.append(f"And then this folder:\n\n    {command}")
  if gemma.licence(model.config["model"]["preset"]) == "gemma":
    parts.append(_TERMS)
  return "\n\n".join(parts) + "\n"


def _title(spec: str) -> str:
  return pathlib.PurePath(spec).name or spec


def _front_matter(model: Model) -> str:
  fields: dict[str, Any] = {}
  if model.base:
    fields["base_model"] = model.base
    fields["base_model_relation"] = "adapter" if model.adapter else "finetune"
  fields["library_name"] = "peft" if model.adapter else "transformers"
  scores = _head_size(model.config) > 0
  fields["pipeline_tag"] = "text-classification" if scores else "text-generation"
  if licence := gemma.licence(model.config["model"]["preset"]):
    fields["license"] = licence
  tags = ["nash_jax"]
  if "algorithm" in model.config:  # a fit has none
    tags += ["nlhf", model.config["algorithm"]["name"].replace("_", "-")]
  fields["tags"] = [*tags, "lora"] if model.adapter else tags
  # JSON is valid YAML, and escapes any character of a name.
  return "\n".join(["---", *(f"{name}: {json.dumps(x)}" for name, x in fields.items()), "---"])


def _what(model: Model, run: str) -> str:
  """Returns a paragraph on which model of a run this is."""
  steps = f" of {model.config['steps']}" if "steps" in model.config else ""
  at = "" if model.step is None else f", after step {model.step}{steps}"
  said = f"{escaped(model.spec)}{at}, written by nash_jax."
  if model.adapter:
    said += " The files hold only LoRA adapters; you need the base as well."
  if run == "fit":
    return said
  if model.field != "target":
    return f"{said} It is the policy as trained, not an average."
  algorithm = ConfigDict(model.config["algorithm"])
  method = algorithms.get(algorithm.name)
  if method.target_ema(algorithm):
    how = "an exponential average of the policy over training steps, at rate κ"
  else:
    periods = (algorithm.target_period, 2 * algorithm.target_period)  # the latter in two halves
    period = next(n for n in periods if "target" in method.copy_schedule(algorithm, n))
    how = f"a copy of the policy, renewed every {period} steps"
  of_adapters = ", taken over the adapters" if model.config["model"]["lora"]["rank"] else ""
  pulls = "target" in method.role_weights(algorithm)
  role = "centre that the method pulls the policy towards" if pulls else "policy's opponent"
  return f"{said} `@target` is {how}{of_adapters}: the {role}."


def _facts(model: Model, run: str) -> Iterator[tuple[str, str]]:
  """Yields (name, Markdown): what was trained, on what, and how."""
  config = model.config
  start = config["model"]["weights"] or f"random, seed {config['seed']}"
  yield "base", f"{escaped(model.base)} ({escaped(start)})" if model.base else escaped(start)
  yield "architecture", escaped(config["model"]["preset"])
  yield "chat template", config["model"]["template"]
  if run == "train":
    yield from _online(config)
  else:
    yield "method", {
      "sft": "supervised, next token", "judge": "supervised, pairwise judge",
      "reward": "supervised, Bradley–Terry reward model",
      "gpm": "supervised, general preference model",
    }[config["loss"]]  # fmt: skip
    yield "data", escaped(config["data"]["path"])
    yield "steps", f"{config['steps']}, of {config['data']['batch_size']} examples"
  optimizer = config["optimizer"]
  rate = f"rate {optimizer['learning_rate']:g}, {optimizer['schedule']}"
  yield "optimiser", f"{optimizer['name']}, {rate}"
  if lora := config["model"]["lora"]["rank"]:
    yield "LoRA", f"rank {lora}, alpha {config['model']['lora']['alpha']:g}"
  else:
    yield "trained", "all parameters"


def _online(config: dict[str, Any]) -> Iterator[tuple[str, str]]:
  algorithm, sampling, judge = config["algorithm"], config["sampling"], config["judge"]
  method = algorithms.get(algorithm["name"])
  yield "method", f"{algorithm['name']}: {method.paper}"
  used = method.uses(ConfigDict(algorithm)) | {"reference_period"}
  for field, meaning in _SYMBOLS.items():
    if field in used and algorithm.get(field):
      yield meaning, f"{algorithm[field]:g}"
  named = judge["http"]["model"] if judge["name"] == "http" else judge["model"]["weights"]
  with_model = judge["name"] in ("gemma", "gemma_text", "bradley_terry", "gpm", "http")
  yield "judge", escaped(judge["name"]) + (f", {escaped(named)}" if with_model else "")
  prompts = config["prompts"]
  if method.offline:
    yield "data", f"{escaped(config['pairs']['path'])} (pairs)"
    yield "steps", f"{config['steps']}, of {prompts['batch_size']} pairs"
    return
  yield "data", f"{escaped(prompts['path'] or prompts['task'])} (prompts)"
  per_step = f"{prompts['batch_size']} prompts, {algorithm['samples']} responses to each"
  yield "steps", f"{config['steps']}, of {per_step}"
  how = [f"temperature {sampling['temperature']:g}"]
  how += [f"top-k {sampling['top_k']}"] if sampling["top_k"] else []
  how += [f"top-p {sampling['top_p']:g}"] if sampling["top_p"] < 1 else []
  yield "sampled at", f"{', '.join(how)}, at most {sampling['max_tokens']} tokens"


def _measured(model: Model, workdir: pathlib.Path | None) -> Iterator[str]:
  """Yields a line for each metric of the run's last evaluation up to the step."""
  path = workdir / "metrics.jsonl" if workdir else None
  if path is None or not path.exists():
    return
  found: dict[str, tuple[int, float]] = {}
  for line in path.read_bytes().splitlines():
    step = step_of(line)
    if step is not None and (model.step is None or step <= model.step):
      values = json.loads(line)
      found |= {name: (step, x) for name, x in values.items() if isinstance(x, int | float)}
  whose = ", of the policy, which this target follows" if model.field == "target" else ""
  evaluation = model.config["evaluation"]
  for name, (step, value) in found.items():
    if not name.startswith("eval/"):
      continue
    at = f"at step {step}{whose}"
    if name == "eval/win_rate_vs_reference":
      n = evaluation["prompts"]
      # Of numbers in [0, 1] with a given mean, zeros and ones have the largest variance.
      most = 3 * math.sqrt(max(value * (1 - value), 0) / n)
      judged = f"±{number(most)} (3σ at most; n = {n} held-out prompts, a response to each)"
      yield f"beats the base under the training judge: {number(value)} {judged}, {at}"
    elif name == "eval/kl_to_reference":
      yield f"KL to the base: {value:.3g} nats a response, {at}"
    else:
      yield f"{name.removeprefix('eval/').replace('_', ' ')}: {value:.4g}, {at}"


def _files(model: Model) -> str:
  if model.adapter:
    labels = _head_size(model.config)
    auto = "AutoModelForSequenceClassification" if labels else "AutoModelForCausalLM"
    options = f", num_labels={labels}" if labels else ""
    return (
      "`adapter_model.safetensors` and `adapter_config.json` are PEFT's, in float32:\n\n"
      f"```python\nfrom peft import PeftModel\nfrom transformers import {auto}\n\n"
      f'base = {auto}.from_pretrained("BASE"{options})\n'
      'model = PeftModel.from_pretrained(base, "FOLDER")\n```'
      + (f"\n\n{model.note}" if model.note else "")
    )
  stops = "`generation_config.json` names the ids that end a text, but no sampling settings."
  return f"Weights are {model.dtype}. {model.note}".strip() + f" {stops}"


def _head_size(config: dict[str, Any]) -> int:
  """Returns how many numbers the head of a fitted judge reads; 0 for a language model."""
  if "loss" not in config:  # of an online run
    return 0
  return {"sft": 0, "judge": 0, "reward": 1, "gpm": 2 * config["gpm"]["blocks"]}[config["loss"]]


def _again(run: str) -> str:
  """Returns Python code that runs the same config."""
  return (
    "`nash_jax.json` holds the run's whole config as `config`:\n\n"
    f"```python\nimport json\n\nfrom nash_jax import config, {run}\n\n"
    f'saved = json.load(open("nash_jax.json"))["config"]\nc = config.{run}()\n'
    f'c.update(saved)\n{run}.run(c, "runs/again")\n```'
  )

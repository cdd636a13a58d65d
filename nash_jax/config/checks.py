"""The checks on a config that need no data, weights or tokenizer."""

import functools
import math
import operator
import os
from collections.abc import Collection
from typing import Any

import jax
from ml_collections import ConfigDict

from nash_jax.config import fields
from nash_jax.data import judge_template
from nash_jax.data.chat_template import TEMPLATES
from nash_jax.judges import JUDGES, SCALAR
from nash_jax.models import gemma, sharding
from nash_jax.objectives import algorithms
from nash_jax.policy import parse_weights
from nash_jax.validation import asset_path, did_you_mean, one_of, require

_WEIGHTS = "Give runs/x, runs/x@target, runs/x@params:50 or a file."  # what a policy's may be


def resolve(config: ConfigDict, job: str, devices: int | None = None) -> ConfigDict:
  """See config.resolve."""
  job = _job(config, job)
  defaults, check_fields = JOBS[job]
  config = config.copy_and_resolve_references().unlock()
  config.job = job
  _check_names(config, defaults())
  if "model" in config:
    _check_model(config.model, "model")
  check_fields(config, *([devices] if devices else []))
  return config.lock()


def _job(config, expected: str) -> str:
  """Returns the name of a config's job; one that names none is taken for the expected job's."""
  got = config.job if "job" in config else expected
  jobs, advice = f"one of {', '.join(JOBS)}", "Start from nash_jax.config."
  require(got in JOBS, "config.job", jobs, got, advice)
  advice = f"Run it with `nash-jax {got}`, or start from nash_jax.config.{expected}()."
  require(expected in ("", got), "config.job", expected, got, advice)
  return got


def _check_names(config, defaults, prefix: str = "") -> None:
  for name in config:
    if name not in defaults:
      choices = ", ".join(sorted(defaults)) + did_you_mean(name, defaults)
      raise ValueError(f"config field {prefix}{name} is unknown; fields here: {choices}")
    if isinstance(defaults[name], ConfigDict) and name not in fields.OPEN_GROUPS:
      field, advice = f"config field {prefix}{name}", f"Set {prefix}{name}.<field> instead."
      is_group = isinstance(config[name], ConfigDict)
      require(is_group, field, "a group of fields", config[name], advice)
      _check_names(config[name], defaults[name], f"{prefix}{name}.")
  missing = [name for name in defaults if name not in config]
  if missing:
    raise ValueError(f"config field {prefix}{missing[0]} is missing; start from nash_jax.config")


class _Checker:
  """Checks the fields of a group, or `only` some; errors name each by its path in the config."""

  def __init__(self, group: ConfigDict, path: str = "", only: Collection[str] | None = None):
    self.group, self.prefix, self.only = group, f"{path}." if path else "", only

  def __call__(self, field: str, good: bool, expected: str, fix: str) -> None:
    skipped = self.only is not None and field not in self.only
    require(skipped or good, self.prefix + field, expected, self.value(field), fix)

  def value(self, field: str) -> Any:
    """Returns the value of a field of the group, or of a group in it: "lora.rank"."""
    return functools.reduce(operator.getitem, field.split("."), self.group)

  def positive(self, field: str, fix: str, expected: str = "a positive number") -> None:
    self(field, self.value(field) > 0, expected, fix)

  def at_least(self, field: str, least: float, purpose: str = "") -> None:
    self(field, self.value(field) >= least, f"at least {least}{purpose}", f"Set {least} or more.")

  def one_of(self, field: str, choices: Collection[str]) -> None:
    if self.only is None or field in self.only:
      one_of(self.prefix + field, self.value(field), choices)

  def file(self, field: str, expected: str, fix: str, optional: bool = False) -> None:
    """Checks that there is the file or folder of a field."""
    path = asset_path(self.value(field))
    self(field, os.path.exists(path) or (optional and not path), expected, fix)

  def weights(self, field: str, expected: str, fix: str, optional: bool = False) -> None:
    """Checks a field of what policy.load_weights reads: that there is one, and its part after @."""
    path = parse_weights(self.value(field), self.prefix + field).path
    self(field, os.path.exists(path) or (optional and not path), expected, fix)


def _check_model(model, path: str) -> None:
  gemma.preset(model.preset, **model.changes)
  check = _Checker(model, path)
  fix = "float16 is for files: Gemma's activations and masks leave its range."
  check("dtype", model.dtype in fields.COMPUTE_DTYPES, "bfloat16 or float32", fix)
  check("lora.rank", model.lora.rank >= 0, "0 (all parameters are trained) or a rank", "Try 16.")
  check.positive("lora.alpha", "Try 32.")
  check.one_of("template", TEMPLATES)
  fix = "Give a local path, or assets:<file> of a bundled one; docs/weights.md: getting Gemma's."
  check.file("tokenizer", "a file that exists", fix)
  # A run's adapters and parts are a policy's; a judge is a plain model.
  check_weights = check.weights if path == "model" else check.file
  check_weights("weights", "a file that exists", fix, optional=True)


def _check_steps(config, batch_field: str, devices: int | None = None) -> int:
  """Returns over how many of the devices, by default those there are, a batch is split."""
  check = _Checker(config)
  check.positive("steps", "Set --config.steps.")
  check.positive("checkpoint.every", "Try 50.", "a positive number of steps")
  check.positive("evaluation.every", "Try 50.", "a positive number of steps")
  check.one_of("optimizer.name", fields.OPTIMIZERS)
  check.one_of("optimizer.schedule", fields.SCHEDULES)
  check.positive(batch_field, "Try 32.")
  batch_size, parts = check.value(batch_field), config.optimizer.micro_batches
  divides, divisor = parts > 0 and batch_size % parts == 0, f"a divisor of {batch_field}"
  check("optimizer.micro_batches", divides, f"{divisor} = {batch_size}", "Change one of the two.")
  mesh = sharding.resolve_mesh(config.mesh, devices or jax.device_count())
  split, micro_batch = mesh["data"] * mesh["fsdp"], batch_size // parts
  expected = f"micro-batches that divide over data x fsdp = {split} devices"
  fix = f"Use a {batch_field} that is a multiple of {split * parts}."
  require(micro_batch % split == 0, batch_field, expected, micro_batch, fix)
  return split


def _check_sampling(sampling) -> None:
  check, top_k, top_p = _Checker(sampling, "sampling"), sampling.top_k, sampling.top_p
  check.positive("temperature", "Try 1.")
  check.positive("max_tokens", "Try 64.")
  check("top_k", top_k >= 0, "0 (off) or a number of tokens", "Set 0.")
  check("top_p", 0 < top_p <= 1, "a probability in (0, 1]", "Set 1.")
  expected = "a number of tokens where top_p < 1"
  check("top_k", top_p == 1 or top_k > 0, expected, "top-p works within it: try top_k=64.")


def _check_judge(judge, path: str, remote: bool = False) -> None:
  check = _Checker(judge, path)
  check.one_of("name", JUDGES)
  if judge.name in ("gemma", "gemma_text", "bradley_terry"):
    _check_model(judge.model, f"{path}.model")
    expected, fix = "0, because judges are plain models", "A fitted judge is exported merged."
    check("model.lora.rank", judge.model.lora.rank == 0, expected, fix)
  if judge.name == "http":
    _check_http(judge, check, remote)
  if judge.name in ("gemma", "gemma_text", "http"):
    judge_template.read(judge.template)
    distinct = len(judge.answers) == len({*judge.answers}) == 2
    check("answers", distinct, "two different pieces", "Try ('A', 'B').")
    check.positive("micro_batches", "Set 1.")
    expected = "a budget in the judge's tokens; 0, for none, is gemma's alone"
    least = 1 if judge.name == "gemma_text" else 0
    check("max_tokens", judge.max_tokens >= least, expected, "Try 2048.")


def _check_http(judge, check: _Checker, remote: bool) -> None:
  fix = "Use http in the arena: training would send too many requests."
  check("name", remote, "a judge on this machine's devices", fix)
  in_words = judge.template != "stories"
  check("template", in_words, "one that asks in words", "Set gemma, or your own text file.")
  is_url = judge.http.url.startswith(("http://", "https://"))
  check("http.url", is_url, "an http(s) address", "It ends in /v1/chat/completions.")
  check("http.model", judge.http.model != "", "a name the server knows", "Set it.")
  for field, least in (("timeout", 0.001), ("retries", 0), ("backoff", 0), ("workers", 1)):
    check.at_least(f"http.{field}", least)


def _check_arena(config) -> None:
  check, defaults = _Checker(config), fields.arena()
  entry_fields = {"policies": defaults.policies.base, "judges": defaults.judges.judge}
  for group, entry_defaults in entry_fields.items():
    require(len(config[group]) > 0, group, "at least one", [], f"Set --config.{group}.<name>.")
    for name, entry in config[group].items():
      _check_names(entry, entry_defaults, f"{group}.{name}.")
  for name, judge in config.judges.items():
    _check_judge(judge, f"judges.{name}", remote=True)
  for name, policy in config.policies.items():
    _check_arena_policy(policy, f"policies.{name}")
  check.one_of("base", config.policies)
  single = config.policies[config.base].best_of == 1
  check("base", single, "a policy with best_of = 1", "Best-of-n has no log-probabilities for KL.")
  check.one_of("select_judge", config.judges)
  for field, least in (("samples", 2), ("resamples", 1), ("max_prompts", 0), ("texts", 0)):
    check.at_least(field, least)
  check.positive("prompts.batch_size", "Try 16.")
  check.one_of("prompts.overflow", ("drop", "cut"))
  _check_sampling(config.sampling)


def _check_arena_policy(policy, path: str) -> None:
  check = _Checker(policy, path)
  check.weights("weights", "a weights file or a run's workdir", _WEIGHTS)
  check("best_of", policy.best_of >= 1, "1, or n of best-of-n", "Set 1.")


def judge_mesh_sizes(config, devices: int) -> dict[str, int]:
  """Returns the sizes of the mesh on which an online run's judge is laid out."""
  policy_sizes = sharding.resolve_mesh(config.mesh, devices)
  sizes = {axis: size or policy_sizes[axis] for axis, size in config.judge.mesh.items()}
  good = config.judge.name != "gemma_text" or sizes == policy_sizes
  expected = f"the policy's, {policy_sizes}, for gemma_text"
  require(good, "judge.mesh", expected, sizes, "Set its sizes to 0.")
  return sharding.resolve_mesh(sizes, devices, "judge.mesh")


def _check_fit(config) -> None:
  check = _Checker(config)
  check.one_of("loss", ("sft", "judge", "reward"))
  if config.loss == "judge":
    judge_template.read(config.template)
  check.one_of("export_dtype", fields.DTYPES)
  folder = os.path.isdir(asset_path(config.export))
  check("export", not folder, "the name of a file, or none", "Add a name: out/policy.safetensors.")
  _check_steps(config, "data.batch_size")


def _check_collect(config) -> None:
  check, samples = _Checker(config), config.sampling.samples
  check.positive("steps", "Set --config.steps.")
  fix = "A comparison needs two."
  check("sampling.samples", samples >= 2, "at least two responses a prompt", fix)
  for name, source in config.sources.items():
    _check_names(source, fields.collect().sources.base, f"sources.{name}.")
    check_source = _Checker(source, f"sources.{name}")
    check_source.positive("temperature", "Try 1.")
    check_source.weights("weights", "a weights file or a run's workdir", _WEIGHTS, optional=True)
  _check_sampling(ConfigDict({**config.sampling, "temperature": 1.0}))  # each source has its own
  _check_judge(config.judge, "judge")


def _check_compare(config) -> None:
  require(len(config.runs) > 0, "runs", "at least one", [], "Give each run's changes.")
  _Checker(config).positive("seeds", "Try 3.")
  resolve(config.base, "train")
  for kind in config.kinds:
    one_of("kinds", kind, ("network", "tabular"))
    good = kind == "network" or config.base.evaluation.exact
    require(good, "kinds", "network alone, for texts", kind, "Leave tabular out.")


def _check_sample(config) -> None:
  _check_sampling(config.sampling)
  check = _Checker(config)
  expected = "a number of at least 0, 1 for the policy itself"
  check("realign", 0 <= config.realign < math.inf, expected, "Try 1.5.")
  if config.realign != 1:
    fix = "Give what the policy was trained from, such as assets:stories/policy.safetensors."
    check.weights("reference", "a weights file or a run's workdir", fix)


def _check_train(config, devices: int | None = None) -> None:
  devices, check = devices or jax.device_count(), _Checker(config)
  _check_algorithm(config)
  _check_sampling(config.sampling)
  check.one_of("prompts.overflow", ("drop", "cut"))
  _check_judge(config.judge, "judge")
  split = _check_steps(config, "prompts.batch_size", devices)
  judge_mesh_sizes(config, devices)
  if config.judge.name in ("gemma", "gemma_text"):
    divides = config.prompts.batch_size % (split * config.judge.micro_batches) == 0
    expected = f"a divisor of prompts.batch_size / {split} devices"
    check("judge.micro_batches", divides, expected, "Lower it.")
  num_prompts, multiple = config.evaluation.prompts, f"a multiple of data x fsdp = {split} devices"
  divides = num_prompts > 0 and num_prompts % split == 0
  check("evaluation.prompts", divides, multiple, f"Try {64 * split}.")


def _check_algorithm(config) -> None:
  """Fills in the method's defaults, and checks the fields that the method uses, but no others."""
  algorithm, sampling = config.algorithm, config.sampling
  algorithms.fill_defaults(algorithm)
  method = algorithms.get(algorithm.name)
  uses = method.uses(algorithm) | ({"beta"} if config.evaluation.exact else set())
  check_used = _Checker(algorithm, "algorithm", only=uses)
  check_used.one_of("kappa_schedule", ("constant", "harmonic"))
  check_used.one_of("target_update", ("ema", "periodic"))
  check_used.one_of("labels", ("soft", "sampled"))
  check_used.positive("beta", "Try 0.1.", "a positive KL weight")
  check_used.positive("eta", "Try 1.0.", "a positive prox step")
  check_used("kappa", 0 <= algorithm.kappa <= 1, "a rate in [0, 1]", "Try 0.1.")
  check_used.positive("kappa_offset", "10 gives 10 / (k + 10).")
  check_used.positive("target_period", "Try 10.", "a positive number of steps")
  check_used("mixture", 0 <= algorithm.mixture <= 1, "a weight in [0, 1]", "Try 0.25.")
  most = 1 / algorithm.beta if "beta" in method.fields else math.inf
  in_range, expected = 0 < algorithm.step <= most, f"in (0, 1 / beta = {most:g}]"
  check_used("step", in_range, expected, "Lower it, or algorithm.beta.")

  check, name = _Checker(algorithm, "algorithm"), algorithm.name
  period, temperature = algorithm.reference_period, algorithm.behaviour_temperature
  check("reference_period", period >= 0, "0 (never) or a number of steps", "Set 0.")
  for field, least in method.minimum.items():
    check.at_least(field, least, f" for {name}")
  centred = "centre_log_ratios" in uses and algorithm.centre_log_ratios
  good = not centred or method.samples(algorithm)[0] > 1
  expected = f"two or more of {name}'s own, for centre_log_ratios takes the mean of the others"
  check("samples", good, expected, "Set 4, or leave centre_log_ratios out.")
  good = not method.needs_rewards or config.judge.name in SCALAR
  expected = f"a judge with scalar rewards, {' or '.join(SCALAR)}, for {name}"
  fix = "Fit one with `nash-jax fit --config.loss=reward`."
  require(good, "judge.name", expected, config.judge.name, fix)
  check.positive("behaviour_temperature", "Try 1.")
  options = {"top_k": sampling.top_k, "top_p": sampling.top_p, "behaviour_temperature": temperature}
  good = not method.on_policy or options == {"top_k": 0, "top_p": 1, "behaviour_temperature": 1}
  reason = f"because {name} follows the gradient of the distribution that it samples from"
  expected = f"top_k = 0, top_p = 1 and behaviour_temperature = 1, {reason}"
  fix = "Use sampling.temperature to sharpen that distribution instead."
  require(good, "sampling", expected, options, fix)


# By job: the defaults of its fields, and its checks.
JOBS = {
  "train": (fields.train, _check_train), "fit": (fields.fit, _check_fit),
  "arena": (fields.arena, _check_arena), "collect": (fields.collect, _check_collect),
  "compare": (fields.compare, _check_compare), "sample": (fields.sample, _check_sample),
}  # fmt: skip

"""Every check on a config, before anything heavy loads."""

import functools
import math
import os

import jax
from ml_collections import ConfigDict

from nash_jax.config import fields
from nash_jax.data import judge_template
from nash_jax.data.chat_template import TEMPLATES
from nash_jax.judges import JUDGES, SCALAR
from nash_jax.models import gemma, sharding
from nash_jax.objectives import algorithms
from nash_jax.validation import asset_path, did_you_mean, one_of, require


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
  require(
    got in JOBS, "config.job", f"one of {', '.join(JOBS)}", got, "Start from nash_jax.config."
  )
  require(
    got == (expected or got),
    "config.job",
    expected,
    got,
    f"Run it with `nash-jax {got}`, or start from nash_jax.config.{expected}().",
  )
  return got


def _check_names(config, defaults, prefix=""):
  for name in config:
    if name not in defaults:
      raise ValueError(
        f"config field {prefix}{name} is unknown; fields here: {', '.join(sorted(defaults))}"
        f"{did_you_mean(name, defaults)}"
      )
    if isinstance(defaults[name], ConfigDict) and name not in fields.OPEN_GROUPS:
      require(
        isinstance(config[name], ConfigDict),
        f"config field {prefix}{name}",
        "a group of fields",
        config[name],
        f"Set {prefix}{name}.<field> instead.",
      )
      _check_names(config[name], defaults[name], f"{prefix}{name}.")
  missing = [name for name in defaults if name not in config]
  if missing:
    raise ValueError(f"config field {prefix}{missing[0]} is missing; start from nash_jax.config")


def _checker(group, prefix: str = ""):
  """Returns check(field, good, expected, fix), which names the dotted field of a group."""

  def check(field: str, good: bool, expected: str, fix: str) -> None:
    value = functools.reduce(lambda node, name: node[name], field.split("."), group)
    require(good, f"{prefix}{field}", expected, value, fix)

  return check


_NO_FILE = (
  "Give a local path, or assets:<file> for a bundled one; docs/weights.md: how to get Gemma's."
)


def _check_model(model, where: str):
  gemma.preset(model.preset, **model.changes)
  check, lora = _checker(model, f"{where}."), model.lora
  one_of(f"{where}.dtype", model.dtype, fields.DTYPES)
  check("lora.rank", lora.rank >= 0, "0 (all parameters are trained) or a rank", "Try 16.")
  check("lora.alpha", lora.alpha > 0, "a positive number", "Try 32.")
  one_of(f"{where}.template", model.template, TEMPLATES)
  for what in ("tokenizer", "weights"):
    file = asset_path(model[what]).split("@")[0]
    exists = (what == "weights" and not file) or os.path.exists(file)
    require(exists, f"{where}.{what}", "a file that exists", file, _NO_FILE)


def _check_steps(config, batch_field: str, devices: int | None = None) -> int:
  """Returns over how many of the devices, by default those there are, a batch is split."""
  check, group = _checker(config), batch_field.split(".")[0]
  batch_size, micro = config[group].batch_size, config.optimizer.micro_batches
  check("steps", config.steps > 0, "a positive number", "Set --config.steps.")
  for name in ("checkpoint", "evaluation"):
    check(f"{name}.every", config[name].every > 0, "a positive number of steps", "Try 50.")
  one_of("optimizer.name", config.optimizer.name, fields.OPTIMIZERS)
  one_of("optimizer.schedule", config.optimizer.schedule, fields.SCHEDULES)
  check(batch_field, batch_size > 0, "a positive number", "Try 32.")
  divides, divisor = micro > 0 and batch_size % micro == 0, f"a divisor of {batch_field}"
  check("optimizer.micro_batches", divides, f"{divisor} = {batch_size}", "Change one of the two.")
  mesh = sharding.resolve_mesh(config.mesh, devices or jax.device_count())
  rows = mesh["data"] * mesh["fsdp"]
  divides, size = batch_size // micro % rows == 0, batch_size // micro
  split = f"micro-batches that divide over data x fsdp = {rows} devices"
  multiple = f"Use a {batch_field} that is a multiple of {rows * micro}."
  require(divides, batch_field, split, size, multiple)
  return rows


def _check_sampling(s):
  check = _checker(s, "sampling.")
  check("temperature", s.temperature > 0, "a positive number", "Try 1.")
  check("max_tokens", s.max_tokens > 0, "a positive number", "Try 64.")
  check("top_k", s.top_k >= 0, "0 (off) or a number of tokens", "Set 0.")
  check("top_p", 0 < s.top_p <= 1, "a probability in (0, 1]", "Set 1.")
  within = "a number of tokens where top_p < 1"
  check("top_k", s.top_p == 1 or s.top_k > 0, within, "top-p works within it: try top_k=64.")


def _check_judge(judge, where: str, remote: bool = False):
  one_of(f"{where}.name", judge.name, JUDGES)
  check = _checker(judge, f"{where}.")
  if judge.name in ("gemma", "gemma_text", "bradley_terry"):
    _check_model(judge.model, f"{where}.model")
    plain, export = "0, because judges are plain models", "A fitted judge is exported merged."
    check("model.lora.rank", judge.model.lora.rank == 0, plain, export)
  if judge.name == "http":
    _check_http(judge, check, remote)
  if judge.name.startswith("gemma") or judge.name == "http":
    judge_template.read(judge.template)
    two = len({*judge.answers}) == 2 == len(judge.answers)
    check("answers", two, "two different pieces", "Try ('A', 'B').")
    check("micro_batches", judge.micro_batches > 0, "a positive number", "Set 1.")
    budget = "a budget in the judge's tokens; 0, for none, is gemma's alone"
    check("max_tokens", judge.max_tokens >= (judge.name == "gemma_text"), budget, "Try 2048.")


def _check_http(judge, check, remote: bool):
  http, words = judge.http, judge.template != "stories"
  arena = "Use http in the arena: training would send too many requests."
  check("name", remote, "a judge on this machine's devices", arena)
  check("template", words, "one that asks in words", "Set gemma, or your own text file.")
  address, ends = http.url.startswith(("http://", "https://")), "It ends in /v1/chat/completions."
  check("http.url", address, "an http(s) address", ends)
  check("http.model", http.model != "", "a name the server knows", "Set it.")
  for name, least in (("timeout", 0.001), ("retries", 0), ("backoff", 0), ("workers", 1)):
    check(f"http.{name}", http[name] >= least, f"at least {least}", "Raise it.")


def _check_arena(config):
  check, default = _checker(config), fields.arena()
  for group, like in (("policies", default.policies.base), ("judges", default.judges.judge)):
    require(len(config[group]) > 0, group, "at least one", [], f"Set --config.{group}.<name>.")
    for name, entry in config[group].items():
      _check_names(entry, like, f"{group}.{name}.")
  for name, judge in config.judges.items():
    _check_judge(judge, f"judges.{name}", remote=True)
  for name, policy in config.policies.items():
    _check_policy(policy, f"policies.{name}")
  one_of("base", config.base, config.policies)
  plain = config.policies[config.base].best_of == 1
  check("base", plain, "a policy with best_of = 1", "Best-of-n has no log-probabilities for KL.")
  one_of("select_judge", config.select_judge, config.judges)
  for name, least in (("samples", 2), ("resamples", 1), ("max_prompts", 0), ("texts", 0)):
    check(name, config[name] >= least, f"at least {least}", f"Set {least} or more.")
  check("prompts.batch_size", config.prompts.batch_size > 0, "a positive number", "Try 16.")
  one_of("prompts.overflow", config.prompts.overflow, ("drop", "cut"))
  _check_sampling(config.sampling)


def _check_policy(policy, where: str):
  file, _, part = asset_path(policy.weights).partition("@")
  check = _checker(policy, f"{where}.")
  fix = "Give runs/x, runs/x@target, runs/x@params:50 or a file."
  exists = file != "" and os.path.exists(file)
  check("weights", exists, "a weights file or a run's workdir", fix)
  one_of(f"{where}.weights, after @", part.split(":")[0] or "params", ("params", "target"))
  step, newest = part.partition(":")[2], "Leave it out for the newest checkpoint."
  known = step in ("", "best") or step.isdigit()
  require(known, f"{where}.weights, after :", "a step or best", step, newest)
  check("best_of", policy.best_of >= 1, "1, or n of best-of-n", "Set 1.")


def judge_mesh_sizes(config, devices: int) -> dict[str, int]:
  """Returns the sizes of the mesh on which an online run's judge is laid out."""
  own = sharding.resolve_mesh(config.mesh, devices)
  sizes = {axis: size or own[axis] for axis, size in config.judge.mesh.items()}
  same, expected = sizes == own, f"the policy's, {own}, for gemma_text"
  text = config.judge.name == "gemma_text"
  require(not text or same, "judge.mesh", expected, sizes, "Set its sizes to 0.")
  return sharding.resolve_mesh(sizes, devices, "judge.mesh")


def _check_fit(config):
  one_of("loss", config.loss, ("sft", "judge", "reward"))
  if config.loss == "judge":
    judge_template.read(config.template)
  one_of("export_dtype", config.export_dtype, fields.DTYPES)
  _check_steps(config, "data.batch_size")


def _check_collect(config):
  check, several = _checker(config), config.sampling.samples >= 2
  check("steps", config.steps > 0, "a positive number", "Set --config.steps.")
  check("sampling.samples", several, "at least two responses a prompt", "A comparison needs two.")
  _check_judge(config.judge, "judge")


def _check_compare(config):
  check = _checker(config)
  require(len(config.runs) > 0, "runs", "at least one", [], "Give each run's changes.")
  check("seeds", config.seeds > 0, "a positive number", "Try 3.")
  resolve(config.base, "train")
  for kind in config.kinds:
    one_of("kinds", kind, ("network", "tabular"))
    good, expected = kind == "network" or config.base.evaluation.exact, "network alone, for texts"
    require(good, "kinds", expected, kind, "Leave tabular out.")


def _check_sample(config):
  _check_sampling(config.sampling)
  check, strength = _checker(config), config.realign
  number = "a number of at least 0, 1 for the policy itself"
  check("realign", 0 <= strength < math.inf, number, "Try 1.5.")
  reference = asset_path(config.reference).split("@")[0]
  exists = reference != "" and os.path.exists(reference)
  fix = "Give what the policy was trained from, such as assets:stories/policy.safetensors."
  check("reference", strength == 1 or exists, "a weights file or a run's workdir", fix)


def _check_train(config, devices=None):
  devices, check = devices or jax.device_count(), _checker(config)
  _check_algorithm(config)
  _check_sampling(config.sampling)
  one_of("prompts.overflow", config.prompts.overflow, ("drop", "cut"))
  _check_judge(config.judge, "judge")
  rows = _check_steps(config, "prompts.batch_size", devices)
  judge_mesh_sizes(config, devices)
  if config.judge.name.startswith("gemma"):
    divides = config.prompts.batch_size % (rows * config.judge.micro_batches) == 0
    divisor = f"a divisor of prompts.batch_size / {rows} devices"
    check("judge.micro_batches", divides, divisor, "Lower it.")
  whole = config.evaluation.prompts > 0 and config.evaluation.prompts % rows == 0
  multiple = f"a multiple of data x fsdp = {rows} devices"
  check("evaluation.prompts", whole, multiple, f"Try {64 * rows}.")


_POSITIVE = (lambda value: value > 0, "a positive number")
# What each number of an algorithm's config has to be: its test, in words, and a value to try.
_RANGES = {
  "beta": (lambda value: value > 0, "a positive KL weight", "Try 0.1."),
  "eta": (lambda value: value > 0, "a positive prox step", "Try 1.0."),
  "kappa": (lambda value: 0 <= value <= 1, "a rate in [0, 1]", "Try 0.1."),
  "kappa_offset": (*_POSITIVE, "10 gives 10 / (k + 10)."),
  "target_period": (lambda value: value > 0, "a positive number of steps", "Try 10."),
  "mixture": (lambda value: 0 <= value <= 1, "a weight in [0, 1]", "Try 0.25."),
}
_CHOICES = {
  "kappa_schedule": ("constant", "harmonic"),
  "target_update": ("ema", "periodic"),
  "labels": ("soft", "sampled"),
}


def _check_algorithm(config):
  """Fills in the method's own defaults, and checks the fields that it uses, but no others."""
  a, s, check = config.algorithm, config.sampling, _checker(config.algorithm, "algorithm.")
  algorithms.fill_defaults(a)
  method = algorithms.get(a.name)
  for field in _CHOICES.keys() & method.uses(a):
    one_of(f"algorithm.{field}", a[field], _CHOICES[field])
  uses = method.uses(a) | ({"beta"} if config.evaluation.exact else set())
  for field, (good, expected, fix) in _RANGES.items():
    check(field, field not in uses or good(a[field]), expected, fix)
  most = 1 / a.beta if "beta" in uses else math.inf
  within = "step" not in uses or 0 < a.step <= most
  check("step", within, f"in (0, 1 / beta = {most:g}]", "Lower it, or algorithm.beta.")
  check("reference_period", a.reference_period >= 0, "0 (never) or a number of steps", "Set 0.")
  for field, least in method.minimum.items():
    check(field, a[field] >= least, f"at least {least} for {a.name}", f"Set {least} or more.")
  centred = "centre_log_ratios" in uses and a.centre_log_ratios
  others = f"two or more of {a.name}'s own, for centre_log_ratios takes the mean of the others"
  enough = not centred or method.samples(a)[0] > 1
  check("samples", enough, others, "Set 4, or leave centre_log_ratios out.")
  scalar = f"a judge with scalar rewards, {' or '.join(SCALAR)}, for {a.name}"
  suits = not method.needs_rewards or config.judge.name in SCALAR
  fit = "Fit one with `nash-jax fit --config.loss=reward`."
  require(suits, "judge.name", scalar, config.judge.name, fit)
  behaviour = a.behaviour_temperature
  check("behaviour_temperature", behaviour > 0, "a positive number", "Try 1.")
  drawn_by = {"top_k": s.top_k, "top_p": s.top_p, "behaviour_temperature": behaviour}
  own = drawn_by == {"top_k": 0, "top_p": 1, "behaviour_temperature": 1}
  expected = (
    "top_k = 0, top_p = 1 and behaviour_temperature = 1, because "
    f"{a.name} follows the gradient of the distribution that it samples from"
  )
  sharpen = "Use sampling.temperature to sharpen that distribution instead."
  require(own or not method.on_policy, "sampling", expected, drawn_by, sharpen)


# By job: the defaults of its fields, and its checks.
JOBS = {
  "train": (fields.train, _check_train),
  "fit": (fields.fit, _check_fit),
  "arena": (fields.arena, _check_arena),
  "collect": (fields.collect, _check_collect),
  "compare": (fields.compare, _check_compare),
  "sample": (fields.sample, _check_sample),
}

"""Every check on a config, before anything heavy loads."""

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
  require(got in JOBS, "config.job", f"one of {', '.join(JOBS)}", got, "Start from nash_jax.config.")
  require(
    got == (expected or got), "config.job", expected, got,
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
        isinstance(config[name], ConfigDict), f"config field {prefix}{name}", "a group of fields",
        config[name], f"Set {prefix}{name}.<field> instead.",
      )
      _check_names(config[name], defaults[name], f"{prefix}{name}.")
  missing = [name for name in defaults if name not in config]
  if missing:
    raise ValueError(f"config field {prefix}{missing[0]} is missing; start from nash_jax.config")


def _check_model(config, where):
  gemma.preset(config.preset, **config.changes)
  one_of(f"{where}.dtype", config.dtype, fields.DTYPES)
  require(config.lora.rank >= 0, f"{where}.lora.rank", "0 (all parameters are trained) or a rank",
        config.lora.rank, "Try 16.")  # fmt: skip
  require(config.lora.alpha > 0, f"{where}.lora.alpha", "a positive number", config.lora.alpha,
        "Try 32.")  # fmt: skip
  one_of(f"{where}.template", config.template, TEMPLATES)
  for what in ("tokenizer", "weights"):
    name = asset_path(config[what]).split("@")[0]
    require(
      (what == "weights" and not name) or os.path.exists(name), f"{where}.{what}",
      "a file that exists", name,
      "Give a local path, or assets:<file> for a bundled one; docs/weights.md: how to get Gemma's.",
    )  # fmt: skip


def _check_steps(config, batch_size, batch_field, devices=None) -> int:
  """Returns over how many of the devices, by default those there are, a batch is split."""
  require(config.steps > 0, "steps", "a positive number", config.steps, "Set --config.steps.")
  for name in ("checkpoint", "evaluation"):
    every = config[name].every
    require(every > 0, f"{name}.every", "a positive number of steps", every, "Try 50.")
  one_of("optimizer.name", config.optimizer.name, fields.OPTIMIZERS)
  one_of("optimizer.schedule", config.optimizer.schedule, fields.SCHEDULES)
  micro = config.optimizer.micro_batches
  require(batch_size > 0, batch_field, "a positive number", batch_size, "Try 32.")
  require(micro > 0 and batch_size % micro == 0, "optimizer.micro_batches",
        f"a divisor of {batch_field} = {batch_size}", micro, "Change one of the two.")  # fmt: skip
  mesh = sharding.resolve_mesh(config.mesh, devices or jax.device_count())
  rows = mesh["data"] * mesh["fsdp"]
  require(
    (batch_size // micro) % rows == 0, batch_field,
    f"micro-batches that divide over data x fsdp = {rows} devices", batch_size // micro,
    f"Use a {batch_field} that is a multiple of {rows * micro}.",
  )  # fmt: skip
  return rows


def _check_sampling(sampling):
  require(sampling.temperature > 0, "sampling.temperature", "a positive number", sampling.temperature, "Try 1.")
  require(sampling.max_tokens > 0, "sampling.max_tokens", "a positive number", sampling.max_tokens, "Try 64.")
  require(sampling.top_k >= 0, "sampling.top_k", "0 (off) or a number of tokens", sampling.top_k, "Set 0.")
  require(0 < sampling.top_p <= 1, "sampling.top_p", "a probability in (0, 1]", sampling.top_p, "Set 1.")
  require(sampling.top_p == 1 or sampling.top_k > 0, "sampling.top_k", "a number of tokens where top_p < 1",
        sampling.top_k, "top-p works within the top k: try top_k=64.")  # fmt: skip


def _check_judge(config, where, remote=False):
  one_of(f"{where}.name", config.name, JUDGES)
  if config.name in ("gemma", "gemma_text", "bradley_terry"):
    _check_model(config.model, f"{where}.model")
    require(config.model.lora.rank == 0, f"{where}.model.lora.rank", "0, because judges are plain models",
          config.model.lora.rank, "A judge fitted with adapters is exported merged.")  # fmt: skip
  if config.name == "http":
    _check_http(config, where, remote)
  if config.name.startswith("gemma") or config.name == "http":
    judge_template.read(config.template)
    require(len({*config.answers}) == 2 == len(config.answers), f"{where}.answers",
          "two different pieces", config.answers, "Try ('A', 'B').")  # fmt: skip
    require(config.micro_batches > 0, f"{where}.micro_batches", "a positive number",
          config.micro_batches, "Set 1.")  # fmt: skip
    require(config.max_tokens >= (config.name == "gemma_text"), f"{where}.max_tokens",
          "a budget in the judge's tokens; 0, for none, is gemma's alone", config.max_tokens,
          "Try 2048.")  # fmt: skip


def _check_http(config, where, remote):
  h = config.http
  require(remote, f"{where}.name", "a judge on this machine's devices", config.name,
        "Use http in the arena: training would send too many requests.")  # fmt: skip
  require(config.template != "stories", f"{where}.template", "one that asks in words",
        config.template, "Set gemma, or your own text file.")  # fmt: skip
  require(h.url.startswith(("http://", "https://")), f"{where}.http.url", "an http(s) address", h.url,
        "It usually ends in /v1/chat/completions.")  # fmt: skip
  require(h.model != "", f"{where}.http.model", "a name the server knows", h.model, "Set it.")
  for name, least in (("timeout", 0.001), ("retries", 0), ("backoff", 0), ("workers", 1)):
    require(h[name] >= least, f"{where}.http.{name}", f"at least {least}", h[name], "Raise it.")


def _check_arena(config):
  default = fields.arena()
  for group, like in (("policies", default.policies.base), ("judges", default.judges.judge)):
    require(len(config[group]) > 0, group, "at least one", [], f"Set --config.{group}.<name>.")
    for name, entry in config[group].items():
      _check_names(entry, like, f"{group}.{name}.")
  for name, judge in config.judges.items():
    _check_judge(judge, f"judges.{name}", remote=True)
  for name, policy in config.policies.items():
    where, (file, _, part) = f"policies.{name}", asset_path(policy.weights).partition("@")
    require(file and os.path.exists(file), f"{where}.weights", "a weights file or a run's workdir",
          policy.weights, "Give runs/x, runs/x@target, runs/x@params:50 or a file.")  # fmt: skip
    one_of(f"{where}.weights, after @", part.split(":")[0] or "params", ("params", "target"))
    step = part.partition(":")[2]
    require(step in ("", "best") or step.isdigit(), f"{where}.weights, after :",
          "a step or best", step, "Leave it out for the newest checkpoint.")  # fmt: skip
    require(policy.best_of >= 1, f"{where}.best_of", "1, or n of best-of-n", policy.best_of,
          "Set 1.")  # fmt: skip
  one_of("base", config.base, config.policies)
  require(config.policies[config.base].best_of == 1, "base", "a policy with best_of = 1",
        config.base, "KL to it needs log-probabilities, which best-of-n does not have.")  # fmt: skip
  one_of("select_judge", config.select_judge, config.judges)
  for name, least in (("samples", 2), ("resamples", 1), ("max_prompts", 0), ("texts", 0)):
    require(config[name] >= least, name, f"at least {least}", config[name], f"Set {least} or more.")
  size = config.prompts.batch_size
  require(size > 0, "prompts.batch_size", "a positive number", size, "Try 16.")
  one_of("prompts.overflow", config.prompts.overflow, ("drop", "cut"))
  _check_sampling(config.sampling)


def judge_mesh_sizes(config, devices: int) -> dict[str, int]:
  """Returns the sizes of the mesh on which an online run's judge is laid out."""
  own = sharding.resolve_mesh(config.mesh, devices)
  sizes = {axis: size or own[axis] for axis, size in config.judge.mesh.items()}
  require(config.judge.name != "gemma_text" or sizes == own, "judge.mesh",
        f"the policy's, {own}, for gemma_text", sizes, "Set its sizes to 0.")  # fmt: skip
  return sharding.resolve_mesh(sizes, devices, "judge.mesh")


def _check_fit(config):
  one_of("loss", config.loss, ("sft", "judge", "reward"))
  if config.loss == "judge":
    judge_template.read(config.template)
  one_of("export_dtype", config.export_dtype, fields.DTYPES)
  _check_steps(config, config.data.batch_size, "data.batch_size")


def _check_collect(config):
  require(config.steps > 0, "steps", "a positive number", config.steps, "Set --config.steps.")
  require(config.sampling.samples >= 2, "sampling.samples", "at least two responses a prompt",
        config.sampling.samples, "A comparison needs two.")  # fmt: skip
  _check_judge(config.judge, "judge")


def _check_compare(config):
  require(len(config.runs) > 0, "runs", "at least one", [], "Give each run's changes.")
  require(config.seeds > 0, "seeds", "a positive number", config.seeds, "Try 3.")
  resolve(config.base, "train")
  for kind in config.kinds:
    one_of("kinds", kind, ("network", "tabular"))
    require(kind == "network" or config.base.evaluation.exact, "kinds",
          "network alone, where responses are texts", kind, "Leave tabular out.")  # fmt: skip


def _check_sample(config):
  _check_sampling(config.sampling)
  strength = config.realign
  require(0 <= strength < math.inf, "realign", "a number of at least 0, 1 for the policy itself",
        strength, "Try 1.5.")  # fmt: skip
  reference = asset_path(config.reference).split("@")[0]
  require(
    strength == 1 or (reference and os.path.exists(reference)), "reference",
    "a weights file or a run's workdir", config.reference,
    "Give what the policy was trained from, such as assets:stories/policy.safetensors.",
  )  # fmt: skip


def _check_train(config, devices=None):
  devices = devices or jax.device_count()
  _check_algorithm(config)
  _check_sampling(config.sampling)
  one_of("prompts.overflow", config.prompts.overflow, ("drop", "cut"))
  _check_judge(config.judge, "judge")
  rows = _check_steps(config, config.prompts.batch_size, "prompts.batch_size", devices)
  judge_mesh_sizes(config, devices)
  require(
    not config.judge.name.startswith("gemma")
    or config.prompts.batch_size % (rows * config.judge.micro_batches) == 0,
    "judge.micro_batches", f"a divisor of prompts.batch_size / {rows} devices",
    config.judge.micro_batches, "Lower it.",
  )
  evaluated = config.evaluation.prompts
  require(
    evaluated > 0 and evaluated % rows == 0, "evaluation.prompts",
    f"a multiple of data x fsdp = {rows} devices", evaluated, f"Try {64 * rows}.",
  )


# What each number of an algorithm's config has to be: its test, in words, and a value to try.
_RANGES = {
  "beta": (lambda value: value > 0, "a positive KL weight", "Try 0.1."),
  "eta": (lambda value: value > 0, "a positive prox step", "Try 1.0."),
  "kappa": (lambda value: 0 <= value <= 1, "a rate in [0, 1]", "Try 0.1."),
  "kappa_offset": (lambda value: value > 0, "a positive number", "10 gives 10 / (k + 10)."),
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
  a, s = config.algorithm, config.sampling
  algorithms.fill_defaults(a)
  method = algorithms.get(a.name)
  for field in _CHOICES:
    if field in method.uses(a):
      one_of(f"algorithm.{field}", a[field], _CHOICES[field])
  uses = method.uses(a) | ({"beta"} if config.evaluation.exact else set())
  for field in _RANGES:
    good, expected, fix = _RANGES[field]
    require(field not in uses or good(a[field]), f"algorithm.{field}", expected, a[field], fix)
  most = 1 / a.beta if "beta" in uses else math.inf
  require(
    "step" not in uses or 0 < a.step <= most, "algorithm.step", f"in (0, 1 / beta = {most:g}]",
    a.step, "Lower it, or algorithm.beta.",
  )
  require(
    a.reference_period >= 0, "algorithm.reference_period", "0 (never) or a number of steps",
    a.reference_period, "Set 0.",
  )
  for field, least in method.minimum.items():
    require(
      a[field] >= least, f"algorithm.{field}", f"at least {least} for {a.name}", a[field],
      f"Set {least} or more.",
    )
  require(
    "centre_log_ratios" not in uses or not a.centre_log_ratios or method.samples(a)[0] > 1,
    "algorithm.samples",
    f"two or more of {a.name}'s own, for centre_log_ratios takes the mean of the others", a.samples,
    "Set 4, or leave centre_log_ratios out.",
  )
  require(
    not method.needs_rewards or config.judge.name in SCALAR, "judge.name",
    f"a judge with scalar rewards, {' or '.join(SCALAR)}, for {a.name}", config.judge.name,
    "Fit one with `nash-jax fit --config.loss=reward`.",
  )
  behaviour = a.behaviour_temperature
  require(
    behaviour > 0, "algorithm.behaviour_temperature", "a positive number", behaviour, "Try 1."
  )
  drawn_by = {"top_k": s.top_k, "top_p": s.top_p, "behaviour_temperature": behaviour}
  require(
    not method.on_policy or drawn_by == {"top_k": 0, "top_p": 1, "behaviour_temperature": 1},
    "sampling",
    "top_k = 0, top_p = 1 and behaviour_temperature = 1, because "
    f"{a.name} follows the gradient of the distribution that it samples from",
    drawn_by, "Use sampling.temperature to sharpen that distribution instead.",
  )


# By job: the defaults of its fields, and its checks.
JOBS = {
  "train": (fields.train, _check_train),
  "fit": (fields.fit, _check_fit),
  "arena": (fields.arena, _check_arena),
  "collect": (fields.collect, _check_collect),
  "compare": (fields.compare, _check_compare),
  "sample": (fields.sample, _check_sample),
}

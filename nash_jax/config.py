"""Configs: the fields of a run, and every check on them before anything heavy loads."""

import dataclasses
import difflib
import importlib.util
import math
import os
import pathlib
from typing import Any

from ml_collections import ConfigDict

ASSETS = pathlib.Path(__file__).parent / "assets"
DTYPES = ("float32", "bfloat16", "float16")
JUDGES = ("gemma", "gemma_text", "bradley_terry", "population", "table", "table_reward", "http")
SCALAR = ("bradley_terry", "table_reward")  # judges whose verdicts hold rewards
OPTIMIZERS = ("adamw", "adafactor", "sgd")
# Groups whose entries have names of the user's own.
OPEN = ("changes", "policies", "judges", "sources")
SCHEDULES = ("constant", "linear", "cosine")


def model() -> ConfigDict:
  """A policy, judge or reward model: architecture, weights, tokenizer."""
  return ConfigDict({
    "preset": "stories",
    # Single fields of the architecture to replace, such as {"num_embed": 256}.
    "changes": ConfigDict(),
    # A weights file, a run's workdir ("runs/x", "runs/x@target"), or "" for random weights.
    "weights": "",
    "tokenizer": "assets:stories/tokenizer.model",
    "template": "plain",
    "dtype": "float32",  # of compute; the master parameters are float32
    "remat": False,
    # Rank of the adapters that train and fit train instead of the parameters, times alpha / rank;
    # 0 for none.
    "lora": {"rank": 0, "alpha": 32.0},
    "logit_chunk": 32,  # response columns whose logits exist at one time
  })  # fmt: skip


def optimizer(**changes) -> ConfigDict:
  """An optax optimiser with schedule and clipping."""
  fields = {
    "name": "adamw",
    "learning_rate": 1e-4,
    "schedule": "constant",
    "warmup_steps": 0,
    "final_fraction": 0.1,  # of the learning rate, where linear and cosine end
    "b1": 0.9,
    "b2": 0.99,
    "eps": 1e-8,
    # Weight decay pulls to zero, not to the reference.
    "weight_decay": 0.0,
    "clip_norm": 1.0,
    "micro_batches": 1,
  }
  return ConfigDict({**fields, **changes})


def _run(**fields) -> ConfigDict:
  return ConfigDict({
    "seed": 0,
    "steps": 100,
    "mesh": {"data": -1, "fsdp": 1, "tensor": 1},  # -1: all devices that are left
    "checkpoint": {"every": 50, "keep": 2, "allow": ()},
    "profile": False,
    **fields,
  })  # fmt: skip


def train() -> ConfigDict:
  """The fields of an online run with their defaults: NashMP on the bundled storyteller."""
  policy = model()
  policy.weights = "assets:stories/policy.safetensors"
  judge_model = model()
  judge_model.weights = "assets:stories/judge.safetensors"
  return _run(
    model=policy,
    prompts={
      "task": "stories",
      "path": "assets:stories/prompts.jsonl",
      "held_out": 96,
      "held_out_path": "",
      "overflow": "drop",
      "max_tokens": 32,
      "batch_size": 32,
    },
    sampling={
      "max_tokens": 64,
      "temperature": 1.0,
      "top_k": 0,
      "top_p": 1.0,
      "tokens": (),  # the only ids that may be drawn; () for every piece
    },
    algorithm={
      "name": "nash_mp",
      "beta": 0.1,
      "eta": 1.0,  # beta / eta is the weight of KL to the target
      "kappa": 0.1,
      "kappa_schedule": "constant",  # or "harmonic": kappa_offset / (k + kappa_offset)
      "kappa_offset": 10.0,
      "target_update": "ema",  # or "periodic": a copy every target_period steps
      "target_period": 10,
      "step": 5.0,  # s of mpo, inpo and sppo: at most 1 / beta
      "mixture": 0.25,  # weight of the reference in nash_md and ipo_md
      "reference_period": 0,  # the reference becomes the policy every so many steps; 0: never
      "samples": 2,  # responses a prompt in all: the opponent draws half of them, if there is one
      "behaviour_temperature": 1.0,  # times sampling's: of y's draws, where a loss allows others
      "labels": "soft",  # P(y beats y') itself, or "sampled": 0 or 1 drawn with it
      "centre_log_ratios": False,
      "reward_to_go": False,  # a token's KL coefficient counts its own and later tokens alone
    },
    optimizer=optimizer(),
    judge={
      "name": "gemma",
      "model": judge_model,
      "template": "stories",  # a name, or a text file with {prompt}, {a} and {b}
      "answers": ("A", "B"),  # the pieces that say "the first" and "the second"
      "max_tokens": 0,  # of the judge's whole prompt; 0: as wide as the longest could be
      "micro_batches": 1,  # parts of a batch that the Gemma judge sees one after another
      "mesh": {"data": 0, "fsdp": 0, "tensor": 0},  # 0: as in `mesh`
      # Of the judge "http", in the arena: an OpenAI-compatible server's chat completions.
      "http": {
        "url": "http://127.0.0.1:8000/v1/chat/completions",
        "model": "",
        "timeout": 60.0,  # seconds a request
        "retries": 4,
        "backoff": 1.0,  # seconds before the first retry, doubled before each further one
        "workers": 8,  # requests at a time
      },
      "table": "",  # of the table judge: .npy [X A A], contexts by prompt index
      # A response's first tokens are its action: digits, token - first_token, in base table_tokens;
      # 0 for one token an action.
      "first_token": 6,
      "table_tokens": 0,
    },
    # exact: score the policy over every response, in a game of the table judge that allows it.
    evaluation={"every": 25, "prompts": 64, "texts": 4, "exact": False},
  )


def fit() -> ConfigDict:
  """The fields of a supervised run with their defaults."""
  return _run(
    model=model(),
    loss="sft",  # next token; "judge": pairwise cross-entropy; "reward": Bradley-Terry
    data={
      "task": "text",
      "path": "",
      "held_out": 600,
      "held_out_path": "",
      "overflow": "cut",
      "max_tokens": 129,  # of a text's windows, of prompt + response, of a preference's prompt
      "max_response_tokens": 64,  # of preferences
      "batch_size": 32,
    },
    template="stories",  # of the pairwise judge
    export="",  # where the best weights go, as .safetensors in export_dtype
    export_dtype="float16",
    optimizer=optimizer(learning_rate=3e-3, schedule="cosine", warmup_steps=100),
    evaluation={"every": 500, "batches": 1000},
  )


def arena() -> ConfigDict:
  """The fields of an arena with their defaults: the bundled storyteller and its best of 4."""
  online = train()
  base = online.model.weights
  online.model.weights = ""  # each policy names its own
  online.prompts.batch_size = 16
  return ConfigDict({
    "seed": 0,
    "model": online.model,  # the architecture and tokenizer of every policy
    "prompts": online.prompts,  # the held-out part is played on
    "sampling": online.sampling,
    # Weights: a file, or a run's "runs/x", "runs/x@target", "runs/x@params:50", "…:best".
    "policies": {
      "base": {"weights": base, "best_of": 1},
      "best_of_4": {"weights": base, "best_of": 4},
    },
    "base": "base",  # the policy that KL, length and distinct bigrams are compared with
    "judges": {"judge": online.judge, "population": {**online.judge, "name": "population"}},
    "select_judge": "judge",  # picks the best of n
    "samples": 2,  # of each policy to a prompt
    "max_prompts": 0,  # 0: every held-out prompt
    "resamples": 2000,  # of the bootstrap
    "texts": 3,  # prompts shown with every policy's continuation
  })  # fmt: skip


def collect() -> ConfigDict:
  """The fields of a collection of votes, with their defaults."""
  online = train()
  online.prompts.batch_size = 32
  return ConfigDict({
    "seed": 0,
    "steps": 100,  # batches of prompts
    "model": online.model,
    "prompts": online.prompts,
    "sampling": {"max_tokens": online.sampling.max_tokens, "samples": 4},  # all pairs of these
    # Who responds, in turn: {"weights": as a policy's of the arena, "temperature": of its samples}.
    "sources": {"base": {"weights": online.model.weights, "temperature": 1.0}},
    "judge": {**online.judge, "name": "population"},
  })  # fmt: skip


def compare(base: ConfigDict | None = None, runs=(), **fields) -> ConfigDict:
  """The fields of a comparison or an ablation, with their defaults.

  Args:
    base: the config that all runs share, of train().
    runs: what each changes, {"algorithm.name": "egpo", "algorithm.samples": 3}; "label" names it.
  """
  contest = arena()
  contest.judges, contest.policies = {}, {}
  return ConfigDict({
    "base": base or train(),
    "runs": tuple(runs),
    "learning_rates": (),  # tried with tuning_seed, the best taken; () for the base's own
    "tuning_seed": 100,
    "seeds": 3,
    "kinds": ("network",),  # of policy; and "tabular", where evaluation.exact
    "arena": contest,  # of all runs and the reference; none without judges
    **fields,
  })  # fmt: skip


def sample() -> ConfigDict:
  """The fields of sampling from a policy at a prompt."""
  online = train()
  return ConfigDict({
    "seed": 0,
    "model": online.model,
    "sampling": {**online.sampling, "max_tokens": 128, "samples": 1},
    "prompt": "",  # "": ask for prompts until an empty line
    "file": "",  # prompts of a file, one a line, instead
    # λ: the law is logits (1 - λ)·reference + λ·policy, so 1 is the policy's and 0 the reference's.
    "realign": 1.0,
    "reference": online.model.weights,  # as model.weights; read where λ is not 1
  })


def load(file: str, beside: str):
  """Returns the module of a config file that lies beside another, for configs built on others."""
  path = pathlib.Path(beside).parent / file
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def path(name: str) -> str:
  """Expands `assets:` to the folder of bundled files."""
  return str(ASSETS / name.removeprefix("assets:")) if name.startswith("assets:") else name


def choose(what: str, got: str, choices) -> None:
  """Raises ValueError, listing the choices, unless `got` is one of them."""
  if got not in choices:
    near = difflib.get_close_matches(str(got), list(choices), 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{what}: got {got!r}, expected one of {', '.join(sorted(choices))}{hint}")


def check(good: bool, what: str, expected: str, got: Any, fix: str) -> None:
  """Raises ValueError that says what, expected, got and how to fix it, unless `good`."""
  if not good:
    raise ValueError(f"{what}: expected {expected}, got {got!r}. {fix}")


def _unknown_fields(config, default, prefix=""):
  for name in config:
    if name not in default:
      near = difflib.get_close_matches(name, list(default), 1)
      hint = f"Did you mean {prefix}{near[0]}? " if near else ""
      raise ValueError(
        f"config field {prefix}{name} is unknown. {hint}"
        f"Fields here: {', '.join(sorted(default))}"
      )
    if isinstance(default[name], ConfigDict) and name not in OPEN:
      check(
        isinstance(config[name], ConfigDict), f"config field {prefix}{name}", "a group of fields",
        config[name], f"Set {prefix}{name}.<field> instead.",
      )  # fmt: skip
      _unknown_fields(config[name], default[name], f"{prefix}{name}.")
  missing = [name for name in default if name not in config]
  if missing:
    raise ValueError(f"config field {prefix}{missing[0]} is missing; start from nash_jax.config")


def _check_model(config, where):
  from nash_jax.models import gemma

  gemma.preset(config.preset, **config.changes)
  choose(f"{where}.dtype", config.dtype, DTYPES)
  check(config.lora.rank >= 0, f"{where}.lora.rank", "0 (all parameters are trained) or a rank",
        config.lora.rank, "Try 16.")  # fmt: skip
  check(config.lora.alpha > 0, f"{where}.lora.alpha", "a positive number", config.lora.alpha,
        "Try 32.")  # fmt: skip
  choose(f"{where}.template", config.template, ("plain", "gemma"))
  for what in ("tokenizer", "weights"):
    name = path(config[what]).split("@")[0]
    check(
      (what == "weights" and not name) or os.path.exists(name), f"{where}.{what}",
      "a file that exists", name,
      "Give a local path, or assets:<file> for a bundled one; docs/weights.md: how to get Gemma's.",
    )  # fmt: skip


def _check_steps(config, batch_size, batch_field, devices=None) -> int:
  """Returns over how many of the devices, by default those there are, a batch is split."""
  check(config.steps > 0, "steps", "a positive number", config.steps, "Set --config.steps.")
  for name in ("checkpoint", "evaluation"):
    every = config[name].every
    check(every > 0, f"{name}.every", "a positive number of steps", every, "Try 50.")
  choose("optimizer.name", config.optimizer.name, OPTIMIZERS)
  choose("optimizer.schedule", config.optimizer.schedule, SCHEDULES)
  micro = config.optimizer.micro_batches
  check(batch_size > 0, batch_field, "a positive number", batch_size, "Try 32.")
  check(micro > 0 and batch_size % micro == 0, "optimizer.micro_batches",
        f"a divisor of {batch_field} = {batch_size}", micro, "Change one of the two.")  # fmt: skip
  import jax

  mesh = resolve_mesh(config.mesh, devices or jax.device_count())
  rows = mesh["data"] * mesh["fsdp"]
  check(
    (batch_size // micro) % rows == 0, batch_field,
    f"micro-batches that divide over data x fsdp = {rows} devices", batch_size // micro,
    f"Use a {batch_field} that is a multiple of {rows * micro}.",
  )  # fmt: skip
  return rows


def _check_sampling(s):
  check(s.temperature > 0, "sampling.temperature", "a positive number", s.temperature, "Try 1.")
  check(s.max_tokens > 0, "sampling.max_tokens", "a positive number", s.max_tokens, "Try 64.")
  check(s.top_k >= 0, "sampling.top_k", "0 (off) or a number of tokens", s.top_k, "Set 0.")
  check(0 < s.top_p <= 1, "sampling.top_p", "a probability in (0, 1]", s.top_p, "Set 1.")
  check(s.top_p == 1 or s.top_k > 0, "sampling.top_k", "a number of tokens where top_p < 1",
        s.top_k, "top-p works within the top k: try top_k=64.")  # fmt: skip


def _check_judge(config, where, remote=False):
  from nash_jax.judges import template

  choose(f"{where}.name", config.name, JUDGES)
  if config.name in ("gemma", "gemma_text", "bradley_terry"):
    _check_model(config.model, f"{where}.model")
    check(config.model.lora.rank == 0, f"{where}.model.lora.rank", "0: judges are plain models",
          config.model.lora.rank, "One fitted with adapters is exported merged.")  # fmt: skip
  if config.name == "http":
    _check_http(config, where, remote)
  if config.name.startswith("gemma") or config.name == "http":
    template.read(config.template)
    check(len({*config.answers}) == 2 == len(config.answers), f"{where}.answers",
          "two different pieces", config.answers, "Try ('A', 'B').")  # fmt: skip
    check(config.micro_batches > 0, f"{where}.micro_batches", "a positive number",
          config.micro_batches, "Set 1.")  # fmt: skip
    check(config.max_tokens >= (config.name == "gemma_text"), f"{where}.max_tokens",
          "a budget in the judge's tokens; 0, for none, is gemma's alone", config.max_tokens,
          "Try 2048.")  # fmt: skip


def _check_http(config, where, remote):
  h = config.http
  check(remote, f"{where}.name", "a judge on this machine's devices", config.name,
        "http answers in the arena alone: training asks too often.")  # fmt: skip
  check(config.template != "stories", f"{where}.template", "one that asks in words",
        config.template, "Set gemma, or a text file of yours.")  # fmt: skip
  check(h.url.startswith(("http://", "https://")), f"{where}.http.url", "an http(s) address", h.url,
        "It ends in /v1/chat/completions, mostly.")  # fmt: skip
  check(h.model != "", f"{where}.http.model", "a name the server knows", h.model, "Set it.")
  for name, least in (("timeout", 0.001), ("retries", 0), ("backoff", 0), ("workers", 1)):
    check(h[name] >= least, f"{where}.http.{name}", f"at least {least}", h[name], "Raise it.")


def _check_arena(config):
  default = arena()
  for group, like in (("policies", default.policies.base), ("judges", default.judges.judge)):
    check(len(config[group]) > 0, group, "at least one", [], f"Set --config.{group}.<name>.")
    for name, entry in config[group].items():
      _unknown_fields(entry, like, f"{group}.{name}.")
  for name, judge in config.judges.items():
    _check_judge(judge, f"judges.{name}", remote=True)
  for name, policy in config.policies.items():
    where, (file, _, part) = f"policies.{name}", path(policy.weights).partition("@")
    check(file and os.path.exists(file), f"{where}.weights", "a weights file or a run's workdir",
          policy.weights, "Give runs/x, runs/x@target, runs/x@params:50 or a file.")  # fmt: skip
    choose(f"{where}.weights, after @", part.split(":")[0] or "params", ("params", "target"))
    step = part.partition(":")[2]
    check(step in ("", "best") or step.isdigit(), f"{where}.weights, after :",
          "a step or best", step, "Leave it out for the newest checkpoint.")  # fmt: skip
    check(policy.best_of >= 1, f"{where}.best_of", "1, or n of best-of-n", policy.best_of,
          "Set 1.")  # fmt: skip
  choose("base", config.base, config.policies)
  check(config.policies[config.base].best_of == 1, "base", "a policy with best_of = 1",
        config.base, "The reference must be a law whose log-probabilities are known.")  # fmt: skip
  choose("select_judge", config.select_judge, config.judges)
  for name, least in (("samples", 2), ("resamples", 1), ("max_prompts", 0), ("texts", 0)):
    check(config[name] >= least, name, f"at least {least}", config[name], f"Set {least} or more.")
  size = config.prompts.batch_size
  check(size > 0, "prompts.batch_size", "a positive number", size, "Try 16.")
  choose("prompts.overflow", config.prompts.overflow, ("drop", "cut"))
  _check_sampling(config.sampling)


def resolve_mesh(mesh, devices: int, field: str = "mesh") -> dict[str, int]:
  """Returns the mesh's sizes with -1 filled in; ValueError where they do not make `devices`."""
  sizes = dict(mesh)
  free = [name for name, size in sizes.items() if size == -1]
  known = math.prod(size for size in sizes.values() if size != -1)
  check(len(free) <= 1 and all(s == -1 or s > 0 for s in sizes.values()), field,
        "positive sizes and at most one -1", sizes, f"Fix --config.{field}.")  # fmt: skip
  if free:
    sizes[free[0]] = devices // known if devices % known == 0 else 0
  check(
    math.prod(sizes.values()) == devices, field, f"sizes whose product is {devices} devices",
    dict(mesh), f"For example data={devices}, fsdp=1, tensor=1.",
  )  # fmt: skip
  return sizes


def judge_mesh(config, devices: int) -> dict[str, int]:
  """Returns the sizes of the mesh on which an online run's judge is laid out."""
  own = resolve_mesh(config.mesh, devices)
  sizes = {axis: size or own[axis] for axis, size in config.judge.mesh.items()}
  check(config.judge.name != "gemma_text" or sizes == own, "judge.mesh",
        f"the policy's, {own}, for gemma_text", sizes, "Set its sizes to 0.")  # fmt: skip
  return resolve_mesh(sizes, devices, "judge.mesh")


def _check_fit(config):
  from nash_jax.judges import template

  choose("loss", config.loss, ("sft", "judge", "reward"))
  if config.loss == "judge":
    template.read(config.template)
  choose("export_dtype", config.export_dtype, DTYPES)
  _check_steps(config, config.data.batch_size, "data.batch_size")


def _check_collect(config):
  check(config.steps > 0, "steps", "a positive number", config.steps, "Set --config.steps.")
  check(config.sampling.samples >= 2, "sampling.samples", "at least two responses a prompt",
        config.sampling.samples, "A comparison needs two.")  # fmt: skip
  _check_judge(config.judge, "judge")


def _check_compare(config):
  check(len(config.runs) > 0, "runs", "at least one", [], "Give each run's changes.")
  check(config.seeds > 0, "seeds", "a positive number", config.seeds, "Try 3.")
  resolve(config.base)
  for kind in config.kinds:
    choose("kinds", kind, ("network", "tabular"))
    check(kind == "network" or config.base.evaluation.exact, "kinds",
          "network alone, where responses are texts", kind, "Leave tabular out.")  # fmt: skip


def _check_sample(config):
  _check_sampling(config.sampling)
  strength = config.realign
  check(0 <= strength < math.inf, "realign", "a number of at least 0, 1 for the policy itself",
        strength, "Try 1.5.")  # fmt: skip
  reference = path(config.reference).split("@")[0]
  check(
    strength == 1 or (reference and os.path.exists(reference)), "reference",
    "a weights file or a run's workdir", config.reference,
    "Give what the policy was trained from, such as assets:stories/policy.safetensors.",
  )  # fmt: skip


def _check_train(config, devices=None):
  import jax

  from nash_jax.objectives import algorithms

  devices = devices or jax.device_count()
  row = algorithms.row(config.algorithm.name)
  a, s = config.algorithm, config.sampling
  check(a.beta > 0, "algorithm.beta", "a positive KL weight", a.beta, "Try 0.1.")
  check(a.eta > 0, "algorithm.eta", "a positive prox step", a.eta, "Try 1.0.")
  check(0 <= a.kappa <= 1, "algorithm.kappa", "a rate in [0, 1]", a.kappa, "Try 0.1.")
  check(a.target_period > 0, "algorithm.target_period", "a positive number of steps",
        a.target_period, "Try 10.")  # fmt: skip
  check(a.kappa_offset > 0, "algorithm.kappa_offset", "a positive number", a.kappa_offset,
        "10 gives 10 / (k + 10).")  # fmt: skip
  choose("algorithm.kappa_schedule", a.kappa_schedule, ("constant", "harmonic"))
  choose("algorithm.target_update", a.target_update, ("ema", "periodic"))
  choose("algorithm.labels", a.labels, ("soft", "sampled"))
  check(0 <= a.mixture <= 1, "algorithm.mixture", "a weight in [0, 1]", a.mixture, "Try 0.25.")
  check(0 < a.step <= 1 / a.beta, "algorithm.step", f"in (0, 1 / beta = {1 / a.beta:g}]", a.step,
        "Lower it, or algorithm.beta.")  # fmt: skip
  check(a.reference_period >= 0, "algorithm.reference_period", "0 (never) or a number of steps",
        a.reference_period, "Set 0.")  # fmt: skip
  for field, least in row.least.items():
    check(a[field] >= least, f"algorithm.{field}", f"at least {least} for {a.name}", a[field],
          f"Set {least} or more.")  # fmt: skip
  check(
    not (a.centre_log_ratios and row.samples(a)[0] < 2), "algorithm.samples",
    f"two or more of {a.name}'s own, for centre_log_ratios takes the mean of the others",
    a.samples, "Set 4, or leave centre_log_ratios out.",
  )  # fmt: skip
  check(
    not row.scores or config.judge.name in SCALAR, "judge.name",
    f"a judge with scalar rewards, {' or '.join(SCALAR)}, for {a.name}", config.judge.name,
    "Fit one with `nash-jax fit --config.loss=reward`.",
  )  # fmt: skip
  behaviour = a.behaviour_temperature
  check(behaviour > 0, "algorithm.behaviour_temperature", "a positive number", behaviour, "Try 1.")
  law = {"top_k": s.top_k, "top_p": s.top_p, "behaviour_temperature": behaviour}
  check(
    not row.on_policy or law == {"top_k": 0, "top_p": 1, "behaviour_temperature": 1}, "sampling",
    "top_k = 0, top_p = 1 and behaviour_temperature = 1, for "
    f"{a.name} follows the gradient of the law it samples from",
    law, "Use sampling.temperature to sharpen the law instead.",
  )  # fmt: skip
  _check_sampling(s)
  choose("prompts.overflow", config.prompts.overflow, ("drop", "cut"))
  _check_judge(config.judge, "judge")
  rows = _check_steps(config, config.prompts.batch_size, "prompts.batch_size", devices)
  judge_mesh(config, devices)
  check(
    config.prompts.batch_size % (rows * config.judge.micro_batches) == 0, "judge.micro_batches",
    f"a divisor of prompts.batch_size / {rows} devices", config.judge.micro_batches, "Lower it.",
  )  # fmt: skip
  evaluated = config.evaluation.prompts
  check(evaluated > 0 and evaluated % rows == 0, "evaluation.prompts",
        f"a multiple of data x fsdp = {rows} devices", evaluated, f"Try {64 * rows}.")  # fmt: skip


# The field by which a job's config is known, its defaults and its checks.
_KINDS = {
  "algorithm": (train, _check_train),
  "loss": (fit, _check_fit),
  "policies": (arena, _check_arena),
  "sources": (collect, _check_collect),
  "runs": (compare, _check_compare),
  "file": (sample, _check_sample),
}


def resolve(config: ConfigDict, devices: int | None = None) -> ConfigDict:
  """Returns a frozen copy of a run's config, checked.

  Args:
    devices: how many an online run is to have, where these are not the ones that there are.

  Raises:
    ValueError: what, expected, got and how to fix it, before any weights load.
  """
  kinds = [kind for field, kind in _KINDS.items() if field in config]
  if len(kinds) != 1:
    raise ValueError(
      "config: expected the fields of one job, as from nash_jax.config's train(), fit(), arena(),"
      f" collect(), compare() or sample(); got {', '.join(sorted(config))}"
    )
  default, check_fields = kinds[0]
  _unknown_fields(config, default())
  config = config.copy_and_resolve_references()
  if "model" in config:
    _check_model(config.model, "model")
  check_fields(config, *([devices] if devices else []))
  return config.lock()


def describe(config: ConfigDict) -> dict:
  """Returns the config as plain JSON types, for run records."""
  def plain(value):
    if isinstance(value, ConfigDict):
      return {name: plain(value[name]) for name in value}
    if isinstance(value, (list, tuple)):
      return [plain(item) for item in value]
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value

  return plain(config)

"""Checks on a config that need no data, weights or tokenizer."""

import functools
import importlib.util
import itertools
import math
import numbers
import operator
import os
import sys
from collections.abc import Collection, Iterable
from typing import Any

import jax
from absl import logging
from ml_collections import ConfigDict

from nash_jax.config import comparison, fields, files
from nash_jax.config.unread import unread, unread_and_set
from nash_jax.data import judge_template
from nash_jax.data.answers import BENCHMARKS
from nash_jax.data.chat_template import TEMPLATES
from nash_jax.data.preferences import TASKS
from nash_jax.judges import JUDGES, MODELS, SCALAR, chat, own, table
from nash_jax.models import gemma, sharding
from nash_jax.objectives import algorithms
from nash_jax.policy import parse_weights
from nash_jax.validation import asset_path, did_you_mean, one_of, printable, require

_PIP = f"{sys.executable} -m pip install"
_WANDB = ("the package wandb to be installed", f"Install it: {_PIP} wandb")
EXACT_BETA = 1e-4  # the smallest β for which float64 resolves the equilibrium


def resolve(config: ConfigDict, job: str, devices: int | None = None) -> ConfigDict:
  """See config.resolve."""
  job, is_new = _job(config, job), not config.is_locked
  config = config.copy_and_resolve_references().unlock()
  config.job = job
  _check_fields(config, fields.DECLARED[job]())
  as_given = config.copy_and_resolve_references()
  CHECKS[job](config, *([devices] if devices else []))
  if job != "compare":  # its runs may create some of the files it reads
    files.require_present(config, job)
  if is_new and (unused := unread_and_set(as_given, job)):
    logging.warning("set, but not read by this run: %s", ", ".join(unused))
  return config.lock()


def refuse_unread(config: ConfigDict, job: str, given: Collection[str]) -> None:
  """See config.refuse_unread."""
  config = config.copy_and_resolve_references().unlock()
  _check_fields(config, fields.DECLARED[job]())
  reasons = unread(config, job)
  for field in given:
    reason, fix = reasons.get(field), "Leave it out, or choose what reads it."
    value = functools.reduce(operator.getitem, field.split("."), config)
    require(reason is None, field, f"no value, because {reason} does not read it", value, fix)


def _job(config, expected: str) -> str:
  """Returns the name of a config's job, or the expected job if the config names none."""
  got = config.job if "job" in config else expected
  jobs, advice = f"one of {', '.join(CHECKS)}", "Start from nash_jax.config."
  require(got in CHECKS, "config.job", jobs, got, advice)
  advice = f"Run it with `nash-jax {got}`, or start from nash_jax.config.{expected}()."
  require(expected in ("", got), "config.job", expected, got, advice)
  return got


def _check_fields(group: ConfigDict, declared: ConfigDict, prefix: str = "") -> None:
  """Checks each field against its declaration; numbers become Python numbers, and -0 becomes 0."""
  for name in group:
    if name not in declared:
      choices = ", ".join(sorted(declared)) + did_you_mean(name, declared)
      raise ValueError(f"config field {prefix}{name} is unknown; fields here: {choices}")
    value, field, path = group[name], declared[name], f"{prefix}{name}"
    if isinstance(field, ConfigDict):
      advice = f"Set {path}.<field> instead."
      is_group = isinstance(value, ConfigDict)
      require(is_group, f"config field {path}", "a group of fields", value, advice)
      if name == "changes":
        _check_changes(value, path)
      elif name == "realign":
        for other in value:
          value[other] = _checked(fields.STRENGTH, value[other], f"{path}.{printable(other)}")
      elif name in fields.ENTRIES:
        for entry in value:
          named = isinstance(entry, str) and entry != ""
          require(named, f"{path}, a name", "text of at least one character", entry, "Rename it.")
          entry_path, is_group = f"{path}.{printable(entry)}", isinstance(value[entry], ConfigDict)
          require(is_group, f"config field {entry_path}", "a group of fields", value[entry], advice)
          if name == "policies":
            fields.complete_policy(value[entry])
          _check_fields(value[entry], fields.ENTRIES[name](), f"{entry_path}.")
      else:
        _check_fields(value, field, f"{path}.")
    else:
      checked = _checked(field, value, path)
      if checked is not value:
        with group.ignore_type():
          group[name] = checked
  missing = [name for name in declared if name not in group]
  if missing:
    raise ValueError(f"config field {prefix}{missing[0]} is missing; start from nash_jax.config")


def _checked(field: Any, value: Any, path: str) -> Any:
  """Returns the value of a declared field; raises ValueError if the field may not hold it."""
  if isinstance(field, fields.Choice):
    require(not field.why or value in field.choices, path, field.describe(), value, field.why)
    one_of(path, value, field.choices)
  elif isinstance(field, fields.Number):
    if not field.many:
      return _checked_number(field, value, path)
    require(isinstance(value, tuple | list), path, field.describe(), value, "Give a tuple.")
    return tuple(_checked_number(field, item, path) for item in value)
  else:
    kinds = (tuple, list) if isinstance(field, tuple) else type(field)
    expected = {bool: "True or False", str: "text", tuple: "a tuple"}[type(field)]
    require(isinstance(value, kinds), path, expected, value, f"The default is {field!r}.")
  return value


def _checked_number(field: fields.Number, value: Any, path: str) -> Any:
  kind: type = numbers.Integral if field.kind is int else numbers.Real
  is_number = isinstance(value, kind) and not isinstance(value, bool)
  good = field.holds(value) if is_number else False
  special = (value is None or is_number) and value in field.special
  advice = f"The default is {field.default}."
  require(good or special, path, field.describe(), value, advice)
  if value is None or (type(value) is field.kind and repr(value) != "-0.0"):
    return value
  return field.kind(value) + 0


def _check_changes(changes: ConfigDict, path: str) -> None:
  for name in changes:
    one_of(path, name, [*fields.CHANGES, "attention_types"])
    if name in fields.CHANGES:
      changes[name] = _checked(fields.CHANGES[name], changes[name], f"{path}.{name}")
    else:
      kinds = (gemma.LOCAL, gemma.GLOBAL)
      good = isinstance(changes[name], tuple) and {*changes[name]} <= {*kinds}
      expected = f"a tuple of {kinds}, one per layer"
      fix = "Set num_layers to keep the first layers."
      require(good and len(changes[name]) > 0, f"{path}.{name}", expected, changes[name], fix)


class _Checker:
  """Checks fields of a group against each other; errors give each field's path in the config."""

  def __init__(self, group: ConfigDict, path: str = ""):
    self.group, self.prefix = group, f"{path}." if path else ""

  def __call__(self, field: str, good: bool, expected: str, fix: str) -> None:
    require(good, self.prefix + field, expected, self.value(field), fix)

  def value(self, field: str) -> Any:
    """Returns the value of a field, such as "lora.rank", counted from the group."""
    return functools.reduce(operator.getitem, field.split("."), self.group)

  def one_of(self, field: str, choices: Collection[str]) -> None:
    one_of(self.prefix + field, self.value(field), choices)


def _check_model(model, path: str) -> None:
  check, layers = _Checker(model, path), model.changes.get("num_layers", 1)
  gemma.check_preset(model.preset, f"{path}.preset")
  full = gemma.preset(model.preset)
  check("changes", layers <= full.num_layers, f"at most {full.num_layers} layers", "Lower it.")
  config = gemma.preset(model.preset, **model.changes)
  heads, expected = config.num_heads % config.num_kv_heads == 0, "num_kv_heads to divide num_heads"
  check("changes", heads, expected, "Change either.")
  check("changes", config.head_dim % 2 == 0, "an even head_dim", "Change it.")
  _check_kinds(config, check)
  check.one_of("template", TEMPLATES)
  has_rank, fix = model.lora.rank > 0, "Set lora.rank to that of the adapters, or more."
  check("lora.init", has_rank or not model.lora.init, "none if lora.rank = 0", fix)


# Fields that only blocks with value_norm have.
_OF_VALUE_NORM = (
  "global_key_size", "num_global_kv_heads", "k_eq_v_global", "per_layer_input_dim",
  "num_kv_shared_layers", "override_kv_shared_ffw_hidden",
)  # fmt: skip


def _check_kinds(config: gemma.GemmaConfig, check: _Checker) -> None:
  """Checks what differs between kinds of layers."""
  own = [name for name in _OF_VALUE_NORM if getattr(config, name)]
  if config.global_rope_proportion != 1:
    own.append("global_rope_proportion")
  named = f"value_norm with {', '.join(own)}"
  check("changes", config.value_norm or not own, named, "Start from a preset of Gemma 4.")
  scaled = not config.use_qk_norm or config.query_pre_attn_scalar is not None
  expected = "use_qk_norm and no query_pre_attn_scalar with value_norm"
  check("changes", not (config.value_norm and scaled), expected, "Leave both as the preset's.")
  heads, size = config.kv_shape(gemma.GLOBAL)
  divides, expected = config.num_heads % heads == 0, "num_global_kv_heads to divide num_heads"
  check("changes", divides, expected, "Change either.")
  check("changes", size % 2 == 0, "an even global_key_size", "Change it.")
  if config.num_kv_shared_layers:
    period, repeats, rest = gemma.pattern(config)
    whole = repeats > 0 and rest == 0 and config.num_kv_shared_layers % period == 0
    expected = f"whole patterns of {period} layers before and among num_kv_shared_layers"
    check("changes", whole, expected, "Set num_layers and num_kv_shared_layers together.")


def _is_installed(package: str) -> bool:
  found = importlib.util.find_spec(package)  # a mere folder, such as W&B leaves, has no origin
  return found is not None and found.origin is not None


def _check_steps(config, batch_field: str, devices: int | None = None) -> int:
  """Returns how many devices a batch is split over; `devices` defaults to those of this machine."""
  check = _Checker(config)
  check("tracker", config.tracker == "none" or _is_installed("wandb"), *_WANDB)
  warmup, expected = config.optimizer.warmup_steps, f"at most steps = {config.steps}"
  check("optimizer.warmup_steps", warmup <= config.steps, expected, "Lower it; 0 means no warm-up.")
  batch_size, parts = check.value(batch_field), config.optimizer.micro_batches
  divides, divisor = batch_size % parts == 0, f"a divisor of {batch_field}"
  check("optimizer.micro_batches", divides, f"{divisor} = {batch_size}", "Change one of the two.")
  mesh = sharding.resolve_mesh(config.mesh, devices or jax.device_count())
  split, micro_batch = mesh["data"] * mesh["fsdp"], batch_size // parts
  expected = f"micro-batches that divide over data x fsdp = {split} devices"
  fix = f"Use a {batch_field} that is a multiple of {split * parts}."
  require(micro_batch % split == 0, batch_field, expected, micro_batch, fix)
  return split


def _check_sampling(config) -> None:
  sampling, rows = config.sampling, gemma.preset(config.model.preset, **config.model.changes)
  check, top_k, top_p = _Checker(sampling, "sampling"), sampling.top_k, sampling.top_p
  expected = f"at most the model's {rows.num_embed} rows"
  check("top_k", top_k <= rows.num_embed, expected, "Set 0 for all.")
  expected = "a number of tokens if top_p < 1"
  check("top_k", top_p == 1 or top_k > 0, expected, "top-p selects within top-k: try top_k=64.")
  tokens = sampling.tokens
  check("tokens", len({*tokens}) == len(tokens), "different ids", "Remove duplicates.")
  check("tokens", len(tokens) != 1, "two ids or more to choose from", "() allows every piece.")
  texts = all(isinstance(piece, str) for piece in sampling.markers)
  check("markers", texts, "pieces of the tokenizer", "Try ('<|channel>', '<channel|>').")


def _check_judge(judge, path: str, sampling, remote: bool = False, training: bool = False) -> None:
  check = _Checker(judge, path)
  if own.is_own(judge.name):
    own.find(judge.name, f"{path}.name")
    return
  check.one_of("name", [*JUDGES, own.FORM])
  if not training:
    check("name", judge.name != "none", "a judge", "Only runs that learn from a file need none.")
  if judge.name in ("table", "table_reward") and os.path.exists(asset_path(judge.table)):
    least, got = table.action_tokens(judge), sampling.max_tokens
    expected = f"at least {least}, for an action of {path}.table"
    require(got >= least, "sampling.max_tokens", expected, got, "Raise it.")
  if judge.name in MODELS:
    _check_model(judge.model, f"{path}.model")
    expected, fix = "0, because judges are plain models", "A fit exports its judge merged."
    check("model.lora.rank", judge.model.lora.rank == 0, expected, fix)
  if judge.name == "http":
    _check_http(judge, check, remote)
  if judge.name == "human":
    fix = "Use human in the arena, or in collect with a budget; elsewhere, use a judge fitted to"
    fix += " votes (docs/votes.md)."
    check("name", remote, "a judge that answers at once", fix)
    check("votes", judge.votes != "", "a workdir of `nash-jax vote`", "Set it.")
  if judge.name in ("gemma", "gemma_text", "http"):
    judge_template.read(judge.template)
    texts = all(isinstance(answer, str) for answer in judge.answers)
    distinct = texts and len(judge.answers) == len({*judge.answers}) == 2
    check("answers", distinct, "two different pieces", "Try ('A', 'B').")
    # A server's first token could then begin either answer.
    one, two = judge.answers
    alike = one.startswith(two) or two.startswith(one)
    check(
      "answers",
      judge.name != "http" or not alike,
      "neither to start with the other",
      "Try ('A', 'B').",
    )
    expected = "a limit in the judge's tokens; only gemma accepts 0 (no limit)"
    good = judge.max_tokens > 0 or judge.name != "gemma_text"
    check("max_tokens", good, expected, "Try 2048.")


def _check_http(judge, check: _Checker, remote: bool) -> None:
  fix = "Use http in the arena, or in collect with a budget: training would send too many requests."
  check("name", remote, "a judge on this machine's devices", fix)
  in_words = judge.template != "stories"
  check("template", in_words, "a template that asks in words", "Set gemma, or your own text file.")
  chat.check_url(judge.http.url, f"{check.prefix}http.url")
  chat.read_key()
  check("http.model", judge.http.model != "", "a name the server knows", "Set it.")


def _check_arena(config) -> None:
  check = _Checker(config)
  for group in ("policies", "judges"):
    require(len(config[group]) > 0, group, "at least one", [], f"Set --config.{group}.<name>.")
  _check_model(config.model, "model")
  for name, judge in config.judges.items():
    _check_judge(judge, f"judges.{printable(name)}", config.sampling, remote=True)
  count = config.prompts.held_out
  benchmark = config.prompts.task in BENCHMARKS
  enough = bool(config.prompts.held_out_path) or benchmark or count > 1
  fix = "Set prompts.held_out, or prompts.held_out_path."
  require(enough, "held-out prompts", "at least two, for an interval", count, fix)
  pairs, expected = (config.samples * len(config.policies) > 1, "at least 2 with a single policy")
  check("samples", pairs, expected, "With 1, policies meet each other but none meets itself.")
  check.one_of("base", config.policies)
  single = config.policies[config.base].best_of == 1
  check("base", single, "a policy with best_of = 1", "Best-of-n has no log-probabilities for KL.")
  alone = [n for n, p in config.policies.items() if not (p.outputs or p.realign)]
  for name, policy in config.policies.items():
    if policy.outputs:
      _check_outputs(policy, f"policies.{printable(name)}", config.prompts.task)
    for other in policy.realign:
      one_of(f"policies.{printable(name)}.realign, policies of weights alone", other, alone)
      single = config.policies[other].best_of == 1
      what, fix = f"policies.{printable(other)}.best_of", "Realign the policy that it picks from."
      require(single, what, "1, to realign towards it", config.policies[other].best_of, fix)
  check.one_of("select_judge", config.judges)
  chosen = any(policy.best_of > 1 for policy in config.policies.values())
  good = not chosen or config.judges[config.select_judge].name != "human"
  check("select_judge", good, "a judge that answers at once", "Add another one to judges.")
  _check_sampling(config)


def _check_outputs(policy, path: str, task: str) -> None:
  check, tasks = _Checker(policy, path), " or ".join(BENCHMARKS)
  check("best_of", policy.best_of == 1, "1 with outputs", "Leave it out.")
  check("realign", not policy.realign, "nothing with outputs", "Leave it out.")
  expected = f"prompts.task = {tasks}, whose prompts have keys that answers match"
  fix = "docs/arena.md explains both."
  require(task in BENCHMARKS, f"{path}.outputs", expected, f"prompts.task = {task}", fix)


def judge_mesh_sizes(config, devices: int) -> dict[str, int]:
  """Returns the mesh sizes of an online run's judge."""
  policy_sizes = sharding.resolve_mesh(config.mesh, devices)
  sizes = {axis: size or policy_sizes[axis] for axis, size in config.judge.mesh.items()}
  on_host = config.judge.name == "gemma_text" or own.is_own(config.judge.name)
  good, expected = not on_host or sizes == policy_sizes, f"the policy's, {policy_sizes}"
  expected += f", for {config.judge.name}"
  require(good, "judge.mesh", expected, sizes, "Set its sizes to 0.")
  return sharding.resolve_mesh(sizes, devices, "judge.mesh")


def judged_by_reference(config, mesh: dict[str, int]) -> bool:
  """Returns whether an online run's judge is its reference, which then serves as both in memory.

  Args:
    mesh: the policy's mesh sizes.
  """
  judge, same = config.judge, ("preset", "changes", "weights", "dtype")
  alike = all(judge.model[field] == config.model[field] for field in same)
  laid_out = all(size in (0, mesh[axis]) for axis, size in judge.mesh.items())
  return judge.name == "gemma" and config.model.weights != "" and alike and laid_out


def _check_best(config, export: bool = False) -> None:
  """Checks that some evaluation falls on a checkpoint if the best one is to be exported.

  If other evaluations have no checkpoint, logs which ones can be the best.
  """
  every, save = config.evaluation.every, config.checkpoint.every
  if export:
    expected = f"a divisor or a multiple of checkpoint.every = {save}, to export the best"
    meet = every % save == 0 or save % every == 0 or min(every, save) >= config.steps
    _Checker(config)("evaluation.every", meet, expected, f"Set {save}, or the same value for both.")
  if (scored := math.lcm(every, save)) > every and every < config.steps:
    _say_which_can_be_best(logging.WARNING if export else logging.INFO, every, save, scored)


@functools.cache  # once, whatever the number of runs of a comparison
def _say_which_can_be_best(level: int, every: int, save: int, scored: int) -> None:
  logging.log(
    level,
    "evaluations are every %d steps, checkpoints every %d: the best checkpoint is chosen among"
    " those every %d steps and the last. Set both to the same value to choose among all",
    every, save, scored,
  )  # fmt: skip


# Tasks whose records compare two responses.
_PAIRS = tuple(name for name, (_, responses) in TASKS.items() if len(responses) > 1)


def _check_fit(config) -> None:
  check = _Checker(config)
  _check_model(config.model, "model")
  check.one_of("data.task", TASKS)
  good = (config.data.task in _PAIRS) == (config.loss != "sft")
  tasks = " or ".join(sorted({*TASKS} - {*_PAIRS} if config.loss == "sft" else _PAIRS))
  fix = "Set --config.loss or --config.data.task."
  check("data.task", good, f"{tasks} for loss = {config.loss}", fix)
  if config.loss == "judge":
    judge_template.read(config.template)
  if config.data.task == "text":
    width, expected = config.data.max_tokens, "at least 2, a token and the next one"
    check("data.max_tokens", width > 1, expected, "Try 129.")
  folder = os.path.isdir(asset_path(config.export))
  check("export", not folder, "a file's name, or ''", "Add a name: out/policy.safetensors.")
  _check_steps(config, "data.batch_size")
  if config.data.held_out or config.data.held_out_path:
    _check_best(config, export=config.export != "")


def _check_collect(config) -> None:
  require(len(config.sources) > 0, "sources", "at least one", [], "Set --config.sources.<name>.")
  check = _Checker(config)
  fix = "Set budget, how many labels to buy."
  check("design", config.design == "uniform" or config.budget > 0, "uniform if budget = 0", fix)
  prompts, pairs = config.steps * config.prompts.batch_size, math.comb(config.sampling.samples, 2)
  enough, most = config.design == "odpo", prompts * pairs
  fix = "Raise steps or sampling.samples, or choose odpo, which labels pairs several times."
  expected = f"at most {most}, the pairs of {prompts} prompts"
  check("budget", enough or config.budget <= most, expected, fix)
  _check_model(config.model, "model")
  _check_sampling(config)
  _check_judge(config.judge, "judge", config.sampling, remote=config.budget > 0)
  if config.design != "uniform":
    _check_model(config.features.model, "features.model")
    judge_template.read(config.features.template)


def _check_agreement(config) -> None:
  require(len(config.judges) > 0, "judges", "at least one", [], "Set --config.judges.<name>.")
  _check_model(config.model, "model")
  _Checker(config).one_of("data.task", _PAIRS)
  sampling = ConfigDict({"max_tokens": config.data.max_response_tokens})
  for name, judge in config.judges.items():
    _check_judge(judge, f"judges.{printable(name)}", sampling, remote=True)


def _check_compare(config) -> None:
  require(len(config.runs) > 0, "runs", "at least one", [], "Give each run's changes.")
  check, runs = _Checker(config), comparison.name_runs(config.runs)
  resolve(config.base.copy_and_resolve_references().lock(), "train")
  check("kinds", len(config.kinds) > 0, "at least one", "Set ('network',).")
  for kind in config.kinds:
    one_of("kinds", kind, ("network", "tabular"))
    good = kind == "network" or config.base.evaluation.exact
    require(good, "kinds", "only network, for texts", kind, "Leave tabular out.")
  _check_rates(config)
  resolved, absent = zip(*(_resolve_run(config, run) for run in runs), strict=True)
  configs = zip(runs, zip(resolved, absent, strict=True), strict=True)
  for (one, first), (two, second) in itertools.combinations(configs, 2):
    what = f"runs {printable(one.name)!r} and {printable(two.name)!r}"
    fix = "Remove one. A label does not change a run, nor does a value that the base already has."
    require(first != second, what, "runs that differ", "one config", fix)
  if config.arena.judges:
    _check_arena_of_runs(config, runs, resolved)


def _check_rates(config) -> None:
  check, rates = _Checker(config), tuple(config.learning_rates)
  distinct = len({*rates}) == len(rates)
  check("learning_rates", distinct, "different numbers", "Remove duplicates.")
  for rate in rates:
    for steps in {0, config.tuning_steps}:
      resolve(comparison.run_config(config.base, {}, rate, config.tuning_seed, steps), "train")
  exact = config.tuning_metric != "gap" or config.base.evaluation.exact
  check("tuning_metric", exact, "regularised, unless base.evaluation.exact", "Change either.")
  own = len(rates) < 2 or config.tuning_seed not in range(config.seeds)
  expected = f"a seed outside 0 to {config.seeds - 1}, because its runs choose the rate"
  check("tuning_seed", own, expected, "Set 100.")


def _resolve_run(config, run: comparison.Run) -> tuple[ConfigDict, dict[str, str]]:
  """Returns the checked config of a run of this comparison, and the files it lacks.

  Those files may not exist yet; they are checked before the first run starts.
  """
  taken = {"job": "A comparison has runs of train", "seed": "`seeds` and `tuning_seed` set it"}
  if config.learning_rates:
    taken["optimizer.learning_rate"] = "`learning_rates` sets it; empty that to set it here"
  try:
    for field, reason in taken.items():
      require(field not in run.changes, field, "no change", run.changes.get(field), f"{reason}.")
    absent = {field: value for field, value in run.changes.items() if _is_absent(field, value)}
    changes = {field: value for field, value in run.changes.items() if field not in absent}
    if "pairs.path" in absent:  # which its own run asks for: any file that is there
      changes["pairs.path"] = config.base.prompts.path
    changed = comparison.run_config(config.base, changes, None, 0)
    c = resolve(changed, "train")
    refuse_unread(changed, "train", [field for field in changes if field != "label"])
    options = {"top_k": c.sampling.top_k, "top_p": c.sampling.top_p}
    judged = c.evaluation.exact or len(config.learning_rates) < 2
    expected = "top_k = 0 and top_p = 1, because a KL decides the best of learning_rates"
    fix = "Set one learning rate, or sample from the whole distribution."
    require(judged or options == {"top_k": 0, "top_p": 1}, "sampling", expected, options, fix)
    same = c.evaluation.exact == config.base.evaluation.exact
    fix = "Use one comparison for each kind of run."
    require(same, "evaluation.exact", "the base's", c.evaluation.exact, fix)
  except (TypeError, ValueError) as error:
    raise ValueError(f"run {printable(run.name)!r}: {error}") from None
  return c, absent


def _is_absent(field: str, value: Any) -> bool:
  is_file = field.rpartition(".")[2] in ("weights", "path", "held_out_path", "table", "tokenizer")
  named = is_file and isinstance(value, str) and value != ""
  return named and not os.path.exists(parse_weights(value).path)


def _check_arena_of_runs(
  config, runs: list[comparison.Run], resolved: Iterable[ConfigDict]
) -> None:
  """Checks the arena of a comparison before its runs start; it is played after them."""
  exact, advice = config.base.evaluation.exact, "Set arena.judges = {}."
  good = "network" in config.kinds and not exact
  require(good, "arena.judges", "none if no run leaves weights", [*config.arena.judges], advice)
  given, fix = [*config.arena.policies], "Its policies are the runs and their start."
  require(not given, "arena.policies", "none", given, fix)
  names = [run.name for run in runs]
  expected = f"one other than {comparison.REFERENCE!r}, the name of the runs' start"
  require(comparison.REFERENCE not in names, "run's label", expected, names, "Set its label.")
  c = config.arena.copy_and_resolve_references().unlock()
  c.base = comparison.REFERENCE
  start = {"weights": config.base.model.weights, "best_of": 1}
  c.policies = {c.base: start, f"a run from {c.base}": start}
  try:
    c = resolve(c.lock(), "arena")
  except ValueError as error:
    raise ValueError(f"arena: {error}") from None
  for run, run_config in zip(runs, resolved, strict=True):
    for field in ("preset", "changes", "tokenizer"):
      (got, expected), what = (x.model[field] for x in (run_config, c)), f"model.{field}"
      fix = "An arena has one architecture and tokenizer for all: set arena.model like base.model."
      where = f"run {printable(run.name)!r}: {what}"
      require(got == expected, where, f"arena.{what}, {expected!r}", got, fix)


def _check_sample(config) -> None:
  _check_model(config.model, "model")
  _check_sampling(config)


def _check_vote(config) -> None:
  check = _Checker(config)
  check.one_of("model.template", TEMPLATES)
  good = config.export.endswith(".jsonl") or not config.export
  check("export", good, "a .jsonl file on this machine", "Give --export=votes.jsonl.")
  for package in ("starlette", "uvicorn"):
    good, fix = config.export != "" or _is_installed(package), f"Install it: {_PIP} {package}"
    require(good, "nash-jax vote", f"the package {package} to be installed", "none", fix)
  check("host", config.host != "", "an address of this machine", "The default is 127.0.0.1.")


def _check_train(config, devices: int | None = None) -> None:
  devices, check = devices or jax.device_count(), _Checker(config)
  _check_model(config.model, "model")
  _check_algorithm(config)
  _check_sampling(config)
  _check_judge(config.judge, "judge", config.sampling, training=True)
  split = _check_steps(config, "prompts.batch_size", devices)
  judge_mesh_sizes(config, devices)
  if config.judge.name in ("gemma", "gemma_text"):
    divides = config.prompts.batch_size % (split * config.judge.micro_batches) == 0
    expected = f"a divisor of prompts.batch_size / {split} devices"
    check("judge.micro_batches", divides, expected, "Lower it.")
  num_prompts, multiple = config.evaluation.prompts, f"a multiple of data x fsdp = {split} devices"
  check("evaluation.prompts", num_prompts % split == 0, multiple, f"Try {64 * split}.")
  if not config.prompts.held_out_path:
    held_out, fix = config.prompts.held_out, "Lower it, or raise prompts.held_out."
    expected = f"at most the {held_out} held-out prompts"
    check("evaluation.prompts", num_prompts <= held_out, expected, fix)
  expected = f"at most evaluation.prompts = {num_prompts}"
  check("evaluation.texts", config.evaluation.texts <= num_prompts, expected, "Lower it.")
  _check_best(config)


def _check_algorithm(config) -> None:
  """Fills in the method's defaults and checks this method's own requirements."""
  algorithm, sampling = config.algorithm, config.sampling
  algorithms.fill_defaults(algorithm)
  method = algorithms.get(algorithm.name)
  uses = method.uses(algorithm)
  check, name = _Checker(algorithm, "algorithm"), algorithm.name
  temperature = algorithm.behaviour_temperature
  solved = algorithm.beta >= EXACT_BETA or not config.evaluation.exact
  expected = f"at least {EXACT_BETA} for the equilibrium of evaluation.exact"
  check("beta", solved, expected, "Raise it, or leave evaluation.exact out.")
  most = 1 / algorithm.beta if "beta" in method.fields else math.inf
  in_range, expected = algorithm.step <= most, f"in (0, 1 / beta = {most:g}]"
  check("step", in_range or "step" not in uses, expected, "Lower it, or algorithm.beta.")
  for field, least in method.minimum.items():
    expected = f"at least {least} for {name}"
    check(field, algorithm[field] >= least, expected, f"Set {least} or more.")
  centred = "centre_log_ratios" in uses and algorithm.centre_log_ratios
  good = not centred or method.samples(algorithm)[0] > 1
  expected = f"two or more of {name}'s own, because centre_log_ratios takes the mean of the others"
  check("samples", good, expected, "Set 4, or leave centre_log_ratios out.")
  is_scalar = config.judge.name in SCALAR or own.is_own(config.judge.name)
  good = not method.needs_rewards(algorithm) or is_scalar
  expected = f"a judge with scalar rewards, {' or '.join(SCALAR)}, for {name}"
  fix = "Fit one with `nash-jax fit --config.loss=reward`."
  require(good, "judge.name", expected, config.judge.name, fix)
  judged = method.offline or config.judge.name != "none"
  fix = "Set judge.name, or learn from a file of pairs with gpo."
  require(judged, "judge.name", f"a judge, for {name} learns from verdicts", "none", fix)
  if method.offline:
    _check_offline(config)
  options = {"top_k": sampling.top_k, "top_p": sampling.top_p, "behaviour_temperature": temperature}
  good = not method.on_policy or options == {"top_k": 0, "top_p": 1, "behaviour_temperature": 1}
  reason = f"because {name} follows the gradient of the distribution that it samples from"
  expected = f"top_k = 0, top_p = 1 and behaviour_temperature = 1, {reason}"
  fix = "Use sampling.temperature to sharpen that distribution instead."
  require(good, "sampling", expected, options, fix)


def _check_offline(config) -> None:
  """Checks the fields of a method that learns from a file of pairs."""
  algorithm, check = config.algorithm, _Checker(config.pairs, "pairs")
  fix = "Set it; docs/data.md has the forms of records."
  check("path", config.pairs.path != "", f"a file of pairs for {algorithm.name}", fix)
  still = algorithm.reference_period == 0
  expected = "False where algorithm.reference_period changes the reference"
  check("cache_reference", still or not config.pairs.cache_reference, expected, "Set one of them.")
  fix = "Leave it out: a pair has two responses."
  _Checker(algorithm, "algorithm")("samples", algorithm.samples == 2, "2 for a file of pairs", fix)


# {job: checks of its fields against each other}
CHECKS = {
  "train": _check_train, "fit": _check_fit, "arena": _check_arena, "collect": _check_collect,
  "compare": _check_compare, "sample": _check_sample, "agreement": _check_agreement,
  "vote": _check_vote,
}  # fmt: skip

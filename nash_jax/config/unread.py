"""Which fields of a config are never read, depending on the values of other fields."""

from collections.abc import Iterator
from typing import Any

from flax import traverse_util
from ml_collections import ConfigDict

from nash_jax.config import comparison, fields
from nash_jax.data.answers import BENCHMARKS
from nash_jax.data.preferences import TASKS
from nash_jax.objectives import algorithms

# The only fields of `model` that these jobs read; fields.JUDGES has those of `judge.model`.
_SAMPLED = ("preset", "changes", "tokenizer", "template", "dtype")
MODEL = {
  "arena": (*_SAMPLED, "remat", "logit_chunk"), "collect": _SAMPLED,
  "sample": (*_SAMPLED, "weights"), "agreement": ("preset", "changes", "tokenizer", "template"),
  "vote": ("tokenizer", "template"),
}  # fmt: skip


def unread(config: ConfigDict, job: str) -> dict[str, str]:
  """Returns {dotted field: reason} of the fields that a run does not read.

  Args:
    config: a config with all fields, whose names of judges, methods and the like are known.
  """
  if job == "compare":
    return _unread_of_compare(config)
  reasons = [*_groups(config, job)]
  return {
    field: reason
    for field in _flat(config)
    for path, reason in reversed(reasons)
    if f"{field}.".startswith(f"{path}.")
  }


def unread_and_set(config: ConfigDict, job: str) -> list[str]:
  """Returns the fields that a run does not read and that differ from their default."""
  values, found = _flat(config), unread(config, job)
  return [field for field in found if values[field] != _default(job, field)]


def _flat(config: ConfigDict) -> dict[str, Any]:
  return traverse_util.flatten_dict(config.to_dict(), sep=".")


def _default(job: str, field: str) -> Any:
  declared, group = fields.DECLARED[job](), ""
  for name in field.split("."):
    declared = fields.ENTRIES[group]() if group in fields.ENTRIES else declared.get(name)
    group = name
  return fields.default(declared)


def _groups(config: ConfigDict, job: str) -> Iterator[tuple[str, str]]:
  """Yields (field or group that is not read, reason)."""
  if "optimizer" in config:
    for choice, table in (("name", fields.OPTIMIZERS), ("schedule", fields.SCHEDULES)):
      chosen = config.optimizer[choice]
      yield from _others("optimizer", table, chosen, f"optimizer.{choice} = {chosen}")
  if job in MODEL:
    known = [name for name in config.model if name not in MODEL[job]]
    yield from ((f"model.{name}", f"the job {job}") for name in known)
  elif not config.model.lora.rank:
    yield from ((f"model.lora.{name}", "model.lora.rank = 0") for name in ("alpha", "init"))
  data = "data" if "data" in config else "prompts"
  if data in config and config[data].held_out_path:
    yield f"{data}.held_out", f"{data}.held_out_path"
  judges = {f"judges.{name}": judge for name, judge in config.get("judges", {}).items()}
  for path, judge in judges.items() or [("judge", config.get("judge"))]:
    if judge is not None:
      yield from _judge(judge, path, job)
  yield from _OF_JOB.get(job, lambda config: ())(config)


def _others(group: str, table: dict[str, tuple[str, ...]], chosen: str, reason: str):
  """Yields the fields of a table that the chosen entry does not read."""
  names = {name for read in table.values() for name in read}
  yield from ((f"{group}.{name}", reason) for name in sorted(names - {*table[chosen]}))


def _judge(judge: ConfigDict, path: str, job: str) -> Iterator[tuple[str, str]]:
  if job != "train":
    yield f"{path}.mesh", f"the job {job}"
  read = fields.JUDGES.get(judge.name)
  if read is None:  # the user's own judge
    return
  for field in _flat(judge):
    if field != "name" and not any(f"{field}.".startswith(f"{name}.") for name in read):
      yield f"{path}.{field}", f"{path}.name = {judge.name}"


def _train(config: ConfigDict) -> Iterator[tuple[str, str]]:
  method = algorithms.get(config.algorithm.name)
  used = method.uses(config.algorithm) | ({"beta"} if config.evaluation.exact else set())
  reason = f"algorithm.name = {config.algorithm.name}"
  for name in sorted({*config.algorithm} - used - algorithms.ALWAYS_READ):
    yield f"algorithm.{name}", reason
  online = ("algorithm.samples", "algorithm.behaviour_temperature", "record_pairs")
  yield from ((name, reason) for name in (online if method.offline else ("pairs",)))


def _fit(config: ConfigDict) -> Iterator[tuple[str, str]]:
  if config.loss != "judge":
    yield "template", f"loss = {config.loss}"
  if config.loss != "sft":
    yield "model.logit_chunk", f"loss = {config.loss}"
  if config.loss != "gpm":
    yield "gpm", f"loss = {config.loss}"
  if config.data.task in TASKS and not TASKS[config.data.task][1]:
    yield "data.max_response_tokens", f"data.task = {config.data.task}"
  if not config.export:
    yield "export_dtype", "export = ''"
  if not config.data.held_out and not config.data.held_out_path:
    yield "evaluation", "data.held_out = 0"


def _sample(config: ConfigDict) -> Iterator[tuple[str, str]]:
  if config.realign == 1:
    yield "reference", "realign = 1"
  if config.prompt:
    yield "file", "prompt"


def _arena(config: ConfigDict) -> Iterator[tuple[str, str]]:
  if config.prompts.task in BENCHMARKS:
    whole = f"prompts.task = {config.prompts.task} (all held out)"
    yield from ((f"prompts.{name}", whole) for name in ("held_out", "duplicates"))
    if config.prompts.held_out_path:
      yield "prompts.path", "prompts.held_out_path"
  for name, policy in config.policies.items():
    if policy.outputs:
      for field in ("weights", "best_of"):
        yield f"policies.{name}.{field}", f"policies.{name}.outputs"


def _collect(config: ConfigDict) -> Iterator[tuple[str, str]]:
  if not config.budget:
    yield "labels", "budget = 0"
  for name in config.features.model:
    if name not in fields.STATES:
      yield f"features.model.{name}", "the job collect"
  if config.features.name == "bradley_terry":
    for name in ("template", "max_tokens"):
      yield f"features.{name}", "features.name = bradley_terry"
  if config.design == "uniform":
    yield "features", "design = uniform"


def _vote(config: ConfigDict) -> Iterator[tuple[str, str]]:
  if config.export:
    yield from (
      (name, "export (which serves no page)") for name in ("host", "port", "shared", "seed")
    )
  else:
    yield "by", "export = ''"


_OF_JOB = {
  "train": _train, "fit": _fit, "sample": _sample, "arena": _arena, "vote": _vote,
  "collect": _collect,
}  # fmt: skip


def _unread_of_compare(config: ConfigDict) -> dict[str, str]:
  """Returns the fields of a comparison that none of its runs reads."""
  runs = [
    unread(comparison.run_config(config.base, run.changes, None, 0), "train")
    for run in comparison.name_runs(config.runs)
  ]
  everywhere = set.intersection(*({*run} for run in runs)) if runs else set()
  found = {f"base.{field}": runs[0][field] for field in sorted(everywhere)}
  found["base.seed"] = "the job compare (which counts seeds from 0)"
  if config.base.evaluation.exact:
    found["base.tracker"] = "base.evaluation.exact (whose runs are one program)"
  if config.learning_rates:
    found["base.optimizer.learning_rate"] = "learning_rates"
  if len(config.learning_rates) < 2:
    for field in ("tuning_metric", "tuning_seed", "tuning_steps"):
      found[field] = "learning_rates (with nothing to choose from)"
  arena = _flat(config.arena)
  if not config.arena.judges:
    return found | {f"arena.{field}": "arena.judges (there are none)" for field in arena}
  ours = dict.fromkeys(("seed", "base"), "the job compare")
  theirs = unread(config.arena, "arena") | ours
  return found | {f"arena.{field}": reason for field, reason in theirs.items()}

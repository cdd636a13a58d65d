"""Many similar runs: one after the other, or all at once if responses can be enumerated.

A run with exact metrics (`evaluation.exact`) is small enough to be one program from start to end.
Runs that differ only in seed, learning rate, β, η, κ, s or mixture are batched into one program. A
batched run draws the same prompts and keys as `train.run`, and leaves the same metrics.
"""

import collections
import contextlib
import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax
import numpy as np
from absl import logging
from flax import traverse_util
from jax import numpy as jnp
from ml_collections import ConfigDict

from nash_jax import judges, keys, train
from nash_jax.config import describe, resolve
from nash_jax.data.corpus import Examples
from nash_jax.data.prompts import load_prompts
from nash_jax.exact import Game, tabular_policy
from nash_jax.iteration import make_sample
from nash_jax.objectives import algorithms
from nash_jax.policy import Policy, load_weights, make_policy, read_start, tokenizer_and_model
from nash_jax.run import files, lock
from nash_jax.run.checkpoint import Workdir, differences, read_config, saved_steps
from nash_jax.run.metrics import progress_bar, step_of
from nash_jax.update import Batch, make_update
from nash_jax.validation import file_name, is_file_name, one_of, require

# Fields in which the runs of one program may differ.
BATCHED_FIELDS = (
  "seed",
  "optimizer.learning_rate",
  *(f"algorithm.{n}" for n in ("beta", "eta", "kappa", "kappa_offset", "step", "mixture")),
)
POLICIES = ("network", "tabular")
# File in the folder of a single run that diverged, which is not tried again.
DIVERGED = "diverged.txt"


def run(
  runs: dict[str, ConfigDict], workdir: Workdir, policy: str = "network", progress: bool = True
) -> None:
  """Runs every config in its own folder of the workdir; skips those that are complete.

  Args:
    runs: {name: config}; the name is the folder, with subfolders at slashes.
    policy: "network", or "tabular" in games whose responses can be enumerated.

  Raises:
    ValueError: a bad config; a folder in use, with a run of another config, or with a damaged run.
  """
  one_of("policy", policy, POLICIES)
  runs = {name: resolve(config, "train") for name, config in runs.items()}
  for config in (c for c in runs.values() if c.evaluation.exact):
    every, expected = config.evaluation.every, f"a divisor of steps = {config.steps}"
    require(config.steps % every == 0, "evaluation.every", expected, every, "Change either.")
    expected, fix = "False where evaluation.exact makes one program of runs", "Record with train."
    require(not config.record_pairs, "record_pairs", expected, True, fix)
  workdir = files.make_folder(workdir)
  folders = {name: workdir / _folder(name) for name in runs}
  twice = [str(path) for path, n in collections.Counter(folders.values()).items() if n > 1]
  require(not twice, "names of runs", "a folder for each", twice, "Rename one.")
  with lock.hold(workdir):
    _run(runs, folders, policy, progress)


def _run(
  runs: dict[str, ConfigDict], folders: dict[str, pathlib.Path], policy: str, progress: bool
) -> None:
  waiting = {name: c for name, c in runs.items() if not _is_complete(c, folders[name])}
  groups: dict[str, dict[str, ConfigDict]] = {}
  for name, config in waiting.items():
    if config.evaluation.exact:
      # The fields in which the runs of one program agree.
      shared = {field: x for field, x in _flat(config).items() if field not in BATCHED_FIELDS}
      groups.setdefault(json.dumps(shared, sort_keys=True, default=str), {})[name] = config
  complete = len(runs) - len(waiting)
  bar = progress_bar(
    total=len(runs), initial=complete, unit="run", desc="runs", disable=not progress
  )
  with contextlib.ExitStack() as on_exit, bar:
    # Keep the log messages of single runs out of the progress bar.
    on_exit.callback(logging.set_verbosity, logging.get_verbosity())
    logging.set_verbosity(logging.WARNING)
    for group in groups.values():
      bar.set_postfix_str(f"{next(iter(group.values())).algorithm.name} x {len(group)}")
      _run_batched({folders[name]: c for name, c in group.items()}, policy)
      bar.update(len(group))
    for name in (name for name, config in waiting.items() if not config.evaluation.exact):
      bar.set_postfix_str(name)
      try:
        (folders[name] / DIVERGED).unlink(missing_ok=True)
        done = train.run(waiting[name], folders[name], progress=False)
      except FloatingPointError as error:  # divergence is a result of the comparison
        logging.warning("%s: %s", name, error)
        files.write_text(folders[name] / DIVERGED, f"{error}\n")
      else:
        if done.stopped:
          raise KeyboardInterrupt(f"stopped in {name}; the same command resumes from there")
      bar.update()


def _folder(name: str) -> str:
  """Returns a run's folder; parts that are no safe name, such as "..", are replaced."""
  return "/".join(part if is_file_name(part) else file_name(part) for part in name.split("/"))


def _is_complete(config: ConfigDict, folder: pathlib.Path) -> bool:
  """Returns whether a run is complete; a stopped run is not."""
  exact, last = config.evaluation.exact, _last_step(folder / "metrics.jsonl", config)
  changes = differences(read_config(folder), describe(config)) if last is not None else {}
  if diverged(config, folder):
    return True
  # With other steps a run could resume, but not with the schedule of this comparison.
  if exact or last == config.steps or "steps" in changes:
    fix = f"They differ in {', '.join(changes)}. Use another workdir, or move that folder away."
    require(not changes, str(folder), "a run of this config", "one of another config", fix)
  # The last line of metrics is written before the last checkpoint. A run without any checkpoints is
  # complete: somebody removed them.
  saved = exact or last in saved_steps(folder) or not (folder / "checkpoints").exists()
  return last == config.steps and saved


def diverged(config: ConfigDict, folder: pathlib.Path) -> bool:
  """Returns whether the single run of this config in a folder reached a loss that is not finite."""
  marked = (folder / DIVERGED).is_file()
  return marked and not differences(read_config(folder), describe(config))


def _last_step(path: pathlib.Path, config: ConfigDict) -> int | None:
  """Returns the step of the last complete line of a run's metrics; None without one."""
  lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
  last = lines[-1] if lines else b""
  step = step_of(last)
  # Other runs resume from a checkpoint, and train.run then rewrites the last lines.
  good = step is not None or not lines or not config.evaluation.exact
  where, fix = f"{path}:{len(lines)}", "Move the run's folder away to make it again."
  require(good, where, "a step and its metrics", last[:80], fix)
  return step


def _flat(config: ConfigDict) -> dict[str, Any]:
  """Returns {dotted field: value} of a config."""
  return traverse_util.flatten_dict(describe(config), keep_empty_nodes=True, sep=".")


def _run_batched(group: dict[pathlib.Path, ConfigDict], policy_name: str) -> None:
  """Runs configs that share a program at once, and writes metrics to their folders."""
  configs = list(group.values())
  config = configs[0]
  tokenizer, model_config = tokenizer_and_model(config.model)
  train_prompts, held_out = load_prompts(config.prompts, tokenizer, config.seed)
  game = Game.from_config(config, held_out, train_prompts)
  method, data = algorithms.get(config.algorithm.name), train_prompts
  if method.offline:
    pairs, _ = train.read_pairs(config, tokenizer, model_config, held_out)
    data = _in_contexts(pairs, held_out)
  rows = Batch.of_pairs(data.all()) if method.offline else data.all()

  @functools.cache
  def places(seed: int) -> np.ndarray:
    """Returns the places of each step's prompts, or pairs, among the rows, i32[steps B]."""
    ordered = dataclasses.replace(data, seed=seed)  # the same ones in another order
    size = config.prompts.batch_size
    return np.array([ordered.places(step, size) for step in range(config.steps)], np.int32)

  policy = make_policy(config.model, config.sampling, tokenizer, model_config)
  judge = judges.make(config.judge, tokenizer, rewards=method.needs_rewards(config.algorithm))
  start = read_start(config.model, model_config)
  params = load_weights(config.model.weights, model_config, config.seed)
  log_ref = jax.jit(functools.partial(game.log_policy, policy.logprobs))(params)
  if policy_name == "tabular":
    policy, params = tabular_policy(log_ref, config.sampling.tokens, config.sampling.max_tokens)
    log_ref = jax.jit(functools.partial(game.log_policy, policy.logprobs))(params)
  values = [_flat(c) for c in configs]
  equilibria = [game.log_equilibrium(log_ref, c.algorithm.beta) for c in configs]
  batched = {
    "values": {name: jnp.array([v[name] for v in values]) for name in BATCHED_FIELDS},
    "log_equilibrium": jnp.stack(equilibria),
    "places": jnp.stack([places(c.seed) for c in configs]),
  }
  rows = jax.tree.map(jnp.asarray, rows)
  fixed = (config, policy, params, start, judge, game, rows, log_ref)
  program = functools.partial(_single_run, *fixed)
  curves = jax.device_get(jax.jit(jax.vmap(program))(batched))
  for i, (folder, c) in enumerate(group.items()):
    _write_record(folder, c, {metric: values[i] for metric, values in curves.items()})


def _in_contexts(pairs: Examples, held_out: Examples) -> Examples:
  """Returns pairs whose prompts have the indices of the game's prompts, by which it tells them."""
  inputs = (held_out.columns["inputs"], held_out.columns["index"])
  index = {tuple(ids): i for ids, i in zip(*inputs, strict=True)}
  asked = [tuple(ids) for ids in pairs.columns["inputs"]]
  unknown = [list(map(int, ids)) for ids in asked if ids not in index]
  fix = "Collect pairs on the game's prompts."
  require(not unknown, "pairs.path", "prompts of the game", unknown[:1], fix)
  columns = {**pairs.columns, "index": [index[ids] for ids in asked]}
  return dataclasses.replace(pairs, columns=columns)


def _write_record(folder: pathlib.Path, config, curves: dict[str, np.ndarray]) -> None:
  """Writes config.json and metrics.jsonl of one run; values that are not finite become null."""
  folder.mkdir(parents=True, exist_ok=True)
  files.write_text(folder / "config.json", json.dumps(describe(config), indent=2))
  steps = range(0, config.steps + 1, config.evaluation.every)
  rows = ({"step": step} | {k: x[i] for k, x in curves.items()} for i, step in enumerate(steps))
  lines = (json.dumps(files.without_nan(row)) + "\n" for row in rows)
  files.write_text(folder / "metrics.jsonl", "".join(lines))


def _single_run(
  config, policy: Policy, reference, start, judge: judges.Judge, game: Game, rows, log_ref, batched
) -> dict[str, jax.Array]:
  """Runs one config from start to end; returns the exact metrics of every evaluation."""
  config = config.copy_and_resolve_references().unlock()
  with config.ignore_type():  # the values are traced
    config.update_from_flattened_dict(batched["values"])
  rule = make_update(config, policy.logprobs)
  sample = make_sample(config.algorithm, rule.players, policy)
  due = [rule.copies_due(step + 1) for step in range(config.steps)]
  distinct = sorted(set(due))
  branches = [lambda state, copies=copies: rule.apply_copies(state, copies) for copies in distinct]

  def compared(state, prompts, step) -> Batch:
    key = functools.partial(keys.key, config.seed, step=step)
    responses, opponents, _ = sample(state, reference, prompts, key("sample"))
    verdict = judges.labels(
      judge.fn, config.algorithm.labels, judge.params, prompts, responses, opponents, key("labels")
    )
    return Batch.create(prompts, responses, verdict)

  offline = algorithms.get(config.algorithm.name).offline
  make_batch = (lambda state, pairs, step: pairs) if offline else compared

  def train_step(state, inputs):
    step, branch, indices = inputs
    batch = make_batch(state, jax.tree.map(lambda leaf: leaf[indices], rows), step)
    state, _ = rule.train_step(state, reference, batch)
    return jax.lax.switch(branch, branches, state), None

  def evaluate(state):
    params = rule.players(state, reference)["policy"]
    logp = game.log_policy(policy.logprobs, params)
    means = game.metrics(logp, log_ref, batched["log_equilibrium"], config.algorithm.beta)
    return {name: mean.value() for name, mean in means.items()}

  def train_then_evaluate(state, inputs):
    state, _ = jax.lax.scan(train_step, state, inputs)
    return state, evaluate(state)

  state, every = rule.init(start(reference)), config.evaluation.every
  branch = jnp.array([distinct.index(copies) for copies in due])
  inputs = (jnp.arange(config.steps), branch, batched["places"])
  inputs = jax.tree.map(lambda leaf: leaf.reshape(-1, every, *leaf.shape[1:]), inputs)
  first = evaluate(state)
  _, rest = jax.lax.scan(train_then_evaluate, state, inputs)
  return jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), first, rest)

"""Many runs of one kind: one after the other, or, where responses can be enumerated, all at once.

A run with exact metrics (`evaluation.exact`) is small enough to be one program from start to end,
and runs that differ only in seed, learning rate, β, η, κ, s or mixture are batched into one
program. A batched run draws the prompts and keys that `train.run` would, and leaves the same
metrics.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
import types

import jax
import numpy as np
import tqdm
from absl import logging
from jax import numpy as jnp
from ml_collections import ConfigDict

from nash_jax import judges, keys, train
from nash_jax.config import describe, resolve
from nash_jax.data.prompts import load_prompts
from nash_jax.exact import Game, tabular_policy
from nash_jax.iteration import make_sample
from nash_jax.policy import load_weights, make_policy, tokenizer_and_model
from nash_jax.run.checkpoint import differences, read_config
from nash_jax.update import Batch, make_update
from nash_jax.validation import one_of, require

# In these fields the runs of one program may differ.
BATCHED_FIELDS = (
  "seed",
  "optimizer.learning_rate",
  *(f"algorithm.{n}" for n in ("beta", "eta", "kappa", "kappa_offset", "step", "mixture")),
)
POLICIES = ("network", "tabular")


def run(runs: dict[str, ConfigDict], workdir, policy: str = "network", progress=True) -> None:
  """Runs every config in its own folder of the workdir; those that are complete are left alone.

  Args:
    runs: configs by folder name.
    policy: "network", or "tabular" in games whose responses can be enumerated.

  Raises:
    ValueError: a bad config, or a folder that holds a run of another config.
  """
  one_of("policy", policy, POLICIES)
  workdir = pathlib.Path(workdir)
  runs = {name: resolve(config, "train") for name, config in runs.items()}
  waiting = {name: c for name, c in runs.items() if not _complete(c, workdir / name)}
  exact = {name: c for name, c in waiting.items() if c.evaluation.exact}
  groups = {}
  for name, config in exact.items():
    groups.setdefault(_program(config), {})[name] = config
  bar = tqdm.tqdm(
    total=len(runs), initial=len(runs) - len(waiting), unit="run", desc="runs", disable=not progress
  )
  with _quiet(), bar:
    for group in groups.values():
      bar.set_postfix_str(f"{next(iter(group.values())).algorithm.name} x {len(group)}")
      _run_batched(group, workdir, policy)
      bar.update(len(group))
    for name in (name for name in waiting if name not in exact):
      bar.set_postfix_str(name)
      try:
        done = train.run(waiting[name], workdir / name, progress=False)
      except FloatingPointError as error:  # a step too large is a result, not an accident
        logging.warning("%s: %s", name, error)
      else:
        if done.stopped:
          raise KeyboardInterrupt(f"stopped in {name}; the same command goes on from there")
      bar.update()


@contextlib.contextmanager
def _quiet():
  """Keeps the notes of single runs out of the one progress line."""
  before = logging.get_verbosity()
  logging.set_verbosity(logging.WARNING)
  try:
    yield
  finally:
    logging.set_verbosity(before)


def _complete(config, folder) -> bool:
  path = folder / "metrics.jsonl"
  lines = path.read_text().splitlines() if path.is_file() else []
  if not lines or json.loads(lines[-1])["step"] != config.steps:
    return False
  lines = differences(read_config(folder), describe(config))
  require(
    not lines,
    str(folder),
    "a run of this config",
    "one of another config",
    f"They differ in {', '.join(lines)}. Use another workdir, or move that folder away.",
  )
  return True


def _program(config) -> str:
  """Returns what two configs share that can run in one program."""
  config = ConfigDict(describe(config))
  for name in BATCHED_FIELDS:
    config.update_from_flattened_dict({name: 0.0 if name != "seed" else 0})
  return json.dumps(describe(config), sort_keys=True)


def _with_values(config, values: dict):
  """Returns a config as plain names, with `values` (which may be traced) by dotted field."""

  def plain(group, prefix=""):
    return types.SimpleNamespace(
      **{
        name: plain(value, f"{prefix}{name}.")
        if isinstance(value, ConfigDict)
        else values.get(f"{prefix}{name}", value)
        for name, value in group.items()
      }
    )

  return plain(config)


def _run_batched(group: dict[str, ConfigDict], workdir, policy: str) -> None:
  """Runs configs that share a program, all at once, and writes their metrics."""
  config = next(iter(group.values()))
  every = config.evaluation.every
  require(
    config.steps % every == 0,
    "evaluation.every",
    f"a divisor of steps = {config.steps}",
    every,
    "Change either.",
  )
  tokenizer, model_config = tokenizer_and_model(config.model)
  # The same prompts, in another order for every seed.
  train_prompts, held_out = load_prompts(config.prompts, tokenizer, config.seed)
  contexts = train_prompts.all()
  places = {
    c.seed: _places(config, dataclasses.replace(train_prompts, seed=c.seed), contexts)
    for c in group.values()
  }
  game = Game.from_config(config, held_out)
  network = make_policy(config.model, config.sampling, tokenizer, model_config)
  params = load_weights(config.model.weights, model_config, config.seed)
  log_ref = jax.jit(functools.partial(game.log_policy, network.logprobs))(params)
  if policy == "tabular":
    network, params = tabular_policy(log_ref, config.sampling.tokens, config.sampling.max_tokens)
    log_ref = jax.jit(functools.partial(game.log_policy, network.logprobs))(params)
  batched = {
    "values": {
      name: jnp.array([_value(c, name) for c in group.values()]) for name in BATCHED_FIELDS
    },
    "log_equilibrium": jnp.stack(
      [game.log_equilibrium(log_ref, c.algorithm.beta) for c in group.values()]
    ),
    "places": jnp.stack([places[c.seed] for c in group.values()]),
  }
  judge = judges.make(config.judge, tokenizer)
  contexts = jax.tree.map(jnp.asarray, contexts)
  program = functools.partial(
    _train_and_evaluate, config, network, params, judge, game, contexts, log_ref
  )
  curves = jax.device_get(jax.jit(jax.vmap(program))(batched))
  for i, (name, c) in enumerate(group.items()):
    own = {metric: values[i] for metric, values in curves.items()}
    _write(pathlib.Path(workdir) / name, c, own)


def _write(folder: pathlib.Path, config, curves: dict[str, np.ndarray]) -> None:
  """Writes config.json and metrics.jsonl of one run; what is not finite becomes null."""
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "config.json").write_text(json.dumps(describe(config), indent=2))
  every = config.evaluation.every
  lines = [
    {"step": i * every}
    | {name: float(x[i]) if np.isfinite(x[i]) else None for name, x in curves.items()}
    for i in range(config.steps // every + 1)
  ]
  (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _places(config, train_prompts, contexts) -> jax.Array:
  """Returns where each step's prompts stand among the contexts, i32[steps B]."""
  size = config.prompts.batch_size
  batches = [train_prompts.batch(step, size).index for step in range(config.steps)]
  return jnp.asarray(np.searchsorted(contexts.index, np.stack(batches)), jnp.int32)


def _value(config, name: str):
  for part in name.split("."):
    config = config[part]
  return config


def _train_and_evaluate(config, policy, reference, judge, game, contexts, log_ref, batched) -> dict:
  """One run from start to end: exact metrics at every evaluation, as train.run would give them."""
  config = _with_values(config, batched["values"])
  rule = make_update(config, policy.logprobs)
  sample = make_sample(config.algorithm, rule.players, policy)
  due = [rule.copies_due(step + 1) for step in range(config.steps)]
  kinds = sorted(set(due))
  branches = [functools.partial(rule.apply_copies, copies=copies) for copies in kinds]

  def step(state, xs):
    n, kind, places = xs
    prompts = jax.tree.map(lambda leaf: leaf[places], contexts)
    key = functools.partial(keys.key, config.seed, step=n)
    responses, opponents, _ = sample(state, reference, prompts, key("sample"))
    verdict = judges.labels(
      judge.fn, config.algorithm.labels, judge.params, prompts, responses, opponents, key("labels")
    )
    state, _ = rule.train_step(state, reference, Batch.create(prompts, responses, verdict))
    return jax.lax.switch(kind, branches, state), None

  def evaluate(state):
    params = rule.players(state, reference)["policy"]
    logp = game.log_policy(policy.logprobs, params)
    means = game.metrics(logp, log_ref, batched["log_equilibrium"], config.algorithm.beta)
    return {name: mean.value() for name, mean in means.items()}

  def block(state, xs):
    state, _ = jax.lax.scan(step, state, xs)
    return state, evaluate(state)

  state, every = rule.init(reference), config.evaluation.every
  xs = (jnp.arange(config.steps), jnp.array([kinds.index(d) for d in due]), batched["places"])
  xs = jax.tree.map(lambda leaf: leaf.reshape(-1, every, *leaf.shape[1:]), xs)
  start = evaluate(state)
  _, rest = jax.lax.scan(block, state, xs)
  return jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), start, rest)

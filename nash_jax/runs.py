"""Many runs of one kind: one after the other, or, where responses can be enumerated, all at once.

A run that is scored exactly (`evaluation.exact`) is small enough to be one program from start to
end, and runs that differ in seed, learning rate, β, η, κ, s or mixture alone are lanes of one
program. A lane draws the prompts and keys that `train.run` would, and leaves the same metrics.
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

from nash_jax import checkpoint, judges, keys, prompts, short_game, tokenizer, train, update
from nash_jax import config as configs
from nash_jax.models import gemma

# What may differ between the lanes of one program.
LANES = ("seed", "optimizer.learning_rate", *(
  f"algorithm.{name}" for name in ("beta", "eta", "kappa", "kappa_offset", "step", "mixture")
))  # fmt: skip
POLICIES = ("network", "tabular")


def run(runs: dict[str, ConfigDict], workdir, policy: str = "network", progress=True) -> None:
  """Runs every config in its own folder of the workdir; those that are complete are left alone.

  Args:
    runs: configs by folder name.
    policy: "network", or "tabular" in games whose responses can be enumerated.

  Raises:
    ValueError: a bad config, or a folder that holds a run of another config.
  """
  configs.choose("policy", policy, POLICIES)
  workdir = pathlib.Path(workdir)
  runs = {name: configs.resolve(config) for name, config in runs.items()}
  waiting = {name: c for name, c in runs.items() if not _complete(c, workdir / name)}
  exact = {name: c for name, c in waiting.items() if c.evaluation.exact}
  groups = {}
  for name, config in exact.items():
    groups.setdefault(_program(config), {})[name] = config
  bar = tqdm.tqdm(total=len(runs), initial=len(runs) - len(waiting), unit="run", desc="runs",
                  disable=not progress)  # fmt: skip
  with _quiet(), bar:
    for group in groups.values():
      bar.set_postfix_str(f"{next(iter(group.values())).algorithm.name} x {len(group)}")
      _run_lanes(group, workdir, policy)
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
  there = json.loads((folder / "config.json").read_text())
  here = json.loads(json.dumps(configs.describe(config)))
  configs.check(there == here, str(folder), "a run of this config", "one of another config",
                "Use another workdir, or move that folder away.")  # fmt: skip
  return True


def _program(config) -> str:
  """Returns what two configs share that can be lanes of one program."""
  config = ConfigDict(configs.describe(config))
  for name in LANES:
    config.update_from_flattened_dict({name: 0.0 if name != "seed" else 0})
  return json.dumps(configs.describe(config), sort_keys=True)


def _lane(config, lane: dict):
  """Returns a config as plain names, the lane's values (which may be traced) in their places."""

  def plain(group, prefix=""):
    return types.SimpleNamespace(**{
      name: plain(value, f"{prefix}{name}.") if isinstance(value, ConfigDict)
      else lane.get(f"{prefix}{name}", value)
      for name, value in group.items()
    })  # fmt: skip

  return plain(config)


def _run_lanes(group: dict[str, ConfigDict], workdir, policy: str) -> None:
  """Runs configs that share a program, all lanes at once, and writes their metrics."""
  config = next(iter(group.values()))
  every = config.evaluation.every
  configs.check(config.steps % every == 0, "evaluation.every",
                f"a divisor of steps = {config.steps}", every, "Change either.")  # fmt: skip
  tok = tokenizer.Tokenizer(configs.path(config.model.tokenizer), config.model.template)
  # The same prompts in another order a seed.
  part, held_out = prompts.load(config.prompts, tok, config.seed)
  contexts = part.all()
  places = {
    c.seed: _places(config, dataclasses.replace(part, seed=c.seed), contexts)
    for c in group.values()
  }
  game = short_game.Game.of(config, held_out)
  chosen = _policy(config, policy, tok, game)
  log_ref = jax.jit(functools.partial(game.log_policy, chosen.score))(chosen.params)
  lanes = {
    "values": {
      name: jnp.array([_value(c, name) for c in group.values()]) for name in LANES
    },
    "star": jnp.stack([game.log_equilibrium(log_ref, c.algorithm.beta) for c in group.values()]),
    "places": jnp.stack([places[c.seed] for c in group.values()]),
  }
  judge = judges.make(config.judge, tok)
  contexts = jax.tree.map(jnp.asarray, contexts)
  whole = functools.partial(_whole, config, chosen, judge, game, contexts, log_ref)
  curves = jax.device_get(jax.jit(jax.vmap(whole))(lanes))
  for lane, (name, c) in enumerate(group.items()):
    folder = pathlib.Path(workdir) / name
    folder.mkdir(parents=True, exist_ok=True)
    own = {metric: values[lane] for metric, values in curves.items()}
    (folder / "config.json").write_text(json.dumps(configs.describe(c), indent=2))
    rows = [
      {"step": i * every}
      | {name: float(x[i]) if np.isfinite(x[i]) else None for name, x in own.items()}
      for i in range(config.steps // every + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _places(config, part, contexts) -> jax.Array:
  """Returns where each step's prompts stand among the contexts, i32[steps B]."""
  batches = [part.batch(step, config.prompts.batch_size).index for step in range(config.steps)]
  return jnp.asarray(np.searchsorted(contexts.index, np.stack(batches)), jnp.int32)


def _policy(config, kind: str, tok, game) -> short_game.Policy:
  """Returns the run's network, or the table of its network's reference."""
  model = gemma.preset(config.model.preset, **config.model.changes)
  score, make = train.policy(config, tok, model)
  params = checkpoint.load_weights(config.model.weights, model, config.seed)
  if kind == "network":
    return short_game.Policy(score, make, params)
  log_ref = jax.jit(functools.partial(game.log_policy, score))(params)
  return short_game.tabular(log_ref, config.sampling.tokens, config.sampling.max_tokens)


def _value(config, name: str):
  for part in name.split("."):
    config = config[part]
  return config


def _whole(config, policy, judge, game, contexts, log_ref, lane) -> dict:
  """One run from start to end: exact metrics at every evaluation, as train.run would give them."""
  config = _lane(config, lane["values"])
  rule = update.make_update(config, policy.score)
  sample = train.make_sample(config.algorithm, rule.players, policy.make)
  due = [rule.moves(step + 1) for step in range(config.steps)]
  kinds = sorted(set(due))
  rotations = [functools.partial(rule.rotate, moves=moves) for moves in kinds]

  def step(state, now):
    n, kind, places = now
    x = jax.tree.map(lambda a: a[places], contexts)
    key = functools.partial(keys.key, config.seed, step=n)
    y, against, _ = sample(state, policy.params, x, key("sample"))
    verdict = judges.labels(
      judge.fn, config.algorithm.labels, judge.params, x, y, against, key("labels")
    )
    state, _ = rule.train_step(state, policy.params, update.Batch.of(x, y, verdict))
    return jax.lax.switch(kind, rotations, state), None

  def scores(state):
    params = rule.players(state, policy.params)["policy"]
    means = game.exact(
      game.log_policy(policy.score, params), log_ref, lane["star"], config.algorithm.beta
    )
    return {name: mean.value() for name, mean in means.items()}

  def block(state, now):
    state, _ = jax.lax.scan(step, state, now)
    return state, scores(state)

  state, every = rule.init(policy.params), config.evaluation.every
  now = (jnp.arange(config.steps), jnp.array([kinds.index(d) for d in due]), lane["places"])
  now = jax.tree.map(lambda a: a.reshape(-1, every, *a.shape[1:]), now)
  start = scores(state)
  _, rest = jax.lax.scan(block, state, now)
  return jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), start, rest)

"""The online loop: prompts, two responses, a verdict, a step, and the target follows."""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import numpy as jnp

from nash_jax import (
  checkpoint,
  corpus,
  judges,
  keys,
  prompts,
  sampler,
  short_game,
  tokenizer,
  update,
)
from nash_jax import config as configs
from nash_jax import workdir as workdirs
from nash_jax.models import gemma, logprobs, partition
from nash_jax.objectives import algorithms
from nash_jax.types import Mean, TrainState

SHOW = ("kl_to_reference", "eval/win_rate_vs_reference", "response_length", "seconds/sample")


@dataclasses.dataclass(frozen=True)
class Run:
  """Everything a run is assembled from, compiled functions included; made by `assemble`."""

  config: Any
  mesh: jax.sharding.Mesh
  tokenizer: tokenizer.Tokenizer
  train: corpus.Examples
  held_out: corpus.Examples
  judge: judges.Judge
  ref: Any
  state: TrainState
  sample: Callable
  verdict: Callable
  train_step: Callable
  moves: Callable
  rotate: Callable
  evaluate: Callable


def assemble(config) -> Run:
  """Builds a run from its resolved config: data first, then weights, then functions."""
  tok = tokenizer.Tokenizer(configs.path(config.model.tokenizer), config.model.template)
  model = gemma.preset(config.model.preset, **config.model.changes)
  tok.check_rows(model.num_embed)
  train, held_out = prompts.load(config.prompts, tok, config.seed)
  configs.check(
    config.evaluation.prompts <= len(held_out), "evaluation.prompts",
    f"at most the {len(held_out)} held-out prompts", config.evaluation.prompts,
    "Lower it, or raise prompts.held_out.",
  )  # fmt: skip
  mesh = partition.make_mesh(config.mesh)
  judge = judges.make(config.judge, tok)
  judge = judge.replace(params=_place(judge.params, mesh))
  params = checkpoint.load_weights(config.model.weights, model, config.seed)
  params = _place(params, mesh)
  ref = jax.tree.map(jnp.copy, params)

  score, make = policy(config, tok, model)
  rule = update.make_update(config, score)
  exact = short_game.make_exact(config, score, held_out, ref) if config.evaluation.exact else None
  shardings = partition.shardings(jax.eval_shape(rule.init, params), mesh)
  rows, everywhere = partition.rows(mesh), partition.replicated(mesh)
  return Run(
    config, mesh, tok, train, held_out, judge, ref,
    state=jax.jit(rule.init, out_shardings=shardings)(params),
    sample=jax.jit(
      make_sample(config.algorithm, rule.players, make),
      out_shardings=(rows, rows, everywhere),
    ),
    verdict=jax.jit(functools.partial(judges.labels, judge.fn, config.algorithm.labels)),
    train_step=jax.jit(
      rule.train_step, donate_argnums=0, out_shardings=(shardings, everywhere)
    ),
    moves=rule.moves,
    rotate=jax.jit(rule.rotate, static_argnums=1, donate_argnums=0, out_shardings=shardings),
    evaluate=_make_evaluate(score, make(samples=1), judge, exact),
  )  # fmt: skip


def policy(config, tok, model: gemma.GemmaConfig) -> tuple[Callable, Callable]:
  """Returns how a Gemma policy is scored and how its samplers are made, from a run's config.

  Returns:
    score: as update.make_update takes it. make: (samples=, mixture=, behaviour=) -> a sampler.
  """
  shared = {
    "forbidden": _forbidden(config, tok, model),
    "temperature": config.sampling.temperature,
    "dtype": jnp.dtype(config.model.dtype),
  }
  score = functools.partial(
    logprobs.response_logprobs, config=model, remat=config.model.remat,
    chunk=config.model.logit_chunk, **shared,
  )  # fmt: skip
  make = functools.partial(
    sampler.make_sampler, model, max_tokens=config.sampling.max_tokens, stop_ids=tok.stop_ids,
    pad_id=tok.pad_id, top_k=config.sampling.top_k, top_p=config.sampling.top_p, **shared,
  )  # fmt: skip
  return score, make


def _forbidden(config, tok, model):
  """Returns bool[V], the ids that no policy may draw."""
  forbidden = tok.forbidden(model.num_embed)
  allowed = np.asarray(config.sampling.tokens, int)
  if not len(allowed):
    return jnp.asarray(forbidden)
  fit = (allowed >= 0) & (allowed < tok.size)
  configs.check(
    bool(fit.all()), "sampling.tokens", f"ids below the tokenizer's {tok.size} pieces",
    allowed[~fit].tolist(), "Leave it empty to allow every piece.",
  )  # fmt: skip
  return jnp.asarray(~np.isin(np.arange(model.num_embed), allowed))


def make_sample(algorithm, players: Callable, make: Callable) -> Callable:
  """Returns (state, ref, prompts, key) -> (y, the opponent's responses or None, tokens drawn).

  Args:
    players: (state, ref) -> parameters by player, as update.Update.players.
    make: (samples=, mixture=, behaviour=) -> a sampler.
  """
  row = algorithms.row(algorithm.name)
  samples, opponents = row.samples(algorithm)

  def sampler_of(player, samples, **law):
    return make(
      samples=samples, mixture=algorithm.mixture if player == "mixture" else None, **law
    )

  draw = sampler_of(row.y, samples, behaviour=algorithm.behaviour_temperature)
  oppose = sampler_of(row.opponent, opponents) if row.opponent else lambda *_: None

  def sample(state, ref, prompts, key):
    who = players(state, ref)
    y = draw(who[row.y], prompts, key)
    against = oppose(who.get(row.opponent), prompts, jax.random.fold_in(key, 1))
    return y, against, sum(jnp.sum(mask) for mask in (y.mask, getattr(against, "mask", 0)))

  return sample


def _place(tree, mesh):
  return jax.device_put(tree, partition.shardings(tree, mesh))


def _make_evaluate(score, sample, judge, exact):
  """Returns (params, ref, judge params, prompts, key) -> (metrics, response tokens)."""

  @jax.jit
  def evaluate(params, ref, judge_params, prompts, key):
    y = sample(params, prompts, jax.random.fold_in(key, 0))
    against = sample(ref, prompts, jax.random.fold_in(key, 1))
    verdict = judge.fn(judge_params, prompts, y, against)
    ref_logp, _ = score(ref, prompts=prompts, tokens=y.tokens, mask=y.mask)
    return {
      "eval/win_rate_vs_reference": Mean.of(verdict.p_win, verdict.valid),
      "eval/kl_to_reference": Mean.of(jnp.sum(y.logp - ref_logp, axis=-1)),
      "eval/response_length": Mean.of(jnp.sum(y.mask, axis=-1)),
      **(exact(params) if exact else {}),
    }, y.tokens

  return evaluate


class Done(NamedTuple):
  """How a run ended: its last state, whether a signal stopped it, compilations of the step."""

  state: TrainState
  stopped: bool
  compilations: int


def run(config, workdir: str, progress: bool = True) -> Done:
  """Trains a policy online, or goes on where the workdir left off.

  Args:
    config: an ml_collections config, such as nash_jax.config.train() with changes.
    workdir: folder of the run's record: config, checkpoints, metrics, samples.

  Raises:
    ValueError: a bad config, data, weights or workdir, before anything heavy loads.
    FloatingPointError: a loss that is not finite; names the step and the last good checkpoint.
  """
  it, state = workdirs.play(
    configs.resolve(config), workdir, assemble, _loop, show=SHOW, progress=progress,
    advice="Lower optimizer.learning_rate or raise algorithm.beta.",
  )  # fmt: skip
  return Done(state, int(state.step) < it.config.steps, it.train_step._cache_size())


def _loop(it: Run, state, first, log, checkpoints, stop):
  config, rows = it.config, partition.rows(it.mesh)
  evaluated = jax.device_put(it.held_out.all(range(config.evaluation.prompts)), rows)
  size = config.prompts.batch_size
  for step in itertools.count(first):
    final = step == config.steps
    key = functools.partial(keys.key, config.seed, step=step)
    due = step % config.evaluation.every == 0 or final
    if due:
      values, tokens = it.evaluate(
        state.params, it.ref, it.judge.params, evaluated, keys.key(config.seed, "evaluate")
      )
      log.push(step, values)
      log.text(step, "held out", *_texts(it, evaluated, tokens))
      log.clock(step, "evaluate", tokens)
    if step > first and (step % config.checkpoint.every == 0 or final or stop.requested):
      log.flush(step)
      score = due and log.value(step, "eval/win_rate_vs_reference")
      checkpoints.save(step, state, score if due else None)
      log.clock(step, "save", ())
    if final or stop.requested:
      return state

    x = jax.device_put(it.train.batch(step, size), rows)
    y, against, drawn = it.sample(state, it.ref, x, key("sample"))
    log.clock(step, "sample", y.stopped, drawn)
    verdict = it.verdict(it.judge.params, x, y, against, key("labels"))
    log.clock(step, "judge", verdict.valid)
    state, values = it.train_step(state, it.ref, update.Batch.of(x, y, verdict))
    log.clock(step, "update", values["gradient_norm"], drawn)
    if moves := it.moves(step + 1):
      state = it.rotate(state, moves)
    log.push(step, {**values, **verdict.metrics})


def _texts(it: Run, x, tokens):
  """Returns a function that reads and decodes the first few continuations, when they are there."""
  count = it.config.evaluation.texts
  arrays = (x.tokens[:count], tokens[:count, 0])

  def decode(arrays):
    return [
      f"{it.tokenizer.decode(prompt)} ▸{it.tokenizer.decode(response)}"
      for prompt, response in zip(*arrays, strict=True)
    ]

  return arrays, decode

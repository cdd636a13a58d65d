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
from nash_jax.types import Mean, Params, TrainState, Verdict

SHOW = ("kl_to_reference", "eval/win_rate_vs_reference", "response_length", "seconds/sample")


class Functions(NamedTuple):
  """What a run compiles, and the shardings of what it computes with; made by `functions`.

  Attributes:
    state, ref, judge: shardings, a tree each, of the state, the reference and the judge's params.
    rows, everywhere: the shardings of batches, and of what the host reads.
    init: base -> TrainState.
    sample: (state, ref, prompts, key) -> (y, the opponent's responses or None, tokens drawn).
    verdict: (judge's params, prompts, y, opponent's, key) -> Verdict.
    train_step: (state, ref, Batch) -> (state, metrics); the state is donated.
    moves: completed steps -> what `rotate` is to move there, () mostly; the one that is not jitted.
    rotate: (state, moves) -> state; the state is donated.
    evaluate: (state, ref, judge's params, prompts, key) -> (metrics, response tokens).
  """

  state: TrainState
  ref: Params
  judge: Params
  rows: jax.sharding.NamedSharding
  everywhere: jax.sharding.NamedSharding
  init: Callable
  sample: Callable
  verdict: Callable
  train_step: Callable
  moves: Callable
  rotate: Callable
  evaluate: Callable


def functions(config, tok, model: gemma.GemmaConfig, judge, mesh, exact=None) -> Functions:
  """Returns the jitted functions of a resolved config, from shapes alone: nothing is allocated.

  Args:
    judge: a Judge, whose params may be `jax.ShapeDtypeStruct`s.
    exact: params -> further metrics of an evaluation.
  """
  score, make = policy(config, tok, model)
  rule, params = update.make_update(config, score), gemma.shapes(model)
  state, ref = (
    partition.shardings(tree, mesh) for tree in (jax.eval_shape(rule.init, params), params)
  )
  judging = judge_mesh(config, mesh)
  judged = partition.shardings(judge.params, judging)
  rows, everywhere = partition.rows(mesh), partition.replicated(mesh)
  jit = functools.partial(partition.jit, mesh)
  return Functions(
    state, ref, judged, rows, everywhere,
    init=jit(rule.init, out_shardings=state),
    sample=jit(
      make_sample(config.algorithm, rule.players, make),
      out_shardings=(rows, rows, everywhere),
    ),
    verdict=partition.jit(
      judging,
      functools.partial(judges.labels, judge.fn, config.algorithm.labels),
      out_shardings=Verdict(rows, rows, rows, everywhere),
    ),
    train_step=jit(rule.train_step, donate_argnums=0, out_shardings=(state, everywhere)),
    moves=rule.moves,
    rotate=jit(rule.rotate, static_argnums=1, donate_argnums=0, out_shardings=state),
    evaluate=jit(
      _make_evaluate(score, make(samples=1), rule.players, judge.fn, exact),
      out_shardings=everywhere,
    ),
  )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Run:
  """Everything a run is assembled from; made by `assemble`.

  Attributes:
    like: the state's shapes and shardings.
    begin: makes the state where a fresh run starts.
    do: the compiled functions.
  """

  config: Any
  tokenizer: tokenizer.Tokenizer
  train: corpus.Examples
  held_out: corpus.Examples
  judge: judges.Judge
  ref: Params
  like: TrainState
  begin: Callable[[], TrainState]
  do: Functions


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
  mesh, shapes = partition.make_mesh(config.mesh), gemma.shapes(model)
  judge = judges.make(config.judge, tok, mesh=judge_mesh(config, mesh))
  load = functools.partial(
    checkpoint.load_weights, config.model.weights, model, config.seed, mesh=mesh
  )
  # It is computed with in this type alone, so nothing is lost by holding it so.
  ref, exact = load(dtype=jnp.dtype(config.model.dtype)), None
  if config.evaluation.exact:
    exact = short_game.make_exact(config, policy(config, tok, model)[0], held_out, ref)
  do = functions(config, tok, model, judge, mesh, exact)
  like = partition.abstract(jax.eval_shape(do.init, shapes), do.state)
  # Adapters need the base's shapes alone; a whole policy is read again, in float32.
  return Run(
    config, tok, train, held_out, judge, ref, like,
    begin=lambda: do.init(ref if config.model.lora.rank else load()), do=do,
  )  # fmt: skip


def judge_mesh(config, mesh) -> jax.sharding.Mesh:
  """Returns the judge's mesh, of the same devices: `judge.mesh` where it differs from `mesh`."""
  sizes = configs.judge_mesh(config, mesh.size)
  return mesh if sizes == dict(mesh.shape) else partition.make_mesh(sizes, mesh)


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


def _make_evaluate(score, sample, players, judge_fn, exact):
  """Returns (state, ref, judge params, prompts, key) -> (metrics, response tokens)."""

  def evaluate(state, ref, judge_params, prompts, key):
    params = players(state, ref)["policy"]
    y = sample(params, prompts, jax.random.fold_in(key, 0))
    against = sample(ref, prompts, jax.random.fold_in(key, 1))
    verdict = judge_fn(judge_params, prompts, y, against)
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
  return Done(state, int(state.step) < it.config.steps, it.do.train_step._cache_size())


def _loop(it: Run, state, first, log, checkpoints, stop):
  config, do = it.config, it.do
  size, count = config.prompts.batch_size, config.evaluation.prompts
  evaluated = partition.feed(do.rows, count, lambda rows: it.held_out.all(range(count)[rows]))
  for step in itertools.count(first):
    final = step == config.steps
    leave = stop.at(step) or final
    key = functools.partial(keys.key, config.seed, step=step)
    due = step % config.evaluation.every == 0 or final
    if due:
      values, tokens = do.evaluate(
        state, it.ref, it.judge.params, evaluated, keys.key(config.seed, "evaluate")
      )
      log.push(step, values)
      log.text(step, "held out", *_texts(it, tokens))
      log.clock(step, "evaluate", tokens)
    if step > first and (step % config.checkpoint.every == 0 or leave):
      log.flush(step)
      score = due and log.value(step, "eval/win_rate_vs_reference")
      checkpoints.save(step, state, score if due else None)
      log.clock(step, "save", ())
    if leave:
      return state

    x = partition.feed(do.rows, size, functools.partial(it.train.batch, step, size))
    y, against, drawn = do.sample(state, it.ref, x, key("sample"))
    log.clock(step, "sample", y.stopped, drawn)
    verdict = do.verdict(it.judge.params, x, y, against, key("labels"))
    log.clock(step, "judge", verdict.valid)
    state, values = do.train_step(state, it.ref, update.Batch.of(x, y, verdict))
    log.clock(step, "update", values["gradient_norm"], drawn)
    if moves := do.moves(step + 1):
      state = do.rotate(state, moves)
    log.push(step, {**values, **verdict.metrics})


def _texts(it: Run, tokens):
  """Returns a function that reads and decodes the first few continuations, when they are there."""
  count = it.config.evaluation.texts
  arrays = (it.held_out.all(range(count)).tokens, tokens[:count, 0])

  def decode(arrays):
    return [
      f"{it.tokenizer.decode(prompt)} ▸{it.tokenizer.decode(response)}"
      for prompt, response in zip(*arrays, strict=True)
    ]

  return arrays, decode

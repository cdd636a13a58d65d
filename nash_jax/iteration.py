"""One iteration as compiled programs: sample, judge, train_step, copies; and an evaluation."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
from jax import numpy as jnp

from nash_jax import judges, update
from nash_jax.config.checks import judge_mesh_sizes
from nash_jax.models import gemma, sharding
from nash_jax.objectives import algorithms
from nash_jax.policy import Policy, make_policy
from nash_jax.types import Mean, Params, TrainState, Verdict


class Programs(NamedTuple):
  """The programs of a run; all are jitted but `copies_due`.

  Attributes:
    init: base -> TrainState.
    sample: (state, reference, prompts, key) -> (responses, the opponent's responses or None,
      number of tokens drawn).
    judge: (judge's params, prompts, responses, opponents, key) -> Verdict.
    train_step: (state, reference, Batch) -> (state, metrics); the state is donated.
    copies_due: number of completed steps -> the copies to make there, mostly ().
    apply_copies: (state, copies) -> state; the state is donated.
    evaluate: (state, reference, judge's params, prompts, key) -> (metrics, response tokens).
  """

  init: Callable
  sample: Callable
  judge: Callable
  train_step: Callable
  copies_due: Callable
  apply_copies: Callable
  evaluate: Callable


class Shardings(NamedTuple):
  """Where everything lies: a tree each for state, reference and judge; one for all batches."""

  state: TrainState
  reference: Params
  judge: Params
  batch: jax.sharding.NamedSharding
  replicated: jax.sharding.NamedSharding


def make_programs(
  config, tokenizer, model_config: gemma.GemmaConfig, judge: judges.Judge, mesh, exact_metrics=None
) -> tuple[Programs, Shardings]:
  """Returns the programs of a resolved config, from shapes alone: nothing is allocated.

  Args:
    judge: a Judge, whose params may be `jax.ShapeDtypeStruct`s.
    exact_metrics: params -> further metrics of an evaluation.
  """
  policy = make_policy(config.model, config.sampling, tokenizer, model_config)
  rule = update.make_update(config, policy.logprobs)
  base = gemma.shapes(model_config)
  judge_devices = judge_mesh(config, mesh)
  where = Shardings(
    sharding.shardings(jax.eval_shape(rule.init, base), mesh),
    sharding.shardings(base, mesh),
    sharding.shardings(judge.params, judge_devices),
    sharding.batch_sharding(mesh),
    sharding.replicated(mesh),
  )
  jit = functools.partial(sharding.jit, mesh)
  programs = Programs(
    init=jit(rule.init, out_shardings=where.state),
    sample=jit(
      make_sample(config.algorithm, rule.players, policy),
      out_shardings=(where.batch, where.batch, where.replicated),
    ),
    judge=sharding.jit(
      judge_devices,
      functools.partial(judges.labels, judge.fn, config.algorithm.labels),
      out_shardings=Verdict(where.batch, where.batch, where.batch, where.replicated),
    ),
    train_step=jit(
      rule.train_step, donate_argnums=0, out_shardings=(where.state, where.replicated)
    ),
    copies_due=rule.copies_due,
    apply_copies=jit(
      rule.apply_copies, static_argnums=1, donate_argnums=0, out_shardings=where.state
    ),
    evaluate=jit(
      _make_evaluate(policy, rule.players, judge.fn, exact_metrics), out_shardings=where.replicated
    ),
  )
  return programs, where


def judge_mesh(config, mesh) -> jax.sharding.Mesh:
  """Returns the judge's mesh, of the same devices: `judge.mesh` where it differs from `mesh`."""
  sizes = judge_mesh_sizes(config, mesh.size)
  return mesh if sizes == dict(mesh.shape) else sharding.make_mesh(sizes, mesh)


def make_sample(algorithm, players: Callable, policy: Policy) -> Callable:
  """Returns (state, reference, prompts, key) -> (responses, opponents or None, tokens drawn).

  Args:
    players: (state, reference) -> parameters by player, as update.Update.players.
  """
  method = algorithms.get(algorithm.name)
  samples, opponent_samples = method.samples(algorithm)

  def make_sampler(player, samples, **options):
    mixture = algorithm.mixture if player == "mixture" else None
    return policy.make_sampler(samples=samples, mixture=mixture, **options)

  sample_player = make_sampler(
    method.player, samples, behaviour_temperature=algorithm.behaviour_temperature
  )
  sample_opponent = (
    make_sampler(method.opponent, opponent_samples) if method.opponent else lambda *_: None
  )

  def sample(state, reference, prompts, key):
    params = players(state, reference)
    responses = sample_player(params[method.player], prompts, key)
    opponents = sample_opponent(params.get(method.opponent), prompts, jax.random.fold_in(key, 1))
    masks = (responses.mask, getattr(opponents, "mask", 0))
    return responses, opponents, sum(jnp.sum(mask) for mask in masks)

  return sample


def _make_evaluate(policy: Policy, players, judge_fn, exact_metrics):
  """Returns (state, reference, judge params, prompts, key) -> (metrics, response tokens)."""
  sample = policy.make_sampler(samples=1)

  def evaluate(state, reference, judge_params, prompts, key):
    params = players(state, reference)["policy"]
    responses = sample(params, prompts, jax.random.fold_in(key, 0))
    opponents = sample(reference, prompts, jax.random.fold_in(key, 1))
    verdict = judge_fn(judge_params, prompts, responses, opponents)
    reference_logp, _ = policy.logprobs(
      reference, prompts=prompts, tokens=responses.tokens, mask=responses.mask
    )
    log_ratio = jnp.sum(responses.logp - reference_logp, axis=-1)
    return {
      "eval/win_rate_vs_reference": Mean.from_values(verdict.p_win, verdict.valid),
      "eval/kl_to_reference": Mean.from_values(log_ratio),
      "eval/response_length": Mean.from_values(jnp.sum(responses.mask, axis=-1)),
      **(exact_metrics(params) if exact_metrics else {}),
    }, responses.tokens

  return evaluate

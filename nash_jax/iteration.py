"""The compiled programs of an iteration (sample, judge, train_step, copies) and an evaluation."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import numpy as jnp
from jax.stages import Wrapped
from jaxtyping import Array, Int
from ml_collections import ConfigDict

from nash_jax import judges, sampler, update
from nash_jax.config.checks import judge_mesh_sizes
from nash_jax.data.tokenizer import Tokenizer
from nash_jax.models import gemma, sharding
from nash_jax.objectives import algorithms
from nash_jax.policy import Policy, make_policy
from nash_jax.types import Mean, Params, Responses, TrainState, Verdict

ExactMetrics = Callable[[Params], dict[str, Mean]]
Players = Callable[[TrainState, Params], dict[str, Any]]


class Programs(NamedTuple):
  """The programs of a run, all jitted except `copies_due` and `apply_copies`.

  Attributes:
    init: base -> TrainState.
    sample: (state, reference, prompts, key) -> (responses, the opponent's responses or None,
      number of tokens sampled).
    judge: (judge's params, prompts, responses, opponents, key) -> Verdict.
    train_step: (state, reference, Batch) -> (state, metrics); the state is donated.
    measure: (state, reference, Batch) -> the metrics of train_step's loss, without a step.
    logprobs: (params, prompts, tokens, mask) -> log-probability of each token.
    gather: any tree of a batch's arrays -> the same, whole on every device.
    copies_due: number of completed steps -> the copies to make then, usually ().
    apply_copies: (state, copies) -> state, with a jitted program per copy; the buffers it
      overwrites are donated.
    evaluate: (state, reference, judge's params, prompts, key) -> (metrics, arrays by name of the
      first `evaluation.texts` samples).
  """

  init: Wrapped
  sample: Wrapped
  judge: Wrapped
  train_step: Wrapped
  measure: Wrapped
  logprobs: Wrapped
  gather: Wrapped
  copies_due: Callable[[int], update.Copies]
  apply_copies: Callable[[TrainState, update.Copies], TrainState]
  evaluate: Wrapped


class Shardings(NamedTuple):
  """The shardings of state, reference and judge, one a leaf, and one sharding for all batches."""

  state: TrainState
  reference: Params
  judge: Params
  batch: jax.sharding.NamedSharding
  replicated: jax.sharding.NamedSharding


def make_programs(
  config: ConfigDict,
  tokenizer: Tokenizer,
  model_config: gemma.GemmaConfig,
  judge: judges.Judge,
  mesh: jax.sharding.Mesh,
  exact_metrics: ExactMetrics | None = None,
) -> tuple[Programs, Shardings]:
  """Returns the programs of a resolved config; needs only shapes and allocates nothing.

  Args:
    judge: its params may be `jax.ShapeDtypeStruct`s.
    exact_metrics: params -> more metrics for an evaluation.
  """
  policy = make_policy(config.model, config.sampling, tokenizer, model_config)
  rule = update.make_update(config, policy.logprobs)
  base = gemma.shapes(model_config)
  judge_devices = judge_mesh(config, mesh)
  batch, replicated = sharding.batch_sharding(mesh), sharding.replicated(mesh)
  state = sharding.shardings(jax.eval_shape(rule.init, base), mesh)
  reference = sharding.shardings(base, mesh)
  is_own = judges.own.is_own(config.judge.name)
  layout = judges.own.shardings if is_own else sharding.shardings
  judge_shardings = layout(judge.params, judge_devices)
  verdict = Verdict(batch, batch, batch, replicated)  # type: ignore[arg-type]  # shardings
  jit = functools.partial(sharding.jit, mesh)
  sample = make_sample(config.algorithm, rule.players, policy)
  label = functools.partial(judges.labels, judge.fn, config.algorithm.labels)
  distance = "log_ratio" if sampler.truncates(config.sampling) else "kl"
  texts = config.evaluation.texts
  evaluate = _make_evaluate(policy, rule.players, judge.fn, exact_metrics, distance, texts)
  programs = Programs(
    init=jit(rule.init, out_shardings=state),
    sample=jit(sample, out_shardings=(batch, batch, replicated)),
    judge=sharding.jit(judge_devices, label, out_shardings=verdict),
    train_step=jit(rule.train_step, donate_argnums=0, out_shardings=(state, replicated)),
    measure=jit(rule.measure, out_shardings=replicated),
    logprobs=jit(_logprobs_of(policy), out_shardings=replicated),
    gather=jit(lambda tree: tree, out_shardings=replicated),
    copies_due=rule.copies_due,
    apply_copies=functools.partial(rule.apply_copies, copy=_make_copy(mesh, state)),
    evaluate=jit(evaluate, out_shardings=replicated),
  )
  return programs, Shardings(state, reference, judge_shardings, batch, replicated)


def _make_copy(mesh: jax.sharding.Mesh, shardings: TrainState) -> Callable:
  """Returns (field, its old tree or None, source) -> a copy of the source, in the old buffers.

  One copy is one program. A program that takes and returns the whole state would drop the field
  that it overwrites, as unused, and every later field would move into its neighbour's buffer: XLA
  on GPUs gets that order wrong, and the optimiser's moments are lost.
  """
  core = {"params": shardings.params, "target": shardings.target, "opt_state": shardings.opt_state}
  fields = {**core, **shardings.copies}
  programs = {
    field: sharding.jit(
      mesh,
      lambda old, source: update.copy_tree(source),
      donate_argnums=0,
      keep_unused=True,
      out_shardings=layout,
    )
    for field, layout in fields.items()
  }
  return lambda field, old, source: programs[field](old, source)


def _logprobs_of(policy: Policy) -> Callable:
  return lambda params, prompts, tokens, mask: policy.logprobs(
    params, prompts=prompts, tokens=tokens, mask=mask
  )[0]


def judge_mesh(config: ConfigDict, mesh: jax.sharding.Mesh) -> jax.sharding.Mesh:
  """Returns the judge's mesh, over the same devices; `judge.mesh` may differ from `mesh`."""
  sizes = judge_mesh_sizes(config, mesh.size)
  return mesh if sizes == dict(mesh.shape) else sharding.make_mesh(sizes, mesh)


def make_sample(
  algorithm: ConfigDict, players: Players, policy: Policy
) -> Callable[..., tuple[Responses, Responses | None, Int[Array, ""]]]:
  """Returns (state, reference, prompts, key) -> (responses, opponents or None, tokens sampled).

  Args:
    players: (state, reference) -> parameters by player; see update.Update.
  """
  method = algorithms.get(algorithm.name)
  (samples, opponent_samples), opponent = method.samples(algorithm), method.opponent

  def make_sampler(player, samples, **options):
    mixture = algorithm.mixture if player == "mixture" else None
    return policy.make_sampler(samples=samples, mixture=mixture, **options)

  temperature = algorithm.behaviour_temperature
  sample_player = make_sampler(method.player, samples, behaviour_temperature=temperature)
  sample_opponent = make_sampler(opponent, opponent_samples) if opponent else None

  def sample(state, reference, prompts, key):
    params = players(state, reference)
    responses = sample_player(params[method.player], prompts, key)
    if opponent is None or sample_opponent is None:
      return responses, None, jnp.sum(responses.mask)
    opponents = sample_opponent(params[opponent], prompts, jax.random.fold_in(key, 1))
    return responses, opponents, jnp.sum(responses.mask) + jnp.sum(opponents.mask)

  return sample


def _make_evaluate(
  policy: Policy,
  players: Players,
  judge_fn: judges.JudgeFn,
  exact_metrics: ExactMetrics | None,
  distance: str,
  texts: int,
) -> Callable:
  """Returns (state, reference, judge's params, prompts, key) -> (metrics, `texts` samples)."""
  sample = policy.make_sampler(samples=1)

  def evaluate(state, reference, judge_params, prompts, key):
    params = players(state, reference)["policy"]
    responses = sample(params, prompts, jax.random.fold_in(key, 0))
    opponents = sample(reference, prompts, jax.random.fold_in(key, 1))
    verdict = judge_fn(judge_params, prompts, responses, opponents).checked()
    tokens, mask = responses.tokens, responses.mask
    # Both come from one program: the sampler's own differ from these by bfloat16 rounding.
    logp, reference_logp = (
      policy.logprobs(p, prompts=prompts, tokens=tokens, mask=mask)[0] for p in (params, reference)
    )
    log_ratio = jnp.sum(logp - reference_logp, axis=-1)
    samples = {
      "response": tokens, "reference": opponents.tokens,
      "p_win": jnp.where(verdict.valid, verdict.p_win, jnp.nan)[..., 0],
      "tokens": jnp.sum(mask, axis=-1), "reference_tokens": jnp.sum(opponents.mask, axis=-1),
      "logp": jnp.sum(logp, axis=-1), "log_ratio": log_ratio,
    }  # fmt: skip
    if verdict.p_win_first is not None:
      p_win_first = jnp.where(verdict.valid, verdict.p_win_first, jnp.nan)
      samples["p_win_first"] = p_win_first[..., 0]
    metrics = {
      "eval/win_rate_vs_reference": Mean.from_values(verdict.p_win, verdict.valid),
      f"eval/{distance}_to_reference": Mean.from_values(log_ratio),
      "eval/response_length": Mean.from_values(jnp.sum(mask, axis=-1)),
    }
    metrics |= exact_metrics(params) if exact_metrics else {}
    return metrics, {name: x[:texts, 0] for name, x in samples.items()}

  return evaluate

"""From a batch to the next state: the loss, its gradient in micro-batches, optimiser, target."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.struct
import jax
import optax
from jax import numpy as jnp

from nash_jax.models import logprobs
from nash_jax.objectives import algorithms
from nash_jax.types import Mean, Params, Prompts, Responses, TrainState, Verdict


def make_schedule(config, steps: int) -> optax.Schedule:
  """Returns the learning rate as a function of completed steps."""
  peak, end = config.learning_rate, config.learning_rate * config.final_fraction
  rest = max(1, steps - config.warmup_steps)
  shape = {
    "constant": optax.constant_schedule(peak),
    "linear": optax.linear_schedule(peak, end, rest),
    "cosine": optax.cosine_decay_schedule(peak, rest, config.final_fraction),
  }[config.schedule]
  warmup = optax.linear_schedule(peak / max(1, config.warmup_steps), peak, config.warmup_steps)
  return optax.join_schedules([warmup, shape], [config.warmup_steps])


def make_optimizer(config, steps: int) -> optax.GradientTransformation:
  """Returns clipping by global norm, then the named optimiser on its schedule."""
  rate = make_schedule(config, steps)
  optimizer = {
    "adamw": lambda: optax.adamw(
      rate, config.b1, config.b2, config.eps, weight_decay=config.weight_decay
    ),
    "adafactor": lambda: optax.adafactor(rate),
    "sgd": lambda: optax.sgd(rate),
  }[config.name]()
  return optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)


def gradients(
  loss: Callable[[Params, dict], dict[str, Mean]], params: Params, batch, micro_batches: int
) -> tuple[Params, dict[str, Mean]]:
  """Returns the gradient of the mean loss over a batch, and the batch's metrics.

  Args:
    loss: from (params, part of the batch) to Means, "loss" among them. Sums and weights are added
      over the parts, so the result does not depend on how the batch is split.
    micro_batches: parts; each takes every n-th row, so that no row changes its device.
  """

  def total(params, part):
    means = loss(params, part)
    return means["loss"].total, means

  def add(carry, part):
    (_, means), grads = jax.value_and_grad(total, has_aux=True)(params, part)
    return jax.tree.map(jnp.add, carry, (grads, means)), None

  def split(x):
    return jnp.moveaxis(x.reshape(-1, micro_batches, *x.shape[1:]), 1, 0)

  parts = jax.tree.map(split, batch)
  first = jax.tree.map(lambda x: x[0], parts)
  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype), (params, jax.eval_shape(loss, params, first))
  )
  (grads, means), _ = jax.lax.scan(add, zeros, parts)
  return jax.tree.map(lambda g: g / means["loss"].weight, grads), means


@flax.struct.dataclass
class Batch:
  """One iteration's data: responses of the policy to B prompts, and what the judge said of them."""

  prompts: Prompts
  responses: Responses
  p_win: jax.Array  # f32[B K J]
  valid: jax.Array  # bool[B K J]

  @classmethod
  def of(cls, prompts: Prompts, responses: Responses, verdict: Verdict) -> "Batch":
    """Joins the outputs of the three stages before the update."""
    return cls(prompts, responses, verdict.p_win, verdict.valid)


class Update(NamedTuple):
  """The functions of one algorithm, pure and not yet compiled.

  Attributes:
    init: params -> TrainState; copies what it keeps, so that donation never meets an alias.
    train_step: (state, ref, batch) -> (state, metrics).
    rotate: state -> state at the end of a phase: the periodic copy of the target.
    rotates_after: completed step -> whether `rotate` is due, from the step number alone.
  """

  init: Callable[[Params], TrainState]
  train_step: Callable[[TrainState, Params, Batch], tuple[TrainState, dict]]
  rotate: Callable[[TrainState], TrainState]
  rotates_after: Callable[[int], bool]


def make_kappa(config) -> Callable:
  """Returns κ as a function of completed steps: constant, or offset / (k + offset)."""
  if config.kappa_schedule == "harmonic":
    return lambda k: config.kappa_offset / (k + config.kappa_offset)
  return optax.constant_schedule(config.kappa)


def make_update(config, model, forbidden) -> Update:
  """Returns the update of `config.algorithm` for a policy of architecture `model`.

  Args:
    config: a resolved run config.
    forbidden: bool[V], ids of probability 0 in every policy, or None.
  """
  row = algorithms.row(config.algorithm.name)
  kl = row.kl(config.algorithm)
  objective = functools.partial(row.loss, kl=kl, centre=config.algorithm.centre_log_ratios)
  tx = make_optimizer(config.optimizer, config.steps)
  rate = make_schedule(config.optimizer, config.steps)
  kappa = make_kappa(config.algorithm)
  periodic = config.algorithm.target_update == "periodic"
  moves = row.target and not periodic
  move = optax.incremental_update if moves else (lambda new, old, k: old)
  score = functools.partial(
    logprobs.response_logprobs,
    config=model,
    forbidden=forbidden,
    temperature=config.sampling.temperature,
    dtype=jnp.dtype(config.model.dtype),
    remat=config.model.remat,
    chunk=config.model.logit_chunk,
  )

  def init(params):
    params = jax.tree.map(jnp.copy, params)
    target = jax.tree.map(jnp.copy, params) if row.target else None
    return TrainState(jnp.zeros((), jnp.int32), params, target, tx.init(params), {})

  def loss(params, part, frozen):
    y = part.responses
    logp, entropy = score(params, prompts=part.prompts, tokens=y.tokens, mask=y.mask)
    own, total = jax.lax.stop_gradient(logp), functools.partial(jnp.sum, axis=-1)
    others = {
      role: score(frozen[role], prompts=part.prompts, tokens=y.tokens, mask=y.mask)[0]
      for role in kl
    }
    ratios = {role: total(own - other) for role, other in others.items()}
    return {
      "loss": objective(total(logp), ratios, part.p_win, part.valid),
      "p_win": Mean.of(part.p_win[:, 0, -1], part.valid[:, 0, -1]),
      "valid": Mean.of(jnp.any(part.valid, axis=-1)),
      **{f"kl_to_{role}": Mean.of(ratio) for role, ratio in ratios.items()},
      "entropy": Mean.of(entropy, y.mask),
      "logp_gap": Mean.of(jnp.abs(own - y.logp), y.mask),
      "response_length": Mean.of(total(y.mask)),
      "stopped": Mean.of(y.stopped),
      "truncated": Mean.of(~y.stopped),
    }

  def train_step(state, ref, batch):
    frozen = {"reference": ref, "target": state.target, **state.copies}
    grads, metrics = gradients(
      lambda params, part: loss(params, part, frozen),
      state.params,
      batch,
      config.optimizer.micro_batches,
    )
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    target = move(params, state.target, kappa(state.step))
    metrics |= {
      "gradient_norm": optax.tree.norm(grads),
      "learning_rate": rate(state.step),
      "kappa": kappa(state.step),
    }
    return TrainState(state.step + 1, params, target, opt_state, state.copies), metrics

  def rotate(state):
    return state.replace(target=jax.tree.map(jnp.copy, state.params))

  def rotates_after(step):
    return row.target and periodic and step % config.algorithm.target_period == 0

  return Update(init, train_step, rotate, rotates_after)

"""From a batch to the next state: the loss, its gradient in micro-batches, optimiser, target."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import optax
from jax import numpy as jnp

from nash_jax.models import lora
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
  """One iteration's data: B prompts, the responses to them, and the judge's verdict."""

  prompts: Prompts
  responses: Responses
  verdict: Verdict

  @classmethod
  def create(cls, prompts: Prompts, responses: Responses, verdict: Verdict) -> "Batch":
    """Joins the outputs of the three stages before the update; the judge's metrics stay out."""
    return cls(prompts, responses, verdict.replace(metrics={}))


Copies = tuple[tuple[str, str], ...]


class Update(NamedTuple):
  """The functions of one algorithm, pure and not yet compiled.

  Attributes:
    init: base -> TrainState; copies what it keeps, so that donation never meets an alias.
    players: (state, reference) -> the parameters that each player's responses are drawn from.
    train_step: (state, reference, batch) -> (state, metrics).
    copies_due: number of completed steps -> the ((field, source field), ...) to copy there, sorted;
      mostly ().
    apply_copies: (state, copies) -> state; each field becomes a copy of its source field.
  """

  init: Callable[[Params], TrainState]
  players: Callable[[TrainState, Params], dict[str, Any]]
  train_step: Callable[[TrainState, Params, Batch], tuple[TrainState, dict]]
  copies_due: Callable[[int], Copies]
  apply_copies: Callable[[TrainState, Copies], TrainState]


def make_kappa(config) -> Callable:
  """Returns κ as a function of completed steps: constant, or offset / (k + offset)."""
  if config.kappa_schedule == "harmonic":
    return lambda k: config.kappa_offset / (k + config.kappa_offset)
  return optax.constant_schedule(config.kappa)


def make_update(config, logprobs: Callable) -> Update:
  """Returns the update of `config.algorithm` for the policies that `logprobs` evaluates.

  Args:
    config: a resolved run config; its learning rate and the numbers of its algorithm may be traced.
    logprobs: (params, prompts=, tokens= [B K L], mask=) -> log-probability and entropy of each
      token (nats, [B K L], 0 where masked), as logprobs.response_logprobs.
  """
  algorithm, method = config.algorithm, algorithms.get(config.algorithm.name)
  init_params, join = lora.init_and_join(config)
  role_weights, objective = method.role_weights(algorithm), method.loss(algorithm)
  roles = list(dict.fromkeys(("reference", *role_weights)))
  reference_copy = {"reference": "params"} if algorithm.reference_period else {}
  copies = {**method.copies, **reference_copy}
  tx = make_optimizer(config.optimizer, config.steps)
  learning_rate = make_schedule(config.optimizer, config.steps)
  kappa = make_kappa(algorithm)
  target_ema = method.target_ema(algorithm)

  def init(base):
    params = init_params(base)
    sources = {"params": params, "opt_state": tx.init(params), "target": params}
    copied = {name: jax.tree.map(jnp.copy, sources[source]) for name, source in copies.items()}
    target = jax.tree.map(jnp.copy, params) if method.keeps_target(algorithm) else None
    params = jax.tree.map(jnp.copy, params)
    return TrainState(jnp.zeros((), jnp.int32), params, target, sources["opt_state"], copied)

  def players(state, reference):
    trained = {"policy": state.params, "target": state.target, **state.copies}
    by_name = {"reference": reference} | {
      name: join(reference, tree)
      for name, tree in trained.items()
      if tree is not None and copies.get(name) != "opt_state"
    }
    return {**by_name, "mixture": (by_name["policy"], by_name["reference"])}

  def loss(policy, part, frozen):
    responses, verdict = part.responses, jax.lax.stop_gradient(part.verdict)
    of_responses = functools.partial(
      logprobs, prompts=part.prompts, tokens=responses.tokens, mask=responses.mask
    )
    logp, entropy = of_responses(policy)
    log_ratios = {
      role: logp - jax.lax.stop_gradient(of_responses(frozen[role])[0]) for role in roles
    }
    over_tokens = functools.partial(jnp.sum, axis=-1)
    metrics = {
      "p_win": Mean.from_values(verdict.p_win[:, 0, -1], verdict.valid[:, 0, -1]),
      "valid": Mean.from_values(jnp.any(verdict.valid, axis=-1)),
      "entropy": Mean.from_values(entropy, responses.mask),
      "response_length": Mean.from_values(over_tokens(responses.mask)),
      "stopped": Mean.from_values(responses.stopped),
      "truncated": Mean.from_values(~responses.stopped),
    }
    for role, log_ratio in log_ratios.items():
      metrics[f"kl_to_{role}"] = Mean.from_values(over_tokens(log_ratio))
    if method.player == "policy":  # others' responses are not drawn from the policy
      metrics["logp_gap"] = Mean.from_values(jnp.abs(logp - responses.logp), responses.mask)
    return {"loss": objective(logp, log_ratios, verdict, role_weights=role_weights), **metrics}

  def train_step(state, reference, batch):
    frozen = players(state, reference)
    grads, metrics = gradients(
      lambda params, part: loss(join(reference, params), part, frozen),
      state.params,
      batch,
      config.optimizer.micro_batches,
    )
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    target = move_target(params, state.target, kappa(state.step))
    metrics |= {
      "gradient_norm": optax.tree.norm(grads),
      "learning_rate": learning_rate(state.step),
      "kappa": kappa(state.step),
    }
    return TrainState(state.step + 1, params, target, opt_state, state.copies), metrics

  def move_target(params, target, kappa):
    return optax.incremental_update(params, target, kappa) if target_ema else target

  def copies_due(step):
    period = algorithm.reference_period
    refresh = reference_copy if period and step % period == 0 else {}
    return tuple(sorted((method.copy_schedule(algorithm, step) | refresh).items()))

  def apply_copies(state, copies):
    own = {name: getattr(state, name) for name in ("params", "target", "opt_state")}
    fields = {**state.copies, **own}
    fields |= {field: jax.tree.map(jnp.copy, fields[source]) for field, source in copies}
    own = {name: fields.pop(name) for name in own}
    return TrainState(state.step, **own, copies=fields)

  return Update(init, players, train_step, copies_due, apply_copies)

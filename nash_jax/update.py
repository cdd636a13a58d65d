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
  """One iteration's data: the responses y to B prompts, and what the judge said of them."""

  prompts: Prompts
  responses: Responses
  verdict: Verdict

  @classmethod
  def of(cls, prompts: Prompts, responses: Responses, verdict: Verdict) -> "Batch":
    """Joins the outputs of the three stages before the update; the judge's metrics stay out."""
    return cls(prompts, responses, verdict.replace(metrics={}))


class Update(NamedTuple):
  """The functions of one algorithm, pure and not yet compiled.

  Attributes:
    init: base -> TrainState; copies what it keeps, so that donation never meets an alias.
    players: (state, ref) -> what each player's responses are drawn from, by name.
    train_step: (state, ref, batch) -> (state, metrics).
    moves: completed steps -> the ((slot, source), ...) that are due there, () mostly.
    rotate: (state, moves) -> state at the end of a phase: slots become copies of their sources.
  """

  init: Callable[[Params], TrainState]
  players: Callable[[TrainState, Params], dict[str, Any]]
  train_step: Callable[[TrainState, Params, Batch], tuple[TrainState, dict]]
  moves: Callable[[int], tuple[tuple[str, str], ...]]
  rotate: Callable[[TrainState, tuple[tuple[str, str], ...]], TrainState]


def make_kappa(config) -> Callable:
  """Returns κ as a function of completed steps: constant, or offset / (k + offset)."""
  if config.kappa_schedule == "harmonic":
    return lambda k: config.kappa_offset / (k + config.kappa_offset)
  return optax.constant_schedule(config.kappa)


def make_update(config, score: Callable) -> Update:
  """Returns the update of `config.algorithm` for the policies that `score` evaluates.

  Args:
    config: a resolved run config; its learning rate and the numbers of its algorithm may be traced.
    score: (params, prompts=, tokens= [B K L], mask=) -> log-probability and entropy of each token
      (nats, [B K L], 0 where masked), as logprobs.response_logprobs.
  """
  a, row = config.algorithm, algorithms.row(config.algorithm.name)
  start, join = lora.of(config)
  weights, objective = row.weights(a), row.loss(a)
  roles = list(dict.fromkeys(("reference", *weights)))
  copies = {**row.copies, **({"reference": "params"} if a.reference_period else {})}
  tx = make_optimizer(config.optimizer, config.steps)
  rate = make_schedule(config.optimizer, config.steps)
  kappa = make_kappa(a)
  move = optax.incremental_update if row.ema(a) else (lambda new, old, k: old)

  def init(base):
    params = start(base)
    slots = {"params": params, "opt_state": tx.init(params), "target": params}
    made = {name: jax.tree.map(jnp.copy, slots[source]) for name, source in copies.items()}
    target = jax.tree.map(jnp.copy, params) if row.keeps_target(a) else None
    return TrainState(
      jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params), target, slots["opt_state"], made
    )

  def players(state, ref):
    trained = {"policy": state.params, "target": state.target, **state.copies}
    named = {"reference": ref} | {
      name: join(ref, tree)
      for name, tree in trained.items()
      if tree is not None and copies.get(name) != "opt_state"
    }
    return {**named, "mixture": (named["policy"], named["reference"])}

  def loss(policy, part, frozen):
    y, verdict = part.responses, jax.lax.stop_gradient(part.verdict)
    of = functools.partial(score, prompts=part.prompts, tokens=y.tokens, mask=y.mask)
    logp, entropy = of(policy)
    ratios = {role: logp - jax.lax.stop_gradient(of(frozen[role])[0]) for role in roles}
    total = functools.partial(jnp.sum, axis=-1)
    return {
      "loss": objective(logp, ratios, verdict, weights=weights),
      "p_win": Mean.of(verdict.p_win[:, 0, -1], verdict.valid[:, 0, -1]),
      "valid": Mean.of(jnp.any(verdict.valid, axis=-1)),
      **{f"kl_to_{role}": Mean.of(total(ratio)) for role, ratio in ratios.items()},
      "entropy": Mean.of(entropy, y.mask),
      # Of other players' responses the sampler's law is not the one that is scored here.
      **({"logp_gap": Mean.of(jnp.abs(logp - y.logp), y.mask)} if row.y == "policy" else {}),
      "response_length": Mean.of(total(y.mask)),
      "stopped": Mean.of(y.stopped),
      "truncated": Mean.of(~y.stopped),
    }

  def train_step(state, ref, batch):
    frozen = players(state, ref)
    grads, metrics = gradients(
      lambda params, part: loss(join(ref, params), part, frozen),
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

  def moves(step):
    refresh = a.reference_period and step % a.reference_period == 0
    due = row.moves(a, step) | ({"reference": "params"} if refresh else {})
    return tuple(sorted(due.items()))

  def rotate(state, moves):
    slots = {**state.copies, "params": state.params, "opt_state": state.opt_state,
             "target": state.target}  # fmt: skip
    slots |= {slot: jax.tree.map(jnp.copy, slots[source]) for slot, source in moves}
    return TrainState(
      state.step, **{name: slots.pop(name) for name in ("params", "target", "opt_state")},
      copies=slots,
    )  # fmt: skip

  return Update(init, players, train_step, moves, rotate)

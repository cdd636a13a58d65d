"""From a batch to the next state: the loss, its gradient in micro-batches, optimiser, target."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import numpy as np
import optax
from jax import numpy as jnp

from nash_jax import sampler
from nash_jax.judges.base import accuracy
from nash_jax.models import lora
from nash_jax.objectives import algorithms
from nash_jax.types import Logprobs, Mean, Params, Prompts, Responses, TrainState, Verdict

Copies = tuple[tuple[str, str], ...]  # (field to overwrite, field it becomes a copy of), sorted


def make_schedule(config, steps: int) -> optax.Schedule:
  """Returns the learning rate as a function of completed steps."""
  peak, end = config.learning_rate, config.learning_rate * config.final_fraction
  decay_steps = max(1, steps - config.warmup_steps)
  decay = {
    "constant": optax.constant_schedule(peak),
    "linear": optax.linear_schedule(peak, end, decay_steps),
    "cosine": optax.cosine_decay_schedule(peak, decay_steps, config.final_fraction),
  }[config.schedule]
  warmup = optax.linear_schedule(peak / max(1, config.warmup_steps), peak, config.warmup_steps)
  return optax.join_schedules([warmup, decay], [config.warmup_steps])


def make_optimizer(config, steps: int) -> optax.GradientTransformation:
  """Returns the named optimiser with its schedule, after clipping by global norm."""
  learning_rate = make_schedule(config, steps)
  betas, decay = (config.b1, config.b2), config.weight_decay
  optimizer = {
    "adamw": lambda: optax.adamw(learning_rate, *betas, config.eps, weight_decay=decay),
    "adafactor": lambda: optax.adafactor(learning_rate),
    "sgd": lambda: optax.sgd(learning_rate),
  }[config.name]()
  clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
  return optax.chain(clip, optimizer)


def make_kappa(config) -> optax.Schedule:
  """Returns κ as a function of completed steps k: constant, or offset / (k + offset)."""
  if config.kappa_schedule == "harmonic":
    return lambda step: config.kappa_offset / (step + config.kappa_offset)
  return optax.constant_schedule(config.kappa)


def gradients(
  loss: Callable[[Params, Any], dict[str, Mean]], params: Params, batch: Any, micro_batches: int
) -> tuple[Params, dict[str, Mean]]:
  """Returns the gradient of the mean loss over a batch, and the batch's metrics.

  It has no leaf for what lora.split freezes.

  Totals and weights are added over micro-batches, so the result does not depend on the split. The
  gradient is 0 if nothing in the batch counts.

  Args:
    loss: (params, part of the batch) -> Means, including "loss".
    micro_batches: number of parts. Each takes every n-th row, so that no row changes its device.
  """

  trained, frozen = lora.split(params)

  def total_loss(trained, part):
    metrics = loss(lora.rejoin(trained, frozen), part)
    return metrics["loss"].total, metrics

  def add(sums, part):
    (_, metrics), grads = jax.value_and_grad(total_loss, has_aux=True)(trained, part)
    return jax.tree.map(jnp.add, sums, (grads, metrics)), None

  parts = _split(batch, micro_batches)
  metric_shapes = jax.eval_shape(loss, params, jax.tree.map(lambda leaf: leaf[0], parts))
  zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (trained, metric_shapes))
  (grads, metrics), _ = jax.lax.scan(add, zeros, parts)
  weight = jnp.where(metrics["loss"].weight > 0, metrics["loss"].weight, 1.0)
  return jax.tree.map(lambda grad: grad / weight, grads), metrics


def _split(batch: Any, parts: int) -> Any:
  return jax.tree.map(
    lambda rows: jnp.moveaxis(rows.reshape(-1, parts, *rows.shape[1:]), 1, 0), batch
  )


def _in_parts(function: Callable, batch: Any, parts: int) -> Any:
  """Returns function(batch) of arrays by row, computed one part of the batch after another."""
  results = jax.lax.map(function, _split(batch, parts))
  return jax.tree.map(lambda rows: jnp.moveaxis(rows, 0, 1).reshape(-1, *rows.shape[2:]), results)


def _repeat(update: Callable, start: Any, times: int) -> tuple[Any, dict[str, Any]]:
  """Returns the end of so many updates on one batch, and the first one's metrics.

  Those of ρ are the last one's: how far the policy has moved from the one that responded. So is the
  gradient's norm, which is not finite if any update before it went wrong.
  """
  if times == 1:
    return update(start, None)
  end, metrics = jax.lax.scan(update, start, length=times)
  first, last = (jax.tree.map(lambda x, i=i: x[i], metrics) for i in (0, -1))
  of_last = ("clipped_low", "clipped_high", "ratio", "gradient_norm")
  return end, first | {name: last[name] for name in of_last}


def apply_gradients(
  optimizer: optax.GradientTransformation, grads: Params, state: TrainState, loss: Mean
) -> tuple[Params, Any]:
  """Returns parameters and optimiser state after a step at the learning rate of `state.step`.

  If the loss is a mean over nothing, both stay as they are: momentum and weight decay would move
  them even with a gradient of 0. The learning rate follows the state's own step, because the
  optimiser's count goes back when an algorithm returns to an earlier optimiser state.
  """
  scheduled = optax.tree.set(state.opt_state, _is_schedule, count=state.step)
  trained, frozen = lora.split(state.params)
  updates, opt_state = optimizer.update(grads, scheduled, trained)
  stepped = optax.apply_updates(trained, updates), opt_state
  trained, opt_state = optax.tree.where(loss.weight > 0, stepped, (trained, state.opt_state))
  return lora.rejoin(trained, frozen), opt_state


def _is_schedule(path, value) -> bool:
  return getattr(path[-1], "tuple_name", "") == optax.ScaleByScheduleState.__name__


@flax.struct.dataclass
class Batch:
  """One iteration's data: B prompts, the responses to them, and the judge's verdict.

  Attributes:
    known: log-probabilities [B K L] of the responses that are known already, by role.
  """

  prompts: Prompts
  responses: Responses
  verdict: Verdict
  known: dict[str, jax.Array] = flax.struct.field(default_factory=dict)

  @classmethod
  def create(cls, prompts: Prompts, responses: Responses, verdict: Verdict) -> "Batch":
    """Joins the outputs of the stages before the update, without the judge's metrics."""
    return cls(prompts, responses, dataclasses.replace(verdict, metrics={}))

  @classmethod
  def of_pairs(cls, pairs: dict[str, Any]) -> "Batch":
    """Returns pairs of a file, as of data.preferences.load_pairs: K = 2, the verdict the file's."""
    none: Any = np.zeros(pairs["tokens"].shape, np.float32)
    responses = Responses(pairs["tokens"], pairs["mask"], none, none, pairs["stopped"])
    p, half = pairs["p_win"], np.full_like(pairs["p_win"], 0.5)
    p_win: Any = np.stack([np.stack([half, p], -1), np.stack([1 - p, half], -1)], 1)
    valid: Any = ~np.eye(2, dtype=bool)[None] & pairs["counted"][:, None, None]
    known = {role: pairs[role] for role in ("reference",) if role in pairs}
    return cls(pairs["prompts"], responses, Verdict(p_win, valid), known)


class Update(NamedTuple):
  """The functions of one algorithm, pure and not yet compiled.

  Attributes:
    init: base -> TrainState, which shares no buffer with the base, so that it can be donated.
    players: (state, reference) -> the parameters of every player; for "mixture" the pair (policy,
      reference).
    train_step: (state, reference, batch) -> (state, metrics).
    measure: (state, reference, batch) -> the metrics of train_step's loss, without a step.
    copies_due: number of completed steps -> the copies to make then, usually ().
    apply_copies: (state, copies, copy) -> state; all fields are read before any is overwritten.
      `copy` takes a field's name, its old tree (None if another copy still reads that) and the tree
      to copy.
  """

  init: Callable[[Params], TrainState]
  players: Callable[[TrainState, Params], dict[str, Any]]
  train_step: Callable[[TrainState, Params, Batch], tuple[TrainState, dict[str, Any]]]
  measure: Callable[[TrainState, Params, Batch], dict[str, Mean]]
  copies_due: Callable[[int], Copies]
  apply_copies: Callable[..., TrainState]


def make_update(config, logprobs: Logprobs) -> Update:
  """Returns the update of `config.algorithm` for policies that `logprobs` evaluates.

  Args:
    config: a resolved run config. The learning rate and the algorithm's numbers may be traced.
  """
  algorithm, method = config.algorithm, algorithms.get(config.algorithm.name)
  role_weights, objective = method.role_weights(algorithm), method.loss(algorithm)
  roles = list(dict.fromkeys(("reference", *role_weights)))
  reference_copy = {"reference": "params"} if algorithm.reference_period else {}
  copied_fields = {**method.copies, **reference_copy}
  target_ema, kappa = method.target_ema(algorithm), make_kappa(algorithm)
  optimizer = make_optimizer(config.optimizer, config.steps)
  learning_rate = make_schedule(config.optimizer, config.steps)
  undistorted = algorithm.behaviour_temperature == 1 and not sampler.truncates(config.sampling)
  # A mean log-ratio is a KL only over samples of the policy itself.
  distance = "kl" if method.player == "policy" and undistorted else "log_ratio"
  own_metrics = _METRICS.get(method.player, lambda *_: {})
  if method.reads_normaliser:
    logprobs = functools.partial(logprobs, normaliser=True)
  of_batch, of_loss = method.of_batch(algorithm), method.metrics(algorithm)
  updates, micro_batches = method.updates(algorithm), config.optimizer.micro_batches
  init_params, join = lora.init_and_join(config)

  def init(base):
    params = init_params(base)
    opt_state = optimizer.init(lora.split(params)[0])
    fields = {"params": params, "opt_state": opt_state, "target": params}
    copies = {name: copy_tree(fields[source]) for name, source in copied_fields.items()}
    target = copy_tree(params) if method.keeps_target(algorithm) else None
    return TrainState(
      jnp.zeros((), jnp.int32), copy_tree(params), target, fields["opt_state"], copies
    )

  def players(state, reference):
    trained = {"policy": state.params, "target": state.target, **state.copies}
    params = {"reference": reference} | {
      name: join(reference, tree)
      for name, tree in trained.items()
      if tree is not None and copied_fields.get(name) != "opt_state"
    }
    return {**params, "mixture": (params["policy"], params["reference"])}

  def evaluate(policy, part):
    answers = {"tokens": part.responses.tokens, "mask": part.responses.mask}
    return logprobs(policy, prompts=part.prompts, **answers)

  def known(part, frozen, roles):
    found = {role: evaluate(frozen[role], part) for role in roles if role not in part.known}
    logp = {role: x[0] for role, x in found.items()}
    return part.known | logp | _normaliser(found.get("reference", ()))

  def loss(policy, part, frozen):
    responses, verdict = part.responses, jax.lax.stop_gradient(part.verdict.checked())
    logp, entropy, *_ = found = evaluate(policy, part)
    frozen_logp = jax.lax.stop_gradient(known(part, frozen, roles))
    own = dict.fromkeys(frozen_logp, logp) | _normaliser(found)
    log_ratios = {role: own[role] - frozen_logp[role] for role in frozen_logp}
    metrics = _batch_metrics(responses, verdict, method.opponent is None)
    metrics["entropy"] = Mean.from_values(entropy, responses.mask)
    for role in roles:
      metrics[f"{distance}_to_{role}"] = Mean.from_values(jnp.sum(log_ratios[role], axis=-1))
    metrics |= own_metrics(logp, log_ratios["reference"], responses, verdict)
    metrics |= of_loss(log_ratios, responses.mask, verdict)
    return {"loss": objective(logp, log_ratios, verdict, role_weights=role_weights), **metrics}

  def prepare(batch, frozen):
    batch = batch.replace(verdict=of_batch(batch.verdict))
    if updates == 1:
      return batch
    # What does not change between updates is computed once, π_old among it.
    remember = functools.partial(known, frozen=frozen, roles=(*roles, "policy"))
    return batch.replace(known=_in_parts(remember, batch, micro_batches))

  def train_step(state, reference, batch):
    frozen = players(state, reference)
    batch = prepare(batch, frozen)

    def part_loss(params, part):
      return loss(join(reference, params), part, frozen)

    def update(moved, _):
      grads, metrics = gradients(part_loss, moved[0], batch, micro_batches)
      here = state.replace(params=moved[0], opt_state=moved[1])
      norm = {"gradient_norm": optax.tree.norm(grads)}
      return apply_gradients(optimizer, grads, here, metrics["loss"]), metrics | norm

    (params, opt_state), metrics = _repeat(update, (state.params, state.opt_state), updates)
    target = move_target(params, state.target, kappa(state.step))
    metrics |= {"learning_rate": learning_rate(state.step), "kappa": kappa(state.step)}
    return TrainState(state.step + 1, params, target, opt_state, state.copies), metrics

  def measure(state, reference, batch):
    frozen = players(state, reference)
    return loss(frozen["policy"], batch, frozen)

  def move_target(params, target, kappa):
    return optax.incremental_update(params, target, kappa) if target_ema else target

  def copies_due(step):
    period = algorithm.reference_period
    refresh = reference_copy if period and step % period == 0 else {}
    return tuple(sorted((method.copy_schedule(algorithm, step) | refresh).items()))

  def apply_copies(state, copies, copy=lambda field, old, source: copy_tree(source)):
    core = {"params": state.params, "target": state.target, "opt_state": state.opt_state}
    fields = {**state.copies, **core}
    read = {source for _, source in copies}
    old = {field: None if field in read else fields[field] for field, _ in copies}
    fields |= {field: copy(field, old[field], fields[source]) for field, source in copies}
    core = {name: fields.pop(name) for name in core}
    return TrainState(state.step, **core, copies=fields)

  return Update(init, players, train_step, measure, copies_due, apply_copies)


def copy_tree(tree: Params) -> Params:
  """Returns the same values in new buffers."""
  return jax.tree.map(jnp.copy, tree)


def _normaliser(found: tuple[jax.Array, ...]) -> dict[str, jax.Array]:
  """Returns the third result of Logprobs, by the name under which losses read it; {} for none."""
  return {"normaliser": found[2]} if len(found) > 2 else {}


def _batch_metrics(responses: Responses, verdict: Verdict, among: bool) -> dict[str, Mean]:
  """Returns the means over pairs, each once where responses are compared `among` themselves."""
  shape = verdict.p_win.shape[1:]
  i, j = np.triu_indices(shape[0], 1) if among else np.indices(shape).reshape(2, -1)
  p_win, valid = verdict.p_win[:, i, j], verdict.valid[:, i, j]
  return {
    "p_win": Mean.from_values(p_win, valid),
    "valid": Mean.from_values(valid),
    "response_length": Mean.from_values(jnp.sum(responses.mask, axis=-1)),
    "stopped": Mean.from_values(responses.stopped),
    "truncated": Mean.from_values(~responses.stopped),
  }


def _sampler_metrics(logp, log_ratio, responses: Responses, verdict: Verdict) -> dict[str, Mean]:
  """Returns how far the sampler's log-probabilities of the policy's own samples are off."""
  return {"logp_gap": Mean.from_values(jnp.abs(logp - responses.logp), responses.mask)}


def _pair_metrics(logp, log_ratio, responses: Responses, verdict: Verdict) -> dict[str, Mean]:
  """Returns how far the policy tells which response of a file's pairs won; ties do not count."""
  p_win, valid = verdict.p_win[:, 0, 1], verdict.valid[:, 0, 1]
  decided, first = valid & (p_win != 0.5), p_win > 0.5
  ratios, totals = jnp.sum(log_ratio, axis=-1), jnp.sum(logp, axis=-1)
  ahead = ratios[:, 0] - ratios[:, 1]
  return {
    "pair_accuracy": accuracy(ahead, p_win, valid),
    "delta": Mean.from_values(jnp.where(first, ahead, -ahead), decided),
    "logp_chosen": Mean.from_values(jnp.where(first, totals[:, 0], totals[:, 1]), decided),
    "logp_rejected": Mean.from_values(jnp.where(first, totals[:, 1], totals[:, 0]), decided),
  }


_METRICS = {"policy": _sampler_metrics, "data": _pair_metrics}  # by who responded

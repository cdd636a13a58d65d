"""One supervised loop: next-token fitting, pairwise judges, Bradley-Terry rewards."""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from absl import logging
from jax import numpy as jnp

from nash_jax import keys, update, weights
from nash_jax.config import describe, resolve
from nash_jax.data import judge_template
from nash_jax.data.corpus import Examples
from nash_jax.data.preferences import load_preferences
from nash_jax.judges import bradley_terry
from nash_jax.judges.gemma import pairwise_loss
from nash_jax.models import gemma, logprobs, lora, sharding
from nash_jax.policy import load_weights, tokenizer_and_model
from nash_jax.run import checkpoint
from nash_jax.run.loop import run_loop
from nash_jax.types import Mean, Params, TrainState
from nash_jax.validation import asset_path, require

PROGRESS_METRICS = ("loss", "eval/loss", "eval/accuracy")


def sft_loss(params, batch, *, model_config, options) -> dict[str, Mean]:
  """Next-token cross-entropy, nats a token, over the tokens that `loss_mask` marks."""
  logp, _ = logprobs.token_logprobs(params, model_config, batch["tokens"], batch["mask"], **options)
  counted = batch["loss_mask"][:, 1:]
  return {"loss": Mean.from_values(-logp, counted)}


def _make_loss(config, model_config, tokenizer):
  options = {"dtype": jnp.dtype(config.model.dtype), "remat": config.model.remat}
  if config.loss == "sft":
    options["chunk"] = config.model.logit_chunk
    return functools.partial(sft_loss, model_config=model_config, options=options)
  if config.loss == "reward":
    return functools.partial(bradley_terry.reward_loss, model_config=model_config, options=options)
  layout = judge_template.layout(config.template, tokenizer)
  return functools.partial(
    pairwise_loss, model_config=model_config, template=layout, options=options
  )


def run(config, workdir: str, progress: bool = True) -> dict[str, float]:
  """Fits a model to texts, responses or preferences; resumes where the workdir left off.

  The best checkpoint by held-out loss is kept, and exported to `config.export` where that is set.

  Returns:
    The held-out figures of the exported weights, as they are after rounding to `export_dtype`
    (of the last ones without an export); none where nothing is held out, or where a signal stopped
    the run.

  Raises:
    ValueError: a bad config, data, weights or workdir, before anything heavy loads.
    FloatingPointError: a loss that is not finite.
  """
  setup, state = run_loop(
    resolve(config, "fit"),
    workdir,
    set_up,
    _loop,
    show=PROGRESS_METRICS,
    progress=progress,
    advice="Lower optimizer.learning_rate.",
  )
  if int(state.step) < setup.config.steps:
    return {}
  if not setup.config.export:
    return _floats(setup.evaluate(setup.join(state.params)))
  del state  # the exported weights take its place
  return _export(setup, workdir)


class Setup(NamedTuple):
  """Everything that a fit works with, compiled functions included; made by `set_up`.

  Attributes:
    reference: the base in which adapters learn, or None.
    state_spec: shapes and shardings of the state.
    initial_state: makes the state in which a fresh fit starts.
    join: from the trained parameters to the model's.
    merge: from the same to a plain model's, float32.
  """

  config: Any
  model_config: gemma.GemmaConfig
  data: Examples
  held_out: Examples
  batch_sharding: jax.sharding.NamedSharding
  reference: Params | None
  state_spec: TrainState
  initial_state: Callable[[], TrainState]
  join: Callable[[Params], Params]
  merge: Callable[[Params], Params]
  train_step: Callable
  evaluate: Callable


def set_up(config) -> Setup:
  """Sets up a fit from its resolved config: first the data, then weights, then functions."""
  tokenizer, model_config = tokenizer_and_model(config.model)
  data, held_out = load_preferences(config.data, tokenizer, config.seed)
  if config.loss != "sft":
    require(
      len(held_out) == 0 or len(held_out) >= config.data.batch_size,
      "data.held_out",
      f"0, or pairs for a batch of {config.data.batch_size}",
      len(held_out),
      "Hold out more, or lower data.batch_size.",
    )
  mesh, base_shapes = sharding.make_mesh(config.mesh), gemma.shapes(model_config)
  batch_sharding, replicated = sharding.batch_sharding(mesh), sharding.replicated(mesh)
  loss = _make_loss(config, model_config, tokenizer)
  init, join, train_step = _make_step(config, loss)
  state_shapes, jit = jax.eval_shape(init, base_shapes), functools.partial(sharding.jit, mesh)
  shardings = sharding.shardings(state_shapes, mesh)
  load = functools.partial(
    load_weights,
    config.model.weights,
    model_config,
    config.seed,
    mesh=mesh,
    head=config.loss == "reward",
  )
  adapted = config.model.lora.rank > 0
  # It is only ever computed with in this type, as the reference of an online run.
  base = load(dtype=jnp.dtype(config.model.dtype)) if adapted else None
  step = jit(train_step, donate_argnums=1, out_shardings=(shardings, replicated))
  return Setup(
    config,
    model_config,
    data,
    held_out,
    batch_sharding,
    base,
    sharding.abstract(state_shapes, shardings),
    initial_state=lambda: jit(init, out_shardings=shardings)(base if adapted else load()),
    join=functools.partial(join, base),
    merge=lambda trained: lora.merge(join(load() if adapted else None, trained)),
    train_step=functools.partial(step, base),
    evaluate=functools.partial(
      _evaluate, jit(loss, out_shardings=replicated), held_out, config, batch_sharding, tokenizer
    ),
  )


def _make_step(config, loss: Callable) -> tuple[Callable, Callable, Callable]:
  """Returns (init, join, train_step): base -> state; lora's join; (base, state, batch) -> ..."""
  head = functools.partial(bradley_terry.add_head, key=keys.key(config.seed, "head"))
  tx = update.make_optimizer(config.optimizer, config.steps)
  learning_rate = update.make_schedule(config.optimizer, config.steps)
  init_params, join = lora.init_and_join(config)

  def init(params):
    if config.loss == "reward" and "head" not in params:
      params = head(params)
    params = init_params(params)
    return TrainState(jnp.zeros((), jnp.int32), params, None, tx.init(params), {})

  def train_step(base, state, batch):
    grads, metrics = update.gradients(
      lambda params, part: loss(join(base, params), part),
      state.params,
      batch,
      config.optimizer.micro_batches,
    )
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics |= {
      "gradient_norm": optax.tree.norm(grads),
      "learning_rate": learning_rate(state.step),
      "tokens": metrics["loss"].weight,
    }
    return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics

  return init, join, train_step


def _loop(setup: Setup, state, first_step, log, checkpoints, stop):
  config, size = setup.config, setup.config.data.batch_size
  for step in itertools.count(first_step):
    final = step == config.steps
    leaving = stop.before(step) or final
    evaluating = len(setup.held_out) > 0 and (step % config.evaluation.every == 0 or final)
    if evaluating:
      metrics = setup.evaluate(setup.join(state.params))
      log.push(step, metrics)
      log.clock(step, "evaluate", metrics)
    if step > first_step and (step % config.checkpoint.every == 0 or leaving):
      log.flush(step)
      checkpoints.save(step, state, -log.value(step, "eval/loss") if evaluating else None)
      log.clock(step, "save", ())
    if leaving:
      return state
    batch = sharding.global_batch(
      setup.batch_sharding, size, functools.partial(setup.data.batch, step, size)
    )
    state, metrics = setup.train_step(state, batch)
    log.clock(step, "update", metrics["gradient_norm"], metrics["tokens"])
    log.push(step, metrics)


def _export(setup: Setup, workdir) -> dict[str, float]:
  config, path = setup.config, asset_path(setup.config.export)
  best, step = checkpoint.restore_part(
    workdir, "params", setup.state_spec.params, best=len(setup.held_out) > 0
  )
  best = setup.merge(best)
  rounded = jax.tree.map(lambda leaf: leaf.astype(config.export_dtype).astype(leaf.dtype), best)
  figures = _floats(setup.evaluate(rounded))
  card = {"step": step, "figures": figures, "config": describe(config)}
  weights.save(path, best, setup.model_config, config.export_dtype, card)
  logging.info("wrote %s: %s", path, figures)
  return figures


def _evaluate(loss, held_out, config, batch_sharding, tokenizer, params) -> dict:
  """Returns eval/ metrics over the held-out part, as device values."""
  size = config.data.batch_size
  count = min(math.ceil(len(held_out) / size), config.evaluation.batches)
  total, texts = {}, []
  for i in range(count):
    # The last batch is filled with the first examples again, in the shape that is compiled.
    places = np.arange(i * size, (i + 1) * size)
    batch = held_out.all(places % len(held_out))
    real = places < len(held_out)
    if config.loss == "sft":
      batch["loss_mask"] = batch["loss_mask"] & real[:, None]
      texts += [batch["tokens"][row][batch["loss_mask"][row]] for row in range(size)]
    elif not real.all():
      break  # pairs weigh alike: the few of a part batch are left out
    values = loss(
      params, sharding.global_batch(batch_sharding, size, functools.partial(_rows, batch))
    )
    total = jax.tree.map(jnp.add, total, values) if total else values
  out = {f"eval/{name}": value for name, value in total.items()}
  if texts:
    text_bytes = sum(len(tokenizer.decode(text).encode()) for text in texts)
    out["eval/bits_per_byte"] = total["loss"].total / (text_bytes * math.log(2))
  return out


def _rows(batch, rows: slice):
  return jax.tree.map(lambda leaf: leaf[rows], batch)


def _floats(values: dict) -> dict[str, float]:
  return {
    name: float(value.value() if isinstance(value, Mean) else value)
    for name, value in jax.device_get(values).items()
  }

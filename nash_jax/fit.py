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

from nash_jax import checkpoint, keys, preferences, tokenizer, update
from nash_jax import config as configs
from nash_jax import workdir as workdirs
from nash_jax.judges import bradley_terry, template
from nash_jax.judges import gemma as gemma_judge
from nash_jax.models import gemma, logprobs, lora, partition, weights
from nash_jax.types import Mean, Params, TrainState

SHOW = ("loss", "eval/loss", "eval/accuracy")


def sft_loss(params, batch, *, model, options) -> dict[str, Mean]:
  """Next-token cross-entropy, nats a token, over the tokens that `loss_mask` marks."""
  logp, _ = logprobs.token_logprobs(params, model, batch["tokens"], batch["mask"], **options)
  counted = batch["loss_mask"][:, 1:]
  return {"loss": Mean.of(-logp, counted)}


def _make_loss(config, model, tok):
  options = {
    "dtype": jnp.dtype(config.model.dtype),
    "remat": config.model.remat,
  }
  if config.loss == "sft":
    options["chunk"] = config.model.logit_chunk
    return functools.partial(sft_loss, model=model, options=options)
  if config.loss == "reward":
    return functools.partial(bradley_terry.reward_loss, model=model, options=options)
  layout = template.layout(config.template, tok)
  return functools.partial(
    gemma_judge.pairwise_loss, model=model, template=layout, options=options
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
  it, state = workdirs.play(
    configs.resolve(config), workdir, assemble, _loop, show=SHOW, progress=progress,
    advice="Lower optimizer.learning_rate.",
  )  # fmt: skip
  if int(state.step) < it.config.steps:
    return {}
  if not it.config.export:
    return _floats(it.evaluate(it.policy(state.params)))
  del state  # what is exported takes its place
  return _export(it, workdir)


class Run(NamedTuple):
  """Everything a fit is assembled from, compiled functions included; made by `assemble`."""

  config: Any
  model: gemma.GemmaConfig
  data: Any
  held_out: Any
  rows: jax.sharding.NamedSharding
  ref: Params | None  # what adapters learn in
  like: TrainState  # shapes and shardings
  begin: Callable[[], TrainState]
  policy: Callable[[Params], Params]  # from what is trained
  merged: Callable[[Params], Params]  # a plain model from the same, float32
  train_step: Callable
  evaluate: Callable


def assemble(config) -> Run:
  """Builds a fit from its resolved config: data first, then weights, then functions."""
  tok = tokenizer.Tokenizer(configs.path(config.model.tokenizer), config.model.template)
  model = gemma.preset(config.model.preset, **config.model.changes)
  tok.check_rows(model.num_embed)
  data, held_out = preferences.load(config.data, tok, config.seed)
  if config.loss != "sft":
    configs.check(
      len(held_out) == 0 or len(held_out) >= config.data.batch_size, "data.held_out",
      f"0, or pairs for a batch of {config.data.batch_size}", len(held_out),
      "Hold out more, or lower data.batch_size.",
    )  # fmt: skip
  mesh, shapes = partition.make_mesh(config.mesh), gemma.shapes(model)
  rows, everywhere = partition.rows(mesh), partition.replicated(mesh)
  head = functools.partial(bradley_terry.add_head, key=keys.key(config.seed, "head"))
  loss = _make_loss(config, model, tok)
  tx = update.make_optimizer(config.optimizer, config.steps)
  rate = update.make_schedule(config.optimizer, config.steps)
  start, join = lora.of(config)

  def init(params):
    if config.loss == "reward" and "head" not in params:
      params = head(params)
    params = start(params)
    return TrainState(jnp.zeros((), jnp.int32), params, None, tx.init(params), {})

  def train_step(base, state, batch):
    grads, values = update.gradients(
      lambda params, part: loss(join(base, params), part), state.params, batch,
      config.optimizer.micro_batches,
    )  # fmt: skip
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    values |= {"gradient_norm": optax.tree.norm(grads), "learning_rate": rate(state.step),
               "tokens": values["loss"].weight}  # fmt: skip
    return state.replace(step=state.step + 1, params=params, opt_state=opt_state), values

  like, jit = jax.eval_shape(init, shapes), functools.partial(partition.jit, mesh)
  shardings = partition.shardings(like, mesh)
  load = functools.partial(
    checkpoint.load_weights, config.model.weights, model, config.seed, mesh=mesh,
    head=config.loss == "reward",
  )  # fmt: skip
  adapted = config.model.lora.rank > 0
  # Computed with in this type alone, as an online run's reference.
  base = load(dtype=jnp.dtype(config.model.dtype)) if adapted else None
  step = jit(train_step, donate_argnums=1, out_shardings=(shardings, everywhere))
  return Run(
    config, model, data, held_out, rows, base, partition.abstract(like, shardings),
    begin=lambda: jit(init, out_shardings=shardings)(base if adapted else load()),
    policy=functools.partial(join, base),
    merged=lambda trained: lora.merge(join(load() if adapted else None, trained)),
    train_step=functools.partial(step, base),
    evaluate=functools.partial(
      _evaluate, jit(loss, out_shardings=everywhere), held_out, config, rows, tok
    ),
  )  # fmt: skip


def _loop(it: Run, state, first, log, checkpoints, stop):
  config = it.config
  for step in itertools.count(first):
    final = step == config.steps
    leave = stop.at(step) or final
    due = len(it.held_out) > 0 and (step % config.evaluation.every == 0 or final)
    if due:
      values = it.evaluate(it.policy(state.params))
      log.push(step, values)
      log.clock(step, "evaluate", values)
    if step > first and (step % config.checkpoint.every == 0 or leave):
      log.flush(step)
      checkpoints.save(step, state, -log.value(step, "eval/loss") if due else None)
      log.clock(step, "save", ())
    if leave:
      return state
    size = config.data.batch_size
    batch = partition.feed(it.rows, size, functools.partial(it.data.batch, step, size))
    state, values = it.train_step(state, batch)
    log.clock(step, "update", values["gradient_norm"], values["tokens"])
    log.push(step, values)


def _export(it: Run, workdir) -> dict[str, float]:
  config, path, like = it.config, configs.path(it.config.export), it.like.params
  best, step = checkpoint.restore_part(workdir, "params", like, best=len(it.held_out) > 0)
  best = it.merged(best)
  rounded = jax.tree.map(lambda x: x.astype(config.export_dtype).astype(x.dtype), best)
  figures = _floats(it.evaluate(rounded))
  card = {"step": step, "figures": figures, "config": configs.describe(config)}
  weights.save(path, best, it.model, config.export_dtype, card)
  logging.info("wrote %s: %s", path, figures)
  return figures


def _evaluate(loss, held_out, config, rows, tok, params) -> dict:
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
    values = loss(params, partition.feed(rows, size, functools.partial(_rows, batch)))
    total = jax.tree.map(jnp.add, total, values) if total else values
  out = {f"eval/{name}": value for name, value in total.items()}
  if texts:
    text_bytes = sum(len(tok.decode(text).encode()) for text in texts)
    out["eval/bits_per_byte"] = total["loss"].total / (text_bytes * math.log(2))
  return out


def _rows(batch, own: slice):
  return jax.tree.map(lambda x: x[own], batch)


def _floats(values: dict) -> dict[str, float]:
  return {
    name: float(value.value() if isinstance(value, Mean) else value)
    for name, value in jax.device_get(values).items()
  }

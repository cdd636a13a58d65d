"""One supervised loop: next-token fitting, and judges: pairwise, rewards, general preferences."""

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
from ml_collections import ConfigDict

from nash_jax import judges, keys, update, weights
from nash_jax.config import describe, resolve
from nash_jax.data import judge_template
from nash_jax.data.corpus import Examples
from nash_jax.data.preferences import load_preferences
from nash_jax.data.tokenizer import Tokenizer
from nash_jax.judges import bradley_terry, gpm
from nash_jax.judges.gemma import pairwise_loss
from nash_jax.models import gemma, logprobs, lora, sharding
from nash_jax.policy import load_weights, read_start, tokenizer_and_model
from nash_jax.run import checkpoint, inputs
from nash_jax.run.loop import run_loop
from nash_jax.run.metrics import number
from nash_jax.types import Mean, Params, TrainState
from nash_jax.validation import asset_path

PROGRESS_METRICS = ("loss", "eval/loss", "eval/accuracy")

Loss = Callable[[Params, Any], dict[str, Mean]]


def sft_loss(
  params: Params, batch: dict[str, jax.Array], *, model_config: gemma.GemmaConfig, options: dict
) -> dict[str, Mean]:
  """Next-token cross-entropy in nats per token, over the tokens of `loss_mask`."""
  logp, _ = logprobs.token_logprobs(params, model_config, batch["tokens"], batch["mask"], **options)
  counted = batch["loss_mask"][:, 1:]
  return {"loss": Mean.from_values(-logp, counted)}


def _make_loss(config, model_config: gemma.GemmaConfig, tokenizer: Tokenizer) -> Loss:
  options: dict[str, Any] = {"dtype": jnp.dtype(config.model.dtype), "remat": config.model.remat}
  loss: Callable[..., dict[str, Mean]]
  if config.loss == "sft":
    loss, options["chunk"] = sft_loss, config.model.logit_chunk
  elif config.loss == "reward":
    loss = bradley_terry.reward_loss
  elif config.loss == "gpm":
    loss = gpm.gpm_loss
  else:
    template = judge_template.layout(config.template, tokenizer)
    loss = functools.partial(pairwise_loss, template=template)
  return functools.partial(loss, model_config=model_config, options=options)


def run(
  config: ConfigDict, workdir: checkpoint.Workdir, progress: bool = True
) -> dict[str, float | None]:
  """Fits a model to texts, responses or preferences; resumes from the workdir's last checkpoint.

  The best checkpoint by held-out loss is kept, and exported to `config.export` if that is set.

  Returns:
    The held-out metrics of the exported weights as rounded to `export_dtype`; without an export, of
    the last weights. {} if nothing is held out or a signal stopped the run.

  Raises:
    ValueError: a bad config, data, weights or workdir, before anything heavy loads.
    FloatingPointError: the loss is not finite; names the step and the last good checkpoint.
    OSError: the workdir cannot be read or written; names the last good checkpoint.
  """
  config, advice = resolve(config, "fit"), "Lower optimizer.learning_rate."
  setup, state = run_loop(config, workdir, set_up, _loop, PROGRESS_METRICS, progress, advice)
  if int(state.step) < config.steps:
    return {}
  if not config.export:
    return _floats(setup.evaluate(setup.join(state.params)))
  del state  # the exported weights take its place
  return _export(setup, workdir)


class Setup(NamedTuple):
  """Everything that a fit needs, including compiled functions; made by `set_up`.

  Attributes:
    reference: the base that adapters are added to; None without adapters.
    state_spec: shapes and shardings of the state.
    initial_state: returns the state of a new fit.
    join: trained parameters -> the model's.
    merge: trained parameters -> those of a plain model, float32.
    train_step: (state, batch) -> (state, metrics); the state is donated.
    evaluate: the model's parameters -> held-out metrics.
  """

  config: ConfigDict
  model_config: gemma.GemmaConfig
  data: Examples
  held_out: Examples
  batch_sharding: jax.sharding.NamedSharding
  reference: Params | None
  state_spec: TrainState
  initial_state: Callable[[], TrainState]
  join: Callable[[Params], Params]
  merge: Callable[[Params], Params]
  train_step: Callable[[TrainState, Any], tuple[TrainState, dict[str, Any]]]
  evaluate: Callable[[Params], dict[str, Any]]

  def inputs(self) -> inputs.Inputs:
    """Returns checksums of everything that the fit has read."""
    return inputs.of_fit(self.config)


def set_up(config: ConfigDict) -> Setup:
  """Sets up a fit from its resolved config: data first, then weights, then functions."""
  tokenizer, model_config = tokenizer_and_model(config.model)
  data, held_out = load_preferences(config.data, tokenizer, config.seed)
  mesh, base_shapes = sharding.make_mesh(config.mesh), gemma.shapes(model_config)
  batch_sharding, replicated = sharding.batch_sharding(mesh), sharding.replicated(mesh)
  loss = _make_loss(config, model_config, tokenizer)
  init, join, train_step = _make_step(config, loss)
  state_shapes, jit = jax.eval_shape(init, base_shapes), functools.partial(sharding.jit, mesh)
  shardings = sharding.shardings(state_shapes, mesh)
  adapted, head = config.model.lora.rank > 0, config.loss in judges.FITTED
  path, seed = config.model.weights, config.seed
  load = functools.partial(load_weights, path, model_config, seed, mesh=mesh, head=head)
  # All computation with the base is in this dtype, so storing it in this dtype loses nothing.
  start = read_start(config.model, model_config, head)
  base = load(dtype=jnp.dtype(config.model.dtype)) if adapted else None
  step = jit(train_step, donate_argnums=1, out_shardings=(shardings, replicated))
  jit_loss = jit(loss, out_shardings=replicated)
  return Setup(
    config, model_config, data, held_out, batch_sharding, base,
    sharding.abstract(state_shapes, shardings),
    initial_state=lambda: jit(init, out_shardings=shardings)(start(base) if adapted else load()),
    join=functools.partial(join, base),
    merge=lambda trained: lora.merge(join(load() if adapted else None, trained)),
    train_step=functools.partial(step, base),
    evaluate=functools.partial(_evaluate, jit_loss, held_out, config, batch_sharding, tokenizer),
  )  # fmt: skip


def _make_step(config, loss: Loss) -> tuple[Callable, Callable, Callable]:
  """Returns init: base -> state, lora's join, and train_step: (base, state, batch) -> (state,
  metrics).
  """
  tx = update.make_optimizer(config.optimizer, config.steps)
  learning_rate = update.make_schedule(config.optimizer, config.steps)
  init_params, join = lora.init_and_join(config)

  def init(params):
    if judge := judges.FITTED.get(config.loss):
      params = judges.with_head(judge, params, keys.key(config.seed, "head"), config)
    params = init_params(params)
    opt_state = tx.init(lora.split(params)[0])
    return TrainState(jnp.zeros((), jnp.int32), params, None, opt_state, {})

  def train_step(base, state, batch):
    def joined_loss(params, part):
      return loss(join(base, params), part)

    micro_batches = config.optimizer.micro_batches
    grads, means = update.gradients(joined_loss, state.params, batch, micro_batches)
    params, opt_state = update.apply_gradients(tx, grads, state, means["loss"])
    metrics = means | {
      "gradient_norm": optax.tree.norm(grads),
      "learning_rate": learning_rate(state.step),
      "tokens": _tokens(batch),
    }
    return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics

  return init, join, train_step


def _tokens(batch: dict[str, Any]) -> jax.Array:
  """Returns a batch's number of tokens: predicted ones, or all in prompts and pairs."""
  if "loss_mask" in batch:
    return jnp.sum(batch["loss_mask"][:, 1:])
  masks = (batch["prompts"].mask, batch["a_mask"], batch["b_mask"])
  return sum((jnp.sum(mask) for mask in masks), start=jnp.int32(0))


def _loop(setup: Setup, state: TrainState, first_step: int, log, checkpoints, stop):
  config, size = setup.config, setup.config.data.batch_size
  for step in itertools.count(first_step):
    final = step >= config.steps
    stopping = stop.before(step) or final
    evaluating = len(setup.held_out) > 0 and (step % config.evaluation.every == 0 or final)
    if evaluating:
      metrics = setup.evaluate(setup.join(state.params))
      log.push(step, metrics)
      log.clock(step, "evaluate", metrics)
    if step > first_step and (step % config.checkpoint.every == 0 or stopping):
      log.flush(step)
      loss = log.value(step, "eval/loss") if evaluating else None
      checkpoints.save(step, state, None if loss is None else -loss)
      log.clock(step, "save", ())
    if stopping:
      return state
    read_rows = functools.partial(setup.data.batch, step, size)
    batch = sharding.global_batch(setup.batch_sharding, size, read_rows)
    state, metrics = setup.train_step(state, batch)
    log.clock(step, "update", metrics["gradient_norm"], metrics["tokens"])
    log.push(step, metrics)


def _export(setup: Setup, workdir: checkpoint.Workdir) -> dict[str, float | None]:
  config, path, held_out = setup.config, asset_path(setup.config.export), len(setup.held_out) > 0
  spec = setup.state_spec.params
  params, step = checkpoint.restore_part(workdir, "params", spec, best=held_out)
  params = setup.merge(params)
  rounded = jax.tree.map(lambda leaf: leaf.astype(config.export_dtype).astype(leaf.dtype), params)
  figures = _floats(setup.evaluate(rounded))
  card = {"step": step, "figures": figures, "config": describe(config)}
  weights.save(path, params, setup.model_config, config.export_dtype, card)
  logging.info("wrote %s: %s", path, figures)
  return figures


def _evaluate(
  loss: Loss, held_out: Examples, config, batch_sharding, tokenizer: Tokenizer, params: Params
) -> dict[str, Any]:
  """Returns eval/ metrics over the held-out part, on the device."""
  size = config.data.batch_size
  total: dict[str, Mean] = {}
  num_bytes = 0
  for i in range(min(math.ceil(len(held_out) / size), config.evaluation.batches)):
    # The first examples fill the last batch to the compiled shape, but do not count.
    places = np.arange(i * size, (i + 1) * size)
    batch = held_out.all(places % len(held_out))
    real = places < len(held_out)
    if config.loss == "sft":
      batch["loss_mask"] = batch["loss_mask"] & real[:, None]
      texts = [batch["tokens"][row][batch["loss_mask"][row]] for row in range(size)]
      num_bytes += sum(len(tokenizer.decode(text).encode()) for text in texts)
    else:
      batch["counted"] = real
    read_rows = functools.partial(_rows, batch)
    means = loss(params, sharding.global_batch(batch_sharding, size, read_rows))
    total = jax.tree.map(jnp.add, total, means) if total else means
  metrics: dict[str, Any] = {f"eval/{name}": mean for name, mean in total.items()}
  if num_bytes:
    metrics["eval/bits_per_byte"] = total["loss"].total / (num_bytes * math.log(2))
  return metrics


def _rows(batch: Any, rows: slice) -> Any:
  return jax.tree.map(lambda leaf: leaf[rows], batch)


def _floats(values: dict[str, Any]) -> dict[str, float | None]:
  return {name: number(x) for name, x in jax.device_get(values).items()}

"""A policy, from a run's config: tokenizer, architecture, weights, log-probabilities, samplers."""

import functools
import os
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jax import numpy as jnp
from ml_collections import ConfigDict

from nash_jax import keys, sampler, weights
from nash_jax.data.tokenizer import Tokenizer
from nash_jax.models import gemma, logprobs, lora, sharding
from nash_jax.models.gemma import GemmaConfig
from nash_jax.run import checkpoint
from nash_jax.types import Params
from nash_jax.validation import asset_path, require


class Policy(NamedTuple):
  """How responses get their log-probabilities and are drawn, whatever the parameters.

  Attributes:
    logprobs: (params, prompts=, tokens= [B K L], mask=) -> log-probability and entropy of each
      token, in nats, [B K L], 0 where masked.
    make_sampler: (samples=, mixture=, behaviour_temperature=) -> sampler.Sample.
  """

  logprobs: Callable
  make_sampler: Callable[..., sampler.Sample]


def tokenizer_and_model(model) -> tuple[Tokenizer, GemmaConfig]:
  """Returns the tokenizer and the architecture of the `model` part of a config.

  Raises:
    ValueError: no such tokenizer or preset, or a tokenizer with more pieces than the model's rows.
  """
  tokenizer = Tokenizer(asset_path(model.tokenizer), model.template)
  model_config = gemma.preset(model.preset, **model.changes)
  tokenizer.check_rows(model_config.num_embed)
  return tokenizer, model_config


def make_policy(model, sampling, tokenizer, model_config: GemmaConfig) -> Policy:
  """Returns the policy of a config's `model` and `sampling` parts."""
  shared = {
    "forbidden": _forbidden(sampling, tokenizer, model_config),
    "temperature": sampling.temperature,
    "dtype": jnp.dtype(model.dtype),
  }
  return Policy(
    functools.partial(
      logprobs.response_logprobs,
      model_config=model_config,
      remat=model.remat,
      chunk=model.logit_chunk,
      **shared,
    ),
    functools.partial(
      sampler.make_sampler,
      model_config,
      max_tokens=sampling.max_tokens,
      stop_ids=tokenizer.stop_ids,
      pad_id=tokenizer.pad_id,
      top_k=sampling.top_k,
      top_p=sampling.top_p,
      **shared,
    ),
  )


def _forbidden(sampling, tokenizer, model_config):
  """Returns bool[V], the ids that no policy may draw."""
  forbidden = tokenizer.forbidden(model_config.num_embed)
  allowed = np.asarray(sampling.tokens, int)
  if not len(allowed):
    return jnp.asarray(forbidden)
  known = (allowed >= 0) & (allowed < tokenizer.size)
  require(
    bool(known.all()),
    "sampling.tokens",
    f"ids below the tokenizer's {tokenizer.size} pieces",
    allowed[~known].tolist(),
    "Leave it empty to allow every piece.",
  )
  return jnp.asarray(~np.isin(np.arange(model_config.num_embed), allowed))


def load_weights(
  spec: str,
  model_config: GemmaConfig,
  seed: int = 0,
  dtype=jnp.float32,
  mesh=None,
  *,
  head: bool = False,
) -> Params:
  """Returns parameters from a file or a run, or random ones for "".

  Args:
    spec: what weights.load takes, "assets:...", or a run's workdir: "runs/x" (its newest params),
      "runs/x@target", "runs/x@params:50", "runs/x@params:best". Adapters that the run trained are
      merged into the weights it trained them on.
    mesh: on which the parameters are laid out as they load; default the first device.
    head: keep the head that a reward model's file has.

  Raises:
    ValueError: no such weights, or ones of another shape (the first difference is named); adapters
      whose base has changed.
  """
  shapes = gemma.shapes(model_config)
  shardings = None if mesh is None else sharding.shardings(shapes, mesh)
  if not spec:
    init = jax.jit(
      lambda key: gemma.cast(gemma.init(key, model_config), dtype), out_shardings=shardings
    )
    return init(keys.key(seed, "init"))
  path, _, field_and_step = asset_path(spec).partition("@")
  if not os.path.isdir(path) or weights.kind(path):
    params = weights.load(path, model_config, dtype, shardings)
    return params if head else {name: leaf for name, leaf in params.items() if name != "head"}
  return _load_from_run(path, field_and_step, model_config, shapes, shardings, dtype, mesh)


def _load_from_run(path, field_and_step, model_config, shapes, shardings, dtype, mesh) -> Params:
  field, _, step = field_and_step.partition(":")
  run_config, join = checkpoint.read_config(path), None
  if run_config.get("model", {}).get("lora", {}).get("rank"):
    init, join = lora.init_and_join(ConfigDict(run_config))
    shapes = jax.eval_shape(init, shapes)
    base = load_weights(run_config["model"]["weights"], model_config, run_config["seed"], mesh=mesh)
    checkpoint.verify_base(path, gemma.cast(base, run_config["model"]["dtype"]))
  if mesh is not None:
    shapes = sharding.abstract(shapes, sharding.shardings(shapes, mesh))
  trained, _ = checkpoint.restore_part(
    path, field or "params", shapes, int(step) if step.isdigit() else None, step == "best"
  )
  if join is None:
    return gemma.cast(trained, dtype)
  merge = jax.jit(
    lambda base, trained: gemma.cast(lora.merge(join(base, trained)), dtype),
    out_shardings=shardings,
  )
  return merge(base, trained)

"""A policy, from a run's config: tokenizer, architecture, weights, log-probabilities, samplers."""

import functools
import os
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jax import numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Bool
from ml_collections import ConfigDict

from nash_jax import keys, sampler, weights
from nash_jax.data.tokenizer import Tokenizer
from nash_jax.models import gemma, logprobs, lora, sharding
from nash_jax.models.gemma import GemmaConfig
from nash_jax.run import checkpoint
from nash_jax.types import Logprobs, Params
from nash_jax.validation import asset_path, require


class Policy(NamedTuple):
  """How responses are sampled and get their log-probabilities, whatever the parameters.

  Attributes:
    make_sampler: (samples=, mixture=, behaviour_temperature=) -> sampler.Sample.
  """

  logprobs: Logprobs
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


def make_policy(model, sampling, tokenizer: Tokenizer, model_config: GemmaConfig) -> Policy:
  """Returns the policy of a config's `model` and `sampling` parts."""
  shared = {
    "model_config": model_config,
    "forbidden": _forbidden(sampling, tokenizer, model_config),
    "temperature": sampling.temperature,
    "dtype": jnp.dtype(model.dtype),
  }
  return Policy(
    functools.partial(
      logprobs.response_logprobs, remat=model.remat, chunk=model.logit_chunk, **shared
    ),
    functools.partial(
      sampler.make_sampler, max_tokens=sampling.max_tokens, stop_ids=tokenizer.stop_ids,
      pad_id=tokenizer.pad_id, top_k=sampling.top_k, top_p=sampling.top_p, **shared,
    ),
  )  # fmt: skip


def _forbidden(sampling, tokenizer: Tokenizer, model_config: GemmaConfig) -> Bool[Array, "V"]:
  """Returns which ids no policy may sample."""
  forbidden = tokenizer.forbidden(model_config.num_embed)
  allowed = np.asarray(sampling.tokens, int)
  if not len(allowed):
    return jnp.asarray(forbidden)
  expected = f"ids below the tokenizer's {tokenizer.size} pieces, none of a marker or of padding"
  unknown = allowed[~np.isin(allowed, np.flatnonzero(~forbidden))].tolist()
  fix = "Leave it empty to allow every piece."
  require(not unknown, "sampling.tokens", expected, unknown, fix)
  return jnp.asarray(~np.isin(np.arange(model_config.num_embed), allowed))


def load_weights(
  spec: str,
  model_config: GemmaConfig,
  seed: int = 0,
  dtype: DTypeLike = jnp.float32,
  mesh: Mesh | None = None,
  *,
  head: bool = False,
) -> Params:
  """Returns parameters from a file or a run, or random ones for "".

  Args:
    spec: what weights.load takes, "assets:...", or a run's workdir: "runs/x" (its newest params),
      "runs/x@target", "runs/x@params:50", "runs/x@params:best". Adapters that the run trained are
      merged into the weights that it adapted.
    mesh: on which the parameters are laid out as they load; default the first device.
    head: keep the head that a reward model's file has.

  Raises:
    ValueError: no such weights, or ones of another shape (the first difference is named); adapters
      whose base has changed.
  """
  shardings = None if mesh is None else sharding.shardings(gemma.shapes(model_config), mesh)

  def init(key: Array) -> Params:
    return gemma.cast(gemma.init(key, model_config), dtype)

  if not spec:
    return jax.jit(init, out_shardings=shardings)(keys.key(seed, "init"))
  path, _, field_and_step = asset_path(spec).partition("@")
  if os.path.isdir(path) and not weights.kind(path):
    return _load_from_run(path, field_and_step, model_config, dtype, mesh, shardings)
  params = weights.load(path, model_config, dtype, shardings)
  return params if head else {name: leaf for name, leaf in params.items() if name != "head"}


def _load_from_run(
  path: str, field_and_step: str, model_config: GemmaConfig, dtype, mesh, shardings
) -> Params:
  field, _, step = field_and_step.partition(":")
  run_config, shapes = checkpoint.read_config(path), gemma.shapes(model_config)
  adapted = bool(run_config.get("model", {}).get("lora", {}).get("rank"))
  if adapted:
    init, join = lora.init_and_join(ConfigDict(run_config))
    shapes = jax.eval_shape(init, shapes)
    base = load_weights(run_config["model"]["weights"], model_config, run_config["seed"], mesh=mesh)
    checkpoint.verify_base(path, gemma.cast(base, run_config["model"]["dtype"]))
  if mesh is not None:
    shapes = sharding.abstract(shapes, sharding.shardings(shapes, mesh))
  trained, _ = checkpoint.restore_part(
    path, field or "params", shapes, int(step) if step.isdigit() else None, step == "best"
  )
  if not adapted:
    return gemma.cast(trained, dtype)

  def merge(base: Params, trained: Params) -> Params:
    return gemma.cast(lora.merge(join(base, trained)), dtype)

  return jax.jit(merge, out_shardings=shardings)(base, trained)

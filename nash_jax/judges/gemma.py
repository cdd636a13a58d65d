"""A Gemma that reads two responses and answers A or B.

Its verdict is the average over both orders, so it is antisymmetric by construction.
"""

import filecmp
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
from jax import numpy as jnp
from jaxtyping import Array, Float

from nash_jax import keys, weights
from nash_jax.data import judge_template
from nash_jax.data.judge_template import Layout, assemble, shown
from nash_jax.data.tokenizer import Tokenizer
from nash_jax.judges.base import Compare, Comparison, Judge, accuracy, pairwise
from nash_jax.models import gemma, sharding
from nash_jax.types import Answers, Mean, Params, Prompts
from nash_jax.validation import asset_path


def answer_states(
  params: Params,
  model_config: gemma.GemmaConfig,
  layout: Layout,
  prompts: Prompts,
  a: Answers,
  b: Answers,
  **options,
) -> Float[Array, "N 2 D"]:
  """Returns the hidden states from which the answers' logits are read, in both orders.

  [:, 0] shows a then b, [:, 1] b then a. `options` are those of gemma.forward (dtype, remat).
  """
  # Interleaved, so that both orders of a pair stay on the device that has its row.
  orders = zip(assemble(layout, prompts, a, b), assemble(layout, prompts, b, a), strict=True)
  tokens, mask = (jnp.stack(arrays, 1).reshape(2 * len(a.tokens), -1) for arrays in orders)
  positions, visible = gemma.positions_of(mask), gemma.causal_mask(mask)
  x, _ = gemma.forward(params, model_config, tokens, positions, visible, **options)
  return x[:, -1].reshape(len(a.tokens), 2, -1)


def answer_logits(
  params: Params,
  model_config: gemma.GemmaConfig,
  layout: Layout,
  prompts: Prompts,
  a: Answers,
  b: Answers,
  **options,
) -> Float[Array, "N 2 2"]:
  """Returns soft-capped float32 logits of the answers (first, second), in both orders.

  [:, 0] shows a then b, [:, 1] b then a. `options` are those of gemma.forward (dtype, remat).
  """
  x = answer_states(params, model_config, layout, prompts, a, b, **options)
  rows = params["embedder"]["input_embedding"][jnp.asarray(layout.answers)]
  flat = x.reshape(-1, x.shape[-1])
  logits = gemma.logits({"embedder": {"input_embedding": rows}}, model_config, flat)
  return logits.reshape(-1, 2, 2)


def _margins(*args, **options) -> tuple[Float[Array, "N"], Float[Array, "N"]]:
  """Returns the log-odds of a over b with a shown first, and with b shown first."""
  logits = answer_logits(*args, **options)
  margin = logits[..., 0] - logits[..., 1]
  return margin[:, 0], -margin[:, 1]


def _average(first: Float[Array, "N"], second: Float[Array, "N"]) -> Float[Array, "N"]:
  """Returns P(a ≻ b) over both orders; exchanging a and b gives exactly 1 - p."""
  gap = jax.nn.sigmoid(first) - jax.nn.sigmoid(-second)
  winner = 0.5 + 0.5 * jnp.abs(gap)  # 1 minus a float of [1/2, 1] is exact
  return jnp.where(gap < 0, 1 - winner, winner)


def pairwise_loss(
  params: Params, batch: dict, *, model_config: gemma.GemmaConfig, template: Layout, options: dict
) -> dict[str, Mean]:
  """Returns cross-entropy (nats) against p_win in both orders, and the average verdict's accuracy.

  Args:
    batch: preferences as from data.preferences.load_preferences; `counted` [B] may exclude rows.
    options: those of gemma.forward (dtype, remat).
  """
  a, b = Answers(batch["a_tokens"], batch["a_mask"]), Answers(batch["b_tokens"], batch["b_mask"])
  first, second = _margins(params, model_config, template, batch["prompts"], a, b, **options)
  margins, p_win = jnp.stack([first, second], 1), batch["p_win"]
  soft = p_win[:, None] * jax.nn.log_sigmoid(margins)
  soft += (1 - p_win[:, None]) * jax.nn.log_sigmoid(-margins)
  counted = batch.get("counted", jnp.ones(p_win.shape, bool))
  return {
    "loss": Mean.from_values(-soft, counted[:, None]),
    "accuracy": accuracy(_average(first, second) - 0.5, p_win, counted),
  }


def make(config, tokenizer: Tokenizer, params: Params | None = None, mesh=None) -> Judge:
  """Builds the judge; see judges.make."""
  model_config, options = architecture(config.model, tokenizer)
  answers = tuple(config.answers)
  layout = judge_template.layout(config.template, tokenizer, answers, config.max_tokens)

  def compare(params: Params, prompts: Prompts, a: Answers, b: Answers) -> Comparison:
    first, second = _margins(params, model_config, layout, prompts, a, b, **options)
    valid = jnp.isfinite(first) & jnp.isfinite(second)
    metrics = {"flip_rate": Mean.from_values((first > 0) != (second > 0), valid)}
    if layout.max_tokens:
      cut = shown(layout, prompts, a, b)[1]
      metrics |= {"judge_cut": Mean.from_values(cut > 0), "judge_cut_tokens": Mean.from_values(cut)}
    return Comparison(_average(first, second), valid, metrics, jax.nn.sigmoid(first))

  if params is None:
    params = load(config.model, model_config, gemma.init, mesh)
  return Judge(params, pairwise(functools.partial(_in_parts, compare, config.micro_batches)))


def _in_parts(compare: Compare, most: int, params, prompts, a, b) -> Comparison:
  """Compares N pairs in gcd(most, N) parts, one after another, to save memory.

  The result is the same. Each part takes every n-th pair, so that no pair changes its device.
  """
  if (parts := math.gcd(most, len(a.tokens))) == 1:
    return compare(params, prompts, a, b)

  def split(leaf):
    return jnp.moveaxis(leaf.reshape(-1, parts, *leaf.shape[1:]), 1, 0)

  rows = jax.tree.map(split, (prompts, a, b))
  p, valid, metrics, p_first = jax.lax.map(lambda part: compare(params, *part), rows)
  metrics = jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), metrics)
  p, valid, p_first = jax.tree.map(lambda leaf: leaf.T.reshape(-1), (p, valid, p_first))
  return Comparison(p, valid, metrics, p_first)


def architecture(
  config, tokenizer: Tokenizer, what: str = "judge.model"
) -> tuple[gemma.GemmaConfig, dict[str, Any]]:
  """Returns a judge's architecture and options for gemma.forward from a `model` config.

  Args:
    what: the config's name, for errors.

  Raises:
    ValueError: a tokenizer other than the policy's, or with more pieces than the model has rows.
  """
  path, policy_path = asset_path(config.tokenizer), tokenizer.path
  if not filecmp.cmp(path, policy_path, shallow=False):
    raise ValueError(
      f"{what}.tokenizer is {path!r}, but the judge reads tokens of the policy's tokenizer, "
      f"{policy_path!r}. Choose a judge with the policy's tokenizer, or judge.name='gemma_text', "
      "which reads text"
    )
  model_config = gemma.preset(config.preset, **config.changes)
  tokenizer.check_rows(model_config.num_embed)
  return model_config, {"dtype": jnp.dtype(config.dtype)}


def load(config, model_config: gemma.GemmaConfig, init: Callable, mesh=None) -> Params:
  """Returns parameters in `config.dtype`, from `config.weights` or random if that is "".

  They load directly into their sharding, or to the first device without a mesh. `init` takes a key
  and the architecture.
  """
  dtype, key, shardings = jnp.dtype(config.dtype), keys.key(0, "judge"), None

  def make_random(key: Array) -> Params:
    return gemma.cast(init(key, model_config), dtype)

  if mesh is not None:
    shardings = sharding.shardings(jax.eval_shape(make_random, key), mesh)
  if config.weights:
    return weights.load(asset_path(config.weights), model_config, dtype, shardings)
  return jax.jit(make_random, out_shardings=shardings)(key)

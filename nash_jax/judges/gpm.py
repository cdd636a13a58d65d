"""A general preference model: a Gemma reads a response into a vector v, and P = σ(s(v, v')).

s is antisymmetric, so it can cycle, as no difference of rewards can. Zhang et al., 2410.02197.
"""

import functools

import jax
from jax import numpy as jnp
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from nash_jax.data.tokenizer import Tokenizer
from nash_jax.judges.base import Comparison, Judge, pairwise
from nash_jax.judges.bradley_terry import cross_entropy, last_states
from nash_jax.judges.gemma import architecture, load
from nash_jax.models import gemma
from nash_jax.types import Answers, Mean, Params, Prompts
from nash_jax.validation import require

UNFITTED = 0.2  # bound of the standard deviation of s in an unfitted model


def add_head(params: Params, key: Array, config: ConfigDict) -> Params:
  """Returns a Gemma's parameters with a random head, `head/v` [D, 2 blocks].

  As for a reward model, the head divides by the length of the final norm's output. At `head/v` = 0
  its gradient would be 0 too, so that s starts larger than rewards do.

  Args:
    config: a group `gpm`; with `prompt_scale` there is `head/scale` [D, blocks], which starts at 0,
      where all blocks weigh the same.
  """
  norm = 1 + params["final_norm"]["scale"].astype(jnp.float32)
  deviation = jnp.sqrt(UNFITTED / jnp.sqrt(2 * config.blocks)) / jnp.linalg.norm(norm)
  head = {"v": deviation * jax.random.normal(key, (*norm.shape, 2 * config.blocks))}
  if config.prompt_scale:
    head["scale"] = jnp.zeros((*norm.shape, config.blocks))
  return {**params, "head": head}


def vectors(
  params: Params, model_config: gemma.GemmaConfig, prompts: Prompts, answers: Answers, **options
) -> Float[Array, "N G"]:
  """Returns v(x, y) from the hidden state of each response's last token; two columns a block.

  With `head/scale`, block l is multiplied by √λ_l(x), where λ is the softmax of the state of the
  prompt's last token, times the number of blocks. `options` are gemma.forward's (dtype, remat).
  """
  prompt, response = last_states(params, model_config, prompts, answers, **options)
  head = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params["head"])
  v = response @ head["v"]
  if "scale" not in head:
    return v
  weight = head["scale"].shape[1] * jax.nn.softmax(prompt @ head["scale"])
  return v * jnp.repeat(jnp.sqrt(weight), 2, axis=1)


def score(a: Float[Array, "N G"], b: Float[Array, "N G"]) -> Float[Array, "N"]:
  """Returns s(a, b) = Σ_l a_{2l-1} b_{2l} - a_{2l} b_{2l-1}, the log-odds of a over b.

  s(b, a) = -s(a, b), to the last bit: exchanging a and b exchanges the two sums.
  """
  return jnp.sum(a[:, 0::2] * b[:, 1::2], axis=1) - jnp.sum(a[:, 1::2] * b[:, 0::2], axis=1)


def gpm_loss(
  params: Params, batch: dict, *, model_config: gemma.GemmaConfig, options: dict
) -> dict[str, Mean]:
  """Returns cross-entropy (nats) of σ(s) against p_win, and accuracy; see bradley_terry."""
  read = functools.partial(vectors, params, model_config, **options)
  return cross_entropy(read, score, batch)


def make(config, tokenizer: Tokenizer, params: Params | None = None, mesh=None) -> Judge:
  """Builds the judge; see judges.make."""
  model_config, options = architecture(config.model, tokenizer)

  def init(key: Array, model_config: gemma.GemmaConfig) -> Params:
    base = gemma.init(jax.random.fold_in(key, 0), model_config)
    return add_head(base, jax.random.fold_in(key, 1), config.gpm)

  if params is None:
    params = load(config.model, model_config, init, mesh)
  fitted = jax.eval_shape(functools.partial(init, model_config=model_config), jax.random.key(0))
  got, expected = (jax.tree.map(jnp.shape, x.get("head", {})) for x in (params, fitted))
  fix = "Set judge.gpm as it was fitted; `nash-jax fit --config.loss=gpm` fits one."
  what = f"judge.model.weights {config.model.weights!r}: head"
  require(got == expected, what, f"shapes {expected}, of judge.gpm", got or "none", fix)

  def read(params, prompts, answers):
    return vectors(params, model_config, prompts, answers, **options)

  def compare(params, prompts, a, b) -> Comparison:
    ahead = score(a, b)
    return Comparison(jax.nn.sigmoid(ahead), jnp.isfinite(ahead), {})

  return Judge(params, pairwise(compare, read))

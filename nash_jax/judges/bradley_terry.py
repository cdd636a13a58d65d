"""A reward model: a Gemma with a linear head, and P(y ≻ y' | x) = σ(R(x, y) - R(x, y'))."""

import functools
from collections.abc import Callable

import jax
from jax import numpy as jnp
from jaxtyping import Array, Float

from nash_jax.data.tokenizer import Tokenizer
from nash_jax.judges.base import Judge, accuracy, compare_rewards, pairwise
from nash_jax.judges.gemma import architecture, load
from nash_jax.models import gemma
from nash_jax.types import Answers, Mean, Params, Prompts

UNFITTED = 0.1  # standard deviation of the rewards of an unfitted model


def init(key: Array, model_config: gemma.GemmaConfig) -> Params:
  """Returns random parameters with a head."""
  return add_head(gemma.init(jax.random.fold_in(key, 0), model_config), jax.random.fold_in(key, 1))


def add_head(params: Params, key: Array) -> Params:
  """Returns a Gemma's parameters with a random head, `head/w` [D].

  The final norm's output has the length of 1 + scale, which is large in a real Gemma. The head
  divides by it, so that rewards are about UNFITTED and an unfitted model's loss is about ln 2.
  """
  scale = 1 + params["final_norm"]["scale"].astype(jnp.float32)
  w = UNFITTED * jax.random.normal(key, scale.shape) / jnp.linalg.norm(scale)
  return {**params, "head": {"w": w}}


def rewards(
  params: Params, model_config: gemma.GemmaConfig, prompts: Prompts, answers: Answers, **options
) -> Float[Array, "N"]:
  """Returns R(x, y) from the hidden state of each response's last token.

  `options` are those of gemma.forward (dtype, remat).
  """
  _, x = last_states(params, model_config, prompts, answers, **options)
  return x @ params["head"]["w"].astype(jnp.float32)


def last_states(
  params: Params, model_config: gemma.GemmaConfig, prompts: Prompts, answers: Answers, **options
) -> tuple[Float[Array, "N D"], Float[Array, "N D"]]:
  """Returns the float32 hidden states of each prompt's and of each response's last token."""
  mask = jnp.concatenate([prompts.mask, answers.mask], axis=1)
  tokens = jnp.concatenate([prompts.tokens, answers.tokens], axis=1)
  positions, visible = gemma.positions_of(mask), gemma.causal_mask(mask)
  x, _ = gemma.forward(params, model_config, tokens, positions, visible, **options)
  prompt_end = prompts.mask.shape[1] - 1
  last = prompt_end + answers.mask.sum(axis=1)
  response = jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
  return x[:, prompt_end].astype(jnp.float32), response.astype(jnp.float32)


def reward_loss(
  params: Params, batch: dict, *, model_config: gemma.GemmaConfig, options: dict
) -> dict[str, Mean]:
  """Returns cross-entropy (nats) of σ(R - R') against p_win, and accuracy where p_win != 1/2.

  Args:
    batch: preferences as from data.preferences.load_preferences; `counted` [B] may exclude rows.
    options: those of gemma.forward (dtype, remat).
  """
  read = functools.partial(rewards, params, model_config, **options)
  return cross_entropy(read, jnp.subtract, batch)


def cross_entropy(
  read: Callable[[Prompts, Answers], Array], margin: Callable[[Array, Array], Array], batch: dict
) -> dict[str, Mean]:
  """Returns cross-entropy (nats) of σ(margin) against p_win, and accuracy where p_win != 1/2.

  Args:
    read: what a judge reads of each response; margin: of two readings, the log-odds of the first.
    batch: as that of `reward_loss`.
  """
  pairs = (jnp.stack([batch[f"a_{name}"], batch[f"b_{name}"]], 1) for name in ("tokens", "mask"))
  answers = Answers(*(pair.reshape(-1, pair.shape[-1]) for pair in pairs))
  prompts = jax.tree.map(lambda leaf: jnp.repeat(leaf, 2, axis=0), batch["prompts"])
  readings, p_win = read(prompts, answers), batch["p_win"]
  readings = readings.reshape(-1, 2, *readings.shape[1:])
  ahead = margin(readings[:, 0], readings[:, 1])
  soft = p_win * jax.nn.log_sigmoid(ahead) + (1 - p_win) * jax.nn.log_sigmoid(-ahead)
  counted = batch.get("counted", jnp.ones(p_win.shape, bool))
  return {"loss": Mean.from_values(-soft, counted), "accuracy": accuracy(ahead, p_win, counted)}


def make(config, tokenizer: Tokenizer, params: Params | None = None, mesh=None) -> Judge:
  """Builds the judge; see judges.make."""
  model_config, options = architecture(config.model, tokenizer)
  if params is None:
    params = load(config.model, model_config, init, mesh)
  if {*params.get("head", {})} != {"w"}:
    raise ValueError(
      f"judge.model.weights {config.model.weights!r} has no reward head (leaf head/w): fit one "
      "with `nash-jax fit --config.loss=reward`, or use judge.name='gemma'"
    )

  def read(params, prompts, answers):
    return rewards(params, model_config, prompts, answers, **options)

  return Judge(params, pairwise(compare_rewards, read, scalar=True))

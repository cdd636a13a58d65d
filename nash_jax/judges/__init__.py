"""Judges: the probability that one response to a prompt is preferred to another."""

from collections.abc import Callable

import jax
from jax import numpy as jnp
from jaxtyping import Array
from ml_collections import ConfigDict

from nash_jax.data.tokenizer import Tokenizer
from nash_jax.judges import bradley_terry, gemma, gpm, http, human, own, population, table, text
from nash_jax.judges.base import (
  MODELS,
  TIE,
  Comparison,
  Judge,
  JudgeFn,
  compare_rewards,
  labels,
  pairwise,
)
from nash_jax.judges.own import from_texts
from nash_jax.models.gemma import GemmaConfig
from nash_jax.models.gemma import shapes as gemma_shapes
from nash_jax.types import Answers, Params
from nash_jax.validation import one_of, require

__all__ = [
  "FITTED", "JUDGES", "MODELS", "SCALAR", "TIE", "Answers", "Judge", "JudgeFn", "compare_rewards",
  "from_texts", "labels", "make", "pairwise", "shapes", "with_head",
]  # fmt: skip


def none(config, tokenizer: Tokenizer, params: Params | None = None, mesh=None) -> Judge:
  """Builds the judge of a run without one: no comparison is valid."""

  def compare(params, prompts, a, b) -> Comparison:
    size = prompts.index.shape
    return Comparison(jnp.full(size, 0.5), jnp.zeros(size, bool), {})

  return Judge({}, pairwise(compare))


# {name in a config: how to make the judge}; see `make`.
JUDGES = {
  "gemma": gemma.make, "gemma_text": text.make, "bradley_terry": bradley_terry.make,
  "population": population.make, "table": table.make, "table_reward": table.make,
  "http": http.make, "human": human.make, "none": none, "gpm": gpm.make,
}  # fmt: skip
SCALAR = ("bradley_terry", "table_reward")  # judges whose verdicts hold rewards
# Judges that read a head: (a model's parameters, key, config) -> the same with a random head.
_HEADS: dict[str, Callable[[Params, Array, ConfigDict], Params]] = {
  "bradley_terry": lambda params, key, config: bradley_terry.add_head(params, key),
  "gpm": lambda params, key, config: gpm.add_head(params, key, config.gpm),
}
FITTED = {"reward": "bradley_terry", "gpm": "gpm"}  # by the loss of `fit`: whose head is fitted


def make(
  config, tokenizer: Tokenizer, params: Params | None = None, mesh=None, rewards: bool = False
) -> Judge:
  """Builds the judge that `config` (the `judge` part of a run's config) names.

  Args:
    tokenizer: the policy's tokenizer, which prompts and responses are in.
    params: the parameters of a gemma or bradley_terry judge if they are already loaded; otherwise
      they come from `config.model.weights`, and are random if that is "".
    mesh: the mesh to lay the parameters out on; by default the first device.
    rewards: whether verdicts must have scalar rewards, as those of SCALAR do.

  Raises:
    ValueError: an unknown judge, weights or a tokenizer that do not fit, a table that is no game,
      a user's function that returns no judge.
  """
  if own.is_own(config.name):
    return own.make(config, tokenizer, mesh, rewards)
  one_of("judge.name", config.name, [*JUDGES, own.FORM])
  return JUDGES[config.name](config, tokenizer, params, mesh)


def with_head(name: str, params: Params, key: Array, config: ConfigDict) -> Params:
  """Returns a model's parameters with the head that a judge reads: their own, or a random one.

  Args:
    config: of a judge or of a fit, whose group `gpm` has the sizes.

  Raises:
    ValueError: the head of another judge, or one of other sizes.
  """
  fresh = _HEADS[name](params, key, config)
  if "head" not in params:
    return fresh
  got, expected = (jax.tree.map(jnp.shape, x["head"]) for x in (params, fresh))
  fix = "Start from a model without a head, or set loss and gpm as it was fitted."
  require(got == expected, "model.weights: head", f"none, or shapes {expected}", got, fix)
  return params


def shapes(name: str, config: ConfigDict, model_config: GemmaConfig) -> Params:
  """Returns the shapes of a judge's parameters in float32; `config` is that of `with_head`."""
  found = gemma_shapes(model_config)
  if name not in _HEADS:
    return found
  return jax.eval_shape(lambda x: with_head(name, x, jax.random.key(0), config), found)

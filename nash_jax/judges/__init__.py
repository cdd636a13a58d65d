"""Judges: the probability that one response to a prompt is preferred to another."""

from jax import numpy as jnp

from nash_jax.data.tokenizer import Tokenizer
from nash_jax.judges import bradley_terry, gemma, http, human, own, population, table, text
from nash_jax.judges.base import TIE, Comparison, Judge, JudgeFn, compare_rewards, labels, pairwise
from nash_jax.judges.own import from_texts
from nash_jax.types import Answers, Params
from nash_jax.validation import one_of

__all__ = [
  "JUDGES", "SCALAR", "TIE", "Answers", "Judge", "JudgeFn", "compare_rewards", "from_texts",
  "labels", "make", "pairwise",
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
  "http": http.make, "human": human.make, "none": none,
}  # fmt: skip
SCALAR = ("bradley_terry", "table_reward")  # judges whose verdicts hold rewards


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

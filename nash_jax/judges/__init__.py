"""Judges: which of two responses to a prompt is preferred, and with what probability."""

from nash_jax.data.tokenizer import Tokenizer
from nash_jax.judges import bradley_terry, gemma, http, population, table, text
from nash_jax.judges.base import TIE, Judge, JudgeFn, labels, pairwise
from nash_jax.types import Answers, Params
from nash_jax.validation import one_of

__all__ = ["JUDGES", "SCALAR", "TIE", "Answers", "Judge", "JudgeFn", "labels", "make", "pairwise"]

# How to make each judge, by its name in a config; see `make`.
JUDGES = {
  "gemma": gemma.make, "gemma_text": text.make, "bradley_terry": bradley_terry.make,
  "population": population.make, "table": table.make, "table_reward": table.make,
  "http": http.make,
}  # fmt: skip
SCALAR = ("bradley_terry", "table_reward")  # judges whose verdicts hold rewards


def make(config, tokenizer: Tokenizer, params: Params | None = None, mesh=None) -> Judge:
  """Builds the judge that `config` (the `judge` part of a run's config) names.

  Args:
    tokenizer: the policy's, whose tokens prompts and responses consist of.
    params: of a gemma or bradley_terry judge, where they are loaded already; else they come from
      `config.model.weights`, and are random where that is "".
    mesh: on which the parameters are laid out as they load; default the first device.

  Raises:
    ValueError: an unknown judge, weights or a tokenizer that do not fit, a table that is no game.
  """
  one_of("judge.name", config.name, JUDGES)
  return JUDGES[config.name](config, tokenizer, params, mesh)

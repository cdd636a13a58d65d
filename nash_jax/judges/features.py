"""Features of pairs of responses, in which a judge's log-odds are linear: see `design.optimal`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from nash_jax import keys
from nash_jax.data import judge_template
from nash_jax.data.tokenizer import Tokenizer
from nash_jax.judges.bradley_terry import last_states
from nash_jax.judges.gemma import answer_states, architecture, load
from nash_jax.models import gemma
from nash_jax.types import Answers, Params, Prompts, Responses


class Features(NamedTuple):
  """Parameters, and fn(params, prompts, responses) -> features of all pairs of responses.

  The pairs (i, j), i < j, of a prompt's K responses follow one another as in np.triu_indices(K, 1).
  """

  params: Params
  fn: Callable[[Params, Prompts, Responses], Float[Array, "B C D"]]


def make(config: ConfigDict, tokenizer: Tokenizer, seed: int) -> Features:
  """Builds the features of a model.

  - `bradley_terry`: h(x, y) - h(x, y'), where h is the state that a reward model's head would read,
    that of the response's last token. The head applied to it is the log-odds.
  - `gemma`: h(x, y, y') - h(x, y', y), where h is the state from which a pairwise judge answers. Of
    a model without a final soft-cap, the difference of the answers' embeddings applied to it is the
    sum of the log-odds in both orders.

  Args:
    config: the group `features` of a collection's config. Models with more than `dimension`
      features are projected to so many, at random.
    seed: of the projection.

  Raises:
    ValueError: a tokenizer other than the policy's, or weights that do not fit.
  """
  model_config, options = architecture(config.model, tokenizer, "features.model")
  size = model_config.embed_dim
  projection = jnp.eye(size)
  if size > config.dimension:
    shape = (size, config.dimension)
    projection = jax.random.normal(keys.key(seed, "projection"), shape) / config.dimension**0.5
  if config.name == "gemma":
    layout = judge_template.layout(config.template, tokenizer, max_tokens=config.max_tokens)

  def fn(params: Params, prompts: Prompts, responses: Responses) -> Float[Array, "B C D"]:
    batch, samples = responses.stopped.shape
    i, j = np.triu_indices(samples, 1)

    def answers(places: Any) -> tuple[Prompts, Answers]:
      """Returns the responses at `places` as rows, and their prompts."""
      fields = Answers(responses.tokens, responses.mask, responses.stopped)
      rows = jax.tree.map(lambda x: x[:, places].reshape(-1, *x.shape[2:]), fields)
      return jax.tree.map(lambda x: jnp.repeat(x, len(places), axis=0), prompts), rows

    if config.name == "gemma":
      (repeated, a), (_, b) = answers(i), answers(j)
      states = answer_states(params, model_config, layout, repeated, a, b, **options)
      found = (states[:, 0] - states[:, 1]).reshape(batch, len(i), size)
    else:
      _, states = last_states(params, model_config, *answers(np.arange(samples)), **options)
      states = states.reshape(batch, samples, size)
      found = states[:, i] - states[:, j]
    return found.astype(jnp.float32) @ projection

  return Features(load(config.model, model_config, gemma.init), fn)

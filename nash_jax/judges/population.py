"""A population of annotators: P(y ≻ y' | x) is the share of its types that prefer y.

P = E_Z[1{f(x, y, Z) > f(x, y', Z)} + 1/2·1{f(x, y, Z) = f(x, y', Z)}]. If types order responses
differently, P can be cyclic, which no scalar reward reproduces.
"""

import dataclasses
import re

import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, Float

from nash_jax.data.tokenizer import Tokenizer
from nash_jax.judges.base import Comparison, Judge, pairwise
from nash_jax.models import sharding
from nash_jax.types import Answers, Params


@dataclasses.dataclass(frozen=True)
class Annotator:
  """One type of annotator.

  Its utility f of a response is min(Σ_t [matches of `pattern` in the text of token t], cap) +
  stopped·(finish + per_token·tokens).
  """

  pattern: str = ""
  cap: float = np.inf
  finish: float = 0.0
  per_token: float = 0.0


_HAPPY = (
  "happy happily smile smiled fun laughed love loved hug hugged play played playing friend friends"
  " excited"
)
STORYTELLERS = {
  "dialogue": Annotator('"', cap=6),
  "cheer": Annotator(rf"(?i)^ ?(?:{_HAPPY.replace(' ', '|')})$", cap=4),
  # Prefers many short sentences.
  "pace": Annotator(r"[.!?]+", cap=8),
}


def make(config, tokenizer: Tokenizer, params=None, mesh=None) -> Judge:
  """Builds the judge of the annotators STORYTELLERS; see judges.make."""
  built = judge(tokenizer)
  return Judge(sharding.shard(built.params, mesh), built.fn)


def judge(tokenizer: Tokenizer, types: dict[str, Annotator] = STORYTELLERS) -> Judge:
  """Builds the judge of a population with equal shares of each of `types`."""
  pieces = [tokenizer.decode([i]) for i in range(tokenizer.size)]
  patterns = [(re.compile(t.pattern), bool(t.pattern)) for t in types.values()]
  counts = [[used and len(p.findall(piece)) for p, used in patterns] for piece in pieces]
  params = {"counts": jnp.asarray(counts, jnp.float32)}  # [V Z]; the others [Z]
  for name in ("cap", "finish", "per_token"):
    params[name] = jnp.asarray([getattr(t, name) for t in types.values()], jnp.float32)
  return Judge(params, pairwise(compare, utilities))


def utilities(params: Params, prompts, answers: Answers) -> Float[Array, "N Z"]:
  """Returns f(x, y, Z)."""
  assert answers.stopped is not None, "judges read whether a response is finished"
  counts = jnp.where(answers.mask[..., None], params["counts"][answers.tokens], 0.0).sum(axis=1)
  length = answers.mask.sum(axis=1)[:, None]
  closed = params["finish"][None] + params["per_token"][None] * length
  return jnp.minimum(counts, params["cap"][None]) + answers.stopped[:, None] * closed


def compare(params, prompts, a: Float[Array, "N Z"], b: Float[Array, "N Z"]) -> Comparison:
  """Compares utilities a and b; see base.pairwise."""
  p = jnp.mean(jnp.where(a == b, 0.5, a > b), axis=1)
  return Comparison(p, jnp.ones(p.shape, bool), {})

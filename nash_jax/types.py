"""The nouns that cross files.

Axis letters, used everywhere: B prompts, K samples a prompt, J compared samples, Lp prompt
tokens, L response tokens, V vocabulary rows.
"""

from typing import Any

import flax.struct
from jax import numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Params = Any  # a pytree of arrays


@flax.struct.dataclass
class Prompts:
  """Left-padded prompts; `index` is the prompt's place in the whole data set."""

  tokens: Int[Array, "B Lp"]
  mask: Bool[Array, "B Lp"]
  index: Int[Array, "B"]


@flax.struct.dataclass
class Responses:
  """K responses of one player to each prompt, left-aligned, stop token included.

  Attributes:
    tokens: pad id after the stop token.
    mask: True on the response's own tokens, its stop token included.
    logp: log-probability of each token under the trained distribution (temperature and
      forbidden ids applied, no top-k or top-p), nats; 0 where masked.
    logp_sampling: the same under the law the token was really drawn from.
    stopped: False where the response was cut at L tokens.
  """

  tokens: Int[Array, "B K L"]
  mask: Bool[Array, "B K L"]
  logp: Float[Array, "B K L"]
  logp_sampling: Float[Array, "B K L"]
  stopped: Bool[Array, "B K"]


@flax.struct.dataclass
class Verdict:
  """What a judge says of y against y'.

  Attributes:
    p_win: P(y_k ≻ y'_j | x).
    valid: False where there is no comparison (a response with itself, an unreadable verdict).
    scores: scalar rewards of y, where the judge has such.
    metrics: `Mean`s of the judge's own, such as the position-flip rate.
  """

  p_win: Float[Array, "B K J"]
  valid: Bool[Array, "B K J"]
  scores: Float[Array, "B K"] | None = None
  metrics: dict[str, "Mean"] = flax.struct.field(default_factory=dict)


@flax.struct.dataclass
class TrainState:
  """Everything a run needs to go on.

  Attributes:
    step: completed steps, i32[].
    params: the online policy, float32.
    target: the prox centre, float32, shaped as params; None where the algorithm has none.
    opt_state: optax's.
    copies: frozen trees an algorithm holds, by name.
  """

  step: Int[Array, ""]
  params: Params
  target: Params
  opt_state: Any
  copies: dict[str, Params]


@flax.struct.dataclass
class Mean:
  """A mean kept as its sum and weight, so that parts combine exactly."""

  total: Float[Array, ""]
  weight: Float[Array, ""]

  @classmethod
  def of(cls, values, where=None) -> "Mean":
    """Sums `values` over the entries where `where` (broadcastable, default all) is true."""
    values = jnp.asarray(values)
    values = values.astype(jnp.promote_types(values.dtype, jnp.float32))
    where = jnp.ones_like(values) if where is None else jnp.broadcast_to(where, values.shape)
    where = where.astype(values.dtype)
    return cls(jnp.sum(jnp.where(where > 0, values, 0.0) * where), jnp.sum(where))

  def value(self):
    """total / weight; NaN where nothing was counted."""
    return self.total / self.weight

"""The types that several files share.

Axis letters, the same everywhere: B prompts, K responses of a player to each, J responses that they
are compared with, Lp prompt tokens, L response tokens, V vocabulary rows, N rows of a flat batch.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
from jax import numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

ROUNDING = 1e-6  # by which a probability of float32 sums may lie outside of [0, 1]

Params = Any  # a pytree of arrays
# (params, prompts=, tokens= [B K L], mask=) -> log-probability and entropy of each token: nats,
# 0 where masked; with normaliser=True also the log-normaliser of the logits that it is drawn by. So
# is models.logprobs.response_logprobs.
Logprobs = Callable[..., tuple[Float[Array, "B K L"], ...]]


@flax.struct.dataclass
class Prompts:
  """Left-padded prompts; `index` is each prompt's place in its data set."""

  tokens: Int[Array, "B Lp"]
  mask: Bool[Array, "B Lp"]
  index: Int[Array, "B"]


@flax.struct.dataclass
class Responses:
  """K responses of one player to each prompt, left-aligned, stop token included.

  Attributes:
    tokens: token ids; the pad id after the stop token.
    mask: True on the response's tokens, its stop token included.
    logp: log-probability of each token under the trained distribution (temperature and
      forbidden ids applied, no top-k or top-p), in nats; 0 where masked.
    logp_sampling: the same under the distribution that the token was sampled from.
    stopped: False where the response was cut off at L tokens.
  """

  tokens: Int[Array, "B K L"]
  mask: Bool[Array, "B K L"]
  logp: Float[Array, "B K L"]
  logp_sampling: Float[Array, "B K L"]
  stopped: Bool[Array, "B K"]


class Answers(NamedTuple):
  """N responses, one to each of N prompts, as a judge reads them; fields as in Responses."""

  tokens: Int[Array, "N L"]
  mask: Bool[Array, "N L"]
  stopped: Bool[Array, "N"] | None = None


@flax.struct.dataclass
class Verdict:
  """A judge's preferences between responses y and the responses y' they are compared with.

  Attributes:
    p_win: P(y_k ≻ y'_j | x).
    valid: False where there is no comparison (a response with itself, an unreadable answer).
    rewards: scalar rewards of y, where the judge has them.
    metrics: the judge's `Mean`s, such as the position-flip rate.
    deviation: of the whole batch's advantages, the same for all, where a loss divides by it.
    p_win_first: P(y_k ≻ y'_j | x) where y_k is shown first, of a judge that is shown both orders;
      p_win is the mean of both.
  """

  p_win: Float[Array, "B K J"]
  valid: Bool[Array, "B K J"]
  rewards: Float[Array, "B K"] | None = None
  metrics: dict[str, "Mean"] = flax.struct.field(default_factory=dict)
  p_win_first: Float[Array, "B K J"] | None = None
  deviation: Float[Array, "B"] | None = None

  def checked(self) -> "Verdict":
    """Returns it with every comparison not valid that has no probability or no finite reward.

    Their P becomes 1/2: a NaN that a mask hides would still be one in the gradient.
    """
    valid = self.valid & is_probability(self.p_win)
    if self.rewards is not None:
      valid &= jnp.isfinite(self.rewards)[..., None]
    p_win = jnp.where(valid, jnp.clip(self.p_win, 0, 1), 0.5)
    first = self.p_win_first
    if first is not None:
      first = jnp.where(valid, jnp.clip(first, 0, 1), 0.5)
    return self.replace(p_win=p_win, valid=valid, p_win_first=first)  # type: ignore[attr-defined]


def is_probability(p: Float[Array, "*n"]) -> Bool[Array, "*n"]:
  """Returns where P lies in [0, 1], to rounding: NaN does not."""
  return (p >= -ROUNDING) & (p <= 1 + ROUNDING)


@flax.struct.dataclass
class TrainState:
  """Everything a run needs in order to continue.

  Attributes:
    step: completed steps, i32[].
    params: the online policy, float32.
    target: the prox centre, float32, shaped as params; None where the algorithm has none.
    opt_state: the optax optimiser's state.
    copies: the frozen trees that an algorithm holds, by name.
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
  def from_values(cls, values: ArrayLike, where: ArrayLike | None = None) -> "Mean":
    """Sums `values` over the entries where `where` (broadcastable, default all) is true."""
    values = jnp.asarray(values)
    values = values.astype(jnp.promote_types(values.dtype, jnp.float32))
    where = jnp.ones_like(values) if where is None else jnp.broadcast_to(where, values.shape)
    where = where.astype(values.dtype)
    return cls(jnp.sum(jnp.where(where > 0, values, 0.0) * where), jnp.sum(where))

  def value(self) -> Float[Array, ""]:
    """total / weight; NaN where nothing was counted."""
    return self.total / self.weight

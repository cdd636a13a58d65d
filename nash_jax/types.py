"""Types that several files share.

Axis letters, the same everywhere: B prompts, K responses of a player to each prompt, J responses
they are compared with, Lp prompt tokens, L response tokens, V vocabulary rows, N rows of a flat
batch.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
from jax import numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

ROUNDING = 1e-6  # how far float32 rounding may push a probability outside [0, 1]

Params = Any  # a pytree of arrays
# (params, prompts=, tokens= [B K L], mask=) -> log-probability and entropy of each token in nats,
# 0 where masked. models.logprobs.response_logprobs is one.
Logprobs = Callable[..., tuple[Float[Array, "B K L"], Float[Array, "B K L"]]]


@flax.struct.dataclass
class Prompts:
  """Left-padded prompts; `index` is each prompt's position in its data set."""

  tokens: Int[Array, "B Lp"]
  mask: Bool[Array, "B Lp"]
  index: Int[Array, "B"]


@flax.struct.dataclass
class Responses:
  """K responses of one player to each prompt, left-aligned, stop token included.

  Attributes:
    tokens: token ids; the pad id after the stop token.
    mask: True on the response's tokens, its stop token included.
    logp: log-probability of each token under the trained distribution (with temperature and
      forbidden ids, without top-k and top-p), in nats; 0 where masked.
    logp_sampling: the same under the distribution that the token was sampled from.
    stopped: False if the response was cut off at L tokens.
  """

  tokens: Int[Array, "B K L"]
  mask: Bool[Array, "B K L"]
  logp: Float[Array, "B K L"]
  logp_sampling: Float[Array, "B K L"]
  stopped: Bool[Array, "B K"]


class Answers(NamedTuple):
  """N responses, one to each of N prompts, in the form a judge reads; fields as in Responses."""

  tokens: Int[Array, "N L"]
  mask: Bool[Array, "N L"]
  stopped: Bool[Array, "N"] | None = None


@flax.struct.dataclass
class Verdict:
  """A judge's preferences between responses y and the responses y' they are compared with.

  Attributes:
    p_win: P(y_k ≻ y'_j | x).
    valid: False where there is no comparison (a response with itself, an unreadable answer).
    rewards: scalar rewards of y; None if the judge has none.
    metrics: `Mean`s about the judge, such as the position-flip rate.
    p_win_first: P(y_k ≻ y'_j | x) with y_k shown first, if the judge reads both orders; p_win is
      then the mean of both.
  """

  p_win: Float[Array, "B K J"]
  valid: Bool[Array, "B K J"]
  rewards: Float[Array, "B K"] | None = None
  metrics: dict[str, "Mean"] = flax.struct.field(default_factory=dict)
  p_win_first: Float[Array, "B K J"] | None = None

  def checked(self) -> "Verdict":
    """Returns the verdict with comparisons marked invalid that lack a probability or finite reward.

    Their P becomes 1/2, because a NaN would reach the gradient even through a mask.
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
  """Returns where P lies in [0, 1] up to rounding; False for NaN."""
  return (p >= -ROUNDING) & (p <= 1 + ROUNDING)


@flax.struct.dataclass
class TrainState:
  """Everything a run needs in order to continue.

  Attributes:
    step: completed steps.
    params: the online policy, float32.
    target: the prox centre, with the shapes of params; None if the algorithm has none.
    opt_state: the optax optimiser's state.
    copies: the frozen trees that an algorithm keeps, by name.
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
    """Sums `values` over the entries where `where` (broadcastable, by default all) is true."""
    values = jnp.asarray(values)
    values = values.astype(jnp.promote_types(values.dtype, jnp.float32))
    where = jnp.ones_like(values) if where is None else jnp.broadcast_to(where, values.shape)
    where = where.astype(values.dtype)
    return cls(jnp.sum(jnp.where(where > 0, values, 0.0) * where), jnp.sum(where))

  def value(self) -> Float[Array, ""]:
    """Returns total / weight; NaN if nothing was counted."""
    return self.total / self.weight

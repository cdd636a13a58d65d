"""Losses of arrays; they know no model, tokenizer or config.

Axes: B prompts, K responses of the policy to each, J responses each is compared with. All
log-probabilities are sums over a response's tokens, in nats.
"""

import jax
from jax import numpy as jnp
from jaxtyping import Array, Bool, Float

from nash_jax.types import Mean

Ratios = dict[str, Float[Array, "B K"]]


def score_function(
  logp: Float[Array, "B K"],
  ratios: Ratios,
  p_win: Float[Array, "B K J"],
  valid: Bool[Array, "B K J"],
  *,
  kl: dict[str, float],
  arms: int = 2,
  centre: bool = False,
) -> Mean:
  """Surrogate whose gradient is NashMP's estimator and its relatives' (2505.19731, section 5).

  The gradient is the mean over prompts of (arms / K) Σ_k ∇log π(y_k)·coef(y_k), with
  coef = 1/2 − mean_j P(y_k≻y_j) + Σ_role kl[role]·ratios[role](y_k), all of it under stop_gradient:
  differentiating a log-ratio through its own samples gives zero expected KL gradient.

  Args:
    logp: log π_θ(y_k), differentiated.
    ratios: log π_θ − log π_role, one array a role in `kl`.
    valid: comparisons that count; a response without any weighs nothing.
    kl: weight of each role's KL term: β for the reference, β/η for the target.
    arms: 2 where opponents are the policy's own samples, so that both sides of every comparison
      carry a gradient (its expectation is 2·∇J); 1 otherwise.
    centre: subtract from each log-ratio the mean over the prompt's other responses; the expectation
      stays, the variance at large KL falls.
  """
  count = jnp.sum(valid, axis=-1)
  wins = jnp.sum(jnp.where(valid, p_win, 0.0), axis=-1) / jnp.maximum(count, 1)
  penalty = sum(weight * _centred(ratios[role], centre) for role, weight in kl.items())
  coefficient = jax.lax.stop_gradient(0.5 - wins + penalty)
  weight = (count > 0).astype(logp.dtype)
  samples = logp.shape[1]
  return Mean(
    jnp.sum(weight * coefficient * logp) * arms / samples, jnp.sum(weight) / samples
  )


def _centred(ratio, centre):
  samples = ratio.shape[1]
  if not centre:
    return ratio
  others = (jnp.sum(ratio, axis=1, keepdims=True) - ratio) / (samples - 1)
  return ratio - others

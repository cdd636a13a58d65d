"""Losses in two families, policy gradients and regressions: arrays in, a `Mean` out.

Axes as in types.py. Every loss takes:

- `logp`: log π_θ of each token; gradients flow through it and through `log_ratios`;
- `log_ratios`: {role: log π_θ − log π_role of each token};
- `verdict`: the judge's;
- `role_weights`: {role: number}.

Masked tokens are 0. When responses are compared with each other, J = K and the diagonal is invalid.
"""

import jax
from jax import numpy as jnp
from jaxtyping import Array, Bool, Float

from nash_jax.types import Mean, Verdict

Logp = Float[Array, "B K L"]
LogRatios = dict[str, Float[Array, "B K L"]]  # by role
Number = float | Float[Array, ""]  # an array when the config's numbers are traced
Weights = dict[str, Number]  # by role


def policy_gradient(
  logp: Logp,
  log_ratios: LogRatios,
  verdict: Verdict,
  *,
  role_weights: Weights,
  arms: int,
  centre: bool = False,
  to_go: bool = False,
) -> Mean:
  """Surrogate whose gradient is the estimator of NashMP and its relatives (2505.19731, section 5).

  The gradient is the mean over prompts of (arms / K) Σ_k ∇log π(y_k)·coef(y_k), with
  coef = 1/2 − mean_j P(y_k≻y'_j) + Σ_role weight_role·log_ratio_role(y_k) under stop_gradient:
  differentiating the coefficient as well would add only ∇log π_θ(y), whose expectation is 0.
  A response without a valid comparison has weight 0.

  Args:
    role_weights: β for the reference, β/η for the target.
    arms: 2 if the opponents are the policy's own samples: both sides of a comparison then carry a
      gradient, and its expectation is twice that of the objective. Otherwise 1.
    centre: subtract from each log-ratio the mean over the prompt's other responses with a valid
      comparison. This keeps the expectation and lowers the variance at large KL.
    to_go: a token's coefficient counts only the log-ratios of this token and later ones. On policy
      this keeps the expectation (Munos et al. 2312.00886, section 7).
  """
  wins, compared = _mean_wins(verdict)
  penalty = _penalty(log_ratios, role_weights, compared, centre, to_go)
  return _surrogate(logp, 0.5 - wins[..., None] + penalty, compared, arms)


def reinforce(
  logp: Logp,
  log_ratios: LogRatios,
  verdict: Verdict,
  *,
  role_weights: Weights,
  centre: bool = False,
  to_go: bool = False,
) -> Mean:
  """Surrogate of REINFORCE with leave-one-out rewards: coef = −(R_k − mean_{j≠k} R_j) + penalty.

  The scale is that of `policy_gradient` with arms = 2: the gradient's expectation is twice the
  gradient of −E[R] + Σ_role role_weights[role]·KL. A response that the judge could not read counts
  neither in the loss nor in the mean of the others. Source: RLOO, Ahmadian et al. 2402.14740.
  """
  assert verdict.rewards is not None, "algorithms.needs_rewards holds only judges with rewards"
  counted = _mean_wins(verdict)[1] & jnp.isfinite(verdict.rewards)
  counted &= jnp.sum(counted, axis=1, keepdims=True) > 1  # one response has no others
  rewards = jnp.where(counted, verdict.rewards, 0.0)
  advantage = rewards - _mean_of_others(rewards, counted)
  penalty = _penalty(log_ratios, role_weights, counted, centre, to_go)
  return _surrogate(logp, penalty - advantage[..., None], counted, arms=2)


def regression(
  logp: Logp, log_ratios: LogRatios, verdict: Verdict, *, role_weights: Weights, scale: Number
) -> Mean:
  """Mean of (h(y) − h(y') − scale·(P(y≻y') − 1/2))² over pairs, h = Σ weight·log_ratio.

  Online IPO and IPO-MD (2403.08635): h = log π_θ/π_ref, scale = 1/β. INPO (2407.00617): h = log π_θ
  − sβ log π_ref − (1 − sβ) log π_t, scale = s.
  """
  h = _weighted(log_ratios, role_weights)
  return _over_pairs((_differences(h) - scale * (verdict.p_win - 0.5)) ** 2, verdict.valid)


def regression_to_opponent(
  logp: Logp, log_ratios: LogRatios, verdict: Verdict, *, role_weights: Weights, scale: Number
) -> Mean:
  """Mean of (h(y) − h(y') − scale·[P(y≻y'') − P(y'≻y'')])² over pairs; y'' is the opponent's.

  P is averaged over the y'' whose comparison is valid. Source: EGPO, Zhou et al. 2503.08942.
  """
  wins, compared = _mean_wins(verdict)
  error = _differences(_weighted(log_ratios, role_weights)) - scale * _differences(wins)
  distinct = ~jnp.eye(logp.shape[1], dtype=bool)[None]
  return _over_pairs(error**2, compared[:, :, None] & compared[:, None, :] & distinct)


def logistic(logp: Logp, log_ratios: LogRatios, verdict: Verdict, *, role_weights: Weights) -> Mean:
  """Mean of −P log σ(h − h') − (1 − P) log σ(h' − h) over pairs (online DPO, 2402.04792)."""
  delta, p = _differences(_weighted(log_ratios, role_weights)), verdict.p_win
  cross_entropy = -p * jax.nn.log_sigmoid(delta) - (1 - p) * jax.nn.log_sigmoid(-delta)
  return _over_pairs(cross_entropy, verdict.valid)


# Convex losses of GPO (2402.05749), but for the logistic and the squared one, which are `logistic`
# and `regression`. All have f'(0) < 0; savage is not convex.
CONVEX = {
  "hinge": lambda z: jax.nn.relu(1 - z),
  "exponential": lambda z: jnp.exp(-z),
  "truncated_quadratic": lambda z: jax.nn.relu(1 - z) ** 2,
  "savage": lambda z: jax.nn.sigmoid(-z) ** 2,
}


def convex(
  logp: Logp,
  log_ratios: LogRatios,
  verdict: Verdict,
  *,
  role_weights: Weights,
  f: str,
  scale: Number,
) -> Mean:
  """Mean of scale²·(P f(z) + (1 − P) f(−z)) over pairs, z = (h − h')/scale, f one of CONVEX."""
  z, p = _differences(_weighted(log_ratios, role_weights)) / scale, verdict.p_win
  return _over_pairs(scale**2 * (p * CONVEX[f](z) + (1 - p) * CONVEX[f](-z)), verdict.valid)


def likelihood(
  logp: Logp, log_ratios: LogRatios, verdict: Verdict, *, role_weights: Weights
) -> Mean:
  """Mean of −P log π_θ(y) − (1 − P) log π_θ(y') over pairs: fits the responses that win."""
  total, p = jnp.sum(logp, axis=-1), verdict.p_win
  return _over_pairs(-p * total[:, :, None] - (1 - p) * total[:, None, :], verdict.valid)


def win_rate_regression(
  logp: Logp, log_ratios: LogRatios, verdict: Verdict, *, role_weights: Weights, scale: Number
) -> Mean:
  """Mean of (h(y_k) − scale·(mean_j P(y_k≻y_j) − 1/2))² over responses (SPPO, 2405.00675)."""
  wins, compared = _mean_wins(verdict)
  error = _weighted(log_ratios, role_weights) - scale * (wins - 0.5)
  return Mean.from_values(error**2, compared)


def _surrogate(logp: Logp, coefficient: Array, compared: Array, arms: int) -> Mean:
  weight, samples = compared.astype(logp.dtype), logp.shape[1]
  terms = jnp.sum(jax.lax.stop_gradient(coefficient) * logp, axis=-1)
  return Mean(jnp.sum(weight * terms) * arms / samples, jnp.sum(weight) / samples)


def _penalty(
  log_ratios: LogRatios,
  role_weights: Weights,
  counted: Bool[Array, "B K"],
  centre: bool,
  to_go: bool,
):
  """Returns Σ_role weight·log_ratio: [B K L] over the tokens to go, [B K 1] over the response."""

  def penalise(log_ratio):
    total = jnp.sum(log_ratio, axis=-1, keepdims=True)
    summed = jnp.flip(jnp.cumsum(jnp.flip(log_ratio, -1), axis=-1), -1) if to_go else total
    return summed - _mean_of_others(total, counted) if centre else summed

  return sum(weight * penalise(log_ratios[role]) for role, weight in role_weights.items())


def _mean_of_others(
  values: Float[Array, "B K *_"], counted: Bool[Array, "B K"]
) -> Float[Array, "B K *_"]:
  """Returns the mean over the prompt's other counted responses (axis 1); 0 if there are none."""
  weight = counted.reshape(*counted.shape, *[1] * (values.ndim - 2)).astype(values.dtype)
  values = jnp.where(weight > 0, values, 0.0)
  others = jnp.sum(weight, axis=1, keepdims=True) - weight
  return (jnp.sum(values, axis=1, keepdims=True) - values) / jnp.maximum(others, 1)


def _mean_wins(verdict: Verdict) -> tuple[Float[Array, "B K"], Bool[Array, "B K"]]:
  """Returns each response's mean P over its valid comparisons, and whether it has any."""
  count = jnp.sum(verdict.valid, axis=-1)
  wins = jnp.sum(jnp.where(verdict.valid, verdict.p_win, 0.0), axis=-1)
  return wins / jnp.maximum(count, 1), count > 0


def _weighted(log_ratios: LogRatios, role_weights: Weights) -> Float[Array, "B K"]:
  """Returns h = Σ_role weight·log_ratio of each response."""
  terms = [weight * jnp.sum(log_ratios[role], axis=-1) for role, weight in role_weights.items()]
  return sum(terms)  # type: ignore[return-value]  # an int only without any role


def _differences(values: Float[Array, "B K"]) -> Float[Array, "B K K"]:
  return values[:, :, None] - values[:, None, :]


def _over_pairs(values: Float[Array, "B K K"], valid: Bool[Array, "B K K"]) -> Mean:
  """Returns the mean over valid pairs; a prompt whose pairs are all valid weighs 1 for any K."""
  mean = Mean.from_values(values, valid)
  pairs = values.shape[1] * (values.shape[1] - 1)
  return Mean(mean.total / pairs, mean.weight / pairs)

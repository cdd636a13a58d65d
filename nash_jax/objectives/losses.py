"""Losses in two families, policy gradients and regressions: arrays in, a `Mean` out.

Axes as in types.py. Every loss takes:

- `logp`: log π_θ of each token; gradients flow through it and through `log_ratios`;
- `log_ratios`: {role: log π_θ − log π_role of each token};
- `verdict`: the judge's;
- `role_weights`: {role: number}.

Masked tokens are 0. When responses are compared with each other, J = K and the diagonal is invalid.
"""

import dataclasses
import math

import jax
from jax import numpy as jnp
from jaxtyping import Array, Bool, Float

from nash_jax.types import Mean, Verdict

Logp = Float[Array, "B K L"]
LogRatios = dict[str, Float[Array, "B K L"]]  # by role
Number = float | Float[Array, ""]  # an array when the config's numbers are traced
Weights = dict[str, Number]  # by role
NO_CLIP = (1.0, math.inf)
LEAST_DEVIATION = 1e-4  # is added to a deviation that divides, as in TRL


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
  rewards, counted = _utilities(verdict, "scores")
  counted &= jnp.sum(counted, axis=1, keepdims=True) > 1  # one response has no others
  advantage = rewards - _mean_of_others(rewards, counted)
  penalty = _penalty(log_ratios, role_weights, counted, centre, to_go)
  return _surrogate(logp, penalty - advantage[..., None], counted, arms=2)


def clipped_policy_gradient(
  logp: Logp,
  log_ratios: LogRatios,
  verdict: Verdict,
  *,
  role_weights: Weights,
  advantage: str,
  normalise: str,
  kl: str,
  clip: tuple[Number, Number] = NO_CLIP,
  centre: bool = False,
  to_go: bool = False,
) -> Mean:
  """GRPO's surrogate (2402.03300): (2 / K) Σ_k Σ_t max(ρ·coef, clip(ρ)·coef), and the KL.

  ρ = π_θ/π_old of a token, coef = Σ_role weight·log(π_old/π_role)(y_k) − A_k under stop_gradient.
  At a batch's first update ρ is 1; the gradient then is that of `policy_gradient` with arms = 2
  where A is of wins and not normalised.

  Args:
    log_ratios: that to "policy" is log ρ. A batch's first update has none: π_θ is π_old.
    advantage: "wins" for A_k = mean_j P(y_k≻y_j) − 1/2, "scores" for A_k = R_k − mean_j R_j with
      j = k among them.
    normalise: "group" divides A by its deviation in the prompt, "batch" by that in the batch.
    kl: "score" has it in coef. "k3" has Σ_t (e^d − d − 1) outside, d = log(π_role/π_θ) of a token,
      whose expected gradient is that of KL(π_role‖π_θ) on the prefixes that were visited.
    clip: ρ is clipped to [1 − clip[0], 1 + clip[1]].
  """
  value, counted, deviation = _advantages(verdict, advantage)
  if normalise != "none":
    scale = deviation if normalise == "group" else verdict.deviation
    assert scale is not None, "Algorithm.of_batch has set it"
    value = value / (scale[:, None] + LEAST_DEVIATION)
  log_rho = log_ratios.get("policy", logp - jax.lax.stop_gradient(logp))
  before = {role: log_ratios[role] - log_rho for role in role_weights}
  in_score = role_weights if kl == "score" else {}
  coefficient = _penalty(before, in_score, counted, centre, to_go) - value[..., None]
  coefficient, rho = jax.lax.stop_gradient(coefficient), jnp.exp(log_rho)
  # Less 1, which changes no gradient: where a token is masked, nothing is left.
  clipped = jnp.clip(rho, 1 - clip[0], 1 + clip[1])
  terms = jnp.maximum(coefficient * (rho - 1), coefficient * (clipped - 1))
  if kl == "k3":
    terms += sum(w * (jnp.expm1(-log_ratios[r]) + log_ratios[r]) for r, w in role_weights.items())
  return _over_responses(jnp.sum(terms, axis=-1), counted, arms=2)


def with_deviation(verdict: Verdict, *, advantage: str) -> Verdict:
  """Returns a whole batch's verdict with the deviation of its advantages."""
  u, counted = _utilities(verdict.checked(), advantage)
  _, deviation = _deviations(u.reshape(1, -1), counted.reshape(1, -1), advantage)
  return dataclasses.replace(verdict, deviation=jnp.broadcast_to(deviation, u.shape[:1]))


def clipping(
  log_ratios: LogRatios,
  mask: Bool[Array, "B K L"],
  verdict: Verdict,
  *,
  advantage: str,
  clip: tuple[Number, Number],
) -> dict[str, Mean]:
  """Returns metrics of `clipped_policy_gradient`, those of ρ where there is one; see docs."""
  _, counted, deviation = _advantages(verdict, advantage)
  groups = jnp.any(counted, axis=1)
  metrics = {
    "advantage_deviation": Mean.from_values(deviation, groups),
    "flat_groups": Mean.from_values(deviation == 0, groups),
  }
  if "policy" not in log_ratios:
    return metrics
  log_rho, tokens = log_ratios["policy"], mask & counted[..., None]
  return metrics | {
    "clipped_low": Mean.from_values(jnp.exp(log_rho) < 1 - clip[0], tokens),
    "clipped_high": Mean.from_values(jnp.exp(log_rho) > 1 + clip[1], tokens),
    "ratio": Mean.from_values(jnp.exp(jnp.sum(log_rho, axis=-1)), counted),
  }


def regression(
  logp: Logp, log_ratios: LogRatios, verdict: Verdict, *, role_weights: Weights, scale: Number
) -> Mean:
  """Mean of (h(y) − h(y') − scale·(P(y≻y') − 1/2))² over pairs, h = Σ weight·log_ratio.

  Online IPO and IPO-MD (2403.08635): h = log π_θ/π_ref, scale = 1/β. INPO (2407.00617): h = log π_θ
  − sβ log π_ref − (1 − sβ) log π_t, scale = s.
  """
  h = _weighted(log_ratios, role_weights)
  return _over_pairs((_differences(h) - scale * (verdict.p_win - 0.5)) ** 2, verdict.valid)


def regression_to_rewards(
  logp: Logp, log_ratios: LogRatios, verdict: Verdict, *, role_weights: Weights, scale: Number
) -> Mean:
  """Mean of (h(y) − h(y') − scale·(R(y) − R(y')))² over pairs (AGRO, 2503.19612)."""
  rewards, counted = _utilities(verdict, "scores")
  error = _differences(_weighted(log_ratios, role_weights)) - scale * _differences(rewards)
  return _over_pairs(error**2, _distinct(counted))


def soft_q(logp: Logp, log_ratios: LogRatios, verdict: Verdict, *, role_weights: Weights) -> Mean:
  """Mean over responses of Σ_t u_t² − R², u_t = R − β Σ_{k≥t} log_ratio_k − β·(v_θ − v_ref)(s_t).

  v(s_t) is the log-normaliser of the logits of token t. Less R², the sum's value at the reference,
  masked tokens give 0. Source: ShiQ, 2505.11081.
  """
  rewards, counted = _utilities(verdict, "scores")
  to_go = {role: _to_go(log_ratios[role]) + log_ratios["normaliser"] for role in role_weights}
  pulled = sum(weight * to_go[role] for role, weight in role_weights.items())
  u = rewards[..., None] - pulled
  return Mean.from_values(jnp.sum(u**2 - rewards[..., None] ** 2, axis=-1), counted)


def regression_to_opponent(
  logp: Logp, log_ratios: LogRatios, verdict: Verdict, *, role_weights: Weights, scale: Number
) -> Mean:
  """Mean of (h(y) − h(y') − scale·[P(y≻y'') − P(y'≻y'')])² over pairs; y'' is the opponent's.

  P is averaged over the y'' whose comparison is valid. Source: EGPO, Zhou et al. 2503.08942.
  """
  wins, compared = _mean_wins(verdict)
  error = _differences(_weighted(log_ratios, role_weights)) - scale * _differences(wins)
  return _over_pairs(error**2, _distinct(compared))


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
  terms = jnp.sum(jax.lax.stop_gradient(coefficient) * logp, axis=-1)
  return _over_responses(terms, compared, arms)


def _over_responses(terms: Float[Array, "B K"], compared: Array, arms: int) -> Mean:
  weight, samples = compared.astype(terms.dtype), terms.shape[1]
  return Mean(jnp.sum(weight * terms) * arms / samples, jnp.sum(weight) / samples)


def _utilities(verdict: Verdict, advantage: str) -> tuple[Float[Array, "B K"], Bool[Array, "B K"]]:
  """Returns the wins or the rewards of responses, and which of them count."""
  wins, counted = _mean_wins(verdict)
  if advantage == "wins":
    return wins, counted
  assert verdict.rewards is not None, "algorithms.needs_rewards holds only judges with rewards"
  counted &= jnp.isfinite(verdict.rewards)
  return jnp.where(counted, verdict.rewards, 0.0), counted


def _deviations(
  u: Float[Array, "B K"], counted: Bool[Array, "B K"], advantage: str
) -> tuple[Float[Array, "B K"], Float[Array, "B"]]:
  """Returns u less its mean over a row, and the row's deviation (divisor n − 1).

  The mean of wins is 1/2 where all pairs are valid; it is 1/2 here also where some are not.
  """
  count = jnp.sum(counted, axis=1, keepdims=True)
  mean = jnp.sum(u * counted, axis=1, keepdims=True) / jnp.maximum(count, 1)
  centred = jnp.where(counted, u - (0.5 if advantage == "wins" else mean), 0.0)
  return centred, jnp.sqrt(jnp.sum(centred**2, axis=1) / jnp.maximum(count[:, 0] - 1, 1))


def _advantages(verdict: Verdict, advantage: str):
  """Returns (advantages [B K], which responses count [B K], their deviation by prompt [B])."""
  u, counted = _utilities(verdict, advantage)
  centred, deviation = _deviations(u, counted, advantage)
  return centred, counted, deviation


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
    summed = _to_go(log_ratio) if to_go else total
    return summed - _mean_of_others(total, counted) if centre else summed

  return sum(weight * penalise(log_ratios[role]) for role, weight in role_weights.items())


def _to_go(values: Logp) -> Logp:
  """Returns the sums over each token and those after it."""
  return jnp.flip(jnp.cumsum(jnp.flip(values, -1), axis=-1), -1)


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


def _distinct(counted: Bool[Array, "B K"]) -> Bool[Array, "B K K"]:
  """Returns the pairs of two responses that both count."""
  both = counted[:, :, None] & counted[:, None, :]
  return both & ~jnp.eye(counted.shape[1], dtype=bool)[None]


def _over_pairs(values: Float[Array, "B K K"], valid: Bool[Array, "B K K"]) -> Mean:
  """Returns the mean over valid pairs; a prompt whose pairs are all valid weighs 1 for any K."""
  mean = Mean.from_values(values, valid)
  pairs = values.shape[1] * (values.shape[1] - 1)
  return Mean(mean.total / pairs, mean.weight / pairs)

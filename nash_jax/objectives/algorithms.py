"""The table of algorithms: each is a row that says who plays, against whom, and to which loss.

Symbols are those of the papers: β weighs KL to the reference, β/η KL to the target (the prox
centre), s is the step of a regularised mirror step. Deviations from the papers:

1. The loss printed for NashMP (2505.19731) has +P(y≻y') under minimisation, which would make the
   policy worse; the estimator's sign is used.
2. The EMA target moves towards the parameters after the optimiser's step.
3. Log-probabilities are summed over a response, never divided by its length.
4. Mixtures are token-wise, and their KL is that of the policy, over whole responses.
5. The second half of nash_mp_two_step starts where the first half ended.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from nash_jax import config as configs
from nash_jax.objectives import losses

Algorithm = Any  # the `algorithm` part of a run's config
Moves = dict[str, str]


@dataclasses.dataclass(frozen=True)
class Row:
  """One algorithm.

  Players are "policy", "reference", "target", "mixture" (of policy and reference, token-wise) and
  the names in `copies`. Slots, what a move may read or write, are "params", "opt_state", "target",
  "reference" and those names.

  Attributes:
    loss: from the algorithm's config to a function of (logp, ratios, verdict, weights=) to a Mean.
    weights: from the algorithm's config to the weight of each role in the loss.
    source: paper and equation.
    y: who plays y.
    opponent: who plays the responses that y is compared with; None: y's own other samples.
    on_policy: whether the loss follows the gradient of the very law that y is drawn from.
    ema: from the algorithm's config to whether the target follows the policy every step, by κ.
    moves: from the algorithm's config and n completed steps to the slots that are overwritten at
      that moment, each with the slot it becomes a copy of: where a phase ends.
    copies: frozen trees beside the target, each with the slot it starts as a copy of.
    least: fields of the algorithm's config with the least value that makes sense.
    scores: whether the loss reads scalar rewards.
  """

  loss: Callable[[Algorithm], Callable]
  weights: Callable[[Algorithm], dict[str, float]]
  source: str
  y: str = "policy"
  opponent: str | None = None
  on_policy: bool = True
  ema: Callable[[Algorithm], bool] = lambda a: False
  moves: Callable[[Algorithm, int], Moves] = lambda a, n: {}
  copies: Mapping[str, str] = dataclasses.field(default_factory=dict)
  least: Mapping[str, float] = dataclasses.field(default_factory=lambda: {"samples": 2})
  scores: bool = False

  def keeps_target(self, a: Algorithm) -> bool:
    """Whether a target is part of the state: somebody plays, weighs or moves it."""
    return "target" in (self.y, self.opponent, *self.weights(a))

  def samples(self, a: Algorithm) -> tuple[int, int]:
    """Returns how many of a prompt's `samples` are y's and how many its opponent's."""
    opponents = a.samples // 2 if self.opponent else 0
    return a.samples - opponents, opponents


def _score_function(arms: int) -> Callable:
  return lambda a: functools.partial(
    losses.score_function, arms=arms, centre=a.centre_log_ratios, to_go=a.reward_to_go
  )


def _reward_function(a):
  return functools.partial(
    losses.reward_function, centre=a.centre_log_ratios, to_go=a.reward_to_go
  )


def _ipo(a):
  return functools.partial(losses.regression, scale=1 / a.beta)


def _ratio(a):
  return {"reference": 1.0}


def _to_reference(a):
  return {"reference": a.beta}


def _to_both(a):
  return {"reference": a.beta, "target": a.beta / a.eta}


def _mirror(a):
  """The roles of a regularised mirror step s from π_t: together they weigh 1/s."""
  return {"reference": a.beta, "target": 1 / a.step - a.beta}


def _every(period: int, n: int, **moves: str) -> Moves:
  return moves if n % period == 0 else {}


def _copied(a, n):
  return _every(a.target_period, n, target="params")


def _halves(a, n):
  """Two-step NashMP: the opponent is the last half's end, the prox centre the last whole's."""
  whole = _every(2 * a.target_period, n, target="params")
  return _every(a.target_period, n, opponent="params") | whole


def _extragradient(a, n):
  """EGPO: after a half step back to its start, after a whole step the next start is here."""
  return {"opponent": "params"} | (
    {"params": "start", "opt_state": "start_opt_state"}
    if n % 2
    else {"start": "params", "start_opt_state": "opt_state"}
  )


ROWS = {
  "nash_mp": Row(
    loss=_score_function(arms=2),
    weights=_to_both,
    ema=lambda a: a.target_update == "ema",
    moves=lambda a, n: _copied(a, n) if a.target_update == "periodic" else {},
    source="Nash Mirror Prox, Tiapkin et al. 2505.19731, deep version with two live responses",
  ),
  "reg_self_play": Row(
    loss=_score_function(arms=2),
    weights=_to_reference,
    source="Regularised self-play: NashMP without the prox term, 2505.19731 section 5",
  ),
  "nash_mp_two_step": Row(
    loss=_score_function(arms=1),
    weights=_to_both,
    opponent="opponent",
    copies={"opponent": "params"},
    moves=_halves,
    source="Approximate NashMP, 2505.19731: T inner steps a half, opponent and centre frozen",
  ),
  "nash_md": Row(
    loss=_score_function(arms=1),
    weights=_to_reference,
    opponent="mixture",
    source="Nash-MD-PG, Munos et al. 2312.00886",
  ),
  "self_play": Row(
    loss=_score_function(arms=1),
    weights=_to_reference,
    opponent="policy",
    source="Nash-MD-PG with mixture 0, 2312.00886",
  ),
  "best_response": Row(
    loss=_score_function(arms=1),
    weights=_to_reference,
    opponent="reference",
    source="Nash-MD-PG with mixture 1, 2312.00886",
  ),
  "nash_ema": Row(
    loss=_score_function(arms=1),
    weights=_to_reference,
    opponent="target",
    ema=lambda a: True,
    source="Nash-EMA-PG, 2312.00886: against an EMA of the policy's parameters",
  ),
  "mpo": Row(
    loss=_score_function(arms=1),
    weights=_mirror,
    opponent="target",
    moves=_copied,
    least={"samples": 2, "reference_period": 1},
    source="Magnetic Preference Optimisation, Wang et al. 2410.16714: the reference is the magnet",
  ),
  "rlhf": Row(
    loss=_reward_function,
    weights=_to_reference,
    scores=True,
    source="REINFORCE with leave-one-out rewards, Ahmadian et al. 2402.14740",
  ),
  "online_ipo": Row(
    loss=_ipo,
    weights=_ratio,
    on_policy=False,
    source="Online IPO, Calandriello et al. 2403.08635",
  ),
  "ipo_md": Row(
    loss=_ipo,
    weights=_ratio,
    y="mixture",
    on_policy=False,
    source="IPO-MD, Calandriello et al. 2403.08635: both responses from the mixture",
  ),
  "online_dpo": Row(
    loss=lambda a: losses.logistic,
    weights=_to_reference,
    on_policy=False,
    source="Online DPO, Guo et al. 2402.04792",
  ),
  "inpo": Row(
    loss=lambda a: functools.partial(losses.regression, scale=a.step),
    weights=lambda a: {"reference": a.step * a.beta, "target": 1 - a.step * a.beta},
    y="target",
    moves=_copied,
    on_policy=False,
    source="INPO, Zhang et al. 2407.00617; its printed η is 1/s",
  ),
  "egpo": Row(
    loss=lambda a: functools.partial(losses.regression_to_opponent, scale=1 / a.beta),
    weights=_ratio,
    opponent="opponent",
    copies={"opponent": "params", "start": "params", "start_opt_state": "opt_state"},
    moves=_extragradient,
    on_policy=False,
    least={"samples": 3},
    source="EGPO, Zhou et al. 2503.08942: two half steps from the same start",
  ),
  "sppo": Row(
    loss=lambda a: functools.partial(losses.win_rate_regression, scale=a.step),
    weights=lambda a: {"target": 1.0},
    y="target",
    moves=_copied,
    on_policy=False,
    source="SPPO, Wu et al. 2405.00675",
  ),
}


def row(name: str) -> Row:
  """Returns the row called `name`; ValueError lists the choices."""
  configs.choose("algorithm.name", name, ROWS)
  return ROWS[name]

"""The table of algorithms: who plays, against whom, to which loss, and when copies are made.

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

from nash_jax.objectives import losses
from nash_jax.validation import one_of

AlgorithmConfig = Any  # the `algorithm` part of a run's config, an ml_collections.ConfigDict
Copies = dict[str, str]  # by the field that is overwritten, the field it becomes a copy of


@dataclasses.dataclass(frozen=True)
class Algorithm:
  """One algorithm: an entry of the table ALGORITHMS.

  Players are "policy", "reference", "target", "mixture" (of policy and reference, token-wise) and
  the names in `copies`. The fields of the state that a copy may read or write are "params",
  "opt_state", "target", "reference" and those names.

  Attributes:
    loss: from the algorithm's config to (logp, log_ratios, verdict, role_weights=) -> Mean.
    role_weights: from the algorithm's config to the weight of each role's log-ratio in the loss.
    paper: where the method is from, and which equation.
    player: who plays y.
    opponent: who plays the responses that y is compared with; None: y's own other samples.
    on_policy: whether the loss follows the gradient of the very distribution that y is drawn from.
    target_ema: from the algorithm's config to whether the target follows the policy at every step,
      at rate κ.
    copy_schedule: from the algorithm's config and the number of completed steps to the copies that
      are due then, where a phase ends.
    copies: frozen trees beside the target, each with the field it starts as a copy of.
    fields: fields of the algorithm's config that the method reads, see `uses`.
    minimum: the least value that makes sense, by field.
    defaults: the method's own defaults, by field, where they differ from the others'.
    needs_rewards: whether the loss reads scalar rewards.
  """

  loss: Callable[[AlgorithmConfig], Callable]
  role_weights: Callable[[AlgorithmConfig], dict[str, float]]
  paper: str
  player: str = "policy"
  opponent: str | None = None
  on_policy: bool = True
  target_ema: Callable[[AlgorithmConfig], bool] = lambda a: False
  copy_schedule: Callable[[AlgorithmConfig, int], Copies] = lambda a, n: {}
  copies: Mapping[str, str] = dataclasses.field(default_factory=dict)
  fields: tuple[str, ...] = ("beta",)
  minimum: Mapping[str, int] = dataclasses.field(default_factory=lambda: {"samples": 2})
  defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  needs_rewards: bool = False

  def keeps_target(self, a: AlgorithmConfig) -> bool:
    """Whether a target is part of the state: somebody plays, weighs or moves it."""
    return "target" in (self.player, self.opponent, *self.role_weights(a))

  def uses(self, a: AlgorithmConfig) -> set[str]:
    """Returns the fields of the algorithm's config that matter, beside those that always do."""
    used = {*self.fields, *(() if self.needs_rewards else ("labels",))}
    if self.target_ema(a):
      used |= {"kappa_schedule", "kappa" if a.kappa_schedule == "constant" else "kappa_offset"}
    elif "target_update" in used:
      used.add("target_period")
    return used

  def samples(self, a: AlgorithmConfig) -> tuple[int, int]:
    """Returns how many of a prompt's `samples` are y's and how many its opponent's."""
    opponents = a.samples // 2 if self.opponent else 0
    return a.samples - opponents, opponents


_LOG_RATIO_OPTIONS = ("centre_log_ratios", "reward_to_go")


def _policy_gradient(arms: int) -> Callable:
  return lambda a: functools.partial(
    losses.policy_gradient, arms=arms, centre=a.centre_log_ratios, to_go=a.reward_to_go
  )


def _reinforce(a):
  return functools.partial(losses.reinforce, centre=a.centre_log_ratios, to_go=a.reward_to_go)


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


def _every(period: int, n: int, **copies: str) -> Copies:
  return copies if n % period == 0 else {}


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


ALGORITHMS = {
  "nash_mp": Algorithm(
    loss=_policy_gradient(arms=2),
    role_weights=_to_both,
    target_ema=lambda a: a.target_update == "ema",
    copy_schedule=lambda a, n: _copied(a, n) if a.target_update == "periodic" else {},
    fields=("beta", "eta", "target_update", *_LOG_RATIO_OPTIONS),
    paper="Nash Mirror Prox, Tiapkin et al. 2505.19731, deep version with two live responses",
  ),
  "reg_self_play": Algorithm(
    loss=_policy_gradient(arms=2),
    role_weights=_to_reference,
    fields=("beta", *_LOG_RATIO_OPTIONS),
    paper="Regularised self-play: NashMP without the prox term, 2505.19731 section 5",
  ),
  "nash_mp_two_step": Algorithm(
    loss=_policy_gradient(arms=1),
    role_weights=_to_both,
    opponent="opponent",
    copies={"opponent": "params"},
    copy_schedule=_halves,
    fields=("beta", "eta", "target_period", *_LOG_RATIO_OPTIONS),
    paper="Approximate NashMP, 2505.19731: T inner steps a half, opponent and centre frozen",
  ),
  "nash_md": Algorithm(
    loss=_policy_gradient(arms=1),
    role_weights=_to_reference,
    opponent="mixture",
    fields=("beta", "mixture", *_LOG_RATIO_OPTIONS),
    paper="Nash-MD-PG, Munos et al. 2312.00886",
  ),
  "self_play": Algorithm(
    loss=_policy_gradient(arms=1),
    role_weights=_to_reference,
    opponent="policy",
    fields=("beta", *_LOG_RATIO_OPTIONS),
    paper="Nash-MD-PG with mixture 0, 2312.00886",
  ),
  "best_response": Algorithm(
    loss=_policy_gradient(arms=1),
    role_weights=_to_reference,
    opponent="reference",
    fields=("beta", *_LOG_RATIO_OPTIONS),
    paper="Nash-MD-PG with mixture 1, 2312.00886",
  ),
  "nash_ema": Algorithm(
    loss=_policy_gradient(arms=1),
    role_weights=_to_reference,
    opponent="target",
    target_ema=lambda a: True,
    fields=("beta", *_LOG_RATIO_OPTIONS),
    paper="Nash-EMA-PG, 2312.00886: against an EMA of the policy's parameters",
  ),
  "mpo": Algorithm(
    loss=_policy_gradient(arms=1),
    role_weights=_mirror,
    opponent="target",
    copy_schedule=_copied,
    minimum={"samples": 2, "reference_period": 1},
    defaults={"reference_period": 50},
    fields=("beta", "step", "target_period", *_LOG_RATIO_OPTIONS),
    paper="Magnetic Preference Optimisation, Wang et al. 2410.16714: the reference is the magnet",
  ),
  "rlhf": Algorithm(
    loss=_reinforce,
    role_weights=_to_reference,
    needs_rewards=True,
    fields=("beta", *_LOG_RATIO_OPTIONS),
    paper="REINFORCE with leave-one-out rewards, Ahmadian et al. 2402.14740",
  ),
  "online_ipo": Algorithm(
    loss=_ipo,
    role_weights=_ratio,
    on_policy=False,
    paper="Online IPO, Calandriello et al. 2403.08635",
  ),
  "ipo_md": Algorithm(
    loss=_ipo,
    role_weights=_ratio,
    player="mixture",
    on_policy=False,
    fields=("beta", "mixture"),
    paper="IPO-MD, Calandriello et al. 2403.08635: both responses from the mixture",
  ),
  "online_dpo": Algorithm(
    loss=lambda a: losses.logistic,
    role_weights=_to_reference,
    on_policy=False,
    paper="Online DPO, Guo et al. 2402.04792",
  ),
  "inpo": Algorithm(
    loss=lambda a: functools.partial(losses.regression, scale=a.step),
    role_weights=lambda a: {"reference": a.step * a.beta, "target": 1 - a.step * a.beta},
    player="target",
    copy_schedule=_copied,
    on_policy=False,
    fields=("beta", "step", "target_period"),
    paper="INPO, Zhang et al. 2407.00617; its printed η is 1/s",
  ),
  "egpo": Algorithm(
    loss=lambda a: functools.partial(losses.regression_to_opponent, scale=1 / a.beta),
    role_weights=_ratio,
    opponent="opponent",
    copies={"opponent": "params", "start": "params", "start_opt_state": "opt_state"},
    copy_schedule=_extragradient,
    on_policy=False,
    minimum={"samples": 3},
    paper="EGPO, Zhou et al. 2503.08942: two half steps from the same start",
  ),
  "sppo": Algorithm(
    loss=lambda a: functools.partial(losses.win_rate_regression, scale=a.step),
    role_weights=lambda a: {"target": 1.0},
    player="target",
    copy_schedule=_copied,
    on_policy=False,
    fields=("step", "target_period"),
    paper="SPPO, Wu et al. 2405.00675",
  ),
}


def get(name: str) -> Algorithm:
  """Returns the algorithm called `name`; ValueError lists the choices."""
  one_of("algorithm.name", name, ALGORITHMS)
  return ALGORITHMS[name]


def fill_defaults(a: AlgorithmConfig) -> None:
  """Sets the fields that are None to the method's own defaults, in place."""
  method = get(a.name)
  defaults = {
    "samples": method.minimum["samples"],
    "reference_period": 0,
    "step": 5.0 if 5.0 * a.beta <= 1 else 0.5 / a.beta,
    **method.defaults,
  }
  for field, value in defaults.items():
    if a[field] is None:
      a[field] = value

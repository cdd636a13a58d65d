"""The table of algorithms: whose responses are compared, the loss, and when copies are made.

Symbols are those of the papers: β weighs the KL to the reference, β/η weighs the KL to the target
(the prox centre), and s is the step size of a regularised mirror step. Deviations from the papers:

1. The loss printed for NashMP (2505.19731) has +P(y≻y'). Minimising it would make the policy worse,
   so the sign is that of the paper's gradient estimator.
2. The EMA target moves towards the parameters after the optimiser's step.
3. Log-probabilities are summed over a response, never divided by its length.
4. Mixtures are token-wise. The KL penalty is the policy's, summed over whole responses.
5. The second half of nash_mp_two_step starts where the first half ended.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from nash_jax.objectives import losses
from nash_jax.types import Mean
from nash_jax.validation import one_of

AlgorithmConfig = Any  # the `algorithm` part of a run's config, an ml_collections.ConfigDict
Loss = Callable[..., Mean]  # (logp, log_ratios, verdict, role_weights=) -> Mean
# The fields of AlgorithmConfig that every method reads; see Algorithm.uses.
ALWAYS_READ = {"name", "samples", "reference_period", "behaviour_temperature"}
Copies = dict[str, str]  # {field to overwrite: field to copy}


def _kl_to_reference(config: AlgorithmConfig) -> losses.Weights:
  return {"reference": config.beta}


@dataclasses.dataclass(frozen=True)
class Algorithm:
  """One algorithm: an entry of the table ALGORITHMS.

  The players are "policy", "reference", "target", "mixture" (of policy and reference, token-wise),
  "data" (a file of pairs and who won) and the names in `copies`. A copy reads and writes the fields
  "params", "opt_state", "target" and "reference" of the state, and those names. Every callable
  takes the algorithm's config.

  Attributes:
    loss: returns the loss: a function of losses.py with its options set.
    paper: the paper, and the equation or section where that matters.
    role_weights: returns the weight of each role's log-ratio in the loss; by default β for the
      reference.
    player: who samples y.
    opponent: who samples the responses that y is compared with; None compares the samples of
      `player` with each other.
    on_policy: whether the loss is a policy gradient. It is then correct only for samples of the
      policy, and reads the options centre_log_ratios and reward_to_go.
    target_ema: returns whether the target follows the policy at every step, at rate κ.
    copy_schedule: returns the copies to make after a number of completed steps.
    copies: trees kept frozen beside the target: {name: field that it starts as a copy of}.
    fields: the fields of the config that this method's callables read; see `uses`.
    minimum: the smallest allowed value, by field.
    defaults: defaults by field, where they differ from those of other methods.
    needs_rewards: whether the loss reads scalar rewards.
  """

  loss: Callable[[AlgorithmConfig], Loss]
  paper: str
  role_weights: Callable[[AlgorithmConfig], losses.Weights] = _kl_to_reference
  player: str = "policy"
  opponent: str | None = None
  on_policy: bool = True
  target_ema: Callable[[AlgorithmConfig], bool] = lambda config: False
  copy_schedule: Callable[[AlgorithmConfig, int], Copies] = lambda config, step: {}
  copies: Mapping[str, str] = dataclasses.field(default_factory=dict)
  fields: tuple[str, ...] = ("beta",)
  minimum: Mapping[str, int] = dataclasses.field(default_factory=lambda: {"samples": 2})
  defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  needs_rewards: bool = False

  @property
  def offline(self) -> bool:
    """Whether responses and verdicts come from a file of pairs: nothing is sampled or judged."""
    return self.player == "data"

  def keeps_target(self, config: AlgorithmConfig) -> bool:
    """Returns whether the state holds a target, because it plays or has a weight in the loss."""
    return "target" in (self.player, self.opponent, *self.role_weights(config))

  def uses(self, config: AlgorithmConfig) -> set[str]:
    """Returns the fields that this method reads, except ALWAYS_READ."""
    used = {*self.fields, *(() if self.needs_rewards or self.offline else ("labels",))}
    if self.on_policy:
      used |= {"centre_log_ratios", "reward_to_go"}
    if "mixture" in (self.player, self.opponent):
      used.add("mixture")
    if self.target_ema(config):
      rate = "kappa" if config.kappa_schedule == "constant" else "kappa_offset"
      used |= {"kappa_schedule", rate}
    elif "target_update" in used:
      used.add("target_period")
    return used

  def samples(self, config: AlgorithmConfig) -> tuple[int, int]:
    """Returns how many of a prompt's samples are the player's, and how many the opponent's."""
    opponents = config.samples // 2 if self.opponent else 0
    return config.samples - opponents, opponents


def _policy_gradient(arms: int) -> Callable[[AlgorithmConfig], Loss]:
  return lambda config: functools.partial(
    losses.policy_gradient, arms=arms, centre=config.centre_log_ratios, to_go=config.reward_to_go
  )


def _reinforce(config) -> Loss:
  return functools.partial(
    losses.reinforce, centre=config.centre_log_ratios, to_go=config.reward_to_go
  )


def _ipo(config) -> Loss:
  return functools.partial(losses.regression, scale=1 / config.beta)


def _gpo(config) -> Loss:
  """GPO's member f: squared is Online IPO's loss, logistic Online DPO's, all with their scale."""
  if config.f in ("squared", "logistic"):
    return _ipo(config) if config.f == "squared" else losses.logistic
  scale = 0.5 / config.beta if config.f == "truncated_quadratic" else 1.0
  return functools.partial(losses.convex, f=config.f, scale=scale)


def _gpo_weights(config) -> losses.Weights:
  """β, or 1 where β is in the label: the squares, whose z is 2β·(r(y) − r(y'))."""
  return {"reference": 1.0 if config.f in ("squared", "truncated_quadratic") else config.beta}


def _log_ratio(config) -> losses.Weights:
  return {"reference": 1.0}


def _kl_to_both(config) -> losses.Weights:
  return {"reference": config.beta, "target": config.beta / config.eta}


def _mirror_step(config) -> losses.Weights:
  """Returns the weights of a regularised mirror step s from π_t, which sum to 1/s."""
  return {"reference": config.beta, "target": 1 / config.step - config.beta}


def _inpo_weights(config):
  return {"reference": config.step * config.beta, "target": 1 - config.step * config.beta}


def _every(period: int, step: int, **copies: str) -> Copies:
  return copies if step % period == 0 else {}


def _copy_to_target(config, step: int) -> Copies:
  return _every(config.target_period, step, target="params")


def _copy_unless_ema(config, step: int) -> Copies:
  return _copy_to_target(config, step) if config.target_update == "periodic" else {}


def _two_halves(config, step: int) -> Copies:
  """Two-step NashMP: the opponent is renewed after each half step, the target after both."""
  target = _every(2 * config.target_period, step, target="params")
  return _every(config.target_period, step, opponent="params") | target


def _extragradient(config, step: int) -> Copies:
  """EGPO: the first half step ends back at the start; the end of the second is the new start."""
  back = {"params": "start", "opt_state": "start_opt_state"}
  ahead = {"start": "params", "start_opt_state": "opt_state"}
  return {"opponent": "params"} | (back if step % 2 else ahead)


ALGORITHMS = {
  "nash_mp": Algorithm(
    loss=_policy_gradient(arms=2), role_weights=_kl_to_both,
    target_ema=lambda config: config.target_update == "ema", copy_schedule=_copy_unless_ema,
    fields=("beta", "eta", "target_update"),
    paper="Nash Mirror Prox, Tiapkin et al. 2505.19731, deep version with two live responses",
  ),
  "reg_self_play": Algorithm(
    loss=_policy_gradient(arms=2),
    paper="Regularised self-play: NashMP without the prox term, 2505.19731 section 5",
  ),
  "nash_mp_two_step": Algorithm(
    loss=_policy_gradient(arms=1), role_weights=_kl_to_both,
    opponent="opponent", copies={"opponent": "params"}, copy_schedule=_two_halves,
    fields=("beta", "eta", "target_period"),
    paper="Approximate NashMP, 2505.19731: T inner steps a half, opponent and target frozen",
  ),
  "nash_md": Algorithm(
    loss=_policy_gradient(arms=1), opponent="mixture",
    paper="Nash-MD-PG, Munos et al. 2312.00886",
  ),
  "self_play": Algorithm(
    loss=_policy_gradient(arms=1), opponent="policy",
    paper="Nash-MD-PG with mixture 0, 2312.00886",
  ),
  "best_response": Algorithm(
    loss=_policy_gradient(arms=1), opponent="reference",
    paper="Nash-MD-PG with mixture 1, 2312.00886",
  ),
  "nash_ema": Algorithm(
    loss=_policy_gradient(arms=1), opponent="target", target_ema=lambda config: True,
    paper="Nash-EMA-PG, 2312.00886: the opponent is an EMA of the policy's parameters",
  ),
  "mpo": Algorithm(
    loss=_policy_gradient(arms=1), role_weights=_mirror_step,
    opponent="target", copy_schedule=_copy_to_target, fields=("beta", "step", "target_period"),
    minimum={"samples": 2, "reference_period": 1}, defaults={"reference_period": 50},
    paper="Magnetic Preference Optimisation, Wang et al. 2410.16714: the reference is the magnet",
  ),
  "rlhf": Algorithm(
    loss=_reinforce, needs_rewards=True,
    paper="REINFORCE with leave-one-out rewards, Ahmadian et al. 2402.14740",
  ),
  "online_ipo": Algorithm(
    loss=_ipo, role_weights=_log_ratio, on_policy=False,
    paper="Online IPO, Calandriello et al. 2403.08635",
  ),
  "ipo_md": Algorithm(
    loss=_ipo, role_weights=_log_ratio, player="mixture", on_policy=False,
    paper="IPO-MD, Calandriello et al. 2403.08635: both responses from the mixture",
  ),
  "online_dpo": Algorithm(
    loss=lambda config: losses.logistic, on_policy=False,
    paper="Online DPO, Guo et al. 2402.04792",
  ),
  "inpo": Algorithm(
    loss=lambda config: functools.partial(losses.regression, scale=config.step),
    role_weights=_inpo_weights, player="target", copy_schedule=_copy_to_target, on_policy=False,
    fields=("beta", "step", "target_period"),
    paper="INPO, Zhang et al. 2407.00617; its printed η is 1/s",
  ),
  "egpo": Algorithm(
    loss=lambda config: functools.partial(losses.regression_to_opponent, scale=1 / config.beta),
    role_weights=_log_ratio, opponent="opponent", on_policy=False, minimum={"samples": 3},
    copies={"opponent": "params", "start": "params", "start_opt_state": "opt_state"},
    copy_schedule=_extragradient,
    paper="EGPO, Zhou et al. 2503.08942: two half steps from the same start",
  ),
  "sppo": Algorithm(
    loss=lambda config: functools.partial(losses.win_rate_regression, scale=config.step),
    role_weights=lambda config: {"target": 1.0},
    player="target", copy_schedule=_copy_to_target, on_policy=False,
    fields=("step", "target_period"), paper="SPPO, Wu et al. 2405.00675",
  ),
  "gpo": Algorithm(
    loss=_gpo, role_weights=_gpo_weights, player="data", on_policy=False, fields=("beta", "f"),
    paper="Generalised preference optimisation, Tang et al. 2402.05749: DPO, IPO, SLiC and more",
  ),
  "best_of_two": Algorithm(
    loss=lambda config: losses.likelihood, role_weights=lambda config: {},
    player="data", on_policy=False, fields=(),
    paper="Fine-tuning on the responses that won: Best-of-2 of Tang et al. 2405.08448",
  ),
}  # fmt: skip


def get(name: str) -> Algorithm:
  """Returns the algorithm called `name`.

  Raises:
    ValueError: an unknown name; lists the choices.
  """
  one_of("algorithm.name", name, ALGORITHMS)
  return ALGORITHMS[name]


def fill_defaults(config: AlgorithmConfig) -> None:
  """Sets fields that are None to the method's defaults, in place."""
  method = get(config.name)
  bounded = "beta" in method.fields and 5.0 * config.beta > 1  # s must not exceed 1 / beta
  defaults = {
    "samples": method.minimum["samples"],
    "reference_period": 0,
    "step": 0.5 / config.beta if bounded else 5.0,
    **method.defaults,
  }
  for field, value in defaults.items():
    if config[field] is None:
      config[field] = value

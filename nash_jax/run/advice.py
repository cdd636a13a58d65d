"""Recognises from its metrics that a run is going wrong, and says what to do about it.

Each rule is a pure function of a run's metrics so far. docs/metrics.md lists the bounds.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

History = Mapping[str, Sequence[float]]  # {metric: values of the steps that recorded it}
WINDOW = 3  # steps that must agree
READS_NOTHING = 0.9  # a judge with this share of flipped verdicts, or of ties, is no judge
LEAST_KL = 10.0  # nats a response; below this no run is warned
GROWTH = 5.0  # factor of the gradient's norm
FALL, DEEP_FALL = 0.03, 0.1  # of the held-out win rate, over three evaluations and in two


def recommend(history: History, kl_bound: float = math.inf) -> dict[str, str]:
  """Returns {rule: advice} for the rules that apply."""
  found = {name: rule(history) for name, rule in RULES.items()}
  found["kl"] = _far(history, kl_bound)
  return {name: line for name, line in found.items() if line}


def kl_bound(config: Any) -> float:
  """Returns the KL above which a run is warned; infinite if nothing bounds it."""
  return max(LEAST_KL, 1 / config.algorithm.beta) if "algorithm" in config else math.inf


def of_config(config: Any) -> list[str]:
  """Returns advice on a config, before the first step."""
  warmup, steps = config.optimizer.warmup_steps, config.steps
  if 2 * warmup <= steps:
    return []
  return [
    f"optimizer.warmup_steps={warmup} is more than half of steps={steps}: the learning rate reaches"
    " its peak late, or only at the end. Lower it, or raise steps"
  ]


def _last(history: History, name: str) -> Sequence[float]:
  """Returns the newest WINDOW values of a metric; () if there are fewer."""
  values = history.get(name, ())
  return values[-WINDOW:] if len(values) >= WINDOW else ()


def _unread(history: History) -> str:
  if history.get("valid", (1.0,))[-1] > 0:
    return ""
  return (
    "no verdict could be read, so nothing is learned; see `valid` in metrics.jsonl. Check that the"
    " judge can give the expected answers and read the responses"
  )


def _undecided(history: History) -> str:
  flips, ties = _last(history, "flip_rate"), _last(history, "tie_mass")
  fix = "Use a larger judge or one that was fitted (docs/judges.md), or another judge.template"
  if flips and min(flips) >= READS_NOTHING:
    share = statistics.mean(flips)
    return (
      f"flip_rate is {share:.2f}: the judge decides by the position of a response, not by its"
      f" text, so nothing is learned. {fix}"
    )
  if ties and min(ties) >= READS_NOTHING:
    share = statistics.mean(ties)
    return f"tie_mass is {share:.2f}: the judge prefers nothing, so nothing is learned. {fix}"
  return ""


def _far(history: History, bound: float) -> str:
  last, all_values = _last(history, "kl_to_reference"), history.get("kl_to_reference", ())
  if not last or min(last) <= bound or last[-1] < all_values[-2 * WINDOW :][0]:
    return ""
  return (
    f"kl_to_reference is {last[-1]:.1f} nats a response and rising. Read samples.jsonl, because"
    " the text may be degenerating. Raise algorithm.beta, or lower optimizer.learning_rate"
  )


def _steep(history: History) -> str:
  norms = history.get("gradient_norm", ())
  if len(norms) < 2 * WINDOW or "p_win" not in history:
    return ""
  first, last = statistics.median(norms[:WINDOW]), statistics.median(norms[-WINDOW:])
  if not 0 < GROWTH * first < last:
    return ""
  return (
    f"gradient_norm has risen from {first:.3g} to {last:.3g}: the steps are too large. Lower"
    " optimizer.learning_rate"
  )


def _losing(history: History) -> str:
  rates = history.get("eval/win_rate_vs_reference", ())
  if len(rates) < 3:
    return ""
  falling = len(rates) > 3 and rates[-4] > rates[-3] > rates[-2] > rates[-1]
  slow = falling and rates[-4] - rates[-1] >= FALL
  deep = max(rates[-2:]) <= max(rates) - DEEP_FALL
  if not slow and not deep:
    return ""
  return (
    f"eval/win_rate_vs_reference has fallen from {max(rates):.3f} to {rates[-1]:.3f}. Lower"
    " optimizer.learning_rate, raise prompts.batch_size or algorithm.beta, or take an earlier"
    " checkpoint: WORKDIR@params:best"
  )


def _coin(history: History) -> str:
  shares = history.get("eval/accuracy", ())
  if len(shares) < 2 or max(shares[-2:]) > 0.5:
    return ""
  return (
    f"eval/accuracy is {shares[-1]:.3f}, no better than a coin. Try more pairs, more steps, another"
    " optimizer.learning_rate, or larger budgets if pairs are cut"
  )


RULES: dict[str, Callable[[History], str]] = {
  "verdicts": _unread, "judge": _undecided, "gradient": _steep, "win rate": _losing,
  "accuracy": _coin,
}  # fmt: skip

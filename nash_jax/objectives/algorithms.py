"""The table of algorithms: each is a row that says who plays, against whom, and to which loss.

Symbols are those of the papers: β weighs KL to the reference, β/η KL to the target (the prox
centre). Deviations from the papers:

1. The loss printed for NashMP (2505.19731) has +P(y≻y') under minimisation, which would make the
   policy worse; the estimator's sign is used.
2. The EMA target moves towards the parameters after the optimiser's step.
3. Log-probabilities are summed over a response, never divided by its length.
"""

import dataclasses
import functools
from collections.abc import Callable

from nash_jax import config as configs
from nash_jax.objectives import losses


@dataclasses.dataclass(frozen=True)
class Row:
  """One algorithm.

  Attributes:
    loss: from (logp, ratios, p_win, valid, kl=, centre=) to a Mean; see losses.
    kl: from config.algorithm to the weight of KL to each role ("reference", "target").
    target: whether a moving target is kept.
    on_policy: whether the loss follows the gradient of the very law it samples from.
    source: paper and equation.
  """

  loss: Callable
  kl: Callable[..., dict[str, float]]
  target: bool
  on_policy: bool
  source: str


ROWS = {
  "nash_mp": Row(
    loss=functools.partial(losses.score_function, arms=2),
    kl=lambda a: {"reference": a.beta, "target": a.beta / a.eta},
    target=True,
    on_policy=True,
    source="Nash Mirror Prox, Tiapkin et al. 2505.19731, deep version with two live responses",
  ),
  "reg_self_play": Row(
    loss=functools.partial(losses.score_function, arms=2),
    kl=lambda a: {"reference": a.beta},
    target=False,
    on_policy=True,
    source="Regularised self-play: NashMP without the prox term, 2505.19731 section 5",
  ),
}


def row(name: str) -> Row:
  """Returns the row called `name`; ValueError lists the choices."""
  configs.choose("algorithm.name", name, ROWS)
  return ROWS[name]

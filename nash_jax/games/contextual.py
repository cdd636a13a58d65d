"""The paper's contextual game, P(y≻y'|x) = σ(A_{yy'} - A_{y'y}) with A = UΘ_xVᵀ, and races on it.

A race is fair when every entrant is tuned by one grid of steps. Rates of gradient methods differ
in unit (a loss with 1/β² in it wants a rate of another size), so a grid's steps are in units of ∇J,
the gradient of regularised self-play: `unit` turns them into each loss's own rate.
"""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nash_jax.games import preference, solvers, zoo


class Entrant(NamedTuple):
  """A method in a race: its name in solvers, the kind of updates, its knobs besides the step.

  knobs maps eta, kappa or mixture to the values its grid tries; kappa's may be "harmonic".
  """

  label: str
  method: str
  updates: str
  knobs: dict
  batch: int = 0


def make_games(seeds, *, contexts, actions, rank, strength, beta, cyclicity=1.0):
  """Games [S X A A], one a seed, with a uniform reference: a Game whose leaves lead with S."""
  p_win = np.stack([
    zoo.random_game(seed, actions, rank, cyclicity, strength, contexts).p_win for seed in seeds])
  log_ref = np.full(p_win.shape[:-1], -np.log(actions))
  return solvers.Game(jnp.asarray(p_win), jnp.asarray(log_ref), jnp.full(len(seeds), beta))


def unit(method, updates, beta):
  """What one unit of a grid's step is for this method: near the reference all move alike.

  Online IPO's exact gradient is 4/β times ∇J, Online DPO's about 2β times (its logistic slope is
  1/4), and on uniform pairs EGPO's and MMD's regressions are scaled as Online IPO's.
  """
  if updates == "proximal":
    return 1.0
  return {"online_ipo": beta / 4, "egpo": beta / 4, "mmd": beta / 4,
          "online_dpo": 1 / (2 * beta)}.get(method, 1.0)


def grid(entrant, steps, beta, iterations):
  """(list of settings, Knobs whose leaves lead with G): every step with every other knob."""
  names = list(entrant.knobs)
  if set(names) - {"eta", "kappa", "mixture"}:
    raise ValueError(f"{entrant.label} has knobs {names}; choices: eta, kappa, mixture.")
  rows = [dict(zip(["step", *names], row, strict=True))
          for row in itertools.product(steps, *entrant.knobs.values())]
  base = {"eta": 2 * beta, "kappa": 0.0, "mixture": 0.25}
  full = [base | row for row in rows]

  def leaf(name):
    column = [row[name] for row in full]
    if name == "kappa" and "harmonic" in column:
      ones = np.ones(iterations)
      column = [solvers.harmonic(iterations) if v == "harmonic" else v * ones for v in column]
    return jnp.asarray(np.stack(column), float)

  scale = unit(entrant.method, entrant.updates, beta)
  return rows, solvers.Knobs(leaf("step") * scale, leaf("eta"), leaf("kappa"), leaf("mixture"))


@functools.partial(jax.jit, static_argnames=("method", "updates", "points", "batch"))
def curves(method, updates, games, knobs, keys, *, points, every, batch=0):
  """SubOpt_β [G S points] of a grid on games, each seed with its own draws, shared by the grid."""
  def one(knob, game, key):
    return solvers.run(method, updates, game, knob, key, points=points, every=every, batch=batch)[1]

  over_games = jax.vmap(one, (None, 0, 0))
  return jax.vmap(over_games, (0, None, None))(knobs, games, keys)


def score(values):
  """The number a grid is judged by: mean log10 of final SubOpt_β over seeds; diverged is worst."""
  final = np.asarray(values, float)
  return np.log10(np.where(np.isfinite(final), np.clip(final, 1e-30, 1e3), 1e3)).mean(-1)


def race(entrant, tuning, games, *, steps, horizon, longest, points=100, seed=0):
  """Tunes on the tuning games at this horizon, then runs the chosen knobs on the others.

  Returns:
    (chosen settings, [(settings, score)] of the whole grid, curves [S points] on `games`).
  """
  beta = float(games.beta[0])
  rows, knobs = grid(entrant, steps, beta, longest)
  every = horizon // points
  if entrant.batch:  # draws are far noisier than float32 rounds
    knobs, tuning, games = jax.tree.map(lambda v: v.astype(jnp.float32), (knobs, tuning, games))

  def play(on, chosen, stream):
    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), stream), len(on.beta))
    return curves(entrant.method, entrant.updates, on, chosen, keys, points=points, every=every,
                  batch=entrant.batch)

  scores = score(play(tuning, knobs, 0)[:, :, -1])
  best = int(np.argmin(scores))
  chosen = jax.tree.map(lambda knob: knob[best : best + 1], knobs)
  outcome = list(zip(rows, scores.tolist(), strict=True))
  return rows[best], outcome, np.asarray(play(games, chosen, 1)[0])


def interval(values, level_z=1.96):
  """Geometric mean and 95% interval over seeds (axis 0) of positive values: (mean, low, high)."""
  logs = np.log10(np.clip(values, 1e-32, None))
  mean, error = logs.mean(0), logs.std(0, ddof=1) / np.sqrt(len(logs))
  return 10**mean, 10 ** (mean - level_z * error), 10 ** (mean + level_z * error)


def reference_gap(games):
  """SubOpt_β of the reference on each game, [S]: where every curve starts."""
  gaps = jax.vmap(preference.gap)(games.p_win, games.log_ref, games.log_ref, games.beta)
  return np.asarray(gaps.mean(-1))

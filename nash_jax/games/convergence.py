"""Studies of convergence: the theorem's bounds, queries to a target, and the approximation lemma.

A study takes a config (configs/games) and returns tables by name.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jaxtyping import Array, Float, Real

from nash_jax.games import contextual, gradients, preference, solvers
from nash_jax.games.charts import Rows, Tables
from nash_jax.games.checks import Count, Values

StudyConfig = Any  # an ml_collections.ConfigDict
# Queries of P(·≻π) an iteration, where it is not one.
QUERIES = {
  ("proximal", "nash_mp"): 2,
  ("proximal", "egpo"): 2,
  ("proximal", "proximal_point"): 60,
  ("gradient", "egpo"): 2,
  ("gradient", "nash_mp_two_step"): 20,
  ("gradient", "nash_mp_approximate"): 20,  # its other name
}


def bar(things: Any, what: str) -> tqdm.tqdm:
  """Returns a progress bar over things.

  Examples:
    >>> from nash_jax.games import convergence
    >>> convergence.bar([1, 2], "pairs").total
    2
  """
  return tqdm.tqdm(list(things), desc=what)


def games_of(config: StudyConfig, seeds: Sequence[int], **changes: Any) -> solvers.Game:
  """Returns the random games of a study, one a seed, with changes of its config.

  Examples:
    >>> from nash_jax.configs.games import theorem
    >>> from nash_jax.games import convergence
    >>> config = theorem.get_config("smoke")
    >>> convergence.games_of(config, [0, 1], actions=3, beta=0.1).p_win.shape
    (2, 3, 3)
  """
  names = ("contexts", "actions", "rank", "strength", "beta")
  settings = {name: config[name] for name in names if name not in changes}
  return contextual.make_games(seeds, **settings, **changes)


def _game(config: StudyConfig, **changes: Any) -> solvers.Game:
  return jax.tree.map(lambda leaf: leaf[0], games_of(config, [config.seed], **changes))


def _slope(values: Float[np.ndarray, "K"], floor: float = 1e-24) -> float:
  """Returns the slope of log(values) an iteration, in the second half of what is above rounding."""
  used = np.flatnonzero(values > floor)
  used = used[len(used) // 2 :]
  return np.polyfit(used, np.log(values[used]), 1)[0] if len(used) > 2 else np.nan


@jax.jit
def _distances(
  game: solvers.Game, log_star: Float[Array, "A"], eta: float | Float[Array, ""], iterations: Array
) -> tuple[Float[Array, "K"], Float[Array, "K"], Float[Array, "K"]]:
  """Returns KL(π*‖π_K), SubOpt_β of the last half iterate, and the span of log π_K - log π*."""

  def measure(game: solvers.Game, state: solvers.State) -> tuple[Array, Array, Array]:
    return (
      preference.kl(log_star, state.logp),
      preference.gap(game.p_win, state.other, game.log_ref, game.beta),
      preference.span(state.logp, log_star),
    )

  knobs = solvers.Knobs(eta / (game.beta * (1 + eta)), eta, 0.0, 0.0)
  points = len(iterations)
  return solvers.run("nash_mp", "proximal", game, knobs, None, points=points, measure=measure)[1]


def theorem(config: StudyConfig) -> Tables:
  """Compares KL(π*‖π_K) with (1+2β)^{-K}/(2β) at η = 2β from π_ref (2505.19731); tries other steps.

  Examples:
    >>> from nash_jax.configs.games import theorem
    >>> from nash_jax.games import convergence
    >>> config = theorem.get_config("smoke")
    >>> config.update(actions=(3,), betas=(0.4,), iterations=20)
    >>> (row,) = convergence.theorem(config)["theorem_slopes"]
    >>> bool(row["worst_kl_over_bound"] <= 1)
    True

  Args:
    config: as configs/games/theorem.py.

  Returns:
    theorem_curves; theorem_slopes, with the promised ones; theorem_steps, at other η.
  """
  curves, slopes, steps = [], [], []
  for actions, beta in bar(itertools.product(config.actions, config.betas), "theorem"):
    case = {"actions": actions, "beta": beta}
    game = _game(config, **case)
    log_star = jnp.log(preference.equilibrium(game.p_win, jnp.exp(game.log_ref), beta))
    k = np.arange(1, 1 + (config.iterations if actions < 5000 else config.iterations_large))
    kl, subopt, span = map(np.asarray, _distances(game, log_star, 2 * beta, k))
    bound = (1 + 2 * beta) ** -k.astype(float) / (2 * beta)
    promised = -np.log1p(2 * beta) / 2
    slopes.append(
      case
      | {
        "worst_kl_over_bound": (kl / bound)[bound > 1e-26].max(),
        "largest_kl_rise": np.diff(kl[kl > 1e-26]).max(),
        "promised_slope": promised,
        "subopt_slope": _slope(subopt),
        "span_slope": _slope(span, 1e-12),
        "promised_kl_slope": 2 * promised,
        "kl_slope": _slope(kl),
      }
    )
    shown = np.unique(np.geomspace(1, len(k), 40).astype(int)) - 1
    curves += [
      case | {"k": k[i], "kl": kl[i], "bound": bound[i], "subopt_half": subopt[i], "span": span[i]}
      for i in shown
    ]
    for multiple in config.eta_multiples if actions == config.actions_steps else ():
      eta = multiple * 2 * beta
      kl = np.asarray(_distances(game, log_star, eta, k)[0])
      row = {"eta_over_2beta": multiple, "s": eta / (beta * (1 + eta))}
      row["kl"] = kl[config.step_iterations - 1]
      row["iterations_kl_rose"] = int((np.diff(kl[kl > 1e-26]) > 0).sum())
      steps.append(case | row)
  return {"theorem_curves": curves, "theorem_slopes": slopes, "theorem_steps": steps}


def _reach(
  curves: Float[np.ndarray, "*n K"], targets: Sequence[float], cost: int
) -> Float[np.ndarray, "*n targets"]:
  """Returns queries after which curves stay below each target; inf where they do not."""
  above = np.asarray(curves)[..., None, :] > np.asarray(targets)[:, None]
  last = np.where(above.any(-1), above.shape[-1] - np.argmax(above[..., ::-1], -1), 0) + 1
  return np.where(above[..., -1], np.inf, last * cost)


def rates(config: StudyConfig) -> Tables:
  """Counts queries of P(·≻π) to reach a SubOpt_β, and an ε-equilibrium of the original game.

  Examples:
    >>> from nash_jax.configs.games import rates
    >>> from nash_jax.games import convergence
    >>> config = rates.get_config("smoke")
    >>> config.update(methods=(("proximal", "nash_mp"),), steps=(1.0,), original=())
    >>> rows = convergence.rates(config)["rates"]
    >>> {row["step_choice"] for row in rows} == {"theory", "best"}
    True

  Args:
    config: as configs/games/rates.py.

  Returns:
    rates: the median over games, at the theory's step and at the best of the grid's;
    original_game: queries by ε, and their fitted slope.
  """
  keys = jax.random.split(jax.random.key(0), config.games)
  rows: Rows = []
  for beta, (updates, method) in bar(itertools.product(config.betas, config.methods), "rates"):
    cost = QUERIES.get((updates, method), 1)
    iterations = config.queries // cost
    theory = solvers.theory(method, updates, beta, config.actions, iterations)
    steps = np.asarray(config.steps) * solvers.unit(method, updates, beta)
    if updates == "proximal":
      steps = steps[steps * beta <= 1]
    for choice, step in (("theory", np.asarray(theory.step)[None]), ("best", steps)):
      tried = (jnp.asarray(v, float) for v in theory)
      knobs = solvers.Knobs(*(jnp.broadcast_to(v, (len(step), *v.shape)) for v in tried))
      knobs = knobs._replace(step=jnp.asarray(step))
      games = games_of(config, range(config.games), beta=beta)
      curves = contextual.curves(method, updates, games, knobs, keys, points=iterations, every=1)
      queries = _reach(np.asarray(curves), config.targets, cost)  # [steps games targets]
      for t, target in enumerate(config.targets):
        middle = np.median(queries[..., t], 1)
        best = int(np.argmin(middle))
        reached = int(np.isfinite(queries[best, :, t]).sum())
        rows.append(
          {
            "updates": updates,
            "beta": beta,
            "method": method,
            "step_choice": choice,
            "step": "schedule" if np.ndim(step) > 1 else float(step[best]),
            "target": target,
            "median_queries": middle[best],
            f"reached_of_{config.games}": reached,
          }
        )
  return {"rates": rows, "original_game": _original_game(config, keys)}


def _exploitability(game: solvers.Game, state: solvers.State) -> list[Float[Array, ""]]:
  """Of the iterate, and of MWU's mean, which its theory speaks of."""
  policies = (state.logp, state.other)
  return [preference.exploitability(game.p_win, jnp.exp(policy)) for policy in policies]


def _original_game(config: StudyConfig, keys: Array) -> Rows:
  """Counts queries to an ε-equilibrium: β = ε/(2 log A) where a method may choose it."""
  rows: Rows = []
  epsilons = np.asarray(config.epsilons)
  iterations = config.iterations_original
  for label, method, given in bar(config.original, "original game"):
    queries, path = [], None
    for epsilon in epsilons:
      if path is None or given == "epsilon":
        beta = epsilon / (2 * np.log(config.actions)) if given == "epsilon" else given
        knobs = solvers.theory(method, "proximal", beta, config.actions, iterations)
        iterate, other = contextual.curves(
          method,
          "proximal",
          games_of(config, range(config.games), beta=beta),
          jax.tree.map(lambda knob: jnp.asarray(knob, float)[None], knobs),
          keys,
          points=iterations,
          every=1,
          measure=_exploitability,
        )
        path = np.asarray(other if method == "mwu" else iterate)[0]
      met, cost = path <= epsilon, QUERIES.get(("proximal", method), 1)
      first = np.where(met.any(1), (met.argmax(1) + 1.0) * cost, np.inf)
      queries.append(np.median(first))
    fine = np.isfinite(queries)
    slope = np.nan
    if fine.sum() > 2:
      slope = np.polyfit(-np.log(epsilons[fine]), np.log(queries)[fine], 1)[0]
    rows += [
      {"method": label, "epsilon": epsilon, "median_queries": q, "fitted_slope": slope}
      for epsilon, q in zip(epsilons, queries, strict=True)
    ]
  return rows


def approximation(config: StudyConfig) -> Tables:
  """Measures the error of both halves' log-probabilities against inner steps T and batch B.

  Examples:
    >>> from nash_jax.configs.games import approximation
    >>> from nash_jax.games import convergence
    >>> config = approximation.get_config("smoke")
    >>> config.update(inner_steps=(1, 50, 100), batches=(2, 16), inner_sampled=3, repeats=2)
    >>> rows = convergence.approximation(config)["approximation"]
    >>> bool(rows[0]["error_half"] > rows[2]["error_half"])
    True

  Args:
    config: as configs/games/approximation.py.

  Returns:
    approximation: a row for each T, then one for each B, with the lemma's orders beside them.
  """
  game, eta = _game(config), 2 * config.beta
  knobs = solvers.Knobs(eta / (config.beta * (1 + eta)), eta, 0.0, 0.0)
  start = solvers.init(game.log_ref)
  for _ in range(config.warmup):  # away from the reference, where the first half is easiest
    logp, other = solvers.nash_mp(start, game, knobs)
    start = solvers.State(logp, other, start.k)
  exact = solvers.nash_mp(start, game, knobs)

  @functools.partial(jax.jit, static_argnames="batch")
  def errors(keys: Array, inner: Count, batch: int, step: Values) -> Float[Array, "2"]:
    def one(key: Array) -> Float[Array, "2"]:
      draws = solvers.Draws(key, batch, inner)
      got = gradients.nash_mp_two_step(start, game, knobs._replace(step=step), draws)
      return jnp.array([preference.span(a, b) for a, b in zip(got, exact, strict=True)])

    return jax.vmap(one)(keys).mean(0)

  def row(axis: str, inner: int, batch: int, step: float, repeats: int) -> dict[str, Any]:
    half, full = errors(jax.random.split(jax.random.key(1), repeats), inner, batch, step)
    settings = {"against": axis, "inner": inner, "batch": batch, "step": step}
    return settings | {"error_half": half, "error_full": full}

  inner = [row("T", T, 0, config.step, 1) for T in bar(config.inner_steps, "inner steps T")]
  batch = [
    row("B", config.inner_sampled, B, config.step_sampled, config.repeats)
    for B in bar(config.batches, "pairs B")
  ]
  _fit(inner, np.array([line["inner"] for line in inner]))
  _fit(batch, np.log([line["batch"] for line in batch]), order=-0.5)
  return {"approximation": inner + batch}


def _fit(rows: Rows, x: Real[np.ndarray, "n"], order: float | None = None) -> None:
  """Adds the fitted rate of the half step's error in x, and the lemma's line: any e^(-cT) in T."""
  half = np.array([row["error_half"] for row in rows])
  used = half > 1e-11
  rate = np.polyfit(np.asarray(x)[used], np.log(half[used]), 1)[0]
  for row, position in zip(rows, x, strict=True):
    lemma = half[0] * np.exp((rate if order is None else order) * (position - x[0]))
    row |= {"fitted_rate": rate, "lemma": lemma}

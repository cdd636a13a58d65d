"""Studies of the exact games: each reads a config, writes CSV tables and figures into a folder."""

import csv
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from nash_jax.games import contextual, preference, solvers, zoo

QUERIES = {  # of P(·≻π) an iteration, where it is not one
  "nash_mp": 2, "egpo": 2, "proximal_point": 60, "nash_mp_approximate": 20}


def run(config, workdir):
  """Runs config.study in float64 and writes its tables and figures under workdir.

  Raises:
    ValueError: an unknown study.
  """
  studies = {"theorem": theorem, "rates": rates, "figure": figure, "map": prox_map,
             "approximation": approximation, "bradley_terry": bradley_terry}
  if config.study not in studies:
    raise ValueError(f"unknown study {config.study!r}; choices: {', '.join(studies)}.")
  folder = pathlib.Path(workdir)
  folder.mkdir(parents=True, exist_ok=True)
  with jax.enable_x64(True):
    studies[config.study](config, folder)


def _table(folder, name, header, rows):
  def cell(value):
    return f"{value:.6g}" if isinstance(value, (float, np.floating, jax.Array)) else value

  with open(folder / f"{name}.csv", "w", newline="") as f:
    writer = csv.writer(f, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([cell(value) for value in row] for row in rows)


def _figure(rows, columns, width=3.4, height=2.7, **shared):
  from matplotlib.figure import Figure

  drawing = Figure(figsize=(width * columns, height * rows), layout="constrained")
  return drawing, drawing.subplots(rows, columns, squeeze=False, **shared)


def _save(drawing, folder, name):
  import matplotlib

  drawing.savefig(folder / f"{name}.png", dpi=130)
  with matplotlib.rc_context({"svg.fonttype": "none"}):  # text stays text: smaller, and searchable
    drawing.savefig(folder / f"{name}.svg", metadata={"Date": None})


def _random(config, seed, actions=None):
  return zoo.random_game(seed, actions or config.actions, config.rank, strength=config.strength)


def _uniform_game(p_win, beta):
  p_win = jnp.asarray(p_win)
  log_ref = jnp.full(p_win.shape[:-1], -jnp.log(p_win.shape[-1]))
  return solvers.Game(p_win, log_ref, jnp.asarray(beta, float))


def _slope(values, floor=1e-24):
  """Slope of log(values) an iteration over the second half of what lies above rounding."""
  used = np.flatnonzero(np.asarray(values) > floor)
  used = used[len(used) // 2 :]
  return np.polyfit(used, np.log(np.asarray(values)[used]), 1)[0] if len(used) > 2 else np.nan


@jax.jit
def _distances(game, log_star, knobs, empty):
  """KL(π*‖π_K), SubOpt_β of the last half iterate, span of log π_K - log π*: [iterations] each."""
  def measure(state):
    return (preference.kl(log_star, state.logp),
            preference.gap(game.p_win, state.other, game.log_ref, game.beta),
            preference.span(state.logp, log_star))

  return solvers.run("nash_mp", "proximal", game, knobs, None, points=len(empty),
                     measure=measure)[1]


def theorem(config, folder):
  """KL(π*‖π_K) ≤ (1+2β)^{-K}/(2β) at η = 2β from π_ref, the two slopes, and other steps."""
  curves, slopes, steps = [], [], []
  drawing, axes = _figure(1, 3, 4)
  for actions in config.actions:
    p_win = jnp.asarray(_random(config, config.seed, actions).p_win)
    iterations = config.iterations if actions < 5000 else config.iterations_large
    for beta in config.betas:
      game = _uniform_game(p_win, beta)
      log_star = jnp.log(preference.equilibrium(p_win, jnp.exp(game.log_ref), beta))

      def track(eta, game=game, log_star=log_star, beta=beta, iterations=iterations):
        knobs = solvers.Knobs(eta / (beta * (1 + eta)), eta, 0.0, 0.0)
        return [np.asarray(v) for v in _distances(game, log_star, knobs, jnp.zeros(iterations))]

      kl, subopt, span = track(2 * beta)
      k = np.arange(1, iterations + 1)
      bound = (1 + 2 * beta) ** -k.astype(float) / (2 * beta)
      promised = -np.log1p(2 * beta) / 2
      ratio, rise = (kl / bound)[bound > 1e-26].max(), np.diff(kl[kl > 1e-26]).max()
      slopes.append([actions, beta, ratio, rise, promised, _slope(subopt), _slope(span, 1e-12),
                     2 * promised, _slope(kl)])
      shown = np.unique(np.geomspace(1, iterations, 40).astype(int)) - 1
      curves += [[actions, beta, k[i], kl[i], bound[i], subopt[i], span[i]] for i in shown]
      if beta == config.betas[0]:
        axes[0, 0].semilogy(k, np.maximum(kl, 1e-32), label=f"A = {actions:,}")
      if actions == config.actions_steps:
        color = f"C{list(config.betas).index(beta)}"
        axes[0, 1].semilogy(k, np.maximum(kl, 1e-32), color=color, label=f"β = {beta:g}")
        axes[0, 1].semilogy(k, bound, ":", color=color)
        finals = []
        for multiple in config.eta_multiples:
          kl = track(multiple * 2 * beta)[0]
          finals.append(kl[config.step_iterations - 1])
          steps.append([actions, beta, multiple, multiple * 2 * beta / (beta * (1 + 2 * beta *
                        multiple)), finals[-1], int((np.diff(kl[kl > 1e-26]) > 0).sum())])
        axes[0, 2].loglog(config.eta_multiples, finals, "o-", color=color, label=f"β = {beta:g}")
  k = np.arange(1, config.iterations + 1)
  first = config.betas[0]
  axes[0, 0].semilogy(k, (1 + 2 * first) ** -k.astype(float) / (2 * first), "k:", label="bound")
  axes[0, 0].set(title=f"any number of actions, β = {first:g}", xlabel="iteration K",
                 ylabel="KL(π*‖π_K), nats", ylim=(1e-30, None))
  axes[0, 1].set(title=f"against the bound (dotted), A = {config.actions_steps:,}",
                 xlabel="iteration K", ylim=(1e-30, None))
  axes[0, 2].set(title=f"other steps: KL after {config.step_iterations} iterations",
                 xlabel="η in units of 2β")
  for axis in axes.flat:
    axis.legend(fontsize=7)
  _save(drawing, folder, "theorem")
  _table(folder, "theorem_curves", ["actions", "beta", "k", "kl", "bound", "subopt_half", "span"],
         curves)
  _table(folder, "theorem_slopes", ["actions", "beta", "worst_kl_over_bound", "largest_kl_rise",
         "promised_slope", "subopt_slope", "span_slope", "promised_kl_slope", "kl_slope"], slopes)
  _table(folder, "theorem_steps", ["actions", "beta", "eta_over_2beta", "s", "kl",
                                   "iterations_kl_rose"], steps)


def _reach(curve, targets, cost):
  """Queries after which a curve [N] stays below each target; inf where it does not."""
  above = np.asarray(curve)[None] > np.asarray(targets)[:, None]
  last = np.where(above.any(1), above.shape[1] - np.argmax(above[:, ::-1], 1), 0) + 1
  return np.where(above[:, -1], np.inf, last * cost)


def rates(config, folder):
  """Queries of P(·≻π) to reach a SubOpt_β, and an ε-equilibrium of the original game."""
  p_win = np.stack([_random(config, seed).p_win for seed in range(config.games)])
  keys, rows = jax.random.split(jax.random.key(0), config.games), []
  for beta, (updates, method) in itertools.product(config.betas, config.methods):
    games = _stack(p_win, beta)
    cost = QUERIES.get(method, 1)
    iterations = config.queries // cost
    theory = solvers.theory(method, updates, beta, config.actions, iterations)
    steps = np.asarray(config.steps) * contextual.unit(method, updates, beta)
    if updates == "proximal":
      steps = steps[steps * beta <= 1]
    for kind, step in (("theory", jnp.asarray(theory.step, float)[None]), ("best", steps)):
      knobs = solvers.Knobs(*(jnp.broadcast_to(jnp.asarray(v, float), (len(step), *jnp.shape(v)))
                              for v in theory))._replace(step=jnp.asarray(step))
      grid = contextual.curves(method, updates, games, knobs, keys, points=iterations, every=1)
      queries = np.array([[_reach(c, config.targets, cost) for c in one] for one in grid])
      middle = np.median(queries, 1)  # over games: [steps targets]
      for t, target in enumerate(config.targets):
        best = int(np.argmin(middle[:, t]))
        chosen = "schedule" if np.ndim(step) > 1 else float(step[best])
        rows.append([updates, beta, method, kind, chosen, target, middle[best, t],
                     int(np.isfinite(queries[best, :, t]).sum())])
  _table(folder, "rates", ["updates", "beta", "method", "step_choice", "step", "target",
                           "median_queries", f"reached_of_{config.games}"], rows)
  _original_game(config, folder, p_win)


def _stack(p_win, beta):
  return _uniform_game(p_win, beta)._replace(beta=jnp.full(len(p_win), beta))


def _original_game(config, folder, p_win):
  """Queries to an ε-equilibrium: β = ε/(2 log A) where a method may choose it, else as given."""
  drawing, axes = _figure(1, 1, 5, 3.6)
  rows, epsilons = [], np.asarray(config.epsilons)
  for label, method, given in config.original:
    queries, path = [], None
    for epsilon in epsilons:
      if path is None or given == "epsilon":
        beta = epsilon / (2 * np.log(config.actions)) if given == "epsilon" else given
        knobs = solvers.theory(method, "proximal", beta, config.actions,
                               config.iterations_original)
        path = np.asarray(_exploitability(method, _stack(p_win, beta), knobs,
                                          config.iterations_original))
      met = path <= epsilon
      first = np.where(met.any(1), (met.argmax(1) + 1.0) * QUERIES.get(method, 1), np.inf)
      queries.append(np.median(first))
    queries = np.array(queries)
    fine = np.isfinite(queries)
    slope = np.nan
    if fine.sum() > 2:
      slope = np.polyfit(-np.log(epsilons[fine]), np.log(queries[fine]), 1)[0]
    rows += [[label, e, q, slope] for e, q in zip(epsilons, queries, strict=True)]
    axes[0, 0].loglog(1 / epsilons, queries, "o-", ms=3, label=f"{label}: slope {slope:.2f}")
  axes[0, 0].set(xlabel="1/ε", ylabel="queries to an ε-equilibrium (median)")
  axes[0, 0].legend(fontsize=7)
  _save(drawing, folder, "original_game")
  _table(folder, "original_game", ["method", "epsilon", "median_queries", "fitted_slope"], rows)


def _exploitability(method, games, knobs, iterations):
  """[S iterations] of the iterate, or of MWU's mean, which is what its theory speaks of."""
  knobs = jax.tree.map(lambda v: jnp.asarray(v, float), knobs)

  def one(game):
    def measure(state):
      policy = state.other if method == "mwu" else state.logp
      return preference.exploitability(game.p_win, jnp.exp(policy))

    return solvers.run(method, "proximal", game, knobs, None, points=iterations,
                       measure=measure)[1]

  return jax.jit(jax.vmap(one))(games)


def _games_of(config, seeds, **changes):
  settings = {name: config[name] for name in ("contexts", "actions", "rank", "strength", "beta")}
  return contextual.make_games(seeds, **(settings | changes))


def figure(config, folder):
  """The paper's figure in three rows that are not mixed: proximal, exact gradients, sampled."""
  tuning, games = _games_of(config, config.tuning_seeds), _games_of(config, config.seeds)
  drawing, axes = _figure(len(config.versions), len(config.horizons), sharey="row")
  chosen, tried, finals, lines = [], [], [], []
  start = contextual.reference_gap(games)
  finals.append(["reference", "", 0, *contextual.interval(start)])
  for row, (version, updates, batch, steps, entrants) in enumerate(config.versions):
    for column, horizon in enumerate(config.horizons):
      axis = axes[row, column]
      for c, (label, method, color, knobs) in enumerate(entrants):
        entrant = contextual.Entrant(label, method, updates, dict(knobs), batch)
        best, outcome, curves = contextual.race(
          entrant, tuning, games, steps=list(steps), horizon=horizon,
          longest=max(config.horizons), points=config.points)
        chosen.append([version, horizon, label, *_knob_cells(best)])
        tried += [[version, horizon, label, *_knob_cells(knob), score] for knob, score in outcome]
        finals.append([version, label, horizon, *contextual.interval(curves[:, -1])])
        x = np.arange(config.points + 1) * (horizon // config.points)
        mean, low, high = contextual.interval(np.c_[start, curves])
        lines += [[version, horizon, label, *point]
                  for point in list(zip(x, mean, low, high, strict=True))[:: config.csv_every]]
        style = "--" if c % 2 else "-"
        mean, low, high = (np.maximum(v, 1e-16) for v in (mean, low, high))  # rounding's realm
        axis.semilogy(x, mean, style, color=f"C{color}", label=label, lw=1.2)
        axis.fill_between(x, low, high, color=f"C{color}", alpha=0.2, lw=0)
      axis.set(xlabel="step")
      axis.set_title(f"{version}, {horizon:,} steps", fontsize=9)
    axes[row, 0].set_ylabel("SubOpt_β, last iterate")
    axes[row, -1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
  _save(drawing, folder, "figure")
  knobs = ["step", "eta", "kappa", "mixture"]
  _table(folder, "figure_tuned", ["version", "horizon", "method", *knobs], chosen)
  _table(folder, "figure_grid", ["version", "horizon", "method", *knobs, "mean_log10_final"], tried)
  band = ["mean", "low95", "high95"]
  _table(folder, "figure_finals", ["version", "method", "horizon", *band], finals)
  _table(folder, "figure_curves", ["version", "horizon", "method", "step", *band], lines)


def _knob_cells(knobs):
  return [knobs.get(name, "") for name in ("step", "eta", "kappa", "mixture")]


def prox_map(config, folder):
  """Final SubOpt_β of NashMP and its rivals over β × strength × step × batch; then over κ × η."""
  rows, finals = [], {}
  steps = jnp.asarray(config.steps)
  for batch in config.batches:
    for beta in config.betas:
      for strength in config.strengths:
        games = _games_of(config, config.seeds, beta=beta, strength=strength)
        for label, method, knobs in config.methods:
          entrant = contextual.Entrant(label, method, "gradient", dict(knobs), batch)
          settings, values = _final(entrant, games, steps, config.iterations)
          finals[batch, beta, strength, label] = values
          rows += [[batch, beta, strength, label, setting["step"], value]
                   for setting, value in zip(settings, values, strict=True)]
  _table(folder, "map", ["batch", "beta", "strength", "method", "step", "log10_subopt"], rows)
  own, *rivals = [label for label, *_ in config.methods]
  drawing, axes = _figure(len(rivals) * len(config.betas), len(config.batches), 3.2, 2.0)
  for r, rival in enumerate(rivals):
    for i, beta in enumerate(config.betas):
      for j, batch in enumerate(config.batches):
        gain = np.array([finals[batch, beta, s, rival] - finals[batch, beta, s, own]
                         for s in config.strengths])
        best = [finals[batch, beta, s, rival].min() - finals[batch, beta, s, own].min()
                for s in config.strengths]
        axis = axes[r * len(config.betas) + i, j]
        image = axis.imshow(np.c_[gain, best], cmap="RdBu", vmin=-2, vmax=2, origin="lower",
                            aspect="auto")
        axis.set_xticks(range(len(steps) + 1), [*(f"{s:g}" for s in config.steps), "best"],
                        fontsize=6)
        axis.set_yticks(range(len(config.strengths)), config.strengths, fontsize=6)
        axis.set_title(f"vs {rival}, β={beta:g}, " + (f"batch {batch}" if batch else "exact"),
                       fontsize=7)
  drawing.colorbar(image, ax=axes, shrink=0.4, extend="both",
                   label=f"log10 SubOpt of rival / {own}")
  drawing.supxlabel("step (units of ∇J)", fontsize=8)
  drawing.supylabel("strength of cycles", fontsize=8)
  _save(drawing, folder, "map")
  _kappa_eta(config, folder, steps)


def _final(entrant, games, steps, iterations):
  """(settings of the grid, mean log10 of final SubOpt_β for each)."""
  beta = float(games.beta[0])
  settings, knobs = contextual.grid(entrant, steps.tolist(), beta, iterations)
  if entrant.batch:
    knobs, games = jax.tree.map(lambda v: v.astype(jnp.float32), (knobs, games))
  keys = jax.random.split(jax.random.key(7), len(games.beta))
  curves = contextual.curves(entrant.method, "gradient", games, knobs, keys, points=1,
                             every=iterations, batch=entrant.batch)
  return settings, contextual.score(curves[:, :, -1])


def _kappa_eta(config, folder, steps):
  rows = []
  drawing, axes = _figure(len(config.batches), len(config.corners), 3.4, 2.6)
  kappas, etas = list(config.kappas), list(config.etas)
  for i, batch in enumerate(config.batches):
    for j, (name, beta, strength) in enumerate(config.corners):
      games = _games_of(config, config.seeds, beta=beta, strength=strength)
      entrant = contextual.Entrant("", "nash_mp_ema", "gradient",
                                   {"eta": etas, "kappa": kappas}, batch)
      settings, values = _final(entrant, games, steps, config.iterations)
      rows += [[batch, beta, strength, s["kappa"], s["eta"], s["step"], v]
               for s, v in zip(settings, values, strict=True)]
      best = np.array(values).reshape(len(steps), len(etas), len(kappas)).min(0)
      axis = axes[i, j]
      drawing.colorbar(axis.imshow(best, cmap="viridis_r", origin="lower", aspect="auto"), ax=axis)
      axis.set_xticks(range(len(kappas)), kappas, fontsize=6)
      axis.set_yticks(range(len(etas)), etas, fontsize=6)
      axis.set_title(f"{name}, " + (f"batch {batch}" if batch else "exact"), fontsize=8)
      axis.set(xlabel="κ", ylabel="η")
  drawing.suptitle("log10 SubOpt_β of NashMP at its best step", fontsize=9)
  _save(drawing, folder, "kappa_eta")
  _table(folder, "kappa_eta", ["batch", "beta", "strength", "kappa", "eta", "step", "log10_subopt"],
         rows)


def approximation(config, folder):
  """Error of both halves' log-probabilities against inner steps T and batch B."""
  game = _uniform_game(_random(config, config.seed).p_win, config.beta)
  eta = 2 * config.beta
  knobs = solvers.Knobs(eta / (config.beta * (1 + eta)), eta, 0.0, 0.0)
  start = solvers.init(game.log_ref)
  for _ in range(config.warmup):  # away from the reference, where the first half is easiest
    start = solvers.State(*solvers.nash_mp(start, game, knobs), start.k)
  exact = solvers.nash_mp(start, game, knobs)

  def errors(inner, batch, step, key):
    one = knobs._replace(step=step)
    got = solvers.nash_mp_approximate(start, game, one, key, batch, inner)
    return jnp.stack([preference.span(a, b) for a, b in zip(got, exact, strict=True)])

  rows = []
  for inner in config.inner_steps:
    rows.append(["T", inner, 0, config.step, *errors(inner, 0, config.step, jax.random.key(0))])
  for batch in config.batches:
    draws = jax.jit(jax.vmap(lambda key, b=batch: errors(
      config.inner_sampled, b, config.step_sampled, key)))(
        jax.random.split(jax.random.key(1), config.repeats))
    mean = draws.mean(0)
    rows.append(["B", config.inner_sampled, batch, config.step_sampled, *mean])
  drawing, axes = _figure(1, 2, 4, 3)
  for axis, what, column in ((axes[0, 0], "T", 1), (axes[0, 1], "B", 2)):
    x, half, full = np.array([[r[column], r[4], r[5]] for r in rows if r[0] == what], float).T
    axis.semilogy(x, half, "o-", ms=3, label="log π_{k+1/2}")
    axis.semilogy(x, full, "s-", ms=3, label="log π_{k+1}")
    if what == "T":
      used = half > 1e-11
      rate = np.polyfit(x[used], np.log(half[used]), 1)[0]
      axis.semilogy(x, half[0] * np.exp(rate * (x - x[0])), "k:", label=f"e^(-{-rate:.3g}·T)")
    else:
      rate = np.polyfit(np.log(x), np.log(half), 1)[0]
      axis.loglog(x, half[0] * (x / x[0]) ** -0.5, "k:", label=f"B^(-1/2); fitted {rate:.2f}")
    axis.set(xlabel=f"{what}: " + ("inner steps" if what == "T" else "pairs a step"),
             ylabel="error (span, nats)")
    axis.legend(fontsize=7)
    rows.append([f"{what}_fitted_rate", "", "", "", rate, ""])
  _save(drawing, folder, "approximation")
  _table(folder, "approximation", ["against", "inner", "batch", "step", "error_half",
                                   "error_full"], rows)


def bradley_terry(config, folder):
  """Three ways a reward fails where preferences cycle: purity, one datum, the sampling law."""
  ref = np.full(3, 1 / 3)
  drawing, axes = _figure(1, 3, 3.6, 3)
  rows = []

  def both(p_win, beta, weights=None):
    scores = preference.bradley_terry(p_win, weights)
    reward = jax.nn.softmax(jnp.log(ref) + scores / beta)
    return np.asarray(reward), np.asarray(preference.equilibrium(p_win, ref, beta))

  game = zoo.rock_paper_scissors(*config.payoffs)
  paths = np.array([both(game.p_win, beta) for beta in config.betas])
  for y, label in enumerate(game.labels):
    axes[0, 0].semilogx(config.betas, paths[:, 0, y], "--", color=f"C{y}", label=f"reward {label}")
    axes[0, 0].semilogx(config.betas, paths[:, 1, y], color=f"C{y}", label=f"equilibrium {label}")
  rows += [["beta", beta, *path.ravel()] for beta, path in zip(config.betas, paths, strict=True)]
  axes[0, 0].set(xlabel="β", ylabel="probability", title="a reward picks one, the game mixes")

  cycle = zoo.condorcet_cycle().p_win
  for extra in config.extra_votes:  # votes a pair: config.votes, and some more for 0 against 1
    wins = cycle * config.votes
    wins[0, 1] += max(extra, 0)
    wins[1, 0] += max(-extra, 0)
    votes = wins + wins.T
    rows.append(["extra_votes", extra, *np.ravel(both(wins / votes, config.beta, votes))])
  shown = np.array([row[1:] for row in rows if row[0] == "extra_votes"], float)
  axes[0, 1].plot(shown[:, 0], shown[:, 1:4], "o--", ms=3)
  axes[0, 1].set_prop_cycle(None)
  axes[0, 1].plot(shown[:, 0], shown[:, 4:7], "-")
  axes[0, 1].set(xlabel=f"extra votes on one of three pairs of {config.votes}",
                 title=f"one datum, β = {config.beta:g}")

  for weight in config.law_weights:  # how often 0 meets 1, the other pairs once each
    weights = np.ones((3, 3))
    weights[0, 1] = weights[1, 0] = weight
    rows.append(["law", weight, *np.ravel(both(cycle, config.beta, weights))])
  shown = np.array([row[1:] for row in rows if row[0] == "law"], float)
  axes[0, 2].semilogx(shown[:, 0], shown[:, 1:4], "o--", ms=3)
  axes[0, 2].set_prop_cycle(None)
  axes[0, 2].semilogx(shown[:, 0], shown[:, 4:7], "-")
  axes[0, 2].set(xlabel="times pair (0, 1) is drawn", title="the sampling law")
  axes[0, 2].minorticks_off()
  axes[0, 0].legend(fontsize=6)
  _save(drawing, folder, "bradley_terry")
  names = [f"{kind}_{y}" for kind in ("reward", "equilibrium") for y in range(3)]
  _table(folder, "bradley_terry", ["study", "value", *names], rows)

"""Studies of the exact games: a config in; CSV tables, PNG and SVG figures out.

A study returns tables by name, each a list of rows, dicts with the same keys. What is drawn of them
is written in the config: see _figure.
"""

import csv
import functools
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from nash_jax.games import contextual, preference, solvers, zoo
from nash_jax.validation import file_name, require

QUERIES = {  # of P(·≻π) an iteration, where it is not one
  "nash_mp": 2, "egpo": 2, "proximal_point": 60, "nash_mp_approximate": 20}


_COUNTS = (  # fields of the studies, and what each of their values is
  "actions", "actions_steps", "batches", "contexts", "csv_every", "games", "horizons",
  "inner_sampled", "inner_steps", "iterations", "iterations_large", "iterations_original", "points",
  "queries", "rank", "repeats", "seed", "seeds", "step_iterations", "tuning_seeds", "warmup")
_POSITIVE = (
  "beta", "betas", "epsilons", "eta_multiples", "etas", "kappas", "law_weights", "payoffs", "step",
  "step_sampled", "steps", "strength", "strengths", "targets", "votes")
_FROM_ZERO = ("batches", "seed", "seeds", "tuning_seeds", "warmup")


def check(config):
  """Raises ValueError that names the field of a study's config which is out of its range."""
  for name, given in config.items():
    values = given if isinstance(given, (tuple, list)) else (given,)
    if name in _COUNTS + _POSITIVE:
      require(len(values) > 0, name, "at least one value", given, "Give one.")
    for value in values:
      if name in _COUNTS and not (name == "contexts" and value is None):
        least = 2 if name in ("actions", "actions_steps") else 1  # one action is no game
        preference.count(name, value, least=0 if name in _FROM_ZERO else least)
      elif name in _POSITIVE and not (name == "kappas" and value == "harmonic"):
        preference.number(name, value, at_most=1.0 if name == "kappas" else np.inf)
  if config.study == "figure":
    require(len(config.seeds) > 1, "seeds", "at least two, for an interval", config.seeds,
            "Give more seeds.")


def run(config, workdir):
  """Runs config.study in float64 and writes its tables and figures under workdir.

  Raises:
    ValueError: an unknown study, a field out of its range, or a folder that cannot be written.
  """
  studies = {"theorem": theorem, "rates": rates, "figure": figure, "map": prox_map,
             "approximation": approximation, "bradley_terry": bradley_terry}
  if config.study not in studies:
    raise ValueError(f"unknown study {config.study!r}; choices: {', '.join(studies)}.")
  check(config)
  folder = pathlib.Path(workdir)
  folder.mkdir(parents=True, exist_ok=True)
  with jax.enable_x64(True):
    tables = studies[config.study](config)
  try:
    _write_all(config, tables, folder)
  except OSError as error:  # that of a full disk names no file
    raise ValueError(f"{folder}: expected a folder that can be written: {error}") from error
  print(f"wrote the tables {', '.join(tables)} and figures {', '.join(config.figures)} to {folder}")


def _write_all(config, tables, folder):
  for name, rows in tables.items():
    _write(folder / f"{file_name(name)}.csv", rows)
  for name, settings in config.figures.items():
    _figure(folder / file_name(name), tables, **settings)


def _bar(things, what):
  return tqdm.tqdm(list(things), desc=what)


def _write(path, rows):
  def cell(value):
    return f"{value:.6g}" if isinstance(value, (float, np.floating, jax.Array)) else value

  with open(path, "w", newline="") as f:
    writer = csv.DictWriter(f, rows[0] if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: cell(value) for key, value in row.items()} for row in rows)


def _figure(path, tables, panels, size, colorbar=None):
  """Draws rows of panels: dicts of layers, arguments of legend, and of matplotlib's Axes.set.

  A layer is a dict: table; where, the values of columns that select its rows; x and y, columns;
  and either value, a column shown as a heat map (its least where a cell has several rows), or
  settings of _lines. A colorbar of the whole figure has a label, that of a panel none.
  """
  from matplotlib import rc_context
  from matplotlib.figure import Figure

  drawing = Figure(layout="constrained", figsize=(size[0] * len(panels[0]), size[1] * len(panels)))
  axes = drawing.subplots(len(panels), len(panels[0]), squeeze=False)
  for axis, panel in zip(axes.flat, itertools.chain(*panels), strict=True):
    settings = dict(panel)
    legend = {"fontsize": 7, **settings.pop("legend", {})}
    for layer in settings.pop("layers"):
      layer = dict(layer)
      table, where = tables[layer.pop("table")], layer.pop("where", {}).items()
      rows = [row for row in table if all(row[column] == value for column, value in where)]
      if not rows:
        print(f"{path.name}: nothing to draw, no rows with {dict(where)}; see config.figures")
        continue
      image = (_heat if "value" in layer else _lines)(axis, rows, **layer)
      if image and not colorbar:
        drawing.colorbar(image, ax=axis)
    axis.set_title(settings.pop("title"), fontsize=9)
    axis.set(**settings)
    axis.minorticks_off()  # their labels overlap where an axis spans a decade or two
    if axis.get_legend_handles_labels()[0]:
      axis.legend(**legend)
  if colorbar:
    drawing.colorbar(image, ax=axes, shrink=0.4, extend="both", label=colorbar)
  drawing.savefig(path.with_suffix(".png"), dpi=130)
  with rc_context({"svg.fonttype": "none"}):  # text stays text: smaller, and searchable
    drawing.savefig(path.with_suffix(".svg"), metadata={"Date": None})


def _lines(axis, rows, x, y, by=None, style="-", styles=None, label="_", band=None):
  """A line for each value of column `by`; label is a format over the columns of its first row.

  styles: matplotlib's format strings by value of `by`; style with the next colour by default, and
  style alone without `by`. band: two columns to shade between.
  """
  for c, key in enumerate(dict.fromkeys(row[by] if by else None for row in rows)):
    of = [row for row in rows if not by or row[by] == key]
    form = (styles or {}).get(key, f"C{c}{style}" if by else style)
    at = [row[x] for row in of]
    (line,) = axis.plot(at, [row[y] for row in of], form, label=label.format(**of[0]), ms=3)
    if band:
      axis.fill_between(at, *([row[name] for row in of] for name in band),
                        color=line.get_color(), alpha=0.2, lw=0)


def _heat(axis, rows, x, y, value, **settings):
  columns, lines = (list(dict.fromkeys(row[name] for row in rows)) for name in (x, y))
  values = np.full((len(lines), len(columns)), np.inf)
  for row in rows:
    cell = lines.index(row[y]), columns.index(row[x])
    values[cell] = min(values[cell], row[value])
  axis.set_xticks(range(len(columns)), columns, fontsize=6)
  axis.set_yticks(range(len(lines)), lines, fontsize=6)
  return axis.imshow(values, origin="lower", aspect="auto", **settings)


def _games(config, seeds, **changes):
  settings = {name: config[name] for name in ("contexts", "actions", "rank", "strength", "beta")
              if name not in changes}
  return contextual.make_games(seeds, **settings, **changes)


def _game(config, **changes):
  return jax.tree.map(lambda leaf: leaf[0], _games(config, [config.seed], **changes))


def _slope(values, floor=1e-24):
  """Slope of log(values) an iteration over the second half of what lies above rounding."""
  used = np.flatnonzero(values > floor)
  used = used[len(used) // 2 :]
  return np.polyfit(used, np.log(values[used]), 1)[0] if len(used) > 2 else np.nan


@jax.jit
def _distances(game, log_star, eta, iterations):
  """KL(π*‖π_K), SubOpt_β of the last half iterate, span of log π_K - log π*: [iterations] each."""
  def measure(game, state):
    return (preference.kl(log_star, state.logp),
            preference.gap(game.p_win, state.other, game.log_ref, game.beta),
            preference.span(state.logp, log_star))

  knobs = solvers.Knobs(eta / (game.beta * (1 + eta)), eta, 0.0, 0.0)
  return solvers.run("nash_mp", "proximal", game, knobs, None, points=len(iterations),
                     measure=measure)[1]


def theorem(config):
  """KL(π*‖π_K) ≤ (1+2β)^{-K}/(2β) at η = 2β from π_ref, the two slopes, and other steps."""
  curves, slopes, steps = [], [], []
  for actions, beta in _bar(itertools.product(config.actions, config.betas), "theorem"):
    case = {"actions": actions, "beta": beta}
    game = _game(config, **case)
    log_star = jnp.log(preference.equilibrium(game.p_win, jnp.exp(game.log_ref), beta))
    k = np.arange(1, 1 + (config.iterations if actions < 5000 else config.iterations_large))
    kl, subopt, span = map(np.asarray, _distances(game, log_star, 2 * beta, k))
    bound = (1 + 2 * beta) ** -k.astype(float) / (2 * beta)
    promised = -np.log1p(2 * beta) / 2
    slopes.append(case | {
      "worst_kl_over_bound": (kl / bound)[bound > 1e-26].max(),
      "largest_kl_rise": np.diff(kl[kl > 1e-26]).max(), "promised_slope": promised,
      "subopt_slope": _slope(subopt), "span_slope": _slope(span, 1e-12),
      "promised_kl_slope": 2 * promised, "kl_slope": _slope(kl)})
    curves += [case | {"k": k[i], "kl": kl[i], "bound": bound[i], "subopt_half": subopt[i],
                       "span": span[i]}
               for i in np.unique(np.geomspace(1, len(k), 40).astype(int)) - 1]
    for multiple in config.eta_multiples if actions == config.actions_steps else ():
      eta = multiple * 2 * beta
      kl = np.asarray(_distances(game, log_star, eta, k)[0])
      steps.append(case | {
        "eta_over_2beta": multiple, "s": eta / (beta * (1 + eta)),
        "kl": kl[config.step_iterations - 1],
        "iterations_kl_rose": int((np.diff(kl[kl > 1e-26]) > 0).sum())})
  return {"theorem_curves": curves, "theorem_slopes": slopes, "theorem_steps": steps}


def _reach(curves, targets, cost):
  """Queries after which curves [... N] stay below each target, [... targets]; inf where not."""
  above = np.asarray(curves)[..., None, :] > np.asarray(targets)[:, None]
  last = np.where(above.any(-1), above.shape[-1] - np.argmax(above[..., ::-1], -1), 0) + 1
  return np.where(above[..., -1], np.inf, last * cost)


def rates(config):
  """Queries of P(·≻π) to reach a SubOpt_β, and an ε-equilibrium of the original game."""
  keys, rows = jax.random.split(jax.random.key(0), config.games), []
  for beta, (updates, method) in _bar(itertools.product(config.betas, config.methods), "rates"):
    iterations = config.queries // QUERIES.get(method, 1)
    theory = solvers.theory(method, updates, beta, config.actions, iterations)
    steps = np.asarray(config.steps) * solvers.unit(method, updates, beta)
    if updates == "proximal":
      steps = steps[steps * beta <= 1]
    for kind, step in (("theory", np.asarray(theory.step)[None]), ("best", steps)):
      knobs = solvers.Knobs(*(jnp.broadcast_to(jnp.asarray(v, float), (len(step), *jnp.shape(v)))
                              for v in theory))._replace(step=jnp.asarray(step))
      games = _games(config, range(config.games), beta=beta)
      curves = contextual.curves(method, updates, games, knobs, keys, points=iterations, every=1)
      queries = _reach(curves, config.targets, QUERIES.get(method, 1))  # [steps games targets]
      for t, target in enumerate(config.targets):
        middle = np.median(queries[..., t], 1)
        best = int(np.argmin(middle))
        rows.append({
          "updates": updates, "beta": beta, "method": method, "step_choice": kind,
          "step": "schedule" if np.ndim(step) > 1 else float(step[best]), "target": target,
          "median_queries": middle[best],
          f"reached_of_{config.games}": int(np.isfinite(queries[best, :, t]).sum())})
  return {"rates": rows, "original_game": _original_game(config, keys)}


def _exploitability(game, state):  # of the iterate, and of MWU's mean, which its theory speaks of
  return [preference.exploitability(game.p_win, jnp.exp(policy))
          for policy in (state.logp, state.other)]


def _original_game(config, keys):
  """Queries to an ε-equilibrium: β = ε/(2 log A) where a method may choose it, else as given."""
  rows, epsilons = [], np.asarray(config.epsilons)
  for label, method, given in _bar(config.original, "original game"):
    queries, path = [], None
    for epsilon in epsilons:
      if path is None or given == "epsilon":
        beta = epsilon / (2 * np.log(config.actions)) if given == "epsilon" else given
        knobs = solvers.theory(method, "proximal", beta, config.actions, config.iterations_original)
        iterate, other = contextual.curves(
          method, "proximal", _games(config, range(config.games), beta=beta),
          jax.tree.map(lambda knob: jnp.asarray(knob, float)[None], knobs), keys, every=1,
          points=config.iterations_original, measure=_exploitability)
        path = np.asarray(other if method == "mwu" else iterate)[0]
      met = path <= epsilon
      first = np.where(met.any(1), (met.argmax(1) + 1.0) * QUERIES.get(method, 1), np.inf)
      queries.append(np.median(first))
    fine = np.isfinite(queries)
    slope = np.nan
    if fine.sum() > 2:
      slope = np.polyfit(-np.log(epsilons[fine]), np.log(queries)[fine], 1)[0]
    rows += [{"method": label, "epsilon": epsilon, "median_queries": q, "fitted_slope": slope}
             for epsilon, q in zip(epsilons, queries, strict=True)]
  return rows


def figure(config):
  """The paper's figure in versions that are not mixed: proximal, exact gradients, sampled."""
  tuning, games = _games(config, config.tuning_seeds), _games(config, config.seeds)
  start = contextual.reference_gap(games)
  blank = dict.fromkeys(("step", "eta", "kappa", "mixture"), "")

  def band(values):
    shown = contextual.interval(np.where(np.isnan(values), np.inf, values))  # NaN has diverged
    return dict(zip(("mean", "low95", "high95"), shown, strict=True))

  tuned, tried, lines = [], [], []
  finals = [{"version": "reference", "method": "", "horizon": 0, **band(start)}]
  runs = [(version, entrant) for version in config.versions for entrant in version[-1]]
  for (version, updates, batch, steps, _), (label, method, knobs) in _bar(runs, "figure"):
    entrant = contextual.Entrant(label, method, updates, dict(knobs), batch)
    outcomes = contextual.race(entrant, tuning, games, steps=steps, horizons=config.horizons,
                               points=config.points)
    for horizon, (best, grid, curves) in zip(config.horizons, outcomes, strict=True):
      what = {"version": version, "horizon": horizon, "method": label}
      tuned.append(what | blank | best)
      tried += [what | blank | one | {"mean_log10_final": score} for one, score in grid]
      finals.append(what | band(curves[:, -1]))
      every = horizon // config.points * config.csv_every
      values = band(np.c_[start, curves][:, :: config.csv_every])
      lines += [what | {"step": i * every} | dict(zip(values, point, strict=True))
                for i, point in enumerate(zip(*values.values(), strict=True))]
  return {"figure_tuned": tuned, "figure_grid": tried, "figure_finals": finals,
          "figure_curves": lines}


def _map_cell(config, method, knobs, batch, beta, strength):
  """Rows of a grid on one cell's games: settings and mean log10 of final SubOpt_β."""
  games = _games(config, config.seeds, beta=beta, strength=strength)
  entrant = contextual.Entrant(method, method, "gradient", dict(knobs), batch)
  settings, _, (scores,) = contextual.tune(
    entrant, games, steps=config.steps, horizons=[config.iterations], key=jax.random.key(7))
  return [one | {"log10_subopt": score} for one, score in zip(settings, scores, strict=True)]


def prox_map(config):
  """Final SubOpt_β of NashMP and its rivals over β × strength × step × batch; then over κ × η."""
  cells, gains, kappa_eta = [], [], []
  (own, *_), *rivals = config.methods
  for batch, beta, strength in _bar(
      itertools.product(config.batches, config.betas, config.strengths), "map"):
    cell, final = {"batch": batch, "beta": beta, "strength": strength}, {}
    for label, method, knobs in config.methods:
      rows = _map_cell(config, method, knobs, **cell)
      final[label] = {row["step"]: row["log10_subopt"] for row in rows}
      final[label]["best"] = min(final[label].values())
      cells += [cell | {"method": label, "step": row["step"], "log10_subopt": row["log10_subopt"]}
                for row in rows]
    gains += [cell | {"rival": rival, "step": step, "gain": final[rival][step] - ours}
              for rival, *_ in rivals for step, ours in final[own].items()]
  knobs = {"kappa": config.kappas, "eta": config.etas}
  for batch, (_, beta, strength) in _bar(
      itertools.product(config.batches, config.corners), "κ and η"):
    cell = {"batch": batch, "beta": beta, "strength": strength}
    kappa_eta += [cell | row for row in _map_cell(config, "nash_mp_ema", knobs, **cell)]
  return {"map": cells, "map_gain": gains, "kappa_eta": kappa_eta}


def approximation(config):
  """Error of both halves' log-probabilities against inner steps T and batch B."""
  game, eta = _game(config), 2 * config.beta
  knobs = solvers.Knobs(eta / (config.beta * (1 + eta)), eta, 0.0, 0.0)
  start = solvers.init(game.log_ref)
  for _ in range(config.warmup):  # away from the reference, where the first half is easiest
    logp, other = solvers.nash_mp(start, game, knobs)
    start = solvers.State(logp, other, start.k)
  exact = solvers.nash_mp(start, game, knobs)

  @functools.partial(jax.jit, static_argnames="batch")
  def errors(keys, inner, batch, step):
    def one(key):
      got = solvers.nash_mp_approximate(start, game, knobs._replace(step=step),
                                        solvers.Draws(key, batch, inner))
      return jnp.array([preference.span(a, b) for a, b in zip(got, exact, strict=True)])

    return jax.vmap(one)(keys).mean(0)

  def row(against, inner, batch, step, repeats):
    half, full = errors(jax.random.split(jax.random.key(1), repeats), inner, batch, step)
    return {"against": against, "inner": inner, "batch": batch, "step": step,
            "error_half": half, "error_full": full}

  inner = [row("T", T, 0, config.step, 1) for T in _bar(config.inner_steps, "inner steps T")]
  batch = [row("B", config.inner_sampled, B, config.step_sampled, config.repeats)
           for B in _bar(config.batches, "pairs B")]
  for rows, x in ((inner, [row["inner"] for row in inner]),
                  (batch, np.log([row["batch"] for row in batch]))):
    half = np.array([row["error_half"] for row in rows])
    used = half > 1e-11
    rate = np.polyfit(np.asarray(x)[used], np.log(half[used]), 1)[0]
    order = rate if rows is inner else -0.5  # the lemma's: any e^(-cT), and B^(-1/2)
    for line, at in zip(rows, x, strict=True):
      line |= {"fitted_rate": rate, "lemma": half[0] * np.exp(order * (at - x[0]))}
  return {"approximation": inner + batch}


def bradley_terry(config):
  """Three ways a reward fails where preferences cycle: purity, one datum, the sampling law."""
  cycle, ref = zoo.condorcet_cycle().p_win, np.full(3, 1 / 3)
  pair = np.outer([1, 0, 0], [0, 1, 0])  # 0 against 1
  cases = [("beta", beta, zoo.rock_paper_scissors(*config.payoffs).p_win, beta, None)
           for beta in config.betas]
  for extra in config.extra_votes:  # votes a pair: config.votes, and some more for 0 against 1
    wins = cycle * config.votes + max(extra, 0) * pair + max(-extra, 0) * pair.T
    cases.append(("extra_votes", extra, wins / (wins + wins.T), config.beta, wins + wins.T))
  cases += [("law", weight, cycle, config.beta, 1 + (weight - 1) * (pair + pair.T))
            for weight in config.law_weights]  # how often 0 meets 1, the other pairs once each
  rows = []
  for study, value, p_win, beta, weights in _bar(cases, "rewards"):
    reward = jax.nn.softmax(np.log(ref) + preference.bradley_terry(p_win, weights) / beta)
    star = preference.equilibrium(p_win, ref, beta)
    rows.append({"study": study, "value": value, **{f"reward_{y}": reward[y] for y in range(3)},
                 **{f"equilibrium_{y}": star[y] for y in range(3)}})
  return {"bradley_terry": rows}

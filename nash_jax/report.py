"""Tables and figures from the records of runs."""

import collections
import json
import math
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from nash_jax.run import files
from nash_jax.validation import printable, require

FEW = 10  # with fewer prompts no win rate differs from one half at 99.7%: 2 / 2^9 > .003
# Why a cell has no length-controlled win rate.
REFUSED = {
  "few": "fewer than 50 prompts",
  "overlap": "one side is longer on more than nine tenths of the pairs, so equal length would be an"
  " extrapolation",
  "length": "length alone explains nine tenths of the verdicts' variance, so nothing else can be"
  " seen",
}
Cells = dict[str, dict[str, dict[str, Any]]]  # {row: {column: a cell of jobs.arena}}
# Panels of a figure: (title, y-axis label, {metric: label}, baseline).
PANELS = (
  ("Win rate against the reference", "win probability",
   {"eval/win_rate_vs_reference": "held-out prompts"}, 0.5),
  ("Distance from the reference", "KL (nats a response)",
   {"kl_to_reference": "training", "eval/kl_to_reference": "held out"}, None),
  ("Response length", "tokens",
   {"response_length": "training", "eval/response_length": "held out"}, None),
  ("Loss", "nats", {"loss": "training", "eval/loss": "held out"}, None),
  ("Training pairs won by y", "P(y ≻ y')", {"p_win": "training"}, 0.5),
  ("Accuracy", "share right", {"accuracy": "training", "eval/accuracy": "held out"}, None),
)  # fmt: skip
# Styles of held-out and training curves; the colours suit colour-blind readers.
HELD_OUT: dict[str, Any] = {"color": "#d55e00", "linewidth": 2, "marker": "o", "markersize": 4}
TRAINING: dict[str, Any] = {"color": "#7fa7c9", "linewidth": 1}
# What Markdown interprets; it ignores _ inside a word.
_MARKUP = re.compile(r"[\\`*|\[\]<>~#$&]|(?<![^\W_])_|_(?![^\W_])")


def number(value: float | None, digits: int = 3) -> str:
  """Returns a number as the paper prints it, such as ".717"; "—" for None, NaN and infinities."""
  if value is None or not math.isfinite(value):
    return "—"
  text = f"{value:.{digits}f}"
  return text.replace("0.", ".", 1) if text.startswith(("0.", "-0.")) else text


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
  """Returns a Markdown table whose columns also line up on a terminal.

  Cells are Markdown; pass names through `escaped`. No cell can break its row.
  """
  table = [[_as_cell(str(cell)) for cell in row] for row in (header, *rows)]
  widths = [max(map(len, column)) for column in zip(*table, strict=True)]
  lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in table]
  rule = "|" + "|".join("-" * (w + 2) for w in widths) + "|"
  return "\n".join([lines[0], rule, *lines[1:]])


def escaped(name: str) -> str:
  """Returns Markdown that shows a name literally, on one line."""
  return _MARKUP.sub(r"\\\g<0>", printable(name))


def _as_cell(markdown: str) -> str:
  # From left to right, so that existing escapes stay.
  return re.sub(r"\\.|\|", lambda m: "\\|" if m[0] == "|" else m[0], printable(markdown))


def _drawable(text: str) -> str:
  """Returns a text on one line, with characters escaped that the figures' font lacks."""
  from matplotlib import font_manager

  font = font_manager.get_font(font_manager.findfont(font_manager.FontProperties()))
  return "".join(
    c if font.get_char_index(ord(c)) else c.encode("unicode_escape").decode()
    for c in printable(text)
  )


def figure_labels(names: Iterable[str]) -> list[str]:
  """Returns the names as a figure can show them: short, drawable, and all different."""
  shown = map(printable, names)
  labels = [_drawable(x if len(x) <= 40 else f"{x[:24]}…{x[-15:]}") for x in shown]
  alike = len({*labels}) < len(labels)
  return [f"{label} ({i})" for i, label in enumerate(labels, 1)] if alike else labels


def save(figure: Any, path: str | os.PathLike[str]) -> pathlib.Path:
  """Writes a figure as a PNG atomically, and returns its path."""
  with files.replacing(path) as part:
    figure.savefig(part, format="png", dpi=150)
  return pathlib.Path(path)


def win_rate_cell(cell: dict[str, Any], diagonal: bool = False, with_n: bool = False) -> str:
  """Returns a win rate such as "**.717 ± .081**", bold if significant; ".5 —" on the diagonal.

  A cell with fewer than FEW prompts says so and gives their number.
  """
  if cell["mean"] is None:
    return "—"
  if diagonal:
    return f"{number(cell['mean']).rstrip('0')} —"
  text = f"{number(cell['mean'])} ± {number(cell['sigma3'])}"
  text = f"**{text}**" if cell["significant"] else text
  if cell["n"] < FEW:
    return f"{text} (too few: {cell['n']})"
  return f"{text} ({cell['n']})" if with_n else text


def win_rate_table(cells: Cells, with_n: bool = False) -> str:
  """Returns the Markdown table of the rows' win rates; `with_n` adds n to each cell."""
  rows = [
    [escaped(row), *(win_rate_cell(cell, row == column, with_n) for column, cell in line.items())]
    for row, line in cells.items()
  ]
  return markdown_table(["row beats column", *map(escaped, cells)], rows)


def _length_controlled(cells: Cells) -> list[str]:
  """Returns the table of length-controlled win rates, and why some are missing."""
  pairs = [cell for row, line in cells.items() for column, cell in line.items() if row != column]
  reasons = {cell["refused"] for cell in pairs if cell["n"]}
  notes = [f"{reason}: {REFUSED[reason]}" for reason in REFUSED if reason in reasons]
  if pairs and all(cell["refused"] == "few" for cell in pairs):
    return [f"No length-controlled win rates, LC (ours): {REFUSED['few']}."]

  def shown(cell: dict[str, Any], diagonal: bool) -> str:
    if cell["refused"]:
      return f"— ({cell['refused']})" if cell["n"] and not diagonal else "—"
    overlap = "" if diagonal else f" ({number(cell['overlap'], 2)})"
    return win_rate_cell(cell, diagonal) + overlap

  rows = [
    [escaped(row), *(shown(cell, row == column) for column, cell in line.items())]
    for row, line in cells.items()
  ]
  return [
    "Length-controlled, LC (ours): the win rate at equal length, by a logistic regression on the\n"
    "difference in length. In brackets the overlap, the share of pairs on the rarer side:",
    markdown_table(["row beats column", *map(escaped, cells)], rows),
    *([f"No rate where — ({'; '.join(notes)})."] if notes else []),
  ]


def arena(result: dict[str, Any]) -> str:
  """Returns the tables of a result of `nash_jax.arena`, as Markdown."""
  samples = f"{result['samples']} response{'s' * (result['samples'] > 1)}"
  out = [
    f"# Arena\n\n{result['prompts']} held-out prompts, {samples} a policy to "
    "each, judged in both orders.\nMean ± 3σ over prompts, **bold** where the 99.7% interval "
    "excludes one half."
  ]
  for name, judge in result["judges"].items():
    notes = [f"{metric.replace('_', ' ')} {number(x)}" for metric, x in judge["metrics"].items()]
    out += [
      f"## Judge: {escaped(name)}",
      win_rate_table(judge["win_rate"]),
      "; ".join([*notes, *_bootstrap_note(judge["win_rate"])]) + ".",
      *_length_controlled(judge["length_controlled"]),
      "Only pairs of similar length (within 2 tokens or 10% of the longer), number of prompts in "
      "brackets:",
      win_rate_table(judge["length_matched"], with_n=True),
    ]
  header, rows = policy_rows(result)
  rows = [[escaped(name), *figures] for name, *figures in rows]
  out += [
    "## The policies",
    markdown_table(header, rows),
    f"KL (a response) and ratios are to {escaped(result['base'])}. Best-of-n has the bound log n − "
    "(n−1)/n on the KL to the policy it picks from. Under top-k or top-p, it is the mean log-ratio "
    "of the samples, which is not a KL. Lengths are in tokens.",
  ]
  cut = {name: statistics["truncated"] for name, statistics in result["policies"].items()}
  shares = [f"{escaped(name)} {number(share, 2)}" for name, share in cut.items() if share]
  if shares:
    share = f"Share of responses cut at the token limit: {', '.join(shares)}. Their full length is"
    out.append(f"{share} unknown, so LC and similar length use the length at the cut.")
  if any(statistics.get("realign") for statistics in result["policies"].values()):
    rare = {name: statistics["outside_base"] for name, statistics in result["policies"].items()}
    shares = [f"{escaped(name)} {number(share)}" for name, share in rare.items()]
    share = "Share of tokens outside the most probable of the base that together have .99"
    out.append(f"{share}: {', '.join(shares)}. Where it rises, λ is too large.")
  steps = {name: statistics.get("step") for name, statistics in result["policies"].items()}
  read = [f"{escaped(name)} {step}" for name, step in steps.items() if step is not None]
  out += [f"Checkpoint steps of the runs: {', '.join(read)}."] if read else []
  return "\n\n".join(out) + "\n"


def policy_rows(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
  """Returns the header and the rows of an arena's table of policies."""
  header = ["policy", "KL (nats)", "length", "ratio", "distinct-2", "ratio", "stopped"]
  columns = {"length": 1, "length_ratio": 2, "distinct2": 3, "distinct2_ratio": 2, "stopped": 2}
  rows = []
  for name, statistics in result["policies"].items():
    kl = f"{number(statistics['kl_to_reference'], 2)} ± {number(statistics['kl_sigma3'], 2)}"
    if statistics["log_ratio_to_reference"] is not None:
      kl = f"{number(statistics['log_ratio_to_reference'], 2)} (log-ratio)"
    if statistics["kl_to_reference"] is None and statistics.get("no_kl"):
      kl = f"— ({statistics['no_kl']})"
    if statistics["best_of"] > 1:
      kl = f"≤ {number(statistics['best_of_kl_bound'], 2)} (bound)"
    figures = (number(statistics[field], digits) for field, digits in columns.items())
    rows.append([name, kl, *figures])
  return header, rows


def _bootstrap_note(cells: Cells) -> list[str]:
  """Returns a note on how far the bootstrap's intervals differ from ± 3σ."""
  gaps = [
    abs(cell[f"bootstrap_{end}"] - cell["mean"] - sign * cell["sigma3"])
    for row, line in cells.items()
    for column, cell in line.items()
    if row != column and cell["bootstrap_low"] != cell["bootstrap_high"]  # otherwise no bootstrap
    for end, sign in (("low", -1), ("high", 1))
  ]
  if not gaps:
    return [f"no bootstrap: it needs {FEW} prompts"]
  return [f"the bootstrap's 99.7% intervals differ from ± 3σ by at most {number(max(gaps))}"]


def side_by_side(texts: list[dict[str, Any]]) -> str:
  """Returns each prompt with every policy's continuation, as Markdown."""
  out = ["\n## Side by side"]
  for item in texts:
    # A line break in a text must not end its list item or quote.
    lines = [f"* **{escaped(name)}**: {text}" for name, text in item["continuations"].items()]
    prompt = item["prompt"].replace("\n", "\n> ")
    out += [f"> {prompt}", "\n".join(line.replace("\n", "\n  ") for line in lines)]
  return "\n\n".join(out) + "\n"


def heat_map(cells: Cells, title: str, path: str | os.PathLike[str]) -> pathlib.Path:
  """Draws a win-rate table as a PNG: orange where the row loses, purple where it wins."""
  import numpy as np
  from matplotlib.figure import Figure

  names = list(cells)
  means = np.array([[cells[row][column]["mean"] for column in names] for row in names], float)
  distances = np.abs(means - 0.5)
  # The scale is symmetric about one half. It is never so narrow that noise looks like a result, and
  # ends short of the colour map's ends, which are both nearly black.
  reach = np.max(distances, where=np.isfinite(means), initial=0.0).clip(0.25, 0.5)
  labels, side = figure_labels(names), 1.15 * len(names)
  longest = max(map(len, labels), default=0)
  size = (side + max(3.2, 2 + 0.1 * longest), side + max(1.5, 0.8 + 0.06 * longest))
  figure = Figure(figsize=size, layout="constrained")
  axes = figure.subplots()
  image = axes.imshow(means, cmap="PuOr", vmin=0.5 - reach, vmax=0.5 + reach)
  for i, row in enumerate(names):
    for j, column in enumerate(names):
      cell = cells[row][column]
      text = win_rate_cell({**cell, "significant": False}, i == j)
      text = text.replace(" ± ", "\n± ").replace(" (", "\n(")
      colour = "white" if distances[i, j] > 0.5 * reach else "black"  # black if there is no mean
      weight = "bold" if cell["significant"] else "normal"
      axes.text(j, i, text, ha="center", va="center", fontsize=11, color=colour, fontweight=weight)
  turned: dict[str, Any] = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"}
  axes.set_xticks(range(len(names)), labels, parse_math=False, **turned)
  axes.set_yticks(range(len(names)), labels, parse_math=False)
  axes.set(xlabel="against", ylabel="policy")
  axes.set_title(_drawable(title), parse_math=False)
  axes.tick_params(length=0)
  axes.spines[:].set_visible(False)
  figure.colorbar(image, ax=axes, label="win probability of the row", shrink=0.8)
  return save(figure, path)


def agreement(result: dict[str, Any]) -> str:
  """Returns the tables of a result of jobs.agreement, as Markdown."""
  header = ["judge", "agreement", "99.7% interval", "log loss", "calibration error",
            "order flips it", "cyclic triples"]  # fmt: skip
  people, rows, bins = result["people"]["cycles"], [], []
  for name, judge in result["judges"].items():
    agrees, rated = judge["agreement"], "metrics" in judge  # a rule gives no probabilities
    figures = [number(agrees["mean"]), f"{number(agrees['low'])} to {number(agrees['high'])}"]
    figures += [number(judge[x]) if rated else "—" for x in ("log_loss", "calibration_error")]
    figures.append(number(judge["metrics"].get("flip_rate")) if rated else "—")
    rows.append([escaped(name), *figures, _cyclic(judge["cycles"])])
    for row in judge["calibration"] if rated else ():
      shares = (number(row["confidence"]), number(row["people"]))
      bins.append([escaped(name), str(row["pairs"]), *shares])
  counted = next(iter(result["judges"].values()))["agreement"]
  out = [
    f"# Agreement\n\n{result['pairs']} pairs of responses to {result['prompts']} prompts,"
    f" {result['ties']} of them ties, which count only in the log loss. Agreement is on"
    f" {counted['pairs']} pairs of {counted['prompts']} prompts.",
    markdown_table(header, rows),
    "Log loss is in nats; a judge that always says one half has .693. In a cyclic triple of"
    " responses, each beats the next. People's own, where they compared all three:"
    f" {_cyclic(people)}.",
  ]
  if bins:
    header = ["judge", "pairs", "its confidence", "people who agree"]
    out += ["## Calibration", markdown_table(header, bins)]
  return "\n\n".join(out) + "\n"


def _cyclic(found: dict[str, int]) -> str:
  cyclic, triples = found["cyclic"], found["triples"]
  return f"{number(cyclic / triples)} of {triples}" if triples else "no triples"


def calibration(result: dict[str, Any], path: str | os.PathLike[str]) -> pathlib.Path:
  """Draws each judge's confidence against the share of people who agree, as a PNG."""
  from matplotlib.figure import Figure

  shown = {name: judge for name, judge in result["judges"].items() if "metrics" in judge}
  figure = Figure(figsize=(5, 4.5), layout="constrained")
  axes = figure.subplots()
  axes.plot([0.5, 1], [0.5, 1], color="gray", linewidth=1, linestyle="--", label="calibrated")
  for label, judge in zip(figure_labels(shown), shown.values(), strict=True):
    points = [(row["confidence"], row["people"]) for row in judge["calibration"]]
    axes.plot(*zip(*points, strict=True), marker="o", label=label)
  axes.set(xlabel="the judge's confidence", ylabel="share of people who agree", xlim=(0.5, 1))
  axes.set_title(f"Calibration on {result['pairs']} pairs")
  axes.grid(alpha=0.3)
  axes.legend()
  return save(figure, path)


def read_rows(workdir: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
  """Yields the lines of workdir/metrics.jsonl: a step and its metrics.

  Raises:
    ValueError: no such file, or a line that does not parse (names file and line).
  """
  path = pathlib.Path(workdir) / "metrics.jsonl"
  if not path.is_file():
    raise ValueError(f"{path}: no such file; give the workdir of a run that has made a step")
  text = path.read_text(encoding="utf-8", errors="replace")
  # A last line without a line break is still being written.
  for line_number, line in enumerate(text.split("\n")[:-1], 1):
    where, expected = f"{path}:{line_number}", "a step and its metrics"
    fix = "Restore the file, or move the run away."
    try:
      row = json.loads(line, parse_int=float)  # a number of any length
    except (ValueError, RecursionError) as error:
      raise ValueError(f"{where}: not JSON ({error}). {fix}") from None
    good = isinstance(row, dict) and isinstance(row.get("step"), float) and row["step"].is_integer()
    good = good and all(x is None or isinstance(x, float) for x in row.values())
    require(good, where, expected, line[:80], fix)
    row["step"] = int(row["step"])
    yield row


def read_metrics(workdir: str | os.PathLike[str]) -> dict[str, tuple[list[int], list[float]]]:
  """Returns {metric: (steps, values)} from `read_rows`, without nulls."""
  series: dict[str, tuple[list[int], list[float]]] = collections.defaultdict(lambda: ([], []))
  for row in read_rows(workdir):
    for name, value in row.items():
      if name != "step" and value is not None:
        series[name][0].append(row["step"])
        series[name][1].append(value)
  return series


def curves(workdir: str | os.PathLike[str]) -> pathlib.Path:
  """Draws workdir/curves.png: a panel for each entry of PANELS that the run recorded.

  Raises:
    ValueError: no metrics to draw.
  """
  from matplotlib.figure import Figure

  series = read_metrics(workdir)
  panels = [panel for panel in PANELS if any(name in series for name in panel[2])]
  if not panels:
    raise ValueError(
      f"{workdir}/metrics.jsonl: expected some of the metrics that are drawn, got none"
    )
  columns = min(3, len(panels))
  rows = -(-len(panels) // columns)
  figure = Figure(figsize=(4 * columns, 2.9 * rows), layout="constrained")
  for place, (title, label, names, baseline) in enumerate(panels, 1):
    axes = figure.add_subplot(rows, columns, place)
    if baseline is not None:
      axes.axhline(baseline, color="0.6", linewidth=1, linestyle="--")
    recorded = [name for name in names if name in series]
    for name in recorded:
      style = HELD_OUT if name.startswith("eval/") else TRAINING
      axes.plot(*series[name], label=names[name], **style)
    axes.set(title=title, xlabel="step", ylabel=label)
    axes.spines[["top", "right"]].set_visible(False)
    if len(recorded) > 1:
      axes.legend(frameon=False)
  return save(figure, pathlib.Path(workdir) / "curves.png")

"""Writes report.html: the curves, tables and texts of a run, an arena or a comparison.

The page is one file with all its data and scripts, so it opens from the file system. Texts are JSON
data and become text nodes; the page's content security policy allows only its two scripts.
"""

import base64
import hashlib
import html
import json
import logging
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax

from nash_jax import report
from nash_jax.run import files
from nash_jax.validation import ASSETS

log = logging.getLogger(__name__)
NAME = "report.html"
MOST_BYTES = 2_900_000  # of a page
MOST_POINTS, LINE_POINTS = 60_000, 1_000  # of all curves, and of one
MOST_STEPS = 25  # evaluations whose texts are shown
MOST_LETTERS = 20_000  # of one text
RATES = {
  "win_rate": "Win rate", "length_controlled": "Length-controlled win rate, LC (ours)",
  "length_matched": "Win rate, only pairs of similar length",
}  # fmt: skip
HEADLINE = {
  "eval/win_rate_vs_reference": "held-out win rate against the reference",
  "eval/kl_to_reference": "KL to the reference, nats a response",
}

Part = dict[str, Any]  # a part of a page, as page.js reads it


def leave(make: Callable[[pathlib.Path], object], folder: str | os.PathLike[str]) -> None:
  """Makes the page of a job that ended, on process 0, if its folder is on this machine.

  An error becomes a warning, because a missing page must not fail the job.
  """
  if jax.process_index() or "://" in str(folder):
    return
  try:
    make(pathlib.Path(folder))
  except Exception as error:
    log.warning("%s/%s is not made: %s: %s", folder, NAME, type(error).__name__, error)


def write(
  path: pathlib.Path,
  title: str,
  *,
  facts: Sequence[tuple[str, Any]] = (),
  config: Mapping[str, Any] | None = None,
  curves: Sequence[Part] = (),
  tables: Sequence[Part] = (),
  texts: Sequence[Part] = (),
) -> pathlib.Path:
  """Writes a page atomically, and returns its path.

  If it would exceed MOST_BYTES, every other prompt is dropped until it fits, and the page says how
  many are shown.

  Args:
    facts: (name, value) pairs that describe the page's subject.
    curves: from `run_curves`.
    tables: from `rate_table` and `row_table`.
    texts: from `run_texts` and `arena_texts`.
  """
  page: dict[str, Any] = {
    "facts": [[name, str(value)] for name, value in facts], "config": config,
    "curves": [*curves], "tables": [*tables], "texts": [part for part in texts if part["items"]],
  }  # fmt: skip
  sizes = [len(part["items"]) for part in page["texts"]]
  while len(text := _filled(title, page).encode()) > MOST_BYTES and any(
    len(part["items"]) > 1 for part in page["texts"]
  ):
    page["texts"] = [
      {**part, "items": part["items"][::2], "note": _partly(part, len(part["items"][::2]), size)}
      for part, size in zip(page["texts"], sizes, strict=True)
    ]
  files.write_text(path, text.decode())
  return path


def _partly(part: Part, shown: int, size: int) -> str:
  return f"{part['whole_note']} Shown here: {shown} of {size} prompts, evenly chosen."


def _filled(title: str, page: Part) -> str:
  def asset(name: str) -> str:
    return (ASSETS / "page" / name).read_text(encoding="utf-8")

  scripts = {"uplot": asset("uPlot.iife.min.js"), "script": asset("page.js")}
  sums = (base64.b64encode(hashlib.sha256(x.encode()).digest()).decode() for x in scripts.values())
  allowed = " ".join(f"'sha256-{x}'" for x in sums)
  parts = {
    **scripts, "title": html.escape(_spelled(title)), "data": _as_json(page),
    "styles": asset("uPlot.min.css") + asset("page.css"),
    "policy": f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {allowed}",
  }  # fmt: skip
  return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], asset("page.html"))


def _as_json(value: Any) -> str:
  """Returns JSON that is safe inside a <script> element."""
  text = json.dumps(files.without_nan(value), ensure_ascii=False, separators=(",", ":"))
  text = re.sub("[\ud800-\udfff]", "\ufffd", text)  # lone surrogates, which no browser shows
  return re.sub("[<>&\u2028\u2029]", lambda m: f"\\u{ord(m[0]):04x}", text)


def _spelled(text: str) -> str:
  return text.encode("utf-8", "backslashreplace").decode()


def _short(text: str) -> str:
  more = len(text) - MOST_LETTERS
  return text if more <= 0 else f"{text[:MOST_LETTERS]}… ({more} more characters)"


def _evenly(values: Sequence[Any], most: int) -> list[Any]:
  """Returns at most `most` of the values, evenly spaced, including the first and the last."""
  if len(values) <= most:
    return list(values)
  return [values[round(k * (len(values) - 1) / (most - 1))] for k in range(most)]


def _records(path: pathlib.Path) -> Iterator[dict[str, Any]]:
  """Yields the objects of a JSON-lines file; none if there is no file."""
  lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else [""]
  for number, line in enumerate(lines[:-1], 1):
    yield files.parse_object(f"{path}:{number}", line.encode())


# A run.


def write_run(workdir: str | os.PathLike[str]) -> pathlib.Path:
  """Writes the page of a run to its workdir, at any time; includes an arena in workdir/arena.

  Raises:
    ValueError: the workdir has no metrics, or something in it does not parse.
  """
  folder = pathlib.Path(workdir)
  config = files.read_json(folder / "config.json")
  series = report.read_metrics(folder)
  last = max((steps[-1] for steps, _ in series.values()), default=0)
  job = config.get("job", "run")  # old configs lack the field
  facts = [("job", job), ("step", f"{last} of {config['steps']}" if "steps" in config else last)]
  facts += [("method", config["algorithm"]["name"])] if "algorithm" in config else []
  for name, label in HEADLINE.items():
    if name in series:
      facts.append((label, report.number(series[name][1][-1])))
  arena = files.read_json(folder / "arena" / "arena.json")
  tables = arena_tables(arena) if arena else []
  texts = [run_texts(folder), *([arena_texts(folder / "arena", arena)] if arena else [])]
  title = f"{job}: {'/'.join(folder.resolve().parts[-2:])}"
  return write(
    folder / NAME, title, facts=facts, config=config or None, curves=run_curves(series),
    tables=tables, texts=texts,
  )  # fmt: skip


def run_curves(series: Mapping[str, tuple[list[int], list[float]]]) -> list[Part]:
  """Returns a panel for each of report.PANELS that the run recorded, then for each other metric."""
  known = {name for _, _, names, _ in report.PANELS for name in names}
  most = max(2, min(LINE_POINTS, MOST_POINTS // max(1, len(series))))

  panels = [
    {
      "title": title, "label": label, "baseline": baseline,
      # As in curves.png, the held-out values get the strong colour, which is the first.
      "series": [
        line(names[name], *series[name], most)
        for name in sorted(names, key=lambda name: not name.startswith("eval/"))
        if name in series
      ],
    }
    for title, label, names, baseline in report.PANELS
  ]  # fmt: skip
  others = [
    {
      "title": name,
      "label": "",
      "baseline": None,
      "more": True,
      "series": [line(name, *series[name], most)],
    }
    for name in sorted(series.keys() - known)
  ]
  return [panel for panel in panels if panel["series"]] + others


def line(name: str, steps: Iterable[int], values: Iterable[float], most: int = LINE_POINTS) -> Part:
  """Returns a line of a panel, with at most `most` points."""
  points = _evenly(list(zip(steps, values, strict=True)), most)
  return {"name": name, "x": [x for x, _ in points], "y": [_rounded(float(y)) for _, y in points]}


def _rounded(value: float | None) -> float | None:
  return None if value is None or not math.isfinite(value) else float(f"{value:.5g}")


def run_texts(workdir: pathlib.Path) -> Part:
  """Returns the prompts of samples.jsonl with the reference's response and the policy's by step."""
  by_prompt: dict[str, list[dict[str, Any]]] = {}
  steps: set[int] = set()
  for row in _records(workdir / "samples.jsonl"):
    if isinstance(row.get("prompt"), str) and isinstance(row.get("response"), str):
      by_prompt.setdefault(row["prompt"], []).append(row)
      steps.add(row["step"])
  shown = _evenly(sorted(steps), MOST_STEPS)
  items = [_run_item(prompt, rows, shown) for prompt, rows in by_prompt.items()]
  note = "Held-out prompts with the policy's response at each evaluation, all with the same noise."
  if len(shown) < len(steps):
    note += f" {len(shown)} of {len(steps)} evaluations, evenly chosen; samples.jsonl has all."
  names = dict.fromkeys(response[0] for item in items for response in item["responses"])
  judges = ["the run's judge"] if any(item["verdicts"][0] for item in items) else []
  return {"title": "of training", "names": [*names], "judges": judges, "items": items,
          "note": note, "whole_note": note}  # fmt: skip


def _run_item(prompt: str, rows: list[dict[str, Any]], steps: list[int]) -> Part:
  responses: list[list[str]] = []
  references: dict[str, int] = {}
  verdicts = []
  for row in (row for row in rows if row["step"] in steps):
    reference = row.get("reference")
    if isinstance(reference, str) and reference not in references:
      # All evaluations share their noise, so the text changes only with the hardware.
      since = f" from step {row['step']}" if references else ""
      references[reference] = len(responses)
      responses.append([f"reference{since}", _short(reference), ""])
    facts = [f"{row['tokens']} tokens"] if "tokens" in row else []
    if row.get("log_ratio") is not None:
      facts.append(f"log π/π_ref {row['log_ratio']:.1f}")
    if row.get("p_win") is not None and isinstance(reference, str):
      first = row.get("p_win_first")
      pair = [len(responses), references[reference], _rounded(row["p_win"]), _rounded(first)]
      verdicts.append(pair)
    responses.append([f"step {row['step']}", _short(row["response"]), " · ".join(facts)])
  return {"prompt": _short(prompt), "responses": responses, "verdicts": [verdicts]}


# An arena.


def write_arena(folder: str | os.PathLike[str]) -> pathlib.Path:
  """Writes the page of an arena beside its arena.json."""
  folder = pathlib.Path(folder)
  result = files.read_json(folder / "arena.json")
  facts = [
    ("held-out prompts", result["prompts"]), ("responses of a policy to each", result["samples"]),
    ("base", result["base"]), ("judges", ", ".join(result["judges"])),
  ]  # fmt: skip
  title = f"arena: {'/'.join(folder.resolve().parts[-2:])}"
  texts, tables = [arena_texts(folder, result)], arena_tables(result)
  return write(
    folder / NAME, title, facts=facts, config=result["config"], tables=tables, texts=texts
  )


def arena_tables(result: Mapping[str, Any]) -> list[Part]:
  """Returns the win-rate table of each judge, and the table of the policies."""
  tables = [
    {**rate_table(f"{label}, judge: {judge}", rates[table]), "more": table != "win_rate"}
    for judge, rates in result["judges"].items()
    for table, label in RATES.items()
    if table in rates
    and any(c["mean"] is not None for r in rates[table].values() for c in r.values())
  ]
  header, rows = report.policy_rows(result)
  note = f"KL (a response) and ratios are to {result['base']}. Lengths are in tokens."
  return [*tables, row_table("The policies", header, rows, note)]


def rate_table(title: str, cells: report.Cells) -> Part:
  """Returns a table of win rates, drawn as a heat map."""
  fields = ("mean", "sigma3", "low", "high")
  return {
    "title": title, "note": "Mean ± 3σ, and the 99.7% interval; bold if it excludes one half.",
    "names": [*cells],
    "cells": [
      [
        [*(_rounded(cell[field]) for field in fields), cell["n"], int(cell["significant"]),
         cell.get("refused", "")]
        for cell in row.values()
      ]
      for row in cells.values()
    ],
  }  # fmt: skip


def row_table(title: str, header: list[str], rows: list[list[str]], note: str = "") -> Part:
  """Returns a table of texts."""
  return {"title": title, "note": note, "header": header, "rows": rows}


def arena_texts(
  folder: pathlib.Path,
  result: Mapping[str, Any],
  title: str = "of the arena",
  names: Mapping[str, str] | None = None,
) -> Part:
  """Returns an arena's prompts with every policy's first response, and the judges' verdicts.

  Args:
    names: {policy: its name on the page}.
  """
  policies, judges = [*result["policies"]], [*result["judges"]]
  rows = [*_records(folder / "texts.jsonl")] or result["texts"]  # old arenas lack that file
  items = [
    {
      "prompt": _short(row["prompt"]),
      "responses": [
        [(names or {}).get(name, name), _short(row["continuations"][name]), ""] for name in policies
      ],
      "verdicts": [_pairs(row.get("verdicts", {}).get(judge)) for judge in judges],
    }
    for row in rows
  ]
  note = "The first response of each policy to a prompt."
  if any(any(item["verdicts"]) for item in items):
    note += " Verdicts are only on these; the tables count all samples."
  else:
    judges = []
  called = [(names or {}).get(name, name) for name in policies]
  return {"title": title, "names": called, "judges": judges, "items": items,
          "note": note, "whole_note": f"{note} texts.jsonl has all."}  # fmt: skip


def _pairs(verdict: Mapping[str, Any] | None) -> list[list[Any]]:
  """Returns [i, j, P(i ≻ j), P with i shown first or None] for every pair with a verdict."""
  if not verdict:
    return []
  first = verdict.get("p_win_first")
  return [
    [i, j, p, first[i][j] if first else None]
    for i, row in enumerate(verdict["p_win"])
    for j, p in enumerate(row)
    if i < j and p is not None
  ]

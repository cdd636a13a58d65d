"""Compares judges with people's comparisons: agreement, calibration, order, length, cycles."""

import collections
import dataclasses
import itertools
import math
import os
import pathlib
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float
from ml_collections import ConfigDict

from nash_jax import judges, report
from nash_jax.config import describe, resolve
from nash_jax.data.corpus import Examples
from nash_jax.data.preferences import load_preferences
from nash_jax.data.tokenizer import Tokenizer
from nash_jax.jobs.rates import ratio
from nash_jax.policy import tokenizer_and_model
from nash_jax.run import files, lock
from nash_jax.run.metrics import progress_bar
from nash_jax.types import Responses
from nash_jax.validation import require

LENGTH = "longer wins"  # a judge that looks only at length
BINS = np.linspace(0.5, 1.0, 6)  # of the confidence max(P, 1 - P)


def agreement(
  p_win: Float[np.ndarray, "N"], people: Float[np.ndarray, "N"], prompts: list[Any]
) -> dict[str, Any]:
  """Returns the share of pairs on which a judge prefers what people prefer, with its interval.

  Prompts are independent but the pairs of a prompt are not, so the error is that of a ratio of sums
  over prompts. A judge's draw is half correct. Pairs on which people draw do not count.

  Args:
    p_win: the judge's P(a ≻ b).
    people: the share of people who prefer a.
    prompts: for each pair, anything that identifies its prompt.

  Returns:
    `mean`; the 99.7% interval `low` and `high` of rates.interval; the numbers of `pairs` and
    `prompts` that count.
  """
  counted = people != 0.5
  right = 0.5 + 0.5 * np.sign(p_win - 0.5) * np.sign(people - 0.5)
  sums: dict[Any, np.ndarray] = collections.defaultdict(lambda: np.zeros(2))
  for prompt, value in itertools.compress(zip(prompts, right, strict=True), counted):
    sums[prompt] += (value, 1)
  if not sums:
    return {"mean": math.nan, "low": math.nan, "high": math.nan, "pairs": 0, "prompts": 0}
  totals, weights = np.array([*sums.values()]).T
  mean, low, high = ratio(totals, weights)
  return {"mean": mean, "low": low, "high": high, "pairs": int(weights.sum()), "prompts": len(sums)}


def calibration(
  p_win: Float[np.ndarray, "N"], people: Float[np.ndarray, "N"]
) -> list[dict[str, float]]:
  """Returns for each bin: pairs, the judge's mean confidence, and the share of people who agree."""
  confidence = np.maximum(p_win, 1 - p_win)
  agree = np.where(p_win >= 0.5, people, 1 - people)
  places = np.clip(np.digitize(confidence, BINS) - 1, 0, len(BINS) - 2)
  rows = []
  for place in np.unique(places):
    chosen = places == place
    rows.append({
      "pairs": int(chosen.sum()), "confidence": float(confidence[chosen].mean()),
      "people": float(agree[chosen].mean()),
    })  # fmt: skip
  return rows


def calibration_error(rows: list[dict[str, float]]) -> float:
  """Returns the mean distance between confidence and people's share, weighted by pairs."""
  gaps = [row["pairs"] * abs(row["confidence"] - row["people"]) for row in rows]
  return sum(gaps) / sum(row["pairs"] for row in rows)


def log_loss(p_win: Float[np.ndarray, "N"], people: Float[np.ndarray, "N"]) -> float:
  """Returns the mean cross-entropy in nats; a judge that always says one half has log 2."""
  p = np.clip(p_win.astype(np.float64), 1e-7, 1 - 1e-7)
  return float(-np.mean(people * np.log(p) + (1 - people) * np.log1p(-p)))


def cycles(wins: dict[tuple[Any, int, int], float]) -> dict[str, int]:
  """Counts the triples of a prompt's responses that are compared without ties, and the cyclic ones.

  Args:
    wins: {(prompt, i, j): P(i ≻ j)}, i < j.
  """
  by_prompt: dict[Any, dict[tuple[int, int], float]] = collections.defaultdict(dict)
  for (prompt, i, j), p in wins.items():
    by_prompt[prompt][i, j] = p
  triples = cyclic = 0
  for pairs in by_prompt.values():
    for i, j, k in itertools.combinations(sorted({*itertools.chain(*pairs)}), 3):
      ij, jk, ik = (pairs.get(pair, 0.5) for pair in ((i, j), (j, k), (i, k)))
      if 0.5 not in (ij, jk, ik):
        triples += 1
        cyclic += (ij > 0.5) == (jk > 0.5) != (ik > 0.5)
  return {"triples": triples, "cyclic": cyclic}


@dataclasses.dataclass(frozen=True)
class Pairs:
  """Pairs of responses to judge: first those that people compared, then others of their prompts.

  Attributes:
    examples: columns with a row for each pair.
    compared: how many of the pairs people compared.
    places: (prompt, index of a, index of b) of each pair, counted within the prompt's responses.
  """

  examples: Examples
  compared: int
  places: list[tuple[bytes, int, int]]

  @property
  def people(self) -> Float[np.ndarray, "N"]:
    """Returns the share of people who prefer a, for each pair that they compared."""
    return np.array(self.examples.columns["p_win"][: self.compared], np.float64)

  def wins(self, p_win: Float[np.ndarray, "N"]) -> dict[tuple[bytes, int, int], float]:
    """Returns P(i ≻ j), i < j, of the first len(p_win) pairs; a pair's last comparison counts."""
    wins = {}
    for (prompt, i, j), p in zip(self.places, p_win, strict=False):
      wins[prompt, min(i, j), max(i, j)] = float(p if i < j else 1 - p)
    return wins


def all_pairs(examples: Examples, most: int) -> Pairs:
  """Returns the compared pairs, and all other pairs of prompts with three or more responses.

  Args:
    most: how many of a prompt's responses may form those other pairs.
  """
  columns = examples.columns
  known: dict[bytes, dict[bytes, Any]] = collections.defaultdict(dict)
  first: dict[bytes, int] = {}
  places: list[tuple[bytes, int, int]] = []

  def place(prompt: bytes, ids: Any) -> int:
    responses = known[prompt]
    responses.setdefault(np.asarray(ids, np.int32).tobytes(), (len(responses), ids))
    return responses[np.asarray(ids, np.int32).tobytes()][0]

  for row, (inputs, a, b) in enumerate(
    zip(columns["inputs"], columns["a"], columns["b"], strict=True)
  ):
    prompt = np.asarray(inputs, np.int32).tobytes()
    first.setdefault(prompt, row)
    places.append((prompt, place(prompt, a), place(prompt, b)))
  count, rows = len(places), {name: [*column] for name, column in columns.items()}
  there = {(prompt, min(i, j), max(i, j)) for prompt, i, j in places}
  for prompt, responses in known.items():
    listed = [*responses.values()][:most] if len(responses) > 2 else []
    for (i, a), (j, b) in itertools.combinations(listed, 2):
      if (prompt, i, j) not in there:
        places.append((prompt, i, j))
        more = {"a": a, "b": b, "p_win": 0.5}
        for name in rows:
          rows[name].append(more.get(name, columns[name][first[prompt]]))
  return Pairs(dataclasses.replace(examples, columns=rows), count, places)


def _responses(batch: dict[str, Any], side: str, stop_ids: tuple[int, ...]) -> Responses:
  tokens, mask = batch[f"{side}_tokens"], batch[f"{side}_mask"]
  nothing: Any = np.zeros((len(tokens), 1, tokens.shape[1]), np.float32)
  last = np.take_along_axis(tokens, np.maximum(mask.sum(axis=1, keepdims=True) - 1, 0), axis=1)
  stopped: Any = np.isin(last, stop_ids)
  return Responses(tokens[:, None], mask[:, None], nothing, nothing, stopped)


def _judge(
  judge: judges.Judge, pairs: Pairs, size: int, tokenizer: Tokenizer, title: str
) -> tuple[Float[np.ndarray, "N"], Bool[np.ndarray, "N"], dict[str, float]]:
  """Returns P(a ≻ b), whether it is readable, and the judge's metrics on the compared pairs."""

  def compare(params, prompts, a, b):
    return judge.fn(params, prompts, a, b).checked()

  compare = compare if judge.server else jax.jit(compare)
  p_win, valid = [], []
  totals: dict[str, np.ndarray] = collections.defaultdict(lambda: np.zeros(2))
  count = len(pairs.places)
  edges = [*range(0, pairs.compared, size), *range(pairs.compared, count, size), count]
  for start, end in progress_bar([*itertools.pairwise(edges)], title, unit="batch"):
    counted = end <= pairs.compared
    # A last batch whose metrics count stays short; another is filled to the compiled size.
    rows = range(start, end) if counted else np.arange(start, start + size) % count
    batch = pairs.examples.all(rows)
    a, b = (_responses(batch, side, tokenizer.stop_ids) for side in ("a", "b"))
    verdict = jax.device_get(compare(judge.params, batch["prompts"], a, b))
    p_win.append(verdict.p_win[: end - start, 0, 0])
    valid.append(verdict.valid[: end - start, 0, 0])
    if counted:
      for name, mean in verdict.metrics.items():
        totals[name] += (mean.total, mean.weight)
  if judge.server:
    judge.server.finish()
  metrics = {name: float(total / weight) for name, (total, weight) in totals.items() if weight}
  return np.concatenate(p_win), np.concatenate(valid), metrics


def _figures(
  pairs: Pairs, p_win: Float[np.ndarray, "N"], valid: Bool[np.ndarray, "N"]
) -> dict[str, Any]:
  """Returns the figures that need no probabilities, as plain JSON types."""
  read, people = valid[: pairs.compared], pairs.people
  prompts = [prompt for prompt, _, _ in itertools.compress(pairs.places, read)]
  return {
    "agreement": agreement(p_win[: pairs.compared][read], people[read], prompts),
    "cycles": cycles(pairs.wins(np.where(valid, p_win, 0.5))), "unread": int(np.sum(~valid)),
  }  # fmt: skip


def _probabilities(
  pairs: Pairs, p_win: Float[np.ndarray, "N"], valid: Bool[np.ndarray, "N"]
) -> dict[str, Any]:
  """Returns the figures that rate verdicts as probabilities, as plain JSON types."""
  read = valid[: pairs.compared]
  p, people = p_win[: pairs.compared][read], pairs.people[read]
  rows = calibration(p, people)
  error = calibration_error(rows)
  return {"log_loss": log_loss(p, people), "calibration": rows, "calibration_error": error}


def run(config: ConfigDict, workdir: str | os.PathLike[str]) -> dict[str, Any]:
  """Compares the judges of `config` (see config.agreement) with people's preferences.

  Writes agreement.json, agreement.md and agreement.png (the calibration).

  Raises:
    ValueError: a bad config, data or weights; a workdir in use or with a result; a judge that
      cannot read anything.
  """
  config, folder = resolve(config, "agreement"), files.make_folder(workdir)
  with lock.hold(folder):
    return _run(config, folder)


def _run(config: ConfigDict, folder: pathlib.Path) -> dict[str, Any]:
  path, fix = folder / "agreement.json", "Use another workdir, or move it away."
  require(not path.exists(), "workdir", "one without agreement.json", str(path), fix)
  tokenizer, _ = tokenizer_and_model(config.model)
  train, held_out = load_preferences(config.data, tokenizer, config.seed)
  pairs = all_pairs(held_out if len(held_out) else train, config.responses)
  made = {name: judges.make(judge, tokenizer) for name, judge in config.judges.items()}
  people = pairs.people
  lengths = [np.array([*map(len, pairs.examples.columns[side])]) for side in ("a", "b")]
  longer = 0.5 + 0.5 * np.sign(lengths[0] - lengths[1])
  everything = np.ones(len(longer), bool)
  result: dict[str, Any] = {
    "pairs": pairs.compared, "prompts": len({prompt for prompt, _, _ in pairs.places}),
    "ties": int(np.sum(people == 0.5)), "people": {"cycles": cycles(pairs.wins(people))},
    "judges": {LENGTH: _figures(pairs, longer, everything)}, "config": describe(config),
  }  # fmt: skip
  for name, judge in made.items():
    if judge.server:
      judge.server.keep_answers(folder)
    p_win, valid, metrics = _judge(judge, pairs, config.data.batch_size, tokenizer, name)
    some = bool(valid[: pairs.compared].any())
    what, expected = f"judge {name!r}", f"a readable verdict on some of {pairs.compared} pairs"
    require(some, what, expected, "none", "Check the judge: its answers, its template.")
    figures = {**_figures(pairs, p_win, valid), **_probabilities(pairs, p_win, valid)}
    result["judges"][name] = {**figures, "metrics": metrics}
  result = files.without_nan(result)
  files.write_json(path, result)
  tables = report.agreement(result)
  files.write_text(folder / "agreement.md", tables)
  report.calibration(result, folder / "agreement.png")
  print(tables)
  return result

"""Statistics of people's votes: agreement of annotators, cycles, and the ranking of policies."""

import collections
import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from nash_jax import report
from nash_jax.data.votes import Store, Vote
from nash_jax.jobs.agreement import cycles
from nash_jax.jobs.rates import ratio, win_rates
from nash_jax.run.files import without_nan

Sums = dict[Any, np.ndarray]  # {prompt: (total, weight)}


def statistics(store: Store) -> dict[str, Any]:
  """Returns statistics of the votes in a store, as plain JSON types.

  - `agreement`: see `agreement`.
  - `cycles` of the majority and of single annotators: see jobs.agreement.cycles.
  - `policies`: see `ranking`.
  - `annotators`: the numbers of each one's votes, ties and skips, the agreement with the others,
    and the share of `left` among the wins.
  """
  votes, number = store.all_votes(), store.progress()
  counts = _counts(votes)
  own = collections.defaultdict(list)
  for vote in votes:
    own[vote.annotator].append(vote)
  by_person = [cycles(_wins(mine)) for mine in own.values()]
  everybody = [
    {"name": name, "group": kind, "skips": skips, **_annotator(own[name], counts)}
    for name, kind, skips in store.annotators()
  ]
  names = ("triples", "cyclic")
  return without_nan({
    "pairs": number["pairs"], "judged": number["judged"], "votes": len(votes),
    "agreement": agreement(votes), "annotators": everybody,
    "cycles": {
      "majority": cycles(_wins(votes)),
      "single annotators": {name: sum(found[name] for found in by_person) for name in names},
    },
    "policies": ranking(votes, store.policies()),
  })  # fmt: skip


def _wins(votes: Iterable[Vote]) -> dict[tuple[int, int, int], float]:
  """Returns {(prompt, i, j): share of votes for i ≻ j}, with ties as halves and i < j."""
  found = collections.defaultdict(list)
  for vote in votes:
    found[vote.prompt, vote.a, vote.b].append(vote.wins)  # a < b, in the store
  return {pair: sum(wins) / len(wins) for pair, wins in found.items()}


def _counts(votes: Iterable[Vote]) -> dict[int, collections.Counter[float]]:
  counts: dict[int, collections.Counter[float]] = collections.defaultdict(collections.Counter)
  for vote in votes:
    counts[vote.pair][vote.wins] += 1
  return counts


def agreement(votes: list[Vote]) -> dict[str, Any]:
  """Returns how often one annotator prefers what another one prefers, with its interval.

  Every two votes on a pair count in both roles. The first is correct if it equals the second, and
  half correct if it is a tie; a second vote that is a tie does not count. Sides are random for each
  annotator, so two who do not read agree on one half.

  Returns:
    `mean`, `low` and `high` (rates.ratio over prompts), and the number of `pairs` with two votes.
  """
  sums: Sums = collections.defaultdict(lambda: np.zeros(2))
  prompts, pairs = {vote.pair: vote.prompt for vote in votes}, 0
  for pair, count in _counts(votes).items():
    a, b, ties = count[1.0], count[0.0], count[0.5]
    pairs += a + b + ties > 1
    right = a * (a - 1) + b * (b - 1) + ties * (a + b) / 2
    sums[prompts[pair]] += (right, (a + b) * (a + b + ties - 1))
  return {**_ratio(sums), "pairs": pairs}


def _ratio(sums: Sums) -> dict[str, float]:
  counted = [pair for pair in sums.values() if pair[1]]
  values = ratio(*np.array(counted).T) if counted else (math.nan,) * 3
  return dict(zip(("mean", "low", "high"), values, strict=True))


def _annotator(mine: list[Vote], counts: dict[int, collections.Counter[float]]) -> dict[str, Any]:
  """Returns the figures of one annotator, given all votes on each pair."""
  sums: Sums = collections.defaultdict(lambda: np.zeros(2))
  for vote in mine:
    others = counts[vote.pair] - collections.Counter([vote.wins])
    strict = others[1.0] + others[0.0]
    right = strict / 2 if vote.wins == 0.5 else others[vote.wins]
    sums[vote.prompt] += (right, strict)
  sides = [vote.left_won for vote in mine if vote.left_won != 0.5]
  return {
    "votes": len(mine), "ties": len(mine) - len(sides), "agreement": _ratio(sums),
    "left": sum(sides) / len(sides) if sides else math.nan,
  }  # fmt: skip


def ranking(votes: list[Vote], names: dict[int, list[str]]) -> dict[str, Any]:
  """Returns win rates of policies, and their ranking.

  Args:
    names: {number of a response: policies that gave it}.

  Returns:
    `order`: the policies by mean win rate over the others; `win_rate`: {row: {column: cell}} from
    rates.win_rates over prompts; `certain`: how many of the `compared` pairs of policies have a
    significant winner; `cycles`: among those, counted in triples.
  """
  policies = sorted(
    {name for vote in votes for side in (vote.a, vote.b) for name in names.get(side, [])}
  )
  rows = {prompt: i for i, prompt in enumerate(dict.fromkeys(vote.prompt for vote in votes))}
  place = {name: i for i, name in enumerate(policies)}
  sums = np.zeros((2, len(rows), len(policies), len(policies)))
  for (prompt, a, b), p in _wins(votes).items():
    for one in names.get(a, []):
      for two in names.get(b, []):
        if one != two:
          i, j = place[one], place[two]
          sums[:, rows[prompt], i, j] += (p, 1)
          sums[:, rows[prompt], j, i] += (1 - p, 1)
  if not sums.size or not sums[1].any():
    return {"order": [], "win_rate": {}, "certain": 0, "compared": 0, "cycles": cycles({})}
  valid = sums[1] > 0
  means = sums[0] / np.maximum(sums[1], 1)
  rates = win_rates(means[:, :, None, :, None], valid[:, :, None, :, None], resamples=10)
  rates = {name: table for name, table in rates.items() if "bootstrap" not in name}
  seen = rates["n"] > 0
  score = np.where(seen, rates["mean"], 0).sum(axis=1) / np.maximum(seen.sum(axis=1), 1)
  order = [policies[i] for i in np.argsort(-score, kind="stable")]
  upper = [(i, j) for i in range(len(policies)) for j in range(i + 1, len(policies)) if seen[i, j]]
  sure = {pair: float(rates["mean"][pair]) for pair in upper if rates["significant"][pair]}
  return {
    "order": order,
    "win_rate": {
      row: {
        column: {name: table[place[row], place[column]].item() for name, table in rates.items()}
        for column in order
      }
      for row in order
    },
    "certain": len(sure), "compared": len(upper),
    "cycles": cycles({("", i, j): p for (i, j), p in sure.items()}),
  }  # fmt: skip


def text(found: dict[str, Any]) -> str:
  """Returns statistics as Markdown."""
  lines = [f"{found['votes']} votes; {found['judged']} of {found['pairs']} pairs judged."]
  if found["agreement"]["mean"] is not None:
    lines += [
      f"Two annotators agree on {_span(found['agreement'])} of the pairs on which both take sides"
      f" ({found['agreement']['pairs']} pairs with two votes; one half is chance)."
    ]
  for who, count in found["cycles"].items():
    if count["triples"]:
      lines += [f"Cyclic triples of responses, {who}: {count['cyclic']} of {count['triples']}."]
  if found["annotators"]:
    rows = [
      [
        report.escaped(x["name"]), report.escaped(x["group"]), str(x["votes"]), str(x["ties"]),
        str(x["skips"]), _span(x["agreement"]), report.number(x["left"]),
      ]
      for x in found["annotators"]
    ]  # fmt: skip
    head = ["annotator", "group", "votes", "ties", "skips", "agrees with others", "took the left"]
    lines += ["", report.markdown_table(head, rows)]
  policies = found["policies"]
  if policies["order"]:
    lines += [
      "", report.win_rate_table(policies["win_rate"], with_n=True), "",
      f"Mean ± 3σ over prompts (number of prompts). Who wins is clear for {policies['certain']} of"
      f" {policies['compared']} pairs of policies.",
    ]  # fmt: skip
    if policies["cycles"]["cyclic"]:
      circles, total = policies["cycles"]["cyclic"], policies["cycles"]["triples"]
      lines += [f"Triples of policies that are clearly cyclic: {circles} of {total}."]
  return "\n".join(lines)


def _span(rate: dict[str, Any]) -> str:
  if rate["mean"] is None:
    return "—"
  return (
    f"{report.number(rate['mean'])} ({report.number(rate['low'])} to {report.number(rate['high'])})"
  )

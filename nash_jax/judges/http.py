"""A judge behind an OpenAI-compatible server, for the arena: sends text, receives A or B."""

import collections
import math
import pathlib
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jax import numpy as jnp

from nash_jax.data import judge_template
from nash_jax.data.tokenizer import Tokenizer
from nash_jax.judges.base import Comparison, Judge, pairwise
from nash_jax.judges.chat import KEY, Chat, Outcome
from nash_jax.types import Mean

__all__ = ["FLOOR", "KEPT", "KEY", "make"]

KEPT = "judge_answers.sqlite3"  # the file of answers in an arena's folder
# The least total probability of both answers. Below one half, the server's model would rather say
# something else, and the ratio of A to B means nothing. (Betley et al. 2025 use 0.25, for 101
# possible answers.)
FLOOR = 0.5
FIRST = 32  # if none of the first questions has a readable answer, the arena ends
LOST = {"neither": "neither", "refused": "refused", "missing": "unanswered"}  # kind: metric

_LEAD = (
  r"(?:(?:the|my|i\s+(?:choose|prefer|pick)|better|best|final)\s+)*"
  r"(?:(?:answer|verdict|choice|reply|response|option|winner)(?:\s+is\b)?[\s:=*_\"'“`]*)?"
)
_MARKS = r"[\s*_`\"'“”‘’(\[{<#$]*"  # what may stand before an answer
_WHY = r"[,:]?\s+(?:because|since|is\s+better)\b|\s+[(—–-]"
_END = rf"(?=[.;!)\]}}>*_`\"'”’]+(?:\s|$)|:?\s*$|\s*\n|{_WHY})"


def make(config, tokenizer: Tokenizer, params=None, mesh=None) -> Judge:
  """Builds the judge of `config.http`; see judges.make.

  It is asked about both orders of a pair, with `workers` requests at a time. A pair is invalid if
  an answer is neither of `config.answers`, is refused or does not arrive.
  """
  markers, thought = judge_template.hidden_ids(tokenizer)
  text = judge_template.question(config.template)
  survey = _Survey(config)

  def decode(tokens, mask):
    mask = judge_template.without_thoughts(thought, tokens, mask)
    rows = zip(tokens, mask & ~np.isin(tokens, markers), strict=True)
    return [tokenizer.decode(ids[shown]).strip("\n") for ids, shown in rows]

  def host(*sides):
    prompts, a, b = (decode(*map(np.asarray, side)) for side in sides)
    orders = [*zip(prompts, a, b, strict=True), *zip(prompts, b, a, strict=True)]
    p, kinds = (x.reshape(2, -1) for x in survey.ask([_fill(text, *slots) for slots in orders]))
    survey.compared += int(np.isfinite(p).all(axis=0).sum())
    return p, kinds

  def compare(params, prompts, a, b):
    shape, sides = (2, len(a.tokens)), [(side.tokens, side.mask) for side in (prompts, a, b)]
    if isinstance(a.tokens, jax.core.Tracer):
      shapes = [jax.ShapeDtypeStruct(shape, dtype) for dtype in (jnp.float32, jnp.int32)]
      (first, second), kinds = jax.pure_callback(host, shapes, *sides)
    else:  # in this thread, so that ValueErrors and Ctrl-C reach the caller unchanged
      (first, second), kinds = host(*sides)
    valid = jnp.isfinite(first) & jnp.isfinite(second)
    p = jnp.where(valid, 0.5 + 0.5 * (first - second), 0.5)
    flipped = Mean.from_values((first > 0.5) != (second < 0.5), valid)
    lost = {metric: Mean.from_values(kinds == k + 1) for k, metric in enumerate(LOST.values())}
    metrics = {"flip_rate": flipped, "valid": Mean.from_values(valid), **lost}
    return Comparison(p, valid, metrics, first)

  return Judge(None, pairwise(compare), survey)


class _Survey:
  """The questions to one server during an arena, and their outcomes.

  Attributes:
    compared: number of pairs with answers in both orders.
  """

  def __init__(self, config):
    self._chat = Chat(config.http)
    self._answers = tuple(config.answers)
    self._counts: collections.Counter[str] = collections.Counter()
    self._examples: dict[str, str] = {}  # {kind: an answer that could not be read}
    self._unread: list[str] = []  # questions whose answer was neither A nor B
    self.compared = 0

  def ask(self, questions: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Returns each question's probability, NaN if unreadable, and the number of its kind or 0."""
    # In random order, because the first ones show whether this server's answers can be read.
    distinct = np.array([*dict.fromkeys(questions)], object)
    distinct = np.random.default_rng(0).permutation(distinct).tolist()
    first = len(distinct) if self._counts["read"] else FIRST
    read: dict[str, tuple[float, int]] = {}
    for part in (distinct[:first], distinct[first:]):
      outcomes = self._chat.complete(part)
      read |= {question: self._judge(question, outcomes[question]) for question in part}
      if not self._counts["read"] and self._counts.total() >= FIRST:
        raise self._unreadable()
    p, kinds = zip(*(read[question] for question in questions), strict=True)
    return np.array(p, np.float32), np.array(kinds, np.int32)

  def _judge(self, question: str, outcome: Outcome) -> tuple[float, int]:
    kind, message, p = outcome.kind, outcome.message, math.nan
    if kind == "answered":
      p = _read(outcome.reply, self._answers)
      kind = "neither" if math.isnan(p) else "read"
    if kind == "neither":
      self._unread.append(question)
      message = self._chat.clean(_shown(outcome.reply), 100)
    self._counts[kind] += 1
    if kind != "read" and kind not in self._examples:
      self._examples[kind] = message
      logging.warning("the judge at %s: %s: %s", self._chat.url, LOST[kind], message)
    return p, 0 if kind == "read" else [*LOST].index(kind) + 1

  def _account(self) -> str:
    total, (a, b) = self._counts.total(), self._answers
    does = {"neither": f"answered neither {a} nor {b}", "refused": "refused", "missing": "no reply"}
    parts = (f"{self._counts[k]} {does[k]}, such as: {text}" for k, text in self._examples.items())
    return f"of {total} questions, {'; '.join(parts)}"

  def _unreadable(self) -> ValueError:
    self._chat.forget(self._unread)  # so that they are asked again once the server is fixed
    what = "answered both orders of no pair" if self._counts["read"] else "gave no readable answer"
    return ValueError(
      f"the judge at {self._chat.url} {what}: {self._account()}. Check"
      " judge.answers, judge.template, judge.http.model. If the model thinks before it answers,"
      " turn that off."
    )

  def keep_answers(self, folder: pathlib.Path) -> None:
    """Stores answers in a file of this folder, so that the same arena does not ask again."""
    self._chat.keep_in(folder / KEPT)

  def finish(self) -> None:
    """Logs lost answers after the last question."""
    if self._counts and not self.compared:
      raise self._unreadable()
    if self._examples:
      account = f"{self._account()}; their pairs do not count"
      logging.warning("the judge at %s: %s", self._chat.url, account)
    self._chat.close()


def _read(reply: Any, answers: tuple[str, ...]) -> float:
  """Returns P(first answer) from a reply, NaN if it is neither.

  The log-probabilities of the first token decide if the server gives them and the answer is that
  token. Otherwise the text decides, with 1 or 0.
  """
  try:
    choice = reply["choices"][0]
    text = (choice.get("message") or {}).get("content") or ""
    p = _of_text(text, answers)
    content = (choice.get("logprobs") or {}).get("content") or []
    said = [token for token in content if not str(token.get("token", "?")).isspace()]
    if not said or not (tops := said[0].get("top_logprobs")):
      return p
    mass = [0.0, 0.0]
    for token in tops:
      probability = math.exp(token["logprob"])
      if _of_text(token["token"], answers) == 1:
        mass[0] += probability
      elif _of_text(token["token"], answers) == 0:
        mass[1] += probability
    if FLOOR <= sum(mass) <= 1.01:
      return mass[0] / sum(mass)
    # If the text is only this letter, its own log-probabilities say that it is an accident.
    bare = text.strip().casefold() in [answer.casefold() for answer in answers]
    return math.nan if bare or sum(mass) > 1 else p
  except (LookupError, TypeError, AttributeError, ArithmeticError, ValueError):
    return math.nan


def _of_text(text: str, answers: Sequence[str]) -> float:
  """Returns 1 or 0 if a text is the first or the second answer, perhaps decorated; otherwise NaN.

  "A", "a.", "(A)", "**A**", "B) because", "Answer: B" are; "A dog", "A or B", "Neither" are not.
  """
  text, *answers = (unicodedata.normalize("NFKC", x) for x in (text, *answers))
  folded = [answer.casefold() for answer in answers]
  case = re.NOFLAG if len({*folded}) < len(folded) else re.IGNORECASE
  either = "|".join(map(re.escape, answers))
  found = re.match(rf"{_MARKS}(?i:{_LEAD}){_MARKS}({either}){_END}", text, case)
  if not found:
    return math.nan
  rest = re.sub(r"^\W+", "", text[found.end() :])
  if re.match(rf"(?i:or|and|nor|vs|versus)\b|({either})(?!\w)", rest, case):
    return math.nan  # both
  same = str.casefold if case else str
  return float(same(found[1]) == same(answers[0]))


def _shown(reply: Any) -> str:
  """Returns the part of a reply that shows why it is unreadable."""
  try:
    choice = reply["choices"][0]
    content = choice["message"].get("content") or choice["message"].get("refusal") or ""
    return f"{content!r} (finish_reason {choice.get('finish_reason')!r})"
  except (LookupError, TypeError, AttributeError):
    return repr(reply)


def _fill(text: str, prompt: str, a: str, b: str) -> str:
  slots = dict(zip(judge_template.SLOTS, (prompt, a, b), strict=True))
  return re.sub("|".join(map(re.escape, slots)), lambda match: slots[match[0]], text)

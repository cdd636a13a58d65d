"""A judge behind an OpenAI-compatible server, for the arena: sends text, receives A or B."""

import concurrent.futures
import http.client
import json
import math
import os
import re
import time
import urllib.error
import urllib.request
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from nash_jax.data import judge_template
from nash_jax.data.tokenizer import Tokenizer
from nash_jax.judges.base import Judge, pairwise
from nash_jax.types import Mean

KEY = "NASH_JAX_JUDGE_KEY"  # the environment variable of the server's key; without it, none is sent


def make(config, tokenizer: Tokenizer, params=None, mesh=None) -> Judge:
  """Builds the judge of `config.http`; see judges.make.

  It is asked about both orders of a pair, `workers` requests at a time. A pair of which an answer
  is missing after all retries, or is neither of `config.answers`, is not valid.
  """
  markers = [*judge_template.layout(config.template, tokenizer).markers]
  template = judge_template.read(config.template)
  text = re.sub(r"<start_of_turn>\w+\n|<end_of_turn>\n?", "", template)

  def decode(tokens, mask):
    rows = zip(tokens, mask & ~np.isin(tokens, markers), strict=True)
    return [tokenizer.decode(ids[shown]).strip("\n") for ids, shown in rows]

  def host(*sides):
    prompts, a, b = (decode(*map(np.asarray, side)) for side in sides)
    orders = [*zip(prompts, a, b, strict=True), *zip(prompts, b, a, strict=True)]
    with concurrent.futures.ThreadPoolExecutor(config.http.workers) as pool:
      probabilities = pool.map(lambda slots: ask(config, _fill(text, *slots)), orders)
      return np.array([*probabilities], np.float32).reshape(2, -1)

  def compare(params, prompts, a, b):
    shape, sides = jax.ShapeDtypeStruct((2, len(a.tokens)), jnp.float32), (prompts, a, b)
    first, second = jax.pure_callback(host, shape, *((side.tokens, side.mask) for side in sides))
    valid = jnp.isfinite(first) & jnp.isfinite(second)
    p = jnp.where(valid, 0.5 + 0.5 * (first - second), 0.5)
    flipped = Mean.from_values((first > 0.5) != (second < 0.5), valid)
    return p, valid, {"flip_rate": flipped, "valid": Mean.from_values(valid)}

  return Judge(None, pairwise(compare))


def ask(config, text: str) -> float:
  """Returns the probability of the first answer, or NaN where the server gives no readable one.

  It tries again after time-outs, dropped connections, answers that are no JSON, and the statuses
  408, 429 and 5xx, waiting 1, 2, 4, … times `config.http.backoff` seconds.

  Raises:
    ValueError: the server refuses the request itself, as with a wrong key or model.
  """
  body = {
    "model": config.http.model, "messages": [{"role": "user", "content": text}], "max_tokens": 1,
    "temperature": 0, "logprobs": True, "top_logprobs": 5,
  }  # fmt: skip
  headers = {"Content-Type": "application/json"}
  if key := os.environ.get(KEY):
    headers["Authorization"] = f"Bearer {key}"
  request = urllib.request.Request(config.http.url, json.dumps(body).encode(), headers)
  for trial in range(config.http.retries + 1):
    if trial:
      time.sleep(config.http.backoff * 2 ** (trial - 1))
    try:
      with urllib.request.urlopen(request, timeout=config.http.timeout) as reply:
        return _read(json.load(reply), tuple(config.answers))
    except urllib.error.HTTPError as error:
      if error.code not in (408, 429) and error.code < 500:
        raise ValueError(
          f"the judge at {config.http.url} answered {error.code} {error.reason}: check "
          f"judge.http.url and model, and the environment variable {KEY}"
        ) from None
    except (OSError, ValueError, http.client.HTTPException):
      continue  # no reply in time, or none that is JSON
  return math.nan


def _read(reply: Any, answers: tuple[str, ...]) -> float:
  """Returns P(first answer), from a reply's log-probabilities, or from its text without any."""
  try:
    choice = reply["choices"][0]
    content = (choice.get("logprobs") or {}).get("content") or []
    tokens = content[0]["top_logprobs"] if content else []
    tokens = tokens or [{"token": choice["message"]["content"], "logprob": 0.0}]
    mass = [
      sum(math.exp(token["logprob"]) for token in tokens if token["token"].strip() == answer)
      for answer in answers
    ]
    return mass[0] / sum(mass) if sum(mass) > 0 else math.nan
  except (LookupError, TypeError, AttributeError, ArithmeticError):
    return math.nan


def _fill(text: str, prompt: str, a: str, b: str) -> str:
  slots = dict(zip(judge_template.SLOTS, (prompt, a, b), strict=True))
  return re.sub("|".join(map(re.escape, slots)), lambda match: slots[match[0]], text)

"""A judge behind an OpenAI-compatible server, for the arena: text goes out, A or B comes back."""

import concurrent.futures
import http.client
import json
import math
import os
import re
import time
import urllib.error
import urllib.request

import jax
import numpy as np
from jax import numpy as jnp

from nash_jax.data import judge_template
from nash_jax.judges.base import Judge, pairwise
from nash_jax.types import Mean

KEY = "NASH_JAX_JUDGE_KEY"  # the environment variable of the server's key; without it, none is sent


def make(config, tokenizer, params=None, mesh=None) -> Judge:
  """Builds the judge of `config.http`; see judges.make.

  Both orders of a pair are asked, `workers` requests at a time. A pair of which an answer is
  missing after all retries, or says neither of `config.answers`, is not valid.
  """
  markers = [*judge_template.layout(config.template, tokenizer).markers]
  text = re.sub(r"<start_of_turn>\w+\n|<end_of_turn>\n?", "", judge_template.read(config.template))

  def said(x):
    shown = x[1] & ~np.isin(x[0], markers)
    return [tokenizer.decode(ids[keep]).strip("\n") for ids, keep in zip(x[0], shown, strict=True)]

  def host(*sides):
    prompts, a, b = (said([np.asarray(x) for x in side]) for side in sides)
    orders = [*zip(prompts, a, b, strict=True), *zip(prompts, b, a, strict=True)]
    with concurrent.futures.ThreadPoolExecutor(config.http.workers) as pool:
      found = pool.map(lambda row: ask(config, _fill(text, *row)), orders)
      return np.array([*found], np.float32).reshape(2, -1)

  def compare(params, prompts, a, b):
    kind = jax.ShapeDtypeStruct((2, len(a.tokens)), jnp.float32)
    first, second = jax.pure_callback(host, kind, *((x.tokens, x.mask) for x in (prompts, a, b)))
    valid = jnp.isfinite(first) & jnp.isfinite(second)
    p = jnp.where(valid, 0.5 + 0.5 * (first - second), 0.5)
    flipped = Mean.from_values((first > 0.5) != (second < 0.5), valid)
    return p, valid, {"flip_rate": flipped, "valid": Mean.from_values(valid)}

  return Judge(None, pairwise(compare))


def ask(config, text: str) -> float:
  """Returns the probability of the first answer, or NaN where the server gives no readable one.

  Time-outs, dropped connections, answers that are no JSON, and the statuses 408, 429 and 5xx are
  tried again, after 1, 2, 4, … times `config.http.backoff` seconds.

  Raises:
    ValueError: the server refuses the request itself, as with a wrong key or model.
  """
  body = {
    "model": config.http.model,
    "messages": [{"role": "user", "content": text}],
    "max_tokens": 1,
    "temperature": 0,
    "logprobs": True,
    "top_logprobs": 5,
  }
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


def _read(reply, answers) -> float:
  """P(first answer), of a reply's log-probabilities, or of its text where it has none."""
  try:
    choice = reply["choices"][0]
    found = (choice.get("logprobs") or {}).get("content") or []
    tokens = found[0]["top_logprobs"] if found else []
    tokens = tokens or [{"token": choice["message"]["content"], "logprob": 0.0}]
    mass = [
      sum(math.exp(x["logprob"]) for x in tokens if x["token"].strip() == answer)
      for answer in answers
    ]
    return mass[0] / sum(mass) if sum(mass) > 0 else math.nan
  except (LookupError, TypeError, AttributeError, ArithmeticError):
    return math.nan


def _fill(text, prompt, a, b):
  slots = dict(zip(judge_template.SLOTS, (prompt, a, b), strict=True))
  return re.sub("|".join(map(re.escape, slots)), lambda found: slots[found[0]], text)

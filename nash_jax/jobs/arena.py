"""Policies against policies on held-out prompts: win rates, their intervals, KL and lengths.

Every policy draws S responses to a prompt; a judge compares all of them with each other. A cell is
the mean over prompts of the mean over the two policies' pairs: prompts are independent, so their
spread is the cell's error; the pairs of one prompt are not.
"""

import functools
import itertools
import json
import math
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import tqdm
from jax import numpy as jnp
from jaxtyping import Array, Bool, Float, Int
from ml_collections import ConfigDict

from nash_jax import judges, keys, report
from nash_jax.config import describe, resolve
from nash_jax.data.corpus import Examples
from nash_jax.data.prompts import load_prompts
from nash_jax.data.tokenizer import Tokenizer
from nash_jax.policy import Policy, load_weights, make_policy, tokenizer_and_model
from nash_jax.types import Prompts, Responses, Verdict
from nash_jax.validation import require

TAIL = 0.0015  # what the bootstrap's interval leaves on each side: 99.7% are within 3σ


def win_rates(
  p_win: Float[np.ndarray, "N P S P S"],
  valid: Bool[np.ndarray, "N P S P S"],
  resamples: int = 2000,
  seed: int = 0,
) -> dict[str, np.ndarray]:
  """Returns tables of win rates and their intervals, [P P], for N prompts and P policies.

  `mean` over prompts; `sigma3`, 3 std of the prompts' means / sqrt(n); `n` prompts that counted;
  `low` and `high` of a bootstrap over prompts, 99.7%; `significant`, mean ± sigma3 clear of one
  half. NaN where nothing counted; sigma3 is NaN where n = 1.

  Args:
    p_win: the probability that one sample beats another, of every pair of samples.
    valid: which pairs count.
  """
  pairs = valid.sum(axis=(2, 4))
  total = np.sum(p_win, axis=(2, 4), where=valid, dtype=np.float64)
  values, present = total / np.maximum(pairs, 1), (pairs > 0).astype(float)  # [N P P']
  n, prompts = present.sum(axis=0), len(values)
  times = np.random.default_rng(seed).multinomial(prompts, [1 / prompts] * prompts, resamples)
  with np.errstate(invalid="ignore", divide="ignore"):
    mean = values.sum(axis=0) / n
    sigma = np.sqrt((present * (values - mean[None]) ** 2).sum(axis=0) / (n - 1) / n)
    means = np.tensordot(times, values, 1) / np.tensordot(times, present, 1)
  ends = np.nanquantile(np.where(n > 0, means, 0), [TAIL, 1 - TAIL], axis=0)
  low, high = np.where(n > 0, ends, np.nan)
  return {
    "mean": mean, "sigma3": 3 * sigma, "n": n.astype(int), "low": low, "high": high,
    "significant": np.abs(mean - 0.5) > 3 * sigma,  # never, where either is NaN
  }  # fmt: skip


def length_matched(lengths: Int[np.ndarray, "N P S"]) -> Bool[np.ndarray, "N P S P S"]:
  """Returns which pairs of responses differ by at most 2 tokens or 10% of the longer."""
  a, b = lengths[:, :, :, None, None], lengths[:, None, None, :, :]
  return np.abs(a - b) <= np.maximum(2, 0.1 * np.maximum(a, b))


def distinct_bigrams(tokens: Int[np.ndarray, "N L"], lengths: Int[np.ndarray, "N"]) -> float:
  """Returns the share of distinct bigrams among all bigrams of the responses; NaN without any.

  The share falls with the number of responses: compare policies on equally many.
  """
  pairs = np.stack([tokens[:, :-1], tokens[:, 1:]], axis=-1)
  pairs = pairs[np.arange(1, tokens.shape[1])[None] < lengths[:, None]]
  return len(np.unique(pairs, axis=0)) / len(pairs) if len(pairs) else math.nan


def choose_best(p_win: Float[Array, "N K K"], valid: Bool[Array, "N K K"]) -> Int[Array, "N"]:
  """Returns the index of the response that wins most against the others of its prompt."""
  wins = jnp.sum(jnp.where(valid, p_win, 0.0), axis=-1)
  return jnp.argmax(wins / jnp.maximum(jnp.sum(valid, axis=-1), 1), axis=-1)


def _make_best_of(policy: Policy, samples: int, best_of: int, judge_fn: judges.JudgeFn) -> Callable:
  """Returns jitted (params, judge's params, prompts, key) -> Responses, each the best of n."""
  sample = policy.make_sampler(samples=samples * best_of)

  def sample_best(params, judge_params, prompts, key):
    responses = sample(params, prompts, key)
    if best_of == 1:
      return responses
    groups = jax.tree.map(lambda leaf: leaf.reshape(-1, best_of, *leaf.shape[2:]), responses)
    repeated = jax.tree.map(lambda leaf: jnp.repeat(leaf, samples, axis=0), prompts)
    verdict = judge_fn(judge_params, repeated, groups, None)
    best = choose_best(verdict.p_win, verdict.valid)
    rows = jnp.arange(len(best))
    return jax.tree.map(lambda x: x[rows, best].reshape(-1, samples, *x.shape[2:]), groups)

  return jax.jit(sample_best)


class Judged(NamedTuple):
  """The responses of P policies to N prompts, all of them judged; on the host.

  Attributes:
    responses: [N P*S L].
    verdicts: by judge, each [N P*S P*S].
    log_ratios: log π(y) − log π_base(y), in nats, by policy that has a log-probability.
  """

  prompts: Prompts
  responses: Responses
  verdicts: dict[str, Verdict]
  log_ratios: dict[str, Float[np.ndarray, "N S"]]


def _sample_and_judge(
  config, held_out: Examples, count: int, params_by_name, judges_by_name, policy: Policy
) -> Judged:
  """Draws every policy's responses to the first `count` prompts; all judges compare them."""
  selector = judges_by_name[config.select_judge]
  sizes = {entry.best_of for entry in config.policies.values()}
  samplers = {n: _make_best_of(policy, config.samples, n, selector.fn) for n in sizes}
  compare = {
    name: functools.partial(jax.jit(judge.fn), judge.params)
    for name, judge in judges_by_name.items()
  }

  @jax.jit
  def log_ratio(params, base, prompts, responses):
    logp, base_logp = (
      policy.logprobs(p, prompts=prompts, tokens=responses.tokens, mask=responses.mask)[0]
      for p in (params, base)
    )
    return jnp.sum(logp - base_logp, axis=-1)

  # Batches of one size, chosen to leave the last one as full as possible.
  num_batches = -(-count // config.prompts.batch_size)
  size = -(-count // num_batches)
  batches, base = [], params_by_name[config.base]
  interval = 0.5 if sys.stderr.isatty() else 30
  for batch in tqdm.tqdm(range(num_batches), "arena", unit="batch", mininterval=interval):
    prompts = held_out.all(np.arange(batch * size, (batch + 1) * size) % count)
    by_policy, log_ratios = {}, {}
    for name, params in params_by_name.items():
      key, best_of = keys.key(config.seed, f"arena/{name}", batch), config.policies[name].best_of
      by_policy[name] = samplers[best_of](params, selector.params, prompts, key)
      if best_of == 1:
        log_ratios[name] = log_ratio(params, base, prompts, by_policy[name])
    responses = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *by_policy.values())
    verdicts = {name: judge(prompts, responses, None) for name, judge in compare.items()}
    batches.append(jax.device_get((responses, verdicts, log_ratios)))
  joined = jax.tree.map(
    lambda *parts: np.concatenate(parts)[:count] if np.ndim(parts[0]) else sum(parts), *batches
  )
  return Judged(held_out.all(np.arange(count)), *joined)


def response_statistics(config: ConfigDict, judged: Judged) -> dict[str, dict[str, Any]]:
  """Returns the properties of each policy's responses.

  KL is to config.base, in nats a response: the mean over the policy's own samples of
  Σ log π(y) − log π_base(y). Best-of-n has no such log-probability: `best_of_kl_bound` is
  log n − (n−1)/n, an upper bound of its KL to the policy it picks from. Lengths in tokens,
  stop token included; bigrams without it.
  """
  out = {}
  for i, (name, policy) in enumerate(config.policies.items()):
    part = slice(i * config.samples, (i + 1) * config.samples)
    samples = jax.tree.map(lambda x, part=part: np.concatenate(x[:, part]), judged.responses)
    lengths, n = samples.mask.sum(axis=-1), policy.best_of
    kl = sigma3 = bound = None
    if n == 1:
      ratios = judged.log_ratios[name].mean(axis=1, dtype=np.float64)
      kl, sigma3 = ratios.mean(), 3 * ratios.std(ddof=1) / math.sqrt(len(ratios))
    else:
      bound = math.log(n) - (n - 1) / n
    out[name] = {
      "weights": policy.weights, "best_of": n, "kl_to_reference": kl, "kl_sigma3": sigma3,
      "best_of_kl_bound": bound, "length": lengths.mean(),
      "distinct2": distinct_bigrams(samples.tokens, lengths - samples.stopped),
      "stopped": samples.stopped.mean(),
    }  # fmt: skip
  for statistics in out.values():
    for field in ("length", "distinct2"):
      statistics[f"{field}_ratio"] = statistics[field] / out[config.base][field]
  return out


def _texts(config, tokenizer: Tokenizer, prompts: Prompts, responses: Responses) -> list[dict]:
  def text(batch, *index):
    return tokenizer.decode(batch.tokens[index][batch.mask[index]]).strip()

  first_samples = {name: p * config.samples for p, name in enumerate(config.policies)}
  texts = []
  for i in range(min(config.texts, len(prompts.tokens))):
    continuations = {name: text(responses, i, first) for name, first in first_samples.items()}
    texts.append({"prompt": text(prompts, i), "continuations": continuations})
  return texts


def evaluate(config: ConfigDict, tokenizer: Tokenizer, judged: Judged) -> dict[str, Any]:
  """Returns the arena's result, in plain JSON types.

  `policies`: statistics by name; `judges`: `win_rate` and `length_matched` as
  {row: {column: cell}}, and the judge's own metrics; `texts`; `base`, `prompts`, `samples`,
  `config`.
  """
  shape = (len(config.policies), config.samples)
  matched = length_matched(np.sum(judged.responses.mask, axis=-1).reshape(-1, *shape))

  def cells(p_win, valid):
    rates = win_rates(p_win, valid, config.resamples, config.seed)
    result: report.Cells = {row: {} for row in config.policies}
    for (i, row), (j, column) in itertools.product(enumerate(config.policies), repeat=2):
      result[row][column] = {name: table[i, j].item() for name, table in rates.items()}
    return result

  by_judge = {}
  for name, verdict in judged.verdicts.items():
    p_win, valid = (a.reshape(-1, *shape, *shape) for a in (verdict.p_win, verdict.valid))
    by_judge[name] = {
      "win_rate": cells(p_win, valid),
      "length_matched": cells(p_win, valid & matched),
      "metrics": {m: float(v.value()) for m, v in verdict.metrics.items() if v.weight},
    }
  result = {
    "prompts": len(judged.prompts.tokens), "samples": config.samples, "base": config.base,
    "policies": response_statistics(config, judged), "judges": by_judge,
    "texts": _texts(config, tokenizer, judged.prompts, judged.responses),
    "config": describe(config),
  }  # fmt: skip
  # Through JSON, NaN, which JSON has not, becomes null.
  text = json.dumps(result, default=lambda x: x.item() if isinstance(x, np.generic) else str(x))
  return json.loads(text, parse_constant=lambda _: None)


def summary(
  result: dict[str, Any], *, trained: str, target: str, best_of: str, base: str
) -> dict[str, Any]:
  """Returns the headline figures of a run; the arguments name its policies in `result`.

  Win rates against `base` under every judge; KL (nats a response), length and distinct bigrams of
  `trained`, the latter two as ratios to those of `base`.
  """
  statistics = result["policies"]
  best_of_name = f"best_of_{statistics[best_of]['best_of']}"
  shown = {"trained": trained, "target": target, best_of_name: best_of}
  fields = ("kl_to_reference", "length_ratio", "distinct2_ratio")
  return {field: statistics[trained][field] for field in fields} | {
    "win_rate": {
      label: {
        judge: {field: tables["win_rate"][name][base][field] for field in ("mean", "sigma3", "n")}
        for judge, tables in result["judges"].items()
      }
      for label, name in shown.items()
    }
  }


def run(config: ConfigDict, workdir: str | os.PathLike[str]) -> dict[str, Any]:
  """Compares the policies of `config` (see config.arena); writes arena.json, arena.md and PNGs.

  Raises:
    ValueError: a bad config, weights that do not fit, fewer than two held-out prompts, a workdir
      that cannot be written.
  """
  config, folder = resolve(config, "arena"), pathlib.Path(workdir)
  try:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "arena.md").touch()
  except OSError as error:
    raise ValueError(f"workdir {folder}: expected a folder that can be written: {error}") from None
  tokenizer, model_config = tokenizer_and_model(config.model)
  _, held_out = load_prompts(config.prompts, tokenizer, config.seed)
  count = min(len(held_out), config.max_prompts or len(held_out))
  fix = "Set prompts.held_out, or prompts.held_out_path."
  require(count > 1, "held-out prompts", "at least two, for an interval", count, fix)
  judges_by_name = {name: judges.make(judge, tokenizer) for name, judge in config.judges.items()}
  specs = {entry.weights for entry in config.policies.values()}
  loaded = {spec: load_weights(spec, model_config) for spec in specs}
  params_by_name = {name: loaded[entry.weights] for name, entry in config.policies.items()}
  policy = make_policy(config.model, config.sampling, tokenizer, model_config)
  judged = _sample_and_judge(config, held_out, count, params_by_name, judges_by_name, policy)
  result = evaluate(config, tokenizer, judged)
  tables = report.arena(result)
  (folder / "arena.json").write_text(json.dumps(result, indent=1) + "\n")
  (folder / "arena.md").write_text(tables + report.side_by_side(result["texts"]))
  for name, judge in result["judges"].items():
    title = f"Row beats column: {count} held-out prompts, judge: {name.replace('_', ' ')}"
    report.heat_map(judge["win_rate"], title, folder / f"arena_{name}.png")
  print(tables)
  return result

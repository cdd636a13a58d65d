"""Policies against policies on held-out prompts: win rates, their intervals, KL and lengths.

Every policy draws S responses to a prompt; a judge compares all of them with each other. A cell is
the mean over prompts of the mean over the two policies' pairs: prompts are independent, so their
spread is the cell's error; the pairs of one prompt are not.
"""

import functools
import itertools
import math
import os
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from jax import numpy as jnp
from jaxtyping import Array, Bool, Float, Int
from ml_collections import ConfigDict
from scipy import special

from nash_jax import judges, keys, report, sampler
from nash_jax.config import describe, resolve
from nash_jax.data.corpus import Examples
from nash_jax.data.prompts import load_prompts
from nash_jax.data.tokenizer import Tokenizer
from nash_jax.policy import Policy, load_weights_and_step, make_policy, tokenizer_and_model
from nash_jax.run import files, lock
from nash_jax.run.checkpoint import differences
from nash_jax.run.metrics import progress_bar
from nash_jax.types import Mean, Prompts, Responses, Verdict
from nash_jax.validation import file_name, printable, require

TAIL = 0.0015  # what an interval leaves on each side: 99.7% are within 3σ
AGREE = 1e-6  # a standard error below which prompts are told apart by rounding alone


def interval(
  mean: Float[np.ndarray, "*p"], error: Float[np.ndarray, "*p"], n: Float[np.ndarray, "*p"]
) -> tuple[Float[np.ndarray, "*p"], Float[np.ndarray, "*p"]]:
  """Returns the ends of the 99.7% intervals of means of n values in [0, 1]; NaN where n = 0.

  Clopper and Pearson's interval, of n*·mean wins in n* trials. n* is Korn and Graubard's (1998)
  effective number, mean·(1 − mean) / error² with Student's t for the normal quantile. Where prompts
  are fewer than report.FEW, or all agree, the error is no guide, and n* is n. What n prompts have
  not shown may be a share u = 1 − TAIL^(1/n) of all, as in the "rule of three": the interval also
  holds the mean if that share went the other way, so fewer than ten are never clear of one half.

  Args:
    error: the standard error of the mean; NaN where n = 1.
  """

  def lower(mean, trials):
    wins = mean * trials
    return np.where(wins > 0, special.betaincinv(wins, trials - wins + 1, TAIL), 0.0)

  with np.errstate(all="ignore"):
    shrink = special.ndtri(TAIL) / special.stdtrit(np.maximum(n - 1, 1), TAIL)
    effective = mean * (1 - mean) * (shrink / error) ** 2
    trials = np.where((n >= report.FEW) & (error > AGREE), effective, n)
    turned = mean + (1 - TAIL ** (1 / n)) * (1 - 2 * mean)
    low = np.minimum(lower(mean, trials), turned)
    high = np.maximum(1 - lower(1 - mean, trials), turned)
  return np.where(n > 0, low, np.nan), np.where(n > 0, high, np.nan)


def win_rates(
  p_win: Float[np.ndarray, "N P S P S"],
  valid: Bool[np.ndarray, "N P S P S"],
  resamples: int = 2000,
  seed: int = 0,
) -> dict[str, np.ndarray]:
  """Returns tables of win rates and their intervals, [P P], for N prompts and P policies.

  `mean` over prompts; `n` prompts that counted; `low` and `high`, see `interval`; `significant`,
  these clear of one half. `sigma3`: 3 std of the prompts' means / sqrt(n), or what one prompt more
  that went the other way would make of it, if that is greater; the farther end of the interval
  where prompts are fewer than report.FEW or all agree. `bootstrap_low` and `bootstrap_high`: the
  99.7% interval of a bootstrap over prompts, where there are enough. NaN where nothing counted;
  sigma3 is NaN where n = 1.

  Args:
    p_win: the probability that one sample beats another, of every pair of samples.
    valid: which pairs count; one whose p_win is no probability does not.
  """
  require(len(p_win) > 0, "p_win", "verdicts on at least one prompt", 0, "Hold out some.")
  valid = valid & (p_win >= 0) & (p_win <= 1)
  pairs = valid.sum(axis=(2, 4))
  total = np.sum(p_win, axis=(2, 4), where=valid, dtype=np.float64)
  values, present = total / np.maximum(pairs, 1), (pairs > 0).astype(float)  # [N P P']
  n, prompts = present.sum(axis=0), len(values)
  times = np.random.default_rng(seed).multinomial(prompts, [1 / prompts] * prompts, resamples)
  with np.errstate(invalid="ignore", divide="ignore"):
    mean = values.sum(axis=0) / n
    error = np.sqrt((present * (values - mean[None]) ** 2).sum(axis=0) / (n - 1) / n)
    means = np.tensordot(times, values, 1) / np.tensordot(times, present, 1)
    one_other_way = np.abs(2 * mean - 1) / np.sqrt(n * (n + 1))
    low, high = interval(mean, error, n)
  enough = n >= report.FEW
  ends = np.nanquantile(np.where(enough, means, 0), [TAIL, 1 - TAIL], axis=0)
  bootstrap_low, bootstrap_high = np.where(enough, ends, np.nan)
  farther = np.where(n > 1, np.maximum(mean - low, high - mean), np.nan)
  sigma3 = np.where(enough & (error > AGREE), 3 * np.maximum(error, one_other_way), farther)
  return {
    "mean": mean, "sigma3": sigma3, "n": n.astype(int), "low": low, "high": high,
    "significant": (low > 0.5) | (high < 0.5),  # never, where they are NaN
    "bootstrap_low": bootstrap_low, "bootstrap_high": bootstrap_high,
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
  """Returns the index of the response that wins most against the others of its prompt.

  One that could be compared with no other is chosen only where none could be: then the first.
  """
  wins, compared = jnp.sum(jnp.where(valid, p_win, 0.0), axis=-1), jnp.sum(valid, axis=-1)
  return jnp.argmax(jnp.where(compared > 0, wins / jnp.maximum(compared, 1), -1.0), axis=-1)


def _make_best_of(policy: Policy, samples: int, best_of: int, judge: judges.Judge) -> Callable:
  """Returns (params, judge's params, prompts, key) -> Responses, each the best of n.

  Jitted; if the judge is a server, as far as it is not asked.
  """
  sample = jax.jit(policy.make_sampler(samples=samples * best_of))

  def sample_best(params, judge_params, prompts, key):
    responses = sample(params, prompts, key)
    if best_of == 1:
      return responses
    groups = jax.tree.map(lambda leaf: leaf.reshape(-1, best_of, *leaf.shape[2:]), responses)
    repeated = jax.tree.map(lambda leaf: jnp.repeat(leaf, samples, axis=0), prompts)
    verdict = judge.fn(judge_params, repeated, groups, None).checked()
    best = choose_best(verdict.p_win, verdict.valid)
    rows = jnp.arange(len(best))
    return jax.tree.map(lambda x: x[rows, best].reshape(-1, samples, *x.shape[2:]), groups)

  return sample_best if judge.server else jax.jit(sample_best)


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
  samplers = {n: _make_best_of(policy, config.samples, n, selector) for n in sizes}

  def make_compare(judge):
    def compare(params, *responses):
      return judge.fn(params, *responses, None).checked()

    return functools.partial(compare if judge.server else jax.jit(compare), judge.params)

  compare = {name: make_compare(judge) for name, judge in judges_by_name.items()}

  @jax.jit
  def log_ratio(params, base, prompts, responses):
    logp, base_logp = (
      policy.logprobs(p, prompts=prompts, tokens=responses.tokens, mask=responses.mask)[0]
      for p in (params, base)
    )
    return jnp.sum(logp - base_logp, axis=-1)

  num_batches = _num_batches(count, config.prompts.batch_size)
  size = -(-count // num_batches)
  batches, base = [], params_by_name[config.base]
  for batch in progress_bar(range(num_batches), "arena", unit="batch"):
    prompts = held_out.all(range(batch * size, min((batch + 1) * size, count)))
    by_policy, log_ratios = {}, {}
    for name, params in params_by_name.items():
      key, best_of = keys.key(config.seed, f"arena/{name}", batch), config.policies[name].best_of
      by_policy[name] = samplers[best_of](params, selector.params, prompts, key)
      if best_of == 1:
        log_ratios[name] = log_ratio(params, base, prompts, by_policy[name])
    responses = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *by_policy.values())
    verdicts = {name: judge(prompts, responses) for name, judge in compare.items()}
    batches.append(jax.device_get((responses, verdicts, log_ratios)))
  for judge in judges_by_name.values():
    if judge.server:
      judge.server.finish()
  joined = jax.tree.map(
    lambda *parts: np.concatenate(parts) if np.ndim(parts[0]) else sum(parts), *batches
  )
  return Judged(held_out.all(np.arange(count)), *joined)


def _num_batches(count: int, most: int) -> int:
  """Returns into how many batches, of at most `most`, prompts are divided.

  As few as can be equal, so that every program compiles once; where that takes more than twice the
  least number, the least, and the last batch is smaller. No batch is filled up: its judge would be
  paid for prompts that do not count, and its metrics would count them.
  """
  least = -(-count // most)
  return next((n for n in range(least, 2 * least + 1) if count % n == 0), least)


def response_statistics(config: ConfigDict, judged: Judged) -> dict[str, dict[str, Any]]:
  """Returns the properties of each policy's responses.

  KL is to config.base, in nats a response: the mean over the policy's own samples of
  Σ log π(y) − log π_base(y). Under top-k or top-p they are no samples of π, and the mean is
  `log_ratio_to_reference`. Best-of-n has no such log-probability: `best_of_kl_bound` is
  log n − (n−1)/n, an upper bound of its KL to the policy it picks from. Lengths in tokens,
  stop token included; bigrams without it. `kl_sigma3`, of either, takes report.FEW prompts.
  """
  out, truncated = {}, sampler.truncates(config.sampling)
  for i, (name, policy) in enumerate(config.policies.items()):
    part = slice(i * config.samples, (i + 1) * config.samples)
    samples = jax.tree.map(lambda x, part=part: np.concatenate(x[:, part]), judged.responses)
    lengths, n = samples.mask.sum(axis=-1), policy.best_of
    log_ratio = sigma3 = bound = None
    if n == 1:
      ratios = judged.log_ratios[name].mean(axis=1, dtype=np.float64)
      log_ratio = ratios.mean()
      if len(ratios) >= report.FEW:
        sigma3 = 3 * ratios.std(ddof=1) / math.sqrt(len(ratios))
    else:
      bound = math.log(n) - (n - 1) / n
    out[name] = {
      "weights": policy.weights, "best_of": n,
      "kl_to_reference": None if truncated else log_ratio,
      "log_ratio_to_reference": log_ratio if truncated else None, "kl_sigma3": sigma3,
      "best_of_kl_bound": bound, "length": lengths.mean(),
      "distinct2": distinct_bigrams(samples.tokens, lengths - samples.stopped),
      "stopped": samples.stopped.mean(),
    }  # fmt: skip
  for statistics in out.values():
    for field in ("length", "distinct2"):
      statistics[f"{field}_ratio"] = statistics[field] / out[config.base][field]
  return out


def _share_valid(verdict: Verdict) -> Mean:
  """Returns the share of pairs of different responses that have a valid verdict."""
  i, j = np.triu_indices(verdict.valid.shape[-1], 1)
  return Mean.from_values(verdict.valid[:, i, j])


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
      "metrics": {
        metric: float(mean.total / mean.weight) if mean.weight else None
        for metric, mean in {**verdict.metrics, "valid": _share_valid(verdict)}.items()
      },
    }
  result = {
    "prompts": len(judged.prompts.tokens), "samples": config.samples, "base": config.base,
    "policies": response_statistics(config, judged), "judges": by_judge,
    "texts": _texts(config, tokenizer, judged.prompts, judged.responses),
    "config": describe(config),
  }  # fmt: skip
  return files.without_nan(result)


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
      that is in use, cannot be written or holds an arena of another config, a judge that can read
      nothing.
  """
  config, folder = resolve(config, "arena"), files.make_folder(workdir)
  with lock.hold(folder):
    return _run(config, folder)


def _run(config: ConfigDict, folder: pathlib.Path) -> dict[str, Any]:
  _, changes = _recorded(config, folder)
  fix = f"They differ in {', '.join(changes)}. Use another workdir, or move that file away."
  what, expected = f"{folder}/arena.json", "an arena of this config"
  require(not changes, what, expected, "one of another config", fix)
  tokenizer, model_config = tokenizer_and_model(config.model)
  _, held_out = load_prompts(config.prompts, tokenizer, config.seed)
  count = min(len(held_out), config.max_prompts or len(held_out))
  fix = "Set prompts.held_out, or prompts.held_out_path."
  require(count > 1, "held-out prompts", "at least two, for an interval", count, fix)
  judges_by_name = {name: judges.make(judge, tokenizer) for name, judge in config.judges.items()}
  specs = {entry.weights for entry in config.policies.values()}
  loaded = {spec: load_weights_and_step(spec, model_config) for spec in specs}
  params_by_name = {name: loaded[entry.weights][0] for name, entry in config.policies.items()}
  for judge in judges_by_name.values():
    if judge.server:
      judge.server.keep_answers(folder)
  policy = make_policy(config.model, config.sampling, tokenizer, model_config)
  judged = _sample_and_judge(config, held_out, count, params_by_name, judges_by_name, policy)
  _check_read(judged, judges_by_name)
  result = evaluate(config, tokenizer, judged)
  for statistics in result["policies"].values():
    statistics["step"] = loaded[statistics["weights"]][1]  # a run may have gone on meanwhile
  tables = report.arena(result)
  files.write_json(folder / "arena.json", result)
  files.write_text(folder / "arena.md", tables + report.side_by_side(result["texts"]))
  labels = report.figure_labels(result["judges"])
  for label, (name, judge) in zip(labels, result["judges"].items(), strict=True):
    title = f"Row beats column: {count} held-out prompts, judge: {label}"
    report.heat_map(judge["win_rate"], title, folder / f"arena_{file_name(name)}.png")
  print(tables)
  return result


def _check_read(judged: Judged, judges_by_name: dict[str, judges.Judge]) -> None:
  """Says of each judge what it could not read; ValueError where that is all."""
  for name, verdict in judged.verdicts.items():
    i, j = np.triu_indices(verdict.valid.shape[-1], 1)
    readable = np.asarray(verdict.valid)[:, i, j]
    pairs, unread = readable.size, int(np.sum(~readable))
    what, expected = f"judge {printable(name)!r}", f"a readable verdict on some of {pairs} pairs"
    fix = "Check the judge: its answers, or for a table judge first_token and sampling.tokens."
    require(unread < pairs, what, expected, "none", fix)
    if unread and not judges_by_name[name].server:  # which has told it already
      logging.warning("%s: %d of %d pairs have no verdict: they weigh nothing", what, unread, pairs)


def recorded_result(config: ConfigDict, folder: pathlib.Path) -> dict[str, Any]:
  """Returns the result of this arena, {} where it was not held; one of another config is removed.

  For jobs whose own folder this is: what they made of other runs, they make again.

  Args:
    config: resolved.
  """
  result, changes = _recorded(config, folder)
  if changes:
    (folder / "arena.json").unlink()
  return {} if changes else result


def _recorded(config: ConfigDict, folder: pathlib.Path) -> tuple[dict[str, Any], dict[str, str]]:
  """Returns the result that is there, and in what its config differs; ({}, {}) for none."""
  result = files.read_json(folder / "arena.json")
  return result, differences(result.get("config", {}), describe(config)) if result else {}

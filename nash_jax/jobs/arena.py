"""Compares policies on held-out prompts: win rates with intervals, KL and lengths.

Every policy draws S responses to a prompt, and a judge compares all of them with each other. A cell
is the mean over prompts of the mean over the two policies' pairs. Its error comes from the spread
over prompts, which are independent; the pairs of a prompt are not.
"""

import functools
import itertools
import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from jax import numpy as jnp
from jaxtyping import Array, Bool, Float, Int
from ml_collections import ConfigDict

from nash_jax import judges, keys, report, sampler
from nash_jax.config import describe, resolve
from nash_jax.data import answers
from nash_jax.data.corpus import Examples
from nash_jax.data.prompts import load_prompts
from nash_jax.data.tokenizer import Tokenizer
from nash_jax.jobs import outputs
from nash_jax.jobs.rates import length_controlled, length_matched, win_rates
from nash_jax.models import logprobs
from nash_jax.policy import (
  Policy,
  check_vocabulary,
  load_weights_and_step,
  make_policy,
  tokenizer_and_model,
)
from nash_jax.run import files, lock, page
from nash_jax.run.checkpoint import differences
from nash_jax.run.metrics import progress_bar
from nash_jax.types import Mean, Params, Prompts, Responses, Verdict
from nash_jax.validation import file_name, printable, require

NUCLEUS = 0.99  # outside of which a reference's tokens are rare


def distinct_bigrams(tokens: Int[np.ndarray, "N L"], lengths: Int[np.ndarray, "N"]) -> float:
  """Returns the share of distinct bigrams among all bigrams of the responses; NaN without any.

  The share falls with the number of responses, so compare policies on equally many.
  """
  pairs = np.stack([tokens[:, :-1], tokens[:, 1:]], axis=-1)
  pairs = pairs[np.arange(1, tokens.shape[1])[None] < lengths[:, None]]
  return len(np.unique(pairs, axis=0)) / len(pairs) if len(pairs) else math.nan


def choose_best(p_win: Float[Array, "N K K"], valid: Bool[Array, "N K K"]) -> Int[Array, "N"]:
  """Returns the index of the response that wins most against the others of its prompt.

  A response without a valid comparison is chosen only if none has one; then it is the first.
  """
  wins, compared = jnp.sum(jnp.where(valid, p_win, 0.0), axis=-1), jnp.sum(valid, axis=-1)
  return jnp.argmax(jnp.where(compared > 0, wins / jnp.maximum(compared, 1), -1.0), axis=-1)


def _make_best_of(policy: Policy, samples: int, best_of: int, judge: judges.Judge) -> Callable:
  """Returns (params, judge's params, prompts, key) -> Responses, each the best of n.

  Jitted, except for the calls of a judge that is a server.
  """

  @jax.jit
  def sample(params, prompts, key):
    models, mixture = _parts(params)
    return policy.make_sampler(samples=samples * best_of, **mixture)(models, prompts, key)

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


class Realigned(NamedTuple):
  """The parameters of a reference and of M policies, towards which it is realigned by λ."""

  models: tuple[Params, ...]
  strengths: Float[Array, "M"]


def _parts(params: Params | Realigned) -> tuple[Params, dict[str, Array]]:
  """Returns what samplers and log-probabilities take: parameters, and the option of a mixture."""
  if isinstance(params, Realigned):
    return params.models, {"mixture": params.strengths}
  return params, {}


def _realign(config, params_by_name: dict[str, Params]) -> dict[str, Params | Realigned]:
  """Returns the parameters of all policies, where those that are realigned have several models'."""
  realigned = {
    name: Realigned(
      (params_by_name[name], *(params_by_name[other] for other in entry.realign)),
      jnp.array([*entry.realign.values()], jnp.float32),
    )
    for name, entry in config.policies.items()
    if entry.realign
  }
  return params_by_name | realigned


class Judged(NamedTuple):
  """The judged responses of P policies to N prompts, on the host.

  Attributes:
    responses: [N P*S L].
    verdicts: {judge: verdict [N P*S P*S]}.
    log_ratios: {policy with log-probabilities: log π(y) − log π_base(y) in nats}.
    outside: {the same policy: how many of its tokens lie outside of the base's top-p of NUCLEUS}.
  """

  prompts: Prompts
  responses: Responses
  verdicts: dict[str, Verdict]
  log_ratios: dict[str, Float[np.ndarray, "N S"]]
  outside: dict[str, Int[np.ndarray, "N S"]] | None = None


def _sample_and_judge(
  config,
  held_out: Examples,
  count: int,
  params_by_name,
  judges_by_name,
  policy: Policy,
  given: Mapping[str, Responses] = {},
) -> Judged:
  """Draws every policy's responses to the first `count` prompts, and has all judges compare them.

  Args:
    given: {policy without parameters: its responses to all of these prompts}.
  """
  selector = judges_by_name[config.select_judge]
  sizes = {entry.best_of for entry in config.policies.values()}
  samplers = {n: _make_best_of(policy, config.samples, n, selector) for n in sizes}

  def make_compare(judge):
    def compare(params, *responses):
      return judge.fn(params, *responses, None).checked()

    return functools.partial(compare if judge.server else jax.jit(compare), judge.params)

  compare = {name: make_compare(judge) for name, judge in judges_by_name.items()}

  @jax.jit
  def compare_with_base(params, base, prompts, responses):
    y = {"prompts": prompts, "tokens": responses.tokens, "mask": responses.mask}
    (models, mixture), (base_models, base_mixture) = map(_parts, (params, base))
    logp, _ = policy.logprobs(models, **y, **mixture)
    measure = logprobs.likelier
    base_logp, likelier = policy.logprobs(base_models, **y, **base_mixture, measure=measure)
    outside = jnp.sum(responses.mask & (likelier >= NUCLEUS), axis=-1)
    return jnp.sum(logp - base_logp, axis=-1), outside

  num_batches = _num_batches(count, config.prompts.batch_size)
  size = -(-count // num_batches)
  batches, base = [], params_by_name.get(config.base)
  for batch in progress_bar(range(num_batches), "arena", unit="batch"):
    rows = range(batch * size, min((batch + 1) * size, count))
    prompts, by_policy, log_ratios, outside = held_out.all(rows), {}, {}, {}
    for name in config.policies:
      if name in given:
        by_policy[name] = jax.tree.map(lambda x, rows=rows: x[rows.start : rows.stop], given[name])
        continue
      params = params_by_name[name]
      key, best_of = keys.key(config.seed, f"arena/{name}", batch), config.policies[name].best_of
      by_policy[name] = samplers[best_of](params, selector.params, prompts, key)
      if best_of == 1 and base is not None:
        found = compare_with_base(params, base, prompts, by_policy[name])
        log_ratios[name], outside[name] = found
    responses = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *by_policy.values())
    verdicts = {name: judge(prompts, responses) for name, judge in compare.items()}
    batches.append(jax.device_get((responses, verdicts, log_ratios, outside)))
  for judge in judges_by_name.values():
    if judge.server:
      judge.server.finish()
  joined = jax.tree.map(
    lambda *parts: np.concatenate(parts) if np.ndim(parts[0]) else sum(parts), *batches
  )
  return Judged(held_out.all(np.arange(count)), *joined)


def _num_batches(count: int, most: int) -> int:
  """Returns the number of batches, of at most `most` prompts each.

  It is the least number of equal batches, so that every program compiles once. If that takes more
  than twice as many batches, the last one is smaller instead. No batch is filled up, because a
  judge may cost money, and its metrics would count prompts that do not count.
  """
  least = -(-count // most)
  return next((n for n in range(least, 2 * least + 1) if count % n == 0), least)


def response_statistics(config: ConfigDict, judged: Judged) -> dict[str, dict[str, Any]]:
  """Returns the properties of each policy's responses.

  KL is to config.base, in nats a response: the mean over the policy's own samples of
  Σ log π(y) − log π_base(y). Under top-k or top-p they are not samples of π, and the mean is
  `log_ratio_to_reference` instead. Best-of-n has no such log-probability; `best_of_kl_bound` is
  log n − (n−1)/n, an upper bound of its KL to the policy it picks from. `kl_sigma3` of either mean
  needs report.FEW prompts. `no_kl` says why there is no KL. Lengths are in tokens and include the
  stop token; bigrams exclude it. `truncated` is the share cut at sampling.max_tokens, and
  `outside_base` the share of tokens that the base would not draw under top-p of NUCLEUS.
  """
  out, truncated = {}, sampler.truncates(config.sampling)
  for i, (name, policy) in enumerate(config.policies.items()):
    part = slice(i * config.samples, (i + 1) * config.samples)
    samples = jax.tree.map(lambda x, part=part: np.concatenate(x[:, part]), judged.responses)
    lengths, n, source = samples.mask.sum(axis=-1), policy.best_of, policy.outputs or None
    log_ratio = sigma3 = bound = no_kl = None
    outside = (judged.outside or {}).get(name)
    if n > 1:
      bound = math.log(n) - (n - 1) / n
    elif name in judged.log_ratios:
      ratios = judged.log_ratios[name].mean(axis=1, dtype=np.float64)
      log_ratio = ratios.mean()
      if len(ratios) >= report.FEW:
        sigma3 = 3 * ratios.std(ddof=1) / math.sqrt(len(ratios))
    else:
      no_kl = "no log-probabilities" if source else "base has no log-probabilities"
    # Copies of a given answer add no bigrams, so the share is comparable only with one sample.
    comparable = config.samples == 1 or not source
    out[name] = {
      "weights": None if source else policy.weights, "outputs": source, "best_of": n,
      "kl_to_reference": None if truncated else log_ratio,
      "log_ratio_to_reference": log_ratio if truncated else None, "kl_sigma3": sigma3,
      "no_kl": no_kl, "best_of_kl_bound": bound, "length": lengths.mean(),
      "distinct2": distinct_bigrams(samples.tokens, lengths - samples.stopped)
      if comparable else math.nan,
      "realign": policy.realign.to_dict() or None,
      "outside_base": None if outside is None else outside.sum() / lengths.sum(),
      "stopped": samples.stopped.mean(), "truncated": 1 - samples.stopped.mean(),
    }  # fmt: skip
  for statistics in out.values():
    for field in ("length", "distinct2"):
      statistics[f"{field}_ratio"] = statistics[field] / out[config.base][field]
  return out


def _share_valid(verdict: Verdict) -> Mean:
  """Returns the share of pairs of different responses that have a valid verdict."""
  i, j = np.triu_indices(verdict.valid.shape[-1], 1)
  return Mean.from_values(verdict.valid[:, i, j])


def _text(tokenizer: Tokenizer, batch, *index: int) -> str:
  return tokenizer.decode(batch.tokens[index][batch.mask[index]]).strip()


def _answers(config, tokenizer: Tokenizer, judged: Judged, most: int | None = None):
  """Returns {policy: text of its first response to each prompt}, for at most `most` prompts."""
  count = len(judged.prompts.tokens[:most])
  return {
    name: [_text(tokenizer, judged.responses, i, p * config.samples) for i in range(count)]
    for p, name in enumerate(config.policies)
  }


def _texts(config, tokenizer: Tokenizer, judged: Judged) -> list[dict[str, Any]]:
  by_policy = _answers(config, tokenizer, judged, config.texts)
  return [
    {
      "prompt": _text(tokenizer, judged.prompts, i),
      "continuations": {name: texts[i] for name, texts in by_policy.items()},
    }
    for i in range(min(config.texts, len(judged.prompts.tokens)))
  ]


def evaluate(config: ConfigDict, tokenizer: Tokenizer, judged: Judged) -> dict[str, Any]:
  """Returns the arena's result as plain JSON types.

  `policies` has statistics by name. `judges` has by name `win_rate`, `length_controlled` and
  `length_matched` as {row: {column: cell}}, and the judge's own metrics. The rest is `texts`,
  `base`, `prompts`, `samples` and `config`.
  """
  shape = (len(config.policies), config.samples)
  lengths = np.sum(judged.responses.mask, axis=-1).reshape(-1, *shape)
  matched = length_matched(lengths)

  def cells(rates: dict[str, np.ndarray]) -> report.Cells:
    result: report.Cells = {row: {} for row in config.policies}
    for (i, row), (j, column) in itertools.product(enumerate(config.policies), repeat=2):
      result[row][column] = {name: table[i, j].item() for name, table in rates.items()}
    return result

  def tables(p_win, valid) -> dict[str, report.Cells]:
    raw = functools.partial(win_rates, resamples=config.resamples, seed=config.seed)
    return {
      "win_rate": cells(raw(p_win, valid)),
      "length_controlled": cells(length_controlled(p_win, valid, lengths)),
      "length_matched": cells(raw(p_win, valid & matched)),
    }

  by_judge = {}
  for name, verdict in judged.verdicts.items():
    sides = (a.reshape(-1, *shape, *shape) for a in (verdict.p_win, verdict.valid))
    metrics = {**verdict.metrics, "valid": _share_valid(verdict)}
    by_judge[name] = {**tables(*sides), "metrics": {
      metric: float(mean.total / mean.weight) if mean.weight else None
      for metric, mean in metrics.items()
    }}  # fmt: skip
  result = {
    "prompts": len(judged.prompts.tokens), "samples": config.samples, "base": config.base,
    "policies": response_statistics(config, judged), "judges": by_judge,
    "texts": _texts(config, tokenizer, judged),
    "config": describe(config),
  }  # fmt: skip
  return files.without_nan(result)


def summary(
  result: dict[str, Any], *, trained: str, target: str, best_of: str, base: str
) -> dict[str, Any]:
  """Returns the headline figures of a run; the arguments name its policies in `result`.

  These are win rates against `base` under every judge, and KL (nats a response), length and
  distinct bigrams of `trained`, the last two as ratios to those of `base`.
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


def run(config: ConfigDict, workdir: str | os.PathLike[str], show: bool = True) -> dict[str, Any]:
  """Compares the policies of `config` (see config.arena); writes arena.json, arena.md and PNGs.

  Args:
    show: whether to print the tables.

  Raises:
    ValueError: a bad config, weights that do not fit, fewer than two held-out prompts, a workdir
      that is in use, cannot be written or holds an arena of another config, a judge that cannot
      read anything.
  """
  config, folder = resolve(config, "arena"), files.make_folder(workdir)
  with lock.hold(folder):
    result = _run(config, folder)
  if show:
    print(report.arena(result))
  return result


def _run(config: ConfigDict, folder: pathlib.Path) -> dict[str, Any]:
  _, changes = _recorded(config, folder)
  fix = f"They differ in {', '.join(changes)}. Use another workdir, or move that file away."
  what, expected = f"{folder}/arena.json", "an arena of this config"
  require(not changes, what, expected, "one of another config", fix)
  tokenizer, model_config = tokenizer_and_model(config.model)
  held_out = _load_held_out(config, tokenizer)
  count = min(len(held_out), config.max_prompts or len(held_out))
  fix = "Set prompts.held_out, or prompts.held_out_path."
  require(count > 1, "held-out prompts", "at least two, for an interval", count, fix)
  given = outputs.read(config, held_out, count, tokenizer)
  mixed = {
    config.policies[x].weights
    for n, e in config.policies.items()
    if e.realign
    for x in (n, *e.realign)
  }
  check_vocabulary(sorted(mixed), tokenizer, model_config)
  judges_by_name = {name: judges.make(judge, tokenizer) for name, judge in config.judges.items()}
  sources = {name: e.weights for name, e in config.policies.items() if name not in given}
  loaded = {spec: load_weights_and_step(spec, model_config) for spec in {*sources.values()}}
  params_by_name = _realign(config, {name: loaded[spec][0] for name, spec in sources.items()})
  for judge in judges_by_name.values():
    if judge.server:
      judge.server.keep_answers(folder)
  policy = make_policy(config.model, config.sampling, tokenizer, model_config)
  judged = _sample_and_judge(config, held_out, count, params_by_name, judges_by_name, policy, given)
  _check_read(judged, judges_by_name)
  result = evaluate(config, tokenizer, judged)
  for name, spec in sources.items():
    result["policies"][name]["step"] = loaded[spec][1]  # the run may have continued meanwhile
  tables = report.arena(result)
  files.write_json(folder / "arena.json", result)
  files.write_text(folder / "arena.md", tables + report.side_by_side(result["texts"]))
  _write_texts(config, tokenizer, judged, folder / "texts.jsonl")
  if config.prompts.task in answers.BENCHMARKS:
    outputs.write(config, held_out, _answers(config, tokenizer, judged), tokenizer, folder)
  labels = report.figure_labels(result["judges"])
  for label, (name, judge) in zip(labels, result["judges"].items(), strict=True):
    title = f"Row beats column: {count} held-out prompts, judge: {label}"
    report.heat_map(judge["win_rate"], title, folder / f"arena_{file_name(name)}.png")
  page.leave(page.write_arena, folder)
  return result


def _write_texts(config, tokenizer: Tokenizer, judged: Judged, path: pathlib.Path) -> None:
  """Writes a line per prompt: every policy's first response, and each judge's verdicts on these."""
  prompts = [_text(tokenizer, judged.prompts, i) for i in range(len(judged.prompts.tokens))]
  by_policy, firsts = _answers(config, tokenizer, judged), slice(None, None, config.samples)
  tables = {}
  for name, verdict in judged.verdicts.items():
    own = np.eye(len(by_policy), dtype=bool)
    valid = np.asarray(verdict.valid)[:, firsts, firsts] & ~own
    fields = {"p_win": verdict.p_win, "p_win_first": verdict.p_win_first}
    tables[name] = {
      field: np.where(valid, np.asarray(p, np.float64)[:, firsts, firsts].round(4), np.nan)
      for field, p in fields.items()
      if p is not None
    }
  lines = []
  for i, prompt in enumerate(prompts):
    verdicts = {
      name: {k: p[i].tolist() for k, p in table.items()} for name, table in tables.items()
    }
    row = {
      "prompt": prompt, "continuations": {name: texts[i] for name, texts in by_policy.items()},
      "verdicts": verdicts,
    }  # fmt: skip
    lines.append(json.dumps(files.without_nan(row), ensure_ascii=False) + "\n")
  files.write_text(path, "".join(lines))


def _load_held_out(config, tokenizer: Tokenizer) -> Examples:
  """Returns the arena's prompts; of a benchmark all, since no policy is trained on it."""
  data = config.prompts
  if data.task not in answers.BENCHMARKS:
    return load_prompts(data, tokenizer, config.seed)[1]
  whole = {"path": data.held_out_path or data.path, "held_out_path": "", "held_out": 0}
  return load_prompts(ConfigDict({**data, **whole}), tokenizer, config.seed)[0]


def _check_read(judged: Judged, judges_by_name: dict[str, judges.Judge]) -> None:
  """Logs how much each judge could not read; raises ValueError if a judge read nothing."""
  for name, verdict in judged.verdicts.items():
    i, j = np.triu_indices(verdict.valid.shape[-1], 1)
    readable = np.asarray(verdict.valid)[:, i, j]
    pairs, unread = readable.size, int(np.sum(~readable))
    what, expected = f"judge {printable(name)!r}", f"a readable verdict on some of {pairs} pairs"
    fix = "Check the judge: its answers, or for a table judge first_token and sampling.tokens."
    require(unread < pairs, what, expected, "none", fix)
    if unread and not judges_by_name[name].server:  # a server has already logged it
      logging.warning("%s: %d of %d pairs have no verdict, and do not count", what, unread, pairs)


def recorded_result(config: ConfigDict, folder: pathlib.Path) -> dict[str, Any]:
  """Returns the recorded result of this arena, {} without one; removes one of another config.

  For jobs that own the folder and can repeat the arena.

  Args:
    config: a resolved config.
  """
  result, changes = _recorded(config, folder)
  if changes:
    (folder / "arena.json").unlink()
  return {} if changes else result


def _recorded(config: ConfigDict, folder: pathlib.Path) -> tuple[dict[str, Any], dict[str, str]]:
  """Returns the recorded result, and how its config differs; ({}, {}) if there is none."""
  result = files.read_json(folder / "arena.json")
  return result, differences(result.get("config", {}), describe(config)) if result else {}

"""Policies against policies on held-out prompts: who beats whom, how surely, and at what distance.

Every policy draws S responses to a prompt; a judge compares all of them with each other. A cell is
the mean over prompts of the mean over the two policies' pairs: prompts are independent, so their
spread is the cell's error; the pairs of one prompt are not.
"""

import json
import math
import pathlib
import sys

import jax
import numpy as np
import tqdm
from jax import numpy as jnp

from nash_jax import judges, keys, report
from nash_jax.config import describe, resolve
from nash_jax.data.prompts import load_prompts
from nash_jax.policy import Policy, load_weights, make_policy, tokenizer_and_model
from nash_jax.types import Prompts, Responses
from nash_jax.validation import require

TAIL = 0.0015  # what the bootstrap's interval leaves on each side: 99.7% are within 3σ


def win_rates(
  p_win: np.ndarray, valid: np.ndarray, resamples: int = 2000, seed: int = 0
) -> dict[str, np.ndarray]:
  """Returns [P P'] tables of win rates and their intervals.

  `mean` over prompts; `sigma3`, 3 std of the prompts' means / sqrt(n); `n` prompts that counted;
  `low` and `high` of a bootstrap over prompts, 99.7%; `significant`, mean ± sigma3 clear of one
  half. NaN where nothing counted; sigma3 is NaN where n = 1.

  Args:
    p_win: P(y_s ≻ y'_s') for the samples of policies P and P', [N P S P' S'].
    valid: which of them count.
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
    "mean": mean,
    "sigma3": 3 * sigma,
    "n": n.astype(int),
    "low": low,
    "high": high,
    "significant": np.abs(mean - 0.5) > 3 * sigma,  # never, where either is NaN
  }


def length_matched(lengths: np.ndarray) -> np.ndarray:
  """Returns which pairs are of like length, bool[N P S P' S'], from lengths [N P S] in tokens.

  Like: they differ by at most 2 tokens or 10% of the longer.
  """
  a, b = lengths[:, :, :, None, None], lengths[:, None, None, :, :]
  return np.abs(a - b) <= np.maximum(2, 0.1 * np.maximum(a, b))


def distinct_bigrams(tokens: np.ndarray, lengths: np.ndarray) -> float:
  """Returns distinct bigrams over all bigrams of responses [R L], pooled; NaN without any.

  The share falls with the number of responses: compare policies on equally many.
  """
  pairs = np.stack([tokens[:, :-1], tokens[:, 1:]], axis=-1)
  pairs = pairs[np.arange(1, tokens.shape[1])[None] < lengths[:, None]]
  return len(np.unique(pairs, axis=0)) / len(pairs) if len(pairs) else math.nan


def choose_best(p_win, valid):
  """Returns the place of the response that wins most against its rivals, i32[G], from [G n n]."""
  wins = jnp.sum(jnp.where(valid, p_win, 0.0), axis=-1)
  return jnp.argmax(wins / jnp.maximum(jnp.sum(valid, axis=-1), 1), axis=-1)


def _make_best_of(policy: Policy, samples: int, best_of: int, select: judges.JudgeFn):
  """Returns the jitted (params, select's params, prompts, key) -> Responses, each the best of n."""
  sample = policy.make_sampler(samples=samples * best_of)

  def sample_best(params, judge_params, prompts, key):
    responses = sample(params, prompts, key)
    if best_of == 1:
      return responses
    groups = jax.tree.map(lambda leaf: leaf.reshape(-1, best_of, *leaf.shape[2:]), responses)
    repeated = jax.tree.map(lambda leaf: jnp.repeat(leaf, samples, axis=0), prompts)
    verdict = select(judge_params, repeated, groups, None)
    place = choose_best(verdict.p_win, verdict.valid)
    return jax.tree.map(
      lambda leaf: leaf[jnp.arange(len(place)), place].reshape(-1, samples, *leaf.shape[2:]), groups
    )

  return jax.jit(sample_best)


def _sample_and_judge(config, held_out, count, params_by_name, panel, policy: Policy):
  """Returns the first `count` prompts, and on the host what every policy answers to them.

  Responses [N P*S L]; verdicts by judge; log π(y) − log π_base(y) [N S] by name of the policies
  that have a log-probability.
  """
  selector, sizes = panel[config.select_judge], {p.best_of for p in config.policies.values()}
  samplers = {n: _make_best_of(policy, config.samples, n, selector.fn) for n in sizes}
  compare = {name: jax.jit(judge.fn) for name, judge in panel.items()}

  @jax.jit
  def log_ratio(params, base, prompts, responses):
    logp, base_logp = (
      policy.logprobs(p, prompts=prompts, tokens=responses.tokens, mask=responses.mask)[0]
      for p in (params, base)
    )
    return jnp.sum(logp - base_logp, axis=-1)

  # Batches of one size that leave the fewest places to fill up in the last.
  num_batches = -(-count // config.prompts.batch_size)
  size = -(-count // num_batches)
  batches = []
  wait = 0.5 if sys.stderr.isatty() else 30
  for batch in tqdm.tqdm(range(num_batches), "arena", unit="batch", mininterval=wait):
    prompts = held_out.all(np.arange(batch * size, (batch + 1) * size) % count)
    by_policy = {}
    for name, params in params_by_name.items():
      key = keys.key(config.seed, f"arena/{name}", batch)
      sample = samplers[config.policies[name].best_of]
      by_policy[name] = sample(params, selector.params, prompts, key)
    responses = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *by_policy.values())
    verdicts = {
      name: compare[name](judge.params, prompts, responses, None) for name, judge in panel.items()
    }
    base = params_by_name[config.base]
    log_ratios = {
      name: log_ratio(params_by_name[name], base, prompts, own)
      for name, own in by_policy.items()
      if config.policies[name].best_of == 1
    }
    batches.append(jax.device_get((responses, verdicts, log_ratios)))
  joined = jax.tree.map(
    lambda *parts: np.concatenate(parts)[:count] if np.ndim(parts[0]) else sum(parts), *batches
  )
  return held_out.all(np.arange(count)), *joined


def facts(config, responses: Responses, log_ratios: dict[str, np.ndarray]) -> dict[str, dict]:
  """Returns what each policy's responses are like, from Responses [N P*S L].

  KL is to config.base, in nats a response: the mean over the policy's own samples of
  Σ log π(y) − log π_base(y). Best-of-n has no such log-probability: `best_of_kl_bound` is
  log n − (n−1)/n, which its KL from the policy it picks from does not exceed. Lengths in tokens,
  stop token included; bigrams without it.
  """
  out = {}
  for i, (name, policy) in enumerate(config.policies.items()):
    own = jax.tree.map(
      lambda leaf, i=i: np.concatenate(np.split(leaf, len(config.policies), 1)[i]), responses
    )
    lengths, n = own.mask.sum(axis=-1), policy.best_of
    kl = log_ratios[name].mean(axis=1, dtype=np.float64) if n == 1 else None
    out[name] = {
      "weights": policy.weights,
      "best_of": n,
      "kl_to_reference": kl.mean() if n == 1 else None,
      "kl_sigma3": 3 * kl.std(ddof=1) / math.sqrt(len(kl)) if n == 1 else None,
      "best_of_kl_bound": None if n == 1 else math.log(n) - (n - 1) / n,
      "length": lengths.mean(),
      "distinct2": distinct_bigrams(own.tokens, lengths - own.stopped),
      "stopped": own.stopped.mean(),
    }
  base = out[config.base]
  return {
    name: fact | {f"{what}_ratio": fact[what] / base[what] for what in ("length", "distinct2")}
    for name, fact in out.items()
  }


def _texts(config, tokenizer, prompts: Prompts, responses: Responses) -> list[dict]:
  def text(tokens, mask):
    return tokenizer.decode(tokens[mask]).strip()

  return [
    {
      "prompt": text(prompts.tokens[i], prompts.mask[i]),
      "continuations": {
        name: text(*(leaf[i, p * config.samples] for leaf in (responses.tokens, responses.mask)))
        for p, name in enumerate(config.policies)
      },
    }
    for i in range(min(config.texts, len(prompts.tokens)))
  ]


def evaluate(
  config, tokenizer, prompts: Prompts, responses: Responses, verdicts, log_ratios
) -> dict:
  """Returns the arena's result, in plain JSON types, from what `_sample_and_judge` returns.

  `policies`: facts by name; `judges`: `win_rate` and `length_matched` as {row: {column: cell}}, and
  the judge's own metrics; `texts`; `base`, `prompts`, `samples`, `config`.
  """
  shape = (len(config.policies), config.samples)
  matched = length_matched(responses.mask.sum(axis=-1).reshape(-1, *shape))

  def cells(p_win, valid):
    rates = win_rates(p_win, valid, config.resamples, config.seed)
    return {
      row: {
        column: {what: table[i, j].item() for what, table in rates.items()}
        for j, column in enumerate(config.policies)
      }
      for i, row in enumerate(config.policies)
    }

  judged = {}
  for name, verdict in verdicts.items():
    p_win, valid = (a.reshape(-1, *shape, *shape) for a in (verdict.p_win, verdict.valid))
    judged[name] = {
      "win_rate": cells(p_win, valid),
      "length_matched": cells(p_win, valid & matched),
      "metrics": {m: float(v.value()) for m, v in verdict.metrics.items() if v.weight},
    }
  result = {
    "prompts": len(prompts.tokens),
    "samples": config.samples,
    "base": config.base,
    "policies": facts(config, responses, log_ratios),
    "judges": judged,
    "texts": _texts(config, tokenizer, prompts, responses),
    "config": describe(config),
  }
  # Through JSON, NaN, which JSON has not, becomes null.
  text = json.dumps(result, default=lambda x: x.item() if isinstance(x, np.generic) else str(x))
  return json.loads(text, parse_constant=lambda _: None)


def summary(result: dict, *, trained: str, target: str, best_of: str, base: str) -> dict:
  """Returns what a run has to show for itself; the policies' names in `result` are the caller's.

  Win rates against `base` under every judge; KL (nats a response), length and distinct bigrams of
  `trained`, the latter two as ratios to those of `base`.
  """
  who = result["policies"]
  shown = {"trained": trained, "target": target, f"best_of_{who[best_of]['best_of']}": best_of}
  return {
    "kl_to_reference": who[trained]["kl_to_reference"],
    "length_ratio": who[trained]["length_ratio"],
    "distinct2_ratio": who[trained]["distinct2_ratio"],
    "win_rate": {
      label: {
        judge: {what: found["win_rate"][name][base][what] for what in ("mean", "sigma3", "n")}
        for judge, found in result["judges"].items()
      }
      for label, name in shown.items()
    },
  }


def run(config, workdir) -> dict:
  """Compares the policies of `config` (see config.arena); writes arena.json, arena.md and PNGs.

  Raises:
    ValueError: a config that does not hold, weights that do not fit, fewer than two held-out
      prompts, a workdir that cannot be written.
  """
  config, workdir = resolve(config, "arena"), pathlib.Path(workdir)
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "arena.md").touch()
  except OSError as error:
    raise ValueError(f"workdir {workdir}: expected a folder that can be written: {error}") from None
  tokenizer, model_config = tokenizer_and_model(config.model)
  _, held_out = load_prompts(config.prompts, tokenizer, config.seed)
  count = min(len(held_out), config.max_prompts or len(held_out))
  require(
    count > 1,
    "held-out prompts",
    "at least two, for an interval",
    count,
    "Set prompts.held_out, or prompts.held_out_path.",
  )
  specs = {entry.weights for entry in config.policies.values()}
  loaded = {spec: load_weights(spec, model_config) for spec in specs}
  params_by_name = {name: loaded[entry.weights] for name, entry in config.policies.items()}
  panel = {name: judges.make(judge, tokenizer) for name, judge in config.judges.items()}
  policy = make_policy(config.model, config.sampling, tokenizer, model_config)
  answers = _sample_and_judge(config, held_out, count, params_by_name, panel, policy)
  result = evaluate(config, tokenizer, *answers)
  tables = report.arena(result)
  (workdir / "arena.json").write_text(json.dumps(result, indent=1) + "\n")
  (workdir / "arena.md").write_text(tables + report.side_by_side(result["texts"]))
  for name, judge in result["judges"].items():
    title = f"Row beats column: {count} held-out prompts, judge: {name.replace('_', ' ')}"
    report.heat_map(judge["win_rate"], title, workdir / f"arena_{name}.png")
  print(tables)
  return result

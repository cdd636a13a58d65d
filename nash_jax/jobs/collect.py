"""Makes preference data: policies draw responses, and a judge votes on pairs."""

import json
import math
import os
import pathlib
from collections.abc import Callable

import jax
import numpy as np
from absl import logging
from jax import numpy as jnp
from ml_collections import ConfigDict

from nash_jax import judges, keys
from nash_jax.config import resolve
from nash_jax.data.preferences import token_pairs
from nash_jax.data.prompts import load_prompts
from nash_jax.policy import load_weights, make_policy, tokenizer_and_model
from nash_jax.run import files, lock
from nash_jax.run.metrics import progress_bar
from nash_jax.types import Params
from nash_jax.validation import require


def run(config: ConfigDict, workdir: str | os.PathLike[str]) -> str:
  """Writes pairs of responses with the judge's vote to workdir/pairs.jsonl, and returns its path.

  Args:
    config: from nash_jax.config.collect(). Each of `sources` in turn responds to every batch of
      training prompts, and all pairs of a prompt's samples are judged.

  Raises:
    ValueError: a bad config, data or weights; a workdir in use or with pairs; no readable verdict.
  """
  config, folder = resolve(config, "collect"), files.make_folder(workdir)
  with lock.hold(folder):
    return _run(config, folder / "pairs.jsonl")


def _run(config: ConfigDict, path: pathlib.Path) -> str:
  fix = "Use another workdir, or move them away."
  require(not path.exists(), "workdir", "one without pairs.jsonl", str(path), fix)
  tokenizer, model_config = tokenizer_and_model(config.model)
  data, _ = load_prompts(config.prompts, tokenizer, config.seed)
  judge = judges.make(config.judge, tokenizer)
  judge_fn = jax.jit(judge.fn)

  def make_source(source: ConfigDict) -> tuple[Params, Callable]:
    sampling = config.sampling.copy_and_resolve_references().unlock()
    sampling.temperature = source.temperature
    policy = make_policy(config.model, sampling, tokenizer, model_config)
    sample = jax.jit(policy.make_sampler(samples=config.sampling.samples))
    return load_weights(source.weights, model_config), sample

  sources = [make_source(source) for source in config.sources.values()]
  unfinished, strengths, unread = path.with_suffix(".unfinished"), [], 0
  with files.writing(unfinished), unfinished.open("w", encoding="utf-8") as lines:
    for step in progress_bar(range(config.steps), "votes", unit="batch"):
      params, sample = sources[step % len(sources)]
      prompts = data.batch(step // len(sources), config.prompts.batch_size)
      responses = sample(params, prompts, keys.key(config.seed, "collect", step))
      verdict = judge_fn(judge.params, prompts, responses, None)
      p_win = jnp.where(verdict.valid, verdict.p_win, jnp.nan)
      arrays = jax.device_get((prompts, responses, None, p_win))
      for pair in token_pairs(*arrays):
        if math.isnan(pair["p_a"]):
          unread += 1
          continue
        lines.write(json.dumps(pair) + "\n")
        strengths.append(abs(pair["p_a"] - 0.5))
  fix = "Check the judge: its answers, or for a table judge first_token."
  expected = f"a readable verdict on some of the {unread} pairs"
  if not strengths:
    unfinished.unlink()
  require(len(strengths) > 0, "judge", expected, "none", fix)
  unfinished.replace(path)
  if unread:
    logging.warning(
      "%d of %d pairs have no verdict and are left out", unread, unread + len(strengths)
    )
  logging.info("%d pairs in %s; mean |P − 1/2| = %.3f", len(strengths), path, np.mean(strengths))
  return str(path)

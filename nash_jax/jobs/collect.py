"""Makes preference data: policies draw responses, and a judge votes on pairs."""

import json
import math
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from jax import numpy as jnp
from jaxtyping import Float, Int
from ml_collections import ConfigDict

from nash_jax import judges, keys
from nash_jax.config import describe, resolve
from nash_jax.data.corpus import Examples
from nash_jax.data.preferences import token_pairs
from nash_jax.data.prompts import load_prompts
from nash_jax.data.tokenizer import Tokenizer
from nash_jax.design import rounds
from nash_jax.judges import features
from nash_jax.policy import load_weights, make_policy, tokenizer_and_model
from nash_jax.run import files, lock
from nash_jax.run.metrics import progress_bar
from nash_jax.types import Params, Prompts, Responses
from nash_jax.validation import require

CHOSEN = "chosen.json"  # in the workdir: the pairs that a design has chosen, and their labels


def run(config: ConfigDict, workdir: str | os.PathLike[str]) -> str:
  """Writes pairs of responses with the judge's vote to workdir/pairs.jsonl, and returns its path.

  With a budget, a design chooses the pairs. They are in workdir/chosen.json, from where the same
  command goes on; that is the path returned while people have some of them to judge.

  Args:
    config: from nash_jax.config.collect(). Each of `sources` in turn responds to every batch of
      training prompts, and all pairs of a prompt's samples are judged, or `budget` of them.

  Raises:
    ValueError: a bad config, data or weights; a workdir in use, with pairs, or of another config;
      no readable verdict.
  """
  config, folder = resolve(config, "collect"), files.make_folder(workdir)
  with lock.hold(folder):
    return _run(config, folder / "pairs.jsonl")


def _run(config: ConfigDict, path: pathlib.Path) -> str:
  fix = "Use another workdir, or move them away."
  require(not path.exists(), "workdir", "one without pairs.jsonl", str(path), fix)
  began = _read_chosen(config, path.parent)
  tokenizer, _ = tokenizer_and_model(config.model)
  data, _ = load_prompts(config.prompts, tokenizer, config.seed)
  judge = judges.make(config.judge, tokenizer)
  if not config.budget:
    return _write(_all_pairs(config, judge, draw(config, tokenizer, data, "votes")), path)
  if judge.server:
    judge.server.keep_answers(path.parent)
  pool = make_pool(config, tokenizer, data)
  chosen, p_win = _buy(config, path.parent, pool, judge, *began)
  if judge.server:
    judge.server.finish()
  if config.judge.name == "human" and np.isnan(p_win).any():
    return str(path.parent / CHOSEN)
  records = token_pairs(*pool.take(chosen), p_win[:, None, None])
  return _write(records, path)


def _write(records: Iterator[dict[str, Any]], path: pathlib.Path) -> str:
  """Writes the pairs that have a verdict, and returns the path."""
  unfinished, strengths, unread = path.with_suffix(".unfinished"), [], 0
  with files.writing(unfinished), unfinished.open("w", encoding="utf-8") as lines:
    for pair in records:
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


def draw(
  config: ConfigDict, tokenizer: Tokenizer, data: Examples, title: str
) -> Iterator[tuple[Prompts, Responses]]:
  """Loads the sources; returns batches of prompts, and what the sources in turn respond to them."""
  _, model_config = tokenizer_and_model(config.model)

  def make_source(source: ConfigDict) -> tuple[Params, Callable]:
    sampling = config.sampling.copy_and_resolve_references().unlock()
    sampling.temperature = source.temperature
    policy = make_policy(config.model, sampling, tokenizer, model_config)
    sample = jax.jit(policy.make_sampler(samples=config.sampling.samples))
    return load_weights(source.weights, model_config), sample

  sources = [make_source(source) for source in config.sources.values()]

  def respond(step: int) -> tuple[Prompts, Responses]:
    params, sample = sources[step % len(sources)]
    prompts = data.batch(step // len(sources), config.prompts.batch_size)
    return prompts, sample(params, prompts, keys.key(config.seed, "collect", step))

  return map(respond, progress_bar(range(config.steps), title, unit="batch"))


def _all_pairs(
  config: ConfigDict, judge: judges.Judge, batches: Iterator[tuple[Prompts, Responses]]
) -> Iterator[dict[str, Any]]:
  """Yields all pairs of a prompt's responses, with their verdicts."""
  judge_fn = jax.jit(judge.fn)
  for prompts, responses in batches:
    verdict = judge_fn(judge.params, prompts, responses, None)
    p_win = jnp.where(verdict.valid, verdict.p_win, jnp.nan)
    yield from token_pairs(*jax.device_get((prompts, responses, None, p_win)))


class Pool(NamedTuple):
  """All that is drawn, M prompts with K responses each, and the pairs that a design may choose.

  Attributes:
    pairs: (prompt, i, j) of each pair of two different responses, i < j.
    arms: features of each pair, in the unit ball; equal if the design is uniform.
  """

  prompts: Prompts
  responses: Responses
  pairs: Int[np.ndarray, "P 3"]
  arms: Float[np.ndarray, "P D"]

  def take(self, places: Int[np.ndarray, "N"]) -> tuple[Prompts, Responses, Responses]:
    """Returns N pairs as prompts, and one response of either side to each."""
    row, i, j = self.pairs[places].T
    prompts = jax.tree.map(lambda leaf: leaf[row], self.prompts)
    a = jax.tree.map(lambda leaf: leaf[row, i][:, None], self.responses)
    b = jax.tree.map(lambda leaf: leaf[row, j][:, None], self.responses)
    return prompts, a, b


def make_pool(config: ConfigDict, tokenizer: Tokenizer, data: Examples) -> Pool:
  """Draws responses to the prompts of all steps, and reads their features if a design does."""
  made = None
  if config.design != "uniform":
    made = features.make(config.features, tokenizer, config.seed)
    read = jax.jit(made.fn)
  batches, found = [], []
  for prompts, responses in draw(config, tokenizer, data, "responses"):
    found += [jax.device_get(read(made.params, prompts, responses))] if made else []
    batches.append(jax.device_get((prompts, responses)))
  prompts, responses = jax.tree.map(lambda *leaves: np.concatenate(leaves), *batches)
  i, j = np.triu_indices(config.sampling.samples, 1)
  tokens = np.where(responses.mask, responses.tokens, -1)
  rows, columns = np.nonzero((tokens[:, i] != tokens[:, j]).any(axis=2))
  arms = np.concatenate(found)[rows, columns] if made else np.ones((len(rows), 1))
  pairs = np.stack([rows, i[columns], j[columns]], axis=1)
  return Pool(prompts, responses, pairs, rounds.scaled(arms.astype(np.float64)))


def ask(
  judge: judges.Judge, pool: Pool, pairs: Int[np.ndarray, "N"], size: int
) -> Float[np.ndarray, "N"]:
  """Returns the judge's P of pairs, NaN where there is no verdict; asks once about each.

  Args:
    size: how many at a time.
  """
  fn = judge.fn if judge.server else jax.jit(judge.fn)
  different, places = np.unique(pairs, return_inverse=True)
  found = [np.zeros(0)]
  for start in range(0, len(different), size):
    rows = different[start : start + size]
    # A last batch is filled to the compiled size, but not for who is paid by the question.
    filled = rows if judge.server else np.resize(rows, size)
    verdict = jax.device_get(fn(judge.params, *pool.take(filled)))
    p_win = np.where(verdict.valid, verdict.p_win, np.nan)
    found.append(p_win[: len(rows), 0, 0].astype(np.float64))
  return np.concatenate(found)[places]


def _read_chosen(config: ConfigDict, folder: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
  """Returns the pairs that an earlier command chose, and their labels, NaN where there is none."""
  saved, described = files.read_json(folder / CHOSEN), files.without_nan(describe(config))
  expected, fix = "the config that began there", "Use another workdir."
  same = saved.get("config", described) == described
  require(same, f"workdir with {CHOSEN}", expected, "another one", fix)
  p_win = np.array(saved.get("p_win", []), np.float64)  # null becomes NaN
  return np.array(saved.get("pairs", []), int), p_win


def _buy(
  config: ConfigDict, folder: pathlib.Path, pool: Pool, judge: judges.Judge,
  chosen: Int[np.ndarray, "N"], p_win: Float[np.ndarray, "N"],
) -> tuple[Int[np.ndarray, "M"], Float[np.ndarray, "M"]]:  # fmt: skip
  """Returns the pairs that the design chooses in as many rounds as it takes, and their labels.

  It ends after a round that people have not judged in full. Every round is saved.

  Args:
    chosen: the pairs of an earlier command, of whose labels some may be missing, NaN.
  """
  asked = np.flatnonzero(np.isnan(p_win))
  while True:
    if len(asked):
      p_win[asked] = ask(judge, pool, chosen[asked], config.prompts.batch_size)
      if config.labels == "sampled":
        wins = np.random.default_rng((config.seed, asked[0])).random(len(asked)) < p_win[asked]
        p_win[asked] = np.where(np.isnan(p_win[asked]), np.nan, wins)
      labels = {"pairs": chosen.tolist(), "p_win": p_win.tolist()}
      files.write_json(folder / CHOSEN, {**labels, "config": describe(config)})
    if config.judge.name == "human" and np.isnan(p_win).any():
      return chosen, p_win
    new = rounds.choose(config.design, pool.arms, config.budget, chosen, p_win, config.seed)
    if not len(new):
      return chosen, p_win
    asked = np.arange(len(chosen), len(chosen) + len(new))
    chosen = np.concatenate([chosen, new])
    p_win = np.concatenate([p_win, np.full(len(new), np.nan)])

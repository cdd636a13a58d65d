"""Preference data of a run's own making: policies draw responses, a judge votes on the pairs."""

import pathlib

import jax
import numpy as np
import tqdm
from absl import logging
from jax import numpy as jnp

from nash_jax import checkpoint, judges, keys, preferences, prompts, sampler, tokenizer
from nash_jax import config as configs
from nash_jax.models import gemma


def run(config, workdir: str) -> str:
  """Writes pairs of responses with their vote to workdir/pairs.npz, and returns its path.

  Args:
    config: from nash_jax.config.collect(); every round goes over batches of the training prompts
      with one of `sources`, (weights, temperature), in turn, and pairs the samples of a prompt.

  Raises:
    ValueError: a bad config, data or weights.
  """
  config = configs.resolve(config)
  tok = tokenizer.Tokenizer(configs.path(config.model.tokenizer), config.model.template)
  model = gemma.preset(config.model.preset, **config.model.changes)
  data, _ = prompts.load(config.prompts, tok, config.seed)
  judge = judges.make(config.judge, tok)
  forbidden = jnp.asarray(tok.forbidden(model.num_embed))
  verdict = jax.jit(judge.fn)
  policies = [
    (
      checkpoint.load_weights(source.weights, model),
      jax.jit(sampler.make_sampler(
        model, max_tokens=config.sampling.max_tokens, samples=config.sampling.samples,
        stop_ids=tok.stop_ids, pad_id=tok.pad_id, forbidden=forbidden,
        temperature=source.temperature,
      )),
    )
    for source in config.sources.values()
  ]  # fmt: skip
  columns = []
  for step in tqdm.tqdm(range(config.steps), "votes", unit="batch"):
    params, sample = policies[step % len(policies)]
    x = data.batch(step // len(policies), config.prompts.batch_size)
    y = sample(params, x, keys.key(config.seed, "collect", step))
    p_win = verdict(judge.params, x, y, None).p_win
    columns.append(_pairs(x, *jax.device_get((y, p_win))))
  joined = [np.concatenate(column) for column in zip(*columns, strict=True)]
  pathlib.Path(workdir).mkdir(parents=True, exist_ok=True)
  path = str(pathlib.Path(workdir) / "pairs.npz")
  preferences.save_pairs(path, *joined)
  logging.info("%d pairs in %s; mean |P − 1/2| = %.3f", len(joined[0]), path,
               np.mean(np.abs(joined[-1] - 0.5)))  # fmt: skip
  return path


def _pairs(x, y, p_win) -> list[np.ndarray]:
  """Returns save_pairs' columns: all pairs of the samples of each prompt."""
  i, j = np.triu_indices(p_win.shape[1], 1)

  def each(a):
    return np.repeat(a, len(i), axis=0)

  def pick(a, places):
    return a[:, places].reshape(-1, a.shape[-1])

  return [
    each(x.tokens), each(x.mask),
    pick(y.tokens, i), pick(y.mask, i), pick(y.tokens, j), pick(y.mask, j),
    p_win[:, i, j].reshape(-1),
  ]  # fmt: skip

"""Preference data of a run's own making: policies draw responses, a judge votes on the pairs."""

import itertools
import json
import pathlib
from collections.abc import Iterator

import jax
import numpy as np
import tqdm
from absl import logging
from jax import numpy as jnp

from nash_jax import checkpoint, judges, keys, prompts, sampler, tokenizer
from nash_jax import config as configs
from nash_jax.models import gemma


def run(config, workdir: str) -> str:
  """Writes pairs of responses with their vote to workdir/pairs.jsonl, and returns its path.

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
  pathlib.Path(workdir).mkdir(parents=True, exist_ok=True)
  path = pathlib.Path(workdir) / "pairs.jsonl"
  strengths = []
  with path.open("w") as lines:
    for step in tqdm.tqdm(range(config.steps), "votes", unit="batch"):
      params, sample = policies[step % len(policies)]
      x = data.batch(step // len(policies), config.prompts.batch_size)
      y = sample(params, x, keys.key(config.seed, "collect", step))
      p_win = verdict(judge.params, x, y, None).p_win
      for pair in _pairs(x, *jax.device_get((y, p_win))):
        lines.write(json.dumps(pair) + "\n")
        strengths.append(abs(pair["p_a"] - 0.5))
  logging.info("%d pairs in %s; mean |P − 1/2| = %.3f", len(strengths), path, np.mean(strengths))
  return str(path)


def _pairs(x, y, p_win) -> Iterator[dict]:
  """Yields all pairs of the samples of each prompt, as the task "tokens" of preferences.py."""
  for row, prompt in enumerate(x.tokens):
    said = [ids[kept].tolist() for ids, kept in zip(y.tokens[row], y.mask[row], strict=True)]
    for i, j in itertools.combinations(range(len(said)), 2):
      p_a = float(p_win[row, i, j])
      yield {"inputs": prompt[x.mask[row]].tolist(), "a": said[i], "b": said[j], "p_a": p_a}

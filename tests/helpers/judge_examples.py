"""Small judges, and prompts and responses of ragged lengths for them, of token ids."""

import functools

import jax
import numpy as np
from gemma import gm

import nash_jax
from nash_jax import judges
from nash_jax.data.tokenizer import BUNDLED, Tokenizer
from nash_jax.models import gemma
from nash_jax.types import Prompts, Responses

SMALL = {"num_embed": 1024, "attention_types": (gm.nn.AttentionType.GLOBAL,)}
TINY = {"preset": "tiny", "changes": SMALL, "weights": ""}


def settings(name, **changes):
  """Returns the config of a judge by name, on the small model."""
  config = nash_jax.config.train().judge
  config.name = name
  config.model.update({**TINY, **changes.pop("model", {})})
  config.update(changes)
  return config


def padded(rows, width, left=False, filler=0):
  """Returns tokens and mask [N width] of lists of ids, padded on the right or left."""
  tokens = np.full((len(rows), width), filler, np.int32)
  mask = np.zeros((len(rows), width), bool)
  for i, row in enumerate(rows):
    place = slice(width - len(row), width) if left else slice(len(row))
    tokens[i, place], mask[i, place] = row, True
  return tokens, mask


def prompts_of(rows, width, filler=0):
  return Prompts(*padded(rows, width, True, filler), np.arange(len(rows)))


def responses_of(rows, width, filler=0, stop=1):
  """Returns Responses of rows[b][k], lists of ids."""
  tokens, mask = padded([r for row in rows for r in row], width, False, filler)
  shape = (len(rows), len(rows[0]), width)
  stopped = np.array([[stop in r for r in row] for row in rows])
  zeros = np.zeros(shape, np.float32)
  return Responses(tokens.reshape(shape), mask.reshape(shape), zeros, zeros, stopped)


def examples(samples=3, seed=0):
  """Returns two prompts with ragged responses of 0, 1, 2, ... sentences."""
  rng = np.random.default_rng(seed)
  stop = Tokenizer(BUNDLED, "plain").id_of(".")

  def ids(n):
    return rng.integers(6, 1000, n).tolist()

  prompts = [[2, *ids(3)], [2, *ids(6)]]
  return prompts, [
    [[*ids(rng.integers(2, 6)), *[stop] * k, 1] for k in range(samples)] for _ in prompts
  ]


@functools.cache
def make_judge(name, **changes):
  """Returns one judge a name, so that tests of equal shapes share its compiled function."""
  # Random numbers of numpy: compiling the initialiser would cost more than the tests.
  rng, model = np.random.default_rng(0), gemma.preset("tiny", **SMALL)
  config = settings(name, **changes)
  shapes = judges.shapes("gpm" if name == "gpm" else "bradley_terry", config, model)
  params = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(x.dtype), shapes)
  return judges.make(config, Tokenizer(BUNDLED, "plain"), jax.device_put(params))


def verdict_of(judge, *args):
  """Returns a judge's verdict as numpy arrays, by its compiled function."""
  return jax.device_get(jax.jit(judge.fn)(judge.params, *args))


def long_examples(lengths, seed=1):
  """Returns ids of (prompt, a, b) of given lengths: no marker or stop token among them."""
  rng = np.random.default_rng(seed)
  return [[rng.integers(6, 1000, n).tolist() for n in row] for row in lengths]

"""A token is drawn from the softmax of its logits, at once or in two levels."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from nash_jax import sampler

KEY = jax.random.key(3)
LARGE = 5000  # ids: nine chunks and a part of one
draw = jax.jit(sampler._categorical)


@pytest.fixture(scope="module")
def logits():
  """Three rows from nearly uniform to nearly certain, with ids that are forbidden."""
  rows = np.random.default_rng(0).normal(0, 1, (3, LARGE)) * np.array([[0.1], [3.0], [12.0]])
  rows[:, 512:1024] = -1e30  # a whole chunk
  rows[:, ::7] = -1e30
  return jnp.asarray(rows, jnp.float32)


def softmax(logits):
  exact = np.asarray(logits, np.float64)
  weights = np.exp(exact - exact.max(-1, keepdims=True))
  return weights / weights.sum(-1, keepdims=True)


def test_the_two_levels_multiply_to_the_softmax(logits):
  chunks = softmax(jax.jit(sampler.chunk_logits)(logits.T).T)
  width = chunks.shape[1] * sampler.CHUNK
  padded = np.pad(logits, ((0, 0), (0, width - LARGE)), constant_values=-np.inf)
  inside = softmax(padded.reshape(3, -1, sampler.CHUNK))
  got = (chunks[..., None] * inside).reshape(3, -1)
  np.testing.assert_array_equal(got[:, LARGE:], 0)
  expected = softmax(logits)
  assert expected[expected > 0].min() < 1e-30  # deep into the tail
  np.testing.assert_allclose(got[:, :LARGE], expected, rtol=1e-5)


def test_frequencies_are_the_softmax():
  samples, likely = 20_000, np.array([3, 511, 512, 2047, 4999])
  row = np.full(LARGE, -6.0, np.float32)
  row[likely] = [2.0, 1.0, 0.0, 1.5, 0.5]
  tokens = np.asarray(draw(KEY, jnp.broadcast_to(row, (samples, LARGE))))
  probabilities = softmax(row)
  bins = [tokens == i for i in likely]
  expected = [probabilities[i] for i in likely]
  rest = ~np.isin(np.arange(LARGE), likely)
  for chunk in range(-(-LARGE // sampler.CHUNK)):
    inside = rest & (np.arange(LARGE) // sampler.CHUNK == chunk)
    bins.append((tokens // sampler.CHUNK == chunk) & ~np.isin(tokens, likely))
    expected.append(probabilities[inside].sum())
  counts, mean = np.sum(bins, axis=1), samples * np.array(expected)
  assert mean.min() > 50
  freedom, tail = len(mean) - 1, tokens[rest[tokens]] % sampler.CHUNK
  assert np.sum((counts - mean) ** 2 / mean) < freedom + 4 * np.sqrt(2 * freedom)
  # Ids of one weight are spread evenly over the places in their chunk.
  places = np.bincount(tail // 64, minlength=8)[:6]
  assert np.abs(places / places.mean() - 1).max() < 4 / np.sqrt(places.mean())


def test_few_ids_are_drawn_at_once(logits):
  few = logits[:, : sampler.MOST_AT_ONCE]
  np.testing.assert_array_equal(draw(KEY, few), jax.random.categorical(KEY, few))


def test_a_draw_depends_on_key_and_place_alone(logits):
  rows = jnp.tile(logits[:1], (64, 1))
  tokens = np.asarray(draw(KEY, rows))
  assert len(set(tokens)) > 32
  np.testing.assert_array_equal(draw(KEY, rows[:5]), tokens[:5])
  assert not np.array_equal(draw(jax.random.key(4), rows), tokens)


def test_forbidden_ids_are_never_drawn(logits):
  tokens = np.asarray(draw(KEY, jnp.repeat(logits, 200, axis=0)))
  assert (np.asarray(logits)[np.repeat(np.arange(3), 200), tokens] > -1e29).all()


def test_undefined_logits_give_an_id_of_the_vocabulary():
  assert int(draw(KEY, jnp.full((1, LARGE), jnp.nan))[0]) == LARGE - 1

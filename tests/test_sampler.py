"""The sampler agrees with full forward passes of the same models."""

import functools
from unittest import mock

import jax
import numpy as np
import pytest
from gemma import gm
from jax import numpy as jnp

from nash_jax import sampler
from nash_jax.models import decoding, gemma, logprobs
from nash_jax.types import Prompts

LP, L, K, TEMPERATURE = 6, 8, 4, 0.8
LENGTHS = (6, 4, 1)
STOPS = tuple(range(5, 13))  # of 64 ids, so that some rows stop and some are cut
FORBIDDEN = np.isin(np.arange(64), [0, 1, 2, 3, 60, 61, 62, 63])
TINY = gemma.preset("tiny")  # two layers, a window of 8 columns: shorter than LP + L
OPTIONS = {
  "max_tokens": L,
  "samples": K,
  "stop_ids": STOPS,
  "pad_id": 0,
  "forbidden": FORBIDDEN,
  "temperature": TEMPERATURE,
}
KEY = jax.random.key(7)


def weights(seed, config=TINY):
  """Random parameters far from uniform policies, norms included."""
  draw = np.random.default_rng(seed).normal
  return jax.tree.map(
    lambda leaf: jnp.asarray(draw(0, 0.3, leaf.shape), jnp.float32), gemma.shapes(config)
  )


def make_prompts(filler=0, columns=LP, seed=2):
  tokens = jax.random.randint(jax.random.key(seed), (len(LENGTHS), LP), 4, 60)
  tokens = jnp.pad(tokens, ((0, 0), (columns - LP, 0)))
  mask = jnp.arange(columns)[None, :] >= columns - jnp.array(LENGTHS)[:, None]
  return Prompts(jnp.where(mask, tokens, filler), mask, jnp.arange(len(LENGTHS)))


@functools.cache
def compiled(config=TINY, **changes):
  return jax.jit(sampler.make_sampler(config, **{**OPTIONS, **changes}))


@jax.jit
def mixed(m, params, prompts, key):
  """The mixture sampler, compiled once for every m."""
  return sampler.make_sampler(TINY, **OPTIONS, mixture=m)(params, prompts, key)


@pytest.fixture(scope="module")
def policy():
  return weights(0)


@pytest.fixture(scope="module")
def reference():
  return weights(1)


@pytest.fixture(scope="module")
def sampled(policy):
  return compiled()(policy, make_prompts(), KEY)


@jax.jit
def raw_logits(params, prompts, responses):
  """Logits [B K L V] before every response token, by one forward pass without a cache."""
  count, samples, length = responses.tokens.shape

  def join(left, right):
    left = jnp.repeat(left, samples, axis=0)
    return jnp.concatenate([left, right.reshape(-1, length)], axis=1)[:, :-1]

  mask = join(prompts.mask, responses.mask)
  x, _ = gemma.forward(
    params,
    TINY,
    join(prompts.tokens, responses.tokens),
    gemma.positions_of(mask),
    gemma.causal_mask(mask),
  )
  out = gemma.logits(params, TINY, x[:, prompts.tokens.shape[1] - 1 :], jnp.array(FORBIDDEN))
  return out.reshape(count, samples, length, -1)


def at_tokens(distribution, responses):
  own = jnp.take_along_axis(distribution, responses.tokens[..., None], axis=-1)[..., 0]
  return jnp.where(responses.mask, own, 0.0)


def assert_same(a, b, atol=0.0):
  for name in ("tokens", "mask", "stopped"):
    np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
  for name in ("logp", "logp_sampling"):
    np.testing.assert_allclose(getattr(a, name), getattr(b, name), atol=atol, err_msg=name)


def variant(**changes):
  return gemma.preset("tiny", **changes)


@pytest.mark.parametrize(
  ("config", "dtype", "atol"),
  [
    (TINY, jnp.float32, 1e-4),
    (TINY, jnp.bfloat16, 0.1),
    (variant(num_heads=4, num_kv_heads=2, transpose_gating_einsum=True), jnp.float32, 1e-4),
    (
      variant(
        num_kv_heads=2,
        use_qk_norm=True,
        final_logit_softcap=None,
        attn_logits_soft_cap=None,
        sliding_window_size=3,
        global_scale_factor=8.0,
      ),
      jnp.float32,
      1e-4,
    ),
  ],
  ids=["gemma2", "bfloat16", "grouped", "gemma3_multihead"],
)
def test_recomputed_logprobs_agree(config, dtype, atol):
  params, prompts = weights(0, config), make_prompts()
  got = compiled(config, dtype=dtype)(params, prompts, KEY)
  again, _ = jax.jit(
    lambda p: logprobs.response_logprobs(
      p,
      config,
      prompts,
      got.tokens,
      got.mask,
      temperature=TEMPERATURE,
      forbidden=jnp.array(FORBIDDEN),
      dtype=dtype,
    )
  )(params)
  np.testing.assert_allclose(got.logp, again, atol=atol)
  np.testing.assert_array_equal(got.logp, got.logp_sampling)
  assert got.logp.dtype == jnp.float32
  assert np.ptp(got.logp[got.mask]) > 1  # not uniform, which would agree with anything


def test_nothing_after_the_stop_counts(sampled):
  tokens, mask, stopped = (np.asarray(a) for a in (sampled.tokens, sampled.mask, sampled.stopped))
  assert 0 < stopped.sum() < stopped.size
  lengths = mask.sum(-1)
  np.testing.assert_array_equal(mask, np.arange(L) < lengths[..., None])
  assert (lengths >= 1).all()
  assert (lengths[~stopped] == L).all()
  last = np.take_along_axis(tokens, lengths[..., None] - 1, axis=-1)[..., 0]
  np.testing.assert_array_equal(np.isin(last, STOPS), stopped)
  np.testing.assert_array_equal(np.isin(tokens, STOPS).sum(-1), stopped)
  for values in (tokens, sampled.logp, sampled.logp_sampling):
    np.testing.assert_array_equal(np.asarray(values)[~mask], 0)
  assert not FORBIDDEN[tokens[mask]].any()


def test_padding_changes_nothing(policy, sampled):
  assert_same(compiled()(policy, make_prompts(filler=17), KEY), sampled)
  wider = compiled()(policy, make_prompts(filler=9, columns=LP + 5), KEY)
  assert_same(wider, sampled, atol=2e-5)


def test_a_response_depends_on_key_and_place_alone(policy, sampled):
  sample, prompts = compiled(), make_prompts()
  assert_same(sample(policy, prompts, KEY), sampled)
  other = sample(policy, prompts, jax.random.key(8))
  assert not np.array_equal(other.tokens, sampled.tokens)
  for b in range(len(LENGTHS)):
    assert len({tuple(row) for row in np.asarray(sampled.tokens[b])}) == K

  def first(tree):
    return jax.tree.map(lambda a: a[:1], tree)

  neighbours = jax.tree.map(
    lambda a, b: jnp.concatenate([a[:1], b[1:]]), prompts, make_prompts(seed=5)
  )
  assert_same(first(sample(policy, neighbours, KEY)), first(sampled))
  assert_same(sample(policy, first(prompts), KEY), first(sampled), atol=2e-5)


def test_one_token_frequencies_are_the_softmax(policy):
  samples = 4000
  one = jax.tree.map(lambda a: a[1:2], make_prompts())
  got = compiled(max_tokens=1, samples=samples)(policy, one, KEY)
  short = jax.tree.map(lambda a: a[:, :1], got)
  distribution = np.exp(jax.nn.log_softmax(raw_logits(policy, one, short)[0, 0, 0] / TEMPERATURE))
  counts = np.bincount(np.asarray(got.tokens).ravel(), minlength=64)
  np.testing.assert_array_equal(counts[FORBIDDEN], 0)
  expected = samples * distribution[~FORBIDDEN]
  chi_square = np.sum((counts[~FORBIDDEN] - expected) ** 2 / expected)
  freedom = len(expected) - 1
  assert chi_square < freedom + 4 * np.sqrt(2 * freedom)
  # The bound would notice another temperature.
  wrong = samples * np.asarray(jax.nn.softmax(np.log(distribution[~FORBIDDEN]) * TEMPERATURE))
  assert np.sum((counts[~FORBIDDEN] - wrong) ** 2 / wrong) > freedom + 4 * np.sqrt(2 * freedom)


def test_a_large_vocabularys_logits_are_the_same_with_ids_first(policy, monkeypatch):
  prompts, few = make_prompts(), compiled(top_k=8)(policy, make_prompts(), KEY)
  monkeypatch.setattr(sampler, "MOST_AT_ONCE", 32)  # of 64 ids: four chunks
  monkeypatch.setattr(sampler, "CHUNK", 16)

  def drawn(**changes):
    return jax.jit(sampler.make_sampler(TINY, **{**OPTIONS, **changes}))(policy, prompts, KEY)

  assert_same(drawn(top_k=8), few, atol=1e-5)
  responses = drawn(behaviour_temperature=1.5)
  logits = raw_logits(policy, prompts, responses) / TEMPERATURE
  for got, flatter in ((responses.logp, 1.0), (responses.logp_sampling, 1.5)):
    own = at_tokens(jax.nn.log_softmax(logits / flatter), responses)
    np.testing.assert_allclose(got, own, atol=1e-4)
  assert not FORBIDDEN[np.asarray(responses.tokens)[np.asarray(responses.mask)]].any()


@pytest.mark.parametrize(("top_k", "top_p"), [(12, 0.6), (1, 1.0)])
def test_top_k_and_top_p_narrow_the_sampling_distribution_alone(policy, top_k, top_p):
  prompts = make_prompts()
  got = compiled(top_k=top_k, top_p=top_p)(policy, prompts, KEY)
  distribution = np.asarray(jax.nn.log_softmax(raw_logits(policy, prompts, got) / TEMPERATURE))
  np.testing.assert_allclose(got.logp, at_tokens(distribution, got), atol=1e-4)
  best = np.sort(np.exp(distribution), axis=-1)[..., ::-1][..., :top_k]
  before = (np.cumsum(best, axis=-1) - best) / best.sum(-1, keepdims=True)
  kept = np.sum(best, axis=-1, where=before < top_p)
  np.testing.assert_allclose(
    got.logp_sampling, np.where(got.mask, got.logp - np.log(kept), 0.0), atol=1e-4
  )
  place = np.sum(distribution > np.asarray(got.logp + 1e-4)[..., None], axis=-1)
  assert (place[got.mask] < np.sum(before < top_p, axis=-1)[got.mask]).all()
  assert (got.logp_sampling >= got.logp).all()
  if top_k == 1:
    np.testing.assert_allclose(got.logp_sampling, 0.0, atol=1e-6)


@pytest.mark.parametrize("m", [0.0, 1.0, 0.5, -0.5])
def test_a_mixture_follows_its_definition(policy, reference, m):
  prompts = make_prompts()
  got = mixed(m, (policy, reference), prompts, KEY)
  logits = (1 - m) * raw_logits(policy, prompts, got) + m * raw_logits(reference, prompts, got)
  distribution = jax.nn.log_softmax(logits / TEMPERATURE)
  np.testing.assert_allclose(got.logp, at_tokens(distribution, got), atol=1e-4)
  plain = [compiled()(p, prompts, KEY) for p in (policy, reference)]
  if m in (0.0, 1.0):
    assert_same(got, plain[int(m)], atol=1e-5)
  else:
    assert all(not np.array_equal(got.tokens, p.tokens) for p in plain)


@jax.jit
def scored(m, params, prompts, got):
  """A mixture's log-probabilities, and the probability of what it finds likelier."""
  return logprobs.response_logprobs(
    params, TINY, prompts, got.tokens, got.mask, temperature=TEMPERATURE,
    forbidden=jnp.array(FORBIDDEN), mixture=m, measure=logprobs.likelier,
  )  # fmt: skip


@pytest.mark.parametrize("strengths", [(0.5, 0.7), (3.0, 0.0)])
def test_several_policies_are_realigned_at_once_and_scored_as_they_are_sampled(
  policy, reference, strengths
):
  """Logits h_ref + Σ λ_i (h_i − h_ref)."""
  prompts, models = make_prompts(), (reference, policy, weights(3))
  got = mixed(jnp.array(strengths), models, prompts, KEY)
  start, *others = (raw_logits(p, prompts, got) for p in models)
  logits = start + sum(s * (h - start) for s, h in zip(strengths, others, strict=True))
  distribution = np.asarray(jax.nn.log_softmax(logits / TEMPERATURE))
  expected = at_tokens(distribution, got)
  np.testing.assert_allclose(got.logp, expected, atol=1e-4)
  logp, likelier = scored(jnp.array(strengths), models, prompts, got)
  np.testing.assert_allclose(logp, expected, atol=1e-4)
  more = np.where(distribution > np.asarray(expected)[..., None] + 1e-5, np.exp(distribution), 0)
  np.testing.assert_allclose(likelier, np.where(got.mask, more.sum(-1), 0), atol=1e-3)
  assert np.ptp(likelier[got.mask]) > 0.5


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_a_mixture_of_one_model_has_that_models_logits_to_the_bit(
  policy, reference, sampled, strength
):
  models, prompts = (reference, policy), make_prompts()
  each = [raw_logits(p, prompts, sampled) for p in models]
  for m in (strength, jnp.array([strength]), jnp.array([strength, 0.0])):
    outputs = [*each, each[1]][: 1 + np.size(m)]
    np.testing.assert_array_equal(gemma.mixed(outputs, m), each[int(strength)])
  alone = scored(None, models[int(strength)], prompts, sampled)
  for got, expected in zip(scored(strength, models, prompts, sampled), alone, strict=True):
    np.testing.assert_allclose(got, expected, atol=1e-5)


def counted(monkeypatch, policy, stop_ids):
  """Responses with `stop_ids`, and how many decoding passes they took."""
  count, forward = [], decoding.forward

  def counting(*args):
    jax.debug.callback(lambda: count.append(1))
    return forward(*args)

  monkeypatch.setattr(decoding, "forward", counting)
  sample = jax.jit(sampler.make_sampler(TINY, **{**OPTIONS, "stop_ids": stop_ids}))
  got = sample(policy, make_prompts(), KEY)
  jax.effects_barrier()
  return got, len(count)


def test_early_stop_changes_nothing(policy, sampled, monkeypatch):
  endless, passes = counted(monkeypatch, policy, ())
  assert passes == L - 1
  assert endless.mask.all()
  assert not endless.stopped.any()
  stops = np.isin(endless.tokens, STOPS)
  keep = np.cumsum(stops, axis=-1) - stops == 0
  np.testing.assert_array_equal(sampled.mask, keep)
  np.testing.assert_array_equal(sampled.tokens, np.where(keep, endless.tokens, 0))
  np.testing.assert_allclose(sampled.logp, np.where(keep, endless.logp, 0), atol=1e-6)


def test_the_loop_ends_when_the_last_response_stops(policy, sampled, monkeypatch):
  got, passes = counted(monkeypatch, policy, tuple(range(64)))
  assert passes == 0
  np.testing.assert_array_equal(got.tokens[..., 0], sampled.tokens[..., 0])
  assert (got.mask.sum(-1) == 1).all()
  assert got.stopped.all()


def test_a_library_without_the_private_norms_is_named():
  with pytest.raises(
    RuntimeError, match=r"has no _query_norm or _key_norm, gemma 4\.0\.1 has both"
  ):
    decoding._qk_norms(mock.Mock(spec=gm.nn.Attention))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      {"temperature": 0.0},
      r"temperature, behaviour_temperature: expected positive numbers, got \(0.0, 1.0\)",
    ),
    ({"top_k": 65}, r"top_k: expected 0 \(all ids\) to 64"),
    ({"top_k": 5, "top_p": 0.0}, "top_p: expected a share"),
    ({"top_p": 0.9}, "needs top_k"),
    ({"max_tokens": 0}, "at least one sample of one token"),
    ({"forbidden": np.zeros(60, bool)}, r"forbidden: expected shape \(64,\), .* got \(60,\)"),
  ],
)
def test_a_distribution_that_cannot_be_sampled_is_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    sampler.make_sampler(TINY, **{**OPTIONS, **changes})

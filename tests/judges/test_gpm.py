"""The general preference model: skew games, exchange, its loss and gradient, its files."""

import functools

import jax
import numpy as np
import pytest
import scipy
from jax import numpy as jnp
from judge_examples import (
  SMALL,
  examples,
  make_judge,
  padded,
  prompts_of,
  responses_of,
  settings,
  verdict_of,
)

import nash_jax
from nash_jax import judges, weights
from nash_jax.data.tokenizer import BUNDLED, Tokenizer
from nash_jax.judges import bradley_terry, gpm
from nash_jax.models import gemma
from nash_jax.types import Answers, Prompts

MODEL = gemma.preset("tiny", **SMALL)
D = 16  # its width


@pytest.fixture(scope="module")
def tokenizer():
  return Tokenizer(BUNDLED, "plain")


def skew(actions, rank, seed):
  """Returns a random S = -Sᵀ [actions actions] of this rank, as log-odds of some size."""
  rng = np.random.default_rng(seed)
  u, v = rng.normal(size=(2, actions, rank // 2))
  return (u @ v.T - v @ u.T) * 2 / rank


def blocks_of(s, blocks):
  """Returns v [A 2 blocks] of the largest blocks of a skew S: its real Schur form, in pairs."""
  t, q = scipy.linalg.schur(s)
  places = [i for i in range(len(s) - 1) if abs(t[i, i + 1]) > 1e-9]
  places = sorted(places, key=lambda i: -abs(t[i, i + 1]))[:blocks]
  v = np.zeros((len(s), 2 * blocks))
  for block, i in enumerate(places):
    pair = q[:, [i, i + 1]] * np.sqrt(abs(t[i, i + 1]))
    v[:, 2 * block : 2 * block + 2] = pair if t[i, i + 1] > 0 else pair[:, ::-1]
  return v


score = jax.jit(gpm.score)


def all_scores(v, columns=8):
  """Returns s of every row with every row [A A], by the judge's function in float64."""
  i, j = np.indices((len(v), len(v))).reshape(2, -1)
  v = np.pad(v, ((0, 0), (0, columns - v.shape[1])))  # blocks of 0, so that one program is compiled
  with jax.enable_x64(True):
    return np.asarray(score(v[i], v[j])).reshape(len(v), -1)


@pytest.mark.parametrize(("actions", "blocks"), [(7, 3), (8, 4)])
def test_any_skew_game_is_exact_with_enough_blocks_and_loses_the_tail_with_fewer(actions, blocks):
  s = skew(actions, 2 * blocks, seed=actions)
  np.testing.assert_allclose(all_scores(blocks_of(s, blocks)), s, atol=1e-12)
  fewer = all_scores(blocks_of(s, blocks - 1))
  singular = np.linalg.svd(s, compute_uv=False)
  tail = np.sqrt(np.sum(singular[2 * blocks - 2 :] ** 2))
  np.testing.assert_allclose(np.linalg.norm(s - fewer), tail, rtol=1e-9)
  assert tail > 0.1


def test_rewards_are_one_block_and_a_circle_is_a_cycle_of_two_thirds():
  rewards = np.random.default_rng(0).normal(size=7)
  v = np.stack([rewards, np.ones(7)], axis=1)
  np.testing.assert_allclose(all_scores(v), rewards[:, None] - rewards, atol=1e-12)
  radius, angles = np.sqrt(np.log(2) / np.sin(np.pi * 2 / 3)), np.arange(3) * np.pi * 2 / 3
  circle = radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
  p = scipy.special.expit(all_scores(circle))
  np.testing.assert_allclose([p[0, 1], p[1, 2], p[2, 0]], 2 / 3, atol=1e-12)


def fitted_vectors(p_win, blocks, seed=0):
  """Returns v [A 2 blocks] that minimise the judge's own loss over all pairs of a game."""
  i, j = np.triu_indices(len(p_win), 1)
  mask = np.ones((len(i), 1), bool)
  batch = {"a_tokens": i[:, None], "a_mask": mask, "b_tokens": j[:, None], "b_mask": mask}
  batch |= {"prompts": Prompts(0 * i[:, None], mask, i), "p_win": p_win[i, j]}

  @jax.value_and_grad
  def loss(flat):
    v = flat.reshape(len(p_win), -1)
    read = lambda prompts, answers: v[answers.tokens[:, 0]]  # noqa: E731
    return bradley_terry.cross_entropy(read, gpm.score, batch)["loss"].value()

  with jax.enable_x64(True):
    start = np.random.default_rng(seed).normal(size=len(p_win) * 2 * blocks) * 0.5
    value_and_grad = jax.jit(loss)
    found = scipy.optimize.minimize(
      lambda x: [np.asarray(y, np.float64) for y in value_and_grad(x)],
      start, jac=True, method="L-BFGS-B",
      options={"maxiter": 20_000, "maxfun": 20_000, "ftol": 0, "gtol": 1e-10},
    )  # fmt: skip
  return found.x.reshape(len(p_win), -1), found.fun


@pytest.mark.parametrize("blocks", [1, 3])
def test_fitting_recovers_a_random_game_of_its_rank(blocks):
  s = skew(7, 2 * blocks, seed=blocks)
  p = scipy.special.expit(s)
  v, _ = fitted_vectors(p, blocks)
  np.testing.assert_allclose(scipy.special.expit(all_scores(v)), p, atol=1e-4)


def test_one_block_fits_a_cycle_to_its_entropy_where_no_reward_beats_a_coin():
  p = np.array([[1 / 2, 2 / 3, 1 / 3], [1 / 3, 1 / 2, 2 / 3], [2 / 3, 1 / 3, 1 / 2]])
  _, loss = fitted_vectors(p, blocks=1)
  entropy = -(2 / 3 * np.log(2 / 3) + 1 / 3 * np.log(1 / 3))
  np.testing.assert_allclose(loss, entropy, atol=1e-8)
  assert np.log(2) - entropy > 0.05  # what rewards lose: around a circle their log-odds sum to 0


def network(prompt_scale=False, seed=0):
  """Returns the config of a judge of 4 blocks, and random parameters for it."""
  config = settings("gpm", gpm={"prompt_scale": prompt_scale})
  rng = np.random.default_rng(seed)
  shapes = judges.shapes("gpm", config, MODEL)
  params = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(x.dtype), shapes)
  params["embedder"]["input_embedding"] *= 10  # so that states differ by their tokens
  return config, params


@jax.jit
def states(params):
  """Returns the last states of the prompts [B D] and of the responses [B K D] of `examples`."""
  prompts, rows = examples()
  prompts = jax.tree.map(lambda x: np.repeat(x, 3, axis=0), prompts_of(prompts, 8))
  answers = Answers(*padded([r for row in rows for r in row], 8))
  found = bradley_terry.last_states(params, MODEL, prompts, answers)
  of_prompt, of_response = (x.reshape(2, 3, D) for x in found)
  return of_prompt[:, 0], of_response


def verdict(params, judge=None):
  """Returns P of the responses of `examples` to each other, [B K K]."""
  prompts, rows = examples()
  judge = (judge or make_judge("gpm")).replace(params=params)
  return verdict_of(judge, prompts_of(prompts, 8), responses_of(rows, 8), None).p_win


def test_a_head_on_a_gemma_plays_given_games():
  """v is linear in the states of the responses, of which there are fewer than the model is wide."""
  _, params = network()
  games = np.stack([skew(3, 2, seed) for seed in range(2)])
  v = np.concatenate([np.pad(blocks_of(s, 1), ((0, 0), (0, 6))) for s in games])
  hidden = np.asarray(states(params)[1], np.float64).reshape(6, D)
  params["head"]["v"] = np.linalg.lstsq(hidden, v, rcond=None)[0].astype(np.float32)
  np.testing.assert_allclose(verdict(params), scipy.special.expit(games), atol=1e-4)
  assert np.ptp(games) > 1


def test_exchanging_the_responses_changes_the_sign_of_s_to_the_last_bit():
  rng = np.random.default_rng(0)
  for blocks in (1, 4):
    a, b = rng.normal(size=(2, 999, 2 * blocks)).astype(np.float32)
    np.testing.assert_array_equal(score(a, b), -np.asarray(score(b, a)))
    np.testing.assert_array_equal(score(a, a), 0)
  prompts, rows = examples()
  prompts, y = prompts_of(prompts, 8), responses_of(rows, 8)
  opponents = jax.tree.map(lambda x: x[:, ::-1], y)
  judge = make_judge("gpm")
  there = verdict_of(judge, prompts, y, opponents)
  back = verdict_of(judge, prompts, opponents, y)
  np.testing.assert_allclose(there.p_win + back.p_win.swapaxes(1, 2), 1, atol=1e-6)
  assert there.p_win_first is None, "no order is shown"
  assert there.rewards is None


def test_a_verdict_does_not_depend_on_the_rest_of_the_batch():
  prompts, rows = examples()
  judge = make_judge("gpm")
  whole = verdict_of(judge, prompts_of(prompts, 8), responses_of(rows, 8), None)
  others = [[7, 8, 1], [9] * 8, [12]]
  changed = prompts_of([[2, 5], prompts[1]], 8), responses_of([others, rows[1]], 8)
  other = verdict_of(judge, *changed, None)
  np.testing.assert_allclose(other.p_win[1], whole.p_win[1], atol=1e-6)
  assert np.abs(other.p_win[0] - whole.p_win[0]).max() > 1e-4


def test_blocks_are_weighted_by_the_prompt(tokenizer):
  config, params = network(prompt_scale=True)
  of_prompt, hidden = states(params)
  v = (hidden @ params["head"]["v"]).reshape(2, 3, 4, 2)
  scale = 4 * scipy.special.softmax(of_prompt @ params["head"]["scale"], axis=-1)
  turn = np.array([[0, 1], [-1, 0]])
  s = np.einsum("bl,bilc,cd,bjld->bij", scale, v, turn, v)
  judge = judges.make(config, tokenizer, params)
  np.testing.assert_allclose(verdict(params, judge), scipy.special.expit(s), atol=1e-5)
  assert np.ptp(scale, axis=0).max() > 0.1
  flat = {**params, "head": {**params["head"], "scale": np.zeros((D, 4), np.float32)}}
  plain = {**params, "head": {"v": params["head"]["v"]}}
  np.testing.assert_allclose(verdict(flat, judge), verdict(plain), atol=1e-6)


def test_the_loss_and_its_gradient_are_those_of_the_verdict():
  _, params = network()
  prompts, rows = examples()
  p_win = np.array([0.9, 0.3], np.float32)
  batch = {"prompts": prompts_of(prompts, 8), "p_win": p_win}
  for k, side in enumerate("ab"):
    batch[f"{side}_tokens"], batch[f"{side}_mask"] = padded([row[k] for row in rows], 8)

  @jax.jit
  @functools.partial(jax.grad, has_aux=True)
  def gradient(params):
    means = gpm.gpm_loss(params, batch, model_config=MODEL, options={"dtype": jnp.float32})
    return means["loss"].value(), means

  grads, means = gradient(params)
  first, second = np.moveaxis(np.asarray(states(params)[1])[:, :2], 1, 0)
  a, b = (hidden @ params["head"]["v"] for hidden in (first, second))
  turn = np.kron(np.eye(4), [[0, 1], [-1, 0]])
  s = np.sum(a @ turn * b, axis=1)
  p = scipy.special.expit(s)
  np.testing.assert_allclose(verdict(params)[:, 0, 1], p, rtol=1e-5)
  loss = -np.mean(p_win * np.log(p) + (1 - p_win) * np.log(1 - p))
  np.testing.assert_allclose(means["loss"].value(), loss, rtol=1e-5)
  np.testing.assert_allclose(means["accuracy"].value(), np.mean((s > 0) == (p_win > 0.5)))
  # ds/dv_a = T v_b, ds/dv_b = -T v_a, and dloss/ds = (p - P) / number of pairs.
  outer = np.einsum("n,nd,ng->dg", p - p_win, first, b @ turn.T)
  outer += np.einsum("n,nd,ng->dg", p - p_win, second, a @ turn)
  np.testing.assert_allclose(grads["head"]["v"], outer / 2, rtol=1e-4, atol=1e-5)
  assert all(np.any(np.asarray(x) != 0) for x in jax.tree.leaves(grads["layers"]))


def test_an_unfitted_model_prefers_little_and_yet_can_learn():
  _, params = network()
  for seed in range(3):
    made = gpm.add_head(params, jax.random.key(seed), settings("gpm").gpm)
    p = verdict(made)
    assert 1e-4 < np.abs(p - 0.5).max() < 0.2, "at s = 0 nothing would be learned"
    entropy = -np.mean(0.5 * np.log(p) + 0.5 * np.log(1 - p))
    np.testing.assert_allclose(entropy, np.log(2), atol=0.02)


def test_a_head_is_saved_and_loaded_and_another_one_is_refused(tmp_path, tokenizer):
  config, params = network(prompt_scale=True)
  config.model.weights = path = str(tmp_path / "gpm.safetensors")
  weights.save(path, params, MODEL, jnp.float32, {})
  jax.tree.map(np.testing.assert_array_equal, judges.make(config, tokenizer).params, params)
  for changes in ({"blocks": 3, "prompt_scale": True}, {"prompt_scale": False}):
    other = settings("gpm", model={"weights": path}, gpm=changes)
    with pytest.raises(ValueError, match=r"head: expected shapes .*, of judge.gpm, got .*8\)"):
      judges.make(other, tokenizer)
  with pytest.raises(ValueError, match="no reward head"):
    judges.make(settings("bradley_terry", model={"weights": path}), tokenizer)
  fit, key = nash_jax.config.fit(), jax.random.key(0)
  with pytest.raises(ValueError, match=r"model.weights: head: expected none, or shapes .*8\)"):
    judges.with_head("gpm", params, key, fit)
  fit.gpm.prompt_scale = True
  assert judges.with_head("gpm", params, key, fit) is params
  del params["head"]
  weights.save(path, params, MODEL, jnp.float32, {})
  with pytest.raises(ValueError, match=r"got 'none'. Set judge.gpm .* --config.loss=gpm"):
    judges.make(config, tokenizer)

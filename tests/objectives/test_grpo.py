"""GRPO: its relations to other methods, its options, and where each of its forms rests."""

import dataclasses
import functools
import math

import given_games
import jax
import numpy as np
import pytest
import tiny
from enumeration import X, config, enumerated, game, logps, whole
from jax import numpy as jnp
from one_row_policy import batch, logits, make

from nash_jax.config import resolve
from nash_jax.games import preference
from nash_jax.objectives import algorithms, losses
from nash_jax.types import Verdict

GRPO = algorithms.get("grpo")


def drawn(samples, prompts=3, length=2):
  """Returns log-probabilities, those of the reference, and a verdict: P + Pᵀ = 1, rewards."""
  rng = np.random.default_rng(samples)
  logp, ref = rng.normal(size=(2, prompts, samples, length)).astype(np.float32)
  scores = rng.normal(size=(prompts, samples, samples)).astype(np.float32)
  p_win = np.float32(1) / (1 + np.exp(scores.swapaxes(1, 2) - scores))
  valid = np.tile(~np.eye(samples, dtype=bool), (prompts, 1, 1))
  return logp, ref, Verdict(p_win, valid, rng.normal(size=(prompts, samples)).astype(np.float32))


@functools.cache
def slope_of_tokens(name, options, later):
  """Returns the compiled gradient of a method's loss over a batch; one for all tests."""
  method, a = algorithms.get(name), config(**dict(options))

  @jax.jit
  @jax.grad
  def slope(logp, ref, verdict, old):
    ratios = {"reference": logp - ref} | ({"policy": logp - old} if later else {})
    mean = method.loss(a)(logp, ratios, verdict, role_weights=method.role_weights(a))
    return mean.total / mean.weight

  return slope


def sampled(name, a, logp, ref, verdict, old=None):
  """Returns the gradient of a method's loss over a batch, of every token's log-probability."""
  slope = slope_of_tokens(name, tuple(vars(a).items()), old is not None)
  return np.asarray(slope(logp, ref, verdict, old))


@pytest.mark.parametrize("samples", [2, 4])
@pytest.mark.parametrize("option", ["", "centre_log_ratios", "reward_to_go"])
def test_without_normalisation_it_is_regularised_self_play_sample_by_sample(samples, option):
  a, x = config(samples=samples, **({option: True} if option else {})), drawn(samples)
  x[2].valid[0, 0] = x[2].valid[0, :, 0] = x[2].valid[1] = False  # some that were not read
  expected = sampled("reg_self_play", a, *x)
  assert np.max(np.abs(expected)) > 1e-2
  np.testing.assert_array_equal(sampled("grpo", a, *x), expected)


@pytest.mark.parametrize("samples", [2, 4])
def test_of_rewards_it_is_rloo_less_the_factor_of_leaving_one_out(samples):
  a, x = config(beta=0.0, advantage="scores"), drawn(samples)
  rloo = sampled("rlhf", a, *x)
  assert np.max(np.abs(rloo)) > 1e-2
  np.testing.assert_allclose(samples / (samples - 1) * sampled("grpo", a, *x), rloo, rtol=2e-5)


def visited_kl(policy, reference, length):
  """Returns E_π Σ_t KL(π_ref‖π) [X] on the prefixes that π visits, which are constants."""
  first = 4 if length == 1 else 2
  seen = jax.lax.stop_gradient(jax.nn.softmax(policy[:, :first]))

  def forward(a, b):
    return jnp.sum(jax.nn.softmax(b) * (jax.nn.log_softmax(b) - jax.nn.log_softmax(a)), -1)

  total = forward(policy[:, :first], reference[:, :first])
  if length == 2:
    pairs = [theta[:, 2:].reshape(X, 2, 2) for theta in (policy, reference)]
    total += jnp.sum(seen * forward(*pairs), -1)
  return total


def stated(a, table, rewards, players, length):
  """1/2 − E[f(P)] or −E[A·log π], and the KL of this form, twice: both arms."""
  logp = whole(players["policy"], length)
  ref, fixed = players["reference"], jax.lax.stop_gradient(jnp.exp(logp))
  if a.kl == "k3":
    penalty = visited_kl(players["policy"], ref, length)
  else:
    penalty = jnp.sum(jnp.exp(logp) * (logp - whole(ref, length)), -1)
  if a.normalise == "group":  # K = 2: u − ū = ±d/2 of d = u − u', or ±(P − 1/2)
    d = table - 0.5 if a.advantage == "wins" else (rewards[:, :, None] - rewards[:, None]) / 2
    table = 0.5 + d / (jnp.sqrt(2) * jnp.abs(d) + losses.LEAST_DEVIATION)
    return 2 * jnp.mean(a.beta * penalty - jnp.einsum("xa,xab,xb->x", jnp.exp(logp), table, fixed))
  if a.advantage == "wins":
    won = jnp.einsum("xa,xab,xb->x", jnp.exp(logp), table, fixed)
  else:  # R_k is in the mean that it is compared with
    won = (1 - 1 / a.samples) * jnp.sum(jnp.exp(logp) * rewards, -1)
  return 2 * jnp.mean(a.beta * penalty - won)


@pytest.mark.parametrize("length", [1, 2])
@pytest.mark.parametrize(
  "options",
  [
    {"kl": "k3"},
    {"advantage": "scores"},
    {"normalise": "group"},
    {"normalise": "group", "advantage": "scores", "kl": "k3"},
    {"samples": 4},
  ],
)
def test_the_expected_gradient_is_that_of_the_stated_objective(options, length):
  a = config(**options)
  with jax.enable_x64(True):
    table, rewards, players = game(length=length)

    def both(p):
      game = (table, rewards, {**players, "policy": p}, length)
      return jnp.stack([enumerated(GRPO, a, *game), stated(a, *game)])

    got, expected = jax.jit(jax.jacrev(both))(players["policy"])
  assert np.max(np.abs(expected)) > 1e-3
  np.testing.assert_allclose(got, expected, atol=1e-10)


def test_k3_estimates_the_kl_whose_gradient_it_does_not_have():
  """E_π k3 is KL(π‖π_ref), but differentiated as a loss it pulls as KL(π_ref‖π)."""
  with jax.enable_x64(True):
    _, _, players = game()
    ref = logps(players["reference"], 1)[..., 0]

    def k3(theta):
      logp = logps(theta, 1)[..., 0]
      seen = jax.lax.stop_gradient(jnp.exp(logp))
      return jnp.sum(seen * (jnp.exp(ref - logp) - (ref - logp) - 1), -1)

    def estimate_and_kls(theta):
      here = logps(theta, 1)[..., 0]
      return jnp.stack([k3(theta), preference.kl(ref, here), preference.kl(here, ref)])

    theta = players["policy"]
    values = jax.jit(estimate_and_kls)(theta)
    np.testing.assert_allclose(values[0], values[2], rtol=1e-12)
    slopes = jax.jit(jax.jacrev(lambda t: jnp.sum(estimate_and_kls(t), 1)))(theta)
  np.testing.assert_allclose(slopes[0], slopes[1], atol=1e-12)
  assert np.max(np.abs(slopes[0] - slopes[2])) > 1e-2


def test_a_ratio_is_clipped_where_it_would_go_on_and_not_where_it_comes_back():
  """By hand: A > 0 stops above 1 + ε, A < 0 below 1 − ε; between them ρ·A."""
  a = config(updates=2, beta=0.0, clip_low=0.2, clip_high=0.3)
  logp, _, verdict = drawn(2, prompts=1)
  wins = float(verdict.p_win[0, 0, 1]) - 0.5
  best = 0 if wins > 0 else 1  # of the two responses
  for rho, kept in ((1.5, [False, True]), (1.25, [True, True]), (0.7, [True, False])):
    got = sampled("grpo", a, logp, logp, verdict, old=logp - np.float32(np.log(rho)))[0]
    signs = np.array([-1, 1]) * abs(wins) * rho * kept  # the better, then the worse
    expected = signs if best == 0 else signs[::-1]
    np.testing.assert_allclose(got, np.tile(expected[:, None], (1, 2)), rtol=1e-5)


def test_the_kl_in_the_score_stays_that_of_the_policy_that_responded():
  """At a later update ρ is clipped with it: the coefficient holds log π_old/π_ref."""
  a, (logp, ref, verdict) = config(updates=2, clip_low=1.0, clip_high=9.0), drawn(4)
  old = logp + np.float32(0.1) * np.random.default_rng(1).normal(size=logp.shape).astype("f")
  first = sampled("grpo", a, old, ref, verdict, old=old)
  later = sampled("grpo", a, logp, ref, verdict, old=old)
  np.testing.assert_allclose(later, first * np.exp(logp - old), rtol=2e-5, atol=1e-7)


def test_shift_and_scale_of_rewards_do_not_matter_in_normalised_groups():
  a, (logp, ref, verdict) = config(beta=0.0, advantage="scores", normalise="group"), drawn(4)
  base = sampled("grpo", a, logp, ref, verdict)
  moved = dataclasses.replace(verdict, rewards=5 + 30 * verdict.rewards)
  np.testing.assert_allclose(sampled("grpo", a, logp, ref, moved), base, rtol=1e-3, atol=1e-5)
  flat = dataclasses.replace(verdict, rewards=np.full_like(verdict.rewards, 7))
  np.testing.assert_array_equal(sampled("grpo", a, logp, ref, flat), 0)
  means = losses.clipping({}, np.ones(logp.shape, bool), flat, advantage="scores", clip=(1, 1))
  assert means["flat_groups"].value() == 1
  assert means["advantage_deviation"].value() == 0


def test_the_deviation_of_a_batch_is_over_all_responses_that_were_read():
  _, _, verdict = drawn(4)
  verdict.rewards[0, 2] = np.nan
  found = losses.with_deviation(verdict, advantage="scores").deviation
  expected = np.std(np.delete(verdict.rewards.reshape(-1), 2), ddof=1)
  np.testing.assert_allclose(found, np.full(3, expected), rtol=1e-6)
  wins = losses.with_deviation(verdict, advantage="wins").deviation
  assert 0 < wins[0] < 0.5


@pytest.mark.parametrize("normalise", ["none", "group", "batch"])
def test_several_updates_do_not_depend_on_how_a_batch_is_split(normalise):
  """Also the deviation and π_old are the whole batch's."""
  results = []
  for parts in (1, 4):
    rule = make(
      algorithm__name="grpo", algorithm__normalise=normalise, algorithm__updates=3,
      optimizer__micro_batches=parts,
    )  # fmt: skip
    state, values = rule.train_step(rule.init(logits(0)), logits(2), batch())
    results.append((state.params, values))
    assert state.step == 1, "a batch is a step"
  assert abs(results[0][1]["ratio"].value() - 1) > 1e-6
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), results[0], results[1]
  )


def test_updates_that_do_not_move_are_one_and_the_first_of_several_is_the_only_one():
  still = {"algorithm__name": "grpo", "optimizer__name": "sgd"}
  once, twice = (make(**still, algorithm__updates=n) for n in (1, 2))
  start = once.init(logits(0))
  one, values = once.train_step(start, logits(2), batch())
  two, first = twice.train_step(start, logits(2), batch())
  moved = [np.asarray(s.params["w"] - start.params["w"]) for s in (one, two)]
  assert np.max(np.abs(moved[0])) > 1e-4
  assert np.max(np.abs(moved[1] - moved[0])) > 1e-4
  np.testing.assert_allclose(first["learning_rate"], values["learning_rate"], rtol=1e-5)
  for name in ("kl_to_reference", "p_win", "entropy"):
    np.testing.assert_allclose(first[name].value(), values[name].value(), rtol=1e-5)
  assert not {"ratio", "clipped_low", "clipped_high"} & {*values}
  same = make(**still, algorithm__updates=2, optimizer__learning_rate=1e-12)
  stayed, values = same.train_step(start, logits(2), batch())
  np.testing.assert_allclose(stayed.params["w"], start.params["w"], atol=1e-9)
  assert values["ratio"].value() == pytest.approx(1, abs=1e-6)
  assert values["clipped_low"].value() == values["clipped_high"].value() == 0


def test_an_update_after_the_first_that_is_not_finite_shows_in_the_steps_gradient():
  """The loss is the first update's: a checkpoint of such a state would count as good."""
  rate = {"optimizer__name": "sgd", "optimizer__learning_rate": math.inf}
  rule = make(algorithm__name="grpo", algorithm__updates=2, **rate)
  state, values = rule.train_step(rule.init(logits(0)), logits(2), batch())
  assert not np.all(np.isfinite(state.params["w"]))
  assert np.isfinite(values["loss"].value())
  assert not np.isfinite(values["gradient_norm"])


def test_advantages_of_scores_want_a_judge_that_has_them():
  changes = {"algorithm.name": "grpo", "algorithm.advantage": "scores"}
  with pytest.raises(ValueError, match=r"judge.name: expected a judge with scalar rewards"):
    resolve(tiny.train(changes))


# Where the forms rest, in two games at β = 0.1.
GAMES = given_games.GAMES


@functools.cache
def slope(name, **changes):
  a = given_games.settings(**changes)
  roles = {"reference": jnp.asarray(given_games.reference(name))}
  expected = given_games.gradient("grpo", name, a)
  return jax.jit(lambda theta: expected({**roles, "policy": theta}))


@pytest.fixture
def exact():
  with jax.enable_x64(True):
    yield


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("name", GAMES)
def test_it_rests_at_the_regularised_equilibrium(name):
  star = given_games.equilibrium(name)
  np.testing.assert_allclose(slope(name)(star), 0, atol=1e-10)
  assert np.max(np.abs(slope(name)(given_games.reference(name)))) > 1e-3


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize(("name", "suboptimality"), [("rps", None), ("r6", 0.0022)])
def test_with_k3_it_rests_at_the_equilibrium_of_the_other_kl(name, suboptimality):
  """π = π_ref/(1 − (P(·≻π) − 1/2)/β), found by Newton's method on what the gradient is."""
  ref, p = np.exp(given_games.reference(name)), GAMES[name]

  def residual(pi):
    return pi * (1 - (p @ pi - 0.5) / given_games.BETA) - ref

  pi = np.exp(given_games.equilibrium(name))
  for _ in range(50):
    jacobian = np.diag(1 - (p @ pi - 0.5) / given_games.BETA) - pi[:, None] * p / given_games.BETA
    pi = pi - np.linalg.solve(jacobian, residual(pi))
  assert pi.min() > 0
  np.testing.assert_allclose([pi.sum(), *residual(pi)], [1, *np.zeros(len(pi))], atol=1e-12)
  np.testing.assert_allclose(slope(name, kl="k3")(np.log(pi)), 0, atol=1e-10)
  if suboptimality:
    got = given_games.suboptimality(name, np.log(pi))
    assert got == pytest.approx(suboptimality, rel=0.03)
    assert given_games.kl(given_games.equilibrium(name), np.log(pi)) == pytest.approx(
      0.0165, rel=0.01
    )


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize(("name", "suboptimality"), [("rps", 0.0110), ("r6", 0.0756)])
def test_normalised_pairs_rests_in_the_game_of_majorities(name, suboptimality):
  """A is ±1/√2: the place is π* of 1{P > 1/2} at β/√2, twice the reference's SubOpt_β away."""
  d = GAMES[name] - 0.5
  table = 0.5 + d / (np.sqrt(2) * np.abs(d) + losses.LEAST_DEVIATION) / np.sqrt(2)
  star = given_games.equilibrium(name, given_games.BETA / np.sqrt(2), table)
  np.testing.assert_allclose(slope(name, normalise="group")(star), 0, atol=1e-10)
  found = given_games.suboptimality(name, star)
  assert found == pytest.approx(suboptimality, rel=0.01)
  ref = given_games.suboptimality(name, given_games.reference(name))
  assert found > 1.8 * ref


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize(
  ("name", "suboptimality"), [("rps", 7.96e-5), pytest.param("r6", 0.0297, marks=pytest.mark.slow)]
)
def test_a_normalised_group_of_four_rests_elsewhere_too(name, suboptimality):
  expected = slope(name, normalise="group", samples=4)

  def step(_, theta):  # natural gradient: rare responses move as others do
    return theta - 0.02 * expected(theta) / jax.nn.softmax(theta)

  theta = jax.jit(lambda theta: jax.lax.fori_loop(0, 3000, step, theta))(
    jnp.asarray(given_games.reference(name))
  )
  end = np.asarray(jax.nn.log_softmax(theta))
  np.testing.assert_allclose(expected(theta), 0, atol=1e-6)
  assert given_games.suboptimality(name, end) == pytest.approx(suboptimality, rel=0.01)
  assert given_games.kl(end, given_games.reference(name)) > 1.1 * given_games.kl(
    given_games.equilibrium(name), given_games.reference(name)
  )

"""Which verdicts, rewards and log-ratios count in a loss: those that are valid."""

import jax
import numpy as np
import pytest
from enumeration import CONFIG, config, off, read

from nash_jax.objectives import algorithms, losses
from nash_jax.types import Verdict


@pytest.mark.parametrize(
  "name", [n for n in algorithms.ALGORITHMS if not algorithms.ALGORITHMS[n].opponent]
)
def test_prompts_without_a_valid_verdict_weigh_nothing(name):
  method, logp = algorithms.get(name), np.log([[[0.3], [0.4]], [[0.2], [0.1]]], dtype=np.float32)
  p_win = np.tile(np.array([[0.5, 0.8], [0.2, 0.5]], np.float32), (2, 1, 1))
  rewards = np.array([[1.0, 2.0], [np.nan, 0.1]], np.float32)  # the second could not be read

  def loss(logp, count, valid):
    frozen = {role: logp - logps[:count] for role, logps in roles.items()}
    verdict = Verdict(p_win[:count], valid, rewards[:count])
    mean = method.loss(CONFIG)(logp, frozen, verdict, role_weights=method.role_weights(CONFIG))
    return mean.total / mean.weight

  roles = {role: np.full((2, 2, 1), np.log(0.25), np.float32) for role in read(method, CONFIG)}
  slope = jax.jit(jax.grad(loss), static_argnums=1)
  grad = np.asarray(slope(logp, 2, off() & [[[True]], [[False]]]))
  np.testing.assert_array_equal(grad[1], 0)
  assert np.max(np.abs(grad[0])) > 1e-3
  np.testing.assert_allclose(grad[0], slope(logp[:1], 1, off(1))[0], rtol=1e-6)


def coefficients(ratios, verdict, weight, **options):
  """Returns what a policy gradient multiplies every token's log-probability with."""

  @jax.jit
  @jax.grad
  def slope(logp):
    roles = {"reference": ratios}, verdict
    return losses.policy_gradient(logp, *roles, role_weights={"reference": weight}, **options).total

  return np.asarray(slope(np.zeros_like(ratios)))


def test_centring_changes_no_expectation_but_the_variance():
  """At a large KL the centred coefficients vary less."""
  ratios = np.random.default_rng(1).normal(18, 3, (512, 2, 1)).astype(np.float32)
  p_win = np.tile(np.array([[0.5, 0.6], [0.4, 0.5]], np.float32), (512, 1, 1))

  verdict = Verdict(p_win, off(512))
  centred, plain = (coefficients(ratios, verdict, 0.1, arms=2, centre=x) for x in (True, False))
  assert np.mean(centred**2) < 0.2 * np.mean(plain**2)


def test_reward_to_go_drops_the_ratios_of_earlier_tokens_alone():
  """By hand: the second token's coefficient holds its own log-ratio, the first token's both."""
  ratios = np.array([[[2.0, 3.0], [5.0, 7.0]]], np.float32)
  verdict = Verdict(np.full((1, 2, 2), 0.5, np.float32), off(1))
  grad = coefficients(ratios, verdict, 1.0, arms=2, to_go=True)
  np.testing.assert_allclose(grad, [[[5.0, 3.0], [12.0, 7.0]]])


def only(*pairs, samples=3):
  valid = np.zeros((1, samples, samples), bool)
  for i, j in pairs:
    valid[0, i, j] = valid[0, j, i] = True
  return valid


@pytest.mark.parametrize("missing", [np.nan, np.inf, -np.inf])
def test_the_mean_of_the_other_rewards_leaves_out_what_could_not_be_read(missing):
  """By hand: rewards 10 and 11 of three responses are advantages −1 and 1, whatever the offset."""
  zero = np.zeros((1, 3, 1), np.float32)

  @jax.jit
  def slope(rewards, valid):
    verdict = Verdict(np.full((1, 3, 3), 0.5, np.float32), valid, rewards)
    return jax.grad(
      lambda logp: (
        losses.reinforce(logp, {"reference": zero}, verdict, role_weights={"reference": 0.1}).total
      )
    )(zero)[0, :, 0]

  for offset in (0.0, 1000.0):
    rewards = np.array([[10.0, 11.0, missing]], np.float32) + np.float32(offset)
    for valid in (only((0, 1)), only((0, 1), (0, 2), (1, 2))):
      np.testing.assert_allclose(slope(rewards, valid), [2 / 3, -2 / 3, 0], rtol=1e-5)
  # One response alone has no others to be compared with.
  alone = np.array([[10.0, missing, missing]], np.float32)
  np.testing.assert_array_equal(slope(alone, only((0, 1), (0, 2))), 0)


def test_centring_takes_the_mean_of_the_others_that_have_a_verdict():
  """By hand: log-ratios 2, 4 and an unreadable response's 100."""
  ratios = np.array([[[2.0], [4.0], [100.0]]], np.float32)
  verdict = Verdict(np.full((1, 3, 3), 0.5, np.float32), only((0, 1)))
  grad = coefficients(ratios, verdict, 1.0, arms=1, centre=True)
  np.testing.assert_allclose(grad[0, :, 0], [(2 - 4) / 3, (4 - 2) / 3, 0], rtol=1e-6)


@pytest.mark.parametrize("name", ["sppo", "nash_md", "egpo"])
def test_a_win_rate_is_the_mean_over_the_verdicts_that_are_valid(name):
  """Three opponents, of which one or two were read, are as those alone."""
  method, logp = algorithms.get(name), np.log([[[0.3], [0.4]]], dtype=np.float32)
  roles = dict.fromkeys(method.role_weights(CONFIG), logp + 0.5)
  p_win = np.array([[[0.9, 0.7, 0.1], [0.2, 0.6, 0.3]]], np.float32)
  valid = np.array([[[True, True, False], [False, True, False]]])
  means = np.array([[[0.8], [0.6]]], np.float32)

  @jax.jit
  def slope(p_win, valid):
    def loss(logp):
      log_ratios = {role: logp - other for role, other in roles.items()}
      weights = method.role_weights(CONFIG)
      mean = method.loss(CONFIG)(logp, log_ratios, Verdict(p_win, valid), role_weights=weights)
      return mean.total / mean.weight

    return jax.grad(loss)(logp)

  got, expected = slope(p_win, valid), slope(means, np.ones(means.shape, bool))
  assert np.max(np.abs(expected)) > 1e-2
  np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize("opponents", [False, True])
def test_a_gradient_is_that_of_the_verdicts_that_are_valid_alone(opponents):
  """All methods: unread prompts and responses, among them NaN verdicts, are as if never drawn."""
  methods = {n: m for n, m in algorithms.ALGORITHMS.items() if bool(m.opponent) == opponents}
  configs = {n: config(centre_log_ratios=m.on_policy) for n, m in methods.items()}
  rng = np.random.default_rng(0)
  logp, base = rng.normal(size=(2, 3, 4, 2)).astype(np.float32)
  p_win = rng.random((3, 4, 4), np.float32)
  rewards = rng.normal(size=(3, 4)).astype(np.float32)
  valid = np.ones((3, 4, 4), bool) if opponents else np.tile(~np.eye(4, dtype=bool), (3, 1, 1))
  valid[1] = False  # a prompt of which nothing was read
  valid[:, 2] = False  # and a response
  rewards[:, 2] = rewards[1] = np.nan
  if not opponents:
    valid[:, :, 2] = False
  p_win[~valid] = np.nan

  @jax.jit
  def slopes(logp, base, verdict):
    def loss(logp, name):
      weights = methods[name].role_weights(configs[name])
      roles = dict.fromkeys(read(methods[name], configs[name]), logp - jax.lax.stop_gradient(base))
      objective = methods[name].loss(configs[name])
      mean = objective(logp, roles, verdict.checked(), role_weights=weights)
      return mean.total / mean.weight

    return {name: jax.grad(loss)(logp, name) for name in methods}

  def part(verdict_valid, prompts, players):
    def cut(array):
      return array[prompts][:, players]

    others = slice(None) if opponents else players
    table = (x[prompts][:, players][:, :, others] for x in (p_win, verdict_valid))
    return slopes(cut(logp), cut(base), Verdict(*table, None if opponents else cut(rewards)))

  every = part(valid, [0, 1, 2], [0, 1, 2, 3])
  alone = part(valid, [0, 2], [0, 1, 3])
  for name in methods:
    got, expected = np.asarray(every[name]), np.asarray(alone[name])
    assert np.max(np.abs(expected)) > 1e-2, name
    np.testing.assert_allclose(got[[0, 2]][:, [0, 1, 3]], expected, rtol=1e-5, err_msg=name)
    np.testing.assert_array_equal(got[1], 0, err_msg=name)
    np.testing.assert_array_equal(got[:, 2], 0, err_msg=name)

"""Every algorithm's loss in an exact game: responses enumerated, objectives differentiated."""

import jax
import numpy as np
import pytest
import scipy
from enumeration import (
  CONFIG,
  GPO,
  LENGTHS,
  A,
  X,
  compare,
  config,
  enumerated,
  game,
  off,
  regularised,
  squared,
  whole,
)
from jax import numpy as jnp

from nash_jax.config import fields
from nash_jax.games import preference
from nash_jax.models import gemma, logprobs
from nash_jax.objectives import algorithms, losses
from nash_jax.types import Prompts, Verdict


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", algorithms.ALGORITHMS)
def test_the_expected_gradient_is_that_of_the_stated_objective(name, length):
  compare(name, config(samples=int(algorithms.get(name).minimum.get("samples", 2))), length)


@pytest.mark.parametrize("length", LENGTHS)
def test_every_member_of_gpo_has_the_gradient_of_its_published_loss(length):
  assert set(GPO) == set(fields.GPO) == {*losses.CONVEX, "squared", "logistic"}
  method = algorithms.get("gpo")
  with jax.enable_x64(True):
    table, rewards, players = game(length=length)

    def losses_of(objective):
      def values(p):
        args = (table, rewards, {**players, "policy": p}, length)
        return jnp.stack([objective(method, config(f=f), *args) for f in GPO])

      return jax.jit(jax.jacrev(values))(players["policy"])

    got, expected = map(losses_of, (enumerated, squared))
    assert np.min(np.max(np.abs(expected), axis=(1, 2))) > 1e-3
    np.testing.assert_allclose(got, expected, atol=1e-10)


# f'(0), f''(0), and the least z at label P, by member.
AT_ZERO = {
  "logistic": (-0.5, 0.25, lambda p: np.log(p / (1 - p))),
  "squared": (-2, 2, lambda p: 2 * p - 1),
  "hinge": (-1, 0, lambda p: np.sign(p - 0.5)),
  "exponential": (-1, 1, lambda p: 0.5 * np.log(p / (1 - p))),
  "truncated_quadratic": (-2, 2, lambda p: 2 * p - 1),
  "savage": (-0.25, 0.125, lambda p: np.log(p / (1 - p))),
}


@pytest.mark.parametrize("f", GPO)
def test_the_members_of_gpo_pull_as_much_and_rest_where_the_page_says(f):
  """By one pair of responses: the loss of the algorithm is a function of z = β_f·Δ alone."""
  slope, curvature, least = AT_ZERO[f]
  a, method = config(f=f), algorithms.get("gpo")
  weight = method.role_weights(a)["reference"]
  factor = 2 * a.beta if weight == 1 else 1.0  # of h, which is z

  def loss(z, p):
    h = jnp.stack([z / (weight * factor), jnp.zeros_like(z)]).reshape(1, 2, 1)
    verdict = Verdict(jnp.array([[[0.5, p], [1 - p, 0.5]]]), off(1))
    mean = method.loss(a)(h, {"reference": h}, verdict, role_weights={"reference": weight})
    return mean.total / mean.weight

  with jax.enable_x64(True):
    scale = 1 / (4 * a.beta**2) if factor != 1 else 1.0
    value = jax.jit(loss)
    first, second = jax.jit(jax.grad(loss)), jax.jit(jax.grad(jax.grad(loss)))
    zero = jnp.zeros(())
    np.testing.assert_allclose(first(zero, 1.0), scale * slope, atol=1e-10)
    # Squares have a constant of their own, Online IPO's: their derivatives are those of the page.
    np.testing.assert_allclose(second(zero, 1.0), scale * curvature, atol=1e-10)
    for p in (0.3, 0.6, 0.9):
      best = scipy.optimize.minimize_scalar(
        lambda z, p=p: float(value(jnp.float64(z), p)), bounds=(-5, 5), method="bounded",
        options={"xatol": 1e-10},
      ).x  # fmt: skip
      np.testing.assert_allclose(best, least(p), atol=1e-4)
    for p in (0.0, 0.5, 1.0):  # the pair the other way round
      z = jnp.float64(0.37)
      np.testing.assert_allclose(value(z, p), value(-z, 1 - p), rtol=1e-12)
      np.testing.assert_allclose(first(z, p), -first(-z, 1 - p), rtol=1e-12)


def test_squared_gpo_is_online_ipo_and_logistic_online_dpo_to_the_bit():
  rng = np.random.default_rng(0)
  logp, ref = rng.normal(size=(2, 5, 2, 3)).astype(np.float32)
  p = rng.random(5, np.float32)
  verdict = Verdict(np.stack([[p * 0, p], [1 - p, p * 0]]).transpose(2, 0, 1), off(5))

  def gradient(name, f):
    method, a = algorithms.get(name), config(f=f)
    options = {"role_weights": method.role_weights(a)}
    loss = lambda x: method.loss(a)(x, {"reference": x - ref}, verdict, **options).total  # noqa: E731
    return jax.jit(jax.grad(loss))(logp)

  for f, online in (("squared", "online_ipo"), ("logistic", "online_dpo")):
    np.testing.assert_array_equal(gradient("gpo", f), gradient(online, f))


@pytest.mark.parametrize("name", ["gpo", "best_of_two"])
def test_what_a_file_of_independent_pairs_leads_to(name):
  """IPO: the best response to who wrote the file. Best-of-2: the better of two of its responses."""
  method = algorithms.get(name)
  with jax.enable_x64(True):
    table, rewards, players = game()
    mu, ref = (np.exp(whole(players[x])) for x in ("data", "reference"))
    rest = {
      "gpo": preference.best_response(table, mu, ref, CONFIG.beta),
      "best_of_two": 2 * mu * preference.win_rates(table, mu),
    }[name]
    np.testing.assert_allclose(np.sum(rest, -1), 1, atol=1e-12)
    slope = jax.jit(
      jax.grad(lambda p: enumerated(method, CONFIG, table, rewards, {**players, "policy": p}, 1))
    )
    np.testing.assert_allclose(slope(jnp.log(rest)), 0, atol=1e-10)
    star = preference.equilibrium(table, ref, CONFIG.beta)
    assert np.max(np.abs(slope(jnp.log(star)))) > 1e-3, "it is no equilibrium"


@pytest.mark.parametrize("f", ["logistic", "squared"])
@pytest.mark.parametrize("pairs", [("ab", "bc", "ac"), ("ab", "ba", "ac")])
def test_hard_labels_drive_dpo_from_the_reference_and_ipo_as_far_as_beta_allows(f, pairs):
  """Three actions, the first of a pair wins (Azar et al. 2310.12036, section 5.4)."""
  beta, a = 0.5, config(f=f, beta=0.5)
  places = np.array([["abc".index(letter) for letter in pair] for pair in pairs])
  p_win = np.array([[[0.5, 1], [0, 0.5]]] * 3, np.float32)
  method = algorithms.get("gpo")

  def loss(theta):
    logp = jax.nn.log_softmax(theta)
    ratios = (logp - jnp.log(1 / 3))[places][..., None]
    options = {"role_weights": method.role_weights(a)}
    return method.loss(a)(logp[places][..., None], {"reference": ratios}, Verdict(p_win, off(3)),
                          **options).total  # fmt: skip

  def step(_, theta):
    return theta - 0.1 * jax.grad(loss)(theta)

  with jax.enable_x64(True):
    end = jax.jit(lambda theta: jax.lax.fori_loop(0, 30_000, step, theta))(jnp.zeros(3))
  probs = scipy.special.softmax(end)
  if f == "logistic":
    assert probs[0] > 0.98 if pairs[1] == "bc" else probs[2] < 0.02
  else:
    # Δ is the least-squares fit of 1/(2β): a chain of three, or b as good as a and c behind.
    c = 1 / (2 * beta)
    logits = {"bc": [2 * c / 3, 0, -2 * c / 3], "ba": [0, 0, -c]}[pairs[1]]
    np.testing.assert_allclose(probs, scipy.special.softmax(logits), atol=1e-6)


@pytest.mark.parametrize(
  "options",
  [
    {"samples": 3},
    {"centre_log_ratios": True},
    {"samples": 3, "centre_log_ratios": True},
    {"reward_to_go": True},
    {"reward_to_go": True, "centre_log_ratios": True},
  ],
)
@pytest.mark.parametrize("name", ["nash_mp", "rlhf", "grpo"])
def test_no_option_changes_the_expected_gradient(name, options):
  compare(name, config(**options), length=2)


@pytest.mark.parametrize("name", ["online_ipo", "online_dpo", "nash_md", "egpo"])
def test_more_samples_do_not_change_the_expected_gradient(name):
  compare(name, config(samples=4), length=1)


def test_online_ipo_is_self_play_on_another_scale():
  """Its expected gradient is 2/β times that of regularised self-play (2403.08635)."""
  with jax.enable_x64(True):
    table, rewards, players = game()

    def gradient(name):
      method = algorithms.get(name)
      return jax.jit(
        jax.grad(lambda p: enumerated(method, CONFIG, table, rewards, {**players, "policy": p}, 1))
      )(players["policy"])

    ipo, self_play = gradient("online_ipo"), gradient("reg_self_play")
    np.testing.assert_allclose(ipo, 2 / CONFIG.beta * self_play, atol=1e-10)


@pytest.mark.parametrize("name", ["inpo", "egpo", "nash_md", "mpo", "nash_mp_two_step"])
def test_a_step_in_closed_form_zeroes_the_gradient(name):
  """log π ∝ Σ weight·log role + P(·≻opponent), over Σ weight, where the opponent stands still."""
  a, method = config(samples=3), algorithms.get(name)
  with jax.enable_x64(True):
    table, rewards, players = game()
    if name == "nash_md":  # the mixture follows the policy: a target that stands still instead
      method = algorithms.get("best_response")
    opponent = {"inpo": "target", "egpo": "opponent"}.get(name, method.opponent)
    log = jax.device_get(jax.jit(lambda players: jax.tree.map(whole, players))(players))
    wins = np.einsum("xab,xb->xa", table, np.exp(log[opponent]))
    weights = {**method.role_weights(a)}
    scale = {"inpo": a.step, "egpo": 1 / a.beta}.get(name, 1.0)
    mixed = sum(w * log[role] for role, w in weights.items()) + scale * wins
    best = mixed / sum(weights.values())
    grad = jax.jit(
      jax.grad(lambda p: enumerated(method, a, table, rewards, {**players, "policy": p}, 1))
    )
    np.testing.assert_allclose(grad(best), 0, atol=1e-10)
    assert np.max(np.abs(grad(players["policy"]))) > 1e-2


def test_a_step_down_the_loss_raises_the_win_rate():
  """The win rate over the old policy; with the sign that is printed it would fall."""
  table, rewards, players = game(np.float32)
  method, free = algorithms.get("reg_self_play"), config(beta=0.0)

  @jax.jit
  def won(theta):
    grad = jax.grad(
      lambda p: enumerated(method, free, table, rewards, {**players, "policy": p}, 1)
    )(theta)
    moved = jax.nn.softmax(theta - 0.1 * grad)
    return jnp.mean(jnp.einsum("xa,xab,xb->x", moved, table, jax.nn.softmax(theta)))

  assert won(players["policy"]) > 0.5


def test_a_log_ratio_differentiated_through_its_samples_has_no_gradient():
  """Why ratios are coefficients: the expected gradient of the printed KL term is zero."""
  with jax.enable_x64(True):
    _, _, players = game()

    def printed(theta):
      logp = whole(theta)
      mean = jnp.sum(
        jax.lax.stop_gradient(jnp.exp(logp)) * (logp - whole(players["reference"])), -1
      )
      return jnp.mean(mean)

    np.testing.assert_allclose(jax.jit(jax.grad(printed))(players["policy"]), 0, atol=1e-12)


def test_a_one_token_gemma_has_the_exact_games_gradient():
  """The loss that trains Gemma, on one-token responses, is the exact game's gradient."""
  model = gemma.preset("tiny", num_embed=16)
  forbidden = np.arange(16) >= A
  table, rewards, _ = game(np.float32)
  rng = np.random.default_rng(0)
  params, *frozen = (
    jax.tree.map(lambda s: (0.1 * rng.normal(size=s.shape)).astype(s.dtype), shapes)
    for shapes in [gemma.shapes(model)] * 3
  )
  prompts = Prompts(
    np.array([[0, 5, 6], [5, 7, 8], [0, 0, 9]]),
    np.array([[False, True, True], [True, True, True], [False, False, True]]),
    np.arange(X),
  )
  tokens = np.tile(np.arange(A)[:, None], (X, 1, 1))

  @jax.jit
  def log_policy(params):
    logp, _ = logprobs.response_logprobs(
      params, model, prompts, tokens, np.ones_like(tokens, bool), forbidden=forbidden
    )
    return logp[..., 0]

  method, (ref, target) = algorithms.get("nash_mp"), frozen
  players = {"reference": log_policy(ref), "target": log_policy(target)}
  np.testing.assert_allclose(np.sum(np.exp(log_policy(params)), -1), 1, atol=1e-5)

  @jax.jit
  def both(params):
    logits, pull = jax.vjp(log_policy, params)
    slopes = [
      jax.grad(lambda p, f=f: f(method, CONFIG, table, rewards, {**players, "policy": p}, 1))(
        logits
      )
      for f in (enumerated, regularised)
    ]
    return jax.vmap(pull)(jnp.stack(slopes))[0]  # each slope's gradient in the parameters

  grads = jax.device_get(both(params))
  sampled, exact = (jax.tree.map(lambda g, i=i: g[i], grads) for i in (0, 1))
  assert max(np.max(np.abs(g)) for g in jax.tree.leaves(exact)) > 1e-3
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), sampled, exact)

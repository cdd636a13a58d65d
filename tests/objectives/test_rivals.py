"""Nash-PG and COMAL as settings, and EMAgnet, MNPO, AGRO and ShiQ: where they go, exactly."""

import dataclasses
import itertools

import given_games
import jax
import numpy as np
import pytest
import scipy
from enumeration import CONFIG, config, enumerated, game, whole
from given_games import GAMES
from jax import numpy as jnp
from one_row_policy import make

from nash_jax.games import preference
from nash_jax.objectives import algorithms, losses
from nash_jax.types import Verdict


@pytest.fixture(autouse=True)
def exact():
  with jax.enable_x64(True):
    yield


def normalised(logits):
  return scipy.special.log_softmax(logits)


def proximal_point(setting, name, outer):
  """Returns the policies after each refresh of the reference, and what the inner steps left over.

  The copies are those of the update; between them the expected loss is minimised.
  """
  beta, method = 0.3, {"nash_pg": "reg_self_play", "comal": "inpo"}[setting]
  a = config(beta=beta, step=1.0)
  period = 1 if setting == "nash_pg" else 60
  rule = make(
    algorithm__name=method, algorithm__target_period=1, algorithm__reference_period=period
  )
  slope = jax.jit(given_games.gradient(method, name, a))
  ref = given_games.reference(name)
  roles = {"policy": ref, "reference": ref, "target": ref}
  ends, left = [], []
  for step in range(1, period * outer + 1):
    if setting == "nash_pg":
      roles["policy"] = given_games.equilibrium(name, beta, ref=roles["reference"])
    else:
      wins = GAMES[name] @ np.exp(roles["target"])
      kept = (1 - beta) * roles["target"] + beta * roles["reference"]
      roles["policy"] = normalised(kept + wins)
    if step % (7 * period) == 1:
      left.append(np.max(np.abs(slope(jax.tree.map(jnp.asarray, roles)))))
    copies = dict(rule.copies_due(step))
    roles |= dict.fromkeys(copies, roles["policy"])
    if "reference" in copies:
      ends.append(roles["policy"])
  return ends, left


@pytest.mark.parametrize("setting", ["nash_pg", "comal"])
@pytest.mark.parametrize(
  ("name", "gaps"),
  [
    ("rps", (0.018, 0.0026, 8e-8)),
    pytest.param("r6", (0.036, 0.0089, 4e-6), marks=pytest.mark.slow),
  ],
)
def test_a_refreshed_reference_leads_to_the_game_without_beta(setting, name, gaps):
  """Nash-PG and COMAL: the proximal point; KL from the equilibrium falls with every refresh."""
  ends, left = proximal_point(setting, name, 100)
  assert len(ends) == 100
  assert max(left) < 1e-9, "the inner policies minimise the row's expected loss"
  found = [given_games.gap(name, ends[n - 1]) for n in (5, 20, 100)]
  np.testing.assert_allclose(found[:2], gaps[:2], rtol=0.04)
  assert found[2] < 1.5 * gaps[2]
  star = np.asarray(preference.nash_equilibrium(GAMES[name]))
  on = star > 1e-9
  distances = [np.sum(star[on] * (np.log(star[on]) - end[on])) for end in ends[:60]]
  assert np.all(np.diff(distances) < 0)


def emagnet(name, weight, kappa, steps):
  """Returns log π after gradient steps of 1 on J, the target an EMA."""
  a = config(beta=weight, eta=1.0)
  slope = given_games.gradient("emagnet", name, a)

  def step(_, both):
    policy, target = both
    policy = policy - 0.5 * slope({"policy": policy, "target": target})  # two arms: 2·∇J
    return policy, target + kappa * (policy - target)

  start = jnp.asarray(given_games.reference(name))
  return np.asarray(
    jax.nn.log_softmax(jax.jit(lambda: jax.lax.fori_loop(0, steps, step, (start, start)))()[0])
  )


@pytest.mark.parametrize(("name", "most"), [("rps", 1e-9), ("r6", 5e-4)])
def test_a_slow_magnet_leads_to_the_game_without_beta(name, most):
  assert algorithms.get("emagnet").target_ema(CONFIG)
  assert given_games.gap(name, emagnet(name, 0.1, 0.01, 10_000)) < most


def test_a_fast_magnet_is_stuck_at_a_pure_response():
  """Every one is stationary: nothing else is drawn there."""
  stuck = emagnet("r6", 0.05, 0.1, 20_000)
  assert np.exp(stuck.max()) > 0.99
  assert given_games.gap("r6", stuck) > 0.2
  slope = jax.jit(given_games.gradient("emagnet", "r6", config()))
  for response in range(6):
    pure = jnp.full(6, -20.0).at[response].set(20.0)
    np.testing.assert_allclose(slope({"policy": pure, "target": pure}), 0, atol=1e-12)


@pytest.mark.parametrize(("name", "inpo", "both"), [("rps", 0.0039, 5e-8), ("r6", 8e-7, 2e-9)])
def test_two_centres_damp_the_rotation_that_one_has(name, inpo, both):
  """MNPO at s = 5: KL(π*_β‖π) after 21 steps in closed form, each a minimum of the row's loss."""
  ref, star, left = given_games.reference(name), given_games.equilibrium(name), []
  for history, expected in ((0.0, inpo), (0.5, both)):
    a = given_games.settings(step=5.0, history=history)
    slope = jax.jit(given_games.gradient("mnpo", name, a))
    roles = {"reference": ref, "target": ref, "older": ref}
    for _ in range(21):
      centre = (1 - history) * roles["target"] + history * roles["older"]
      wins = GAMES[name] @ np.exp(roles["target"])
      policy = normalised(0.5 * ref + 0.5 * centre + 5.0 * wins)
      left.append(np.max(np.abs(slope(jax.tree.map(jnp.asarray, {**roles, "policy": policy})))))
      roles = {"reference": ref, "target": policy, "older": roles["target"]}
    assert given_games.kl(star, policy) == pytest.approx(expected, rel=0.1)
  assert max(left) < 1e-10


def test_mnpo_of_one_policy_is_inpo_to_the_bit():
  rng = np.random.default_rng(0)
  logp, *base = rng.normal(size=(4, 5, 2, 3)).astype(np.float32)
  p = rng.random(5, np.float32)
  valid = np.tile(~np.eye(2, dtype=bool), (5, 1, 1))
  verdict = Verdict(np.stack([[p * 0, p], [1 - p, p * 0]]).transpose(2, 0, 1), valid)

  def gradient(name):
    method, a = algorithms.get(name), config(history=0.0)
    options = {"role_weights": method.role_weights(a)}
    roles = dict(zip(("reference", "target", "older"), base, strict=True))

    def loss(x):
      ratios = {role: x - roles[role] for role in options["role_weights"]}
      return method.loss(a)(x, ratios, verdict, **options).total

    return jax.jit(jax.grad(loss))(logp)

  np.testing.assert_array_equal(gradient("mnpo"), gradient("inpo"))


def test_agro_reaches_the_optimum_on_anybodys_responses():
  """Of π_ref's, where a policy gradient without a baseline ends elsewhere (AGRO's Figure 1)."""
  rewards = 5 * np.random.default_rng(0).normal(size=6)
  a, ref = given_games.settings(beta=0.5), given_games.reference("r6")
  best = normalised(ref + rewards / a.beta)
  method = dataclasses.replace(algorithms.get("agro"), player="reference")
  slope = given_games.gradient(method, "r6", a, rewards)

  def naive(roles):
    def loss(theta):
      logp = jax.nn.log_softmax(theta)
      u = jax.lax.stop_gradient(rewards - a.beta * (logp - ref))
      return -jnp.sum(np.exp(ref) * u * logp)

    return jax.grad(loss)(roles["policy"])

  def descended(slope, rate):
    def step(_, theta):
      return theta - rate * slope({"policy": theta, "reference": jnp.asarray(ref)})

    return jax.nn.log_softmax(jax.jit(lambda x: jax.lax.fori_loop(0, 1000, step, x))(ref))

  assert given_games.kl(best, descended(slope, 0.5)) < 1e-12
  assert given_games.kl(best, descended(naive, 0.2)) > 0.3


def test_agro_is_a_policy_gradient_with_a_baseline():
  """Its gradient is −(4/β)·E[(u − ū)∇log π] with u = R − β log π/π_ref."""
  table, rewards, players = game()
  method = algorithms.get("agro")

  def stated(theta):
    logp = whole(theta)
    fixed = jax.lax.stop_gradient(logp)
    u = rewards - CONFIG.beta * (fixed - whole(players["reference"]))
    pi = jnp.exp(fixed)
    centred = u - jnp.sum(pi * u, -1, keepdims=True)
    return -4 / CONFIG.beta * jnp.mean(jnp.sum(pi * centred * logp, -1))

  def both(p):
    expected = enumerated(method, CONFIG, table, rewards, {**players, "policy": p}, 1)
    return jnp.stack([expected, stated(p)])

  got, expected = jax.jit(jax.jacrev(both))(players["policy"])
  np.testing.assert_allclose(got, expected, atol=1e-10)


@pytest.mark.parametrize("law", ["uniform", pytest.param("skewed", marks=pytest.mark.slow)])
def test_shiq_solves_a_tree_of_three_tokens_from_any_law(law):
  """To zero: π = π_ref·exp(R/β)/Z, and the root's log-normaliser has moved by log Z."""
  beta, shape = 0.4, (3, 3, 3)
  rng = np.random.default_rng(0)
  rewards = rng.normal(size=shape)
  sizes = [(), (3,), (3, 3)]
  splits = np.cumsum([3 * int(np.prod(size)) for size in sizes])[:-1]
  mu = np.ones(shape) / 27 if law == "uniform" else rng.dirichlet(np.full(27, 0.6)).reshape(shape)
  paths = np.array(list(itertools.product(range(3), repeat=3)))

  def tokens(theta):
    """Returns log-probabilities and log-normalisers [27 L] of every path's tokens."""
    tables = [t.reshape(*size, 3) for t, size in zip(jnp.split(theta, splits), sizes, strict=True)]
    logits = [tables[t][tuple(paths[:, :t].T)] for t in range(3)]
    logits = jnp.stack([jnp.broadcast_to(x, (27, 3)) for x in logits], axis=1)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    return jnp.take_along_axis(logits, paths[..., None], -1)[..., 0] - log_z, log_z

  ref = jnp.asarray(rng.normal(size=39))
  logp_ref, log_z_ref = tokens(ref)
  verdict = Verdict(
    jnp.full((27, 2, 2), 0.5),
    jnp.tile(~jnp.eye(2, dtype=bool), (27, 1, 1)),
    jnp.repeat(rewards.reshape(27, 1), 2, axis=1),
  )

  def loss(theta):
    logp, log_z = tokens(theta)

    def twice(x):  # a path is both of a prompt's responses
      return jnp.repeat(x[:, None], 2, axis=1)

    ratios = {"reference": twice(logp - logp_ref), "normaliser": twice(log_z - log_z_ref)}
    each = jax.vmap(
      lambda logp, ratios, verdict: losses.soft_q(
        logp[None],
        jax.tree.map(lambda x: x[None], ratios),
        jax.tree.map(lambda x: x[None], verdict),
        role_weights={"reference": beta},
      ).value()
    )(twice(logp), ratios, verdict)
    return jnp.sum(mu.reshape(27) * (each + 3 * rewards.reshape(27) ** 2))

  value_and_slope = jax.jit(jax.value_and_grad(loss))
  np.testing.assert_allclose(value_and_slope(ref)[0], 3 * np.sum(mu * rewards**2), rtol=1e-12)
  found = scipy.optimize.minimize(
    lambda theta: jax.device_get(value_and_slope(jnp.asarray(theta))), ref, jac=True,
    method="L-BFGS-B", options={"maxiter": 5000, "maxfun": 20000, "ftol": 0, "gtol": 1e-14},
  )  # fmt: skip
  logp, log_z = tokens(jnp.asarray(found.x))
  optimum = jnp.sum(logp_ref, -1) + rewards.reshape(27) / beta
  log_sum = jax.nn.logsumexp(optimum)
  assert found.fun < 1e-13
  np.testing.assert_allclose(jnp.sum(logp, -1), optimum - log_sum, atol=1e-4)
  np.testing.assert_allclose((log_z - log_z_ref)[0, 0], log_sum, atol=1e-5)

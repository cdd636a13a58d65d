import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy
from hypothesis import given, settings
from hypothesis import strategies as st

from nash_jax.games import preference, proximal, solvers, zoo

EXACT = solvers.Draws(None)
kl, suboptimality = jax.jit(preference.kl), jax.jit(preference.suboptimality)
BOTH = [("proximal", m) for m in solvers.PROXIMAL] + [("gradient", m) for m in solvers.GRADIENT]


def _game(seed, actions=5, beta=0.1, strength=2.0, contexts=None):
  rng = np.random.default_rng(seed)
  shape = () if contexts is None else (contexts,)
  ref = rng.dirichlet(np.full(actions, 3.0), size=shape) + 1e-2
  game = zoo.random_game(seed, actions, strength=strength, contexts=contexts)
  return solvers.Game(game.p_win, np.log(ref / ref.sum(-1, keepdims=True)), np.asarray(beta))


def _policy(seed, like):
  logits = np.random.default_rng(seed).normal(size=like.shape)
  return scipy.special.log_softmax(logits, axis=-1)


def _one_step(updates, method, game, state, batch=0, inner=3, **knobs):
  values = {"step": 0.7, "eta": 0.3, "kappa": 0.4, "mixture": 0.25} | knobs
  now = solvers.Knobs(**{name: np.asarray(value, float) for name, value in values.items()})
  if updates == "proximal":
    return jax.jit(solvers.PROXIMAL[method])(state, game, now)

  @jax.jit
  def step(state, game, now):
    draws = solvers.Draws(jax.random.key(1), batch, inner)
    return solvers.GRADIENT[method](state, game, now, draws)

  return step(state, game, now)


def _objective(game, logits, opponent):
  """Loss of regularised self-play with a frozen opponent."""
  logp = jax.nn.log_softmax(logits)
  wins = game.p_win @ jnp.exp(opponent)
  return -jnp.exp(logp) @ wins + game.beta * preference.kl(logp, game.log_ref)


# Identities.


@jax.jit
def _slope_at_the_closed_step(game, base, opponent, eta):
  closed = proximal.prox(game, eta / (game.beta * (1 + eta)), base, opponent)

  def prox(logits):
    return _objective(game, logits, opponent) + game.beta / eta * preference.kl(
      jax.nn.log_softmax(logits), base
    )

  return jax.grad(prox)(closed)


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.sampled_from([0.02, 0.1, 1.0]), st.sampled_from([0.01, 0.5, 3.0]))
def test_the_closed_step_zeroes_the_gradient_of_its_prox_objective(seed, beta, eta):
  game = _game(seed, beta=beta)
  base, opponent = _policy(seed, game.log_ref), _policy(seed + 1, game.log_ref)
  slope = _slope_at_the_closed_step(game, base, opponent, eta)
  np.testing.assert_allclose(slope, np.zeros(5), atol=1e-12)


@pytest.mark.parametrize(("updates", "method"), BOTH)
def test_the_equilibrium_is_a_fixed_point_of_methods_for_the_regularised_game(updates, method):
  game = _game(2, beta=0.1, contexts=2)
  star = np.log(preference.equilibrium(game.p_win, np.exp(game.log_ref), 0.1))
  logp, _ = _one_step(updates, method, game, solvers.State(star, star, np.asarray(0)), step=0.3)
  moved = np.abs(np.exp(logp) - np.exp(star)).max()
  if (updates, method) in [
    ("proximal", "mpo"),
    ("proximal", "mwu"),
    ("proximal", "omwu"),
    ("proximal", "nash_md"),
    ("gradient", "nash_md"),
    ("gradient", "online_dpo"),
  ]:
    assert moved > 1e-4  # these solve another game, or none: mixtures, no β, a reward
  else:
    assert moved < 1e-12


def test_nash_md_keeps_the_equilibrium_as_its_step_falls():
  game = _game(2)
  star = np.log(preference.equilibrium(game.p_win, np.exp(game.log_ref), 0.1))
  moved = []
  for step in (1e-1, 1e-2, 1e-3):
    logp, _ = _one_step("proximal", "nash_md", game, solvers.State(star, star, 0), step=step)
    moved.append(float(preference.span(logp, star)) / step)
  assert moved[0] > 5 * moved[1] > 25 * moved[2]


@jax.jit
def _enumerated_and_differentiated(game, logp, target, opponent):
  def with_centre(v):
    return _objective(game, v, logp) + game.beta / 0.3 * preference.kl(
      jax.nn.log_softmax(v), target
    )

  estimate = functools.partial(solvers.gradient, "policy_gradient", game, logp, EXACT)
  return [
    (estimate(), jax.grad(lambda v: _objective(game, v, logp))(logp)),
    (estimate(centre=target, eta=0.3), jax.grad(with_centre)(logp)),
    (estimate(opponent=opponent), jax.grad(lambda v: _objective(game, v, opponent))(logp)),
  ]


@settings(max_examples=15)
@given(st.integers(0, 10**6))
def test_the_enumerated_estimator_is_the_gradient_of_its_objective(seed):
  game = _game(seed)
  players = (_policy(seed + i, game.log_ref) for i in range(3))
  for estimate, grad in _enumerated_and_differentiated(game, *players):
    np.testing.assert_allclose(estimate, grad, atol=1e-14)


@pytest.mark.parametrize("kind", ["ipo", "dpo", "egpo"])
def test_regression_gradients_are_those_of_their_printed_losses(kind):
  game = _game(4)
  logp, third = _policy(5, game.log_ref), _policy(6, game.log_ref)
  weights = np.full(5, 0.2) if kind == "egpo" else np.exp(logp)

  def loss(v):
    r = jax.nn.log_softmax(v) - game.log_ref
    margin = r[:, None] - r[None, :]
    wins = game.p_win @ np.exp(third)
    each = {
      "ipo": (margin - (game.p_win - 0.5) / game.beta) ** 2,
      "dpo": -(
        game.p_win * jax.nn.log_sigmoid(game.beta * margin)
        + (1 - game.p_win) * jax.nn.log_sigmoid(-game.beta * margin)
      ),
      "egpo": (margin - (wins[:, None] - wins[None, :]) / game.beta) ** 2,
    }[kind]
    return weights @ each @ weights

  coefficients = "logistic" if kind == "dpo" else "regression"

  @jax.jit
  def estimate(logp):
    judge = third if kind == "egpo" else None
    return solvers.gradient(coefficients, game, logp, EXACT, judge=judge)

  np.testing.assert_allclose(estimate(logp), jax.jit(jax.grad(loss))(logp), atol=1e-12)


@pytest.mark.parametrize("method", list(solvers.GRADIENT))
def test_sampled_gradients_have_the_exact_ones_as_their_mean(method):
  game, contexts, draws = _game(7, contexts=2), 2, 400
  state = solvers.State(_policy(8, game.log_ref), _policy(9, game.log_ref), np.asarray(0))
  knobs = solvers.Knobs(*(np.asarray(v) for v in (1e-4, 0.3, 0.4, 0.25)))  # to first order

  @functools.partial(jax.jit, static_argnums=1)
  def move(key, batch):
    new = solvers.GRADIENT[method](state, game, knobs, solvers.Draws(key, batch, 1))[0]
    return (new - new.mean(-1, keepdims=True)) - (state.logp - state.logp.mean(-1, keepdims=True))

  keys = jax.random.split(jax.random.key(0), draws)
  sampled = np.asarray(jax.jit(jax.vmap(lambda key: move(key, 50)))(keys))
  exact = np.asarray(move(jax.random.key(0), 0))
  error = np.std(sampled, 0) / draws**0.5
  assert sampled.shape == (draws, contexts, 5)
  assert np.max(np.abs(sampled.mean(0) - exact) / error) < 4.5
  assert np.max(np.abs(exact) / error) > 4.5  # so that a zero would have failed


def test_self_play_is_online_ipo_at_the_stated_rate():
  game = _game(10)
  state = solvers.State(_policy(11, game.log_ref), game.log_ref, np.asarray(0))
  self_play, _ = _one_step("gradient", "reg_self_play", game, state, step=4 * 0.02 / 0.1)
  ipo, _ = _one_step("gradient", "online_ipo", game, state, step=0.02)
  np.testing.assert_allclose(self_play, ipo, atol=1e-13)


@pytest.mark.parametrize("method", ["egpo", "mmd"])
def test_exact_regression_on_uniform_pairs_is_the_proximal_update(method):
  game = _game(12)
  state = solvers.State(_policy(13, game.log_ref), game.log_ref, np.asarray(0))
  prox, _ = _one_step("proximal", method, game, state, step=0.8)
  regressed, _ = _one_step("gradient", method, game, state, step=0.8 * 5 * 0.1 / 4)
  np.testing.assert_allclose(regressed, prox, atol=1e-13)


def test_the_target_decides_between_self_play_and_a_frozen_centre():
  game = _game(14)
  state = solvers.State(_policy(15, game.log_ref), _policy(16, game.log_ref), np.asarray(0))
  new, frozen = _one_step("gradient", "nash_mp", game, state, kappa=0.0)
  np.testing.assert_allclose(frozen, state.other, atol=1e-15)
  _, copied = _one_step("gradient", "nash_mp", game, state, kappa=1.0)
  np.testing.assert_allclose(copied, new, atol=1e-15)
  self_play, _ = _one_step("gradient", "reg_self_play", game, state)
  follower = state._replace(other=state.logp)  # κ = 1: the target is the policy itself
  np.testing.assert_allclose(
    _one_step("gradient", "nash_mp", game, follower)[0], self_play, atol=1e-15
  )


def test_many_inner_steps_are_the_two_closed_half_steps():
  game = _game(17)
  state = solvers.State(_policy(18, game.log_ref), game.log_ref, np.asarray(0))
  eta = 0.2
  closed, half = _one_step("proximal", "nash_mp", game, state, step=eta / (0.1 * (1 + eta)))
  inner, middle = _one_step(
    "gradient", "nash_mp_two_step", game, state, step=1.0, eta=eta, inner=3000
  )
  np.testing.assert_allclose(middle, half, atol=1e-11)
  np.testing.assert_allclose(inner, closed, atol=1e-11)


# Convergence.


@settings(max_examples=12)
@given(st.integers(0, 10**6), st.sampled_from([0.03, 0.1, 0.45]), st.sampled_from([2, 5, 11]))
def test_kl_falls_every_iteration_within_the_theorem(seed, beta, actions):
  game = _game(seed, actions, beta, strength=6.0)
  star = np.log(preference.equilibrium(game.p_win, np.exp(game.log_ref), beta))
  step = jax.jit(solvers.nash_mp)
  knobs = solvers.Knobs(2 / (1 + 2 * beta), 0.0, 0.0, 0.0)
  state, distance = solvers.init(game.log_ref), kl(star, game.log_ref)
  for k in range(1, 31):
    logp, half = step(state, game, knobs)
    state = solvers.State(logp, half, state.k + 1)
    closer = kl(star, logp)
    assert float(closer) < float(distance) or float(distance) < 1e-24
    assert float(closer) <= (1 + 2 * beta) ** -k / (2 * beta)
    distance = closer


SURE = [
  ("proximal", "nash_mp", 400, 1e-12),
  ("proximal", "proximal_point", 200, 1e-12),
  ("proximal", "egpo", 20_000, 1e-5),
  ("proximal", "mmd", 3_000, 1e-9),
  ("proximal", "nash_md", 2_000, 1e-2),
  ("proximal", "fictitious_play", 2_000, 2e-3),
  ("gradient", "nash_mp_two_step", 2_000, 1e-4),
]


@pytest.mark.parametrize(("updates", "method", "iterations", "atol"), SURE)
def test_methods_that_claim_convergence_reach_the_equilibrium_of_every_zoo_game(
  updates, method, iterations, atol
):
  beta, games = 0.2, sorted(zoo.menagerie(), key=lambda game: len(game.p_win))
  for actions, alike in itertools.groupby(games, lambda game: len(game.p_win)):
    if method == "egpo" and actions > 10:
      continue  # its theory's step is 1/(1 + β + 2A): too slow to wait for here
    p_win = np.stack([game.p_win for game in alike])
    ref = np.arange(1, actions + 1.0) / np.arange(1, actions + 1.0).sum()
    star = preference.equilibrium(p_win, ref, beta)
    logp, curve = solvers.solve(
      method, p_win, ref, beta=beta, iterations=iterations, updates=updates, every=iterations
    )
    np.testing.assert_allclose(np.exp(logp), star, atol=atol, err_msg=f"{actions} actions")
    np.testing.assert_allclose(curve[-1], suboptimality(p_win, np.exp(logp), ref, beta), atol=1e-14)


@settings(max_examples=10)
@given(st.integers(0, 10**6), st.sampled_from([0.05, 0.3]))
def test_nash_mp_reaches_the_equilibrium_of_random_games(seed, beta):
  game = _game(seed, 7, beta, strength=5.0, contexts=2)
  star = preference.equilibrium(game.p_win, np.exp(game.log_ref), beta)
  logp, _ = solvers.solve("nash_mp", game.p_win, np.exp(game.log_ref), beta=beta, iterations=800)
  np.testing.assert_allclose(np.exp(logp), star, atol=1e-12)


@pytest.mark.parametrize(
  ("method", "step"), [("reg_self_play", 4.0), ("online_ipo", 0.2), ("nash_mp_ema", 4.0)]
)
def test_gradient_methods_reach_the_equilibrium_at_a_good_step(method, step):
  game = _game(1, beta=0.2)
  star = preference.equilibrium(game.p_win, np.exp(game.log_ref), 0.2)
  logp, _ = solvers.solve(
    method, game.p_win, np.exp(game.log_ref), beta=0.2, iterations=4000, step=step, kappa=0.1
  )
  np.testing.assert_allclose(np.exp(logp), star, atol=1e-8)


def test_online_dpo_finds_the_reward_policy_and_misses_a_cyclic_equilibrium():
  ref = np.full(6, 1 / 6)
  transitive = zoo.random_game(0, 6, cyclicity=0.0, strength=0.3)
  logp, _ = solvers.solve(
    "online_dpo", transitive.p_win, ref, beta=0.5, iterations=20_000, step=20.0
  )
  rewards = np.asarray(preference.bradley_terry(transitive.p_win))
  reward_policy = scipy.special.softmax(rewards / 0.5)
  np.testing.assert_allclose(np.exp(logp), reward_policy, atol=1e-6)
  cyclic = zoo.random_game(1, 6, strength=2.0)
  _, curve = solvers.solve("online_dpo", cyclic.p_win, ref, beta=0.1, iterations=20_000, step=2.0)
  assert float(curve[-1]) > 1e-3


def test_the_original_game_is_solved_by_optimism_and_magnets_and_not_by_mwu():
  game, ref = zoo.rock_paper_scissors(0.5, 1.0, 0.6), np.array([0.6, 0.3, 0.1])
  optimism, _ = solvers.solve(
    "omwu", game.p_win, ref, beta=0.0, iterations=20_000, every=20_000, step=1.0
  )
  np.testing.assert_allclose(np.exp(optimism), game.nash, atol=1e-8)
  magnets, _ = solvers.solve("mpo", game.p_win, ref, beta=0.2, iterations=20_000, every=20_000)
  np.testing.assert_allclose(np.exp(magnets), game.nash, atol=1e-6)
  _, drift = solvers.solve("mwu", game.p_win, ref, beta=0.0, iterations=20_000, step=0.125)
  assert float(drift[-1]) > float(drift[0])
  mean, curve = solvers.solve("fictitious_play", game.p_win, ref, beta=0.0, iterations=20_000)
  assert float(curve[-1]) < 1e-2 < float(curve[0])
  np.testing.assert_allclose(np.exp(mean).sum(), 1, atol=1e-12)


# The mechanics.


@pytest.mark.parametrize(("updates", "method"), BOTH)
def test_renaming_actions_renames_the_answer(updates, method):
  game = _game(20, beta=0.3)
  order = np.array([3, 0, 4, 1, 2])
  renamed = solvers.Game(game.p_win[order][:, order], game.log_ref[order], game.beta)
  one, other = (
    np.asarray(
      solvers.solve(method, g.p_win, np.exp(g.log_ref), beta=0.3, iterations=20, updates=updates)[0]
    )
    for g in (game, renamed)
  )
  np.testing.assert_allclose(one[order], other, atol=1e-12)
  assert np.abs(one - game.log_ref).max() > 1e-3


@pytest.mark.parametrize(("updates", "method"), BOTH)
def test_contexts_do_not_touch_each_other(updates, method):
  game = _game(21, contexts=3)
  together, curve = solvers.solve(
    method, game.p_win, np.exp(game.log_ref), beta=0.1, iterations=20, updates=updates
  )
  alone = [
    solvers.solve(method, p, np.exp(r), beta=0.1, iterations=20, updates=updates)
    for p, r in zip(game.p_win, game.log_ref, strict=True)
  ]
  np.testing.assert_allclose(together, np.stack([a[0] for a in alone]), atol=1e-12)
  np.testing.assert_allclose(curve, np.mean([a[1] for a in alone], 0), atol=1e-12)


def test_a_grid_over_games_and_knobs_is_one_call_and_one_compilation():
  games = jax.tree.map(lambda *leaves: np.stack(leaves), *[_game(s) for s in range(3)])
  steps = np.array([0.1, 0.5, 1.5])

  def one(game, step):
    knobs = solvers.Knobs(step, 0.2, 1.0, 0.25)
    return solvers.run("nash_mp", "proximal", game, knobs, jax.random.key(0), points=30)[1]

  grid = jax.jit(jax.vmap(jax.vmap(one, (None, 0)), (0, None)))
  curves = np.asarray(grid(games, steps))
  assert curves.shape == (3, 3, 30)
  single, _ = _solve_curve(_game(1), 0.5)
  np.testing.assert_allclose(curves[1, 1], single, rtol=1e-9, atol=1e-20)
  grid(games, steps / 2)
  assert grid._cache_size() == 1


def _solve_curve(game, step):
  logp, curve = solvers.solve(
    "nash_mp", game.p_win, np.exp(game.log_ref), beta=0.1, iterations=30, step=step
  )
  return curve, logp


def test_schedules_are_read_at_their_iteration():
  assert solvers.harmonic(3)[0] == 1.0
  np.testing.assert_array_equal(solvers.periodic(2, 5), [0, 1, 0, 1, 0])
  game = _game(22)
  constant, _ = solvers.solve(
    "mmd", game.p_win, np.exp(game.log_ref), beta=0.1, iterations=6, step=0.4
  )
  listed, _ = solvers.solve(
    "mmd", game.p_win, np.exp(game.log_ref), beta=0.1, iterations=6, step=np.full(6, 0.4)
  )
  np.testing.assert_array_equal(constant, listed)
  halted, _ = solvers.solve(
    "mmd",
    game.p_win,
    np.exp(game.log_ref),
    beta=0.1,
    iterations=6,
    step=np.array([0.4, 0.4, 0.4, 1e-300, 1e-300, 1e-300]),
  )
  three, _ = solvers.solve(
    "mmd", game.p_win, np.exp(game.log_ref), beta=0.1, iterations=3, step=0.4
  )
  np.testing.assert_allclose(halted, three, atol=1e-15)


def test_the_same_key_draws_the_same_run():
  game = _game(23)
  runs = [
    solvers.solve(
      "nash_mp_ema",
      game.p_win,
      np.exp(game.log_ref),
      beta=0.1,
      iterations=20,
      batch=4,
      key=jax.random.key(seed),
    )[0]
    for seed in (0, 0, 1)
  ]
  np.testing.assert_array_equal(runs[0], runs[1])
  assert np.abs(np.subtract(runs[0], runs[2])).max() > 1e-3


def test_the_curve_is_sampled_without_changing_the_run():
  game = _game(24)
  fine, curve = solvers.solve("egpo", game.p_win, np.exp(game.log_ref), beta=0.1, iterations=20)
  coarse, points = solvers.solve(
    "egpo", game.p_win, np.exp(game.log_ref), beta=0.1, iterations=20, every=5
  )
  np.testing.assert_array_equal(fine, coarse)
  np.testing.assert_array_equal(np.asarray(curve)[4::5], points)


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    ({"method": "nash"}, "choices: egpo, fictitious_play"),
    ({"method": "mwu", "updates": "gradient"}, "choices: proximal"),
    ({"updates": "proximal", "batch": 3}, "batch=0"),
    ({"method": "reg_self_play", "beta": 0.0}, "give step"),
    ({"method": "nash_md", "beta": 0.0}, "give step"),
    ({"iterations": 5, "every": 2}, "multiple"),
    ({"step": np.ones(4)}, "iterations=6"),
    ({"ref": np.array([0.5, 0.5, 0, 0, 0])}, "full support"),
    ({"p_win": np.ones((5, 5))}, "worst entry"),
  ],
)
def test_bad_arguments_are_refused_with_the_choices(arguments, words):
  given = {
    "method": "nash_mp",
    "p_win": np.full((5, 5), 0.5),
    "ref": np.full(5, 0.2),
    "beta": 0.1,
    "iterations": 6,
  } | arguments
  with pytest.raises(ValueError, match=words):
    solvers.solve(given.pop("method"), given.pop("p_win"), given.pop("ref"), **given)


@pytest.mark.parametrize("contexts", [None, 3])
def test_the_names_others_build_on(contexts):
  game = _game(25, contexts=contexts)
  ref = np.exp(game.log_ref)
  star = preference.equilibrium(game.p_win, ref, 0.1)
  logp, curve = solvers.solve("nash_mp", game.p_win, ref, beta=0.1, iterations=300, step=None)
  assert star.shape == logp.shape == ref.shape
  assert curve.shape == (300,)
  np.testing.assert_allclose(np.exp(logp), star, atol=1e-12)
  found = suboptimality(game.p_win, star, ref, 0.1)
  assert found.shape == ()
  assert float(found) < 1e-24

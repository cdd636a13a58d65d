"""Every public function refuses what it has no meaning for, and says what it expected."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from refusals import refused

from nash_jax.games import contextual, preference, solvers, zoo

P = zoo.random_game(0, 3).p_win
REF = np.array([0.2, 0.3, 0.5])
LOG = np.log(REF)
GAME = solvers.Game(P, LOG, np.asarray(0.1))
STATE = solvers.State(LOG, LOG, np.asarray(0))
KNOBS = solvers.Knobs(0.5, 0.2, 0.1, 0.25)
NOT_A_GAME = {
  "payoff": 2 * P - 1,
  "nan": np.where(np.eye(3) > 0, np.nan, P),
  "bool": np.full((3, 3), True),
  "text": np.full((3, 3), "a"),
  "object": np.full((3, 3), None),
  "complex": P + 0j,
  "ragged": [[0.5], [0.5, 0.5]],
  "vector": REF,
  "empty": np.zeros((0, 0)),
  "none": None,
  "ones": np.ones((3, 3), int),
  "huge": P * 1e9,
}
NOT_A_POLICY = {
  "negative": [-0.1, 0.6, 0.5],
  "unnormalised": [1.0, 2.0, 3.0],
  "nan": [np.nan, 0.5, 0.5],
  "zeros": [0.0, 0.0, 0.0],
  "short": [0.5, 0.5],
  "scalar": 1.0,
  "text": "abc",
  "bool": [True, False, False],
  "matrix": np.full((2, 3), 1 / 3),
  "infinite": [np.inf, 0.0, 0.0],
}
NOT_A_BETA = [np.nan, -0.1, np.inf, -np.inf, "0.1", None, True, [0.1, 0.2], 1j]


@pytest.mark.parametrize("kind", NOT_A_GAME)
def test_what_is_no_game_is_refused_by_every_function_that_takes_one(kind):
  game = NOT_A_GAME[kind]
  for call in (
    preference.validate,
    preference.nash_equilibrium,
    preference.bradley_terry,
    preference.intransitive_residue,
    preference.cyclic_energy,
    lambda p: preference.equilibrium(p, REF, 0.1),
    lambda p: preference.suboptimality(p, REF, REF, 0.1),
    lambda p: preference.exploitability(p, REF),
    lambda p: preference.value(p, REF, REF),
    lambda p: preference.win_rates(p, REF),
    lambda p: preference.gap(p, LOG, LOG, 0.1),
    lambda p: preference.best_response(p, REF, REF, 0.1),
    lambda p: solvers.solve("nash_mp", p, REF, beta=0.1, iterations=2),
    lambda p: solvers.run("nash_mp", "proximal", GAME._replace(p_win=p), KNOBS, None, points=2),
    lambda p: solvers.nash_mp(STATE, GAME._replace(p_win=p), KNOBS),
  ):
    refused(lambda call=call: call(game))


@pytest.mark.parametrize("kind", NOT_A_POLICY)
def test_what_is_no_policy_is_refused_as_policy_and_as_reference(kind):
  policy = NOT_A_POLICY[kind]
  for call in (
    lambda p: preference.suboptimality(P, p, REF, 0.1),
    lambda p: preference.suboptimality(P, REF, p, 0.1),
    lambda p: preference.equilibrium(P, p, 0.1),
    lambda p: preference.reference(p, (3,)),
    lambda p: preference.exploitability(P, p),
    lambda p: solvers.solve("nash_mp", P, p, beta=0.1, iterations=2),
  ):
    refused(lambda call=call: call(policy))
  if kind != "matrix":  # a policy a context
    for call in (
      lambda p: preference.win_rates(P, p),
      lambda p: preference.value(P, p, REF),
      lambda p: preference.value(P, REF, p),
      lambda p: preference.best_response(P, p, REF, 0.1),
      lambda p: preference.best_response(P, REF, p, 0.1),
    ):
      refused(lambda call=call: call(policy))


@pytest.mark.parametrize(
  "log",
  [
    [np.nan, 0, 0],
    [0.0, 0.0, 0.0],
    [-1.0, -2.0, 3.0],
    [-np.inf] * 3,
    [True, False, False],
    "abc",
    [0.0, -np.inf],
  ],
)
def test_what_is_no_log_policy_is_refused(log):
  for call in (
    lambda p: preference.gap(P, p, LOG, 0.1),
    lambda p: preference.gap(P, LOG, p, 0.1),
    lambda p: preference.kl(p, LOG),
    lambda p: preference.kl(LOG, p),
    lambda p: preference.span(p, LOG),
    lambda p: preference.span(LOG, p),
    lambda p: solvers.run("nash_mp", "proximal", GAME._replace(log_ref=p), KNOBS, None, points=2),
  ):
    refused(lambda call=call: call(np.asarray(log)))


def test_a_reference_without_support_is_refused_and_a_tiny_one_used_or_refused():
  for call in (
    lambda ref: preference.suboptimality(P, REF, ref, 0.1),
    lambda ref: preference.best_response(P, REF, ref, 0.1),
    lambda ref: preference.equilibrium(P, ref, 0.1),
  ):
    refused(lambda call=call: call([0.0, 0.5, 0.5]), "full support")
    with contextlib.suppress(ValueError):  # some of XLA's devices hold such numbers, some do not
      assert np.all(np.isfinite(call([5e-324, 0.5, 0.5])))
  star = preference.equilibrium(P, [1e-310, 0.5, 0.5], 0.1)  # numpy does
  np.testing.assert_allclose(star[1:], preference.equilibrium(P[1:, 1:], [0.5, 0.5], 0.1))
  with jax.enable_x64(False):  # where float32 has no such number
    refused(lambda: preference.suboptimality(P, REF, [1e-60, 0.5, 0.5], 0.1), "float32")


@pytest.mark.parametrize("beta", NOT_A_BETA, ids=repr)
def test_what_is_no_beta_is_refused(beta):
  calls = (
    lambda: preference.suboptimality(P, REF, REF, beta),
    lambda: preference.equilibrium(P, REF, beta),
    lambda: preference.best_response(P, REF, REF, beta),
    lambda: solvers.solve("nash_mp", P, REF, beta=beta, iterations=2),
    lambda: solvers.solve("nash_mp", P, REF, beta=beta, iterations=2, step=0.5),
    lambda: solvers.theory("nash_mp", "proximal", beta, 3, 10),
    lambda: solvers.unit("online_dpo", "gradient", beta),
    lambda: contextual.make_games([0], contexts=1, actions=3, rank=2, strength=1.0, beta=beta),
    lambda: contextual.grid(contextual.Entrant("x", "nash_md", "gradient", {}), [1.0], beta, 5),
  )
  for call in calls:
    refused(call, "beta")
  if not isinstance(beta, list):
    refused(lambda: preference.gap(P, LOG, LOG, beta), "beta")
    refused(
      lambda: solvers.run("nash_mp", "proximal", GAME._replace(beta=beta), KNOBS, None, points=2),
      "beta",
    )


@pytest.mark.parametrize("beta", [0, 0.0])
def test_a_beta_of_0_is_refused_where_it_divides(beta):
  for call in (
    lambda: preference.equilibrium(P, REF, beta),
    lambda: preference.best_response(P, REF, REF, beta),
    lambda: solvers.unit("online_dpo", "gradient", beta),
  ):
    refused(call, "beta")
  for method in ("online_ipo", "online_dpo", "mmd", "egpo"):
    refused(
      lambda m=method: solvers.solve(
        m, P, REF, beta=beta, iterations=2, step=0.1, updates="gradient"
      ),
      "beta",
    )
  refused(lambda: solvers.solve("nash_mp_ema", P, REF, beta=beta, iterations=2, step=0.1), "eta")


@pytest.mark.parametrize(
  ("method", "given", "word"),
  [
    *[("nash_mp", {"step": bad}, "step") for bad in (np.nan, np.inf, 0, -1.0, "1", True, [[0.1]])],
    *[("nash_mp_ema", {"eta": bad}, "eta") for bad in (np.nan, 0, -1.0, "1")],
    *[("nash_mp_ema", {"kappa": bad}, "kappa") for bad in (np.nan, 5, -0.1, np.inf)],
    *[("nash_md", {"mixture": bad, "updates": "gradient"}, "mixture") for bad in (np.nan, 7, -0.1)],
    *[("nash_mp", {"every": bad}, "every") for bad in (0, -1, 1.0, True, None)],
    *[("nash_mp", {"iterations": bad}, "iterations") for bad in (0, -1, 6.0, True, 2**31)],
    *[("nash_mp_ema", {"batch": bad}, "batch") for bad in (-1, 2.0)],
    *[("nash_mp_approximate", {"inner": bad}, "inner") for bad in (0, -1, 1.5)],
    ("nash_mp", {"step": 1.0, "beta": 1e6}, "step"),
    ("mmd", {"step": 11.0}, "step"),
    ("nash_mp", {"step": [0.1] * 5 + [np.nan]}, "step"),
    ("online_ipo", {"step": 1e308}, "step"),
  ],
)
def test_a_knob_out_of_its_range_is_refused(method, given, word):
  settings = {"beta": 0.1, "iterations": 6} | given
  refused(lambda: solvers.solve(method, P, REF, **settings), word)


def test_run_and_its_steps_refuse_knobs_and_schedules_that_do_not_fit():
  run = lambda knobs, **more: solvers.run(  # noqa: E731
    "nash_mp", "proximal", GAME, knobs, None, **{"points": 4, "every": 2} | more
  )
  refused(lambda: run(KNOBS._replace(step=np.full(7, 0.5))), "step: expected .* 8 iterations")
  refused(lambda: run(KNOBS._replace(kappa=np.nan)), "kappa")
  refused(lambda: run(KNOBS, points=0), "points")
  refused(lambda: run(KNOBS, every=0), "every")
  refused(lambda: solvers.run("nash", "proximal", GAME, KNOBS, None, points=1), "egpo")
  refused(lambda: solvers.run("nash_mp", "prox", GAME, KNOBS, None, points=1), "proximal")
  for step in solvers.PROXIMAL.values():
    refused(lambda step=step: step(STATE, GAME, KNOBS._replace(step=-1.0)), "step")
    refused(lambda step=step: step(STATE._replace(logp=LOG + 1), GAME, KNOBS), "logp")
  for step in (solvers.GRADIENT["nash_md"], solvers.GRADIENT["egpo"]):
    refused(
      lambda step=step: step(STATE, GAME, KNOBS._replace(step=np.nan), solvers.Draws(None)), "step"
    )
  refused(lambda: solvers.gradient(len, GAME, LOG, solvers.Draws(None)), "loss")
  refused(lambda: solvers.periodic(0, 5), "period")
  refused(lambda: solvers.harmonic(-5), "iterations")
  refused(lambda: solvers.theory("nash", "proximal", 0.1, 3, 5), "choices|expected one of")
  refused(lambda: solvers.theory("nash_mp", "proximal", 0.1, 0, 5), "actions")
  refused(lambda: solvers.theory("nash_mp", "proximal", 0.1, 3, 5, eta=-1), "eta")


def test_lists_ints_and_float32_are_taken_as_arrays():
  listed = P.tolist(), REF.tolist()
  np.testing.assert_array_equal(preference.validate(listed[0]), P)
  for one, other in (
    (preference.equilibrium(*listed, 1), preference.equilibrium(P, REF, 1.0)),
    (
      preference.suboptimality(*listed, REF.tolist(), 0.1),
      preference.suboptimality(P, REF, REF, 0.1),
    ),
    (preference.value(P.tolist(), [0, 1, 0], [1, 0, 0]), P[1, 0]),
    (preference.exploitability(P.tolist(), [0, 1, 0]), P[:, 1].max() - 0.5),
    (
      solvers.solve("nash_mp", *listed, beta=1, iterations=3, step=1)[0],
      solvers.solve("nash_mp", P, REF, beta=1.0, iterations=3, step=1.0)[0],
    ),
    (
      preference.equilibrium(P.astype(np.float32), REF.astype(np.float32), np.float32(0.5)),
      preference.equilibrium(P, REF, 0.5),
    ),
  ):
    np.testing.assert_allclose(one, other, atol=1e-6)


def test_the_same_functions_run_under_jit_and_vmap():
  games = np.stack([P, P])
  got = jax.vmap(preference.suboptimality, (0, None, None, 0))(games, REF, REF, jnp.full(2, 0.1))
  np.testing.assert_allclose(got, [float(preference.suboptimality(P, REF, REF, 0.1))] * 2)

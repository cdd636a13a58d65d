"""Random games, policies and steps for the tests of the solvers."""

import jax
import jax.numpy as jnp
import numpy as np
import scipy

from nash_jax.games import preference, solvers, zoo

EXACT = solvers.Draws(None)
BOTH = [("proximal", m) for m in solvers.PROXIMAL] + [("gradient", m) for m in solvers.GRADIENT]
suboptimality = jax.jit(preference.suboptimality)


def random_game(seed, actions=5, beta=0.1, strength=2.0, contexts=None):
  rng = np.random.default_rng(seed)
  shape = () if contexts is None else (contexts,)
  ref = rng.dirichlet(np.full(actions, 3.0), size=shape) + 1e-2
  game = zoo.random_game(seed, actions, strength=strength, contexts=contexts)
  return solvers.Game(game.p_win, np.log(ref / ref.sum(-1, keepdims=True)), np.asarray(beta))


def random_policy(seed, like):
  logits = np.random.default_rng(seed).normal(size=like.shape)
  return scipy.special.log_softmax(logits, axis=-1)


def one_step(updates, method, game, state, batch=0, inner=3, **knobs):
  values = {"step": 0.7, "eta": 0.3, "kappa": 0.4, "mixture": 0.25} | knobs
  now = solvers.Knobs(**{name: np.asarray(value, float) for name, value in values.items()})
  if updates == "proximal":
    return jax.jit(solvers.PROXIMAL[method])(state, game, now)

  @jax.jit
  def step(state, game, now):
    draws = solvers.Draws(jax.random.key(1), batch, inner)
    return solvers.GRADIENT[method](state, game, now, draws)

  return step(state, game, now)


def objective(game, logits, opponent):
  """Loss of regularised self-play with a frozen opponent."""
  logp = jax.nn.log_softmax(logits)
  wins = game.p_win @ jnp.exp(opponent)
  return -jnp.exp(logp) @ wins + game.beta * preference.kl(logp, game.log_ref)

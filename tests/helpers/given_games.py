"""Two given games, their equilibria, and a method's exact gradient in them."""

import jax
import numpy as np
import scipy
from enumeration import config, enumerated
from jax import numpy as jnp

from nash_jax.games import preference
from nash_jax.objectives import algorithms

BETA = 0.1


def tables():
  """Returns P by game: a biased rock, paper, scissors, and six responses at random."""
  rps = np.array([[0.5, 0.8, 0.1], [0.2, 0.5, 0.7], [0.9, 0.3, 0.5]])
  a = 1.5 * np.random.default_rng(3).normal(size=(6, 6))
  return {"rps": rps, "r6": scipy.special.expit(a - a.T)}


GAMES = tables()


def reference(name):
  """Returns log π_ref [A]."""
  n = len(GAMES[name])
  return scipy.special.log_softmax(0.5 * np.random.default_rng(1).normal(size=n))


def equilibrium(name, beta=BETA, table=None, ref=None):
  """Returns log π*_β; of another payoff or reference where they are given."""
  table = GAMES[name] if table is None else table
  ref = reference(name) if ref is None else ref
  return np.log(np.asarray(preference.equilibrium(table, np.exp(ref), beta)))


def suboptimality(name, logp, beta=BETA):
  return float(preference.gap(GAMES[name], logp, reference(name), beta))


def gap(name, logp):
  """Returns max P(·≻π) − 1/2 of log-probabilities [A] or [... A]."""
  return np.max(np.exp(logp) @ GAMES[name].T, axis=-1) - 0.5


def kl(logp, logq):
  return float(np.sum(np.exp(logp) * (logp - logq)))


def gradient(method, name, a, rewards=None):
  """Returns roles -> the expected gradient at logits [A], by enumeration of all groups.

  Args:
    method: of the table, or its name.
    rewards: of the responses [A].
  """
  method = algorithms.get(method) if isinstance(method, str) else method
  table = jnp.asarray(GAMES[name])[None]
  rewards = jnp.zeros(table.shape[:2]) if rewards is None else jnp.asarray(rewards)[None]

  def loss(theta, roles):
    players = {role: logits[None] for role, logits in {**roles, "policy": theta}.items()}
    return enumerated(method, a, table, rewards, players, 1)

  return lambda roles: jax.grad(loss)(roles["policy"], roles)


def settings(**changes):
  return config(**{"beta": BETA, **changes})

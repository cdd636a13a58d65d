"""An exact game of few responses: losses and stated objectives, enumerated."""

import itertools
import types

import jax
import numpy as np
import scipy
from jax import numpy as jnp

from nash_jax.objectives import algorithms
from nash_jax.types import Verdict

X, A = 3, 4  # contexts; responses: 4 tokens once, or 2 tokens twice


CONFIG = types.SimpleNamespace(
  beta=0.2,
  f="squared",
  eta=0.7,
  step=2.0,
  mixture=0.3,
  samples=2,
  target_update="ema",
  target_period=3,
  centre_log_ratios=False,
  reward_to_go=False,
  advantage="wins",
  normalise="none",
  kl="score",
  updates=1,
  clip_low=0.2,
  clip_high=0.2,
  history=0.3,
)


LENGTHS = {1: (A,), 2: (2, 4)}  # sizes of the tables of logits, by response length


def config(**changes):
  return types.SimpleNamespace(**{**vars(CONFIG), **changes})


def logps(theta, length):
  """Returns log-probabilities [X A L] of each response's tokens; theta [X 4], or [X 6] for two."""
  if length == 1:
    return jax.nn.log_softmax(theta)[..., None]
  first = jax.nn.log_softmax(theta[:, :2])
  second = jax.nn.log_softmax(theta[:, 2:].reshape(X, 2, 2))
  return jnp.stack([jnp.repeat(first, 2, axis=1), second.reshape(X, A)], axis=-1)


def normalisers(theta, length):
  """Returns the log-normalisers [X A L] of the logits that each response's tokens are drawn by."""
  if length == 1:
    return jnp.broadcast_to(jax.nn.logsumexp(theta, -1)[:, None, None], (*theta.shape, 1))
  first = jax.nn.logsumexp(theta[:, :2], -1)[:, None]
  second = jax.nn.logsumexp(theta[:, 2:].reshape(X, 2, 2), -1)
  return jnp.stack([jnp.broadcast_to(first, (X, A)), jnp.repeat(second, 2, axis=1)], axis=-1)


def read(method, a):
  """Returns the log-ratios that a method's loss reads."""
  return [*method.role_weights(a), *(["normaliser"] if method.reads_normaliser else [])]


def whole(theta, length=1):
  return jnp.sum(logps(theta, length), axis=-1)


def game(dtype=np.float64, length=1):
  """A random table [X A A], rewards [X A], and the logits of every player."""
  rng = np.random.default_rng(0)
  a = 2 * rng.normal(size=(X, A, A))
  table = scipy.special.expit(a - np.swapaxes(a, 1, 2))
  players = {
    name: rng.normal(size=(X, sum(LENGTHS[length]))).astype(dtype)
    for name in ("policy", "reference", "target", "opponent", "data", "older")
  }
  return table.astype(dtype), rng.normal(size=(X, A)).astype(dtype), players


def distribution(player, players, length, mixture):
  """log π [X A] of a player, constant; the mixture is token-wise: tables of logits are mixed."""
  if player != "mixture":
    return jax.lax.stop_gradient(whole(players[player], length))

  def normalised(theta):
    groups = [theta[:, :4]] if length == 1 else [theta[:, i : i + 2] for i in (0, 2, 4)]
    return jnp.concatenate([jax.nn.log_softmax(g) for g in groups], axis=-1)

  mixed = (1 - mixture) * normalised(players["policy"]) + mixture * normalised(players["reference"])
  return jax.lax.stop_gradient(whole(mixed, length))


def enumerated(method, a, table, rewards, players, length):
  """Expectation of a loss over all tuples of responses, whose probabilities are constant."""
  samples, num_opponents = method.samples(a)
  X, A = table.shape[:2]  # the axes' letters
  chosen = np.array(list(itertools.product(range(A), repeat=samples + num_opponents)))
  x = np.repeat(np.arange(X), len(chosen))
  chosen = np.tile(chosen, (X, 1))
  y, opponents = chosen[:, :samples], chosen[:, samples:] if num_opponents else chosen
  logp = logps(players["policy"], length)
  weights = method.role_weights(a)
  ratios = {role: logp - jax.lax.stop_gradient(logps(players[role], length)) for role in weights}
  if method.reads_normaliser:
    mine, theirs = (normalisers(players[x], length) for x in ("policy", "reference"))
    ratios["normaliser"] = mine - theirs

  def pick(tree):
    return jax.tree.map(lambda v: v[x[:, None], y][:, None], tree)

  p_win = table[x[:, None, None], y[:, :, None], opponents[:, None, :]]
  own = (
    ~np.eye(samples, dtype=bool) if not num_opponents else np.ones((samples, num_opponents), bool)
  )
  verdict = Verdict(p_win, jnp.broadcast_to(own[None], p_win.shape), rewards[x[:, None], y])

  # Each tuple is a batch of one prompt of its own, weighted by its probability.
  def loss(*arrays):
    return method.loss(a)(*arrays, role_weights=weights)

  mean = jax.vmap(loss)(pick(logp), pick(ratios), jax.tree.map(lambda v: v[:, None], verdict))
  logs = jnp.sum(distribution(method.player, players, length, a.mixture)[x[:, None], y], axis=-1)
  if num_opponents:
    logs += jnp.sum(
      distribution(method.opponent, players, length, a.mixture)[x[:, None], opponents], axis=-1
    )
  return jnp.sum(jnp.exp(logs) * mean.total / mean.weight) / X


def regularised(method, a, table, rewards, players, length):
  """The stated objective: 1/2 − P(π≻opponent), or −E[R], + Σ weight·KL(π‖role), with its arms."""
  logp, arms = whole(players["policy"], length), 1 if method.opponent else 2
  policy = jnp.exp(logp)
  if method.needs_rewards(a):
    won = jnp.sum(policy * rewards, -1)
  else:
    opponent = jnp.exp(distribution(method.opponent or "policy", players, length, a.mixture))
    won = jnp.einsum("xa,xab,xb->x", policy, table, opponent) - 0.5
  penalty = sum(
    weight * jnp.sum(policy * (logp - whole(players[role], length)), -1)
    for role, weight in method.role_weights(a).items()
  )
  return arms * jnp.mean(penalty - won)


def squared(method, a, table, rewards, players, length):
  """The stated objective of the regressions: squares or DPO's cross-entropy, sampling fixed."""
  mu = jnp.exp(distribution(method.player, players, length, a.mixture))
  logp = whole(players["policy"], length)
  weighted = method.role_weights(a).items()
  h = sum((w * (logp - whole(players[role], length)) for role, w in weighted), 0 * logp)
  delta = h[:, :, None] - h[:, None, :]
  opponents = jnp.exp(distribution(method.opponent, players, length, 0)) if method.opponent else mu
  rates = jnp.einsum("xab,xb->xa", table, opponents)

  def pairs(values):
    return jnp.mean(jnp.einsum("xa,xb,xab->x", mu, mu, values))

  def gpo():
    """As published: P f(z) + (1 − P) f(−z) with z = β_f Δ; squares over β_f², as (Δ − 1/(2β))²."""
    f, squares = GPO[a.f], a.f in ("squared", "truncated_quadratic")
    z = (2 * a.beta if squares else a.beta) * (logp - whole(players["reference"], length))
    z = z[:, :, None] - z[:, None, :]
    values = table * f(z) + (1 - table) * f(-z)
    return pairs(values / (4 * a.beta**2) if squares else values)

  def mnpo():
    """As published: ρ = sβ weighs the reference, λ the older of two policies."""
    rho, (ref, last, older) = (
      a.step * a.beta,
      (whole(players[x], length) for x in ("reference", "target", "older")),
    )
    centre = rho * ref + (1 - rho) * ((1 - a.history) * last + a.history * older)
    g = logp - centre
    return pairs((g[:, :, None] - g[:, None, :] - a.step * (table - 0.5)) ** 2)

  def agro():
    """Twice the variance of R − β log π/π_ref, over β²: the mean square of its differences."""
    u = (rewards - a.beta * (logp - whole(players["reference"], length))) / a.beta
    return 2 * jnp.mean(jnp.sum(mu * u**2, -1) - jnp.sum(mu * u, -1) ** 2)

  def shiq():
    """Σ_t (Σ_{k≥t} (R_k − β ρ_k) − β (v_θ − v_ref)(s_t))², the reward at the last token."""
    mine, ref = players["policy"], players["reference"]
    rho = logps(mine, length) - logps(ref, length)
    shaped = normalisers(mine, length) - normalisers(ref, length)
    u = [
      rewards - a.beta * jnp.sum(rho[..., t:], -1) - a.beta * shaped[..., t] for t in range(length)
    ]
    return jnp.mean(jnp.sum(mu * sum(x**2 - rewards**2 for x in u), -1))

  return {
    "gpo": gpo,
    "mnpo": mnpo,
    "agro": agro,
    "shiq": shiq,
    "best_of_two": lambda: pairs(-table * logp[:, :, None] - (1 - table) * logp[:, None, :]),
    "online_ipo": lambda: pairs((delta - (table - 0.5) / a.beta) ** 2),
    "ipo_md": lambda: pairs((delta - (table - 0.5) / a.beta) ** 2),
    "inpo": lambda: pairs((delta - (table - 0.5) * a.step) ** 2),
    "egpo": lambda: pairs((delta - (rates[:, :, None] - rates[:, None, :]) / a.beta) ** 2),
    "online_dpo": lambda: pairs(
      table * jnp.logaddexp(0, -delta) + (1 - table) * jnp.logaddexp(0, delta)
    ),
    "sppo": lambda: jnp.mean(jnp.sum(mu * (h - a.step * (rates - 0.5)) ** 2, -1)),
  }[next(name for name, r in algorithms.ALGORITHMS.items() if r is method)]()


REGRESSIONS = (
  "online_ipo", "ipo_md", "online_dpo", "inpo", "egpo", "sppo", "gpo", "best_of_two", "mnpo",
  "agro", "shiq",
)  # fmt: skip
# f(z) of GPO's members (Tang et al. 2402.05749).
GPO = {
  "logistic": lambda z: jnp.logaddexp(0, -z),
  "squared": lambda z: (z - 1) ** 2,
  "hinge": lambda z: jnp.maximum(0, 1 - z),
  "exponential": lambda z: jnp.exp(-z),
  "truncated_quadratic": lambda z: jnp.maximum(0, 1 - z) ** 2,
  "savage": lambda z: 1 / (1 + jnp.exp(z)) ** 2,
}


def off(rows=2):
  """Returns which comparisons of two responses are valid: not those with themselves."""
  return np.tile(~np.eye(2, dtype=bool), (rows, 1, 1))


def compare(name, a, length):
  with jax.enable_x64(True):
    table, rewards, players = game(length=length)
    method = algorithms.get(name)
    stated = squared if name in REGRESSIONS else regularised
    got, expected = (
      jax.jit(
        jax.grad(lambda p, f=f: f(method, a, table, rewards, {**players, "policy": p}, length))
      )(players["policy"])
      for f in (enumerated, stated)
    )
    assert np.max(np.abs(expected)) > 1e-3
    np.testing.assert_allclose(got, expected, atol=1e-10)

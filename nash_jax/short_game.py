"""Games of short responses: all of them are enumerated, and a policy is scored by the truth.

A response is L tokens out of a few, so there are A = tokens^L of them, in the order of the table
judge: digits, the most significant first. The game is contextual: prompt i plays in context i % X.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, Float, Int

from nash_jax import config as configs
from nash_jax.games import preference
from nash_jax.judges import table as tables
from nash_jax.types import Mean, Params, Prompts, Responses


class Policy(NamedTuple):
  """A kind of policy: how it is scored and sampled from, and the parameters it starts from.

  Attributes:
    score: (params, prompts=, tokens=, mask=) -> log-probability and entropy, [B K L].
    make: (samples=, mixture=, behaviour=) -> a sampler, as sampler.make_sampler.
    params: of the reference.
  """

  score: Callable
  make: Callable
  params: Params


def responses(tokens: tuple[int, ...], length: int) -> Int[Array, "A L"]:
  """Returns every response of `length` tokens, in the table judge's order."""
  return np.array(list(itertools.product(tokens, repeat=length)), np.int32)


def log_policy(score: Callable, params: Params, prompts: Prompts, every) -> Float[Array, "X A"]:
  """Returns log π(y) of every response to each prompt, nats."""
  shape = (len(prompts.index), *every.shape)
  tokens = jnp.broadcast_to(every[None], shape)
  logp, _ = score(params, prompts=prompts, tokens=tokens, mask=jnp.ones(shape, bool))
  return jnp.sum(logp, axis=-1)


def make_exact(config, score: Callable, held_out, ref: Params) -> Callable[[Params], dict]:
  """Returns params -> exact/suboptimality and exact/kl_to_equilibrium over the held-out prompts.

  SubOpt_β is that of algorithms.md's regularised game with β = `algorithm.beta` and the policy
  `ref` as reference; KL is KL(π*‖π_θ), nats a response. Both are means over contexts.

  Raises:
    ValueError: a run whose responses cannot be enumerated as the actions of `judge.table`.
  """
  s, beta = config.sampling, config.algorithm.beta
  table = tables.load(configs.path(config.judge.table))
  actions = len(s.tokens) ** s.max_tokens
  configs.check(
    actions == table.shape[1], "evaluation.exact",
    f"len(sampling.tokens) ** sampling.max_tokens to be the {table.shape[1]} actions of"
    " judge.table", f"{len(s.tokens)} ** {s.max_tokens}", "Set the three together.",
  )  # fmt: skip
  prompts = jax.tree.map(jnp.asarray, held_out.all())
  table, every = jnp.asarray(table)[prompts.index % len(table)], responses(s.tokens, s.max_tokens)
  def policy(params):
    return log_policy(score, params, prompts, every)
  return scorer(table, jax.jit(policy)(ref), beta, policy)


def scorer(table, log_ref, beta: float, log_policy: Callable) -> Callable[[Params], dict]:
  """Returns params -> the exact metrics, for policies given by their log π [X A]."""
  with jax.enable_x64(True):  # Newton's method ends at 1e-12
    star = preference.equilibrium(
      np.asarray(table, np.float64), np.exp(np.asarray(log_ref, np.float64)), beta
    )
  log_star = jnp.asarray(np.log(np.maximum(star, 1e-38)), jnp.float32)

  def exact(params):
    logp = log_policy(params)
    return {
      "exact/suboptimality": Mean.of(preference.gap(table, logp, log_ref, beta)),
      "exact/kl_to_equilibrium": Mean.of(preference.kl(log_star, logp)),
    }

  return exact


def tabular(log_ref: Float[Array, "X A"], tokens: tuple[int, ...], length: int) -> Policy:
  """Returns the policy of one logit a response and context, beside which a network is judged.

  The log-probability of a response stands at its last token. Its mixture is over whole responses.
  """
  every = jnp.asarray(responses(tokens, length))
  powers = len(tokens) ** np.arange(length)[::-1]
  digit = jnp.zeros(max(tokens) + 1, jnp.int32).at[jnp.array(tokens)].set(jnp.arange(len(tokens)))

  def law(params, prompts):
    return jax.nn.log_softmax(params["logits"][prompts.index % len(log_ref)])

  def spread(x):  # of a response, at its last token
    return jnp.zeros((*x.shape, length)).at[..., -1].set(x)

  def score(params, *, prompts, tokens, mask):
    logp = law(params, prompts)
    action = jnp.sum(digit[tokens] * powers[None, None], axis=-1)
    entropy = -jnp.sum(jnp.exp(logp) * logp, axis=-1, keepdims=True)
    chosen = jnp.take_along_axis(logp, action, axis=1)
    return spread(chosen), spread(jnp.broadcast_to(entropy, chosen.shape))

  def make(*, samples, mixture=None, behaviour=1.0):
    def sample(params, prompts, key) -> Responses:
      if mixture is None:
        logp = law(params, prompts)
      else:
        policy, reference = (law(p, prompts) for p in params)
        logp = jax.nn.log_softmax((1 - mixture) * policy + mixture * reference)
      flat = jax.nn.log_softmax(logp / behaviour)
      shape = (len(prompts.index), samples)
      action = jax.random.categorical(key, flat[:, None], axis=-1, shape=shape)
      chosen, drawn = (spread(jnp.take_along_axis(x, action, axis=1)) for x in (logp, flat))
      mask = jnp.ones((*shape, length), bool)
      return Responses(every[action], mask, chosen, drawn, jnp.zeros(shape, bool))

    return sample

  return Policy(score, make, {"logits": jnp.asarray(log_ref)})


def random_game(
  seed: int, strength: float, contexts: int, actions: int, rank: int
) -> Float[Array, "X A A"]:
  """Returns P = σ(A − Aᵀ), A = strength·U Θ_x Vᵀ / rank with standard normal entries, float32."""
  rng = np.random.default_rng(seed)
  u, v = rng.standard_normal((2, actions, rank))
  theta = rng.standard_normal((contexts, rank, rank))
  a = strength * np.einsum("ar,xrs,bs->xab", u, theta, v) / rank
  p = 1 / (1 + np.exp(a.swapaxes(1, 2) - a))
  return ((p + 1 - p.swapaxes(1, 2)) / 2).astype(np.float32)

"""Games of short responses, which can all be enumerated, so that a policy's SubOpt_β is exact.

A response is L tokens, so there are A = tokens^L of them, in the order of the table judge: tokens
are digits, the most significant first. The game is contextual: prompt i has context i % X.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax import numpy as jnp
from jax.experimental import multihost_utils
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from nash_jax.data.corpus import Examples
from nash_jax.games import preference
from nash_jax.judges import table
from nash_jax.models import gemma
from nash_jax.policy import Policy
from nash_jax.types import Logprobs, Mean, Params, Prompts, Responses
from nash_jax.validation import asset_path, require

LogPolicy = Float[Array, "X A"]  # log-probability of every response in every context, in nats


def enumerate_responses(tokens: tuple[int, ...], length: int) -> Int[np.ndarray, "A L"]:
  """Returns every response of `length` tokens, in the table judge's order."""
  return np.array(list(itertools.product(tokens, repeat=length)), np.int32)


class Game(NamedTuple):
  """The game that a run trains on, with all its contexts (the prompts) and all its responses.

  Attributes:
    p_win: P(y≻y'|x) for all pairs of responses.
    responses: the tokens of each response.
  """

  prompts: Prompts
  p_win: Float[Array, "X A A"]
  responses: Int[np.ndarray, "A L"]

  @classmethod
  def from_config(
    cls, config: ConfigDict, held_out: Examples, train: Examples | None = None
  ) -> "Game":
    """Returns the game of a resolved run config over its held-out prompts.

    Raises:
      ValueError: the responses are not the actions of `judge.table`; a prompt has another context
        in `train`.
    """
    sampling, p_win = config.sampling, table.load(asset_path(config.judge.table))
    num_tokens, length, actions = len(sampling.tokens), sampling.max_tokens, p_win.shape[1]
    product, fix = "len(sampling.tokens) ** sampling.max_tokens", "Set the three together."
    fits, got = num_tokens**length == actions, f"{num_tokens} ** {length}"
    expected = f"{product} to be the {actions} actions of judge.table"
    require(fits, "evaluation.exact", expected, got, fix)
    first = config.judge.first_token
    digits = (*range(first, first + (config.judge.table_tokens or actions)),)
    expected = f"{digits}, the judge's digits, which start at judge.first_token"
    require(sampling.tokens == digits, "sampling.tokens", expected, sampling.tokens, fix)
    if train is not None:
      _check_contexts(train, held_out, len(p_win))
    prompts = jax.tree.map(jnp.asarray, held_out.all())
    responses = enumerate_responses(sampling.tokens, length)
    return cls(prompts, jnp.asarray(p_win)[prompts.index % len(p_win)], responses)

  def log_policy(self, logprobs: Logprobs, params: Params) -> LogPolicy:
    """Returns log π(y) of every response."""
    shape = (len(self.p_win), *self.responses.shape)
    tokens = jnp.broadcast_to(self.responses[None], shape)
    logp, _ = logprobs(params, prompts=self.prompts, tokens=tokens, mask=jnp.ones(shape, bool))
    return jnp.sum(logp, axis=-1)

  def log_equilibrium(self, log_ref: LogPolicy, beta: float) -> LogPolicy:
    """Returns log π* of the game regularised towards a reference with weight β."""
    with jax.enable_x64(True):  # Newton's method stops at 1e-12
      p_win, ref = np.asarray(self.p_win, np.float64), np.exp(np.asarray(log_ref, np.float64))
      equilibrium = preference.equilibrium(p_win, ref / ref.sum(-1, keepdims=True), float(beta))
    return jnp.asarray(np.log(np.maximum(equilibrium, 1e-38)), jnp.float32)

  def metrics(
    self, logp: LogPolicy, log_ref: LogPolicy, log_equilibrium: LogPolicy, beta: float | Array
  ) -> dict[str, Mean]:
    """Returns by metric name means over contexts: distances of the policy, and how it does.

    They are SubOpt_β, KL(π*‖π) in nats, and the gap max_y P(y≻π) − 1/2 of the game without β, which
    is what methods that leave the reference aim to close; P(π≻π_ref), and KL(π‖π_ref) in nats.
    """
    values = {
      "suboptimality": preference.gap(self.p_win, logp, log_ref, beta),
      "kl_to_equilibrium": preference.kl(log_equilibrium, logp),
      "gap": preference.gap(self.p_win, logp, log_ref, 0.0),
      "win_rate_vs_reference": preference.value(self.p_win, jnp.exp(logp), jnp.exp(log_ref)),
      "kl_to_reference": preference.kl(logp, log_ref),
    }
    return {f"exact/{name}": Mean.from_values(x) for name, x in values.items()}


def realigned(
  log_ref: LogPolicy,
  log_policies: Sequence[LogPolicy],
  strengths: Float[Array, "M"],
  num_tokens: int,
) -> tuple[LogPolicy, LogPolicy]:
  """Returns log π_ref·Π(π_i/π_ref)^λ_i, normalised: over whole responses, and token by token.

  The theorem of decoding-time realignment (Liu et al. 2402.02992) is of the former law; samplers
  draw from the latter.

  Args:
    strengths: λ_i of each policy.
    num_tokens: how many tokens there are at each place of a response.
  """
  contexts, actions = log_ref.shape
  length = round(math.log(actions, num_tokens))

  def next_tokens(logp: LogPolicy) -> list[Array]:
    """Returns log π(y_t | y_<t) by t, [X T … T 1 … 1]."""
    tree = logp.reshape(contexts, *[num_tokens] * length)
    begun = [
      jax.nn.logsumexp(tree, axis=tuple(range(t + 1, length + 1)), keepdims=True)
      for t in range(length + 1)
    ]
    return [whole - before for before, whole in itertools.pairwise(begun)]

  models = [log_ref, *log_policies]
  sequences = jax.nn.log_softmax(gemma.mixed(models, strengths), axis=-1)
  by_place = zip(*map(next_tokens, models), strict=True)
  tokens = sum(
    jax.nn.log_softmax(gemma.mixed(at, strengths), axis=t) for t, at in enumerate(by_place, 1)
  )
  return sequences, jnp.reshape(tokens, log_ref.shape)


def _check_contexts(train: Examples, held_out: Examples, count: int) -> None:
  """Raises ValueError if a prompt is evaluated in a context other than the one it is played in."""
  sides = (zip(p.columns["inputs"], p.columns["index"], strict=True) for p in (train, held_out))
  played, evaluated = ([(tuple(ids), index % count) for ids, index in side] for side in sides)
  contexts: dict[tuple[int, ...], set[int]] = {}
  for ids, context in played:
    contexts.setdefault(ids, set()).add(context)
  wrong = [context for ids, context in evaluated if context not in contexts.get(ids, {context})]
  expected = f"each prompt in the same one of judge.table's {count} contexts as in training"
  fix = f"A prompt's context is its index modulo {count}: train on a multiple of {count} prompts."
  require(not wrong, "prompts.held_out_path", expected, f"contexts {wrong}", fix)


def make_metrics(
  config: ConfigDict, logprobs: Logprobs, train: Examples, held_out: Examples, reference: Params
) -> Callable[[Params], dict[str, Mean]]:
  """Returns params -> the exact metrics of a run's policy; see Game."""
  game, beta = Game.from_config(config, held_out, train), config.algorithm.beta
  log_ref = jax.jit(lambda params: game.log_policy(logprobs, params))(reference)
  # On the host, because a function cannot close over arrays that are spread over hosts.
  log_ref = multihost_utils.process_allgather(log_ref, tiled=True)
  log_equilibrium = game.log_equilibrium(log_ref, beta)

  def exact_metrics(params: Params) -> dict[str, Mean]:
    return game.metrics(game.log_policy(logprobs, params), log_ref, log_equilibrium, beta)

  return exact_metrics


def tabular_policy(
  log_ref: LogPolicy, tokens: tuple[int, ...], length: int
) -> tuple[Policy, Params]:
  """Returns a policy with one logit per context and response, and its parameters at a reference.

  It is the yardstick for a network. A response's log-probability is stored at its last token.
  Mixtures are of the distributions over responses, not token by token.
  """
  all_responses = jnp.asarray(enumerate_responses(tokens, length))
  powers = len(tokens) ** np.arange(length)[::-1]
  digit = jnp.zeros(max(tokens) + 1, jnp.int32).at[jnp.array(tokens)].set(jnp.arange(len(tokens)))

  def log_policy(params, prompts):
    return jax.nn.log_softmax(params["logits"][prompts.index % len(log_ref)])

  def at_last_token(x):
    return jnp.zeros((*x.shape, length)).at[..., -1].set(x)

  def logprobs(params, *, prompts, tokens, mask, normaliser=False):
    logp = log_policy(params, prompts)
    action = jnp.sum(digit[tokens] * powers[None, None], axis=-1)
    entropy = -jnp.sum(jnp.exp(logp) * logp, axis=-1, keepdims=True)
    chosen = jnp.take_along_axis(logp, action, axis=1)
    found = at_last_token(chosen), at_last_token(jnp.broadcast_to(entropy, chosen.shape))
    if not normaliser:
      return found
    # One decision a response: until then it is the same state.
    log_z = jax.nn.logsumexp(params["logits"], axis=-1)[prompts.index % len(log_ref)]
    return *found, jnp.broadcast_to(log_z[:, None, None], tokens.shape)

  def make_sampler(*, samples, mixture=None, behaviour_temperature=1.0):
    def sample(params, prompts, key) -> Responses:
      if mixture is None:
        logp = log_policy(params, prompts)
      else:
        policy, reference = (log_policy(p, prompts) for p in params)
        logp = jax.nn.log_softmax((1 - mixture) * policy + mixture * reference)
      sampling_logp = jax.nn.log_softmax(logp / behaviour_temperature)
      shape = (len(prompts.index), samples)
      # Inverse transform sampling takes one random number per draw, not A.
      cumulative = jnp.cumsum(jnp.exp(sampling_logp), axis=-1)[:, None]
      uniform = jax.random.uniform(key, shape)[..., None]
      last = sampling_logp.shape[-1] - 1
      action = jnp.minimum(jnp.sum(cumulative < uniform, axis=-1), last)
      chosen, chosen_sampling = (
        at_last_token(jnp.take_along_axis(x, action, axis=1)) for x in (logp, sampling_logp)
      )
      mask = jnp.ones((*shape, length), bool)
      return Responses(all_responses[action], mask, chosen, chosen_sampling, jnp.zeros(shape, bool))

    return sample

  return Policy(logprobs, make_sampler), {"logits": jnp.asarray(log_ref)}

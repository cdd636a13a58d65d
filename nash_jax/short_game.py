"""Games of short responses: all of them are enumerated, and a policy is scored by the truth.

A response is L tokens out of a few, so there are A = tokens^L of them, in the order of the table
judge: digits, the most significant first. The game is contextual: prompt i plays in context i % X.
"""

import functools
import itertools
import json
import pathlib
import tempfile
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
import optax
from absl import logging
from jax import numpy as jnp
from jax.experimental import multihost_utils
from jaxtyping import Array, Float, Int

from nash_jax import config as configs
from nash_jax import tokenizer as tokenizers
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


class Game(NamedTuple):
  """The game that a run plays, in full.

  Attributes:
    prompts: the contexts, X prompts.
    p_win: P(y≻y'|x) of all responses [X A A].
    every: all responses' tokens [A L].
  """

  prompts: Prompts
  p_win: Float[Array, "X A A"]
  every: Int[Array, "A L"]

  @classmethod
  def of(cls, config, held_out) -> "Game":
    """Returns the game of a resolved run config over its held-out prompts.

    Raises:
      ValueError: where responses cannot be enumerated as the actions of `judge.table`.
    """
    s, table = config.sampling, tables.load(configs.path(config.judge.table))
    configs.check(
      len(s.tokens) ** s.max_tokens == table.shape[1], "evaluation.exact",
      f"len(sampling.tokens) ** sampling.max_tokens to be the {table.shape[1]} actions of"
      " judge.table", f"{len(s.tokens)} ** {s.max_tokens}", "Set the three together.",
    )  # fmt: skip
    prompts = jax.tree.map(jnp.asarray, held_out.all())
    p_win = jnp.asarray(table)[prompts.index % len(table)]
    return cls(prompts, p_win, responses(s.tokens, s.max_tokens))

  def log_policy(self, score: Callable, params: Params) -> Float[Array, "X A"]:
    """Returns log π(y) of every response, nats; `score` as update.make_update takes it."""
    shape = (len(self.p_win), *self.every.shape)
    tokens = jnp.broadcast_to(self.every[None], shape)
    logp, _ = score(params, prompts=self.prompts, tokens=tokens, mask=jnp.ones(shape, bool))
    return jnp.sum(logp, axis=-1)

  def log_equilibrium(self, log_ref, beta: float) -> Float[Array, "X A"]:
    """Returns log π* of the game regularised towards a reference [X A] with weight β."""
    with jax.enable_x64(True):  # Newton's method ends at 1e-12
      p_win, ref = np.asarray(self.p_win, np.float64), np.exp(np.asarray(log_ref, np.float64))
      star = preference.equilibrium(p_win, ref / ref.sum(-1, keepdims=True), float(beta))
    return jnp.asarray(np.log(np.maximum(star, 1e-38)), jnp.float32)

  def exact(self, logp, log_ref, log_star, beta) -> dict[str, Mean]:
    """Returns exact/suboptimality (SubOpt_β) and exact/kl_to_equilibrium (KL(π*‖π), nats).

    Both are means over contexts; arguments are log-probabilities [X A] of policy, reference and
    equilibrium, and β.
    """
    return {
      "exact/suboptimality": Mean.of(preference.gap(self.p_win, logp, log_ref, beta)),
      "exact/kl_to_equilibrium": Mean.of(preference.kl(log_star, logp)),
    }


def make_exact(config, score: Callable, held_out, ref: Params) -> Callable[[Params], dict]:
  """Returns params -> the exact metrics of a run's policy; see Game."""
  game, beta = Game.of(config, held_out), config.algorithm.beta
  log_ref = jax.jit(functools.partial(game.log_policy, score))(ref)
  # On the host, for a function may not close over what lies on several.
  log_ref = multihost_utils.process_allgather(log_ref, tiled=True)
  log_star = game.log_equilibrium(log_ref, beta)
  return lambda params: game.exact(game.log_policy(score, params), log_ref, log_star, beta)


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
      # By the inverse of the cumulative law: one uniform number a draw, not one a response.
      below = jnp.cumsum(jnp.exp(flat), axis=-1)[:, None]
      uniform = jax.random.uniform(key, shape)[..., None]
      action = jnp.minimum(jnp.sum(below < uniform, axis=-1), flat.shape[-1] - 1)
      chosen, drawn = (spread(jnp.take_along_axis(x, action, axis=1)) for x in (logp, flat))
      mask = jnp.ones((*shape, length), bool)
      return Responses(every[action], mask, chosen, drawn, jnp.zeros(shape, bool))

    return sample

  return Policy(score, make, {"logits": jnp.asarray(log_ref)})


def random_game(
  seed: int, strength: float, contexts: int = 4, actions: int = 64, rank: int = 4
) -> Float[Array, "X A A"]:
  """Returns P = σ(A − Aᵀ), A = strength·U Θ_x Vᵀ / rank with standard normal entries, float32."""
  rng = np.random.default_rng(seed)
  u, v = rng.standard_normal((2, actions, rank))
  theta = rng.standard_normal((contexts, rank, rank))
  a = strength * np.einsum("ar,xrs,bs->xab", u, theta, v) / rank
  p = 1 / (1 + np.exp(a.swapaxes(1, 2) - a))
  return ((p + 1 - p.swapaxes(1, 2)) / 2).astype(np.float32)


def fit_reference(score: Callable, game: Game, params: Params, log_ref, steps: int = 3000):
  """Fits a policy to probabilities [X A] by Adam on KL(target‖π); returns (params, KL in nats)."""
  tx = optax.adam(optax.cosine_decay_schedule(1e-2, steps))

  def loss(params):
    return jnp.mean(preference.kl(log_ref, game.log_policy(score, params)))

  def step(carry, _):
    params, state = carry
    value, grads = jax.value_and_grad(loss)(params)
    updates, state = tx.update(grads, state, params)
    return (optax.apply_updates(params, updates), state), value

  fit = jax.jit(lambda params: jax.lax.scan(step, (params, tx.init(params)), length=steps)[0][0])
  params = fit(params)
  return params, float(jax.jit(loss)(params))


def _write_language(folder) -> None:
  """Writes a tokenizer of eight letters, a to d to respond with, and prompts of the other four."""
  with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as corpus:
    # Frequent letters have small ids: a is the first of four in a row.
    words = [letter for i, letter in enumerate("abcdefgh") for _ in range(9 - i)]
    corpus.write("".join(json.dumps({"text": word}) + "\n" for word in words))
    corpus.flush()
    tokenizers.train(corpus.name, str(folder / "tokenizer.model"), vocab_size=15, held_out=0)
  prompts = [json.dumps({"prompt": letter}) + "\n" for letter in "efgh"]
  (folder / "prompts.jsonl").write_text("".join(prompts))


def run(config, workdir) -> None:
  """Draws the two games of configs/short_game.py and fits their reference policy, into a folder.

  Args:
    config: of a run on the game; its `model.weights` are not read.
  """
  from nash_jax import prompts, train
  from nash_jax.models import gemma, weights

  folder = pathlib.Path(workdir)
  folder.mkdir(parents=True, exist_ok=True)
  for name, strength in (("mild", 4.0), ("strong", 8.0)):
    np.save(folder / f"{name}.npy", random_game(0, strength))
  _write_language(folder)
  described, config = configs.describe(config), config.copy_and_resolve_references()
  config.model.update({"weights": "", "tokenizer": str(folder / "tokenizer.model")})
  config.judge.table = str(folder / "mild.npy")
  config.prompts.path = config.prompts.held_out_path = str(folder / "prompts.jsonl")
  config = configs.resolve(config)
  tok = tokenizers.Tokenizer(configs.path(config.model.tokenizer), config.model.template)
  model = gemma.preset(config.model.preset, **config.model.changes)
  score, _ = train.policy(config, tok, model)
  game = Game.of(config, prompts.load(config.prompts, tok, config.seed)[1])
  rng = np.random.default_rng(config.seed)
  log_ref = jax.nn.log_softmax(jnp.float32(0.5 * rng.standard_normal(game.p_win.shape[:2])))
  start = jax.tree.map(
    lambda s: jnp.asarray(rng.normal(0, 0.1, s.shape), s.dtype), gemma.shapes(model)
  )
  params, kl = fit_reference(score, game, start, log_ref)
  card = {"kl_to_drawn_probabilities": kl, "config": described}
  weights.save(str(folder / "policy.safetensors"), params, model, "float32", card)
  logging.info("wrote %s: KL of the policy to the drawn probabilities %.2e nats", folder, kl)

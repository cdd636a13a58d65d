"""Makes the bundled short games: two preference tables, a language, a reference policy."""

import json
import os
import pathlib
import tempfile
from collections.abc import Callable

import jax
import numpy as np
import optax
from absl import logging
from jax import numpy as jnp
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from nash_jax import weights
from nash_jax.config import describe, resolve
from nash_jax.data.prompts import load_prompts
from nash_jax.data.tokenizer import train_tokenizer
from nash_jax.exact import Game
from nash_jax.games import preference, zoo
from nash_jax.models import gemma
from nash_jax.policy import make_policy, tokenizer_and_model
from nash_jax.run import files, lock
from nash_jax.types import Params


def draw_table(strength: float) -> Float[np.ndarray, "4 64 64"]:
  """Returns the short game of a strength: the cyclic random game of seed 0 and rank 4, float32."""
  p = zoo.random_game(0, 64, strength=strength, contexts=4, normalisation="rank").p_win
  return ((p + 1 - p.swapaxes(1, 2)) / 2).astype(np.float32)


def fit_reference(
  logprobs: Callable, game: Game, params: Params, log_ref: Float[Array, "X A"], steps: int = 3000
) -> tuple[Params, float]:
  """Fits a policy to log_ref by Adam on KL(target‖π), and returns (params, KL in nats)."""
  tx = optax.adam(optax.cosine_decay_schedule(1e-2, steps))

  def loss(params):
    return jnp.mean(preference.kl(log_ref, game.log_policy(logprobs, params)))

  def step(carry, _):
    params, state = carry
    value, grads = jax.value_and_grad(loss)(params)
    updates, state = tx.update(grads, state, params)
    return (optax.apply_updates(params, updates), state), value

  fit = jax.jit(lambda params: jax.lax.scan(step, (params, tx.init(params)), length=steps)[0][0])
  params = fit(params)
  return params, float(jax.jit(loss)(params))


def _write_language(folder: pathlib.Path) -> None:
  """Writes a tokenizer of eight letters, a to d for responses, and prompts of the other four."""
  with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as corpus:
    # Frequent letters get small ids, so that a to d are four consecutive ids.
    words = [letter for i, letter in enumerate("abcdefgh") for _ in range(9 - i)]
    corpus.write("".join(json.dumps({"text": word}) + "\n" for word in words))
    corpus.flush()
    train_tokenizer(corpus.name, str(folder / "tokenizer.model"), vocab_size=15, held_out=0)
  prompts = [json.dumps({"prompt": letter}) + "\n" for letter in "efgh"]
  files.write_text(folder / "prompts.jsonl", "".join(prompts))


def run(config: ConfigDict, workdir: str | os.PathLike[str]) -> None:
  """Draws the two games of configs/short_game.py, and fits and saves their reference policy.

  Args:
    config: a run's config on the game; `model.weights` is not read.
  """
  folder = files.make_folder(workdir)
  with lock.hold(folder):
    _run(config, folder)


def _run(config: ConfigDict, folder: pathlib.Path) -> None:
  for name, strength in (("mild", 4.0), ("strong", 8.0)):
    with files.replacing(folder / f"{name}.npy") as part, part.open("wb") as file:
      np.save(file, draw_table(strength))
  _write_language(folder)
  description, config = describe(config), config.copy_and_resolve_references()
  config.model.update({"weights": "", "tokenizer": str(folder / "tokenizer.model")})
  config.judge.table = str(folder / "mild.npy")
  config.prompts.path = config.prompts.held_out_path = str(folder / "prompts.jsonl")
  config = resolve(config)
  tokenizer, model_config = tokenizer_and_model(config.model)
  policy = make_policy(config.model, config.sampling, tokenizer, model_config)
  _, held_out = load_prompts(config.prompts, tokenizer, config.seed)
  game = Game.from_config(config, held_out)
  rng = np.random.default_rng(config.seed)
  log_ref = jax.nn.log_softmax(jnp.float32(0.5 * rng.standard_normal(game.p_win.shape[:2])))
  initial = jax.tree.map(
    lambda spec: jnp.asarray(rng.normal(0, 0.1, spec.shape), spec.dtype), gemma.shapes(model_config)
  )
  params, kl = fit_reference(policy.logprobs, game, initial, log_ref)
  card = {"kl_to_drawn_probabilities": kl, "config": description}
  weights.save(str(folder / "policy.safetensors"), params, model_config, "float32", card)
  logging.info("wrote %s: KL of the policy to the drawn probabilities %.2e nats", folder, kl)

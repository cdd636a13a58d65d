"""A small arena's config, and one of made-up policies."""

import jax
from gemma import gm
from jax import numpy as jnp

import nash_jax
from nash_jax import policy
from nash_jax.data import corpus
from nash_jax.types import Responses

SMALL = {"num_embed": 1024, "attention_types": (gm.nn.AttentionType.GLOBAL,)}


def without_models(count, batch_size, **changes):
  """An arena's config, its held-out part, and policies that draw without a model."""
  config = nash_jax.config.arena()
  alone = {"weights": "", "best_of": 1, "outputs": "", "realign": {}}
  config.policies = {"base": alone, "other": alone}
  config.judges, config.select_judge = {"judge": config.judges.population}, "judge"
  config.prompts.batch_size, config.resamples, config.texts = batch_size, 20, 0
  config.update_from_flattened_dict(changes)
  columns = {"inputs": [[n + 3] for n in range(count)], "index": list(range(count))}
  held_out = corpus.Examples(columns, lambda x: corpus.pad_prompts(x, 2, 0), 0, {})

  def make_sampler(*, samples):
    def sample(params, prompts, key):
      shape = (len(prompts.index), samples, 3)
      tokens = jax.random.randint(key, shape, 3, 60)
      zeros = jnp.zeros(shape)
      return Responses(tokens, jnp.ones(shape, bool), zeros, zeros, jnp.ones(shape[:2], bool))

    return sample

  def logprobs(params, *, prompts, tokens, mask, measure=None):
    logp = jnp.where(mask, params * tokens, 0.0)
    return logp, logp

  params = {"base": jnp.float32(0.1), "other": jnp.float32(0.2)}
  return config, held_out, params, policy.Policy(logprobs, make_sampler)


def small(files):
  config = nash_jax.config.arena()
  config.model.preset, config.model.changes = "tiny", SMALL
  config.prompts.path = str(files / "prompts.jsonl")
  config.prompts.held_out, config.prompts.batch_size = 25, 8
  config.prompts.max_tokens, config.sampling.max_tokens = 40, 6
  config.resamples = 200
  one, two = (str(files / f"{name}.safetensors") for name in ("one", "two"))
  config.policies = {
    "base": {"weights": one, "best_of": 1},
    "twin": {"weights": one, "best_of": 1},
    "other": {"weights": two, "best_of": 1},
    "best_of_4": {"weights": one, "best_of": 4},
  }
  config.judges = {"judge": {**config.judges.population}}
  return config

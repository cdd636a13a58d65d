"""A judge that looks up preferences in a table P[context, action, action'], for exact games."""

from collections.abc import Callable

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from nash_jax.data.tokenizer import Tokenizer
from nash_jax.games import checks, preference
from nash_jax.judges.base import Comparison, Judge, compare_rewards, pairwise
from nash_jax.models import sharding
from nash_jax.types import Answers
from nash_jax.validation import asset_path

Actions = tuple[Int[Array, "N"], Bool[Array, "N"]]  # actions, and whether each is readable


def load(path: str) -> Float[np.ndarray, "X A A"]:
  """Returns the checked table P of an .npy file, as float64 if the file's type is wider than 4
  bytes, otherwise as float32.

  Raises:
    ValueError: no such array; an entry that breaks 0 <= P <= 1 or P + Pᵀ = 1 (names the worst).
  """
  try:
    # A memory map never runs a pickle, opens no archive, and is no larger than the file.
    table = check(np.lib.format.open_memmap(path, mode="r"))
    return np.array(table, np.float32 if table.dtype.itemsize <= 4 else np.float64)
  except Exception as error:  # numpy parses the header as Python, so bad bytes can raise anything
    expected, why = "an .npy file of preferences [X A A]", " ".join(str(error).split())
    raise ValueError(f"judge.table: expected {expected}, got {path!r}: {why}") from error


def check(table: np.ndarray) -> Float[np.ndarray, "X A A"]:
  """Returns the table if all entries are probabilities and P + Pᵀ = 1; see `load`."""
  checks.validate(table, atol=1e-6, outside=0.0)
  if table.ndim != 3:
    raise ValueError(f"got shape {table.shape}")
  return table


def make(config, tokenizer: Tokenizer, params=None, mesh=None) -> Judge:
  """Builds the judge of `config.table`; see judges.make, `judge` and `reward_judge`."""
  table = load(asset_path(config.table))
  base = config.table_tokens or table.shape[1]
  last = config.first_token + base - 1
  if config.first_token < 0 or last >= tokenizer.size:
    expected = f"ids within the tokenizer's {tokenizer.size} pieces"
    got = f"{config.first_token} to {last}"
    raise ValueError(f"judge.first_token + judge.table_tokens: expected {expected}, got {got}")
  build = reward_judge if config.name == "table_reward" else judge
  built = build(table, config.first_token, base)
  return Judge(sharding.shard(built.params, mesh), built.fn)


def judge(table: Float[np.ndarray, "X A A"], first_token: int, base: int) -> Judge:
  """Builds the judge of a table.

  The context is prompts.index % X. A response's first tokens are the digits of its action, token -
  first_token, in `base`, the most significant first; A must be a power of the base. Other tokens,
  or too few, make the comparison invalid.
  """
  read = _reader(check(table).shape[1], first_token, base)

  def compare(params, prompts, a, b):
    (action, readable), (other_action, other_readable) = a, b
    valid = readable & other_readable
    p = params[prompts.index % len(params), action, other_action]
    return Comparison(jnp.where(valid, p, 0.5), valid, {})

  return Judge(jnp.asarray(table), pairwise(compare, lambda _, prompts, answers: read(answers)))


def reward_judge(table: Float[np.ndarray, "X A A"], first_token: int, base: int) -> Judge:
  """Builds the judge of the Bradley-Terry rewards that fit a table best, with equal pair weights.

  Responses are read as in `judge`; the reward of an unreadable one is NaN.
  """
  read = _reader(check(table).shape[1], first_token, base)
  with jax.enable_x64(True):
    rewards = np.stack([preference.bradley_terry(game.astype(np.float64)) for game in table])

  def reward(params, prompts, answers):
    action, readable = read(answers)
    return jnp.where(readable, params[prompts.index % len(params), action], jnp.nan)

  return Judge(jnp.asarray(rewards, jnp.float32), pairwise(compare_rewards, reward, scalar=True))


def action_tokens(config) -> int:
  """Returns how many tokens an action of `config.table` has; reads only the file's header.

  Raises:
    ValueError: no table, or the number of actions is no power of `config.table_tokens`.
  """
  path = asset_path(config.table)
  try:
    _, num_actions, _ = np.lib.format.open_memmap(path, mode="r").shape
  except Exception:  # `load` reports what is wrong
    num_actions = load(path).shape[1]
  return _num_digits(num_actions, config.table_tokens or num_actions)


def _num_digits(num_actions: int, base: int) -> int:
  checks.count("judge.table_tokens", base)
  digits = next((n for n in range(1, num_actions + 1) if base**n >= num_actions), 1)
  if base**digits != num_actions:
    raise ValueError(
      f"judge.table_tokens: expected a base with the table's {num_actions} actions as a power, got"
      f" {base}; 0 means one token per action"
    )
  return digits


def _reader(num_actions: int, first_token: int, base: int) -> Callable[[Answers], Actions]:
  """Returns answers -> (action of each, whether it is readable)."""
  digits = _num_digits(num_actions, base)
  powers = base ** np.arange(digits)[::-1]

  def read(answers: Answers) -> Actions:
    length = answers.tokens.shape[1]
    if length < digits:
      raise ValueError(
        f"the table's {num_actions} actions need {digits} tokens in base {base}, but responses have"
        f" {length}: raise sampling.max_tokens"
      )
    values = answers.tokens[:, :digits] - first_token
    readable = answers.mask[:, :digits] & (values >= 0) & (values < base)
    return jnp.sum(values * powers[None], axis=1), readable.all(axis=1)

  return read

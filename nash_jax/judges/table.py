"""A judge that looks the preference up: P[context, action, action'], for exact games."""

import jax
import numpy as np
from jax import numpy as jnp

from nash_jax.judges.base import Judge, pairwise
from nash_jax.models import sharding
from nash_jax.validation import asset_path


def load(path: str) -> np.ndarray:
  """Returns the table P [X A A] of an .npy file, checked.

  Raises:
    ValueError: no such array, or the worst entry that breaks 0 <= P <= 1 or P + Pᵀ = 1.
  """
  try:
    table = np.load(path)
  except (OSError, ValueError) as error:
    raise ValueError(f"judge.table: expected an .npy file, got {path!r}: {error}") from error
  check(table, path)
  return table


def check(table: np.ndarray, name: str = "the array") -> None:
  """Raises ValueError, naming the worst entry, unless `table` [X A A] holds preferences."""
  if table.ndim != 3 or table.shape[1] != table.shape[2] or not table.size:
    raise ValueError(f"judge.table: expected shape [X A A], got {table.shape} in {name}")
  outside = np.maximum(table - 1, -table)
  unfair = np.abs(table + table.swapaxes(1, 2) - 1)
  for excess, rule, bound in ((outside, "in [0, 1]", 0), (unfair, "with P + Pᵀ = 1", 1e-6)):
    worst = np.unravel_index(np.argmax(excess), table.shape)  # NaN is argmax's first choice
    if not excess[worst] <= bound:
      x, a, b = map(int, worst)
      raise ValueError(
        f"judge.table: expected probabilities {rule}, but in {name} P[{x}, {a}, {b}] = "
        f"{table[x, a, b]} and P[{x}, {b}, {a}] = {table[x, b, a]}; that is the worst entry"
      )


def make(config, tokenizer, params=None, mesh=None) -> Judge:
  """Builds the judge from `config.table`; see judges.make, `judge` and `reward_judge`."""
  table = load(asset_path(config.table))
  base = config.table_tokens or table.shape[1]
  last = config.first_token + base
  if config.first_token < 0 or last > tokenizer.size:
    raise ValueError(
      f"judge.first_token + judge.table_tokens: expected ids within the tokenizer's "
      f"{tokenizer.size} pieces, got {config.first_token} to {last - 1}"
    )
  kind = reward_judge if config.name == "table_reward" else judge
  made = kind(table, config.first_token, base)
  return made.replace(params=sharding.shard(made.params, mesh))


def judge(table: np.ndarray, first_token: int, base: int) -> Judge:
  """Builds the judge of a table [X A A].

  The context is prompts.index % X. The action is read from a response's first tokens as digits,
  token - first_token, in `base`, the most significant first; A must be a power of the base. Other
  tokens, or too few, make the comparison not valid.
  """
  read = _reader(table.shape[1], first_token, base)

  def compare(params, prompts, a, b):
    (action, known), (other, other_known) = a, b
    valid = known & other_known
    p = params[prompts.index % len(params), action, other]
    return jnp.where(valid, p, 0.5), valid, {}

  return Judge(jnp.asarray(table), pairwise(compare, lambda params, *rest: read(*rest)))


def reward_judge(table: np.ndarray, first_token: int, base: int) -> Judge:
  """Builds the judge of the Bradley-Terry rewards that fit a table best, all pairs alike.

  Responses are read as `judge` reads them; what cannot be read has no reward (NaN).
  """
  from nash_jax.games import preference

  read = _reader(table.shape[1], first_token, base)
  with jax.enable_x64(True):
    rewards = np.stack([preference.bradley_terry(game.astype(np.float64)) for game in table])

  def reward(params, prompts, answers):
    action, known = read(prompts, answers)
    return jnp.where(known, params[prompts.index % len(params), action], jnp.nan)

  def compare(params, prompts, a, b):
    valid = jnp.isfinite(a) & jnp.isfinite(b)
    return jnp.where(valid, jax.nn.sigmoid(a - b), 0.5), valid, {}

  return Judge(jnp.asarray(rewards, jnp.float32), pairwise(compare, reward, scalar=True))


def _reader(actions: int, first_token: int, base: int):
  """Returns (prompts, answers) -> (action [N], whether it could be read [N])."""
  digits = next((n for n in range(1, actions + 1) if base**n >= actions), 1)
  if base**digits != actions:
    raise ValueError(
      f"judge.table_tokens: expected a base of which the table's {actions} actions are a power, "
      f"got {base}; 0 stands for one token an action"
    )
  powers = base ** np.arange(digits)[::-1]

  def read(prompts, answers):
    if answers.tokens.shape[1] < digits:
      raise ValueError(
        f"the table's {actions} actions need {digits} tokens in base {base}, but responses have "
        f"{answers.tokens.shape[1]}: raise sampling.max_tokens"
      )
    values = answers.tokens[:, :digits] - first_token
    known = answers.mask[:, :digits] & (values >= 0) & (values < base)
    return jnp.sum(values * powers[None], axis=1), known.all(axis=1)

  return read

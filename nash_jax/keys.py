"""Random keys by purpose and step, so that a resumed run draws the same numbers."""

import zlib

import jax


def key(seed: int, name: str, step: int = 0) -> jax.Array:
  """Returns the PRNG key of purpose `name` at `step`; the same triple gives the same key."""
  named = jax.random.fold_in(
    jax.random.key(seed), zlib.crc32(name.encode("utf-8", "surrogatepass"))
  )
  return jax.random.fold_in(named, step)

"""Nash learning from human feedback in JAX.

The jobs, each `run(config, workdir)`: train, fit, collect, sample, arena, compare. Modules are
imported when they are first named, so `import nash_jax` costs nothing.
"""

import importlib

__version__ = "0.1.0"
__all__ = ["arena", "collect", "compare", "config", "fit", "games", "judges", "sample", "train"]


def __getattr__(name: str):
  if name in __all__:
    return importlib.import_module(f"nash_jax.{name}")
  raise AttributeError(f"module nash_jax has no attribute {name!r}")


def __dir__():
  return sorted([*globals(), *__all__])

"""Nash learning from human feedback in JAX.

Each job is a module with `run(config, workdir)`: train, fit, collect, sample, arena, compare and
others. Modules are imported on first use, so `import nash_jax` costs nothing.
"""

import importlib
import types

__version__ = "0.1.0"
# {name in this package: module}
_MODULES = {
  **{name: name for name in ("config", "fit", "games", "judges", "plan", "train", "weights")},
  **{
    name: f"jobs.{name}"
    for name in ("agreement", "arena", "collect", "compare", "demo", "sample", "vote")
  },
}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> types.ModuleType:
  if name in _MODULES:
    return importlib.import_module(f"nash_jax.{_MODULES[name]}")
  raise AttributeError(f"module nash_jax has no attribute {name!r}")


def __dir__() -> list[str]:
  return sorted([*globals(), *__all__])

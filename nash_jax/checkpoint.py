"""The whole run state on disk: asynchronous, atomic, and verified before it is used again.

workdir/config.json, versions.json      what the run was started with last
workdir/checkpoints/00000050/<field>    one Orbax folder for every field of the state
workdir/checkpoints/00000050/manifest   shape, sum and finiteness of every leaf, score, config

A checkpoint is good where it was committed, its leaves are finite and their sums are those of the
state that was saved. A bad one that is passed over is renamed, never deleted.
"""

import importlib.metadata
import json
import logging
import os
import signal
import threading
import time
import zlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import traverse_util
from jax import numpy as jnp
from jax.experimental import multihost_utils

from nash_jax import config as configs
from nash_jax import keys
from nash_jax.models import gemma, weights
from nash_jax.types import Params

log = logging.getLogger(__name__)
LIBRARIES = ("nash_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "gemma")


class Damaged(Exception):
  """A checkpoint that must not be used; its text says why."""


def _sum(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns a uint32 sum over hashes of bit pattern and place, and finiteness.

  Integer addition commutes even where it wraps around, so every mesh gives the same sum; the hash
  of a place is one-to-one (murmur3's last mixing), so that no single change goes unseen.
  """
  finite = jnp.all(jnp.isfinite(x)) if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.array(True)
  x = x.astype(jnp.uint8) if x.dtype == bool else x
  unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[x.dtype.itemsize]
  h = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
  for axis in range(h.ndim):
    place = jax.lax.broadcasted_iota(jnp.uint32, h.shape, axis)
    h += place * jnp.uint32(pow(0x9E3779B1, axis + 1, 2**32))
  h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
  h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
  return jnp.sum(h ^ (h >> 16), dtype=jnp.uint32), finite


@jax.jit
def _sums(leaves: dict[str, jax.Array]) -> dict[str, tuple[jax.Array, jax.Array]]:
  return {name: _sum(x) for name, x in leaves.items()}


def _leaves(tree, field: str = "") -> dict[str, Any]:
  """Returns leaves by dotted name, in the tree's order; `field` is what the tree is part of."""
  paths = jax.tree_util.tree_flatten_with_path(tree)[0]
  names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in paths]
  return {".".join(filter(None, (field, n))): x for n, (_, x) in zip(names, paths, strict=True)}


def _composite(leaves: dict[str, Any], wrap: Callable, **more) -> ocp.args.Composite:
  """Returns Orbax's arguments with the leaves grouped by field, so that each is read alone."""
  fields = {}
  for name, x in leaves.items():
    fields.setdefault(name.split(".")[0], {})[name] = x
  return ocp.args.Composite(**{field: wrap(x) for field, x in fields.items()}, **more)


def _sync(what: str) -> None:
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(what)


def _everywhere(read: Callable, *args):
  """Returns read(*args); raises Damaged on every process where it fails on any of them."""
  result, error = None, None
  try:
    result = read(*args)
  except Exception as e:  # a broken file can make a reader raise anything
    error = e
  if np.any(multihost_utils.process_allgather(np.array(error is not None))):
    # The first line says what is wrong; Orbax goes on with the trees it was given.
    text = str(error or "another process could not read it").strip() or "no reason given"
    kind = "" if error is None or isinstance(error, Damaged) else f"{type(error).__name__}: "
    raise Damaged(kind + text.splitlines()[0][:300]) from error
  return result


def _crc32(manifest: dict[str, Any]) -> int:
  return zlib.crc32(json.dumps(manifest, sort_keys=True).encode())


def _manifest(path: epath.Path) -> dict[str, Any]:
  marker = path / "_CHECKPOINT_METADATA"
  done = ocp.utils.is_checkpoint_finalized(path) and marker.exists()
  if not done or not json.loads(marker.read_text())["commit_timestamp_nsecs"]:
    raise Damaged(f"half-written: {marker.name} does not say that it was committed")
  sealed = json.loads((path / "manifest" / "metadata").read_text())
  if sealed["crc32"] != _crc32(sealed["manifest"]):
    raise Damaged("its manifest is not what was saved")
  return sealed["manifest"]


def _compare(saved: dict[str, Any], wanted: dict[str, Any], path: epath.Path) -> None:
  there = {name: f"{leaf['dtype']}{leaf['shape']}" for name, leaf in saved.items()}
  here = {name: f"{x.dtype}{list(x.shape)}" for name, x in wanted.items()}
  for name in [*here, *there]:
    if there.get(name) != here.get(name):
      raise ValueError(
        f"{path} does not fit: {name} is {there.get(name, 'absent')} there and "
        f"{here.get(name, 'absent')} here. Use the config it was made with, or another workdir."
      )


def _read(reader: ocp.Checkpointer, path: epath.Path, like, field: str) -> Any:
  """Restores a state, or one field of it, as `like`; raises Damaged, or ValueError on a misfit."""
  saved = _everywhere(_manifest, path)["leaves"]
  saved = {n: leaf for n, leaf in saved.items() if not field or n.split(".")[0] == field}
  wanted = _leaves(like, field)
  _compare(saved, wanted, path)
  for name, leaf in saved.items():
    if not leaf["finite"]:
      raise Damaged(f"{name} is not finite")
  first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  abstract = {
    name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None) or first)
    for name, x in wanted.items()
  }
  args = _composite(abstract, ocp.args.StandardRestore)
  read = _everywhere(lambda: reader.restore(path, args=args))
  got = {name: read[name.split(".")[0]][name] for name in wanted}
  for name, (total, _) in jax.device_get(_sums(got)).items():
    if int(total) != saved[name]["sum"]:
      raise Damaged(f"{name} is not what was saved: its sum differs")
  return jax.tree.unflatten(jax.tree.structure(like), list(got.values()))


def _folder(workdir) -> epath.Path:
  return epath.Path(workdir if "://" in str(workdir) else os.path.abspath(workdir)) / "checkpoints"


def _steps(folder: epath.Path) -> list[int]:
  names = [path.name for path in folder.iterdir()] if folder.exists() else []
  return sorted(int(name) for name in names if name.isdigit())


def _good(folder: epath.Path) -> dict[int, float | None]:
  """Returns the scores of the checkpoints that their manifests call complete and finite."""
  good = {}
  for step in _steps(folder):
    try:
      manifest = _manifest(folder / f"{step:08d}")
    except Exception as e:
      log.info("checkpoint %d does not count: %s", step, e)
      continue
    if all(leaf["finite"] for leaf in manifest["leaves"].values()):
      good[step] = manifest["score"]
  return good


def _best(good: dict[int, float | None]) -> int | None:
  scored = [(score, step) for step, score in good.items() if score is not None]
  return max(scored)[1] if scored else None


def _newest(reader: ocp.Checkpointer, folder: epath.Path, steps: list[int], like, field: str = ""):
  """Returns (tree, step, bad steps) of the newest good one of `steps`; (None, -1, []) without any.

  Raises:
    ValueError: none of them is good, or a good one does not fit.
  """
  bad = {}
  for step in sorted(steps, reverse=True):
    try:
      tree = _read(reader, folder / f"{step:08d}", like, field)
    except Damaged as e:
      bad[step] = str(e)
      continue
    if bad:
      log.warning("damaged checkpoints in %s: %s; %d is used instead", folder, bad, step)
    return tree, step, list(bad)
  if bad:
    raise ValueError(f"no checkpoint in {folder} is good: {bad}. To start again, move it away.")
  return None, -1, []


def _check_config(workdir, saved: dict, config: dict, allow: tuple[str, ...]) -> None:
  there, here = (traverse_util.flatten_dict(c, True, sep=".") for c in (saved, config))
  lines = {
    name: f"  {name}: {there.get(name, 'absent')!r} there, {here.get(name, 'absent')!r} here"
    for name in sorted(there.keys() | here.keys())
    if there.get(name, "absent") != here.get(name, "absent")
    # A group allows its fields; and what may differ is itself no property of a run.
    and not any(f"{name}.".startswith(f"{field}.") for field in ("checkpoint.allow", *allow))
  }
  if lines:
    raise ValueError(
      f"workdir {workdir} was made with another config:\n" + "\n".join(lines.values())
      + "\nUse another workdir, or, where a resumed run may differ in these, set "
      f"checkpoint.allow={(*allow, *lines)!r}."
    )  # fmt: skip


class Checkpoints:
  """The checkpoints of one run: the last `keep` good ones and the best by score.

  All processes make the same calls.

  Args:
    config: the run's, a dict or ConfigDict.
    allow: dotted fields, or groups of them, in which it may differ from the workdir's.

  Raises:
    ValueError: `keep` below 1, a workdir that cannot be written, or one made with another config.
  """

  def __init__(self, workdir, *, keep: int, config, allow: tuple[str, ...] = ()):
    if keep < 1:
      raise ValueError(f"checkpoint.keep: expected at least 1, got {keep}")
    self._keep, self._folder = keep, _folder(workdir)
    workdir = self._folder.parent
    path = workdir / "config.json"
    config = config.to_dict() if hasattr(config, "to_dict") else config
    # Through JSON and back, tuples are lists on both sides of the comparison.
    self._config = json.loads(json.dumps(config, default=str))
    self._versions = {library: importlib.metadata.version(library) for library in LIBRARIES}
    try:
      workdir.mkdir(parents=True, exist_ok=True)
      if path.exists():
        _check_config(workdir, json.loads(path.read_text()), self._config, allow)
      _sync("every process has read the workdir's config")
      if jax.process_index() == 0:
        for name, value in (("config", self._config), ("versions", self._versions)):
          part = workdir / f"{name}.json.part"
          part.write_text(json.dumps(value, indent=2) + "\n")
          part.replace(workdir / f"{name}.json")
    except OSError as e:
      raise ValueError(f"workdir {workdir}: expected a folder that can be written: {e}") from e
    except json.JSONDecodeError as e:
      raise ValueError(f"{path} does not parse ({e}): restore it or move it") from e
    self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())

  def save(self, step: int, state, score: float | None = None) -> None:
    """Saves a state: returns once its buffers may be donated, and goes on writing behind.

    A step that is saved already is left as it is.

    Args:
      step: completed steps.
      state: a dataclass or dict of pytrees of jax arrays; a field may be None or {}.
      score: higher is better.
    """
    self.wait()
    if step in _steps(self._folder):
      return
    leaves = _leaves(state)
    sums = jax.device_get(_sums(leaves))
    manifest = {
      "step": step,
      "score": None if score is None or not np.isfinite(score) else float(score),
      "versions": self._versions,
      "config": self._config,
      "leaves": {
        name: {"shape": list(x.shape), "dtype": str(x.dtype),
               "sum": int(sums[name][0]), "finite": bool(sums[name][1])}
        for name, x in leaves.items()
      },
    }  # fmt: skip
    sealed = ocp.args.JsonSave({"crc32": _crc32(manifest), "manifest": manifest})
    args = _composite(leaves, ocp.args.StandardSave, manifest=sealed)
    self._orbax.save(self._folder / f"{step:08d}", args=args)

  def restore(self, like) -> tuple[Any, int] | None:
    """Returns (state, step) of the newest good checkpoint in the shardings of `like`, or None.

    Bad ones on the way are named in a warning and renamed, so that their steps can be saved again.

    Raises:
      ValueError: a leaf is missing or has another shape or dtype (the first is named), or there
        are checkpoints and none is good.
    """
    self.wait()
    tree, step, bad = _newest(self._orbax, self._folder, _steps(self._folder), like)
    for path in self._folder.glob("*.orbax-checkpoint-tmp*"):
      if int(path.name.split(".")[0]) > step:
        log.warning("half-written %s was never finished: step %d is used instead", path, step)
    for number in bad if jax.process_index() == 0 else ():
      path = self._folder / f"{number:08d}"
      path.rename(self._folder / f"{path.name}.damaged-{time.time_ns()}")
    _sync("damaged checkpoints are renamed")
    return None if step < 0 else (tree, step)

  def last_good(self) -> int | None:
    """Returns the newest step whose checkpoint its manifest calls complete and finite."""
    self.wait()
    return max(_good(self._folder), default=None)

  def best(self) -> int | None:
    """Returns the step of the best score, the later of equals."""
    self.wait()
    return _best(_good(self._folder))

  def wait(self) -> None:
    """Waits until what was saved is on disk, raises what went wrong, then deletes old ones."""
    self._orbax.wait_until_finished()
    good = _good(self._folder) if jax.process_index() == 0 else {}
    kept = {*sorted(good)[-self._keep :], _best(good)}
    for step in _steps(self._folder) if good else ():
      # What is newer than the last good one is left for `restore` to judge.
      if step not in kept and step < max(good):
        (self._folder / f"{step:08d}").rmtree()
    _sync("old checkpoints are deleted")

  def close(self) -> None:
    """Waits, and ends Orbax's threads."""
    self.wait()
    self._orbax.close()


def restore_part(
  workdir, part: str, like, step: int | None = None, best: bool = False
) -> tuple[Any, int]:
  """Returns (tree, step) of one field of a run's state, such as "params", and reads no other.

  Args:
    like: the field's tree, of arrays or of ShapeDtypeStructs with shardings.
    step: of a certain checkpoint; default the best by score, or else the newest good one.

  Raises:
    ValueError: no such checkpoint, a damaged one, or a leaf that differs (the first is named).
  """
  folder = _folder(workdir)
  steps = _steps(folder)
  if best and step is None:
    step = _best(_good(folder))
  if not steps or step not in (None, *steps) or (best and step is None):
    wanted = "the best by a score" if step is None and best else "one" if step is None else step
    raise ValueError(f"checkpoint in {folder}: expected {wanted}, found {steps or 'none'}")
  with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
    return _newest(reader, folder, steps if step is None else [step], like, part)[:2]


def load_weights(spec: str, model: gemma.GemmaConfig, seed: int = 0) -> Params:
  """Returns float32 parameters from a file, from a run, or random ones for "".

  Args:
    spec: "weights.safetensors", "assets:...", or a run's workdir: "runs/x" (its newest params),
      "runs/x@target", "runs/x@params:50", "runs/x@params:best".

  Raises:
    ValueError: no such weights, or ones of another shape (the first difference is named).
  """
  if not spec:
    return jax.jit(lambda key: gemma.init(key, model))(keys.key(seed, "init"))
  where, _, rest = configs.path(spec).partition("@")
  if not os.path.isdir(where):
    return weights.load(where, model)
  part, _, step = rest.partition(":")
  number = int(step) if step.isdigit() else None
  return restore_part(where, part or "params", gemma.shapes(model), number, step == "best")[0]


class Stop:
  """Turns SIGTERM and Ctrl-C into `requested`, which the loop reads once a step.

  A second Ctrl-C raises KeyboardInterrupt at once. Outside the main thread, where Python allows no
  handlers, it changes nothing.
  """

  def __init__(self):
    self.requested = False
    self._old = {}

  def _handle(self, number, frame):
    if self.requested and number == signal.SIGINT:
      raise KeyboardInterrupt
    self.requested = True
    # No logging here: its lock may be held by the very code that was interrupted.
    os.write(2, b"\nstopping after this step, then saving; Ctrl-C once more leaves at once\n")

  def __enter__(self):
    if threading.current_thread() is threading.main_thread():
      for number in (signal.SIGTERM, signal.SIGINT):
        self._old[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, *exc):
    for number, handler in self._old.items():
      signal.signal(number, handler)

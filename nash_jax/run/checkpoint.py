"""The whole run state on disk: asynchronous, atomic, and verified before it is used again.

workdir/config.json, versions.json      what the run was started with last
workdir/base.json                       sums of the parameters it never changes
workdir/checkpoints/00000050/<field>    one Orbax folder for every field of the state
workdir/checkpoints/00000050/manifest   type and sum of every leaf, score, config, versions

A checkpoint is good where its leaves are those that are asked for and have the sums of the state
that was saved. A bad one that is passed over is renamed, never deleted.
"""

import importlib.metadata
import json
import logging
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import traverse_util
from jax import numpy as jnp
from jax.experimental import multihost_utils

from nash_jax.types import Params
from nash_jax.validation import require

log = logging.getLogger(__name__)
LIBRARIES = ("nash_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "gemma")


def _sum(x: jax.Array) -> jax.Array:
  """Returns a uint32 sum over hashes of bit pattern and place.

  Integer addition commutes even where it wraps around, so every mesh gives the same sum; the hash
  of a place is one-to-one (murmur3's last mixing), so that no single change goes unseen.
  """
  h = x.view(f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
  for axis in range(h.ndim):
    place = jax.lax.broadcasted_iota(jnp.uint32, h.shape, axis)
    h += place * jnp.uint32(pow(0x9E3779B1, axis + 1, 2**32))
  h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
  h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
  return jnp.sum(h ^ (h >> 16), dtype=jnp.uint32)


@jax.jit
def _sums(leaves: dict[str, jax.Array]) -> dict[str, tuple[jax.Array, jax.Array]]:
  """Returns the sum of every leaf, and whether it is finite."""
  return {name: (_sum(x), jnp.all(jnp.isfinite(x))) for name, x in leaves.items()}


def _leaves(tree) -> dict[str, Any]:
  """Returns leaves by dotted name, in the tree's order."""
  paths = jax.tree.leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in paths}


def _composite(leaves: dict[str, Any], wrap: Callable, **more) -> ocp.args.Composite:
  """Returns Orbax's arguments with the leaves grouped by field, so that each is read alone."""
  fields = {}
  for name, x in leaves.items():
    fields.setdefault(name.split(".")[0], {})[name] = x
  return ocp.args.Composite(**{field: wrap(x) for field, x in fields.items()}, **more)


def _type(x) -> str:
  return f"{x.dtype}{list(x.shape)}"


def _sync(what: str) -> None:
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(what)


def _folder(workdir) -> epath.Path:
  return epath.Path(workdir if "://" in str(workdir) else os.path.abspath(workdir)) / "checkpoints"


def _steps(folder: epath.Path) -> list[int]:
  names = [path.name for path in folder.iterdir()] if folder.exists() else []
  return sorted(int(name) for name in names if name.isdigit())


def _manifest(folder: epath.Path, step: int) -> dict[str, Any]:
  return json.loads((folder / f"{step:08d}" / "manifest" / "metadata").read_text())


def _scores(folder: epath.Path) -> dict[int, float]:
  """Returns the score of every checkpoint with a readable manifest; -inf for one without."""
  scores = {}
  for step in _steps(folder):
    try:
      score = _manifest(folder, step)["score"]
    except (OSError, ValueError, KeyError) as e:
      log.info("checkpoint %d does not count: %s", step, e)
      continue
    scores[step] = -np.inf if score is None else score
  return scores


def _best(scores: dict[int, float]) -> int | None:
  """Returns the step with the best score, the later of equals; None where none has a score."""
  score, step = max(((score, step) for step, score in scores.items()), default=(-np.inf, None))
  return step if score > -np.inf else None


def _read(reader: ocp.Checkpointer, folder: epath.Path, step: int, like, part: str):
  """Returns a state, or {part: its field}, as `like`; raises where anything is wrong with it."""
  saved = _manifest(folder, step)["leaves"]
  saved = {name: leaf for name, leaf in saved.items() if part in ("", name.split(".")[0])}
  wanted = _leaves(like)
  there = {name: leaf["type"] for name, leaf in saved.items()}
  here = {name: _type(x) for name, x in wanted.items()}
  for name in [*here, *there]:
    if there.get(name) != here.get(name):
      raise ValueError(
        f"{name} is {there.get(name, 'absent')} there and {here.get(name, 'absent')} here"
      )
  first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  abstract = {
    name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None) or first)
    for name, x in wanted.items()
  }
  args = _composite(abstract, ocp.args.StandardRestore)
  restored = reader.restore(folder / f"{step:08d}", args=args)
  got = {name: restored[name.split(".")[0]][name] for name in wanted}
  for name, (total, _) in jax.device_get(_sums(got)).items():
    if int(total) != saved[name]["sum"]:
      raise ValueError(f"{name} is not what was saved: its sum differs")
  return jax.tree.unflatten(jax.tree.structure(like), got.values())


def _newest(reader: ocp.Checkpointer, folder: epath.Path, steps: list[int], like, part: str = ""):
  """Returns (tree, step, bad steps) of the newest good one of `steps`; (None, -1, []) without any.

  Raises:
    ValueError: none of them is good; says why, for each.
  """
  bad = {}
  for step in sorted(steps, reverse=True):
    why = ""
    try:
      tree = _read(reader, folder, step, like, part)
    except Exception as e:  # a broken file can make a reader raise anything
      # The first line says what is wrong; Orbax goes on with the trees it was given.
      why = f"{type(e).__name__}: {e}".splitlines()[0][:300]
    if not np.any(multihost_utils.process_allgather(np.array(why != ""))):
      if bad:
        log.warning("damaged checkpoints in %s: %s; %d is used instead", folder, bad, step)
      return tree, step, list(bad)
    bad[step] = why or "another process could not read it"
  if bad:
    raise ValueError(
      f"no checkpoint in {folder} is good, or fits this config: {bad}. Use the config it was made "
      "with, or another workdir; to start again, move it away."
    )
  return None, -1, []


def read_config(workdir) -> dict[str, Any]:
  """Returns the config of the run in a workdir, as plain types; {} where there is none.

  Raises:
    ValueError: a file that does not parse.
  """
  path = _folder(workdir).parent / "config.json"
  try:
    return json.loads(path.read_text()) if path.exists() else {}
  except json.JSONDecodeError as e:
    raise ValueError(f"{path} does not parse ({e}): restore it or move it") from e


def differences(saved: dict, config: dict, allow: tuple[str, ...] = ()) -> dict[str, str]:
  """Returns what differs between two runs' configs, a line of text by dotted field.

  `job` counts as equal where `saved` was written before configs named their job.

  Args:
    saved, config: plain types, as from config.describe; lists and tuples are alike.
    allow: dotted fields, or groups of them, that may differ.
  """
  there, here = (
    traverse_util.flatten_dict(json.loads(json.dumps(c, default=str)), True, sep=".")
    for c in (saved, config)
  )
  # What may differ is itself no property of a run.
  allow = ("checkpoint.allow", *allow) if "job" in there else ("checkpoint.allow", "job", *allow)
  allowed = tuple(f"{field}." for field in allow)
  return {
    name: f"  {name}: {there.get(name, 'absent')!r} there, {here.get(name, 'absent')!r} here"
    for name in sorted(there.keys() | here.keys())
    if there.get(name, "absent") != here.get(name, "absent") and not f"{name}.".startswith(allowed)
  }


class Checkpoints:
  """The checkpoints of one run: the last `keep` good ones and the best by score.

  All processes make the same calls.

  Args:
    config: the run's, as plain types (config.describe).
    allow: dotted fields, or groups of them, in which it may differ from the workdir's.

  Raises:
    ValueError: `keep` below 1, a workdir that cannot be written, or one made with another config.
  """

  def __init__(self, workdir, *, keep: int, config, allow: tuple[str, ...] = ()):
    require(keep > 0, "checkpoint.keep", "at least 1", keep, "Set --config.checkpoint.keep.")
    self._keep, self._folder = keep, _folder(workdir)
    workdir = self._folder.parent
    self._config = json.loads(json.dumps(config, default=str))
    self._versions = {library: importlib.metadata.version(library) for library in LIBRARIES}
    try:
      workdir.mkdir(parents=True, exist_ok=True)
      if saved := read_config(workdir):
        lines = differences(saved, self._config, allow)
        if lines:
          raise ValueError(
            f"workdir {workdir} was made with another config:\n"
            + "\n".join(lines.values())
            + "\nUse another workdir, or, where a resumed run may differ in these, set "
            f"checkpoint.allow={(*allow, *lines)!r}."
          )
      _sync("every process has read the workdir's config")
      if jax.process_index() == 0:
        for name, value in (("config", self._config), ("versions", self._versions)):
          part = workdir / f"{name}.json.part"
          part.write_text(json.dumps(value, indent=2) + "\n")
          part.replace(workdir / f"{name}.json")
    except OSError as e:
      raise ValueError(f"workdir {workdir}: expected a folder that can be written: {e}") from e
    self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())

  def save(self, step: int, state, score: float | None = None) -> None:
    """Saves a state: returns once its buffers may be donated, and goes on writing behind.

    A step that is saved already is left as it is.

    Args:
      step: completed steps.
      state: a dataclass or dict of pytrees of jax arrays; a field may be None or {}.
      score: higher is better.

    Raises:
      FloatingPointError: a leaf is not finite; such a state is never saved.
    """
    self.wait()
    if step in _steps(self._folder):
      return
    leaves = _leaves(state)
    sums = jax.device_get(_sums(leaves))
    for name, (_, finite) in sums.items():
      if not finite:
        raise FloatingPointError(f"{name} is not finite after step {step}")
    manifest = {
      "leaves": {n: {"type": _type(x), "sum": int(sums[n][0])} for n, x in leaves.items()},
      "score": None if score is None or not np.isfinite(score) else float(score),
      "config": self._config,
      "versions": self._versions,
    }
    args = _composite(leaves, ocp.args.StandardSave, manifest=ocp.args.JsonSave(manifest))
    self._orbax.save(self._folder / f"{step:08d}", args=args)

  def restore(self, like) -> tuple[Any, int] | None:
    """Returns (state, step) of the newest good checkpoint in the shardings of `like`, or None.

    Bad ones on the way are named in a warning and renamed, so that their steps can be saved again.

    Raises:
      ValueError: there are checkpoints and none is good, or of the leaves, shapes and dtypes of
        `like` (the first difference is named).
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
    """Returns the newest step that was saved to its end."""
    self.wait()
    return max(_scores(self._folder), default=None)

  def wait(self) -> None:
    """Waits until what was saved is on disk, raises what went wrong, then deletes old ones."""
    self._orbax.wait_until_finished()
    scores = _scores(self._folder) if jax.process_index() == 0 else {}
    kept = {*sorted(scores)[-self._keep :], _best(scores)}
    for step in _steps(self._folder) if scores else ():
      # What is newer than the last good one is left for `restore` to judge.
      if step not in kept and step < max(scores):
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
    step = _best(_scores(folder))
  if not steps or step not in (None, *steps) or (best and step is None):
    wanted = "the best by a score" if step is None and best else "one" if step is None else step
    raise ValueError(f"checkpoint in {folder}: expected {wanted}, found {steps or 'none'}")
  with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
    steps = steps if step is None else [step]
    tree, step, _ = _newest(reader, folder, steps, {part: like}, part)
  return tree[part], step


def verify_base(workdir, base: Params, record: bool = False) -> None:
  """Raises ValueError where parameters that a run never changes are not those it began with.

  Args:
    base: the reference, in which adapters learn; known by its sum in its type.
    record: remember those of a type that is new here.
  """
  path = _folder(workdir).parent / "base.json"
  known = json.loads(path.read_text()) if path.exists() else {}
  dtype = str(jax.tree.leaves(base)[0].dtype)
  sums = jax.device_get(_sums(_leaves(base)))
  here = sum(int(total) for total, _ in sums.values()) % 2**32
  if known.setdefault(dtype, here) != here:
    raise ValueError(
      f"model.weights of {path.parent}: expected what the run began with, got other numbers. Put"
      f" them back, or, to go on with these, delete {path}."
    )
  if record and jax.process_index() == 0:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(known) + "\n")
    part.replace(path)

"""The whole state of a run on disk: saved asynchronously and atomically, verified before use.

workdir/config.json, versions.json      config and library versions of the latest start
workdir/base.json                       checksums of the parameters that the run never changes
workdir/checkpoints/00000050/<field>    one Orbax folder for each field of the state
workdir/checkpoints/00000050/manifest   type and checksum of each leaf, score, config, versions

A checkpoint is good if it has the expected leaves, with the checksums of the state that was saved.
A bad one that is passed over is renamed, never deleted.
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
ATTEMPTS = 5  # to read a checkpoint of a run that replaces it meanwhile
Workdir = str | os.PathLike[str]
State = Any  # a dataclass or dict whose fields are pytrees of arrays, None or {}


def _checksum(x: jax.Array) -> jax.Array:
  """Returns a uint32 sum over hashes of each element's bit pattern and position.

  Integer addition commutes even where it wraps around, so every mesh gives the same sum; at each
  position the hash is one-to-one (murmur3's last mixing), so that no single change goes unseen.
  """
  h = x.view(f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
  for axis in range(h.ndim):
    position = jax.lax.broadcasted_iota(jnp.uint32, h.shape, axis)
    h += position * jnp.uint32(pow(0x9E3779B1, axis + 1, 2**32))
  h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
  h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
  return jnp.sum(h ^ (h >> 16), dtype=jnp.uint32)


@jax.jit
def _checksums(leaves: dict[str, jax.Array]) -> dict[str, tuple[jax.Array, jax.Array]]:
  """Returns the checksum of every leaf, and whether the leaf is finite."""
  return {name: (_checksum(x), jnp.all(jnp.isfinite(x))) for name, x in leaves.items()}


def _leaves(tree: State) -> dict[str, Any]:
  """Returns leaves by dotted name, in the tree's order."""
  paths = jax.tree.leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in paths}


def _composite(leaves: dict[str, Any], wrap: Callable, **more: Any) -> ocp.args.Composite:
  """Returns Orbax's arguments with the leaves grouped by field, so that each is read alone."""
  fields: dict[str, dict[str, Any]] = {}
  for name, x in leaves.items():
    fields.setdefault(name.split(".")[0], {})[name] = x
  return ocp.args.Composite(**{field: wrap(x) for field, x in fields.items()}, **more)


def _type(x) -> str:
  return f"{x.dtype}{list(x.shape)}"


def _sync(name: str) -> None:
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def _write_json(path: epath.Path, value: Any) -> None:
  """Replaces a file at once: no reader meets one that is half written."""
  part = path.with_name(f"{path.name}.part")
  part.write_text(json.dumps(value, indent=2) + "\n")
  part.replace(path)


def _folder(workdir: Workdir) -> epath.Path:
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
      scores[step] = -np.inf if score is None else score
    except (OSError, ValueError, KeyError) as error:
      log.info("checkpoint %d does not count: %s", step, error)
  return scores


def _best(scores: dict[int, float]) -> int | None:
  """Returns the step with the best score, the later of equals; None if none has a score."""
  score, step = max(((score, step) for step, score in scores.items()), default=(-np.inf, None))
  return step if score > -np.inf else None


def _restore_verified(
  reader: ocp.Checkpointer, folder: epath.Path, step: int, spec: State, field: str
) -> State:
  """Returns the state, or {field: its tree}, that `spec` describes; raises unless it is good."""
  recorded = _manifest(folder, step)["leaves"]
  recorded = {name: leaf for name, leaf in recorded.items() if field in ("", name.split(".")[0])}
  specs = _leaves(spec)
  for name in [*specs, *recorded]:
    saved = recorded[name]["type"] if name in recorded else "absent"
    expected = _type(specs[name]) if name in specs else "absent"
    if saved != expected:
      raise ValueError(f"{name}: expected {expected}, got {saved}")
  first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  abstract = {
    name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None) or first)
    for name, x in specs.items()
  }
  args = _composite(abstract, ocp.args.StandardRestore)
  restored = reader.restore(folder / f"{step:08d}", args=args)
  leaves = {name: restored[name.split(".")[0]][name] for name in specs}
  for name, (checksum, _) in jax.device_get(_checksums(leaves)).items():
    if int(checksum) != recorded[name]["sum"]:
      raise ValueError(f"{name} is not what was saved: its checksum differs")
  return jax.tree.unflatten(jax.tree.structure(spec), leaves.values())


def _restore_newest(
  reader: ocp.Checkpointer, folder: epath.Path, steps: list[int], spec: State, field: str = ""
) -> tuple[State, int, list[int]]:
  """Returns (tree, step, bad steps) of the newest good one of `steps`; (None, -1, []) if empty.

  Raises:
    ValueError: none of them is good; says why, for each.
  """
  bad: dict[int, str] = {}
  for step in sorted(steps, reverse=True):
    problem = ""
    try:
      tree = _restore_verified(reader, folder, step, spec, field)
    except Exception as error:  # a broken file can make a reader raise anything
      # The first line says what is wrong; Orbax goes on with the trees it was given.
      problem = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    if not np.any(multihost_utils.process_allgather(np.array(problem != ""))):
      if bad:
        log.warning("damaged checkpoints in %s: %s; %d is used instead", folder, bad, step)
      return tree, step, list(bad)
    bad[step] = problem or "another process could not read it"
  if bad:
    raise ValueError(
      f"no checkpoint in {folder} is good and fits this config: {bad}. Use the config it was made "
      "with, or another workdir; to start again, move it away."
    )
  return None, -1, []


def read_config(workdir: Workdir) -> dict[str, Any]:
  """Returns the config of the run in a workdir, as plain types; {} where there is none.

  Raises:
    ValueError: a file that does not parse.
  """
  path = _folder(workdir).parent / "config.json"
  try:
    return json.loads(path.read_text()) if path.exists() else {}
  except json.JSONDecodeError as error:
    raise ValueError(f"{path} does not parse ({error}): restore it or move it") from error


# Fields that older configs lack, and what they meant.
ADDED = {"prompts.duplicates": "keep", "data.duplicates": "keep"}


def differences(
  saved: dict[str, Any], config: dict[str, Any], allow: tuple[str, ...] = ()
) -> dict[str, str]:
  """Returns what differs between two runs' configs: a line of text by dotted field.

  `job` counts as equal if `saved` was written before configs named their job, and so do fields that
  were added since, where they are at what was meant before: see ADDED.

  Args:
    saved, config: plain types, as from config.describe; lists and tuples are alike.
    allow: dotted fields, or groups of them, that may differ.
  """
  old, new = (
    traverse_util.flatten_dict(json.loads(json.dumps(c, default=str)), True, sep=".")
    for c in (saved, config)
  )
  # The list of fields that may differ is itself no property of a run.
  allow = ("checkpoint.allow", *allow) if "job" in old else ("checkpoint.allow", "job", *allow)
  allowed = tuple(f"{field}." for field in allow)
  names = (name for name in sorted(old.keys() | new.keys()) if not f"{name}.".startswith(allowed))
  values = {
    name: (old.get(name, ADDED.get(name, "absent")), new.get(name, "absent")) for name in names
  }
  return {name: f"  {name}: {a!r} there, {b!r} here" for name, (a, b) in values.items() if a != b}


class Checkpoints:
  """The checkpoints of one run: the last `keep` good ones and the best by score.

  All processes make the same calls.

  Args:
    config: the run's, as plain types (config.describe).
    allow: dotted fields, or groups of them, in which it may differ from the workdir's.

  Raises:
    ValueError: `keep` below 1, a workdir that cannot be written, or one made with another config.
  """

  def __init__(
    self, workdir: Workdir, *, keep: int, config: dict[str, Any], allow: tuple[str, ...] = ()
  ):
    require(keep > 0, "checkpoint.keep", "at least 1", keep, "Set --config.checkpoint.keep.")
    self._keep, self._folder = keep, _folder(workdir)
    path = self._folder.parent
    self._config = json.loads(json.dumps(config, default=str))
    self._versions = {library: importlib.metadata.version(library) for library in LIBRARIES}
    try:
      path.mkdir(parents=True, exist_ok=True)
      saved = read_config(path)
      if lines := differences(saved, self._config, allow) if saved else {}:
        listed, fix = "\n".join(lines.values()), f"set checkpoint.allow={(*allow, *lines)!r}."
        raise ValueError(
          f"workdir {path} was made with another config:\n{listed}\nUse another workdir, or, where"
          f" a resumed run may differ in these, {fix}"
        )
      _sync("every process has read the workdir's config")
      if jax.process_index() == 0:
        _write_json(path / "config.json", self._config)
        _write_json(path / "versions.json", self._versions)
    except OSError as error:
      raise ValueError(f"workdir {path}: expected a folder that can be written: {error}") from error
    self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())

  def save(self, step: int, state: State, score: float | None = None) -> None:
    """Saves a state; returns once its buffers may be donated, and writes in the background.

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
    checksums = jax.device_get(_checksums(leaves))
    for name, (_, finite) in checksums.items():
      if not finite:
        raise FloatingPointError(f"{name} is not finite after step {step}")
    manifest = {
      "leaves": {n: {"type": _type(x), "sum": int(checksums[n][0])} for n, x in leaves.items()},
      "score": None if score is None or not np.isfinite(score) else float(score),
      "config": self._config,
      "versions": self._versions,
    }
    args = _composite(leaves, ocp.args.StandardSave, manifest=ocp.args.JsonSave(manifest))
    self._orbax.save(self._folder / f"{step:08d}", args=args)

  def restore(self, spec: State) -> tuple[State, int] | None:
    """Returns (state, step) of the newest good checkpoint in the shardings of `spec`, or None.

    Newer ones, which are bad, are named in a warning and renamed: their steps can be saved again.

    Raises:
      ValueError: none of the checkpoints is good, or has the leaves, shapes and dtypes of `spec`
        (the first difference is named).
    """
    self.wait()
    state, step, bad = _restore_newest(self._orbax, self._folder, _steps(self._folder), spec)
    for path in self._folder.glob("*.orbax-checkpoint-tmp*"):
      if int(path.name.split(".")[0]) > step:
        log.warning("half-written %s was never finished: step %d is used instead", path, step)
    for number in bad if jax.process_index() == 0 else ():
      path = self._folder / f"{number:08d}"
      path.rename(self._folder / f"{path.name}.damaged-{time.time_ns()}")
    _sync("damaged checkpoints are renamed")
    return None if step < 0 else (state, step)

  def last_good(self) -> int | None:
    """Returns the newest step that was saved completely."""
    self.wait()
    return max(_scores(self._folder), default=None)

  def wait(self) -> None:
    """Waits until what was saved is on disk, raises any error of saving, then deletes old ones."""
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
  workdir: Workdir, field: str, spec: Params, step: int | None = None, best: bool = False
) -> tuple[Params, int]:
  """Returns (tree, step) of one field of a run's state, such as "params", and reads no other.

  Args:
    spec: the field's tree, of arrays or of ShapeDtypeStructs with shardings.
    step: of a certain checkpoint; default the newest good one.
    best: of the checkpoint with the best score, if no step is given.

  Raises:
    ValueError: no such checkpoint, a damaged one, or a leaf that differs (the first is named).
  """
  folder, given = _folder(workdir), step
  for _ in range(ATTEMPTS):
    steps = _steps(folder)
    step = _best(_scores(folder)) if best and given is None else given
    if not steps or step not in (None, *steps) or (best and step is None):
      expected = "the best by a score" if step is None and best else "one" if step is None else step
      raise ValueError(f"checkpoint in {folder}: expected {expected}, found {steps or 'none'}")
    candidates = steps if step is None else [step]
    try:
      with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
        state, restored_step, _ = _restore_newest(reader, folder, candidates, {field: spec}, field)
      return state[field], restored_step
    except (OSError, ValueError) as error:
      # A run that goes on saves newer ones and deletes those that are being read.
      changed = np.any(multihost_utils.process_allgather(np.array(_steps(folder) != steps)))
      if not changed:
        raise
      log.info("checkpoints in %s changed while they were read: %s", folder, error)
  raise ValueError(
    f"checkpoint in {folder}: a run replaced what was there each of {ATTEMPTS} times that it was"
    " read. Give that run a greater checkpoint.keep or checkpoint.every, or stop it."
  )


def saved_steps(workdir: Workdir) -> list[int]:
  """Returns the steps of the checkpoints in a workdir, in order, whether good or damaged."""
  return _steps(_folder(workdir))


def verify_base(workdir: Workdir, base: Params, record: bool = False) -> None:
  """Raises ValueError unless the parameters that a run never changes are those it began with.

  Args:
    base: the reference, in which adapters learn; identified by its checksum in its dtype.
    record: remember the checksum of a dtype that has none yet.
  """
  path = _folder(workdir).parent / "base.json"
  recorded = json.loads(path.read_text()) if path.exists() else {}
  dtype = str(jax.tree.leaves(base)[0].dtype)
  checksums = jax.device_get(_checksums(_leaves(base)))
  checksum = sum(int(leaf_sum) for leaf_sum, _ in checksums.values()) % 2**32
  if recorded.setdefault(dtype, checksum) != checksum:
    raise ValueError(
      f"model.weights of {path.parent}: expected what the run began with, got other numbers. Put"
      f" them back, or, to go on with these, delete {path}."
    )
  if record and jax.process_index() == 0:
    _write_json(path, recorded)

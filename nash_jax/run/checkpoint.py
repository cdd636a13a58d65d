"""The whole state of a run on disk: saved asynchronously and atomically, verified before use.

workdir/config.json, versions.json      config and library versions of the latest start
workdir/base.json                       checksums of the parameters that the run never changes
workdir/inputs.json                     checksums of the files and weights that it reads (inputs.py)
workdir/checkpoints/00000050/<field>    one Orbax folder for each field of the state
workdir/checkpoints/00000050/manifest   type and checksum of each leaf, score, config, versions

A checkpoint is good if it has the expected leaves and their checksums match. A bad one is renamed,
never deleted. One that cannot be read at the moment counts as neither good nor bad.
"""

import functools
import importlib.metadata
import itertools
import json
import logging
import os
import re
import time
from collections.abc import Callable, Collection
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import traverse_util
from jax import numpy as jnp
from jax.experimental import multihost_utils

from nash_jax.run import files
from nash_jax.types import Params
from nash_jax.validation import require

log = logging.getLogger(__name__)
LIBRARIES = ("nash_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "gemma")
ATTEMPTS = 5  # to read a checkpoint while its run replaces it
Workdir = str | os.PathLike[str]
State = Any  # a dataclass or dict whose fields are pytrees of arrays, None or {}


def _checksum(x: jax.Array) -> jax.Array:
  """Returns a uint32 sum over hashes of each element's bit pattern and position.

  Integer addition commutes even when it wraps around, so every mesh gives the same sum. At each
  position the hash is one-to-one (murmur3's finaliser), so every single change is detected.
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
  """Returns {dotted name: leaf} in the tree's order."""
  paths = jax.tree.leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in paths}


def _composite(leaves: dict[str, Any], wrap: Callable, **more: Any) -> ocp.args.Composite:
  """Returns Orbax's arguments with leaves grouped by field, so that each can be read alone."""
  fields: dict[str, dict[str, Any]] = {}
  for name, x in leaves.items():
    fields.setdefault(name.split(".")[0], {})[name] = x
  return ocp.args.Composite(**{field: wrap(x) for field, x in fields.items()}, **more)


def _type(x) -> str:
  return f"{x.dtype}{list(x.shape)}"


def _cause(error: Exception) -> str:
  """Returns why reading or writing failed; tensorstore puts it behind a path of any length."""
  text = f"{error}".partition("\n")[0]
  found = re.search(r"([^:]+) \[os_error_code=", text)
  return found[1].strip() if found else text[:300]


def _sync(name: str) -> None:
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


# Seconds before each retry of a file that could not be read.
READ_AGAIN = (0.1, 1.0, 3.0)
# Errors that no retry cures; other system errors may pass.
_ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


def _retry[T](path: epath.Path, read: Callable[[], T]) -> T:
  """Returns what `read` returns; retries for a few seconds after a system error that may pass."""
  for seconds in itertools.chain(READ_AGAIN, [None]):
    try:
      return read()
    except _ABSENT:
      raise
    except OSError as error:
      if seconds is None:
        raise OSError(
          f"{path} cannot be read ({error}): nothing has changed, and the same command resumes once"
          " it can be read"
        ) from error
      log.warning("%s: %s; trying again in %g s", path, error, seconds)
      time.sleep(seconds)
  raise AssertionError("the last attempt returns or raises")


def _read_json(path: epath.Path) -> dict[str, Any]:
  """Returns the object in a JSON file; raises OSError if it cannot be read."""
  return files.parse_object(path, _retry(path, path.read_bytes))


def _write_json(path: epath.Path, value: Any) -> None:
  """Replaces a JSON file atomically."""
  part = path.with_name(f"{path.name}.part")
  try:
    part.write_text(json.dumps(value, indent=2) + "\n")
    part.replace(path)
  except OSError as error:
    raise OSError(f"{path} cannot be written: {error}") from error


def _folder(workdir: Workdir) -> epath.Path:
  return epath.Path(workdir if "://" in str(workdir) else os.path.abspath(workdir)) / "checkpoints"


def _names(folder: epath.Path) -> list[str]:
  """Returns the sorted names in a folder of checkpoints; [] if there is no folder."""
  try:
    return sorted(path.name for path in _retry(folder, lambda: list(folder.iterdir())))
  except FileNotFoundError:
    return []
  except NotADirectoryError:
    raise ValueError(f"{folder}: expected a folder, got a file: move it away") from None


def _is_step(name: str) -> bool:
  """Returns whether this is the name of a checkpoint."""
  return name.isascii() and name.isdigit() and name == f"{int(name):08d}"


def _steps(folder: epath.Path) -> list[int]:
  return sorted(int(name) for name in _names(folder) if _is_step(name))


def _manifest(folder: epath.Path, step: int) -> dict[str, Any]:
  """Returns a checkpoint's manifest; raises ValueError if it is damaged."""
  manifest = _read_json(folder / f"{step:08d}" / "manifest" / "metadata")
  leaves, score = manifest.get("leaves"), manifest.get("score")
  whole = isinstance(leaves, dict) and all(
    isinstance(leaf, dict) and {"type", "sum"} <= leaf.keys() for leaf in leaves.values()
  )
  if not whole or not isinstance(score, int | float | None):
    raise ValueError(f"the manifest of {folder / f'{step:08d}'} is damaged")
  return manifest


def _scores(folder: epath.Path) -> dict[int, float]:
  """Returns {step: score} of the checkpoints with a readable manifest; -inf if they have none."""
  scores = {}
  for step in _steps(folder):
    try:
      score = _manifest(folder, step)["score"]
      scores[step] = -np.inf if score is None else score
    except (*_ABSENT, ValueError) as error:
      log.info("checkpoint %d is ignored: %s", step, error)
  return scores


def _best(scores: dict[int, float]) -> int | None:
  """Returns the step with the best score, the latest of equals; None if none has a score."""
  score, step = max(((score, step) for step, score in scores.items()), default=(-np.inf, None))
  return step if score > -np.inf else None


def _restore_verified(
  reader: ocp.Checkpointer, folder: epath.Path, step: int, spec: State, field: str
) -> State:
  """Returns the state, or {field: tree}, that `spec` describes; raises unless it is good."""
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


def _read_through(path: epath.Path) -> None:
  """Reads every byte below a path, so that an unreadable file raises a system error."""
  if path.is_dir():
    for inner in path.iterdir():
      _read_through(inner)
  else:
    with path.open("rb") as file:
      while file.read(1 << 24):
        continue


def _problem(path: epath.Path, read: Callable[[], Any]) -> tuple[Any, str]:
  """Returns (what `read` returns, ""), or (None, what is damaged at `path`).

  Files are damaged if they can be read but `read` fails twice.

  Raises:
    OSError: they cannot be read, which says nothing about their content.
  """
  for last in (False, True):
    try:
      return read(), ""
    except (MemoryError, jax.errors.JaxRuntimeError):
      raise  # the machine's fault, not the checkpoint's
    except Exception as error:  # a broken file can make a reader raise anything
      # The first line says what is wrong; then Orbax prints whole trees.
      problem = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    try:
      _retry(path, lambda: _read_through(path))
    except _ABSENT as error:
      return None, f"{type(error).__name__}: {error}"
    if last:
      break
  return None, problem


def _restore_newest(
  reader: ocp.Checkpointer, folder: epath.Path, steps: list[int], spec: State, field: str = ""
) -> tuple[State, int, list[int]]:
  """Returns (tree, step, bad steps) of the newest good checkpoint; (None, -1, []) without `steps`.

  Raises:
    ValueError: none of `steps` is good; says why for each.
    OSError: a checkpoint that is newer than every good one cannot be read.
  """
  bad: dict[int, str] = {}
  for step in sorted(steps, reverse=True):
    read = functools.partial(_restore_verified, reader, folder, step, spec, field)
    tree, problem = _problem(folder / f"{step:08d}", read)
    if not np.any(multihost_utils.process_allgather(np.array(problem != ""))):
      if bad:
        log.warning("damaged checkpoints in %s: %s; %d is used instead", folder, bad, step)
      return tree, step, list(bad)
    bad[step] = problem or "another process could not read it"
  if bad:
    raise ValueError(
      f"no checkpoint in {folder} is good and fits this config: {bad}. Use the config it was made "
      "with, or another workdir. To start again, move the folder away."
    )
  return None, -1, []


def read_config(workdir: Workdir) -> dict[str, Any]:
  """Returns the config of the run in a workdir, as plain types; {} if there is none.

  Raises:
    ValueError: the file does not parse.
  """
  path = _folder(workdir).parent / "config.json"
  return _read_json(path) if path.exists() else {}


def holds_run(workdir: Workdir) -> bool:
  """Returns whether a workdir holds a checkpoint, complete or not, or metrics after step 0."""
  folder = _folder(workdir)
  if _names(folder):
    return True
  record = folder.parent / "metrics.jsonl"
  return record.exists() and _retry(record, record.read_bytes).count(b"\n") > 1


def forget(workdir: Workdir) -> None:
  """Deletes the config and checksums that a run without a checkpoint left behind."""
  for name in (
    ("config.json", "base.json", "inputs.json", "wandb.json") if jax.process_index() == 0 else ()
  ):
    (_folder(workdir).parent / name).unlink(missing_ok=True)


def permits(allow: tuple[str, ...], field: str) -> bool:
  """Returns whether `allow` has a dotted field or a group that contains it."""
  return f"{field}.".startswith(tuple(f"{name}." for name in allow))


def _permission(fields: Collection[str]) -> str:
  """Returns the shell flag that lets a resumed run differ in these fields."""
  return f'--config.checkpoint.allow="{tuple(fields)!r}"'


# Fields that old configs lack, in any group, with the values that those runs used.
ADDED = {
  "prompts.duplicates": "keep", "data.duplicates": "keep", "on_record_error": "stop",
  "prompts.bad": "stop", "data.bad": "stop", "model.lora.init": "", "outputs": "",
  "votes": "", "realign": traverse_util.empty_node, "algorithm.f": "squared",
  "record_pairs": False, "pairs.task": "preferences", "pairs.path": "", "pairs.held_out": 0,
  "pairs.window": 0, "pairs.cache_reference": False, "gpm.blocks": 4, "gpm.prompt_scale": False,
  "algorithm.advantage": "wins", "algorithm.normalise": "none", "algorithm.kl": "score",
  "algorithm.updates": 1, "algorithm.clip_low": 0.2, "algorithm.clip_high": 0.2,
  "algorithm.history": 0.5, "sampling.markers": [],
}  # fmt: skip
# Inputs that old runs did not record, with the values that those runs used.
ADDED_INPUTS = {"sampling.draw": {"an id of a large vocabulary": "levels:1"}}


def differences(
  saved: dict[str, Any], config: dict[str, Any], allow: tuple[str, ...] = ()
) -> dict[str, str]:
  """Returns {dotted field: how it differs} between two runs' configs.

  Fields that an old config lacks count as equal if they have the values of ADDED; so does `job`.

  Args:
    saved, config: plain types, as from config.describe; a list equals a tuple.
    allow: dotted fields, or groups of them, that may differ.
  """
  old, new = (
    traverse_util.flatten_dict(json.loads(json.dumps(c, default=str)), True, sep=".")
    for c in (saved, config)
  )
  # Neither the list of fields that may differ nor the tracker is a property of the run.
  allow = ("checkpoint.allow", "tracker", *(() if "job" in old else ("job",)), *allow)
  added = {
    name: value
    for name, (field, value) in itertools.product(new, ADDED.items())
    if f".{name}".endswith(f".{field}")
  }
  old = {**added, **old}
  names = (name for name in sorted(old.keys() | new.keys()) if not permits(allow, name))
  values = {name: (old.get(name, "absent"), new.get(name, "absent")) for name in names}
  return {name: f"  {name}: {a!r} there, {b!r} here" for name, (a, b) in values.items() if a != b}


def check_config(
  workdir: Workdir,
  config: dict[str, Any],
  allow: tuple[str, ...] = (),
  unread: Collection[str] = (),
) -> dict[str, Any]:
  """Returns the config of the run in a workdir, {} if there is none.

  `steps` may differ.

  Args:
    config, allow: as in `differences`.
    unread: more fields that may differ, because this run never reads them.

  Raises:
    ValueError: the workdir belongs to another run.
  """
  path, saved = _folder(workdir).parent, read_config(workdir)
  if lines := differences(saved, config, ("steps", *allow, *unread)) if saved else {}:
    listed, flag = "\n".join(lines.values()), _permission((*allow, *lines))
    raise ValueError(
      f"workdir {path} was made with another config:\n{listed}\nUse another workdir. To"
      f" resume with these differences, add {flag}"
    )
  return saved


class Checkpoints:
  """The checkpoints of one run: the last `keep` good ones and the best by score.

  All processes must make the same calls.

  Args:
    config: the run's config as plain types (config.describe).
    allow: dotted fields, or groups of them, that may differ from the workdir's config.
    unread: more fields that may differ, because this run never reads them.

  Raises:
    ValueError: `keep` is below 1, or the workdir cannot be written or has another config.
  """

  def __init__(
    self,
    workdir: Workdir,
    *,
    keep: int,
    config: dict[str, Any],
    allow: tuple[str, ...] = (),
    unread: Collection[str] = (),
  ):
    require(keep > 0, "checkpoint.keep", "at least 1", keep, "Set --config.checkpoint.keep.")
    self._keep, self._folder, self._saving = keep, _folder(workdir), -1
    path = self._folder.parent
    self._config = json.loads(json.dumps(config, default=str))
    self._versions = {library: importlib.metadata.version(library) for library in LIBRARIES}
    try:
      path.mkdir(parents=True, exist_ok=True)
      check_config(path, self._config, allow, unread)
      _sync("every process has read the workdir's config")
      if jax.process_index() == 0:
        _write_json(path / "config.json", self._config)
        _write_json(path / "versions.json", self._versions)
    except OSError as error:
      raise ValueError(f"workdir {path}: expected a folder that can be written: {error}") from error
    self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())

  def save(self, step: int, state: State, score: float | None = None) -> None:
    """Saves a state in the background; returns as soon as its buffers may be donated.

    A step that is already saved stays unchanged.

    Args:
      step: completed steps.
      state: a dataclass or dict of pytrees of jax arrays; a field may be None or {}.
      score: higher is better.

    Raises:
      FloatingPointError: a leaf is not finite; the state is not saved.
      OSError: this one or the one before cannot be written.
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
    self._saving = step
    self._write(lambda: self._orbax.save(self._folder / f"{step:08d}", args=args))

  def _write(self, write: Callable[[], None]) -> None:
    """Calls `write`; raises OSError if it fails, whatever the type of the error."""
    try:
      write()
    except Exception as error:  # tensorstore reports a full disk as ValueError
      problem = _cause(error)
      raise OSError(
        f"the checkpoint of step {self._saving} in {self._folder} cannot be written: {problem}"
      ) from error

  def restore(self, spec: State) -> tuple[State, int] | None:
    """Returns (state, step) of the newest good checkpoint in the shardings of `spec`, or None.

    A warning names newer, bad checkpoints. They are renamed, which frees their steps to be saved.

    Raises:
      ValueError: no checkpoint is good and has the leaves, shapes and dtypes of `spec` (names the
        first difference).
    """
    self.wait()
    state, step, bad = _restore_newest(self._orbax, self._folder, _steps(self._folder), spec)
    _sync("every process has read its checkpoint")
    if jax.process_index() == 0:
      self._tidy(step, bad)
    _sync("damaged checkpoints are renamed")
    return None if step < 0 else (state, step)

  def _tidy(self, step: int, bad: list[int]) -> None:
    """Renames bad checkpoints, deletes half-written ones, and warns of what is no checkpoint."""
    for number in bad:
      path = self._folder / f"{number:08d}"
      path.rename(self._folder / f"{path.name}.damaged-{time.time_ns()}")
    for name in _names(self._folder):
      path, (digits, _, suffix) = self._folder / name, name.partition(".")
      if not _is_step(digits) or not (
        suffix == "" or suffix.startswith(("orbax-checkpoint-tmp", "damaged-"))
      ):
        log.warning("%s is not a checkpoint of this program, and stays", path)
      elif suffix.startswith("orbax-checkpoint-tmp"):
        if int(digits) > step:
          log.warning("half-written %s was never finished: step %d is used instead", path, step)
        _delete(path)

  def last_good(self) -> int | None:
    """Returns the newest step that was saved completely."""
    self.wait()
    return max(_scores(self._folder), default=None)

  def wait(self) -> None:
    """Waits until saves are on disk, raises their errors, then deletes old checkpoints."""
    self._write(self._finish)
    scores = _scores(self._folder) if jax.process_index() == 0 else {}
    kept = {*sorted(scores)[-self._keep :], _best(scores)}
    for step in _steps(self._folder) if scores else ():
      # Anything newer than the last good checkpoint is left for `restore` to judge.
      if step not in kept and step < max(scores):
        _delete(self._folder / f"{step:08d}")
    _sync("old checkpoints are deleted")

  def _finish(self) -> None:
    """Waits for all that Orbax has begun; raises the first error when none is left in its queues.

    A full disk fails the arrays of a save and the metadata beside them, and Orbax raises one error
    at each call: the second would come up later, as if it were another save's.
    """
    errors: list[Exception] = []
    while True:
      try:
        self._orbax.wait_until_finished()
        break
      except Exception as error:
        errors.append(error)
    if errors:
      raise errors[0]

  def close(self) -> None:
    """Waits for saves, and ends Orbax's threads."""
    try:
      self.wait()
    finally:
      self._orbax.close()


def _delete(path: epath.Path) -> None:
  """Deletes a folder that is not needed; a failure is only a warning."""
  try:
    path.rmtree()
  except OSError as error:
    log.warning("%s could not be deleted: %s", path, error)


def restore_part(
  workdir: Workdir, field: str, spec: Params, step: int | None = None, best: bool = False
) -> tuple[Params, int]:
  """Returns (tree, step) of one field of a run's state, such as "params"; reads only that field.

  Args:
    spec: the field's tree of arrays, or of ShapeDtypeStructs with shardings.
    step: the checkpoint's step; by default the newest good one.
    best: without a step, take the checkpoint with the best score.

  Raises:
    ValueError: no such checkpoint, a damaged one, or one whose leaves differ (names the first).
    OSError: the checkpoint cannot be read.
  """
  folder, given = _folder(workdir), step
  for _ in range(ATTEMPTS):
    steps = _steps(folder)
    candidates = _candidates(folder, steps, given, best)
    try:
      with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
        state, restored_step, _ = _restore_newest(reader, folder, candidates, {field: spec}, field)
      return state[field], restored_step
    except (OSError, ValueError) as error:
      # A run in progress may save new checkpoints and delete the one being read.
      changed = np.any(multihost_utils.process_allgather(np.array(_steps(folder) != steps)))
      if not changed:
        raise
      log.info("checkpoints in %s changed while they were read: %s", folder, error)
  raise ValueError(
    f"checkpoint in {folder}: a run replaced the checkpoints during each of {ATTEMPTS} attempts to"
    " read one. Raise that run's checkpoint.keep or checkpoint.every, or stop it."
  )


def _candidates(folder: epath.Path, steps: list[int], step: int | None, best: bool) -> list[int]:
  """Returns those of `steps` that `restore_part` may read; raises ValueError if there is none."""
  step = _best(_scores(folder)) if best and step is None else step
  if steps and step in (None, *steps) and not (best and step is None):
    return steps if step is None else [step]
  expected = "the best by a score" if step is None and best else "one" if step is None else step
  fix = "Take one of these." if steps else "A run saves some as it goes on: repeat its command."
  raise ValueError(f"checkpoint in {folder}: expected {expected}, found {steps or 'none'}. {fix}")


def check_saved(workdir: Workdir, step: int | None = None, best: bool = False) -> None:
  """Raises ValueError unless a run has the checkpoint that `restore_part` would read."""
  folder = _folder(workdir)
  _candidates(folder, _steps(folder), step, best)


def saved_steps(workdir: Workdir) -> list[int]:
  """Returns the sorted steps of the checkpoints in a workdir, good or damaged."""
  return _steps(_folder(workdir))


def newest_step(workdir: Workdir) -> int:
  """Returns the step of the newest checkpoint; 0 if there is none."""
  return max(_steps(_folder(workdir)), default=0)


def checksum(tree: Params) -> tuple[str, int]:
  """Returns (dtype, checksum) of parameters of one dtype; the same on every mesh."""
  checksums = jax.device_get(_checksums(_leaves(tree)))
  total = sum(int(leaf_sum) for leaf_sum, _ in checksums.values()) % 2**32
  return str(jax.tree.leaves(tree)[0].dtype), total


def verify_base(
  workdir: Workdir, base: Params, record: bool = False, changed: bool = False
) -> None:
  """Raises ValueError unless the frozen parameters of a run are those it started with.

  Args:
    base: the reference or adapters' base; identified by its checksum in its dtype.
    record: store the checksum if there is none for this dtype.
    changed: a change is allowed: store the new checksum.
  """
  path = _folder(workdir).parent / "base.json"
  recorded = _read_json(path) if path.exists() and not changed else {}
  dtype, total = checksum(base)
  if recorded.setdefault(dtype, total) != total:
    raise ValueError(
      f"model.weights of {path.parent}: expected what the run started with, got other numbers."
      f" Restore them. To resume with these, add {_permission(['model.weights'])} or delete {path}"
    )
  if record and jax.process_index() == 0:
    _write_json(path, recorded)


def verify_inputs(
  workdir: Workdir, found: dict[str, dict[str, str]], allow: tuple[str, ...] = ()
) -> None:
  """Raises ValueError unless a run's inputs are those it started with; stores new ones.

  Args:
    found: {config field: {file: checksum}}; for parameters the checksum is "dtype:sum", which
      differs between dtypes.
    allow: fields, or groups of them, whose inputs may have changed.
  """
  path, first = _folder(workdir).parent / "inputs.json", jax.process_index() == 0

  def compare(recorded: dict[str, Any]) -> None:
    changed = {
      field: ", ".join(files)
      for field, files in found.items()
      if field in recorded and _changed(recorded[field], files)
    }
    if lines := [f"  {field}: {x}" for field, x in changed.items() if not permits(allow, field)]:
      listed = "\n".join(lines)
      flag = _permission((*allow, *(x for x in changed if not permits(allow, x))))
      raise ValueError(
        f"inputs of the run in {path.parent} are not those that it started with:\n{listed}\nRestore"
        f" them, or use another workdir. To resume with the new ones, add {flag}"
      )

  if first:
    recorded = _read_json(path) if path.exists() else {}
    compare({**ADDED_INPUTS, **recorded} if holds_run(workdir) else recorded)
    if recorded != found:
      _write_json(path, found)
  _sync("the first process has written its inputs")
  if not first:  # other processes may see other files
    compare(_read_json(path))


def _changed(recorded: Any, files: dict[str, str]) -> bool:
  """Returns whether checksums of files or parameters differ; paths may differ."""
  old = list(recorded.values()) if isinstance(recorded, dict) else []
  new = list(files.values())
  if [x.split(":")[0] for x in map(str, old)] != [x.split(":")[0] for x in new]:
    return len(old) != len(new)  # sums of other dtypes cannot be compared
  return old != new

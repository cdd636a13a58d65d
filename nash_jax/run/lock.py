"""One writer per workdir: a lock that the system releases when its process ends."""

import contextlib
import datetime
import json
import logging
import os
import socket
from collections.abc import Iterator
from typing import Any

import filelock
import jax
from etils import epath

log = logging.getLogger(__name__)
# Seconds from taking a lock to naming its owner, and from deleting the name to releasing it.
NAMED_WITHIN = 5.0


def _owner(path: epath.Path) -> dict[str, Any]:
  """Returns what the owner of a workdir wrote about itself; {} if that cannot be read."""
  try:
    owner = json.loads(path.read_text())
    return owner if isinstance(owner, dict) else {}
  except (OSError, ValueError, RecursionError):
    return {}


def _described(owner: dict[str, Any]) -> str:
  pid, host, since = (owner.get(name, "unknown") for name in ("pid", "host", "since"))
  return f"process {pid} on {host}, since {since}"


@contextlib.contextmanager
def hold(workdir: str | os.PathLike[str]) -> Iterator[None]:
  """Locks a workdir, so that no other process writes there; owner.json names the holder.

  Process 0 holds the lock of a run. It is a flock (on NFS the server's), which is released however
  the process ends. A bucket has no locks: there, a warning names an owner that left its owner.json
  behind, since it may have died or may still be writing.

  Raises:
    ValueError: another process holds it, or the folder cannot be written.
  """
  if jax.process_index() > 0:
    yield
    return
  bucket = "://" in str(workdir)
  path = epath.Path(workdir if bucket else os.path.abspath(workdir))
  name, now = path / "owner.json", datetime.datetime.now(datetime.UTC)
  with contextlib.ExitStack() as on_exit:
    try:
      path.mkdir(parents=True, exist_ok=True)
      if not bucket:
        held = filelock.FileLock(path / ".lock", timeout=NAMED_WITHIN)
        on_exit.enter_context(held.acquire(cancel_check=lambda: bool(_owner(name))))
      elif owner := _owner(name):
        log.warning(
          "%s may still be in use by %s. If that process still runs, stop one of the two, because a"
          " bucket has no locks", path, _described(owner),
        )  # fmt: skip
      owner = {"host": socket.gethostname(), "pid": os.getpid(), "since": f"{now:%FT%TZ}"}
      name.write_text(json.dumps(owner) + "\n")
    except filelock.Timeout:
      raise ValueError(
        f"workdir {path} is in use by {_described(_owner(name))}. Only one process can write a"
        " workdir: wait for it, stop it, or use another --workdir."
      ) from None
    except OSError as error:
      raise ValueError(f"workdir {path}: expected a folder that can be written: {error}") from error
    try:
      yield
    finally:
      try:
        name.unlink(missing_ok=True)
      except OSError as error:  # the lock itself is still released
        log.warning("%s could not be deleted: %s", name, error)

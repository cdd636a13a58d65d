"""TPU slices that a run can be compiled for without having them."""

import importlib.util
import os
import re

import jax

from nash_jax.validation import one_of, require

SLICES = {
  **{f"{chip}-{n}": f"{chip}:{grid}" for chip in ("v5e", "v6e") for n, grid in {
    1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16",
  }.items()},
  **{f"v5p-{n}": f"v5p:{grid}" for n, grid in {  # named by cores, two per chip
    8: "2x2x1", 16: "2x2x2", 32: "2x2x4", 64: "2x4x4", 128: "4x4x4", 256: "4x4x8", 512: "4x8x8",
  }.items()},
}  # fmt: skip
LOCAL = "local"  # the devices of this machine


def devices(topology: str) -> list:
  """Returns the devices of a TPU topology such as "v5e:4x4" or "v5e-16"; "local": this machine's.

  Raises:
    ValueError: an unknown topology (lists the choices), or no libtpu, which compiles for TPUs.
  """
  if topology == LOCAL:
    return jax.devices()
  names = {*SLICES, *SLICES.values(), LOCAL}
  if not re.fullmatch(r"v(5e|5p|6e):[0-9x]+", topology):
    one_of("topology", topology, names)
  installed, expected = importlib.util.find_spec("libtpu"), "libtpu, which compiles for TPUs"
  fix = "pip install --editable '.[plan]', or plan for this machine: --topology=local."
  require(installed is not None, "topology", expected, "none installed", fix)
  from jax.experimental import topologies

  # There is no TPU: don't query its metadata, and allow several plans at the same time.
  os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
  # Without a host's name and type libtpu prints errors; it compiles for the topology either way.
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
  name = SLICES.get(topology, topology)
  try:
    return topologies.get_topology_desc(platform="tpu", topology_name=name).devices
  except jax.errors.JaxRuntimeError as error:
    choices, reason = ", ".join(sorted(names)), str(error).splitlines()[0]
    raise ValueError(f"topology: got {topology!r}, expected one of {choices} ({reason})") from error

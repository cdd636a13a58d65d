"""Weights on several hosts: each reads its own parts, and together they write one file."""

import os
import socket
import subprocess
import sys

import pytest
from paths import FIXTURES, PYTHONPATH
from weight_files import MODELS, checkpoint, same

from nash_jax import weights

PROGRAM = """
import sys
import jax, numpy as np
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from jax.experimental import multihost_utils
import weight_files
from flax import traverse_util
from nash_jax import weights
from nash_jax.models import sharding
from nash_jax.weights import names, safetensors

config = weight_files.MODELS["hf_gemma2"]
mesh = sharding.make_mesh({"data": 1, "fsdp": 2, "tensor": 2})
# Not gemma.shapes: it would bring TensorFlow.
like = {
  path: jax.ShapeDtypeStruct((1,) * place.stacked + place.shape[place.stacked :], "f")
  for path, place in names.places(config).items()
}
slots = sharding.shardings(traverse_util.unflatten_dict(like, sep="/"), mesh)
read = {}
whole = safetensors._slice

def counted(found, cut):
  x = whole(found, cut)
  read[id(found)] = read.get(id(found), 0) + x.nbytes
  return x

safetensors._slice = counted
params = weights.load(sys.argv[3], config, shardings=slots)
assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding == s, params, slots))
total = sum(x.nbytes for x in jax.tree.leaves(params))
assert not params["embedder"]["input_embedding"].is_fully_addressable
# Norms and the like are read by all; of the rest each host reads its half.
assert 0.4 < sum(read.values()) / total < 0.6, (sum(read.values()), total)
orbax = weights.load(sys.argv[4], config, shardings=slots)
assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding == s, orbax, slots))
gathered = [multihost_utils.process_allgather(x, tiled=True) for x in (params, orbax)]
jax.tree.map(np.testing.assert_array_equal, *gathered)
weights.export(sys.argv[5], params, config, "float32")
weights.save(sys.argv[5] + "/own.st", params, config, "float32", {})
multihost_utils.sync_global_devices("written")
"""


@pytest.mark.slow
def test_hosts_read_their_own_parts_and_write_one_file(tmp_path):
  config, source = MODELS["hf_gemma2"], FIXTURES / "hf_gemma2"
  params = weights.load(str(source), config)
  stacked = checkpoint(tmp_path / "c", params, config, "stacked")
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  env = {
    **os.environ,
    "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    "PYTHONPATH": PYTHONPATH,
    "JAX_PLATFORMS": "cpu",
  }
  out = str(tmp_path / "out")
  started = [
    subprocess.Popen(
      [sys.executable, "-c", PROGRAM, address, str(i), str(source), stacked, out],
      env=env,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for i in range(2)
  ]
  output = [process.communicate(timeout=120)[0] for process in started]
  assert [process.returncode for process in started] == [0, 0], "\n".join(output)
  own = tmp_path / "out" / "own.st"
  moved = own.rename(tmp_path / "own.safetensors")
  same(weights.load(out, config), params)
  same(weights.load(str(moved), config), params)

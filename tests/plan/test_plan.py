"""Plans of tiny runs: phases, memory, refusals of bad input, and what their programs do."""

import importlib
import importlib.util
import json
import math
import os
import re
import subprocess
import sys

import jax
import paths
import pytest
import tiny
from jax.sharding import AbstractMesh

import nash_jax
from benchmarks import plans
from nash_jax import plan, train
from nash_jax.config import resolve
from nash_jax.configs import gemma2_2b
from nash_jax.models import gemma, sharding
from nash_jax.plan import hlo_cost, memory, topology
from nash_jax.plan.topology import devices

FIELDS = {
  "argument_bytes",
  "temp_bytes",
  "output_bytes",
  "flops",
  "bytes_accessed",
  "roofline_seconds",
  "bound",
  "compile_seconds",
}


TPU = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="libtpu, which compiles for TPUs, is not installed: pip install --editable '.[plan]'",
)


@pytest.fixture(scope="module")
def tiny_plan(tmp_path_factory):
  """The plan of a tiny run on this machine's one CPU, as it is written."""
  file = tmp_path_factory.mktemp("plan") / "plan.json"
  plan.run(tiny.train({"judge.name": "gemma"}), topology.LOCAL, str(file))
  return json.loads(file.read_text())


def test_a_plan_has_every_phase_and_field(tiny_plan):
  assert {"topology", "devices", "hbm_bytes", "resident_bytes", "fits", "phases"} <= set(tiny_plan)
  assert set(tiny_plan["phases"]) == {"sample", "judge", "log_probabilities", "update"}
  for name, phase in tiny_plan["phases"].items():
    assert set(phase) == FIELDS, name
    assert phase["flops"] > 0, name
    assert phase["bytes_accessed"] > 0, name
  assert tiny_plan["resident_bytes"] == sum(tiny_plan["resident"].values())


def test_plans_of_devices_without_published_peaks_have_their_line_too(tiny_plan):
  _, _, line = plans.overview([tiny_plan]).splitlines()
  assert line.startswith("| local")
  assert line.count("—") == 3 + len(tiny_plan["phases"])


def test_the_update_costs_three_passes_more_than_the_frozen_ones(tiny_plan):
  """Reference and target forward, then the policy's: forward once, backward twice that."""
  frozen, update = (tiny_plan["phases"][name]["flops"] for name in ("log_probabilities", "update"))
  assert 2.2 < update / frozen < 3.2


def test_the_estimate_counts_the_arrays_that_the_programs_hold(assembled):
  parts = memory.estimate(tiny.train())
  config, tokenizer = plan.prepare(tiny.train(), 1)
  mesh = sharding.make_mesh(config.mesh)
  trees = plan.lowerings(config, tokenizer, mesh)["held"]
  judge = trees.pop("judge")  # the population: a few numbers, which no estimate counts
  assert memory.bytes_per_device(judge) < 1e5
  assert {name: memory.bytes_per_device(tree) for name, tree in trees.items()} == {
    name: parts[name] for name in trees
  }


def test_on_more_devices_each_holds_less():
  alone = memory.estimate(tiny.train())
  eight = memory.estimate(tiny.train(), {"data": 2, "fsdp": 2, "tensor": 2})
  for name in ("parameters", "optimiser state", "reference", "gradient and update"):
    assert alone[name] / 4.2 < eight[name] < alone[name] / 3.5, name  # data holds copies
  assert eight["weights for decoding"] > alone["weights for decoding"] / 2
  assert eight["cache for decoding"] == alone["cache for decoding"] / 4  # one key-value head


def test_without_files_a_stand_in_tokenizer_is_used():
  c = tiny.train()
  for part in (c.model, c.judge.model):
    part.update(weights="nowhere", tokenizer="nowhere/tokenizer.model")
  config, tokenizer = plan.prepare(c, 8)
  assert isinstance(tokenizer, plan.StandInTokenizer)
  assert "nowhere" not in str(config.to_dict())


def test_a_judge_that_is_the_reference_is_planned_once():
  kinds = {}
  for kind in ("smoke", "self,smoke"):
    c = gemma2_2b.get_config(kind)
    c.model.weights, c.judge.model.weights = "a", "a" if "self" in kind else "b"
    config, tokenizer = plan.prepare(c, 1)
    trees = plan.lowerings(config, tokenizer, sharding.make_mesh(config.mesh))["held"]
    kinds[kind] = memory.bytes_per_device(trees["judge"])
    assert kinds[kind] == memory.estimate(c)["judge"]
  assert kinds["self,smoke"] == 0 < kinds["smoke"]


@pytest.mark.parametrize(
  ("topology", "message"),
  [
    ("v5f:4x4", "expected one of"),
    ("v5e-17", r"did you mean 'v5e-1"),
    ("tpu", "expected one of"),
    pytest.param(
      "v5e:3x3", r"got 'v5e:3x3', expected one of .* \(.+\)$", marks=TPU
    ),  # libtpu's words
  ],
)
def test_an_unknown_topology_lists_the_choices(topology, message):
  with pytest.raises(ValueError, match=message) as error:
    devices(topology)
  assert "v5e:4x4" in str(error.value) or "libtpu" in str(error.value)


def test_a_batch_that_does_not_divide_proposes_one():
  with pytest.raises(ValueError, match=r"Use a prompts\.batch_size that is a multiple of 16"):
    plan.prepare(tiny.train({"prompts.batch_size": 24}), 16)


def test_a_run_on_pairs_is_planned_without_sampling_and_judging():
  file = {"algorithm.name": "gpo", "pairs.path": "not/there.jsonl", "judge.name": "none"}
  config, tokenizer = plan.prepare(tiny.train(file), 1)
  mesh = sharding.make_mesh(config.mesh)
  phases = plan.lowerings(config, tokenizer, mesh)
  assert [*phases] == ["held", "log_probabilities", "update"]
  (batch,) = phases["update"]().args_info[0][2:]
  assert batch.responses.tokens.shape == (8, 2, 12)
  assert batch.verdict.p_win.shape == (8, 2, 2)


def test_a_config_of_another_job_is_refused():
  with pytest.raises(ValueError, match="an online run's"):
    plan.run(nash_jax.config.fit(), topology.LOCAL)


def test_several_plans_make_one_table(tiny_plan):
  table = plans.overview(
    [{**tiny_plan, "hbm_bytes": 2**34, "fits": True, "largest_batch_size": 8}] * 2
  )
  assert table.count("tiny, nash_mp, 8 x 2 responses, 12 + 12 tokens") == 2


def test_parameters_are_described_with_their_shardings():
  mesh = AbstractMesh((1, 4, 2), ("data", "fsdp", "tensor"))
  tree = gemma.shapes(gemma.preset("tiny"))
  lines = sharding.describe(sharding.abstract(tree, sharding.shardings(tree, mesh)))
  assert ("embedder/input_embedding", "64x16", "('tensor', 'fsdp')", 64 * 16 * 4 // 8) in lines
  assert len(lines) == len(jax.tree.leaves(tree))


def bodies(text):
  """Returns the lines of every loop of a compiled program, by the bound of its counter."""
  parts, _ = hlo_cost._computations(text)
  found = {}
  for lines in list(parts.values()):
    for line in lines:
      for condition, body in hlo_cost._WHILE.findall(line):
        bound = hlo_cost._trips(
          line, parts[condition] + called(parts, parts[condition]), parts[body]
        )
        found.setdefault(bound, []).extend(parts[body] + called(parts, parts[body]))
  return found


def called(parts, lines):
  names = [
    name for line in lines if " while(" not in line for name in hlo_cost._CALLED.findall(line)
  ]
  return [line for name in names for line in parts[name] + called(parts, parts[name])]


@pytest.fixture(scope="module", params=["cpu", pytest.param("tpu", marks=TPU)])
def texts(request, tmp_path_factory):
  """The compiled sampler and update of a tiny run, on eight devices."""
  folder = tmp_path_factory.mktemp(request.param)
  flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
  done = subprocess.run(
    [sys.executable, "-c", PROGRAM, {"cpu": "local", "tpu": "v5e-8"}[request.param], str(folder)],
    cwd=paths.ROOT / "tests" / "configs",
    capture_output=True,
    text=True,
    timeout=500,
    env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
  )
  assert done.returncode == 0, done.stderr[-3000:]
  read = {name: (folder / name).read_text() for name in ("sample", "update")}
  return {**read, "platform": request.param, "printed": done.stderr}


PROGRAM = """
import pathlib, sys, tiny
import numpy as np
from jax.sharding import Mesh
from nash_jax import plan
from nash_jax.models import gemma, sharding
from nash_jax.plan import topology
where = topology.devices(sys.argv[1])
config = tiny.train({
  "mesh.data": 1, "mesh.fsdp": 4, "mesh.tensor": 2, "sampling.max_tokens": 11,
  "model.logit_chunk": 4, "model.changes": {"num_embed": 4096, "num_layers": 2},
})
config, tokenizer = plan.prepare(config, 8)
mesh = sharding.make_mesh(config.mesh, Mesh(np.array(where), ("all",)))
programs = plan.lowerings(config, tokenizer, mesh)
for name in ("sample", "update"):
  text = programs[name]().compile().as_text()
  (pathlib.Path(sys.argv[2]) / name).write_text(text)
assert "tensorflow" not in sys.modules
"""


TRUE_SIZE = """
import sys, tiny
import numpy as np
from jax.sharding import Mesh
from nash_jax import plan
from nash_jax.configs import gemma2_2b
from nash_jax.plan import topology
from nash_jax.models import sharding
config = gemma2_2b.get_config()
config.algorithm.name = sys.argv[1]
where = topology.devices("v5e-16")
config, tokenizer = plan.prepare(config, len(where))
mesh = sharding.make_mesh(config.mesh, Mesh(np.array(where), ("all",)))
print(plan.lowerings(config, tokenizer, mesh)["sample"]().compile().as_text())
"""


def test_the_compiler_prints_no_errors_about_a_tpu_that_need_not_be_there(texts):
  ours = "WARNING:absl:set, but not read by this run: "
  assert [line for line in texts["printed"].splitlines() if not line.startswith(ours)] == []


def test_no_weight_is_gathered_while_tokens_are_sampled(texts):
  loop = bodies(texts["sample"])[11]
  assert any("4096" in line for line in loop), "this is the loop that samples tokens"
  assert not [line for line in loop if re.search(r" (all-gather|all-to-all)(-start)?\(", line)]


@TPU
@pytest.mark.slow
@pytest.mark.parametrize("name", ["nash_mp", "nash_md"])
def test_no_weight_of_2b_is_gathered_while_tokens_are_sampled(name):
  """Nash-MD has two samplers, and XLA moved a gather of what both read into one's loop."""
  done = subprocess.run(
    [sys.executable, "-c", TRUE_SIZE, name],
    cwd=paths.ROOT / "tests" / "configs",
    capture_output=True,
    text=True,
    timeout=900,
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
  )
  assert done.returncode == 0, done.stderr[-3000:]
  loop = bodies(done.stdout)[256]
  assert any("256128" in line for line in loop), "this is the loop that samples tokens"
  assert not [line for line in loop if re.search(r" (all-gather|all-to-all)(-start)?\(", line)]


def test_no_weight_is_transposed_while_tokens_are_sampled(texts):
  loop = "\n".join(bodies(texts["sample"])[11])
  found = re.findall(r"= f32\[([0-9,]+)\]\S* (?:copy|transpose)\(", loop)
  shapes = [[int(n) for n in shape.split(",")] for shape in found]
  assert shapes
  least, columns = 2 * 1 * 16 * 8, 12 + 11  # keys' and values' weight; a cache, which may be
  assert not [shape for shape in shapes if math.prod(shape) >= least and columns not in shape]


def test_the_token_loop_writes_into_its_one_cache(texts):
  if texts["platform"] == "cpu":
    pytest.skip("a CPU's loop copies its cache; a TPU's is tested where libtpu is installed")
  rows, columns = 8 * 2 // 4, 12 + 11
  keys = rf"= f32\[{rows},1,8,{columns}\]\S* "
  loop = [line for line in bodies(texts["sample"])[11] if re.search(keys, line)]
  assert any(" dynamic-update-slice(" in line for line in loop)
  assert not [line for line in loop if re.search(keys + "copy\\(", line)]


def test_no_array_has_the_whole_vocabulary(texts):
  """In an update: of logits a device has an eighth, and so of the table, by rows or by columns."""
  sizes = [[int(n) for n in s.split(",")] for s in re.findall(r"f32\[([0-9,]+)\]", texts["update"])]
  assert max(math.prod(s) for s in sizes if 4096 // 8 in s) == 16 * 4 * 4096 // 8  # of a chunk
  assert max((math.prod(s) for s in sizes if 4096 in s), default=0) <= 4096 * 16 // 4


@pytest.mark.parametrize("name", ["gemma2_2b", "gemma3_270m", "gemma3_1b", "gemma3_4b"])
@pytest.mark.parametrize("kind", ["", "lora", "smoke"])
def test_configs_of_true_size_resolve_for_a_slice(name, kind):
  c = importlib.import_module(f"nash_jax.configs.{name}").get_config(kind)
  config, _ = plan.prepare(c, 8)
  assert config.mesh.fsdp == -1
  assert memory.estimate(config, {"data": 1, "fsdp": 8, "tensor": 1})["parameters"] > 0
  if kind != "smoke":
    with pytest.raises(ValueError, match=r"docs/weights\.md: getting Gemma's"):
      resolve(c, devices=8)


@pytest.mark.slow
def test_a_smoke_config_trains(tmp_path):
  c = gemma2_2b.get_config("smoke")
  c.steps = 1
  assert int(train.run(c, str(tmp_path), progress=False).state.step) == 1

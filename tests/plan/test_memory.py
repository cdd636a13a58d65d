"""The estimate of memory agrees with the arrays of a real run; what it advises."""

import os
import subprocess
import sys
from unittest import mock

import jax
import numpy as np
import pytest
import tiny

from nash_jax import config, plan
from nash_jax.configs import colab
from nash_jax.models import gemma
from nash_jax.plan import memory


def size(tree):
  return sum(np.asarray(x).nbytes for x in jax.tree.leaves(tree))


def test_parameters_target_and_optimiser_state_are_those_of_the_run(assembled):
  parts = memory.estimate(tiny.train())
  state = assembled.programs.init(assembled.reference)
  assert parts["parameters"] == size(state.params)
  assert parts["target and copies"] == size((state.target, state.copies))
  assert parts["optimiser state"] == size(state.opt_state)
  assert parts["reference"] == size(assembled.reference)


def test_every_part_follows_its_field():
  def parts(**changes):
    return memory.estimate(tiny.train({k.replace("__", "."): v for k, v in changes.items()}))

  base = parts()
  assert parts(algorithm__name="reg_self_play")["target and copies"] == 0
  assert parts(algorithm__name="nash_md")["cache for decoding"] == 2 * base["cache for decoding"]
  assert parts(optimizer__name="sgd")["optimiser state"] < base["optimiser state"] / 100
  assert parts(model__dtype="bfloat16")["weights for decoding"] == base["parameters"] / 2
  assert parts(prompts__batch_size=16)["cache for decoding"] > 1.9 * base["cache for decoding"]
  deeper = {"model__preset": "stories", "model__changes": {}}  # than one group of the scan
  assert parts(model__remat=True, **deeper)["activations"] < parts(**deeper)["activations"]
  assert parts(optimizer__micro_batches=2)["logits of a chunk"] == base["logits of a chunk"] / 2
  assert base["judge"] == 0
  assert parts(judge__name="gemma")["judge"] > 0


def test_only_a_layer_of_gemma_4_is_computed_again_at_one_time():
  kinds = gemma.LOCAL, gemma.GLOBAL
  short, long = kinds * 6, ((gemma.LOCAL,) * 5 + (gemma.GLOBAL,)) * 2

  def activations(attention_types, **changes):
    c = config.train()
    c.model.preset, c.model.remat = "stories", True
    c.model.changes = {"attention_types": attention_types, **changes}
    return memory.estimate(c)["activations"]

  own_rope = {"global_base_frequency": 1_000_000}
  assert activations(long, **own_rope) > 1.5 * activations(short, **own_rope)
  assert activations(long, value_norm=True) == activations(short, value_norm=True)


def test_the_published_size_of_gemma_is_counted():
  c = config.train()
  c.model.preset = "gemma2_2b"
  text = memory.table(c, "v5e-1")
  rows = gemma.preset("gemma2_2b").num_embed - 256_000  # that the published count has not
  assert f"gemma2_2b: {2_614_341_888 + rows * 2304:,} parameters" in text
  assert "does not fit" in text
  assert text.endswith("Then it fits.")
  c.model.preset = "gemma2_9b"
  assert memory.table(c, "v5e-1").endswith(
    "No setting makes it fit: use a smaller model, or several devices (docs/tpu.md)."
  )


@pytest.mark.parametrize("name", memory.DEVICES)
def test_a_device_is_found_by_what_jax_says_of_it(name, monkeypatch):
  """By kind and count; what the device says of its own memory comes before the table."""
  monkeypatch.delenv(memory.FRACTION, raising=False)
  kind, number = memory.DEVICES[name]
  platform = {"c": "cpu", "T": "tpu" if kind.startswith("TPU") else "gpu", "N": "gpu"}[kind[0]]
  one = mock.Mock(device_kind=kind, platform=platform, memory_stats=lambda: None)
  found = memory.detect([one] * number)
  assert found == memory.named(name)
  chip = memory.CHIPS.get(kind)
  shares = {"cpu": None, "tpu": 1, "gpu": 0.75}  # jax takes so much of a GPU
  assert found.room == (memory.host_memory() if chip is None else chip.hbm * shares[platform])
  one.memory_stats = lambda: {"bytes_limit": 7}
  assert memory.detect([one] * number).room == (7 if chip else memory.host_memory())


def test_more_of_a_gpu_is_promised_only_where_jax_is_told_to_take_it(monkeypatch):
  monkeypatch.setenv(memory.FRACTION, ".92")
  assert memory.named("T4").room == 0.92 * 15 * memory.GIB
  assert "75%" not in memory.describe(memory.named("T4"))
  monkeypatch.delenv(memory.FRACTION)
  assert f"75% of it: set {memory.FRACTION}=.92" in memory.describe(memory.named("T4"))
  assert memory.FRACTION not in memory.describe(memory.named("v5e-1"))


def test_an_unknown_device_is_told_what_is_known():
  one = mock.Mock(device_kind="NVIDIA Z9", platform="gpu", memory_stats=lambda: {})
  found = memory.detect([one])
  text = memory.table(colab.experiment("stories", found), found)
  assert "NVIDIA Z9: jax runs on it, but does not say how much memory it has" in text
  assert "NVIDIA L4" in text
  assert "fit" not in text
  one.memory_stats = lambda: {"bytes_limit": 40 * memory.GIB}
  found = memory.detect([one])
  assert memory.table(colab.experiment("stories", found), found).endswith("40.00 GiB: fits")
  with pytest.raises(ValueError, match="device: got 'L5', expected one of 2 x T4, A100"):
    memory.named("L5")


def test_a_container_has_what_it_is_given(tmp_path):
  limit, whole = tmp_path / "memory.max", memory.host_memory("nowhere")
  for text, expected in (("max\n", whole), ("1024\n", 1024)):
    limit.write_text(text)
    assert memory.host_memory(str(limit)) == expected


def test_a_cpu_holds_the_process_and_what_is_saved_beside_the_arrays():
  c = tiny.train({"model.dtype": "bfloat16"})
  arrays, all_of_it = memory.estimate(c), memory.estimate(c, kind=memory.CPU)
  more = {name: all_of_it[name] for name in all_of_it.keys() - arrays.keys()}
  state = sum(arrays[name] for name in ("parameters", "target and copies", "optimiser state"))
  assert more["copy that is saved"] == state
  assert more["float32 of the embedding"] == 2 * 4 * 1024 * 16
  assert memory.peak(all_of_it) == pytest.approx(memory.peak(arrays) + sum(more.values()))


def test_a_judge_that_is_the_reference_takes_nothing():
  once = colab.experiment("gemma3_270m", memory.named("L4"))
  twice = colab.experiment("gemma3_270m", memory.named("L4"), judge="gemma3_1b")
  assert memory.estimate(once)["judge"] == 0 < memory.estimate(twice)["judge"]
  once.judge.model.dtype = "float32"  # another type is another copy
  assert memory.estimate(once)["judge"] == 2 * memory.estimate(once)["reference"]


@pytest.mark.parametrize("name", ["T4", "v5e-1", "2 x T4"])
def test_advice_ends_where_it_fits_and_a_small_run_needs_none(name):
  device = memory.named(name)
  c = colab.experiment("stories", device)
  assert memory.table(c, device).endswith("GiB: fits")
  c.model.update(preset="gemma3_1b", remat=False)
  text = memory.table(c, device)
  assert "does not fit" in text
  assert text.endswith("Then it fits.")
  assert "optimizer.name = adafactor" in text
  gemma_config = colab.experiment("gemma3_270m", device)
  assert memory.table(gemma_config, device).endswith("GiB: fits")


@pytest.mark.parametrize("name", memory.DEVICES)
def test_the_notebooks_config_divides_over_its_devices(name):
  device = memory.named(name)
  for c in (
    colab.experiment("stories", device),
    colab.experiment("gemma3_270m", device, prompts="mine.jsonl"),
  ):
    plan.prepare(c, device.number)


def test_a_t4_is_not_given_bfloat16():
  c = config.train()
  c.model.dtype = "bfloat16"
  assert "no native bfloat16: model.dtype = float32" in memory.table(c, "T4")
  assert "no native bfloat16" not in memory.table(c, "v5e-1")
  for name, dtype in (("T4", "float32"), ("CPU", "float32"), ("L4", "bfloat16")):
    assert colab.experiment("gemma3_1b", memory.named(name)).model.dtype == dtype


# Trains a real Gemma for two steps; prints the estimate, and the most that the process has taken.
REAL = """
import resource, sys
from nash_jax import train
from nash_jax.configs import gemma3_270m
from nash_jax.plan import memory
folder, workdir = sys.argv[1:]
c = gemma3_270m.get_config("lora,self")
c.model.update(weights=folder, tokenizer=folder + "/tokenizer.model")
c.prompts.update(task="stories", path="assets:stories/prompts.jsonl", held_out=8)
c.prompts.update(batch_size=4, max_tokens=48)
c.sampling.max_tokens, c.steps, c.checkpoint.every = 24, 2, 1
c.evaluation.prompts, c.optimizer.warmup_steps = 4, 0
train.run(c, workdir, progress=False)
taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(memory.peak(memory.estimate(c, kind=memory.CPU)), taken)
"""


@pytest.mark.slow
def test_a_run_of_a_real_gemma_on_a_cpu_takes_what_is_estimated(tmp_path):
  if not (folder := os.environ.get("NASH_JAX_TEST_GEMMA")):
    pytest.skip("no real Gemma: set NASH_JAX_TEST_GEMMA to the folder of one")
  done = subprocess.run(
    [sys.executable, "-c", REAL, folder, str(tmp_path)],
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  estimated, taken = map(float, done.stdout.split()[-2:])
  assert 0.6 * estimated < taken < estimated

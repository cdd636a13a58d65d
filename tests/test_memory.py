"""The estimate of memory agrees with the arrays of a real run; what it advises."""

import jax
import numpy as np
import pytest
import tiny

from nash_jax import config
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


def test_the_published_size_of_gemma_is_counted():
  c = config.train()
  c.model.preset = "gemma2_2b"
  text = memory.table(c, "v5e-1")
  rows = gemma.preset("gemma2_2b").num_embed - 256_000  # that the published count has not
  assert f"gemma2_2b: {2_614_341_888 + rows * 2304:,} parameters" in text
  assert "does not fit" in text
  assert text.endswith(
    "No setting makes it fit one such device: a smaller model, or several (docs/tpu.md)."
  )


@pytest.mark.parametrize("device", memory.DEVICES)
def test_advice_ends_where_it_fits_and_a_small_run_needs_none(device):
  c = colab.experiment("stories", device)
  assert memory.table(c, device).endswith("GiB: fits")
  c.model.update(preset="gemma3_270m", remat=False)
  text = memory.table(c, device)
  assert "does not fit" in text
  assert text.endswith("Then it fits.")
  assert "optimizer.name = adafactor" in text
  gemma_config = colab.experiment("gemma3_270m", device)
  assert memory.table(gemma_config, device).endswith("GiB: fits")


def test_a_t4_is_not_given_bfloat16():
  c = config.train()
  c.model.dtype = "bfloat16"
  assert "no native bfloat16" in memory.table(c, "T4")
  assert "no native bfloat16" not in memory.table(c, "v5e-1")

"""What a model card says of methods that differ from NashMP on prompts."""

import re

import pytest
import tiny

from nash_jax.config import describe, resolve
from nash_jax.run import card


def written(field="params", **changes):
  named = {name.replace("__", "."): value for name, value in changes.items()}
  config = describe(resolve(tiny.train(named)))
  model = card.Model(f"runs/x@{field}", field, 3, config, "", adapter=False, dtype="float32")
  return card.text(model, None, "nash-jax export")


@pytest.mark.parametrize(
  ("method", "changes", "expected"),
  [
    ("nash_mp", {}, "an exponential average"),
    ("nash_mp", {"target_update": "periodic"}, "renewed every 7 steps: the centre"),
    ("nash_mp_two_step", {}, "renewed every 14 steps: the centre"),
    ("emagnet", {}, "an exponential average"),
    ("nash_ema", {}, "at rate κ: the policy's opponent"),
    ("sppo", {}, "renewed every 7 steps: the centre"),
  ],
)
def test_a_target_is_what_its_method_makes_of_it(method, changes, expected):
  changes = {f"algorithm__{name}": value for name, value in changes.items()}
  found = written("target", algorithm__name=method, algorithm__target_period=7, **changes)
  assert expected in found


def test_a_run_that_learned_from_pairs_names_their_file_and_samples_nothing(tmp_path):
  pairs = tmp_path / "pairs.jsonl"
  pairs.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
  found = written(algorithm__name="gpo", pairs__path=str(pairs), prompts__batch_size=4)
  rows = dict(re.findall(r"^\| (.+?) +\| (.+?) +\|$", found, re.MULTILINE))
  assert rows["data"] == f"{card.escaped(str(pairs))} (pairs)"
  assert rows["steps"].endswith(", of 4 pairs")
  assert "sampled at" not in rows

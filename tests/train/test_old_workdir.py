"""A workdir from before configs named their job: the run goes on, and its policy is read.

fixtures/old_workdir is what the code at commit edd6b81 left of four steps of the config below, and
old_workdir_metrics.jsonl what it wrote when it went on to six. Its random reference is stored too:
other compilers and processors round its initialisation otherwise, and a run begins with one only.
"""

import functools
import shutil

import jax
import numpy as np
import pytest
import workdirs
from paths import FIXTURES

from nash_jax import policy, train
from nash_jax.configs import short_game
from nash_jax.models import gemma

REFERENCE = FIXTURES / "old_workdir_reference.safetensors"
SMALL = {"num_embed": 16, "embed_dim": 8, "hidden_dim": 16, "num_layers": 1}


def config(steps):
  c = short_game.get_config()
  c.model.weights, c.model.changes = "", SMALL
  c.prompts.batch_size, c.steps = 8, steps
  c.evaluation.every = c.checkpoint.every = 2
  c.checkpoint.keep = 1
  return c


@pytest.fixture
def workdir(tmp_path):
  return shutil.copytree(FIXTURES / "old_workdir", tmp_path / "run")


@pytest.mark.slow
def test_an_old_run_goes_on_with_the_metrics_it_would_have_had(workdir, monkeypatch):
  load = functools.partial(policy.load_weights, str(REFERENCE))
  monkeypatch.setattr(train, "load_weights", lambda spec, *args, **options: load(*args, **options))
  c = config(steps=6)
  c.algorithm.beta = 0.5
  with pytest.raises(
    ValueError, match=r"another config:\n  algorithm.beta: .* there, 0.5 here\nUse"
  ):
    train.run(c, workdir)
  c.algorithm.beta = config(steps=6).algorithm.beta
  done = train.run(c, workdir, progress=False)
  assert (int(done.state.step), done.stopped) == (6, False)
  lines = workdirs.lines(workdir)
  assert [line["step"] for line in lines] == list(range(7))
  assert lines[:4] == workdirs.lines(FIXTURES / "old_workdir")[:4], "the record is kept"
  expected = workdirs.lines(FIXTURES, "old_workdir_metrics.jsonl")
  added = {"exact/gap", "exact/win_rate_vs_reference", "exact/kl_to_reference"}
  for got, line in zip(lines[4:], expected, strict=True):
    assert got.keys() - line.keys() <= added
    same = {name: x for name, x in got.items() if name not in added}
    assert same == pytest.approx(line, rel=1e-4, abs=1e-6)


def test_an_old_runs_policy_and_target_are_read(workdir):
  model = gemma.preset("tiny", **SMALL)
  parts = [policy.load_weights(f"{workdir}@{part}", model) for part in ("params", "target")]
  first, second = (part["embedder"]["input_embedding"] for part in parts)
  assert first.shape == second.shape == (16, 8)
  assert 0 < abs(first - second).max() < 0.1, "the target follows the policy"


def test_a_seed_gives_the_random_policy_that_it_gave():
  model = gemma.preset("tiny", **SMALL)
  pairs = policy.load_weights("", model, seed=0), policy.load_weights(str(REFERENCE), model)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-8), *pairs)

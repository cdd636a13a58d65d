"""Fixtures that tests of several jobs use."""

import json

import jax
import numpy as np
import pytest
from arena_verdicts import verdicts
from arenas import SMALL
from jax import numpy as jnp

from nash_jax import weights
from nash_jax.jobs import arena
from nash_jax.models import gemma
from nash_jax.types import Responses, Verdict


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  """Two random policies as weights files, and story openings."""
  folder = tmp_path_factory.mktemp("arena")
  model = gemma.preset("tiny", **SMALL)
  for seed, name in enumerate(("one", "two")):
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda x, r=rng: r.normal(0, 0.3, x.shape), gemma.shapes(model))
    weights.save(str(folder / f"{name}.safetensors"), params, model, jnp.float32, {})
  lines = [json.dumps({"prompt": f"Once there was a{' big' * i} cat"}) for i in range(30)]
  (folder / "prompts.jsonl").write_text("\n".join(lines))
  return folder


@pytest.fixture
def made_up(monkeypatch):
  """Makes the arena's responses and verdicts up; `before_end` is called when they are there."""
  calls = {"sampled": 0, "before_end": lambda: None}

  def sample_and_judge(config, held_out, count, params_by_name, judges_by_name, policy, given):
    calls["sampled"] += 1
    rng, k = np.random.default_rng(0), len(params_by_name) * config.samples
    mask = np.ones((count, k, 6), bool)
    tokens = rng.integers(5, 200, mask.shape).astype(np.int32)
    logp = np.zeros(mask.shape, np.float32)
    responses = Responses(tokens, mask, logp, logp, mask[..., 0])
    p_win, valid = (a.reshape(count, k, k) for a in verdicts(count, k, 1))
    ratios = {name: np.zeros((count, config.samples)) for name in params_by_name}
    calls["before_end"]()
    prompts = held_out.all(np.arange(count))
    judged = {name: Verdict(p_win, valid) for name in judges_by_name}
    return arena.Judged(prompts, responses, judged, ratios)

  monkeypatch.setattr(arena, "_sample_and_judge", sample_and_judge)
  return calls

"""Supervised fits that train adapters: what they export, and how they resume."""

import functools

import fits
import jax
import metric_files
import numpy as np
import pytest
import workdirs
from lora_trees import RANK, normal, size

from nash_jax import fit, judges, policy, weights
from nash_jax.config import resolve
from nash_jax.models import gemma
from nash_jax.run import checkpoint


@pytest.mark.parametrize(
  "loss",
  ["sft", *(pytest.param(loss, marks=pytest.mark.slow) for loss in ("judge", "reward", "gpm"))],
)
def test_a_fit_trains_adapters_and_exports_a_plain_model(loss, tmp_path, monkeypatch):
  c = fits.settings(tmp_path, loss)
  c.export, c.export_dtype = str(tmp_path / "out.safetensors"), "float32"
  c.model.lora.rank, c.model.weights = RANK, str(tmp_path / "base.safetensors")
  model = gemma.preset("tiny", num_embed=1024)
  weights.save(c.model.weights, normal(gemma.shapes(model), 0), model, "float32", {})
  assemble, kept = fit.set_up, []
  monkeypatch.setattr(fit, "set_up", lambda config: kept.append(assemble(config)) or kept[0])
  figures = fit.run(c, tmp_path / "run", progress=False)
  first = metric_files.lines(tmp_path / "run")[0]
  assert figures["eval/loss"] < 0.8 * first["eval/loss"]
  setup = kept[0]
  assert size(setup.state_spec) < 0.4 * size(gemma.shapes(model)), (
    "two moments of adapters among them"
  )
  got = weights.load(c.export, model)
  assert jax.tree.structure({**got, "head": 0}) == jax.tree.structure(
    {**gemma.shapes(model), "head": 0}
  )
  again = fit._floats(setup.evaluate(got))
  assert again == pytest.approx(figures, rel=1e-5)
  # The adapters that were trained say the same as the file they were merged into.
  trained, _ = checkpoint.restore_part(
    tmp_path / "run", "params", setup.state_spec.params, best=True
  )
  assert fit._floats(setup.evaluate(setup.join(trained))) == pytest.approx(figures, rel=1e-3)
  if loss in judges.FITTED:
    (head,) = setup.initial_state().params["head"].values()
    assert np.all(np.not_equal(head, *got["head"].values())), "the head is trained itself"
  else:
    from_run = policy.load_weights(f"{tmp_path / 'run'}@params:best", model)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), from_run, got)


def test_a_stopped_fit_of_adapters_goes_on_as_if_never_stopped(tmp_path, monkeypatch):
  c = fits.settings(tmp_path)
  c.model.lora.rank = RANK
  setup = fit.set_up(resolve(c))
  calls, step = [], setup.train_step

  def stopped(state, batch):
    if len(calls) == 15:
      raise RuntimeError("killed")
    calls.append(1)
    return step(state, batch)

  monkeypatch.setattr(fit, "set_up", lambda config: setup._replace(train_step=stopped))
  with pytest.raises(RuntimeError, match="killed"):
    fit.run(c, tmp_path / "cut", progress=False)
  monkeypatch.setattr(fit, "set_up", lambda config: setup)
  states = []
  for name in ("cut", "whole"):
    fit.run(c, tmp_path / name, progress=False)
    states.append(checkpoint.restore_part(tmp_path / name, "params", setup.state_spec.params)[0])
  workdirs.assert_same(*states)

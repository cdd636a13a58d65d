"""Supervised fitting: every loss falls, the best is kept and exported, a run resumes."""

import json
import math
import os
import pathlib
import signal

import jax
import numpy as np
import pytest
from fits import settings
from jax import numpy as jnp
from metric_files import lines

from nash_jax import fit, weights
from nash_jax.config import resolve
from nash_jax.data.preferences import load_preferences
from nash_jax.data.tokenizer import BUNDLED, Tokenizer
from nash_jax.models import gemma, sharding
from nash_jax.run import checkpoint
from nash_jax.types import Mean

MODEL = gemma.preset("tiny", num_embed=1024)


@pytest.fixture(scope="module")
def sft(tmp_path_factory):
  """Config, assembled functions and folder of a next-token fit."""
  folder = tmp_path_factory.mktemp("fit")
  config = settings(folder)
  config.export = str(folder / "out.safetensors")
  setup = fit.set_up(resolve(config))
  state = setup.initial_state()
  return config, setup._replace(initial_state=lambda: jax.tree.map(jnp.copy, state)), folder


@pytest.fixture
def start(sft, monkeypatch):
  """Returns (workdir, changed functions) -> figures of the fit, compiled but once."""
  config, setup, _ = sft

  def start(workdir, **functions):
    fresh = setup._replace(**functions)
    monkeypatch.setattr(fit, "set_up", lambda config: fresh)
    return fit.run(config, workdir, progress=False)

  return start


def test_next_token_loss_falls_and_the_export_is_what_was_measured(sft, start, tmp_path):
  config, setup, _ = sft
  figures = start(tmp_path)
  first, last = (lines(tmp_path)[step]["eval/loss"] for step in (0, -1))
  assert first > 6
  assert last < 0.7 * first
  got = weights.load(config.export, MODEL)
  assert fit._floats(setup.evaluate(got)) == pytest.approx(figures, rel=1e-5)
  assert figures["eval/loss"] == pytest.approx(last, rel=1e-2), "float16 changes little"
  # Bits a byte are nats a token, over other units: the texts' own tokens and bytes.
  tokens = setup.held_out.all()
  tokenizer = Tokenizer(BUNDLED, "plain")
  text = sum(
    len(tokenizer.decode(row[mask]).encode())
    for row, mask in zip(tokens["tokens"], tokens["loss_mask"], strict=True)
  )
  nats = figures["eval/loss"] * tokens["loss_mask"].sum()
  assert figures["eval/bits_per_byte"] == pytest.approx(nats / text / math.log(2), rel=1e-4)


def test_a_stopped_fit_goes_on_as_if_never_stopped(sft, start, tmp_path):
  _, setup, _ = sft
  start(tmp_path / "whole")
  calls = []

  def stop(state, batch):
    calls.append(1)
    if len(calls) == 5:
      os.kill(os.getpid(), signal.SIGTERM)
    return setup.train_step(state, batch)

  assert start(tmp_path / "cut", train_step=stop) == {}
  assert checkpoint._steps(checkpoint._folder(tmp_path / "cut")) == [5]
  start(tmp_path / "cut")
  states = [
    checkpoint.restore_part(tmp_path / name, "params", setup.state_spec.params)[0]
    for name in ("whole", "cut")
  ]
  jax.tree.map(np.testing.assert_array_equal, *states)
  whole, cut = (
    [{k: v for k, v in line.items() if "second" not in k} for line in lines(tmp_path / name)]
    for name in ("whole", "cut")
  )
  assert whole == cut


def test_the_best_checkpoint_is_kept_and_exported_not_the_last(sft, start, tmp_path):
  config, setup, _ = sft
  losses = iter([3.0, 1.0, 2.0, 9.0])

  def scripted(params):
    return {"eval/loss": Mean(jnp.float32(next(losses)), jnp.float32(1))}

  assert start(tmp_path, evaluate=scripted) == {"eval/loss": 9.0}
  best, step = checkpoint.restore_part(tmp_path, "params", setup.state_spec.params, best=True)
  assert step == 12
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(a.astype(jnp.float16), b),
    best,
    weights.load(config.export, MODEL),
  )


def test_a_loss_that_is_not_finite_is_named(sft, start, tmp_path):
  _, setup, _ = sft
  calls = []

  def poison(state, batch):
    state, values = setup.train_step(state, batch)
    calls.append(1)
    return state, {**values, "loss": Mean(jnp.float32(np.nan), jnp.float32(1))} if len(
      calls
    ) == 15 else values

  with pytest.raises(
    FloatingPointError, match="'loss' is nan at step 14; the last good checkpoint is step 12"
  ):
    start(tmp_path, train_step=poison)


def test_a_step_beyond_the_end_ends_and_the_finished_fit_stays(sft, start, tmp_path, monkeypatch):
  config, setup, _ = sft
  start(tmp_path)
  steps = checkpoint._steps(checkpoint._folder(tmp_path))
  fewer = config.copy_and_resolve_references()
  fewer.steps, fewer.checkpoint.allow, fewer.export = 12, ("export",), ""
  finished = setup._replace(config=resolve(fewer))
  monkeypatch.setattr(fit, "set_up", lambda config: finished)
  figures = fit.run(fewer, tmp_path, progress=False)
  assert figures["eval/loss"] == pytest.approx(lines(tmp_path)[-1]["eval/loss"], rel=1e-5)
  assert checkpoint._steps(checkpoint._folder(tmp_path)) == steps
  assert steps[-1] == lines(tmp_path)[-1]["step"] == 24


def test_data_that_changed_are_named_at_a_resume(sft, start, tmp_path):
  config, setup, _ = sft
  start(tmp_path)
  path = pathlib.Path(config.data.path)
  whole = path.read_text()
  try:
    path.write_text(whole + json.dumps({"text": "A new line."}))
    with pytest.raises(ValueError, match=r"data.path: .*sft.jsonl\n"):
      start(tmp_path)
  finally:
    path.write_text(whole)
  start(tmp_path)
  judge = settings(tmp_path, "judge")
  judge.template = str(tmp_path / "template.txt")
  (tmp_path / "template.txt").write_text("1")
  judge.data.held_out_path = judge.data.path
  found = setup._replace(config=judge).inputs()
  assert set(found) == {"model.tokenizer", "data.path", "data.held_out_path", "template"}


@pytest.mark.parametrize("loss", ["judge", "reward", pytest.param("gpm", marks=pytest.mark.slow)])
def test_preferences_are_learned(loss, tmp_path):
  config = settings(tmp_path, loss)
  figures = fit.run(config, tmp_path / "run", progress=False)
  first = lines(tmp_path / "run")[0]
  assert figures["eval/loss"] < 0.5 * first["eval/loss"]
  assert figures["eval/accuracy"] == 1
  assert {"loss", "gradient_norm", "learning_rate", "accuracy"} <= set(first)


@pytest.mark.parametrize("size", [1, 2, 4, 5, 6, 8])
@pytest.mark.parametrize("count", [3, 6])
def test_every_held_out_pair_counts_once_whatever_the_batch_size(tmp_path, count, size):
  """Also where they are fewer than a batch."""
  config = resolve(settings(tmp_path, "reward", held_out=count, batch_size=size))
  tokenizer = Tokenizer(config.model.tokenizer, "plain")
  _, held_out = load_preferences(config.data, tokenizer, config.seed)
  asked = []

  def loss(params, batch):
    index = np.asarray(batch["prompts"].index)
    counted = np.asarray(batch.get("counted", np.ones(size, bool)))
    asked.extend(index[counted].tolist())
    assert len(index) == size, "one shape, compiled once"
    return {"loss": Mean(jnp.float32(index[counted].sum()), jnp.float32(counted.sum()))}

  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  metrics = fit._evaluate(loss, held_out, config, place, tokenizer, {})
  index = held_out.all()["prompts"].index
  assert sorted(asked) == sorted(index.tolist())
  assert metrics["eval/loss"].value() == pytest.approx(index.mean())


def test_pairs_train_on_their_own_tokens_and_texts_on_those_predicted(tmp_path):
  for loss in ("reward", "sft"):
    config = resolve(settings(tmp_path, loss))
    tokenizer = Tokenizer(config.model.tokenizer, "plain")
    batch = load_preferences(config.data, tokenizer, config.seed)[0].batch(0, 4)
    if loss == "sft":
      expected = batch["loss_mask"].sum()
    else:
      expected = sum(x.sum() for x in (batch["prompts"].mask, batch["a_mask"], batch["b_mask"]))
    assert fit._tokens(batch) == expected > 20


def test_a_batch_in_which_nothing_counts_changes_nothing(sft):
  _, setup, _ = sft
  batch = setup.data.batch(0, 4)
  empty = {**batch, "loss_mask": np.zeros_like(batch["loss_mask"])}
  batch, empty = (
    sharding.global_batch(setup.batch_sharding, 4, lambda rows, x=x: {k: x[k][rows] for k in x})
    for x in (batch, empty)
  )
  before, _ = setup.train_step(setup.initial_state(), batch)
  kept = jax.tree.map(np.array, (before.params, before.opt_state))
  after, values = setup.train_step(before, empty)
  jax.tree.map(np.testing.assert_array_equal, (after.params, after.opt_state), kept)
  assert values["loss"].weight == values["gradient_norm"] == values["tokens"] == 0


def test_an_evaluation_of_nothing_is_null_and_never_the_best(sft, start, tmp_path):
  _, setup, _ = sft
  weights = iter([1, 1, 0, 0])

  def scripted(params):
    return {"eval/loss": Mean(jnp.float32(0), jnp.float32(next(weights)))}

  assert start(tmp_path, evaluate=scripted) == {"eval/loss": None}, "of the exported weights"
  assert [x["eval/loss"] for x in lines(tmp_path) if "eval/loss" in x] == [0, 0, None]
  _, step = checkpoint.restore_part(tmp_path, "params", setup.state_spec.params, best=True)
  assert step == 12


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("loss", "dpo", "loss: got 'dpo', expected one of gpm, judge, reward, sft"),
    ("export_dtype", "int8", "export_dtype: got 'int8', expected one of bfloat16, float16"),
    ("data.task", "texts", "data.task: got 'texts', expected one of preferences, resp"),
    ("data.path", "", "`path` is empty"),
    ("data.batch_size", 5, "optimizer.micro_batches: expected a divisor of data.batch_size = 5"),
    ("model.changes", {"num_embed": 512}, "tokenizer"),
  ],
)
def test_bad_configs_are_refused_with_what_is_wrong_before_weights_load(
  tmp_path, monkeypatch, field, value, message
):
  monkeypatch.setattr(fit, "load_weights", lambda *args: pytest.fail("weights are loaded"))
  config = settings(tmp_path)
  config.optimizer.micro_batches = 2
  config.update_from_flattened_dict(
    {field: value}
  ) if field != "model.changes" else config.model.update({"changes": value})
  with pytest.raises(ValueError, match=message):
    fit.run(config, tmp_path / "run")

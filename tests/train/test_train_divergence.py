"""Online runs whose loss is not finite, or whose verdicts teach nothing."""

import jax
import pytest
import tiny
from jax import numpy as jnp
from workdirs import assert_same, lines

from configs import short_game
from nash_jax import train
from nash_jax.config import resolve
from nash_jax.data import tokenizer
from nash_jax.run import checkpoint, metrics


def test_a_loss_that_is_not_finite_names_step_and_last_good_checkpoint(start, assembled, tmp_path):
  calls = []

  def poison(state, ref, batch):
    state, values = assembled.programs.train_step(state, ref, batch)
    calls.append(1)
    if len(calls) == 5:
      state = state.replace(params=jax.tree.map(lambda x: x * jnp.nan, state.params))
    return state, values

  with pytest.raises(
    FloatingPointError,
    match=r"'loss' is nan at step 5; the last good checkpoint"
    r" is step 3 in .*Lower optimizer.learning_rate",
  ):
    start(tmp_path, train_step=poison)
  assert checkpoint._steps(checkpoint._folder(tmp_path)) == [3], "what is not finite is not saved"
  done = start(tmp_path)
  assert int(done.state.step) == 6, "the run goes on from the last good one"


@pytest.mark.parametrize("reported", ["loss", "parameters"])
def test_unreadable_texts_do_not_hide_that_a_run_diverged(
  start, assembled, tmp_path, monkeypatch, reported
):
  """The held-out texts at step 3 are ids without a piece; so is the loss, or the state, NaN."""

  def poison(state, reference, batch):
    state, values = assembled.programs.train_step(state, reference, batch)
    bad = jax.tree.map(lambda x: x * jnp.nan, state.params)
    state = state.replace(
      params=jax.tree.map(lambda a, b: jnp.where(state.step == 3, b, a), state.params, bad)
    )
    return state, values

  def no_piece(self, ids):
    raise IndexError("OUT_OF_RANGE: piece id is out of range.")

  monkeypatch.setattr(tokenizer.Tokenizer, "decode", no_piece)
  start_texts = metrics.Metrics.text
  monkeypatch.setattr(
    metrics.Metrics, "text", lambda self, step, *more: step == 3 and start_texts(self, step, *more)
  )
  functions = {"train_step": poison}
  if reported == "loss":
    functions["evaluate"] = lambda *args: assembled.programs.evaluate(*args)
    monkeypatch.setattr(checkpoint.Checkpoints, "save", lambda *args: None)
  message = "params.* is not finite after step 3" if reported == "parameters" else "'loss' is nan"
  with pytest.raises(FloatingPointError, match=f"{message}.*there is no checkpoint yet in .*Lower"):
    start(tmp_path, **functions)


def assert_nothing_learned(workdir, done, first):
  assert_same(done.state.params, first.params)
  assert_same(done.state.opt_state, first.opt_state)
  *steps, _ = lines(workdir)
  for line in steps:
    assert line["valid"] == line["gradient_norm"] == 0
    assert line["loss"] is line["p_win"] is None


def test_a_run_of_unreadable_verdicts_goes_on_with_the_parameters_it_has(
  start, assembled, tmp_path
):
  def unread(*args):
    verdict = assembled.programs.judge(*args)
    return verdict.replace(valid=jnp.zeros_like(verdict.valid))

  done = start(tmp_path, judge=unread)
  assert done.state.step == 6
  assert_nothing_learned(tmp_path, done, assembled.programs.init(assembled.reference))
  assert checkpoint._steps(checkpoint._folder(tmp_path)) == [3, 6]


@pytest.mark.slow
def test_a_table_that_reads_other_tokens_than_are_drawn_teaches_nothing(tmp_path):
  """The tokens drawn are 7 to 10, the table reads 11 to 14."""
  config = short_game.get_config()
  config.update_from_flattened_dict({"judge.first_token": 11, "evaluation.exact": False})
  config.update_from_flattened_dict({"steps": 4, "evaluation.every": 2, "checkpoint.every": 2})
  config.prompts.batch_size = 8
  setup = train.set_up(resolve(config))
  done = train.run(config, tmp_path, progress=False)
  assert_nothing_learned(tmp_path, done, setup.initial_state())
  assert [line.get("eval/win_rate_vs_reference", 0) for line in lines(tmp_path)] == [
    None, 0, None, 0, None
  ]  # fmt: skip


@pytest.mark.slow
def test_a_prox_weight_that_overflows_the_gradient_stops_the_run(tmp_path):
  config = tiny.train({"algorithm.eta": 1e-30})
  with pytest.raises(FloatingPointError, match=r"'gradient_norm' is (inf|nan) at step \d"):
    train.run(config, tmp_path, progress=False)

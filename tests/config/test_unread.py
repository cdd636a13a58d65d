"""A field that nothing reads is refused where a flag or a run of a comparison sets it."""

import bundled_configs
import fits
import pytest
import tiny
from absl import logging

from nash_jax import config as configs
from nash_jax import judges, main
from nash_jax.config import checks, fields, refuse_unread, resolve
from nash_jax.config.unread import unread, unread_and_set
from nash_jax.configs import short_compare, stories


@pytest.fixture
def told(monkeypatch):
  """Returns the lines of warning so far."""
  lines = []
  monkeypatch.setattr(logging, "warning", lambda text, *values: lines.append(text % values))
  return lines


def of(changes, job="train") -> set[str]:
  config = getattr(configs, job)()
  config.update_from_flattened_dict(changes)
  return {*unread(config, job)}


MOMENTS = {"optimizer.b1", "optimizer.b2", "optimizer.eps", "optimizer.weight_decay"}


@pytest.mark.parametrize(
  ("name", "ignored"), [("adamw", set()), ("sgd", MOMENTS), ("adafactor", MOMENTS)]
)
def test_options_that_an_optimiser_does_not_have_are_refused_by_name(name, ignored):
  assert of({"optimizer.name": name}) & MOMENTS == ignored
  config = tiny.train({"optimizer.name": name})
  for field in MOMENTS:
    if field in ignored:
      message = (
        f"{field}: expected no value, because optimizer.name = {name} does not read it, got "
      )
      with pytest.raises(ValueError, match=message):
        refuse_unread(config, "train", [field])
    else:
      refuse_unread(config, "train", [field])


def test_what_was_chosen_decides_what_is_read():
  assert "optimizer.final_fraction" in of({})
  assert "optimizer.final_fraction" not in of({"optimizer.schedule": "cosine"})
  assert "model.lora.alpha" in of({})
  assert "model.lora.alpha" not in of({"model.lora.rank": 4})
  assert {"judge.http.url", "judge.http.timeout", "judge.table"} <= of({})
  assert {"judge.template", "judge.answers", "judge.model.dtype"} & of({}) == set()
  assert {"judge.template", "judge.model.dtype"} <= of({"judge.name": "population"})
  assert "judge.table" not in of({"judge.name": "table"})
  assert "judge.model.template" in of({})
  assert "judge.model.template" not in of({"judge.name": "gemma_text"})
  assert "prompts.held_out" in of({"prompts.held_out_path": "x"})
  assert "algorithm.eta" in of({"algorithm.name": "nash_md"})
  assert "algorithm.mixture" not in of({"algorithm.name": "nash_md"})
  assert "algorithm.kappa_offset" in of({})
  assert {"algorithm.kappa"} <= of({"algorithm.kappa_schedule": "harmonic"})
  assert {"template", "data.max_response_tokens", "export_dtype"} <= of({}, "fit")
  pairs = {"loss": "judge", "data.task": "preferences", "export": "x"}
  assert not {"template", "data.max_response_tokens", "export_dtype"} & of(pairs, "fit")
  assert {"model.logit_chunk"} <= of(pairs, "fit")
  assert {"model.weights", "model.lora.rank", "judges.judge.mesh.data"} <= of({}, "arena")
  assert {"reference"} == of({}, "sample") - of({"realign": 1.5}, "sample")


def test_every_judge_says_what_it_reads():
  assert {*fields.JUDGES} == {*judges.JUDGES}
  for name, read in fields.JUDGES.items():
    judge = fields.judge()
    for field in read:
      for part in field.split("."):
        assert part in judge, f"{name} reads {field}"
        judge = judge[part]
      judge = fields.judge()


def test_a_config_file_that_sets_what_nothing_reads_is_told_so_in_one_line(told):
  config = tiny.train({"optimizer.name": "sgd", "optimizer.weight_decay": 0.5})
  config.judge = fields.judge()
  config.judge.name, config.judge.table = "population", "x.npy"
  resolved = resolve(config)
  line = "set, but not read by this run: judge.table, optimizer.eps, optimizer.weight_decay"
  assert told == [line]
  resolve(resolved)
  assert told == [line], "it is said once"
  resolve(configs.train())
  assert told == [line]


def test_defaults_and_what_methods_fill_in_are_not_told(told):
  for job in fields.DECLARED:
    if job != "compare":
      assert unread_and_set(getattr(configs, job)(), job) == []
  for name in ("sppo", "egpo", "mpo"):
    resolve(tiny.train({"algorithm.name": name, "judge": fields.judge(), "optimizer.eps": 1e-8}))
  assert told == []


def test_the_demo_and_the_configs_of_the_package_are_told_nothing(told, tmp_path, monkeypatch):
  from nash_jax.jobs import demo

  for workdir in ("run", "runs/stories"):
    (tmp_path / workdir / "checkpoints" / "00000001").mkdir(parents=True)
  monkeypatch.chdir(tmp_path)
  resolve(demo._arena_config(stories.get_config(), "run@params", "run@target"))
  for name in main.config_names():
    config = bundled_configs.load(name)
    if config.job in fields.DECLARED:  # others check their configs themselves
      bundled_configs.make_local_files(config, tmp_path)
      resolve(config, config.job)
  assert told == []


def test_a_run_of_a_comparison_that_sets_what_it_does_not_read_is_refused(told):
  c = short_compare.get_config("smoke")
  resolve(c)
  assert told == []
  c.runs = (*c.runs, {"algorithm.name": "online_dpo", "algorithm.eta": 0.5})
  message = (
    "run 'online_dpo, eta = 0.5': algorithm.eta: expected no value, because"
    " algorithm.name = online_dpo"
  )
  with pytest.raises(ValueError, match=message):
    resolve(c)
  c.runs = ({"algorithm.name": "online_dpo"}, {"algorithm.name": "nash_md"})
  resolve(c)
  assert len(told) == 1
  assert "base.algorithm.eta, base.algorithm.kappa" in told[0], "the base's, of which no run reads"
  for field in ("base.algorithm.eta", "base.seed", "base.optimizer.learning_rate", "arena.texts"):
    with pytest.raises(ValueError, match=f"{field}: expected no value"):
      refuse_unread(c, "compare", [field])
  refuse_unread(c, "compare", ["base.algorithm.mixture", "learning_rates", "tuning_steps"])


def test_a_field_that_does_not_exist_is_refused_in_a_run_of_a_comparison():
  c = short_compare.get_config("smoke")
  for changes, message in (
    (
      {"algorithm.etta": 1.0},
      "config field algorithm.etta: got 'etta', expected one of .*did you mean 'eta'",
    ),
    ({"algorithm.name.x": 1.0}, "config field algorithm.name.x: algorithm.name is a value"),
    (
      {"algorithm.name": "nash_mp", "seed": 3},
      "seed: expected no change, got 3. `seeds` and `tuning_seed` set it",
    ),
    (
      {"optimizer.learning_rate": 0.1},
      "optimizer.learning_rate: expected no change, .*`learning_rates` sets it",
    ),
    ("nash_mp", "run 1: expected a dict of values by dotted field, got 'nash_mp'"),
  ):
    c.runs = (changes,)
    with pytest.raises(ValueError, match=message):
      resolve(c)


@pytest.mark.parametrize(
  ("loss", "task", "expected"),
  [
    ("judge", "text", "preferences or tokens for loss = judge, got 'text'"),
    ("judge", "responses", "preferences or tokens for loss = judge, got 'responses'"),
    ("reward", "text", "preferences or tokens for loss = reward, got 'text'"),
    ("sft", "preferences", "responses or text for loss = sft, got 'preferences'"),
    ("sft", "tokens", "responses or text for loss = sft, got 'tokens'"),
  ],
)
def test_a_loss_and_a_task_that_do_not_belong_together_are_refused(loss, task, expected, tmp_path):
  config = fits.settings(tmp_path, loss)
  config.data.task = task
  with pytest.raises(ValueError, match=f"data.task: expected {expected}. Set --config.loss or"):
    resolve(config, "fit")


@pytest.mark.parametrize("job", ["train", "fit"])
def test_which_evaluations_can_be_the_best_is_said_and_an_export_needs_them_to_meet(
  job, tmp_path, monkeypatch
):
  lines = []
  log = lines.append
  monkeypatch.setattr(logging, "log", lambda level, text, *x: log((level, text % x)))
  monkeypatch.setattr(logging, "warning", lambda *_: None)  # of what is not read
  config = tiny.train() if job == "train" else fits.settings(tmp_path, "sft")
  config.steps = 20
  for every, save, among in ((4, 4, 4), (8, 4, 8), (4, 8, 8), (4, 6, 12), (50, 3, None)):
    config.evaluation.every, config.checkpoint.every = every, save
    lines.clear()
    checks._say_which_can_be_best.cache_clear()  # another test may have had it said
    resolve(config)
    told = (
      []
      if among in (every, None)
      else [f"checkpoints every {save}: the best checkpoint is chosen among"]
    )
    assert all(
      part in line and f"those every {among} steps" in line
      for (_, line), part in zip(lines, told, strict=True)
    )
  if job == "train":
    return
  config.export = "x.safetensors"
  for every, save in ((4, 6), (6, 4)):
    config.evaluation.every, config.checkpoint.every = every, save
    expected = rf"evaluation.every: expected a divisor or a multiple of checkpoint.every = {save}"
    with pytest.raises(ValueError, match=expected):
      resolve(config)
  config.evaluation.every, config.checkpoint.every = 4, 8
  lines.clear()
  resolve(config)
  assert [level for level, _ in lines] == [logging.WARNING]


def test_zero_is_no_clipping_and_less_is_refused():
  import jax
  import optax
  from jax import numpy as jnp

  from nash_jax import update

  gradient = jnp.float32([3.0, 4.0])
  steps = {}
  for clip in (0.0, 1.0, 1e9):
    config = configs.optimizer(name="sgd", learning_rate=1.0, clip_norm=clip)
    tx = update.make_optimizer(config, 10)
    steps[clip] = jax.device_get(tx.update(gradient, tx.init(gradient))[0])
  assert abs(steps[0.0] + gradient).max() == 0
  assert abs(steps[1e9] - steps[0.0]).max() == 0
  assert abs(steps[1.0] + gradient / optax.tree.norm(gradient)).max() < 1e-6
  expected = r"clip_norm: expected a number in \[1e-9, 1e12\], or 0 \(off\), got -1"
  with pytest.raises(ValueError, match=expected):
    resolve(tiny.train({"optimizer.clip_norm": -1.0}))

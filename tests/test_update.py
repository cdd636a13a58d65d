"""The step and the target, on a policy small enough to check by hand: one row of logits."""

import jax
import numpy as np
import optax
import pytest
import tiny
from jax import numpy as jnp
from one_row_policy import B, K, L, batch, gradient, logits, make

from nash_jax import update
from nash_jax.objectives import algorithms
from nash_jax.run import metrics
from nash_jax.types import Verdict


def test_micro_batches_change_nothing():
  results = []
  for parts in (1, 2, 4):
    rule = make(optimizer__micro_batches=parts)
    state = rule.init(logits(0)).replace(target=logits(1))
    state, values = rule.train_step(state, logits(2), batch())
    results.append((gradient(state), values))
  assert jnp.max(jnp.abs(results[0][0])) > 1e-2
  for other in results[1:]:
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), results[0], other
    )


def test_the_gradient_is_that_of_the_loss_over_prompts_with_a_verdict():
  """A prompt without a verdict weighs nothing: leaving it out gives the same gradient."""
  rule, x = make(), batch()
  kept = jnp.array([0, 2, 3, 6, 7])
  some = jax.tree.map(lambda a: jnp.asarray(a)[kept], x)
  whole, part = (
    rule.train_step(rule.init(logits(0)).replace(target=logits(1)), logits(2), b)[0]
    for b in (x, some)
  )
  np.testing.assert_allclose(gradient(whole), gradient(part), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kappa", [0.0, 0.1, 1.0])
def test_the_target_moves_towards_the_parameters_after_the_step(kappa):
  rule = make(algorithm__kappa=kappa)
  before = rule.init(logits(0)).replace(target=logits(1))
  after, values = rule.train_step(before, logits(2), batch())
  moved = optax.incremental_update(after.params, before.target, kappa)
  np.testing.assert_allclose(after.target["w"], moved["w"], rtol=1e-6)
  assert values["kappa"] == np.float32(kappa)
  assert jnp.max(jnp.abs(after.params["w"] - before.params["w"])) > 1e-3
  if kappa == 0:
    np.testing.assert_array_equal(after.target["w"], before.target["w"])


def test_the_harmonic_kappa_starts_at_one_and_averages_from_there():
  rule = make(algorithm__kappa_schedule="harmonic", algorithm__kappa_offset=10.0)
  state = rule.init(logits(0)).replace(target=logits(1))
  for step in range(4):
    before = state
    state, values = rule.train_step(state, logits(2), batch())
    np.testing.assert_allclose(values["kappa"], 10 / (step + 10), rtol=1e-6)
    moved = optax.incremental_update(state.params, before.target, 10 / (step + 10))
    np.testing.assert_allclose(state.target["w"], moved["w"], rtol=1e-5)
    if step == 0:
      np.testing.assert_array_equal(state.target["w"], state.params["w"])
  assert rule.train_step._cache_size() == 1
  assert state.step == 4


def test_a_periodic_target_is_copied_at_its_steps_only():
  rule = make(algorithm__target_update="periodic", algorithm__target_period=3)
  state = rule.init(logits(0))
  centre, copied = state.params["w"], []
  for step in range(7):
    state, _ = rule.train_step(state, logits(2), batch())
    np.testing.assert_array_equal(state.target["w"], centre)
    if copies := rule.copies_due(step + 1):
      state, centre = rule.apply_copies(state, copies), state.params["w"]
      copied.append(step + 1)
      np.testing.assert_array_equal(state.target["w"], state.params["w"])
  assert copied == [3, 6]
  assert not any(make().copies_due(step) for step in range(1, 9)), "an EMA is never copied"


def test_regularised_self_play_keeps_no_target():
  rule = make(algorithm__name="reg_self_play")
  state, values = rule.train_step(rule.init(logits(0)), logits(2), batch())
  assert state.target is None
  assert "kl_to_target" not in values
  assert not rule.copies_due(10)
  # Without a prox term NashMP takes the same step.
  prox = make(algorithm__eta=1e9)
  same, _ = prox.train_step(prox.init(logits(0)).replace(target=logits(1)), logits(2), batch())
  np.testing.assert_allclose(gradient(state), gradient(same), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", algorithms.ALGORITHMS)
def test_gradients_stop_at_every_role_and_the_judge_though_the_loss_depends_on_them(name):
  """The step depends on reference, target and verdict, but nothing flows back into them."""
  rule = make(algorithm__name=name, algorithm__reference_period=0, optimizer__micro_batches=1)
  x = batch()
  a = tiny.train({"algorithm.name": name}).algorithm
  algorithms.fill_defaults(a)
  weights = algorithms.get(name).role_weights(a)
  field = "rewards" if algorithms.get(name).needs_rewards else "p_win"

  @jax.jit
  def loss(ref, target, values):
    verdict = x.verdict.replace(**{field: values})
    state = rule.init(logits(0)).replace(target=target)
    state, emitted = rule.train_step(state, ref, x.replace(verdict=verdict))
    return emitted["loss"].value(), gradient(state)

  judgement = jnp.asarray(getattr(x.verdict, field))
  roles = (logits(2), logits(1), judgement)
  grads = jax.grad(lambda *roles: loss(*roles)[0], (0, 1, 2))(*roles)
  jax.tree.map(lambda g: np.testing.assert_array_equal(g, 0), grads)
  _, base = loss(*roles)
  changes = {"reference": (logits(3), *roles[1:]), "target": (roles[0], logits(3), judgement)}
  for other in [changes[role] for role in weights] + [(*roles[:2], judgement[::-1] * 0.9)]:
    assert np.max(np.abs(loss(*other)[1] - base)) > 1e-3


def run(rule, steps):
  """Returns (state after n steps and the copies due, state before those copies) for every n."""
  state, history = rule.init(logits(0)), []
  for step in range(1, steps + 1):
    before, _ = rule.train_step(state, logits(2), batch())
    state = rule.apply_copies(before, rule.copies_due(step))
    history.append((state, before))
  return history


@pytest.mark.parametrize(
  "name", [n for n, a in algorithms.ALGORITHMS.items() if a.copies or "target_period" in a.fields]
)
def test_copies_change_the_fields_that_are_due_and_no_other(name):
  rule = make(algorithm__name=name, algorithm__target_period=1)
  rng = np.random.default_rng(0)
  state = jax.tree.map(
    lambda leaf: rng.standard_normal(leaf.shape).astype(leaf.dtype), rule.init(logits(0))
  )

  def fields(state):
    core = {"params": state.params, "target": state.target, "opt_state": state.opt_state}
    return {"step": state.step, **core, **state.copies}

  for step in (1, 2):
    copies = rule.copies_due(step)
    assert copies
    expected = fields(state) | {field: fields(state)[source] for field, source in copies}
    after = rule.apply_copies(jax.tree.map(jnp.array, state), copies)
    jax.tree.map(np.testing.assert_array_equal, fields(after), expected)


def test_extragradient_half_steps_start_where_the_whole_step_did():
  """EGPO: parameters and optimiser state of the start return; y'' comes from the half step."""
  rule = make(algorithm__name="egpo")
  start = rule.init(logits(0))
  (half, first), (whole, second), (third, _) = run(rule, 3)
  restored = (half.params, half.opt_state)
  jax.tree.map(np.testing.assert_array_equal, restored, (start.params, start.opt_state))
  np.testing.assert_array_equal(half.copies["opponent"]["w"], first.params["w"])
  assert np.max(np.abs(first.params["w"] - start.params["w"])) > 1e-3
  for name in ("opponent", "start"):
    np.testing.assert_array_equal(whole.copies[name]["w"], second.params["w"])
  np.testing.assert_array_equal(third.params["w"], whole.params["w"])
  assert (int(half.step), int(whole.step)) == (1, 2)


def test_two_step_nash_mp_moves_its_opponent_each_half_and_its_centre_each_whole():
  rule = make(algorithm__name="nash_mp_two_step", algorithm__target_period=2)
  history = run(rule, 4)
  start, after = logits(0)["w"], [state.params["w"] for state, _ in history]
  opponents = [start, after[1], after[1], after[3]]
  centres = [start, start, start, after[3]]
  for (state, _), opponent, centre in zip(history, opponents, centres, strict=True):
    np.testing.assert_array_equal(state.copies["opponent"]["w"], opponent)
    np.testing.assert_array_equal(state.target["w"], centre)


@pytest.mark.parametrize("name", ["mpo", "nash_mp"])
def test_a_refreshed_reference_is_the_policy_of_its_last_period(name):
  """MPO's magnet is the reference refreshed; any algorithm may refresh it."""
  rule = make(algorithm__name=name, algorithm__reference_period=3, algorithm__target_period=1)
  history = run(rule, 4)
  # It starts as the run's reference, whatever the policy starts from, and KL to it returns to 0.
  np.testing.assert_array_equal(history[1][0].copies["reference"]["w"], logits(0)["w"])
  np.testing.assert_array_equal(history[2][0].copies["reference"]["w"], history[2][0].params["w"])
  np.testing.assert_array_equal(history[3][0].copies["reference"]["w"], history[2][0].params["w"])
  assert rule.players(history[0][0], logits(2))["reference"] is history[0][0].copies["reference"]


def test_a_policy_that_is_its_own_reference_and_target_has_no_kl():
  rule = make()
  _, values = rule.train_step(rule.init(logits(0)), logits(0), batch())
  assert values["kl_to_reference"].value() == values["kl_to_target"].value() == 0


def test_a_state_shares_no_buffer_so_that_it_can_be_donated():
  rule, params = make(), logits(0)
  state = rule.init(params)
  buffers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves((params, state))]
  assert len(set(buffers)) == len(buffers)
  step = jax.jit(rule.train_step, donate_argnums=0)
  for _ in range(2):
    state, _ = step(state, params, batch())
  np.testing.assert_array_equal(params["w"], logits(0)["w"])


@pytest.mark.parametrize("name", algorithms.ALGORITHMS)
def test_every_metric_has_an_entry_in_the_glossary(name):
  rule = make(algorithm__name=name)
  _, values = rule.train_step(rule.init(logits(0)), logits(2), batch())
  assert set(values) <= set(metrics.GLOSSARY)
  assert values["stopped"].value() + values["truncated"].value() == 1


@pytest.mark.parametrize("name", ["adamw", "adafactor", "sgd"])
def test_every_optimiser_raises_the_likelihood_of_winning_responses(name):
  """All compared responses win or lose by their first token: token 0 wins."""
  rule, x = make(optimizer__name=name, optimizer__micro_batches=1), batch()
  tokens = np.zeros((B, K, L), np.int64)
  tokens[:, 1] = 1
  p_win = np.broadcast_to(np.float32([[0.5, 1], [0, 0.5]]), (B, K, K))
  x = x.replace(
    responses=x.responses.replace(tokens=tokens, mask=np.ones((B, K, L), bool)),
    verdict=x.verdict.replace(p_win=p_win),
  )
  before = rule.init(logits(0))
  after, _ = rule.train_step(before, logits(0), x)
  change = jax.nn.log_softmax(after.params["w"]) - jax.nn.log_softmax(before.params["w"])
  assert change[0] > 0 > change[1]


@pytest.mark.parametrize("shape", ["constant", "linear", "cosine"])
def test_schedules_warm_up_to_the_peak_and_end_at_the_final_fraction(shape):
  config = tiny.train().optimizer
  config.update({"schedule": shape, "warmup_steps": 4, "final_fraction": 0.25})
  rate = update.make_schedule(config, 20)
  peak = config.learning_rate
  rates = [float(rate(step)) for step in range(21)]
  np.testing.assert_allclose(rates[0], peak / 4, rtol=1e-5)
  np.testing.assert_allclose(max(rates), rates[4], rtol=1e-6)
  np.testing.assert_allclose(rates[4], peak, rtol=1e-5)
  np.testing.assert_allclose(rates[20], peak if shape == "constant" else peak / 4, rtol=1e-5)


def with_verdict(x, **fields):
  return x.replace(verdict=x.verdict.replace(**fields))


@pytest.mark.parametrize("name", ["nash_mp", "online_ipo"])
def test_a_batch_without_a_valid_comparison_leaves_parameters_and_optimiser_alone(name):
  """Momentum and weight decay would move them though the gradient is 0."""
  rule, x = make(algorithm__name=name, optimizer__weight_decay=0.1), batch()
  before, _ = rule.train_step(rule.init(logits(0)), logits(2), x)
  unread = with_verdict(x, valid=np.zeros_like(x.verdict.valid))
  after, values = rule.train_step(before, logits(2), unread)
  kept = ("params", "opt_state")
  for field in kept:
    jax.tree.map(np.testing.assert_array_equal, getattr(after, field), getattr(before, field))
  assert after.step == before.step + 1
  assert values["valid"].value() == values["gradient_norm"] == 0
  assert values["loss"].weight == values["p_win"].weight == 0
  again, values = rule.train_step(after, logits(2), x)
  assert np.max(np.abs(again.params["w"] - after.params["w"])) > 1e-3
  assert values["valid"].value() == 5 / 8
  assert rule.train_step._cache_size() == 1


def test_a_micro_batch_without_a_valid_comparison_weighs_nothing():
  """As where the batch is one part: each part takes every second row."""
  x, results = batch(), []
  x.verdict.valid[::2] = False
  for parts in (1, 2):
    rule = make(optimizer__micro_batches=parts)
    results.append(gradient(rule.train_step(rule.init(logits(0)), logits(2), x)[0]))
  assert np.max(np.abs(results[0])) > 1e-3
  np.testing.assert_allclose(*results, rtol=1e-5, atol=1e-6)


def test_gradients_are_clipped_once_by_the_mean_of_all_micro_batches():
  steps = []
  for parts in (1, 4):
    options = {"optimizer__name": "sgd", "optimizer__clip_norm": 0.01}
    rule = make(optimizer__micro_batches=parts, **options)
    start = rule.init(logits(0)).replace(target=logits(1))
    after, values = rule.train_step(start, logits(2), batch())
    assert values["gradient_norm"] > 0.1
    steps.append((after.params["w"] - start.params["w"]) / values["learning_rate"])
  np.testing.assert_allclose(np.linalg.norm(steps[0]), 0.01, rtol=1e-4)
  np.testing.assert_allclose(*steps, rtol=1e-4, atol=1e-7)


SCHEDULED = [
  "egpo",
  *(pytest.param(name, marks=pytest.mark.slow) for name in algorithms.ALGORITHMS if name != "egpo"),
]


@pytest.mark.parametrize("name", SCHEDULED)
def test_the_learning_rate_that_is_logged_is_the_one_applied(name):
  """And it is the schedule's after so many of the run's steps, also where EGPO goes back."""
  options = {"schedule": "linear", "final_fraction": 0.0, "warmup_steps": 4, "name": "sgd"}
  rule = make(
    algorithm__name=name, steps=12, **{f"optimizer__{k}": value for k, value in options.items()}
  )
  state = rule.init(logits(0))
  for step in range(12):
    before = state
    state, values = rule.train_step(before, logits(2), batch())
    moved = np.linalg.norm(state.params["w"] - before.params["w"])
    expected = 0.1 * (0.25 + 0.75 * step / 4 if step < 4 else (12 - step) / 8)
    np.testing.assert_allclose(values["learning_rate"], expected, rtol=1e-5)
    if values["gradient_norm"] > 1e-2:
      np.testing.assert_allclose(moved / values["gradient_norm"], expected, rtol=2e-3)
    state = rule.apply_copies(state, rule.copies_due(step + 1))
    assert optax.tree.get(state.opt_state, "count") <= step + 1


@pytest.mark.parametrize("name", ["nash_mp", "online_ipo"])
@pytest.mark.parametrize("marked", [False, True])
def test_a_verdict_that_is_no_probability_weighs_nothing_and_is_counted(name, marked):
  """NaN and infinity too where the judge itself says that they are not valid."""
  rule, x = make(algorithm__name=name), batch()
  bad, kept = np.array([0, 2, 3, 6]), np.array([7])
  p_win, valid = x.verdict.p_win.copy(), x.verdict.valid.copy()
  p_win[bad] = np.array([np.nan, np.inf, -0.2, 1.5], np.float32)[:, None, None]
  p_win[1] = np.nan
  valid[bad] &= not marked
  start = rule.init(logits(0)).replace(target=logits(1))
  state, values = rule.train_step(start, logits(2), with_verdict(x, p_win=p_win, valid=valid))
  none = np.zeros_like(valid)
  none[kept] = x.verdict.valid[kept]
  alone, _ = rule.train_step(start, logits(2), with_verdict(x, valid=none))
  assert np.max(np.abs(gradient(alone))) > 1e-3
  np.testing.assert_allclose(gradient(state), gradient(alone), rtol=1e-5, atol=1e-7)
  assert values["valid"].value() == 1 / 8
  np.testing.assert_allclose(values["p_win"].value(), x.verdict.p_win[7, 0, 1], rtol=1e-6)


def test_wins_and_valid_comparisons_are_means_over_all_pairs():
  """Each pair once: three responses of a prompt, one of them unreadable, are one pair of three."""
  rng = np.random.default_rng(1)
  p_win = rng.random((B, 3, 3), np.float32)
  valid = np.broadcast_to(~np.eye(3, dtype=bool), p_win.shape).copy()
  valid[:, 0] = valid[:, :, 0] = False
  responses = jax.tree.map(lambda leaf: leaf[:, [0, 1, 0]], batch().responses)
  among = update._batch_metrics(responses, Verdict(p_win, valid), True)
  assert among["valid"].value() == pytest.approx(1 / 3)
  np.testing.assert_allclose(among["p_win"].value(), p_win[:, 1, 2].mean(), rtol=1e-6)
  opposed = update._batch_metrics(responses, Verdict(p_win, valid | True), False)
  assert opposed["valid"].value() == 1
  np.testing.assert_allclose(opposed["p_win"].value(), p_win.mean(), rtol=1e-6)


def metric_names(**changes):
  rule = make(**changes)
  state = jax.eval_shape(rule.init, logits(0))
  _, values = jax.eval_shape(rule.train_step, state, logits(2), batch())
  return {name for name in values if "_to_" in name}


@pytest.mark.parametrize("name", algorithms.ALGORITHMS)
def test_a_mean_log_ratio_is_called_kl_only_over_the_policys_own_samples(name):
  own = algorithms.get(name).player == "policy"
  names = metric_names(algorithm__name=name)
  assert names
  assert {x.split("_to_")[0] for x in names} == {"kl" if own else "log_ratio"}
  assert names <= set(metrics.GLOSSARY)


@pytest.mark.parametrize(
  "change",
  [
    {"sampling__top_k": 5},
    {"sampling__top_k": 5, "sampling__top_p": 0.9},
    {"algorithm__behaviour_temperature": 1.5},
  ],
)
def test_a_mean_log_ratio_over_a_distorted_distribution_is_no_kl(change):
  assert metric_names(algorithm__name="online_dpo", **change) == {"log_ratio_to_reference"}
  # The temperature is the trained distribution's own.
  assert metric_names(sampling__temperature=0.5) == {"kl_to_reference", "kl_to_target"}

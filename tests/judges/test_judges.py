"""Judges that are networks: pairs, padding, budgets, answers, losses, and what is refused."""

import functools
import re

import jax
import numpy as np
import pytest
import scipy
from jax import numpy as jnp
from judge_examples import (
  SMALL,
  examples,
  long_examples,
  make_judge,
  padded,
  prompts_of,
  responses_of,
  settings,
  verdict_of,
)

from nash_jax import judges, weights
from nash_jax.data import judge_template
from nash_jax.data.tokenizer import BUNDLED, Tokenizer
from nash_jax.judges import bradley_terry
from nash_jax.judges.gemma import answer_logits, pairwise_loss
from nash_jax.models import gemma
from nash_jax.types import Answers, Prompts

OPTIONS = {"dtype": jnp.float32}


@pytest.fixture(scope="module")
def tokenizer():
  return Tokenizer(BUNDLED, "plain")


@pytest.mark.parametrize("name", ["gemma", "bradley_terry", "gpm", "population"])
def test_responses_compared_with_each_other_get_the_verdicts_of_a_copy(name):
  prompts, rows = examples()
  prompts, y = prompts_of(prompts, 8), responses_of(rows, 8)
  judge = make_judge(name)
  own = verdict_of(judge, prompts, y, None)
  copy = verdict_of(judge, prompts, y, y)
  different = ~np.eye(3, dtype=bool)
  np.testing.assert_allclose(own.p_win, copy.p_win, atol=1e-6)
  np.testing.assert_allclose(own.p_win + own.p_win.swapaxes(1, 2), 1, atol=1e-7)
  np.testing.assert_array_equal(own.p_win[:, ~different], 0.5)
  np.testing.assert_array_equal(own.valid, np.broadcast_to(different, (2, 3, 3)))
  assert copy.valid.all()
  assert np.ptp(own.p_win) > 1e-3
  # Each pair is counted once: 2 prompts x 3 pairs, and 2 x 9 with the copy.
  assert own.metrics["tie_mass"].weight == 6
  assert copy.metrics["tie_mass"].weight == 18
  ties = np.abs(np.asarray(copy.p_win) - 0.5) < 0.05
  np.testing.assert_allclose(copy.metrics["tie_mass"].value(), ties.mean(), atol=1e-6)


def test_a_single_response_cannot_be_compared_with_itself():
  prompts, rows = examples(samples=1)
  judge = make_judge("population")
  with pytest.raises(ValueError, match="at least two"):
    verdict_of(judge, prompts_of(prompts, 8), responses_of(rows, 8), None)


@pytest.mark.parametrize("name", ["gemma", "bradley_terry", "gpm"])
def test_padding_changes_nothing(name):
  prompts, rows = examples()
  judge = make_judge(name)
  plain = verdict_of(judge, prompts_of(prompts, 8), responses_of(rows, 8), None)
  other = verdict_of(judge, prompts_of(prompts, 11, 77), responses_of(rows, 10, 99), None)
  np.testing.assert_allclose(other.p_win, plain.p_win, atol=1e-6)
  for metric, mean in plain.metrics.items():
    assert other.metrics[metric].value() == mean.value()


def test_verdicts_under_a_budget_are_antisymmetric_and_counted():
  rows = long_examples([(8, 20, 20), (8, 14, 30), (3, 4, 5)])
  x, y = prompts_of([[2, *p] for p, *_ in rows], 21), responses_of([ab for _, *ab in rows], 30)
  judge = make_judge("gemma", max_tokens=40)
  verdict = verdict_of(judge, x, y, None)
  other = verdict_of(judge, x, jax.tree.map(lambda x: x[:, ::-1], y), None)
  np.testing.assert_array_equal(verdict.p_win, other.p_win[:, ::-1, ::-1])
  assert np.ptp(verdict.p_win[:, 0, 1]) > 1e-3
  np.testing.assert_allclose(verdict.metrics["judge_cut"].value(), 2 / 3, rtol=1e-6)
  # 48 and 52 tokens into room for 36, with three more for each mark of two cut responses, or one.
  np.testing.assert_allclose(
    verdict.metrics["judge_cut_tokens"].value(), (12 + 6 + 16 + 3) / 3, rtol=1e-6
  )
  # What fits gets the verdict of no budget, but for the rounding of another width.
  free = verdict_of(make_judge("gemma"), x, y, None)
  np.testing.assert_allclose(verdict.p_win[2], free.p_win[2], atol=1e-6)
  assert np.abs(verdict.p_win[:2] - free.p_win[:2]).max() > 1e-4


def test_verdicts_do_not_depend_on_how_many_pairs_are_seen_at_once():
  prompts, rows = examples()
  prompts, y = prompts_of(prompts, 8), responses_of(rows, 8)
  whole = verdict_of(make_judge("gemma", max_tokens=28), prompts, y, None)
  parts = verdict_of(
    make_judge("gemma", max_tokens=28, micro_batches=4), prompts, y, None
  )  # 6 pairs by 2
  np.testing.assert_allclose(parts.p_win, whole.p_win, atol=1e-6)
  np.testing.assert_array_equal(parts.valid, whole.valid)
  for name, mean in whole.metrics.items():
    np.testing.assert_array_equal(parts.metrics[name].weight, mean.weight)
    np.testing.assert_allclose(parts.metrics[name].value(), mean.value(), rtol=1e-6)


def test_reading_an_answer_computes_no_logits_of_the_whole_vocabulary():
  """At 9B's shapes: two rows of the embedding at one position, and no array of 256,128 columns."""
  model = gemma.preset("gemma2_9b")
  tokenizer = Tokenizer(BUNDLED, "plain")
  layout = judge_template.layout("stories", tokenizer, max_tokens=1024)
  shape_of = jax.ShapeDtypeStruct
  params = jax.tree.map(lambda x: shape_of(x.shape, jnp.bfloat16), gemma.shapes(model))
  side = Answers(shape_of((8, 512), jnp.int32), shape_of((8, 512), bool))
  x = Prompts(shape_of((8, 512), jnp.int32), shape_of((8, 512), bool), shape_of((8,), jnp.int32))
  traced = jax.make_jaxpr(
    lambda *args: answer_logits(args[0], model, layout, *args[1:], dtype=jnp.bfloat16)
  )(params, x, side, side)
  # The budget is the width of the batch, both orders in it; of the vocabulary the embedding alone.
  found = {*re.findall(r"\w+\[[\d,]+\]", str(traced))}
  assert {"bf16[16,1024,3584]", "bf16[16,3584]", "f32[16,2]"} <= found
  assert {x for x in found if str(model.num_embed) in x} == {"bf16[256128,3584]"}
  small = make_judge("gemma")
  prompts, rows = examples()
  compiled = (
    jax.jit(small.fn)
    .lower(small.params, prompts_of(prompts, 8), responses_of(rows, 8), None)
    .compile()
  )
  found = {*re.findall(r"\w+\[[\d,]+\]", compiled.as_text())}
  assert {x for x in found if "1024" in x} == {"f32[1024,16]"}


def test_a_judge_that_reads_text_agrees_with_one_that_reads_tokens():
  """With the same tokenizer: stop tokens where responses have them, and cuts in the same places."""
  tokenizer = Tokenizer(BUNDLED, "plain")
  texts = (
    ["One day, a cat", "The sun."],
    [
      [" ran.", " saw a big red ball in the tall tree and was happy.", ""],
      [" was hot.", " said no.\n", "Tom and his mom went to the park to play with the big dog."],
    ],
  )
  prompts = prompts_of([tokenizer.prompt(x) for x in texts[0]], 9)
  rows = [[tokenizer.response(x) for x in row] for row in texts[1]]
  rows[0][1].pop()  # not finished
  y = responses_of(rows, 20)
  tokens, words = (
    verdict_of(make_judge(name, max_tokens=28), prompts, y, y) for name in ("gemma", "gemma_text")
  )
  np.testing.assert_allclose(words.p_win, tokens.p_win, atol=1e-5)
  assert np.ptp(tokens.p_win) > 1e-3
  assert 0 < tokens.metrics["judge_cut"].value() < 1
  for name in tokens.metrics:
    np.testing.assert_allclose(words.metrics[name].value(), tokens.metrics[name].value())


def test_the_answer_is_read_at_the_last_position_of_the_prompt(tokenizer):
  """answer_logits equals all logits of the same prompt without padding, soft-capped."""
  prompts, rows = examples(samples=2)
  model = gemma.preset("tiny", **SMALL, final_logit_softcap=3.0)
  params = make_judge("gemma").params
  layout = judge_template.layout("stories", tokenizer)
  a, b = (Answers(*padded([row[k] for row in rows], 8)) for k in (0, 1))
  logits = jax.jit(lambda p, x, a, b: answer_logits(p, model, layout, x, a, b))(
    params, prompts_of(prompts, 8), a, b
  )
  begin, end = (tokenizer.id_of(f"<{edge}_of_turn>") for edge in ("start", "end"))
  prompt, (ra, rb) = prompts[0], rows[0]
  orders = [[*prompt, begin, *x, begin, *y, end] for x, y in ((ra, rb), (rb, ra))]

  @jax.jit
  def whole(params, ids):
    mask = jnp.ones_like(ids, bool)
    x, _ = gemma.forward(params, model, ids, gemma.positions_of(mask), gemma.causal_mask(mask))
    return gemma.logits(params, model, x[:, -1])

  answers = [tokenizer.id_of("A"), tokenizer.id_of("B")]
  expected = np.asarray(whole(params, np.array(orders)))[:, answers]
  np.testing.assert_allclose(np.asarray(logits)[0], expected, atol=1e-5)
  assert np.ptp(expected) > 1e-3


def test_swapping_the_responses_gives_the_complement():
  """Reversed samples present every pair the other way round: the same verdicts, bit for bit."""
  prompts, rows = examples()
  prompts, y = prompts_of(prompts, 8), responses_of(rows, 8)
  verdict = verdict_of(make_judge("gemma"), prompts, y, None)
  other = verdict_of(make_judge("gemma"), prompts, jax.tree.map(lambda x: x[:, ::-1], y), None)
  np.testing.assert_array_equal(verdict.p_win, other.p_win[:, ::-1, ::-1])
  turned = other.p_win_first[:, ::-1, ::-1]
  np.testing.assert_allclose(verdict.p_win_first, turned, atol=1e-6)
  assert verdict.metrics["flip_rate"].value() == other.metrics["flip_rate"].value()


PAIRS = np.triu_indices(3, 1)


def pairs_batch(prompts, rows, p_win):
  """All pairs of three responses to each prompt, as preferences.Pairs.all gives them."""
  batch = {"prompts": prompts_of([p for p in prompts for _ in range(3)], 8), "p_win": p_win}
  for side, places in zip("ab", PAIRS, strict=True):
    ids = padded([row[k] for row in rows for k in places], 8)
    batch[f"{side}_tokens"], batch[f"{side}_mask"] = ids
  return batch


def exchanged(batch):
  """The same pairs with their sides exchanged."""
  sides = {
    f"{x}_{part}": batch[f"{y}_{part}"] for x, y in ("ab", "ba") for part in ("tokens", "mask")
  }
  return {**batch, **sides, "p_win": 1 - batch["p_win"]}


def entropy(p_win, p):
  return -(p_win * np.log(p) + (1 - p_win) * np.log(1 - p)).mean()


SOFT = np.array([0.75, 0.5, 1.0, 0.0, 0.5, 0.2], np.float32)


def test_flip_rate_and_loss_follow_from_the_answers(tokenizer):
  prompts, rows = examples()
  params = make_judge("gemma").params
  model = gemma.preset("tiny", **SMALL)
  layout = judge_template.layout("stories", tokenizer)
  batch = pairs_batch(prompts, rows, SOFT)
  a, b = (Answers(batch[f"{s}_tokens"], batch[f"{s}_mask"]) for s in "ab")
  logits = jax.jit(lambda p, x, a, b: answer_logits(p, model, layout, x, a, b))(
    params, batch["prompts"], a, b
  )
  first = scipy.special.softmax(logits, axis=-1)[..., 0]  # P(the first shown wins), [N order]
  verdict = verdict_of(make_judge("gemma"), prompts_of(prompts, 8), responses_of(rows, 8), None)
  p_win = np.asarray(verdict.p_win[:, *PAIRS]).ravel()
  np.testing.assert_allclose(p_win, (first[:, 0] + 1 - first[:, 1]) / 2, atol=1e-6)
  i, j = PAIRS
  for order, shown_first in enumerate((verdict.p_win_first[:, i, j], verdict.p_win_first[:, j, i])):
    np.testing.assert_allclose(np.ravel(shown_first), first[:, order], atol=1e-6)
  opponents = verdict_of(
    make_judge("gemma"), prompts_of(prompts, 8), responses_of(rows, 8), responses_of(rows, 8)
  )
  both = opponents.p_win_first
  np.testing.assert_allclose(both[:, i, j], verdict.p_win_first[:, i, j], atol=1e-6)
  np.testing.assert_allclose(both[:, j, i], verdict.p_win_first[:, j, i], atol=1e-6)
  flips = (first[:, 0] > 0.5) != (first[:, 1] < 0.5)
  np.testing.assert_allclose(verdict.metrics["flip_rate"].value(), flips.mean(), rtol=1e-6)

  loss = jax.jit(
    functools.partial(pairwise_loss, model_config=model, template=layout, options=OPTIONS)
  )
  means = loss(params, batch)
  both = np.stack([first[:, 0], 1 - first[:, 1]], 1)  # P(a ≻ b) by order
  np.testing.assert_allclose(means["loss"].value(), entropy(SOFT[:, None], both), rtol=1e-5)
  other = loss(params, exchanged(batch))["loss"].value()
  np.testing.assert_allclose(other, means["loss"].value(), rtol=1e-6)
  assert means["accuracy"].weight == 4  # a tie has no right answer
  own = np.where(p_win > 0.5, 0.9, 0.1).astype(np.float32)
  assert loss(params, {**batch, "p_win": own})["accuracy"].value() == 1
  assert loss(params, {**batch, "p_win": 1 - own})["accuracy"].value() == 0


def test_the_reward_loss_and_the_verdict_follow_from_the_same_rewards():
  prompts, rows = examples()
  judge = make_judge("bradley_terry")
  verdict = verdict_of(judge, prompts_of(prompts, 8), responses_of(rows, 8), None)
  gaps = verdict.rewards[:, PAIRS[0]] - verdict.rewards[:, PAIRS[1]]
  p_win = np.asarray(verdict.p_win[:, *PAIRS])
  np.testing.assert_allclose(p_win, scipy.special.expit(gaps), atol=1e-6)
  model = gemma.preset("tiny", **SMALL)
  loss = jax.jit(functools.partial(bradley_terry.reward_loss, model_config=model, options=OPTIONS))
  batch = pairs_batch(prompts, rows, SOFT)
  means = loss(judge.params, batch)
  np.testing.assert_allclose(means["loss"].value(), entropy(SOFT, p_win.ravel()), rtol=1e-5)
  other = loss(judge.params, exchanged(batch))["loss"].value()
  np.testing.assert_allclose(other, means["loss"].value(), rtol=1e-6)
  decided = SOFT != 0.5
  right = ((p_win.ravel() > 0.5) == (SOFT > 0.5))[decided]
  np.testing.assert_allclose(means["accuracy"].value(), right.mean(), rtol=1e-6)


def test_judges_load_what_was_saved_and_say_what_does_not_fit(tmp_path, tokenizer):
  model = gemma.preset("tiny", **SMALL)
  path = str(tmp_path / "reward.safetensors")
  params = {**make_judge("bradley_terry").params}
  weights.save(path, params, model, jnp.float32, {})
  judge = judges.make(settings("bradley_terry", model={"weights": path}), tokenizer)
  jax.tree.map(np.testing.assert_array_equal, judge.params, params)

  with pytest.raises(
    ValueError,
    match=r"jury.*bradley_terry, gemma, gemma_text, gpm, http, human, module:function, none, pop",
  ):
    judges.make(settings("jury"), tokenizer)
  with pytest.raises(ValueError, match=r"poems.*gemma, gemma4"):
    judges.make(settings("gemma", template="poems"), tokenizer)
  with pytest.raises(ValueError, match="1024 pieces, the model only 64"):
    judges.make(settings("gemma", model={"changes": {"num_embed": 64}}), tokenizer)
  del params["head"]
  weights.save(path, params, model, jnp.float32, {})
  with pytest.raises(ValueError, match="no reward head"):
    judges.make(settings("bradley_terry", model={"weights": path}), tokenizer)
  foreign = tmp_path / "other.model"
  foreign.write_bytes(b"another")
  with pytest.raises(ValueError, match="policy's tokenizer"):
    judges.make(settings("gemma", model={"tokenizer": str(foreign)}), tokenizer)

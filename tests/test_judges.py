"""Judges: bookkeeping of pairs, prompts in token space, losses, the cycle, tables."""

import functools
import json
import math
import re

import hypothesis
import jax
import numpy as np
import pytest
import scipy
from gemma import gm
from hypothesis import strategies as st
from jax import numpy as jnp

from nash_jax import config as configs
from nash_jax import judges, weights
from nash_jax.config import resolve
from nash_jax.data import judge_template
from nash_jax.data.tokenizer import BUNDLED, Tokenizer
from nash_jax.judges import bradley_terry, population, table
from nash_jax.judges.gemma import answer_logits, pairwise_loss
from nash_jax.models import gemma
from nash_jax.types import Answers, Prompts, Responses

SMALL = {"num_embed": 1024, "attention_types": (gm.nn.AttentionType.GLOBAL,)}
TINY = {"preset": "tiny", "changes": SMALL, "weights": ""}
OPTIONS = {"dtype": jnp.float32}


@pytest.fixture(scope="module")
def tokenizer():
  return Tokenizer(BUNDLED, "plain")


def settings(name, **changes):
  config = configs.train().judge
  config.name = name
  config.model.update({**TINY, **changes.pop("model", {})})
  config.update(changes)
  return config


def padded(rows, width, left=False, filler=0):
  tokens = np.full((len(rows), width), filler, np.int32)
  mask = np.zeros((len(rows), width), bool)
  for i, row in enumerate(rows):
    place = slice(width - len(row), width) if left else slice(len(row))
    tokens[i, place], mask[i, place] = row, True
  return tokens, mask


def prompts_of(rows, width, filler=0):
  return Prompts(*padded(rows, width, True, filler), np.arange(len(rows)))


def responses_of(rows, width, filler=0, stop=1):
  """From rows[b][k], lists of ids."""
  tokens, mask = padded([r for row in rows for r in row], width, False, filler)
  shape = (len(rows), len(rows[0]), width)
  stopped = np.array([[stop in r for r in row] for row in rows])
  zeros = np.zeros(shape, np.float32)
  return Responses(tokens.reshape(shape), mask.reshape(shape), zeros, zeros, stopped)


def examples(samples=3, seed=0):
  """Two prompts with ragged responses of 0, 1, 2, ... sentences."""
  rng = np.random.default_rng(seed)
  stop = Tokenizer(BUNDLED, "plain").id_of(".")

  def ids(n):
    return rng.integers(6, 1000, n).tolist()

  prompts = [[2, *ids(3)], [2, *ids(6)]]
  return prompts, [
    [[*ids(rng.integers(2, 6)), *[stop] * k, 1] for k in range(samples)] for _ in prompts
  ]


@functools.cache
def built(name, **changes):
  """One judge a name, so that tests of equal shapes share its compiled function."""
  # Drawn by numpy: compiling the initialiser would cost more than the tests.
  rng, model = np.random.default_rng(0), gemma.preset("tiny", **SMALL)
  params = jax.tree.map(
    lambda x: rng.normal(0, 0.3, x.shape).astype(x.dtype),
    {**gemma.shapes(model), "head": {"w": jax.ShapeDtypeStruct((16,), jnp.float32)}},
  )
  params = jax.device_put(params)
  return judges.make(settings(name, **changes), Tokenizer(BUNDLED, "plain"), params)


def asked(judge, *args):
  return jax.device_get(jax.jit(judge.fn)(judge.params, *args))


@pytest.mark.parametrize("name", ["gemma", "bradley_terry", "population"])
def test_y_against_itself_is_y_against_a_copy(name):
  prompts, rows = examples()
  prompts, y = prompts_of(prompts, 8), responses_of(rows, 8)
  judge = built(name)
  own = asked(judge, prompts, y, None)
  copy = asked(judge, prompts, y, y)
  different = ~np.eye(3, dtype=bool)
  np.testing.assert_allclose(own.p_win, copy.p_win, atol=1e-6)
  np.testing.assert_allclose(own.p_win + own.p_win.swapaxes(1, 2), 1, atol=1e-7)
  np.testing.assert_array_equal(own.p_win[:, ~different], 0.5)
  np.testing.assert_array_equal(own.valid, np.broadcast_to(different, (2, 3, 3)))
  assert copy.valid.all()
  assert np.ptp(own.p_win) > 1e-3
  # Each pair is counted once: 2 prompts x 3 pairs, against 2 x 9 with the copy.
  assert own.metrics["tie_mass"].weight == 6
  assert copy.metrics["tie_mass"].weight == 18
  ties = np.abs(np.asarray(copy.p_win) - 0.5) < 0.05
  np.testing.assert_allclose(copy.metrics["tie_mass"].value(), ties.mean(), atol=1e-6)


def test_one_response_has_nothing_to_be_compared_with():
  prompts, rows = examples(samples=1)
  judge = built("population")
  with pytest.raises(ValueError, match="at least two"):
    asked(judge, prompts_of(prompts, 8), responses_of(rows, 8), None)


@pytest.mark.parametrize("name", ["gemma", "bradley_terry"])
def test_padding_changes_nothing(name):
  prompts, rows = examples()
  judge = built(name)
  plain = asked(judge, prompts_of(prompts, 8), responses_of(rows, 8), None)
  other = asked(judge, prompts_of(prompts, 11, 77), responses_of(rows, 10, 99), None)
  np.testing.assert_allclose(other.p_win, plain.p_win, atol=1e-6)
  for metric, mean in plain.metrics.items():
    assert other.metrics[metric].value() == mean.value()


def spelled(name, prompt, a, b):
  """A template's text with its slots filled; a newline template takes no newlines at their ends."""
  ends = "" if name in judge_template.SHOW_STOP else "\n"
  prompt, a, b = (x.strip(ends) if ends else x for x in (prompt, a, b))
  return judge_template.read(name).format(prompt=prompt, a=a, b=b)


@pytest.mark.parametrize("name", sorted(judge_template.TEMPLATES))
@pytest.mark.parametrize("family", ["plain", "gemma"])
def test_prompt_in_token_space_is_the_prompt_in_text(name, family, request):
  path = BUNDLED
  if family == "gemma":
    path = str(request.getfixturevalue("data_dir") / "gemma_tokenizer" / "tokenizer.model")
  tokenizer = Tokenizer(path, family)
  texts = ["One day, a cat", "Why is it dark?"]
  transcript = texts
  if family == "gemma":
    texts[1] = [
      {"role": "user", "content": "Hi {a}"},
      {"role": "assistant", "content": "Hello!"},
      {"role": "user", "content": "Why <end_of_turn> ends?"},
    ]
    transcript = [
      "user\nOne day, a cat\nmodel\n",
      "user\nHi {a}\nmodel\nHello!\nuser\nWhy <end_of_turn> ends?\nmodel\n",
    ]
  a, b = [" smiled.\n", "Night."], [" ran away from\nthe dog.", " It is not."]
  cut = [tokenizer.encode(b[0]), tokenizer.response(b[1])]  # the first has no stop token
  layout = judge_template.layout(name, tokenizer)
  tokens, mask = jax.jit(functools.partial(judge_template.assemble, layout))(
    prompts_of([tokenizer.prompt(t) for t in texts], 40, 9),
    Answers(*padded([tokenizer.response(t) for t in a], 12, filler=9)),
    Answers(*padded(cut, 14, filler=9)),
  )
  tokens, mask = np.asarray(tokens), np.asarray(mask)
  assert (np.diff(mask.astype(int), axis=1) >= 0).all()  # all padding lies to the left
  assert (tokens[~mask] == tokenizer.pad_id).all()
  shown = name in judge_template.SHOW_STOP
  for row, keep, *texts in zip(tokens, mask, transcript, a, b, strict=True):
    ids = row[keep].tolist()
    assert ids[0] == tokenizer.bos_id
    assert ids.count(tokenizer.bos_id) == 1
    text = spelled(name, *texts)
    ends = ids[1:].count(tokenizer.stop_ids[-1])
    if family == "plain":
      assert ends == (0 if not shown else 1 if texts[2] == b[0] else 2)
    if family == "plain" or not shown:  # <bos> and <eos> decode to nothing, turn markers to text
      assert tokenizer._model.decode(ids) == text
    else:  # its stop token is the marker that ends the template, too
      assert ends == (2 if texts[2] == b[0] else 3)
      assert tokenizer.decode(ids).replace("<start_of_turn>", "|") == "|".join(texts)


def kept_ids(tokens, mask):
  return [row[keep].tolist() for row, keep in zip(*map(np.asarray, (tokens, mask)), strict=True)]


def encoded(tokenizer, name, prompt, a, b):
  """The ids of a whole prompt, filled in as text and encoded at once."""
  slots, ids = {"{prompt}": prompt, "{a}": a, "{b}": b}, [tokenizer.bos_id]
  for part in re.split("(<(?:start|end)_of_turn>)", judge_template.read(name)):
    said = re.sub(r"\{(prompt|a|b)\}", lambda found: slots[found[0]].strip("\n"), part)
    ids += [tokenizer.id_of(part)] if part.endswith("_of_turn>") else tokenizer.encode(said)
  return ids


@functools.cache
def splice(name, path, family):
  """The ids that are put together on the device, of texts (prompt, a, b) of up to 512 tokens."""
  tokenizer = Tokenizer(path, family)
  assemble = jax.jit(
    functools.partial(judge_template.assemble, judge_template.layout(name, tokenizer))
  )

  def ids(texts):
    prompts, a, b = zip(*texts, strict=True)
    tokens, mask = assemble(
      prompts_of([tokenizer.prompt(x) for x in prompts], 512),
      *(Answers(*padded([tokenizer.response(x) for x in side], 512)) for side in (a, b)),
    )
    return kept_ids(tokens, mask)

  return tokenizer, ids


def test_ids_of_real_conversations_are_those_of_the_whole_text(data_dir):
  """Nothing merges across the ends of a slot, so that a judge sees what it was trained on."""
  tokenizer, ids = splice("gemma", str(data_dir / "gemma_tokenizer" / "tokenizer.model"), "gemma")
  texts = []
  for row in json.loads((data_dir / "pandalm" / "testset-v1.json").read_text("utf-8")):
    sides = [str(row[f"response{i}"]) for i in (1, 2)]
    if all(x.strip("\n") for x in sides):  # an empty one leaves two newlines apart: docs/judges.md
      texts.append((f"{row['instruction']}\n\n{row['input']}", *sides))
  texts = [x for x in texts if max(map(len, x)) < 1000][:256]
  assert len(texts) == 256
  for got, (prompt, a, b) in zip(ids(texts), texts, strict=True):
    assert got == encoded(tokenizer, "gemma", f"user\n{prompt.strip()}\nmodel", a, b)


CHARACTERS = st.characters(exclude_categories=("Cs",))
SAID = st.text(st.sampled_from("aB ,.…\n\t<>{}|*-#1'\"é世🙂\u200b") | CHARACTERS, max_size=40)


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(st.lists(st.tuples(SAID, SAID, SAID), min_size=4, max_size=4))
def test_ids_of_any_text_are_those_of_the_whole_text(data_dir, texts):
  tokenizer, ids = splice("gemma", str(data_dir / "gemma_tokenizer" / "tokenizer.model"), "gemma")
  texts = [[x if x.strip() else "." for x in row] for row in texts]
  for got, (prompt, a, b) in zip(ids(texts), texts, strict=True):
    transcript = f"user\n{prompt.removeprefix('<bos>').strip()}\nmodel"
    assert got == encoded(tokenizer, "gemma", transcript, a, b)


def test_a_bundled_judge_is_shown_what_it_was_fitted_to(tokenizer):
  """Ids joined by hand, stop tokens and newlines and all; a budget that is not reached is none."""
  prompts, rows = examples()
  rows[0][0] = [6, *rows[0][0][:-1]]  # begins with a newline, never stops
  begin, end = (tokenizer.id_of(f"<{what}_of_turn>") for what in ("start", "end"))
  expected = [[*x, begin, *a, begin, *b, end] for x, (a, b, _) in zip(prompts, rows, strict=True)]
  a, b = (Answers(*padded([row[k] for row in rows], 8)) for k in (0, 1))
  for budget in (0, 28, 60):
    layout = judge_template.layout("stories", tokenizer, max_tokens=budget)
    assemble = jax.jit(functools.partial(judge_template.assemble, layout))
    tokens, mask = assemble(prompts_of(prompts, 8), a, b)
    assert kept_ids(tokens, mask) == expected
    assert tokens.shape[1] == 28


def long_examples(lengths, seed=1):
  """Rows of ids of prompts, a and b with given lengths: no marker or stop token among them."""
  rng = np.random.default_rng(seed)
  return [[rng.integers(6, 1000, n).tolist() for n in row] for row in lengths]


def cut_by_hand(room, mark, *parts):
  """The largest level at which all parts fit, found by trying; a prompt keeps its end."""
  level = max(w for w in range(200) if sum(min(len(x), w) for x in parts) <= room)
  prompt, *responses = parts
  if len(prompt) > level:
    prompt = [*mark, *prompt[len(prompt) - level + len(mark) :]]
  cut = [x if len(x) <= level else [*x[: level - len(mark)], *mark] for x in responses]
  return [prompt, *cut]


LENGTHS = [
  (3, 5, 6),
  (20, 1, 3),
  (20, 30, 30),
  (2, 30, 29),
  (5, 12, 30),
  (4, 30, 0),
  (0, 11, 13),
  (11, 12, 13),
  (20, 12, 13),
  (1, 16, 30),
  (12, 13, 11),
  (13, 30, 11),
  (20, 5, 12),
]


def test_a_budget_cuts_the_longest_parts_to_one_level(tokenizer):
  budget, marker = 40, tokenizer.encode("…")
  begin, end = (tokenizer.id_of(f"<{what}_of_turn>") for what in ("start", "end"))
  layout = judge_template.layout("stories", tokenizer, max_tokens=budget)
  assert layout.room == budget - 4
  rows = long_examples(LENGTHS)
  x, a, b = zip(*rows, strict=True)
  x = prompts_of([[2, *ids] for ids in x], 21)

  @jax.jit
  def put(x, a, b):
    tokens, mask = judge_template.assemble(layout, x, a, b)
    return tokens, mask, judge_template.shown(layout, x, a, b)[1]

  a, b = (Answers(*padded(side, 30)) for side in (a, b))
  tokens, mask, cut = put(x, a, b)
  assert tokens.shape[1] == budget  # not the 85 that could come
  levels = [cut_by_hand(36, marker, *row) for row in rows]
  expected = [[2, *p, begin, *a, begin, *b, end] for p, a, b in levels]
  assert kept_ids(tokens, mask) == expected
  lost = [sum(len(ids) for ids in row) for row in rows]
  kept = [
    sum(len(ids) - len(marker) * (ids not in row) for ids in level)
    for level, row in zip(levels, rows, strict=True)
  ]
  np.testing.assert_array_equal(cut, np.subtract(lost, kept))
  assert sum(np.asarray(cut) > 0) == sum(sum(row) > 36 for row in LENGTHS) > 5

  # Exchanged responses are cut alike.
  exchanged = [[2, *p, begin, *b, begin, *a, end] for p, a, b in levels]
  assert kept_ids(*put(x, b, a)[:2]) == exchanged
  # What lies behind a cut is not seen: not the tokens, nor how many they are.
  other = np.where(np.arange(30) >= 20, 7, b.tokens)
  row = LENGTHS.index((20, 30, 30))
  assert kept_ids(*put(x, a, b._replace(tokens=other))[:2])[row] == expected[row]
  shorter = b._replace(mask=b.mask & (np.arange(30) < 25))
  assert kept_ids(*put(x, a, shorter)[:2])[row] == expected[row]


def test_verdicts_under_a_budget_are_antisymmetric_and_counted():
  rows = long_examples([(8, 20, 20), (8, 14, 30), (3, 4, 5)])
  x, y = prompts_of([[2, *p] for p, *_ in rows], 21), responses_of([ab for _, *ab in rows], 30)
  judge = built("gemma", max_tokens=40)
  verdict = asked(judge, x, y, None)
  other = asked(judge, x, jax.tree.map(lambda x: x[:, ::-1], y), None)
  np.testing.assert_array_equal(verdict.p_win, other.p_win[:, ::-1, ::-1])
  assert np.ptp(verdict.p_win[:, 0, 1]) > 1e-3
  np.testing.assert_allclose(verdict.metrics["judge_cut"].value(), 2 / 3, rtol=1e-6)
  # 48 and 52 tokens into room for 36, with three more for each mark of two cut responses, or one.
  np.testing.assert_allclose(
    verdict.metrics["judge_cut_tokens"].value(), (12 + 6 + 16 + 3) / 3, rtol=1e-6
  )
  # What fits is judged as without a budget, but for the rounding of another width.
  free = asked(built("gemma"), x, y, None)
  np.testing.assert_allclose(verdict.p_win[2], free.p_win[2], atol=1e-6)
  assert np.abs(verdict.p_win[:2] - free.p_win[:2]).max() > 1e-4


def test_verdicts_do_not_depend_on_how_many_pairs_are_seen_at_once():
  prompts, rows = examples()
  prompts, y = prompts_of(prompts, 8), responses_of(rows, 8)
  whole = asked(built("gemma", max_tokens=28), prompts, y, None)
  parts = asked(built("gemma", max_tokens=28, micro_batches=4), prompts, y, None)  # 6 pairs by 2
  np.testing.assert_allclose(parts.p_win, whole.p_win, atol=1e-6)
  np.testing.assert_array_equal(parts.valid, whole.valid)
  for name, mean in whole.metrics.items():
    np.testing.assert_array_equal(parts.metrics[name].weight, mean.weight)
    np.testing.assert_allclose(parts.metrics[name].value(), mean.value(), rtol=1e-6)


@pytest.mark.parametrize(
  ("wrong", "message"),
  [
    ("{prompt}\n{a}\n", "each slot once.*'{b}': 0"),
    ("{prompt}\n{a}\n{b}\n{a}\n", "each slot once.*'{a}': 2"),
    ("<bos>{prompt}\n{a}\n{b}\nBest:", "without <bos>"),
    ("{prompt}\n{a}\n{b}", r"around \{prompt\}, \{a\} alone.*where the text ends"),
    ("{prompt}\nA: {a}\n{b}\n", r"around \{prompt\}, \{b\} alone"),
  ],
)
def test_a_template_file_is_checked_before_anything_loads(tmp_path, wrong, message):
  config = configs.train()
  config.judge.template = str(tmp_path / "mine.txt")
  config.judge.model.weights = ""
  (tmp_path / "mine.txt").write_text(wrong)
  with pytest.raises(ValueError, match=message):
    resolve(config)
  config.judge.template += "2"
  with pytest.raises(ValueError, match=r"mine.txt2.*expected one of gemma, stories"):
    resolve(config)


def test_a_template_file_with_answers_of_its_own(tmp_path, tokenizer):
  file = tmp_path / "mine.txt"
  file.write_text("{b}<start_of_turn>or\n{a}\nfor the prompt\n{prompt}\nBest:")
  layout = judge_template.layout(str(file), tokenizer, ("C", "D"), 100)
  assert layout.answers == [tokenizer.id_of("C"), tokenizer.id_of("D")]
  a, b, x = (tokenizer.encode(said) for said in ("first\n", "\nsecond", "story"))
  tokens, mask = jax.jit(functools.partial(judge_template.assemble, layout))(
    prompts_of([[2, *x, 6]], 20), Answers(*padded([a], 9)), Answers(*padded([b], 9))
  )
  text = "second<start_of_turn>or\nfirst\nfor the prompt\nstory\nBest:"
  assert tokenizer._model.decode(kept_ids(tokens, mask)[0]) == text
  with pytest.raises(ValueError, match="no piece 'first'"):
    judge_template.layout(str(file), tokenizer, ("first", "second"))
  least = 100 - layout.room + 12
  with pytest.raises(ValueError, match=f"max_tokens: expected 0 or at least {least} for the"):
    judge_template.layout(str(file), tokenizer, max_tokens=least - 1)
  judge_template.layout(str(file), tokenizer, max_tokens=least)


def test_answers_cost_no_logits_of_the_vocabulary():
  """At 9B's shapes: two rows of the embedding at one position, and no array of 256,128 columns."""
  model = gemma.preset("gemma2_9b")
  tokenizer = Tokenizer(BUNDLED, "plain")
  layout = judge_template.layout("stories", tokenizer, max_tokens=1024)
  of = jax.ShapeDtypeStruct
  params = jax.tree.map(lambda x: of(x.shape, jnp.bfloat16), gemma.shapes(model))
  side = Answers(of((8, 512), jnp.int32), of((8, 512), bool))
  x = Prompts(of((8, 512), jnp.int32), of((8, 512), bool), of((8,), jnp.int32))
  traced = jax.make_jaxpr(
    lambda *args: answer_logits(args[0], model, layout, *args[1:], dtype=jnp.bfloat16)
  )(params, x, side, side)
  # The budget is the width of the batch, both orders in it; of the vocabulary the embedding alone.
  found = {*re.findall(r"\w+\[[\d,]+\]", str(traced))}
  assert {"bf16[16,1024,3584]", "bf16[16,3584]", "f32[16,2]"} <= found
  assert {x for x in found if str(model.num_embed) in x} == {"bf16[256128,3584]"}
  small = built("gemma")
  prompts, rows = examples()
  compiled = (
    jax.jit(small.fn)
    .lower(small.params, prompts_of(prompts, 8), responses_of(rows, 8), None)
    .compile()
  )
  found = {*re.findall(r"\w+\[[\d,]+\]", compiled.as_text())}
  assert {x for x in found if "1024" in x} == {"f32[1024,16]"}


def test_a_judge_through_text_agrees_with_the_token_path():
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
    asked(built(name, max_tokens=28), prompts, y, y) for name in ("gemma", "gemma_text")
  )
  np.testing.assert_allclose(words.p_win, tokens.p_win, atol=1e-5)
  assert np.ptp(tokens.p_win) > 1e-3
  assert 0 < tokens.metrics["judge_cut"].value() < 1
  for name in tokens.metrics:
    np.testing.assert_allclose(words.metrics[name].value(), tokens.metrics[name].value())


def test_answer_read_is_the_last_position_of_the_whole_prompt(tokenizer):
  """answer_logits equals all logits of the same prompt without padding, soft-capped."""
  prompts, rows = examples(samples=2)
  model = gemma.preset("tiny", **SMALL, final_logit_softcap=3.0)
  params = built("gemma").params
  layout = judge_template.layout("stories", tokenizer)
  a, b = (Answers(*padded([row[k] for row in rows], 8)) for k in (0, 1))
  logits = jax.jit(lambda p, x, a, b: answer_logits(p, model, layout, x, a, b))(
    params, prompts_of(prompts, 8), a, b
  )
  begin, end = (tokenizer.id_of(f"<{what}_of_turn>") for what in ("start", "end"))
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
  verdict = asked(built("gemma"), prompts, y, None)
  other = asked(built("gemma"), prompts, jax.tree.map(lambda x: x[:, ::-1], y), None)
  np.testing.assert_array_equal(verdict.p_win, other.p_win[:, ::-1, ::-1])
  assert verdict.metrics["flip_rate"].value() == other.metrics["flip_rate"].value()


PAIRS = np.triu_indices(3, 1)


def pairs_batch(prompts, rows, p_win):
  """All pairs of three responses to each prompt, as preferences.Pairs.all gives them."""
  batch = {"prompts": prompts_of([p for p in prompts for _ in range(3)], 8), "p_win": p_win}
  for side, places in zip("ab", PAIRS, strict=True):
    ids = padded([row[k] for row in rows for k in places], 8)
    batch[f"{side}_tokens"], batch[f"{side}_mask"] = ids
  return batch


def entropy(p_win, p):
  return -(p_win * np.log(p) + (1 - p_win) * np.log(1 - p)).mean()


SOFT = np.array([0.75, 0.5, 1.0, 0.0, 0.5, 0.2], np.float32)


def test_flip_rate_and_loss_follow_from_the_answers(tokenizer):
  prompts, rows = examples()
  params = built("gemma").params
  model = gemma.preset("tiny", **SMALL)
  layout = judge_template.layout("stories", tokenizer)
  batch = pairs_batch(prompts, rows, SOFT)
  a, b = (Answers(batch[f"{s}_tokens"], batch[f"{s}_mask"]) for s in "ab")
  logits = jax.jit(lambda p, x, a, b: answer_logits(p, model, layout, x, a, b))(
    params, batch["prompts"], a, b
  )
  first = scipy.special.softmax(logits, axis=-1)[..., 0]  # P(the first shown wins), [N order]
  verdict = asked(built("gemma"), prompts_of(prompts, 8), responses_of(rows, 8), None)
  p_win = np.asarray(verdict.p_win[:, *PAIRS]).ravel()
  np.testing.assert_allclose(p_win, (first[:, 0] + 1 - first[:, 1]) / 2, atol=1e-6)
  flips = (first[:, 0] > 0.5) != (first[:, 1] < 0.5)
  np.testing.assert_allclose(verdict.metrics["flip_rate"].value(), flips.mean(), rtol=1e-6)

  loss = jax.jit(
    functools.partial(pairwise_loss, model_config=model, template=layout, options=OPTIONS)
  )
  means = loss(params, batch)
  both = np.stack([first[:, 0], 1 - first[:, 1]], 1)  # P(a ≻ b) by order
  np.testing.assert_allclose(means["loss"].value(), entropy(SOFT[:, None], both), rtol=1e-5)
  assert means["accuracy"].weight == 4  # a tie has no right answer
  own = np.where(p_win > 0.5, 0.9, 0.1).astype(np.float32)
  assert loss(params, {**batch, "p_win": own})["accuracy"].value() == 1
  assert loss(params, {**batch, "p_win": 1 - own})["accuracy"].value() == 0


def test_reward_loss_and_verdict_are_one_model():
  prompts, rows = examples()
  judge = built("bradley_terry")
  verdict = asked(judge, prompts_of(prompts, 8), responses_of(rows, 8), None)
  gaps = verdict.rewards[:, PAIRS[0]] - verdict.rewards[:, PAIRS[1]]
  p_win = np.asarray(verdict.p_win[:, *PAIRS])
  np.testing.assert_allclose(p_win, scipy.special.expit(gaps), atol=1e-6)
  model = gemma.preset("tiny", **SMALL)
  loss = jax.jit(functools.partial(bradley_terry.reward_loss, model_config=model, options=OPTIONS))
  means = loss(judge.params, pairs_batch(prompts, rows, SOFT))
  np.testing.assert_allclose(means["loss"].value(), entropy(SOFT, p_win.ravel()), rtol=1e-5)
  decided = SOFT != 0.5
  right = ((p_win.ravel() > 0.5) == (SOFT > 0.5))[decided]
  np.testing.assert_allclose(means["accuracy"].value(), right.mean(), rtol=1e-6)


STORIES = (
  # talks most, of middling length and pace, without cheer
  '"Stop!" said Tom to the big dog. "No!" said Ann to the dog. "Go!" said Tom to the dog.',
  # happiest, longest, in one breath
  '"Look" said Ann, and they played and laughed and smiled and hugged and went back to the house'
  " with the big tree and the little dog and the cat and Ann was happy.",
  # says nothing, a little cheer, shortest and busiest
  "No! Go! No! Go! No! Go! They smiled.",
)


def test_population_cycles_and_no_reward_explains_it(tokenizer):
  judge = built("population")
  rows = [[tokenizer.response(text) for text in STORIES]]
  verdict = asked(judge, prompts_of([tokenizer.prompt("One day")], 8), responses_of(rows, 64), None)
  p = np.asarray(verdict.p_win[0])
  cycle = (0, 1), (1, 2), (2, 0)
  for pair in cycle:
    np.testing.assert_allclose(p[pair], 2 / 3, rtol=1e-6)
  # Rewards make the log-odds around a circle sum to 0; here they sum to 3 log 2.
  np.testing.assert_allclose(
    sum(math.log(p[i, j] / p[j, i]) for i, j in cycle), 3 * math.log(2), rtol=1e-5
  )
  rewards = np.random.default_rng(0).normal(0, 3, (1000, 3)).astype(np.float32)
  fits, _, _ = jax.jit(bradley_terry.compare)(None, None, rewards, np.roll(rewards, -1, axis=1))
  assert np.abs(np.asarray(fits) - 2 / 3).max(axis=1).min() >= 1 / 6 - 1e-6


def test_annotators_count_saturate_and_want_an_end(tokenizer):
  judge = population.judge(
    tokenizer,
    {
      "dialogue": population.STORYTELLERS["dialogue"],
      "cheer": population.STORYTELLERS["cheer"],
      "closure": population.Annotator(finish=1e6, per_token=-1.0),
    },
  )
  texts = ['" " " " " " " "', " happy happy happy happy happy happy", " a happy end", " unhappy"]
  rows = [[tokenizer.response(t) for t in texts] + [tokenizer.encode(" a cut")]]
  y = responses_of(rows, 24)
  answers = Answers(y.tokens[0], y.mask[0], y.stopped[0])
  dialogue, cheer, closure = np.asarray(
    jax.jit(population.utilities)(judge.params, None, answers)
  ).T
  np.testing.assert_array_equal(dialogue, [6, 0, 0, 0, 0])
  np.testing.assert_array_equal(cheer, [0, 4, 1, 0, 0])
  lengths = np.array([len(r) for r in rows[0]])
  order = np.argsort(-closure, stable=True)
  assert order[-1] == 4  # however short, a cut story comes last
  assert (np.diff(lengths[order[:-1]]) >= 0).all()


def game(contexts=3, actions=4, seed=0):
  upper = np.random.default_rng(seed).uniform(size=(contexts, actions, actions))
  upper = np.triu(upper, 1)
  return upper + np.tril(1 - upper.swapaxes(1, 2), -1) + np.eye(actions)[None] / 2


def test_table_is_read_by_context_and_digits(tmp_path, tokenizer):
  p = game()
  np.save(tmp_path / "p.npy", p)
  config = settings("table", table=str(tmp_path / "p.npy"), first_token=10, table_tokens=2)
  judge = judges.make(config, tokenizer)
  actions = [[10, 10], [10, 11], [11, 10], [11, 11]]
  prompts = prompts_of([[2]] * 4, 1)  # contexts 0, 1, 2, 0
  verdict = asked(judge, prompts, responses_of([actions] * 4, 2), None)
  np.testing.assert_allclose(verdict.p_win, p[[0, 1, 2, 0]], atol=1e-6)
  strange = [[10, 11, 1], [12, 10, 1], [9, 10, 1], [10]]
  verdict = asked(judge, prompts, responses_of([actions] * 4, 3), responses_of([strange] * 4, 3))
  np.testing.assert_array_equal(verdict.valid, np.tile([True, False, False, False], (4, 4, 1)))
  np.testing.assert_array_equal(verdict.p_win[..., 1:], 0.5)
  config.table_tokens = 0  # then a token is an action
  verdict = asked(
    judges.make(config, tokenizer), prompts, responses_of([[[10], [13]]] * 4, 1), None
  )
  np.testing.assert_allclose(verdict.p_win[:, 0, 1], p[[0, 1, 2, 0], 0, 3], atol=1e-6)


def test_bad_tables_name_the_worst_entry(tmp_path, tokenizer):
  def broken(change, value):
    p = game()
    p[change] = value
    return p

  for wrong, message in (
    (broken((1, 2, 3), 1.5), r"must hold probabilities .* worst entry: p_win\[1, 2, 3\] = 1.5"),
    (broken((2, 1, 1), 0.7), r"worst entry: p_win\[2, 1, 1\] = 0.7"),
    (broken((0, 3, 1), np.nan), r"worst entry: .*p_win\[0, 3, 1\] = nan"),
    (game()[0], r"\[X A A\], got .*p.npy': got shape \(4, 4\)"),
  ):
    np.save(tmp_path / "p.npy", wrong)
    with pytest.raises(ValueError, match=message):
      table.load(str(tmp_path / "p.npy"))
  with pytest.raises(ValueError, match=r"\.npy file"):
    table.load(str(tmp_path / "none.npy"))
  with pytest.raises(ValueError, match="4 actions are a power, got 3"):
    table.judge(game(), 10, 3)
  judge = table.judge(game(), 10, 2)
  with pytest.raises(ValueError, match="need 2 tokens"):
    asked(judge, prompts_of([[2]], 1), responses_of([[[10], [11]]], 1), None)
  np.save(tmp_path / "p.npy", game())
  with pytest.raises(ValueError, match="1024 pieces, got 1022 to 1025"):
    judges.make(settings("table", table=str(tmp_path / "p.npy"), first_token=1022), tokenizer)


def test_judges_load_what_was_saved_and_say_what_does_not_fit(tmp_path, tokenizer):
  model = gemma.preset("tiny", **SMALL)
  path = str(tmp_path / "reward.safetensors")
  params = {**built("bradley_terry").params}
  weights.save(path, params, model, jnp.float32, {})
  judge = judges.make(settings("bradley_terry", model={"weights": path}), tokenizer)
  jax.tree.map(np.testing.assert_array_equal, judge.params, params)

  with pytest.raises(ValueError, match=r"jury.*bradley_terry, gemma, gemma_text, http, population"):
    judges.make(settings("jury"), tokenizer)
  with pytest.raises(ValueError, match=r"poems.*gemma, stories"):
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

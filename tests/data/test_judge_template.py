"""A judge's prompt: put together of token ids, it is the prompt of the whole text."""

import functools
import json
import re

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st
from judge_examples import examples, long_examples, padded, prompts_of

import nash_jax
from nash_jax.config import resolve
from nash_jax.data import judge_template
from nash_jax.data.tokenizer import BUNDLED, Tokenizer
from nash_jax.types import Answers


@pytest.fixture(scope="module")
def tokenizer():
  return Tokenizer(BUNDLED, "plain")


def spelled(name, prompt, a, b):
  """A template's text with its slots filled; a newline template takes no newlines at their ends."""
  ends = "" if name in judge_template.SHOW_STOP else "\n"
  prompt, a, b = (x.strip(ends) if ends else x for x in (prompt, a, b))
  return judge_template.read(name).format(prompt=prompt, a=a, b=b)


@pytest.mark.parametrize("name", ["gemma", "stories", "summaries"])
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
    text = re.sub(r"\{(prompt|a|b)\}", lambda found: slots[found[0]].strip("\n"), part)
    ids += [tokenizer.id_of(part)] if part.endswith("_of_turn>") else tokenizer.encode(text)
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
TYPED_TEXT = st.text(st.sampled_from("aB ,.…\n\t<>{}|*-#1'\"é世🙂\u200b") | CHARACTERS, max_size=40)


@hypothesis.settings(max_examples=40)
@hypothesis.given(st.lists(st.tuples(TYPED_TEXT, TYPED_TEXT, TYPED_TEXT), min_size=4, max_size=4))
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
  begin, end = (tokenizer.id_of(f"<{edge}_of_turn>") for edge in ("start", "end"))
  expected = [[*x, begin, *a, begin, *b, end] for x, (a, b, _) in zip(prompts, rows, strict=True)]
  a, b = (Answers(*padded([row[k] for row in rows], 8)) for k in (0, 1))
  for budget in (0, 28, 60):
    layout = judge_template.layout("stories", tokenizer, max_tokens=budget)
    assemble = jax.jit(functools.partial(judge_template.assemble, layout))
    tokens, mask = assemble(prompts_of(prompts, 8), a, b)
    assert kept_ids(tokens, mask) == expected
    assert tokens.shape[1] == 28


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
  begin, end = (tokenizer.id_of(f"<{edge}_of_turn>") for edge in ("start", "end"))
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


@pytest.mark.parametrize(
  ("wrong", "message"),
  [
    ("{prompt}\n{a}\n", "each slot once.*'{b}': 0"),
    ("{prompt}\n{a}\n{b}\n{a}\n", "each slot once.*'{a}': 2"),
    ("<bos>{prompt}\n{a}\n{b}\nBest:", "without <bos>"),
    ("{prompt}\n{a}\n{b}", r"only around \{prompt\}, \{a\}'\..*at the end of the text"),
    ("{prompt}\nA: {a}\n{b}\n", r"only around \{prompt\}, \{b\}'\."),
  ],
)
def test_a_template_file_is_checked_before_anything_loads(tmp_path, wrong, message):
  config = nash_jax.config.train()
  config.judge.template = str(tmp_path / "mine.txt")
  config.judge.model.weights = ""
  (tmp_path / "mine.txt").write_text(wrong)
  with pytest.raises(ValueError, match=message):
    resolve(config)
  config.judge.template += "2"
  with pytest.raises(
    ValueError, match=r"mine.txt2.*expected one of gemma, gemma4, gemma4_large, stories"
  ):
    resolve(config)


def test_a_template_file_from_another_system_is_the_same_template(tmp_path):
  text = "{prompt}\n{a}\n{b}\nBest:"
  file = tmp_path / "mine.txt"
  file.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
  assert judge_template.read(str(file)) == text
  for data, message in [
    (text.encode("utf-16"), "mine.txt: UTF-16"),
    (text.encode() + b"\n\xff", r"mine.txt:5: byte 0xff is not UTF-8"),
    (b"version https://git-lfs.github.com/spec/v1", "mine.txt: a Git LFS pointer"),
  ]:
    file.write_bytes(data)
    with pytest.raises(ValueError, match=message):
      judge_template.read(str(file))
  with pytest.raises(ValueError, match="expected one of gemma, gemma4, gemma4_large, stories"):
    judge_template.read(text * 100)  # the text itself, which is too long for a file's name


def test_a_template_file_with_answers_of_its_own(tmp_path, tokenizer):
  file = tmp_path / "mine.txt"
  file.write_text("{b}<start_of_turn>or\n{a}\nfor the prompt\n{prompt}\nBest:")
  layout = judge_template.layout(str(file), tokenizer, ("C", "D"), 100)
  assert layout.answers == [tokenizer.id_of("C"), tokenizer.id_of("D")]
  a, b, x = (tokenizer.encode(text) for text in ("first\n", "\nsecond", "story"))
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

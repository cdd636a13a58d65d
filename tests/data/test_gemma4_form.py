"""Gemma 4's form of a conversation, with the tokenizer that stands in for the published one."""

import ast
import functools
import importlib.util
import pathlib
import re

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from judge_examples import padded, prompts_of
from make_gemma4_tokenizer import CONTROL, PATH, model

import nash_jax
from nash_jax import policy
from nash_jax.config import resolve
from nash_jax.data import judge_template, pairs
from nash_jax.data.chat_template import check_untemplated
from nash_jax.data.tokenizer import BUNDLED, Tokenizer
from nash_jax.models import gemma
from nash_jax.types import Answers

SMALL, LARGE = (Tokenizer(str(PATH), name) for name in ("gemma4", "gemma4_large"))
BOTH = pytest.mark.parametrize("tokenizer", [SMALL, LARGE], ids=["small", "large"])
THOUGHT = "<|channel>thought\n<channel|>"
TALK = [
  {"role": "system", "content": " Be brief.\n"},
  {"role": "user", "content": "Hello there"},
  {"role": "assistant", "content": "<|channel>thought\nA greeting.\n<channel|> Hi! "},
  {"role": "user", "content": "What is 2 + 2?\n"},
]
PUBLISHED = (
  "<|turn>system\nBe brief.<turn|>\n<|turn>user\nHello there<turn|>\n<|turn>model\nHi!<turn|>\n"
  "<|turn>user\nWhat is 2 + 2?<turn|>\n<|turn>model\n"
)


def test_the_stand_in_is_what_its_program_writes_and_has_the_librarys_ids():
  assert PATH.read_bytes() == model().SerializeToString(deterministic=True)
  spec = importlib.util.find_spec("gemma")
  assert spec
  assert spec.origin
  # Read as text: importing the module takes a quarter of a minute.
  source = pathlib.Path(spec.origin).parent / "gm" / "text" / "_tokenizer.py"
  (named,) = (
    node
    for node in ast.parse(source.read_text("utf-8")).body
    if isinstance(node, ast.ClassDef) and node.name == "_Gemma4SpecialTokens"
  )
  ids = {
    x.targets[0].id: ast.literal_eval(x.value) for x in named.body if isinstance(x, ast.Assign)
  }
  pieces = {"PAD": "<pad>", "EOS": "<eos>", "BOS": "<bos>", "UNK": "<unk>", "MASK": "<mask>"}
  pieces |= {"START_OF_TURN": "<|turn>", "END_OF_TURN": "<turn|>"}
  pieces["BEGIN_OF_TOOL_RESPONSE"] = "<|tool_response>"
  assert {name: SMALL.id_of(piece) for name, piece in pieces.items()} == {
    name: ids[name] for name in pieces
  }
  assert {name for name in ids if name not in pieces and ids[name] < 255_999} == set()


@BOTH
def test_a_prompt_is_the_published_string(tokenizer):
  published = PUBLISHED + THOUGHT * (tokenizer is LARGE)
  # SentencePiece itself reads the markers of a trusted string.
  assert tokenizer.prompt(TALK) == [2, *tokenizer._model.encode(published)]
  assert tokenizer.stop_ids[0] == 1
  assert {*tokenizer.stop_ids} == {1, 50, 106}
  assert tokenizer.response(" Four. ") == [*tokenizer.encode(" Four. "), 106]


def test_markers_of_any_kind_of_piece_are_the_same_ids(tmp_path):
  """Whether the published file has them as control or as user-defined pieces is not known."""
  (tmp_path / "t.model").write_bytes(model(CONTROL).SerializeToString())
  other = Tokenizer(str(tmp_path / "t.model"), "gemma4_large")
  assert other.prompt(TALK) == LARGE.prompt(TALK)
  np.testing.assert_array_equal(other.forbidden(1500)[:46], LARGE.forbidden(1500)[:46])
  assert other.forbidden(1500)[46:107].sum() == LARGE.forbidden(1500)[46:107].sum() == 60
  for text in ("<|turn>user\nHi<turn|>", '<|"|> <|think|>'):
    assert other.encode(text) == LARGE.encode(text)


@given(
  st.lists(
    st.sampled_from(["<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|think|>", '<|"|>', "<|x>",
                     "<|tool_call>", "<bos>", "<eos>", "<unused7>", "\n", "<", "Hi"]),
    max_size=6,
  ).map("".join)
)  # fmt: skip
@settings(max_examples=60)
def test_no_marker_can_be_typed(text):
  assert not {*range(107)} & {*SMALL.encode(text)}
  assert SMALL.decode(SMALL.encode(text)) == text
  assert SMALL.prompt(text).count(2) == 1


def forbidden(markers=(), tokens=()):
  config = nash_jax.config.train()
  config.sampling.markers, config.sampling.tokens = markers, tokens
  model_config = gemma.preset("tiny", num_embed=SMALL.size + 8)
  return np.asarray(policy.forbidden(config.sampling, SMALL, model_config))


def test_markers_are_drawn_only_if_they_are_asked_for():
  never = forbidden()
  assert never[
    [0, 2, 3, 4, *range(46, 53), 98, 100, 101, 105, *range(SMALL.size, SMALL.size + 8)]
  ].all()
  assert never[-15:].all()  # the multimodal ones too
  assert not never[[1, 106, *SMALL.encode("A word, 7 <b>!\n")]].any()
  asked = forbidden(("<|channel>", "<channel|>"))
  assert np.flatnonzero(never & ~asked).tolist() == [100, 101]
  assert np.flatnonzero(never & ~forbidden(("<pad>", "<bos>", "<|tool_response>"))).tolist() == [50]
  assert np.flatnonzero(~forbidden(("<|channel>",), (100, 1390))).tolist() == [100, 1390]
  with pytest.raises(ValueError, match="markers allows markers"):
    forbidden(tokens=(100, 1390))
  with pytest.raises(ValueError, match=r"no piece '<\|channel'"):
    forbidden(("<|channel",))
  config = nash_jax.config.train()
  config.sampling.markers = (100, 101)
  with pytest.raises(ValueError, match=r"sampling.markers: expected pieces .*'<\|channel>'"):
    resolve(config)


@BOTH
@given(
  st.lists(st.text("ab \n<é", max_size=12), min_size=1, max_size=5).filter(lambda x: len(x) % 2),
  st.booleans(), st.integers(20, 90),
)  # fmt: skip
@settings(max_examples=60)
def test_a_prompt_cut_to_any_budget_has_the_templates_form(tokenizer, texts, system, most):
  messages = [
    {"role": "model" if i % 2 else "user", "content": text} for i, text in enumerate(texts)
  ]
  messages = [{"role": "system", "content": "Be brief."}] * system + messages
  ids = tokenizer.prompt(messages)
  cut = tokenizer.cut_prompt(ids, most)
  assert len(cut) <= max(most, 0)
  assert cut == ids if len(ids) <= most else cut[0] == 2
  text = tokenizer._model.decode(cut[1:])
  turns = r"(<\|turn>system\nBe brief.<turn\|>\n)?(<\|turn>(user|model)\n[^>]*<turn\|>\n)+"
  assert re.fullmatch(rf"{turns}<\|turn>model\n({re.escape(THOUGHT)})?", text)
  assert text.endswith(THOUGHT) == (tokenizer is LARGE)
  if len(ids) > most:
    assert text.startswith("<|turn>user\n")
    whole = [tokenizer.prompt(messages[i:]) for i in range(system, len(messages), 2)]
    fits = [x for x in whole if len(x) <= most]
    assert not fits or cut == fits[0]  # the most turns that fit


@BOTH
def test_a_decoded_prompt_is_the_conversation_it_was_made_of(tokenizer):
  said = [{**message, "content": message["content"].strip()} for message in TALK]
  said[2]["content"] = "Hi!"
  assert pairs.asked(tokenizer._model.decode(tokenizer.prompt(TALK)[1:])) == said
  assert pairs.asked(tokenizer._model.decode(tokenizer.prompt("Hello")[1:])) == "Hello"


@pytest.mark.parametrize("text", [PUBLISHED, "<bos> <|turn>x", "Yes.<turn|>\n", "a <|turn>user\nb"])
def test_a_text_that_has_the_template_is_refused(text):
  with pytest.raises(ValueError, match=r"already has the chat template"):
    check_untemplated(text)
  check_untemplated("<|turn in, turn|> out")


@functools.cache
def spliced(name, thinking=False):
  layout = judge_template.layout(name, LARGE)
  assemble = jax.jit(functools.partial(judge_template.assemble, layout))
  thought = [100, *LARGE.encode("thought\nHm."), 101] if thinking else []
  a, b = ([*thought, *LARGE.response(text)] for text in ("Four.", "Five."))
  prompts = prompts_of([LARGE.prompt(TALK)], 80)
  tokens, mask = assemble(prompts, *(Answers(*padded([ids], 24)) for ids in (a, b)))
  return np.asarray(tokens)[np.asarray(mask)].tolist()


@pytest.mark.parametrize("name", ["gemma4", "gemma4_large"])
def test_a_judge_is_asked_in_its_own_form_and_sees_no_thought(name):
  """Neither the empty one at the end of the policy's prompt, nor one that the policy drew."""
  shown = "system\nBe brief.\nuser\nHello there\nmodel\nHi!\nuser\nWhat is 2 + 2?\nmodel"
  text = judge_template.read(name).format(prompt=shown, a="Four.", b="Five.")
  assert text.startswith("<|turn>user\n")
  assert text.endswith("A or B.<turn|>\n<|turn>model\n" + THOUGHT * (name == "gemma4_large"))
  ids = [2]
  for part in re.split(r"(<\|turn>|<turn\|>|<\|channel>|<channel\|>)", text):
    known = LARGE.known([part])
    ids += [known[part]] if known and part else LARGE.encode(part)
  assert spliced(name) == spliced(name, thinking=True) == ids
  assert judge_template.question(name) == judge_template.question("gemma")


def test_a_judges_template_in_another_form_is_refused_by_its_marker():
  with pytest.raises(ValueError, match=r"markers that the tokenizer has, got '<start_of_turn>'"):
    judge_template.layout("gemma", SMALL)
  with pytest.raises(ValueError, match=r"markers that the tokenizer has, got '<\|turn>'"):
    judge_template.layout("gemma4", Tokenizer(BUNDLED, "gemma"))

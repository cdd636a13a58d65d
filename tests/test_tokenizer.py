"""Tokenizers: templates, stop tokens, and no marker smuggled in by a text."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nash_jax.data.chat_template import turns
from nash_jax.data.tokenizer import BUNDLED, Tokenizer

PLAIN = Tokenizer(BUNDLED, "plain")
CHAT = Tokenizer(BUNDLED, "gemma")
MARKERS = [
  "<bos>",
  "<eos>",
  "<pad>",
  "<start_of_turn>",
  "<end_of_turn>",
  "<unused7>",
  "\n",
  "<",
  "Hi",
]


@pytest.fixture(scope="module")
def gemma(data_dir):
  return Tokenizer(str(data_dir / "gemma_tokenizer" / "tokenizer.model"), "gemma")


def test_real_gemma_template_is_the_published_string(gemma):
  messages = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello there"},
    {"role": "assistant", "content": "Hi!"},
    {"role": "user", "content": "What is 2 + 2?\n"},
  ]
  published = (
    "<start_of_turn>user\nBe brief.\n\nHello there<end_of_turn>\n"
    "<start_of_turn>model\nHi!<end_of_turn>\n"
    "<start_of_turn>user\nWhat is 2 + 2?<end_of_turn>\n<start_of_turn>model\n"
  )
  # The library's own SentencePiece reads the markers of a trusted string.
  assert gemma.prompt(messages) == [gemma.bos_id, *gemma._model.encode(published)]


def test_real_gemma_has_its_published_special_pieces(gemma):
  assert (gemma.size, gemma.pad_id, gemma.eos_id, gemma.bos_id) == (256000, 0, 1, 2)
  assert gemma.stop_ids == (1, 107)
  forbidden = gemma.forbidden(256128)
  assert forbidden[256000:].all()
  assert forbidden[[0, 2, 3, 4, 106, gemma.id_of("<unused7>")]].all()
  assert not forbidden[[1, 107, *gemma.encode("A word, 7 <b>!\n")]].any()


@given(st.lists(st.sampled_from(MARKERS), max_size=6).map("".join))
@settings(max_examples=60, deadline=None)
def test_no_marker_can_be_typed(gemma, text):
  steering = {gemma.id_of(piece) for piece in MARKERS[:6]}
  assert not steering & set(gemma.encode(text))
  assert gemma.decode(gemma.encode(text)) == text
  assert gemma.prompt(text).count(gemma.bos_id) == 1


@pytest.mark.parametrize("text", ["Hello", "<bos>Hello", "<bos><bos>Hello", ""])
@pytest.mark.parametrize("tokenizer", [PLAIN, CHAT], ids=["plain", "gemma"])
def test_a_prompt_has_exactly_one_bos(tokenizer, text):
  ids = tokenizer.prompt(text)
  assert ids[0] == tokenizer.bos_id
  assert ids.count(tokenizer.bos_id) == 1


def test_a_spelled_out_bos_is_the_one_we_add():
  assert (
    PLAIN.prompt("<bos>Hello") == PLAIN.prompt("Hello") == [PLAIN.bos_id, *PLAIN.encode("Hello")]
  )


def test_response_ends_where_sampling_stops():
  for tokenizer, piece in ((PLAIN, "<eos>"), (CHAT, "<end_of_turn>")):
    ids = tokenizer.response("The end.")
    assert ids[-1] == tokenizer.id_of(piece)
    assert ids[-1] in tokenizer.stop_ids
    assert tokenizer.decode(np.array([tokenizer.bos_id, *ids, tokenizer.pad_id])) == "The end."


def test_forbidden_depends_on_what_stops():
  end = CHAT.id_of("<end_of_turn>")
  assert PLAIN.forbidden(PLAIN.size)[end]
  assert not CHAT.forbidden(CHAT.size)[end]
  assert not PLAIN.forbidden(1100)[PLAIN.encode('Once upon a time,\n"Hi!" said Tom.')].any()


def test_plain_template_takes_one_turn():
  assert PLAIN.prompt([{"role": "user", "content": "Hello"}]) == PLAIN.prompt("Hello")
  with pytest.raises(ValueError, match="plain template has no turns, got 3"):
    PLAIN.prompt([{"role": r, "content": "x"} for r in ("user", "model", "user")])


@pytest.mark.parametrize(
  ("roles", "message"),
  [
    (["user", "user"], "message 1 has role 'user', expected 'model'"),
    (["model"], "message 0 has role 'model', expected 'user'"),
    (["user", "assistant"], "must end with a message of the user"),
    ([], "must end with a message of the user"),
    (["tool"], "a 'role' of system, user, assistant, model"),
    (["user", "system"], "message 1 has role 'system'"),
  ],
)
def test_conversations_that_break_the_rules_are_refused(roles, message):
  with pytest.raises(ValueError, match=message):
    turns([{"role": role, "content": "x"} for role in roles])


def test_bad_files_and_names_are_refused(tmp_path):
  with pytest.raises(ValueError, match="no tokenizer file"):
    Tokenizer(str(tmp_path / "nowhere.model"), "plain")
  foreign = tmp_path / "foreign.model"
  foreign.write_text("not a model")
  with pytest.raises(ValueError, match="not a SentencePiece model"):
    Tokenizer(str(foreign), "plain")
  with pytest.raises(ValueError, match="expected one of gemma, plain"):
    Tokenizer(BUNDLED, "llama")
  with pytest.raises(ValueError, match="no piece '<start_of_image>'"):
    PLAIN.id_of("<start_of_image>")
  with pytest.raises(ValueError, match="1024 pieces, the model only 512"):
    PLAIN.check_rows(512)
  PLAIN.check_rows(1024)


def test_train_makes_special_pieces_and_leaves_the_held_out_lines_alone(tmp_path):
  from nash_jax.data.tokenizer import train_tokenizer

  corpus = tmp_path / "corpus.jsonl"
  seen = [f'{{"text": "The cat {w} on the mat. “Hi”"}}' for w in ("sat", "ran", "hid", "lay")]
  corpus.write_text("\n".join([*seen, '{"text": "ZZZZ"}']))
  train_tokenizer(str(corpus), str(tmp_path / "small.model"), vocab_size=48, held_out=1)
  small = Tokenizer(str(tmp_path / "small.model"), "gemma")
  assert small.decode(small.encode("The cat “sat”")) == 'The cat "sat"'
  assert small._model.unk_id() in small.encode("Z")
  assert not (tmp_path / "small.vocab").exists()

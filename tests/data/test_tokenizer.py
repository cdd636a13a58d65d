"""Tokenizers: templates, stop tokens, and no marker smuggled in by a text."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import sandbox

import nash_jax
from nash_jax import policy
from nash_jax.data.chat_template import TEMPLATES, turns
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


TURNS = st.lists(
  st.sampled_from(
    [
      "Hi",
      " two\nlines ",
      "<|channel>thought\nHm<channel|> So ",
      [{"type": "text", "text": " part "}] * 2,
      "",
    ]
  )
)


@pytest.mark.parametrize("name", ["gemma", "gemma4", "gemma4_large"])
@given(TURNS.filter(lambda texts: len(texts) % 2), st.sampled_from([None, "", "Be brief.", " x\n"]))
@settings(max_examples=30)
def test_the_template_for_other_programs_is_ours(name, texts, system):
  """Rendered as transformers renders it, and read by a SentencePiece that knows the markers."""
  environment = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
  template = environment.from_string(TEMPLATES[name].jinja)
  messages = [] if system is None else [{"role": "system", "content": system}]
  for i, text in enumerate(texts):
    messages.append({"role": ("user", "assistant")[i % 2], "content": text})
  got = template.render(messages=messages, bos_token="<bos>", add_generation_prompt=True)
  parts = TEMPLATES[name].render(turns(messages))
  assert got == "<bos>" + "".join(x if isinstance(x, str) else x.piece for x in parts)
  done = template.render(messages=messages, bos_token="<bos>")
  opening = {"gemma": "<start_of_turn>model\n", "gemma4": "<|turn>model\n"}
  assert got == done + opening.get(name, "<|turn>model\n<|channel>thought\n<channel|>")


@pytest.mark.parametrize("name", ["gemma", "gemma4"])
def test_the_template_for_other_programs_refuses_turns_that_do_not_alternate(name):
  class Refused(Exception):
    pass

  def refuse(message):
    raise Refused(message)

  template = sandbox.ImmutableSandboxedEnvironment().from_string(TEMPLATES[name].jinja)
  ask = {"role": "user", "content": "Hi"}
  for messages in ([ask, ask], [{**ask, "role": "assistant"}], [{**ask, "role": "tool"}]):
    with pytest.raises(Refused, match="turns must alternate"):
      template.render(messages=messages, raise_exception=refuse)


@given(st.lists(st.sampled_from(MARKERS), max_size=6).map("".join))
@settings(max_examples=60)
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
    (["user", "assistant"], "must end with a user's message"),
    ([], "must end with a user's message"),
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
  with pytest.raises(ValueError, match="expected one of gemma, gemma4, gemma4_large, plain"):
    Tokenizer(BUNDLED, "llama")
  with pytest.raises(ValueError, match="no piece '<start_of_image>'"):
    PLAIN.id_of("<start_of_image>")
  with pytest.raises(ValueError, match="1024 pieces, the model only 512"):
    PLAIN.check_rows(512)
  PLAIN.check_rows(1024)


@pytest.mark.parametrize(
  ("rows", "good"), [(1023, False), (1024, True), (1279, True), (1280, False)]
)
def test_rows_fit_the_pieces_in_both_directions(rows, good):
  if good:
    PLAIN.check_rows(rows)
    assert PLAIN.forbidden(rows)[1024:].all()
    return
  message = f"has 1024 pieces, the model .*{rows} vocabulary rows: use"
  with pytest.raises(ValueError, match=message):
    PLAIN.check_rows(rows)
  if rows < PLAIN.size:
    with pytest.raises(ValueError, match=message):
      PLAIN.forbidden(rows)


def test_a_row_of_no_piece_is_shown_as_unknown():
  ids = PLAIN.encode("The end")
  assert PLAIN.decode([*ids, 1024, 5000, -1]) == "The end" + PLAIN.decode([3, 3, 3])


def test_gemmas_pieces_fit_the_rows_of_their_own_generation(gemma):
  gemma.check_rows(256_000)
  gemma.check_rows(256_128)
  with pytest.raises(ValueError, match="256000 pieces, the model 262144 vocabulary rows"):
    gemma.check_rows(262_144)


def test_a_tokenizer_that_is_not_the_models_is_refused_before_weights_load():
  config = nash_jax.config.train()
  config.model.update({"preset": "gemma2_2b", "weights": ""})
  with pytest.raises(ValueError, match="1024 pieces, the model 256128 vocabulary rows"):
    policy.tokenizer_and_model(config.model)


@pytest.mark.parametrize(
  ("data", "message"),
  [
    (
      b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
      "a Git LFS pointer: run `git lfs",
    ),
    (b"\x1f\x8b\x08\0", r"compressed \(gzip\): unpack it"),
    (
      b'{"version": "1.0", "model": {}}',
      "not a SentencePiece model.*tokenizer.model, not tokenizer.j",
    ),
    (b"", "not a SentencePiece model"),
  ],
)
def test_what_stands_in_a_tokenizers_place_is_named(tmp_path, data, message):
  path = tmp_path / "t.model"
  path.write_bytes(data)
  with pytest.raises(ValueError, match=message) as error:
    Tokenizer(str(path), "plain")
  assert "t.model" in str(error.value)
  assert "\n" not in str(error.value)


def test_half_of_a_surrogate_pair_is_refused_by_name():
  for text in ("a \ud83d kite", "\udc00<bos>"):
    with pytest.raises(ValueError, match=r"'.ud83d' in|'.udc00' in"):
      PLAIN.encode(text)
  assert PLAIN.encode("a \U0001fa81 kite")


def test_white_space_is_as_in_gemmas_published_template():
  system = {"role": "system", "content": " Be brief. \n"}
  messages = [
    system,
    {"role": "user", "content": "  \n Hi "},
    {"role": "assistant", "content": "\tYes?\u3000\n"},
    {"role": "user", "content": "\n"},
  ]
  # Jinja: system + "\\n\\n" + content | trim; the system text itself is not trimmed.
  published = (
    "<start_of_turn>user\n Be brief. \n\n\nHi<end_of_turn>\n"
    "<start_of_turn>model\nYes?<end_of_turn>\n"
    "<start_of_turn>user\n<end_of_turn>\n<start_of_turn>model\n"
  )
  assert CHAT._model.decode(CHAT.prompt(messages)[1:]) == published
  assert CHAT.prompt(messages) == [CHAT.bos_id, *CHAT._model.encode(published)]
  assert PLAIN.prompt(messages[:2]) == [PLAIN.bos_id, *PLAIN.encode(" Be brief. \n\n\n  \n Hi ")]


def test_a_cut_prompt_of_real_gemma_keeps_its_template(gemma):
  system, *talk = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Name 3 fruits, in 2024 order."},
    {"role": "model", "content": "1. Apple\n2. Pear\n3. Fig"},
    {"role": "user", "content": "Why\n\n\n  is the sky blue, and what of 1,000 suns?"},
  ]
  whole, last = gemma.prompt([system, *talk]), gemma.prompt(talk[2:])
  assert gemma.cut_prompt(whole, len(whole)) == whole
  for most in (len(whole) - 1, len(last)):
    assert gemma.cut_prompt(whole, most) == last
  head, tail = "<start_of_turn>user\n", "<end_of_turn>\n<start_of_turn>model\n"
  for most in range(len(gemma.prompt("")) + 1, len(last)):
    text = gemma._model.decode(gemma.cut_prompt(whole, most)[1:])
    kept = text.removeprefix(head).removesuffix(tail)
    assert text == head + kept + tail
    assert kept
    assert not kept.startswith("\n")
    assert talk[2]["content"].endswith(kept)


TURNS = st.lists(st.text("ab \n<é", max_size=12), min_size=1, max_size=5).filter(
  lambda x: len(x) % 2
)


@given(TURNS, st.booleans(), st.integers(1, 60))
@settings(max_examples=100, derandomize=True)
def test_a_prompt_cut_to_any_budget_has_the_templates_form(texts, system, most):
  messages = [
    {"role": "model" if i % 2 else "user", "content": text} for i, text in enumerate(texts)
  ]
  messages = [{"role": "system", "content": "Be brief."}] * system + messages
  ids = CHAT.prompt(messages)
  least = len(CHAT.prompt("")) + 1
  # Of several turns the last may fit whole, which takes no token of text where it has none.
  whole = len(CHAT.prompt(messages[-1:])) if len(texts) > 1 else len(ids)
  if len(ids) > most and most < min(least, whole):
    with pytest.raises(ValueError, match=f"at least {least} for this template, got {most}"):
      CHAT.cut_prompt(ids, most)
    return
  cut = CHAT.cut_prompt(ids, most)
  assert len(cut) <= max(most, 0)
  if len(ids) <= most:
    assert cut == ids
  start, end = CHAT.id_of("<start_of_turn>"), CHAT.stop_ids[-1]
  assert (cut[0], cut.count(CHAT.bos_id), cut.count(start) % 2) == (CHAT.bos_id, 1, 0)
  text = CHAT._model.decode(cut[1:])
  assert re.fullmatch(
    r"(<start_of_turn>(user|model)\n[^>]*<end_of_turn>\n)+<start_of_turn>model\n", text
  )
  assert cut.count(start) == cut.count(end) + 1
  assert text.startswith("<start_of_turn>user\n")


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
  marked = tmp_path / "marked.jsonl"
  marked.write_bytes(("\ufeff" + corpus.read_text("utf-8").replace("\n", "\r\n")).encode())
  train_tokenizer(str(marked), str(tmp_path / "same.model"), vocab_size=48, held_out=1)
  assert (tmp_path / "same.model").read_bytes() == (tmp_path / "small.model").read_bytes()
  for line, message in [('{"prompt": "x"}', "expected an object with a text"), ("{", "not JSON")]:
    marked.write_text(f"{seen[0]}\n{line}\n{seen[1]}\n")
    with pytest.raises(ValueError, match=f"marked.jsonl:2: {message}"):
      train_tokenizer(str(marked), str(tmp_path / "none.model"), vocab_size=48, held_out=1)

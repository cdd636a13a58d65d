"""Replies of a judge behind a server: read as probabilities, or as none."""

import json
import math
import re

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from judge_server import AB, ask, chunks, reply_of, says

import nash_jax
from nash_jax.config import resolve
from nash_jax.judges import http as http_judge


@pytest.mark.parametrize(
  "reply",
  [
    {"choices": []},
    [],
    3,
    None,
    {"error": "?"},
    reply_of(0.5, "CD"),
    {"choices": [{"message": {"content": "Neither."}}]},
    {"choices": [{"message": {"content": None}, "logprobs": {"content": []}}]},
    {
      "choices": [
        {
          "message": {"content": "A"},
          "logprobs": {"content": [{"top_logprobs": [{"token": "A", "logprob": 1e9}]}]},
        }
      ]
    },
  ],
)
def test_a_reply_that_says_neither_answer_is_nan(reply):
  assert math.isnan(http_judge._read(reply, ("A", "B")))


def test_a_reply_without_log_probabilities_is_read_as_text():
  for text, p in (("A", 1.0), (" B\n", 0.0)):
    assert http_judge._read({"choices": [{"message": {"content": text}}]}, ("A", "B")) == p


def tops(**logprobs):
  tokens = [{"token": token, "logprob": x} for token, x in logprobs.items()]
  return [{"token": max(logprobs, key=logprobs.get), "top_logprobs": tokens}]


@pytest.mark.parametrize(
  ("text", "content", "expected"),
  [
    ("Neither", tops(Neither=-0.001, A=-15, B=-20), math.nan),
    ("A", tops(Neither=-0.001, A=-15, B=-20), math.nan),
    ("A", tops(Sure=-0.0001, A=-12), math.nan),
    ("A", tops(A=math.log(0.3), B=math.log(0.19), C=math.log(0.18)), math.nan),
    ("A", tops(A=math.log(0.4), B=math.log(0.1), C=math.log(0.2)), 0.8),
    ("a", tops(a=math.log(0.6), B=math.log(0.2), A=math.log(0.2)), 0.8),
    ("**A**", tops(**{"**": -0.01, "A": -5}), 1.0),
    ("Answer: B", tops(Answer=-0.01, A=-5), 0.0),
    ("A", [{"token": "A", "logprob": -0.1}], 1.0),
    ("B", [{"token": "B", "logprob": -0.1, "top_logprobs": []}], 0.0),
    ("B", [{"token": "B", "logprob": -0.1, "top_logprobs": None}], 0.0),
    ("\nA", [{"token": "\n"}, *tops(A=math.log(0.9), B=math.log(0.1))], 0.9),
    ("A", tops(A=math.nan, B=-1.0), math.nan),
    ("A", tops(A=5.0, B=-1.0), math.nan),
    ("A", tops(A=0.0, B=-math.inf), 1.0),
    (None, tops(A=math.log(0.9), B=math.log(0.1)), 0.9),
  ],
)
def test_log_probabilities_are_read_above_a_floor(text, content, expected):
  reply = {"choices": [{"message": {"content": text}, "logprobs": {"content": content}}]}
  np.testing.assert_allclose(http_judge._read(reply, AB), expected)


def test_the_floor_is_met_by_half():
  for share, expected in ((0.499, math.nan), (0.501, 0.75)):
    content = tops(A=math.log(share * 0.75), B=math.log(share / 4), Hm=math.log(1 - share))
    reply = {"choices": [{"message": {"content": "A"}, "logprobs": {"content": content}}]}
    np.testing.assert_allclose(http_judge._read(reply, AB), expected)


FIRST = (
  "A", "a", "a.", "A.", "(A)", "[[A]]", "**A**", "'A'", '{"answer": "A"}', "A) because", "A!",
  "Answer: A", "**Answer:** A", "The answer is A.", "Reply A", "Reply A is better", "A\n\nIt",
  "I prefer reply A.", "A because it", "A, because", "A. It is shorter", "Ａ", "\n A \n", "A:",
)  # fmt: skip


NEITHER = (
  "", "A dog", "a dog", "A dog. A", "The answer is a dog", "A or B", "A) or B)", "A/B", "A, B",
  "A and B", "A\nB", "Both", "Neither A nor B", "not A", "About", "A's", "A.I. is", "A?", "A+",
  "A is not better", "Reply A: the cat. Reply B: the dog", "A, dear dog", "C",
)  # fmt: skip


def test_an_answer_in_other_words_is_read():
  for text in FIRST:
    assert http_judge._read(json.loads(says(text)), AB) == 1, text
    swapped = re.sub(r"\b[Aaａ]\b|Ａ", "B", text)
    assert http_judge._read(json.loads(says(swapped)), AB) == 0, swapped
    assert http_judge._read(json.loads(says(swapped)), ("B", "A")) == 1, swapped


def test_what_is_no_answer_is_not_read():
  for text in NEITHER:
    assert math.isnan(http_judge._read(json.loads(says(text)), AB)), text


def test_other_answers_are_told_apart():
  for text, answers, expected in (
    ("1.", ("1", "2"), 1), ("1.5", ("1", "2"), math.nan), ("10", ("1", "10"), 0),
    ("a", ("A", "a"), 0), ("A", ("A", "a"), 1), ("C++.", ("C", "C++"), 0), ("C.", ("C", "C++"), 1),
    ("no, because", ("Yes", "No"), 0),
  ):  # fmt: skip
    np.testing.assert_equal(http_judge._of_text(text, answers), expected)


@pytest.mark.parametrize("answers", [("1", "10"), ("C++", "C"), ("", "B")])
def test_answers_of_which_one_begins_the_other_are_refused(answers):
  """Of one token "1" may be all of "1", or the first of "10"."""
  config = nash_jax.config.arena()
  config.judges.judge.update({"name": "http", "template": "gemma", "answers": answers})
  config.judges.judge.http.model = "m"
  with pytest.raises(ValueError, match=r"judges.judge.answers: expected neither to start with"):
    resolve(config)
  config.judges.judge.answers = ("A", "a")
  resolve(config)


VALUES = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
  | st.sampled_from(["A", "B", " A", -0.1, -1e9, 1e9, "Answer: B"]),
  lambda inner: st.lists(inner, max_size=3)
  | st.dictionaries(
    st.sampled_from(
      ["choices", "message", "content", "logprobs", "top_logprobs", "token", "logprob", "error"]
    ),
    inner, max_size=4,
  ),
  max_leaves=12,
)  # fmt: skip


@st.composite
def near_replies(draw):
  """A good reply of which one value, anywhere, is another."""
  reply = reply_of(draw(st.floats(0.01, 0.99)))
  spot, key = {"reply": reply}, "reply"
  while isinstance(spot[key], dict | list) and spot[key] and draw(st.integers(0, 4)):
    spot = spot[key]
    key = draw(st.sampled_from(list(spot) if isinstance(spot, dict) else range(len(spot))))
  spot[key] = draw(VALUES)
  return reply


@hypothesis.given(VALUES | near_replies())
def test_any_reply_is_a_probability_or_none(reply):
  p = http_judge._read(reply, AB)
  assert math.isnan(p) or 0 <= p <= 1


@pytest.mark.parametrize("status", [200, 400, 500])
def test_any_body_is_a_probability_none_or_one_line(serve, status):
  body = b""
  _, config = serve(
    lambda text, times: chunks(body, 1, head=b"HTTP/1.1 %d X\r\n\r\n" % status), retries=0
  )
  valid = json.dumps(reply_of(0.3)).encode()

  @hypothesis.settings(max_examples=25)
  @hypothesis.given(
    st.binary(max_size=50)
    | VALUES.map(lambda value: json.dumps(value).encode())
    | st.tuples(st.integers(0, len(valid)), st.binary(max_size=3)).map(
      lambda cut: valid[: cut[0]] + cut[1] + valid[cut[0] + len(cut[1]) :]
    )
  )
  def check(any_body):
    nonlocal body
    body = any_body
    if status == 400:
      with pytest.raises(
        ValueError, match=r"^the judge at [ -~]* answered 400 Bad Request \(.*\)$"
      ):
        ask(config, "text")
      return
    p = ask(config, "text")
    assert math.isnan(p) or 0 <= p <= 1

  check()

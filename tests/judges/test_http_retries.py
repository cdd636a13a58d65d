"""A judge behind a server that fails, waits or knows less: what is tried again, and how often."""

import json
import math
import re
import time
from email.utils import formatdate

import hypothesis
import numpy as np
import pytest
import tenacity
from hypothesis import strategies as st
from judge_server import BIAS, ask, chunks, error, reply_of, says, waits_of

from nash_jax.judges import chat


@pytest.mark.parametrize("fault", [(503, ""), (429, ""), (408, ""), (200, "{"), "late"])
def test_failures_that_may_pass_are_retried(serve, monkeypatch, fault):
  text = "Reply A:\na\n\nReply B:\nb\n\nWhich"

  def spoil(text, times):
    if times > 3:
      return None
    if fault != "late":
      return fault
    time.sleep(0.5)
    return 200, json.dumps(reply_of(0.9))

  server, config = serve(spoil, timeout=0.25)
  waits = waits_of(monkeypatch)
  np.testing.assert_allclose(ask(config, text), 1 / (1 + math.exp(-BIAS)))
  assert (server.asked[text], waits) == (4, [0.01, 0.02, 0.04])
  server, config = serve(spoil, timeout=0.25, retries=2)
  assert math.isnan(ask(config, text))
  assert server.asked[text] == 3


# What the server does at the first, second, ... request, the last one for ever: what comes of it
# (a probability, NaN or an error's words), and how often it was asked, with two retries.
BEHAVIOURS = {
  "an answer": ([(200, says("A"))], 1.0, 1),
  "created": ([(201, says("B"))], 0.0, 1),
  "neither": ([(200, says("Neither"))], math.nan, 1),
  "an error with status 200": ([(200, error("overloaded"))], math.nan, 3),
  "a list": ([(200, "[]")], math.nan, 1),
  "down, then up": ([(500, ""), (502, ""), (200, says("A"))], 1.0, 3),
  "locked for a moment": ([(409, ""), (425, ""), (200, says("A"))], 1.0, 3),
  "down": ([(503, "")], math.nan, 3),
  "no such method": ([(501, "")], math.nan, 3),
  "closes at once": ([lambda handler: None], math.nan, 3),
  "no HTTP": ([lambda handler: handler.wfile.write(b"hello\r\n\r\n")], math.nan, 3),
  "an endless header": ([chunks(b"x" * 999, 10**6, head=b"HTTP/1.1 200 OK\r\nx: ")], math.nan, 3),
  "an empty body": ([(200, "")], math.nan, 3),
  "a body in its middle": ([(200, '{"cho', {"Content-Length": "900"})], math.nan, 3),
  "not UTF-8": ([chunks(b"\xff\xfe{", 1)], math.nan, 3),
  "deep JSON": ([(200, "[" * 200_000)], math.nan, 3),
  "deep JSON, refused": ([(400, "[" * 200_000)], r"answered 400 Bad Request \('\[\[", 1),
  "said to be compressed": ([(200, says("A"), {"Content-Encoding": "gzip"})], math.nan, 3),
  "a body byte by byte": ([chunks(b" ", 10**6, 0.02)], math.nan, 3),
  "a header byte by byte": ([chunks(b"x", 10**6, 0.02, b"HTTP/1.1 200 OK\r\nx: ")], math.nan, 3),
  "bad request": ([(400, error("no such role"))], r"400 Bad Request \('no such role'\)$", 1),
  "too long": ([(413, "")], "answered 413", 1),
  "a wrong key": ([(401, error("bad key"))], r"401 Unauthorized \('bad key'\): check ", 1),
  "no money": ([(402, error("Insufficient Balance"))], "402 .*Insufficient Balance", 1),
  "forbidden": ([(403, error("no access"))], "403 Forbidden .*no access", 1),
  "no such model": ([(404, '{"detail": "no model x"}')], r"404 Not Found \('no model x'\)", 1),
  "no POST": ([(405, "<html>nginx</html>")], "405 Method Not Allowed .*nginx", 1),
  "no quota left": ([(429, error("pay", code="insufficient_quota"))], "429 .*pay.*: check", 1),
  "a status of its own": ([(499, "gone")], "answered 499 of no known kind .*gone", 1),
  "told in escapes": ([(400, "\x1b[2J\x07a\n\nb")], r"\('\[2J a b'\)", 1),
  "told at length": ([(400, "x" * 5000)], r"\('x{299}…'\)", 1),
}  # fmt: skip


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_what_comes_of_what_a_server_does(serve, name):
  replies, expected, asked = BEHAVIOURS[name]
  server, config = serve(
    lambda text, times: replies[min(times, len(replies)) - 1], backoff=0.0, retries=2, timeout=0.2
  )
  start = time.monotonic()
  if isinstance(expected, str):
    with pytest.raises(ValueError, match=expected) as raised:
      ask(config, "text")
    assert "\n" not in str(raised.value)
  else:
    np.testing.assert_equal(ask(config, "text"), expected)
  assert server.asked["text"] == asked
  assert time.monotonic() - start < 15, "three times 0.2 seconds, on a busy machine"


def test_a_huge_body_is_not_read(serve):
  part = b" " * (1 << 16)
  server, config = serve(lambda text, times: chunks(part, 10_000))
  with pytest.raises(ValueError, match="answered with more than 1048576 bytes"):
    ask(config, "text")
  assert server.sent < 64 << 20, "of 600 MB; sockets hold a few"


@pytest.mark.parametrize(
  ("status", "where"),
  [
    (301, "http://127.0.0.1:{port}/v1"), (307, "http://127.0.0.1:{port}/v1"), (302, "/elsewhere"),
    (304, None),
  ],
)  # fmt: skip
def test_a_redirect_is_refused_and_neither_key_nor_question_go_along(
  serve, monkeypatch, status, where
):
  monkeypatch.setenv(chat.KEY, "secret-key")
  other, _ = serve(lambda text, times: (200, says("B")))
  headers = {"Location": where.format(port=other.server_port)} if where else {}
  server, config = serve(lambda text, times: (status, "", headers))
  with pytest.raises(ValueError, match=rf"answered {status} .*redirects are not followed"):
    ask(config, "text")
  assert server.asked["text"] == 1
  assert not other.asked


@pytest.mark.parametrize(
  ("header", "wait"),
  [
    ("3", 3.0), ("0.25", 0.25), ("0", 0.01), ("-5", 0.01), ("86400", 9.0), ("inf", 9.0),
    ("nan", 0.01), ("9" * 400, 9.0), ("soon", 0.01), ("", 0.01),
    (formatdate(4e9, usegmt=True), 9.0), (formatdate(0, usegmt=True), 0.01),
  ],
)  # fmt: skip
def test_retry_after_is_honoured_and_bounded(serve, monkeypatch, header, wait):
  replies = {1: (429, "", {"Retry-After": header}), 2: (503, ""), 3: (200, says("A"))}
  _, config = serve(lambda text, times: replies[times], timeout=9.0)
  waits = waits_of(monkeypatch)
  assert ask(config, "text") == 1
  assert waits == [wait, 0.02]


def test_retry_after_may_be_a_date():
  date = formatdate(time.time() + 100, usegmt=True)
  assert 98 < chat._retry_after(date) <= 100


@hypothesis.settings(max_examples=50)
@hypothesis.given(st.text(max_size=40) | st.datetimes().map(str) | st.integers().map(str))
def test_any_retry_after_is_some_seconds(value):
  assert chat._retry_after(value) >= 0


@pytest.mark.parametrize(("backoff", "wait"), [(0.0, 0.0), (60.0, 5.0), (1e-3, 5.0)])
def test_no_wait_is_longer_than_the_time_out(serve, backoff, wait):
  _, config = serve(timeout=5.0, backoff=backoff)
  state = tenacity.RetryCallState(tenacity.Retrying(), None, (), {})
  state.attempt_number = 5000
  assert chat.Chat(config.http)._wait(state) == wait


UNSUPPORTED = {
  "max_tokens": error(
    "Unsupported parameter: 'max_tokens' is not supported with this model. Use"
    " 'max_completion_tokens' instead.",
    param="max_tokens",
  ),
  "temperature": error("Unsupported value: 'temperature' does not support 0 with this model."),
  "logprobs": error("You are not allowed to request logprobs from this model"),
  "top_logprobs": json.dumps(
    {
      "detail": [
        {
          "type": "extra_forbidden",
          "loc": ["body", "top_logprobs"],
          "msg": "Extra inputs are not permitted",
          "input": 5,
        }
      ]
    }
  ),
}


@pytest.mark.parametrize(
  ("status", "name"),
  [*((400, name) for name in UNSUPPORTED), (403, "logprobs"), (422, "top_logprobs")],
)
def test_what_a_server_does_not_know_is_learnt_once(serve, caplog, name, status):
  server, config = serve(
    lambda text, times, body: (status, UNSUPPORTED[name]) if name in body else (200, says("A"))
  )
  client = chat.Chat(config.http)
  outcomes = client.complete([f"text {i}" for i in range(20)])
  assert {outcome.kind for outcome in outcomes.values()} == {"answered"}
  assert sum(name in body for body in server.seen) == 1, "one request was in vain"
  last = server.seen[-1]
  assert ("max_completion_tokens" in last) == (name == "max_tokens")
  assert last["messages"] == [{"role": "user", "content": last["messages"][0]["content"]}]
  assert f"refuses {name}" in caplog.text
  client.complete(["another"])
  assert name not in server.seen[-1]


def test_all_that_a_server_does_not_know_is_learnt(serve):
  def spoil(text, times, body):
    unknown = [name for name in UNSUPPORTED if name in body]
    return (400, UNSUPPORTED[unknown[0]]) if unknown else (200, says("B"))

  server, config = serve(spoil)
  assert ask(config, "text") == 0
  assert server.asked["text"] == 4
  assert set(server.seen[-1]) == {"model", "messages", "max_completion_tokens", "key"}


@pytest.mark.parametrize(
  "message",
  [
    "'max_tokens' is too large: 1. This model's maximum context length is 4096 tokens, your request"
    " is not supported",
    "temperature in the story: flagged by the content filter",
  ],
)
def test_a_refusal_for_another_reason_changes_no_parameter(serve, message):
  server, config = serve(lambda text, times: (400, error(message)))
  with pytest.raises(ValueError, match=re.escape(message[:40])):
    ask(config, "text")
  assert server.asked["text"] == 1


def test_a_server_that_knows_neither_spelling_is_quoted(serve):
  message = "max_tokens is not supported, use max_completion_tokens"
  server, config = serve(lambda text, times: (400, error(message)))
  with pytest.raises(ValueError, match=f"answered 400 Bad Request .*{message}"):
    ask(config, "text")
  assert server.asked["text"] == 2

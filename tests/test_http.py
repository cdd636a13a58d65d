"""A judge behind a server: what is asked and read, what is tried again, what weighs nothing."""

import asyncio
import collections
import contextlib
import http.server
import json
import math
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from email.utils import formatdate

import hypothesis
import jax
import numpy as np
import pytest
import tenacity
import test_arena
from hypothesis import strategies as st
from jax import numpy as jnp
from tiny import ROOT

import nash_jax
from nash_jax import judges
from nash_jax.config import describe, resolve
from nash_jax.data.tokenizer import BUNDLED, Tokenizer
from nash_jax.jobs import arena
from nash_jax.judges import chat
from nash_jax.judges import http as http_judge
from nash_jax.types import Prompts, Responses

AB = ("A", "B")

BIAS = 1.5  # towards what is shown first, in nats


def reply_of(p, answers=("A", " B")):
  tokens = [
    {"token": token, "logprob": math.log(x)} for token, x in zip(answers, (p, 1 - p), strict=True)
  ]
  return {
    "choices": [
      {
        "message": {"content": "A"},
        "logprobs": {
          "content": [{"token": "A", "top_logprobs": [{"token": "Hm", "logprob": -0.1}, *tokens]}]
        },
      }
    ]
  }


class Server(http.server.ThreadingHTTPServer):
  """Prefers the longer reply; `spoil` may answer instead.

  It is (text, times asked) -> (status, body), (status, body, headers) or what is to be done with
  the handler; it may also have a third parameter, the request's whole body.
  """

  daemon_threads = True
  request_queue_size = 128  # of the library's 5, a sixth at once is lost and sent again after 1 s

  def __init__(self, spoil):
    super().__init__(("127.0.0.1", 0), Handler)
    self.spoil, self.lock = spoil, threading.Lock()
    self.asked, self.seen = collections.Counter(), []
    self.now, self.most, self.delay = 0, 0, 0.0

  def reply(self, body):
    text = body["messages"][0]["content"]
    with self.lock:
      self.asked[text] += 1
      self.seen.append(body)
      self.now += 1
      self.most = max(self.most, self.now)
    time.sleep(self.delay)
    with self.lock:
      self.now -= 1
    arguments = (text, self.asked[text], body)[: self.spoil.__code__.co_argcount]
    if spoilt := self.spoil(*arguments):
      return spoilt
    found = re.search(r"Reply A:\n(.*)\n\nReply B:\n(.*)\n\nWhich", text, re.S)
    a, b = found.groups() if found else ("", "")
    return 200, json.dumps(reply_of(1 / (1 + math.exp(-BIAS - (len(a) - len(b)) / 10))))


class Handler(http.server.BaseHTTPRequestHandler):
  def do_POST(self):
    body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
    reply = self.server.reply({**body, "key": self.headers["Authorization"]})
    with contextlib.suppress(ConnectionError):  # whoever asked may have given up
      if callable(reply):
        reply(self)
        return
      status, text, *headers = reply
      self.send_response(status)
      for name, value in dict(*headers).items():
        self.send_header(name, value)
      self.end_headers()
      self.wfile.write(text.encode())

  def log_message(self, *_):
    pass


@pytest.fixture
def serve():
  """Starts a server, and returns it with the config of a judge that asks it."""
  running = []

  def start(spoil=lambda text, times: None, **changes):
    server = Server(spoil)
    running.append(server)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    config = nash_jax.config.arena()
    judge = config.judges.judge
    judge.update({"name": "http", "template": "gemma"})
    judge.http.url = f"http://127.0.0.1:{server.server_port}/v1/chat/completions"
    judge.http.update({"model": "some-model", "backoff": 0.01, "retries": 3, **changes})
    return server, resolve(config).judges.judge

  yield start
  for server in running:
    server.shutdown()
    server.server_close()


def ask(config, text):
  """Returns the probability of the first answer, or NaN where the server gives no readable one."""
  with contextlib.closing(chat.Chat(config.http)) as client:
    outcome = client.complete([text])[text]
  if outcome.kind == "refused":
    raise ValueError(f"the judge at {client.url} {outcome.message}")
  return http_judge._read(outcome.reply, AB) if outcome.kind == "answered" else math.nan


TEXTS = (" ran.", " saw a big red ball and was happy.", " sat down to eat.")


def verdict_of(config, compiled=True, folder=None, finish=False):
  """What the judge says of three responses to each of two prompts."""
  tokenizer = Tokenizer(BUNDLED, "plain")
  prompts = [tokenizer.prompt(text) for text in ("One day, a cat", "The dog")]
  responses = [tokenizer.response(text) for text in TEXTS]
  tokens = np.zeros((2, 3, 24), np.int32)
  for k, ids in enumerate(responses):
    tokens[:, k, : len(ids)] = ids
  x = np.zeros((2, 12), np.int32)
  for row, ids in zip(x, prompts, strict=True):
    row[-len(ids) :] = ids
  zeros = np.zeros(tokens.shape, np.float32)
  y = Responses(tokens, tokens > 0, zeros, zeros, np.ones((2, 3), bool))
  judge = judges.make(config, tokenizer)
  if folder:
    judge.server.keep_answers(folder)
  fn = jax.jit(judge.fn) if compiled else judge.fn
  verdict = fn(judge.params, Prompts(x, x > 0, np.arange(2)), y, None)
  if finish:
    judge.server.finish()
  return verdict


def test_both_orders_are_asked_at_once_and_averaged(serve, monkeypatch):
  monkeypatch.setenv(http_judge.KEY, "secret")
  server, config = serve()
  server.delay = 0.02
  verdict = verdict_of(config)
  lengths = np.array([len(text.strip("\n")) for text in TEXTS])
  gap = (lengths[:, None] - lengths[None]) / 10
  first = np.asarray(jax.nn.sigmoid(jnp.asarray(gap + BIAS)))
  expected = (first + 1 - first.T) / 2
  np.testing.assert_allclose(verdict.p_win, np.broadcast_to(expected, (2, 3, 3)), atol=1e-6)
  np.testing.assert_array_equal(verdict.valid, np.broadcast_to(~np.eye(3, dtype=bool), (2, 3, 3)))
  upper = np.triu_indices(3, 1)
  flips = (first[upper] > 0.5) & (first.T[upper] > 0.5)
  np.testing.assert_allclose(verdict.metrics["flip_rate"].value(), flips.mean(), rtol=1e-6)
  assert 0 < flips.mean() < 1
  assert len(server.asked) == 12  # 2 prompts x 3 pairs x 2 orders, each once
  assert set(server.asked.values()) == {1}
  assert 1 < server.most <= config.http.workers
  body = server.seen[0]
  assert body["key"] == "Bearer secret"
  assert "secret" not in json.dumps(describe(config))
  assert (body["model"], body["temperature"], body["logprobs"]) == ("some-model", 0, True)
  text = body["messages"][0]["content"]
  assert text.startswith("Below is a conversation")
  assert text.endswith("Answer with a single letter, A or B.")
  assert "<" not in text


def test_answers_that_cannot_be_read_weigh_nothing(serve):
  replies = iter([{"choices": []}, {"choices": [{"message": {"content": "Neither."}}]}])

  def spoil(text, times):
    first, last = (text.find(x) for x in (TEXTS[0], TEXTS[2]))
    return (200, json.dumps(next(replies))) if first > last >= 0 else None  # one order of a pair

  server, config = serve(spoil)
  verdict = verdict_of(config)
  expected = ~np.eye(3, dtype=bool)
  expected[0, 2] = expected[2, 0] = False
  np.testing.assert_array_equal(verdict.valid, np.broadcast_to(expected, (2, 3, 3)))
  np.testing.assert_array_equal(verdict.p_win[:, 0, 2], 0.5)
  np.testing.assert_allclose(verdict.metrics["valid"].value(), 2 / 3, rtol=1e-6)
  assert verdict.metrics["flip_rate"].weight == verdict.metrics["tie_mass"].weight == 4
  assert set(server.asked.values()) == {1}  # an answer that is an answer is not asked for again


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


def waits_of(monkeypatch):
  """Returns the list of the seconds that are slept between two trials, without sleeping."""
  waits, sleep = [], asyncio.sleep

  async def note(seconds):
    waits.append(seconds)
    await sleep(0)

  monkeypatch.setattr(asyncio, "sleep", note)
  return waits


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


def test_a_request_that_is_refused_says_what_to_check(serve):
  server, config = serve(lambda text, times: (401, ""))
  with pytest.raises(ValueError, match=r"answered 401 .*model, and the environment variable NASH"):
    ask(config, "text")
  assert server.asked["text"] == 1
  with pytest.raises(jax.errors.JaxRuntimeError, match=r"answered 401 .*check judge.http.url"):
    jax.block_until_ready(verdict_of(config))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"model": ""}, "http.model: expected a name"),
    ({"url": "file:///x"}, "^judges.judge.http.url: expected an"),
    ({"url": "http://me:hunter2@a/v1"}, "^judges.judge.http.url: expected an"),
    ({"timeout": 0.0}, "http.timeout: expected a number in .*, got"),
    ({"workers": 0}, "http.workers"),
  ],
)
def test_bad_settings_of_a_server_are_refused(serve, changes, message):
  with pytest.raises(ValueError, match=message):
    serve(**changes)


def says(text, **more):
  return json.dumps({"choices": [{"message": {"content": text}, **more}]})


def error(message, **more):
  return json.dumps({"error": {"message": message, **more}})


def chunks(part, times, pause=0.0, head=b"HTTP/1.1 200 OK\r\n\r\n"):
  """Returns what sends `part` so many times; it notes how many bytes went out."""

  def write(handler):
    handler.server.sent = 0
    handler.wfile.write(head)
    for _ in range(times):
      handler.wfile.write(part)
      handler.wfile.flush()
      handler.server.sent += len(part)
      time.sleep(pause)

  return write


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


@pytest.mark.parametrize(
  "url",
  [
    "http://", "https://", "http:///v1", "http://a b/v1", "http://a/v 1", " http://a/", "http://a/\n",
    "http://a:port/v1", "http://a:99999/v1", "http://a:0/v1", "http://[::1/v1", "a:8000/v1", "",
    "ftp://a/", "http:a/v1", "http://a\x00b/",
  ],
)  # fmt: skip
def test_an_address_that_is_none_is_refused(url):
  with pytest.raises(ValueError, match=r"^field: expected an? "):
    chat.check_url(url, "field")


@pytest.mark.parametrize(
  "url",
  [
    "http://me:hunter2@127.0.0.1/v1", "http://hunter2@127.0.0.1/v1", "http://a b:hunter2@c/",
    "https://me:hunt@er/hunter2@a/v1", "http://a/v1?api_key=hunter2", "http://a/v1?key=hunter2",
    "http://a/v1?x=1&access_token=hunter2", "http://a/v1?Password=hunter2", "http://a/v1?q=hunter2",
    "http://a/hunter2/v1", "http://a/v1?sig=hunter2", "http://a/v1?%6bey=hunter2",
  ],
)  # fmt: skip
def test_a_password_in_the_address_is_refused_and_not_shown(monkeypatch, url):
  monkeypatch.setenv(chat.KEY, "hunter2")
  with pytest.raises(ValueError, match=r"^field: expected") as raised:
    chat.check_url(url, "field")
  if "/hunter2/" not in url:
    assert "hunter2" not in str(raised.value)


@pytest.mark.parametrize(
  "url", ["https://a.example/v1?api-version=2025-01-01", "http://[::1]:8/v1"]
)
def test_other_addresses_are_taken(serve, url):
  assert serve(url=url)[1].http.url == url


@pytest.mark.parametrize("key", ["sk-very\n", "sk-very\r", "sk-\nvery", "sk-věry", "sk very", "…"])
def test_a_key_that_no_header_can_carry_is_refused_and_not_shown(serve, monkeypatch, key):
  _, config = serve()
  monkeypatch.setenv(chat.KEY, key)
  for attempt in (serve, lambda: ask(config, "text")):
    with pytest.raises(ValueError, match=f"^{chat.KEY}: expected .* Set it again") as raised:
      attempt()
    assert "sk" not in str(raised.value)


def test_nobody_there_is_one_line_at_once(serve):
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  for url in (f"http://127.0.0.1:{port}/v1", "http://no.such.host.invalid/v1", "http://a..b/v1"):
    _, config = serve(url=url, backoff=60.0)
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"judge.* cannot be (reached|asked).*") as raised:
      verdict_of(config, compiled=False)
    assert "\n" not in str(raised.value)
    assert time.monotonic() - start < 10


def test_the_key_is_not_told_on(serve, monkeypatch, tmp_path, caplog):
  monkeypatch.setenv(chat.KEY, 'sk-"very"-secret')
  with_key = says('A sk-"very"-secret')
  _, config = serve(lambda text, times: (200, with_key) if "cat" in text else (400, with_key))
  with pytest.raises(ValueError, match="gave no readable answer: of 12") as raised:
    verdict_of(config, compiled=False, folder=tmp_path, finish=True)
  _, config = serve(lambda text, times: (200, says("A", echo='sk-"very"-secret')))
  verdict_of(config, compiled=False, folder=tmp_path)
  kept = b"".join(path.read_bytes() for path in tmp_path.iterdir())
  assert b"<key>" in kept
  assert "<key>" in str(raised.value)
  for place in (kept.decode("latin1"), caplog.text, str(raised.value)):
    assert "secret" not in place


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
  with pytest.raises(ValueError, match=r"judges.judge.answers: expected neither to begin with"):
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


def one_order(text):
  """Whether a question is about the first and the last of TEXTS, in one of the two orders."""
  first, last = (text.find(x) for x in (TEXTS[0], TEXTS[2]))
  return first > last >= 0


@pytest.mark.parametrize(
  ("reply", "metric", "message", "compiled"),
  [
    ((400, error("too long", code="context_length_exceeded")), "refused", "400 .*too long", True),
    ((200, says("Neither", finish_reason="length")), "neither", "'Neither' .*'length'", False),
    ((503, "busy"), "unanswered", "503 .*busy", False),
  ],
)
def test_a_lost_question_costs_its_pair_and_is_counted(
  serve, caplog, reply, metric, message, compiled
):
  _, config = serve(lambda text, times: reply if one_order(text) else None, retries=0)
  verdict = verdict_of(config, compiled, finish=True)
  expected = ~np.eye(3, dtype=bool)
  expected[0, 2] = expected[2, 0] = False
  np.testing.assert_array_equal(verdict.valid, np.broadcast_to(expected, (2, 3, 3)))
  shares = {name: float(verdict.metrics[name].value()) for name in http_judge.LOST.values()}
  wanted = dict.fromkeys(shares, 0.0) | {metric: 2 / 12}
  np.testing.assert_allclose(list(shares.values()), list(wanted.values()))
  lines = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
  assert len(lines) == 2, "once when it happens, once at the end"
  assert all(re.search(message, line) for line in lines)
  assert "of 12 questions, 2 " in lines[1]


@pytest.mark.parametrize(
  ("reply", "message"),
  [
    ((200, says("", finish_reason="length")), r"12 answered neither A nor B.*'' .*'length'"),
    ((200, says("I cannot")), "12 answered neither A nor B.*I cannot"),
    ((200, "[3]"), r"12 answered neither A nor B, such as: \[3\]"),
    ((200, error("no provider")), r"12 no reply.*an error \('no provider'\)"),
    ((400, error("no such parameter")), "12 refused.*no such parameter"),
    ((500, "out of order"), "12 no reply.*500.*out of order"),
    ((200, "hello"), "12 no reply.*no JSON: 'hello'"),
  ],
)
def test_nothing_that_can_be_read_is_an_error_with_counts_and_an_example(serve, reply, message):
  _, config = serve(lambda text, times: reply, retries=0)
  with pytest.raises(ValueError, match=f"of 12 questions, {message}") as raised:
    verdict_of(config, compiled=False, finish=True)
  assert "\n" not in str(raised.value)


def test_one_order_of_each_pair_is_no_comparison(serve):
  def spoil(text, times):
    a, b = re.search(r"Reply A:\n(.*)\n\nReply B:\n(.*)\n\nWhich", text, re.S).groups()
    return (200, says("A" if a < b else "Hm"))

  _, config = serve(spoil)
  message = "answered both orders of no pair: of 12 questions, 6 answered neither A nor B"
  with pytest.raises(ValueError, match=message):
    verdict_of(config, compiled=False, finish=True)


def test_the_first_questions_tell_whether_answers_can_be_read(serve):
  server, config = serve(lambda text, times: (200, says("Hm")))
  survey = http_judge._Survey(config)
  with pytest.raises(ValueError, match="of 32 questions, 32 answered neither A nor B"):
    survey.ask([f"question {i}" for i in range(500)])
  assert server.asked.total() == 32


def test_a_server_that_goes_away_ends_the_run(serve, tmp_path):
  gone = False
  server, config = serve(lambda text, times: (503, "gone") if gone else (200, says("A")), retries=1)
  client = chat.Chat(config.http)
  client.keep_in(tmp_path / "kept")
  client.complete(["first"])
  gone = True
  message = r"no reply to 32 requests in a row, each tried 2 times; the last: .*503.*gone"
  with pytest.raises(ValueError, match=message):
    client.complete([f"text {i}" for i in range(500)])
  assert server.asked.total() < 100
  gone = False
  assert client.complete(["second"])["second"].kind == "answered"


@pytest.mark.parametrize("compiled", [True, False])
def test_answers_are_kept_and_not_paid_for_twice(serve, tmp_path, monkeypatch, compiled):
  monkeypatch.setenv(chat.KEY, "sk-very-secret")
  server, config = serve(lambda text, times: (200, says("Hm")) if one_order(text) else None)
  once = verdict_of(config, compiled, tmp_path)
  assert server.asked.total() == 12
  monkeypatch.setenv(chat.KEY, "another")
  again = verdict_of(config, compiled, tmp_path)
  assert server.asked.total() == 12, "nothing is asked twice, neither what was no answer"
  jax.tree.map(np.testing.assert_array_equal, once, again)
  assert [path.name for path in tmp_path.iterdir()] == [http_judge.KEPT]
  assert b"secret" not in (tmp_path / http_judge.KEPT).read_bytes()
  config = config.copy_and_resolve_references()
  config.http.model = "another"
  verdict_of(config, compiled, tmp_path)
  assert server.asked.total() == 24, "another model has answers of its own"


def test_what_made_no_sense_is_asked_for_again(serve, tmp_path):
  good = False
  server, config = serve(lambda text, times: None if good else (200, says("Hm")))
  with pytest.raises(ValueError, match="12 answered neither"):
    verdict_of(config, compiled=False, folder=tmp_path, finish=True)
  good = True
  assert verdict_of(config, False, tmp_path, finish=True).valid.sum() == 12
  assert server.asked.total() == 24


def test_answers_survive_a_kill_in_their_middle(serve, tmp_path):
  """What was answered before an error, here the 8th question's, is in the file already."""
  answered = []

  def spoil(text, times):
    if len(answered) >= 7 and not over:
      return 401, error("key expired")
    answered.append(text)
    return None

  over = False
  server, config = serve(spoil, workers=1)
  with pytest.raises(ValueError, match="key expired"):
    verdict_of(config, compiled=False, folder=tmp_path)
  over = True
  verdict_of(config, compiled=False, folder=tmp_path)
  assert server.asked.total() == 12 + 1
  assert len(set(answered)) == len(answered) == 12


@pytest.mark.slow
def test_kept_answers_survive_kills(tmp_path):
  """A process that keeps answers and says so is killed four times: what it said is there."""
  path = tmp_path / "kept"
  code = (
    "import itertools, pathlib, sys; from nash_jax.judges import chat\n"
    f"kept, first = chat._Kept(pathlib.Path({str(path)!r})), int(sys.argv[1])\n"
    "for i in itertools.count(first):\n"
    "  kept.put(str(i), str(i)); print(i, flush=True)"
  )
  last, environment = -1, {**os.environ, "PYTHONPATH": str(ROOT)}
  for kill in range(4):
    command = [sys.executable, "-c", code, str(last + 1)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
      said = [process.stdout.readline() for _ in range(20 + kill)]
      process.kill()
      said += process.stdout.read().splitlines()
    last = int([line for line in said if line.strip()][-1])
  kept = chat._Kept(path)
  assert [kept.get(str(i)) for i in range(last + 1)] == list(range(last + 1))
  assert kept._run("PRAGMA integrity_check") == [("ok",)]


def test_damaged_answers_are_asked_for_and_a_damaged_file_is_named(serve, tmp_path):
  server, config = serve()
  verdict_of(config, compiled=False, folder=tmp_path)
  data = sqlite3.connect(tmp_path / http_judge.KEPT)
  data.execute("UPDATE answers SET reply = substr(reply, 1, 9) WHERE rowid < 5")
  data.commit()
  data.close()
  assert verdict_of(config, compiled=False, folder=tmp_path).valid.sum() == 12
  assert server.asked.total() == 12 + 4
  (tmp_path / http_judge.KEPT).write_bytes(b"no database" * 100)
  with pytest.raises(ValueError, match=rf"{http_judge.KEPT}: expected a file .*not a database"):
    verdict_of(config, compiled=False, folder=tmp_path)
  (tmp_path / http_judge.KEPT).unlink()
  (tmp_path / http_judge.KEPT).mkdir()
  with pytest.raises(ValueError, match=f"{http_judge.KEPT}: expected a file"):
    verdict_of(config, compiled=False, folder=tmp_path)


def test_a_full_disk_is_one_line(serve, tmp_path):
  _, config = serve(lambda text, times: (200, says("A" * 9000)))
  client = chat.Chat(config.http)
  client.keep_in(tmp_path / "kept")
  client._kept._data.execute("PRAGMA max_page_count = 8")
  with pytest.raises(ValueError, match=r"kept: expected a file .* disk is full.*Make room"):
    client.complete([f"text {i}" for i in range(20)])


@pytest.mark.parametrize("proxy", ["nonsense://x", "socks9://a:1"])
def test_a_proxy_that_is_none_is_one_line(serve, monkeypatch, proxy):
  _, config = serve()
  monkeypatch.setenv("ALL_PROXY", proxy)
  with pytest.raises(ValueError, match=r"^HTTP_PROXY, HTTPS_PROXY or ALL_PROXY cannot be used"):
    ask(config, "text")


def test_one_file_serves_several_at_once(serve, tmp_path):
  server, config = serve()
  clients = [chat.Chat(config.http) for _ in range(3)]
  results = [None] * 3

  def work(i):
    clients[i].keep_in(tmp_path / "kept")
    results[i] = clients[i].complete([f"text {k}" for k in range(40)])

  threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert results[0] == results[1] == results[2]
  assert len(results[0]) == 40
  before = server.asked.total()
  clients[0].complete([f"text {k}" for k in range(40)])
  assert server.asked.total() == before


def test_ctrl_c_ends_the_requests_under_way(serve):
  """Those on their way, those that wait for a retry, and those that wait for their turn."""
  asked = threading.Event()

  def spoil(text, times):
    asked.set()
    time.sleep(0 if "cat" in text else 1.5)
    return 503, "", {"Retry-After": "60"}

  server, config = serve(spoil, retries=20)

  def press():
    asked.wait()
    time.sleep(0.2)
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

  threading.Thread(target=press).start()
  start = time.monotonic()
  with pytest.raises(KeyboardInterrupt):
    verdict_of(config, compiled=False)
  assert time.monotonic() - start < 5
  assert server.asked.total() <= config.http.workers


def test_a_notebook_that_runs_a_loop_may_ask(serve):
  _, config = serve()

  async def cell():
    return verdict_of(config, compiled=False)

  assert asyncio.run(cell()).valid.sum() == 12


def test_no_line_is_logged_for_a_request(serve, caplog):
  _, config = serve()
  with caplog.at_level("INFO"):
    ask(config, "text")
  assert not caplog.records


def test_half_a_surrogate_pair_is_sent(serve):
  server, config = serve()
  ask(config, "a \ud83d b")
  assert server.seen[0]["messages"][0]["content"] == "a \ud83d b"


files = test_arena.files  # two random policies, and prompts


def arena_config(files, server, policies=("base", "twin")):
  config = test_arena.small(files)
  config.policies = {name: {**config.policies[name]} for name in policies}
  config.max_prompts, config.prompts.batch_size, config.texts = 3, 2, 0
  judge = nash_jax.config.arena().judges.judge
  judge.update({"name": "http", "template": "gemma"})
  judge.http.update({"model": "m", "backoff": 0.0, "retries": 0})
  judge.http.url = f"http://127.0.0.1:{server.server_port}/v1/chat/completions"
  config.judges = {"judge": judge}
  return config


class Digits:
  """Stands for a policy and its held-out prompts: random words, and no log-probabilities."""

  def __init__(self, tokenizer):
    self.words = np.array([tokenizer.encode(word)[0] for word in ("cat", "dog", "ball", "saw")])

  def all(self, indices):
    indices = np.asarray(indices)
    tokens = self.words[np.stack([indices // 4, indices % 4], axis=1)]
    return Prompts(tokens, np.ones(tokens.shape, bool), indices)

  def make_sampler(self, samples):
    def sample(params, prompts, key):
      shape = (len(prompts.tokens), samples, 6)
      tokens = jnp.asarray(self.words)[jax.random.randint(key, shape, 0, 4)]
      zeros = jnp.zeros(shape)
      return Responses(tokens, jnp.ones(shape, bool), zeros, zeros, jnp.ones(shape[:2], bool))

    return sample

  def logprobs(self, params, prompts, tokens, mask):
    return jnp.zeros(tokens.shape), jnp.zeros(tokens.shape)


def test_an_arena_pays_for_no_filler(serve):
  """Three prompts in batches of two: a fourth is not asked about."""
  server, config = serve(lambda text, times: (200, says("A" if len(text) % 2 else "B.")))
  tokenizer = Tokenizer(BUNDLED, "plain")
  setting = nash_jax.config.arena()  # base, and the best of 4 of it
  setting.prompts.batch_size, setting.select_judge = 2, "judge"
  policy, judge = Digits(tokenizer), judges.make(config, tokenizer)
  params = dict.fromkeys(setting.policies, jnp.zeros(()))
  judged = arena._sample_and_judge(setting, policy, 3, params, {"judge": judge}, policy)
  # A prompt: the best of 4 for each of 2 samples, 6 pairs each; then 6 pairs of the 4 responses,
  # of which some were compared already.
  assert 2 * (2 * 6 + 6) * 2 < server.asked.total() <= 3 * (2 * 6 + 6) * 2
  assert set(server.asked.values()) == {1}
  verdict = judged.verdicts["judge"]
  np.testing.assert_array_equal(verdict.valid, np.broadcast_to(~np.eye(4, dtype=bool), (3, 4, 4)))
  assert verdict.metrics["valid"].weight == 3 * 6, "and counts no filler"


@pytest.mark.slow
def test_an_arena_whose_server_also_picks_the_best_pays_for_nothing_twice(serve, files, tmp_path):
  server, _ = serve(lambda text, times: (200, says("A" if len(text) % 2 else "B.")))
  config = arena_config(files, server, ("base", "best_of_4"))
  result = arena.run(config, tmp_path)
  # A prompt: the best of 4 for each of 2 samples, 6 pairs each; then 6 pairs of the 4 responses.
  asked = server.asked.total()
  assert 2 * (2 * 6 + 6) * 2 < asked <= 3 * (2 * 6 + 6) * 2
  assert set(server.asked.values()) == {1}
  assert arena.run(config, tmp_path) == result
  assert server.asked.total() == asked


def start_arena(workdir, port, *arguments):
  """Starts the command on bundled policies that a server on this port judges."""
  flags = ("name=http", "template=gemma", "http.model=x", "http.retries=0")
  flags += (f"http.url=http://127.0.0.1:{port}/v1/chat/completions", *arguments)
  return subprocess.Popen(
    [
      *(sys.executable, "-c", "from nash_jax import main; main.run()", "arena"),
      "--config=configs/arena.py:other=assets:stories/policy.safetensors",
      *(f"--config.judges.judge.{flag}" for flag in flags),
      *("--config.select_judge=population", "--config.max_prompts=2"),
      *("--config.sampling.max_tokens=8", f"--workdir={workdir}"),
    ],
    cwd=ROOT,
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    env={**os.environ, "PYTHONPATH": str(ROOT)},
  )


@pytest.mark.slow
@pytest.mark.parametrize(
  ("reply", "message"),
  [
    (
      (400, error("max_tokens is not supported, use max_completion_tokens")),
      "32 refused, such as: answered 400 Bad Request ('max_tokens is not supported, use",
    ),
    (
      (200, says("", finish_reason="length")),
      "32 answered neither A nor B, such as: '' (finish_reason 'length')",
    ),
    ((401, error("Incorrect API key")), "answered 401 Unauthorized ('Incorrect API key'): check"),
    (None, "cannot be reached (ConnectError: "),
  ],
)
def test_the_command_ends_with_one_line_of_what_the_server_said(serve, tmp_path, reply, message):
  server, _ = serve(lambda text, times: reply)
  port = server.server_port
  if reply is None:
    server.shutdown()
    server.server_close()
  process = start_arena(tmp_path, port)
  _, errors = process.communicate()
  assert process.returncode == 2, errors
  assert "Traceback" not in errors
  last = errors.splitlines()[-1]
  assert last.startswith("nash-jax arena: the judge at http://127.0.0.1:")
  assert message in last
  assert not (tmp_path / "arena.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_an_arena_whose_server_is_silent(serve, tmp_path, number):
  asked, ended = threading.Event(), threading.Event()

  def spoil(text, times):
    asked.set()
    ended.wait(600)
    return 200, says("A")

  server, _ = serve(spoil)
  process = start_arena(tmp_path, server.server_port, "http.timeout=600")
  try:
    assert asked.wait(300)
    process.send_signal(number)
    process.communicate(timeout=60)  # of which a busy machine takes ten seconds to leave Python
  finally:
    process.kill()
    ended.set()
  assert process.returncode == {signal.SIGINT: 130}.get(number, -number)

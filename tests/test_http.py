"""A judge behind a server: what is asked and read, what is tried again, what weighs nothing."""

import collections
import contextlib
import http.server
import json
import math
import re
import threading
import time
import types

import jax
import numpy as np
import pytest
from jax import numpy as jnp

import nash_jax
from nash_jax import judges
from nash_jax.config import describe, resolve
from nash_jax.data.tokenizer import BUNDLED, Tokenizer
from nash_jax.judges import http as http_judge
from nash_jax.types import Prompts, Responses

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
  """Prefers the longer reply; `spoil` may answer instead: (text, times asked) -> (status, body)."""

  daemon_threads = True

  def __init__(self, spoil):
    super().__init__(("127.0.0.1", 0), Handler)
    self.spoil, self.lock = spoil, threading.Lock()
    self.asked, self.seen = collections.Counter(), []
    self.now, self.most = 0, 0

  def reply(self, body):
    text = body["messages"][0]["content"]
    with self.lock:
      self.asked[text] += 1
      self.seen.append(body)
      self.now += 1
      self.most = max(self.most, self.now)
    time.sleep(0.02)
    with self.lock:
      self.now -= 1
    if spoilt := self.spoil(text, self.asked[text]):
      return spoilt
    a, b = re.search(r"Reply A:\n(.*)\n\nReply B:\n(.*)\n\nWhich", text, re.S).groups()
    return 200, json.dumps(reply_of(1 / (1 + math.exp(-BIAS - (len(a) - len(b)) / 10))))


class Handler(http.server.BaseHTTPRequestHandler):
  def do_POST(self):
    body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
    status, text = self.server.reply({**body, "key": self.headers["Authorization"]})
    with contextlib.suppress(ConnectionError):  # whoever asked may have given up
      self.send_response(status)
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


TEXTS = (" ran.", " saw a big red ball and was happy.", " sat down to eat.")


def verdict_of(config):
  """What the judge says of three responses to each of two prompts, under jit, as in the arena."""
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
  return jax.jit(judge.fn)(judge.params, Prompts(x, x > 0, np.arange(2)), y, None)


def test_both_orders_are_asked_at_once_and_averaged(serve, monkeypatch):
  monkeypatch.setenv(http_judge.KEY, "secret")
  server, config = serve()
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
  waits = []
  monkeypatch.setattr(http_judge, "time", types.SimpleNamespace(sleep=waits.append))
  np.testing.assert_allclose(http_judge.ask(config, text), 1 / (1 + math.exp(-BIAS)))
  assert (server.asked[text], waits) == (4, [0.01, 0.02, 0.04])
  server, config = serve(spoil, timeout=0.25, retries=2)
  assert math.isnan(http_judge.ask(config, text))
  assert server.asked[text] == 3


def test_a_request_that_is_refused_says_what_to_check(serve):
  server, config = serve(lambda text, times: (401, ""))
  with pytest.raises(ValueError, match=r"answered 401 .*model, and the environment variable NASH"):
    http_judge.ask(config, "text")
  assert server.asked["text"] == 1
  with pytest.raises(jax.errors.JaxRuntimeError, match=r"answered 401 .*check judge.http.url"):
    jax.block_until_ready(verdict_of(config))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"model": ""}, "http.model: expected a name"),
    ({"url": "file:///x"}, "http.url: expected an"),
    ({"timeout": 0.0}, "http.timeout: expected a number in .*, got"),
    ({"workers": 0}, "http.workers"),
  ],
)
def test_bad_settings_of_a_server_are_refused(serve, changes, message):
  with pytest.raises(ValueError, match=message):
    serve(**changes)

"""A server on this machine that judges: what it answers, and what a judge makes of that."""

import asyncio
import collections
import contextlib
import http.server
import json
import math
import re
import threading
import time

import jax
import numpy as np

import nash_jax
from nash_jax import judges
from nash_jax.config import resolve
from nash_jax.data.tokenizer import BUNDLED, Tokenizer
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


@contextlib.contextmanager
def serving():
  """Gives a function that starts a server, and returns it with the config of a judge for it."""
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


def waits_of(monkeypatch):
  """Returns the list of the seconds that are slept between two trials, without sleeping."""
  waits, sleep = [], asyncio.sleep

  async def note(seconds):
    waits.append(seconds)
    await sleep(0)

  monkeypatch.setattr(asyncio, "sleep", note)
  return waits


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


def one_order(text):
  """Whether a question is about the first and the last of TEXTS, in one of the two orders."""
  first, last = (text.find(x) for x in (TEXTS[0], TEXTS[2]))
  return first > last >= 0

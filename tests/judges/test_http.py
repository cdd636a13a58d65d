"""A judge behind a server: what is asked, and the address and key it is asked with."""

import asyncio
import json
import signal
import socket
import threading
import time

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from judge_server import BIAS, TEXTS, ask, one_order, says, verdict_of

from nash_jax.config import describe
from nash_jax.judges import chat
from nash_jax.judges import http as http_judge


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
    return (200, json.dumps(next(replies))) if one_order(text) else None

  server, config = serve(spoil)
  verdict = verdict_of(config)
  expected = ~np.eye(3, dtype=bool)
  expected[0, 2] = expected[2, 0] = False
  np.testing.assert_array_equal(verdict.valid, np.broadcast_to(expected, (2, 3, 3)))
  np.testing.assert_array_equal(verdict.p_win[:, 0, 2], 0.5)
  np.testing.assert_allclose(verdict.metrics["valid"].value(), 2 / 3, rtol=1e-6)
  assert verdict.metrics["flip_rate"].weight == verdict.metrics["tie_mass"].weight == 4
  assert set(server.asked.values()) == {1}  # an answer that is an answer is not asked for again


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


@pytest.mark.parametrize("proxy", ["nonsense://x", "socks9://a:1"])
def test_a_proxy_that_is_none_is_one_line(serve, monkeypatch, proxy):
  _, config = serve()
  monkeypatch.setenv("ALL_PROXY", proxy)
  with pytest.raises(ValueError, match=r"^HTTP_PROXY, HTTPS_PROXY or ALL_PROXY cannot be used"):
    ask(config, "text")


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

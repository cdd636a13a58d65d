"""Requests chat completions from an OpenAI-compatible server, with retries and a cache on disk."""

import email.utils
import hashlib
import http.client
import json
import logging as standard_logging
import os
import pathlib
import re
import sqlite3
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import anyio
import anyio.from_thread
import httpx
import tenacity
from absl import logging

from nash_jax.validation import require

KEY = "NASH_JAX_JUDGE_KEY"  # environment variable with the server's key; unset: no key is sent
MAX_BYTES = 1 << 20  # of a reply; a one-token answer takes about a thousand
GIVE_UP = 32  # after so many requests in a row without a reply, retries included, the run ends
PASSING = (408, 409, 425, 429)  # statuses worth a retry, besides 5xx
OWN_FAULT = (400, 413, 422, 451)  # statuses that concern one request, not all of them
# Parameters that some servers refuse, and that can be left out or renamed.
OPTIONAL = ("max_tokens", "temperature", "logprobs", "top_logprobs")
_UNSUPPORTED = re.compile(
  r"support|unknown|unrecogni[sz]ed|unexpected|extra|deprecated|max_completion_tokens"
  r"|not (?:permitted|allowed|enabled|available)|unavailable|only the default",
  re.IGNORECASE,
)
_SECRET = re.compile(r"key|token|secret|passw|sig$|signature|auth|credential|^code$", re.IGNORECASE)


class Outcome(NamedTuple):
  """The outcome of a request.

  Attributes:
    kind: "answered", "refused" (the server refuses this request) or "missing" (no reply).
    reply: the JSON of an answer.
    message: for other kinds, the server's message or what went wrong.
  """

  kind: str
  reply: Any = None
  message: str = ""


class _Passing(Exception):
  """A failure worth a retry; the server asks to wait for `seconds`."""

  def __init__(self, message: str, seconds: float = 0.0):
    super().__init__(message)
    self.seconds = seconds


class _Refusal(Exception):
  """The server refuses this one request."""


def read_key() -> str:
  """Returns the server's key from the environment, or "".

  Raises:
    ValueError: the key cannot be sent in a header; the message does not show it.
  """
  key = os.environ.get(KEY, "")
  bad = {"a line break" if c in "\r\n" else repr(c) for c in re.findall(r"[^!-~]", key)}
  expected = "a key of printable ASCII characters without spaces"
  got = f"one with {', '.join(sorted(bad))} in it"
  if bad:
    raise ValueError(f"{KEY}: expected {expected}, got {got}. Set it again, without that.")
  return key


def check_url(url: str, field: str) -> None:
  """Raises ValueError unless `url` is a server's address without secrets, since records keep it.

  The error names `field` and does not show a password.
  """
  shown = re.sub(r"\?.*", "?…", re.sub(r".*@", "…@", url, flags=re.DOTALL), flags=re.DOTALL)
  expected, fix = "an http(s) address", "Such as http://127.0.0.1:8000/v1/chat/completions."
  require(url.isprintable() and " " not in url, field, f"{expected} without spaces", shown, fix)
  try:
    parts = httpx.URL(url)
  except httpx.InvalidURL as error:
    why = "" if "@" in url else f" ({error})"
    raise ValueError(f"{field}: expected {expected}, got {shown!r}{why}. {fix}") from None
  good = parts.scheme in ("http", "https") and bool(parts.host)
  require(good, field, expected, shown, fix)
  port = 80 if parts.port is None else parts.port
  require(0 < port < 1 << 16, field, "an address with a port from 1 to 65535", shown, fix)
  secret = bool(parts.userinfo) or any(_SECRET.search(name) for name in parts.params)
  secret |= (os.environ.get(KEY) or None) in (*parts.params.values(), *parts.path.split("/"))
  fix = f"Give the key in the environment variable {KEY}: addresses are written to files."
  require(not secret, field, "an address without a password or key", shown, fix)


class Chat:
  """Asks a server, and caches answers by server, model and request.

  Args:
    settings: `judge.http` of a config.

  Raises:
    ValueError: an unusable address or key.
  """

  def __init__(self, settings):
    check_url(settings.url, "judge.http.url")
    self._settings, self._key, self._kept = settings, read_key(), _Kept(None)
    standard_logging.getLogger("httpx").setLevel(standard_logging.WARNING)  # it logs every request
    url = httpx.URL(settings.url)
    self.url = str(url.copy_with(query=None, fragment=None))
    self._server = url.netloc.decode() + url.path
    self._without: frozenset[str] = frozenset()  # parameters of OPTIONAL that this server refuses
    self._reached, self._missed = False, 0

  def keep_in(self, path: pathlib.Path) -> None:
    """Uses this file as the cache; without it, answers are kept only in memory."""
    self._kept.close()
    self._kept = _Kept(path)

  def complete(self, texts: list[str]) -> dict[str, Outcome]:
    """Returns {text: outcome of its request}; equal texts are sent once.

    Raises:
      ValueError: a wrong address, key or model, a redirect, or GIVE_UP requests without a reply.
    """
    keys = {text: self._request_key(text) for text in dict.fromkeys(texts)}
    kept = {text: self._kept.get(key) for text, key in keys.items()}
    outcomes = {text: Outcome("answered", x) for text, x in kept.items() if x is not None}
    if unknown := [text for text in keys if text not in outcomes]:
      # With the event loop in its own thread, Ctrl-C cancels requests in progress, and it also
      # works in a notebook, which already has an event loop.
      with anyio.from_thread.start_blocking_portal() as portal:
        outcomes |= portal.call(self._complete, unknown)
    return outcomes

  def forget(self, texts: list[str]) -> None:
    """Removes the answers to these texts from the cache."""
    self._kept.remove([self._request_key(text) for text in texts])

  def close(self) -> None:
    self._kept.close()

  def clean(self, text: str, most: int = 300) -> str:
    """Returns a server's message as one line of at most `most` characters, without our key."""
    text = " ".join("".join(c if c.isprintable() else " " for c in self._redact(text)).split())
    return text if len(text) <= most else text[: most - 1] + "…"

  async def _complete(self, texts: list[str]) -> dict[str, Outcome]:
    outcomes: dict[str, Outcome] = {}

    async def work(client: httpx.AsyncClient, waiting: Iterator[str]) -> None:
      for text in waiting:
        outcomes[text] = await self._ask(client, text)

    waiting = iter(texts)
    async with self._client() as client:
      if not self._reached:  # one request reveals what is wrong with all of them
        first = next(waiting)
        outcomes[first] = await self._ask(client, first)
      try:
        async with anyio.create_task_group() as group:
          for _ in range(min(self._settings.workers, len(texts))):
            group.start_soon(work, client, waiting)
      except BaseExceptionGroup as error:
        raise error.exceptions[0] from None
    return outcomes

  def _client(self) -> httpx.AsyncClient:
    headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
    if self._key:
      headers["Authorization"] = f"Bearer {self._key}"
    limits = httpx.Limits(max_connections=self._settings.workers)
    # timeout=None, because httpx's timeouts are per read; _post has one for the whole request.
    options: dict[str, Any] = {"headers": headers, "limits": limits, "timeout": None}
    options["verify"] = self.url.startswith("https")  # don't load certificates without need
    try:
      return httpx.AsyncClient(follow_redirects=False, **options)
    except (ValueError, ImportError, httpx.InvalidURL) as error:
      raise ValueError(f"HTTP_PROXY, HTTPS_PROXY or ALL_PROXY cannot be used: {error}") from None

  async def _ask(self, client: httpx.AsyncClient, text: str) -> Outcome:
    retrying = tenacity.AsyncRetrying(
      stop=tenacity.stop_after_attempt(self._settings.retries + 1),
      wait=self._wait,
      retry=tenacity.retry_if_exception_type(_Passing),
      reraise=True,
    )
    try:
      reply: Any = await retrying(self._send, client, text)
    except _Passing as error:
      self._missed += 1
      if self._missed >= GIVE_UP:
        raise ValueError(
          f"the judge at {self.url} gave no reply to {GIVE_UP} requests in a row, each tried "
          f"{self._settings.retries + 1} times; the last: {error}. Answers so far are kept: the"
          " same command resumes from there once the server replies again."
        ) from None
      return Outcome("missing", message=str(error))
    except _Refusal as error:
      self._missed = 0
      return Outcome("refused", message=str(error))
    self._missed = 0
    if isinstance(reply, dict) and isinstance(choices := reply.get("choices"), list) and choices:
      text_kept = json.dumps({"choices": choices[:1]})
      self._kept.put(self._request_key(text), self._redact(text_kept))
    return Outcome("answered", reply)

  def _redact(self, text: str) -> str:
    for key in {self._key, json.dumps(self._key)[1:-1]}:  # plain, and as in JSON
      text = text.replace(key, "<key>") if len(key) > 5 else text  # "EMPTY" is no secret
    return text

  def _wait(self, state: tenacity.RetryCallState) -> float:
    """Returns the seconds before the next retry: doubling, or what the server asks for."""
    doubling = tenacity.wait_exponential(multiplier=self._settings.backoff)
    backoff = doubling(state) if self._settings.backoff else 0.0
    error = state.outcome.exception() if state.outcome else None
    asked = error.seconds if isinstance(error, _Passing) else 0.0
    return min(max(backoff, asked), self._settings.timeout)

  async def _send(self, client: httpx.AsyncClient, text: str) -> Any:
    body = self._body(text, self._without)
    reply, data = await self._post(client, body)
    status = reply.status_code
    if 200 <= status < 300:
      if len(data) > MAX_BYTES:
        raise _Refusal(f"answered with more than {MAX_BYTES} bytes")
      return self._parsed(data)
    raw = data[:9999].decode(errors="replace")
    reason = http.client.responses.get(status, "of no known kind")
    said = f"answered {status} {reason} ({self.clean(_message(raw))!r})"
    if status in (400, 403, 422):
      self._learn(raw)
      if self._body(text, self._without) != body:
        return await self._send(client, text)
    if (status in PASSING or status >= 500) and "insufficient_quota" not in raw:
      raise _Passing(said, _retry_after(reply.headers.get("Retry-After", "")))
    if status in OWN_FAULT:
      raise _Refusal(said)
    if 300 <= status < 400:
      where = self.clean(reply.headers.get("Location", "nowhere"))
      raise ValueError(
        f"the judge at {self.url} answered {status} {reason} to {where!r}: redirects are"
        " not followed, because they would get the key. Set judge.http.url to the final address."
      )
    raise ValueError(
      f"the judge at {self.url} {said}: check judge.http.url and model, and the environment "
      f"variable {KEY}; the address usually ends in /v1/chat/completions"
    )

  def _parsed(self, data: bytes) -> Any:
    try:
      reply = json.loads(data)
    except (ValueError, RecursionError):
      said = self.clean(data[:999].decode(errors="replace"), 80)
      raise _Passing(f"answered, but not in JSON: {said!r}") from None
    if isinstance(reply, dict) and reply.get("error") and not reply.get("choices"):
      # A router passes on another server's failure with its own status.
      raise _Passing(f"answered with an error ({self.clean(_message(json.dumps(reply)))!r})")
    return reply

  async def _post(self, client: httpx.AsyncClient, body) -> tuple[httpx.Response, bytes]:
    """Returns a reply and the start of its body, at most MAX_BYTES + 1 bytes."""
    url, seconds = self._settings.url, self._settings.timeout
    data, content = bytearray(), json.dumps(body).encode()
    try:
      with anyio.fail_after(seconds):
        async with client.stream("POST", url, content=content) as reply:
          self._reached = True
          async for part in reply.aiter_bytes():
            data += part
            if len(data) > MAX_BYTES:
              break
          return reply, bytes(data[: MAX_BYTES + 1])
    except TimeoutError:
      raise _Passing(f"gave no complete reply within {seconds:g} s") from None
    except (httpx.LocalProtocolError, httpx.UnsupportedProtocol, UnicodeError) as error:
      raise ValueError(f"judge.http.url: {self.url} cannot be asked: {error}") from None
    except (httpx.HTTPError, OSError) as error:
      said = self.clean(f"{type(error).__name__}: {error}")
      if isinstance(error, httpx.ConnectError | httpx.ProxyError) and not self._reached:
        raise ValueError(
          f"the judge at {self.url} cannot be reached ({said}): check judge.http.url, and that the"
          " server runs"
        ) from None
      raise _Passing(said) from None

  def _body(self, text: str, without: frozenset[str] = frozenset()) -> dict[str, Any]:
    body: dict[str, Any] = {
      "model": self._settings.model, "messages": [{"role": "user", "content": text}],
      "max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": 5,
    }  # fmt: skip
    body = {name: value for name, value in body.items() if name not in without}
    return body | ({"max_completion_tokens": 1} if "max_tokens" in without else {})

  def _learn(self, message: str) -> None:
    """Remembers which of our parameters an error message says are unsupported."""
    message = re.sub(r'"input":.*', "", message, flags=re.DOTALL)  # pydantic's echo of our request
    if not _UNSUPPORTED.search(message) or "context" in message.lower():
      return
    named = {name for name in OPTIONAL if re.search(rf"\b{name}\b", message)}
    named |= {"top_logprobs"} if "logprobs" in named else set()
    for name in sorted(named - self._without):
      instead = "with max_completion_tokens" if name == "max_tokens" else "without it"
      said = self.clean(_message(message))
      logging.warning(
        "the judge at %s refuses %s (%r): continuing %s", self.url, name, said, instead
      )
    self._without |= named

  def _request_key(self, text: str) -> str:
    request = json.dumps([self._server, self._body(text)], sort_keys=True)
    return hashlib.sha256(request.encode()).hexdigest()


class _Kept:
  """Replies by their request's checksum, in an SQLite file: safe under kills and other writers."""

  def __init__(self, path: pathlib.Path | None):
    self._path = path
    table = "CREATE TABLE IF NOT EXISTS answers (request TEXT PRIMARY KEY, reply TEXT NOT NULL)"
    try:
      # Only one thread at a time uses it, but not always the same one.
      self._data = sqlite3.connect(
        path or ":memory:", timeout=30, isolation_level=None, check_same_thread=False
      )
    except sqlite3.Error as error:
      raise self._explained(error) from None
    self._run(table)

  def get(self, request: str) -> Any:
    """Returns the reply's JSON; None if there is none, or it does not parse."""
    rows = self._run("SELECT reply FROM answers WHERE request = ?", request)
    try:
      return json.loads(rows[0][0]) if rows else None
    except (ValueError, TypeError, RecursionError):
      return None

  def put(self, request: str, reply: str) -> None:
    self._run("INSERT OR REPLACE INTO answers VALUES (?, ?)", request, reply)

  def remove(self, requests: list[str]) -> None:
    for request in requests:
      self._run("DELETE FROM answers WHERE request = ?", request)

  def close(self) -> None:
    self._data.close()

  def _run(self, statement: str, *values: str) -> list:
    try:
      return self._data.execute(statement, values).fetchall()
    except sqlite3.Error as error:
      raise self._explained(error) from None

  def _explained(self, error: sqlite3.Error) -> ValueError:
    return ValueError(
      f"{self._path}: expected a file of a judge's answers: {error}. Free some disk space, or move"
      " the file away to ask for its answers again."
    )


def _message(text: str) -> str:
  """Returns the message in an error's body if it has a usual form, otherwise the whole body."""
  try:
    body = json.loads(text)
  except (ValueError, RecursionError):
    return text
  for name in ("error", "message", "detail", "msg"):
    if isinstance(body, list) and body:
      body = body[0]
    if isinstance(body, dict) and body.get(name):
      body = body[name]
  return body if isinstance(body, str) else text


def _retry_after(value: str) -> float:
  """Returns the seconds of a Retry-After header, a number or a date; 0 if there is none."""
  try:
    seconds = float(value)
  except ValueError:
    try:
      seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
    except (ValueError, TypeError, OverflowError, OSError):
      seconds = 0.0
  return seconds if seconds > 0 else 0.0

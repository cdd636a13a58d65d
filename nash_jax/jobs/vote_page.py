"""The web server of the page on which people judge.

Every request is a transaction of the store, and the page has no state of its own. You can reload
the page or kill the server at any time.
"""

import functools
import hmac
import json
import secrets
import signal
import socket
import urllib.parse
from collections.abc import Awaitable, Callable
from typing import Any

import anyio.to_thread
import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from nash_jax.data.votes import Conflict, Store
from nash_jax.jobs.vote_statistics import statistics
from nash_jax.validation import ASSETS, require

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_COOKIE = "nash_jax_vote"
_LARGEST = 65536  # bytes of a request
_HEADERS = {
  "Cache-Control": "no-store", "Referrer-Policy": "no-referrer", "X-Frame-Options": "DENY",
  "X-Content-Type-Options": "nosniff",
}  # fmt: skip
_POLICY = (
  "default-src 'none'; script-src 'nonce-{0}'; style-src 'nonce-{0}'; connect-src 'self';"
  " img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

Said = dict[str, Any]


class _Refused(Exception):
  """A request is refused; the status says why."""

  def __init__(self, status: int, reason: str):
    super().__init__(reason)
    self.status = status


def make_app(store: Store, token: str = "") -> Starlette:
  """Returns the application.

  Args:
    token: required in every request; "" instead answers only requests to this machine's own names.
  """
  page = (ASSETS / "vote.html").read_text(encoding="utf-8")
  known: dict[str, Any] = {"version": None, "result": None}

  async def show(request: Request) -> Response:
    if token and hmac.compare_digest(
      request.query_params.get("token", "").encode(), token.encode()
    ):
      answer = RedirectResponse("/", 303)  # an address without the token
      name = f"{_COOKIE}_{request.url.port}"
      answer.set_cookie(name, token, httponly=True, samesite="lax", max_age=30 * 86400)
      return answer
    nonce = secrets.token_urlsafe(16)
    _check_token(request, token)
    headers = {"Content-Security-Policy": _POLICY.format(nonce)}
    return HTMLResponse(page.replace("NONCE", nonce), headers=headers)

  async def results(request: Request) -> Response:
    _check_token(request, token)

    def compute() -> Any:
      if (version := store.version()) != known["version"]:
        known["result"], known["version"] = statistics(store), version
      return known["result"]

    return JSONResponse(await anyio.to_thread.run_sync(compute))

  def action(do_it: Callable[[Store, int, Said], None]) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
      _check_token(request, token)
      said = await _said(request)
      return JSONResponse(
        await anyio.to_thread.run_sync(functools.partial(_act, store, do_it, said))
      )

    return answer

  routes = [Route("/", _guarded(show)), Route("/api/statistics", _guarded(results))]
  actions = {"next": lambda *_: None, "vote": _vote, "undo": _undo}
  for name, what in actions.items():
    routes.append(Route(f"/api/{name}", _guarded(action(what)), methods=["POST"]))
  # Check host names, because a foreign page may point its own name at this machine.
  hosts = ["*"] if token else [*LOOPBACK[:2], "[::1]"]
  trusted = Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)
  return Starlette(routes=routes, middleware=[trusted])


def _guarded(answer: Callable[[Request], Awaitable[Response]]) -> Callable:
  """Turns errors into JSON answers, and adds the common headers to every answer."""

  async def guarded(request: Request) -> Response:
    try:
      response = await answer(request)
    except _Refused as error:
      response = JSONResponse({"error": str(error)}, error.status)
    except Conflict as error:
      response = JSONResponse({"error": str(error)}, 409)
    except ValueError as error:
      response = JSONResponse({"error": str(error)}, 400)
    response.headers.update(_HEADERS)
    return response

  return guarded


def _check_token(request: Request, token: str) -> None:
  given = request.headers.get("authorization", "").removeprefix("Bearer ")
  given = given or request.cookies.get(f"{_COOKIE}_{request.url.port}", "")
  if token and not hmac.compare_digest(given.encode(), token.encode()):
    raise _Refused(
      401, "This page needs its token: open the whole address that nash-jax vote printed."
    )


async def _said(request: Request) -> Said:
  """Returns the JSON object in a request, which only the page itself can send."""
  origin = request.headers.get("origin")
  if origin is not None and urllib.parse.urlsplit(origin).netloc != request.headers.get("host"):
    raise _Refused(403, "a page from elsewhere may not vote")
  if request.headers.get("content-type", "").partition(";")[0] != "application/json":
    raise _Refused(415, "expected application/json")  # a foreign page's form cannot send it
  body = b""
  async for part in request.stream():
    body += part
    if len(body) > _LARGEST:
      raise _Refused(413, f"expected at most {_LARGEST} bytes")
  try:
    said = json.loads(body)
  except (ValueError, RecursionError):
    said = None
  require(isinstance(said, dict), "request", "a JSON object", body[:60], "Reload the page.")
  return said


def _field(said: Said, name: str, kind: type) -> Any:
  value: Any = said.get(name)
  good = isinstance(value, kind) and not isinstance(value, bool)
  good = good and (kind is not int or abs(value) < 2**63)
  require(good, name, kind.__name__, value, "Reload the page.")
  return value


def _vote(store: Store, annotator: int, said: Said) -> None:
  pair, left, choice = (_field(said, *x) for x in (("pair", int), ("left", int), ("choice", str)))
  store.vote(annotator, pair, left, choice)


def _undo(store: Store, annotator: int, said: Said) -> None:
  store.undo(annotator, _field(said, "pair", int))


def _act(store: Store, do_it: Callable[[Store, int, Said], None], said: Said) -> dict[str, Any]:
  """Performs the requested action, and returns what the annotator sees next."""
  name, kind = _field(said, "annotator", str), said.get("group", "")
  annotator = store.sign_in(name, kind if isinstance(kind, str) else "")
  do_it(store, annotator, said)
  question = store.question(annotator)
  return {
    "question": question and question._asdict(), "last": store.last(annotator),
    "progress": store.progress(annotator),
  }  # fmt: skip


def serve(app: Starlette, host: str, port: int, announce: Callable[[int], None]) -> None:
  """Serves until Ctrl-C, SIGTERM, or the terminal closes.

  Args:
    port: 0 takes a free one.
    announce: called with the port once it is open.

  Raises:
    ValueError: the port cannot be opened.
  """
  try:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    opened = socket.create_server((host, port), family=family, backlog=128)
  except (OSError, OverflowError) as error:
    fix = "Give --config.port=0 for a free port."
    raise ValueError(f"{host}, port {port}: cannot be opened: {error}. {fix}") from None
  settings = uvicorn.Config(
    app, log_level="warning", access_log=False, server_header=False, lifespan="off",
    timeout_graceful_shutdown=2,
  )  # fmt: skip
  server = uvicorn.Server(settings)
  before = {
    number: signal.signal(number, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP)
    if signal.getsignal(number) != signal.SIG_IGN
  }
  try:
    with opened:
      announce(opened.getsockname()[1])
      server.run(sockets=[opened])
  except KeyboardInterrupt:  # uvicorn raises it again after it has ended
    return
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)

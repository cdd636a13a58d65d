"""The page to judge on: what the server answers, whom it refuses, and how a person ends it."""

import json
import re
import signal
import threading

import pytest
from starlette.testclient import TestClient
from voting import Served, pairs

from nash_jax import config as configs
from nash_jax.config import checks
from nash_jax.data.votes import FILE, Answer, Pair, Store
from nash_jax.jobs import vote, vote_page


@pytest.fixture(scope="module")
def store(tmp_path_factory):
  store = Store(tmp_path_factory.mktemp("votes") / FILE)
  store.add(pairs(20))
  store.add([Pair("<script>alert(1)</script>", Answer("<img src=x onerror=alert(2)>"), Answer(""))])
  yield store
  store.close()


@pytest.fixture(scope="module")
def page(store):
  with TestClient(vote_page.make_app(store), base_url="http://127.0.0.1:8080") as client:
    yield client


def ask(client, action, name="ann", expected=200, **said):
  answer = client.post(f"/api/{action}", json={"annotator": name, **said})
  assert answer.status_code == expected, answer.text
  return answer.json()


def test_an_annotator_votes_goes_back_and_votes_again(page, store):
  first = ask(page, "next")
  shown = first["question"]
  assert first["last"] is None
  said = {"pair": shown["pair"], "left": shown["left_id"], "choice": "right"}
  second = ask(page, "vote", **said)
  assert second["question"]["pair"] != shown["pair"]
  assert second["last"] == shown["pair"]
  assert second["progress"]["mine"] == 1
  assert ask(page, "vote", **said) == second  # sent twice, as after a lost answer
  conflict = ask(page, "vote", expected=409, **{**said, "choice": "left"})
  assert "undo that first" in conflict["error"]
  back = ask(page, "undo", pair=shown["pair"])
  assert back["question"] == shown
  assert back["progress"]["mine"] == 0
  other = ask(page, "next", "bob")
  # What others have voted is in no answer.
  assert {*other} == {"question", "last", "progress"}
  assert {*other["question"]} == {"pair", "prompt", "left", "right", "left_id", "right_id"}


def test_everything_a_request_may_lack_is_refused_in_a_line(page):
  for said, message in (
    ({"pair": 1}, "left: expected int"), ({"pair": "1", "left": 1, "choice": "tie"}, "pair"),
    ({"pair": 10**6, "left": 1, "choice": "tie"}, "one that was shown"),
    ({"pair": 2**70, "left": 1, "choice": "tie"}, "pair: expected int"),
    ({"pair": 1, "left": 10**6, "choice": "tie"}, "a response of this pair"),
    ({"pair": 1, "left": True, "choice": "tie"}, "left: expected int"),
    ({"pair": 1, "left": 1, "choice": "both"}, "expected one of left"),
  ):  # fmt: skip
    assert message in ask(page, "vote", expected=400, **said)["error"]
  assert "1 to 40 characters" in ask(page, "next", " ", expected=400)["error"]
  headers = {"content-type": "application/json"}
  for body in (b"", b"[1]", b"{", b"\xff", b"[" * 50_000):
    assert page.post("/api/next", content=body, headers=headers).status_code == 400
  assert page.post("/api/next", content=b"x" * 70_000, headers=headers).status_code == 413
  assert page.get("/api/next").status_code == 405
  assert page.get("/votes.sqlite3").status_code == 404


def test_other_pages_and_other_names_of_this_machine_are_refused(page):
  body = json.dumps({"annotator": "ann"})
  kind = {"content-type": "application/json"}
  ours = {**kind, "origin": "http://127.0.0.1:8080"}
  assert page.post("/api/next", content=body, headers=ours).status_code == 200
  for origin in ("http://evil.example", "http://127.0.0.1:9", "null"):
    assert (
      page.post("/api/next", content=body, headers={**kind, "origin": origin}).status_code == 403
    )
  # A form of another page can send text without asking first.
  assert (
    page.post("/api/next", content=body, headers={"content-type": "text/plain"}).status_code == 415
  )
  assert page.get("/", headers={"host": "evil.example"}).status_code == 400


def test_the_page_needs_no_network_and_runs_nothing_but_its_own_script(page):
  answer = page.get("/")
  policy, text = answer.headers["content-security-policy"], answer.text
  nonce = re.search(r"script-src 'nonce-([\w-]+)'", policy)[1]
  assert policy.startswith("default-src 'none'")
  assert re.findall(r"<script[^>]*>", text) == [f'<script nonce="{nonce}">']
  assert page.get("/").text != text  # a new one for each answer
  assert not re.search(r"""(?:src|href)=["'](?!data:)|url\(|@import|https?://""", text)
  assert not re.search(r"innerHTML|insertAdjacent|document\.write|eval\(|\son\w+=", text)


def test_with_a_token_nothing_is_answered_without_it(store):
  app = vote_page.make_app(store, "secret-token-of-the-page")
  with TestClient(app, base_url="http://host:1", follow_redirects=True) as stranger:
    for answer in (
      stranger.get("/"), stranger.get("/?token=wrong"), stranger.get("/api/statistics"),
      stranger.post("/api/next", json={"annotator": "ann"}),
      stranger.get("/", headers={"authorization": "Bearer wrong"}),
      stranger.get("/?token=%C3%A9"),
    ):  # fmt: skip
      assert answer.status_code == 401
      assert "whole address" in answer.json()["error"]
  with TestClient(app, base_url="http://host:1", follow_redirects=True) as invited:
    answer = invited.get("/?token=secret-token-of-the-page")
    assert (answer.status_code, answer.url.query) == (200, b"")
    assert "secret" not in answer.text
    ask(invited, "next")
    assert invited.get("/api/statistics").status_code == 200
  bearer = {"authorization": "Bearer secret-token-of-the-page"}
  with TestClient(app, base_url="http://host:1") as script:
    assert script.get("/api/statistics", headers=bearer).status_code == 200


def test_statistics_follow_the_votes(page, store):
  before = page.get("/api/statistics").json()
  me = store.sign_in("new")
  shown = store.question(me)
  store.vote(me, shown.pair, shown.left_id, "left")
  after = page.get("/api/statistics").json()
  assert after["votes"] == before["votes"] + 1
  assert {x["name"] for x in after["annotators"]} >= {"ann", "bob", "new"}


def test_a_token_is_made_once_and_for_its_owner_alone(tmp_path):
  token = vote._token(tmp_path)
  assert vote._token(tmp_path) == token
  assert len(token) >= 20
  assert (tmp_path / vote.TOKEN).stat().st_mode & 0o077 == 0
  (tmp_path / vote.TOKEN).write_text("\n")
  with pytest.raises(ValueError, match="expected a token of 16 characters or more"):
    vote._token(tmp_path)


def test_nothing_to_judge_and_a_port_that_is_taken_are_said_in_a_line(tmp_path):
  with pytest.raises(ValueError, match=r"expected pairs to judge, got 'none'.*--from="):
    vote.run(configs.vote(), tmp_path)
  source = tmp_path / "pairs.jsonl"
  source.write_text(json.dumps({"prompt": "p", "response_a": "x", "response_b": "y"}))
  import socket

  with socket.create_server(("127.0.0.1", 0)) as taken:
    c = configs.vote()
    c.source, c.port = str(source), taken.getsockname()[1]
    with pytest.raises(ValueError, match=r"cannot be opened: .*--config.port=0"):
      vote.run(c, tmp_path)


def test_without_its_packages_the_page_says_what_to_install(monkeypatch):
  monkeypatch.setattr(checks, "_is_installed", lambda name: name != "uvicorn")
  c = configs.vote()
  with pytest.raises(
    ValueError, match=r"the package uvicorn to be installed, .*pip install uvicorn"
  ):
    configs.resolve(c)
  c.export = "votes.jsonl"
  assert configs.resolve(c).export


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_cleanly_with_what_the_votes_say(tmp_path, number):
  source = tmp_path / "pairs.jsonl"
  source.write_text(json.dumps({"prompt": "p", "response_a": "x", "response_b": "y"}))
  served = Served(tmp_path / "out", f"--from={source}")
  shown = served.ask("next", annotator="ann")["question"]
  served.ask("vote", annotator="ann", pair=shown["pair"], left=shown["left_id"], choice="left")
  status, out, errors = served.end(number)
  assert status == 0, errors
  assert "1 votes; 1 of 1 pairs judged." in out
  assert "| ann " in out
  assert "Traceback" not in errors
  assert not (tmp_path / "out" / "owner.json").exists()


@pytest.mark.slow
def test_a_thousand_votes_by_four_annotators_outlive_twenty_kills(tmp_path):
  """Each acknowledged vote is there once, whenever the server was killed."""
  store = Store(tmp_path / FILE)
  store.add(pairs(350))
  store.close()
  served = [Served(tmp_path)]
  ready, acknowledged = threading.Event(), []
  ready.set()

  def judge(name):
    action, said = "next", {}
    while True:
      ready.wait()
      try:
        state = served[0].ask(action, annotator=name, **said)
      except (OSError, ValueError):  # killed: the same is sent again, as the page does
        continue
      if action == "vote":
        acknowledged.append((name, said["pair"], said["choice"], said["left"]))
      if state["question"] is None or len(acknowledged) >= 1000:
        return
      shown = state["question"]
      action, said = "vote", {"pair": shown["pair"], "left": shown["left_id"], "choice": "left"}

  threads = [threading.Thread(target=judge, args=(name,)) for name in "abcd"]
  for thread in threads:
    thread.start()
  kills = 0
  for kills in range(1, 21):
    while len(acknowledged) < 45 * kills:
      assert any(thread.is_alive() for thread in threads)
    ready.clear()
    served[0].process.kill()
    served[0].process.communicate()
    served[0] = Served(tmp_path)
    ready.set()
  for thread in threads:
    thread.join()
  served[0].end(signal.SIGINT)
  assert kills == 20
  assert len(acknowledged) >= 1000
  assert len({row[:2] for row in acknowledged}) == len(acknowledged)
  store = Store(tmp_path / FILE)
  there = [(vote.annotator, vote.pair) for vote in store.all_votes()]
  assert len(there) == len({*there})
  assert {row[:2] for row in acknowledged} <= {*there}
  assert all(vote.left_won == 1 for vote in store.all_votes())
  store.close()

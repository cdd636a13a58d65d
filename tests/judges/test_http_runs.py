"""A judge behind a server through a whole run: lost questions count, answers are kept."""

import os
import re
import sqlite3
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
from judge_server import error, one_order, says, verdict_of
from paths import ROOT

from nash_jax.judges import chat
from nash_jax.judges import http as http_judge


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
    ((200, "hello"), "12 no reply.*not in JSON: 'hello'"),
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
  with pytest.raises(
    ValueError, match=r"kept: expected a file .* disk is full.*Free some disk space"
  ):
    client.complete([f"text {i}" for i in range(20)])


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

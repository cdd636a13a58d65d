"""The page to judge on, in a browser: mouse and keys, two voters, a kill, and hostile texts."""

import signal

import browser
import pytest
from voting import Served, pairs

from nash_jax.data.votes import FILE, Answer, Pair, Store

pytestmark = [pytest.mark.slow, browser.needed]
HOSTILE = (
  "<img src=x onerror=document.title='caught'></div><script>document.title='caught'</script>"
)
MINE = "document.getElementById('count').textContent"
SHOWN = "state && !busy && state.question && state.question.pair"


def sign_in(tab, address, name):
  tab.open(address)
  tab.write("#name", name)
  tab.click("#start button")
  tab.until("!document.getElementById('judge').hidden && !busy")


def vote(tab, act) -> None:
  """Votes, and waits for the next pair."""
  before = tab.value(MINE)
  act()
  tab.until(f"!busy && {MINE} !== {before!r}")


def test_two_people_vote_by_mouse_and_by_keys_across_a_kill(tmp_path):
  store = Store(tmp_path / FILE, share=0)
  store.add(pairs(10))
  served = Served(tmp_path, "--config.shared=0.0")
  port = served.address.split(":")[-1].strip("/")
  with browser.Tab(tmp_path / "one") as one, browser.Tab(tmp_path / "two", 390, 844, True) as two:
    sign_in(one, served.address, "ann")
    sign_in(two, served.address, "bob")
    assert one.value(SHOWN) != two.value(SHOWN)
    first = one.value("[state.question.pair, state.question.left_id]")
    vote(one, lambda: one.click("[data-choice=left]"))
    vote(one, lambda: one.press("ArrowRight"))
    vote(one, lambda: one.press("t"))
    vote(two, lambda: two.click("[data-choice=right]"))
    vote(two, lambda: two.press("s"))
    vote(one, lambda: one.press("u"))
    assert [v.left_won for v in store.all_votes()] == [1.0, 0.0, 0.0]
    assert (store.all_votes()[0].pair, store.all_votes()[0].annotator) == (first[0], "ann")
    # A vote that is under way when the server dies is counted once it is back.
    pair = one.value(SHOWN)
    served.process.kill()
    served.process.communicate()
    one.press("ArrowLeft")
    one.until("!document.getElementById('error').hidden")
    assert "Nothing is lost" in one.value("document.getElementById('error').textContent")
    served = Served(tmp_path, "--config.shared=0.0", f"--config.port={port}")
    one.until("!busy && document.getElementById('error').hidden")
    assert [v.pair for v in store.all_votes()].count(pair) == 1
    one.open(served.address)  # and reloading changes nothing
    one.until("!document.getElementById('judge').hidden && !busy")
    assert one.value(MINE).startswith("3 by you")
    # Neither page is wider than its window.
    for tab in (one, two):
      assert tab.value("document.documentElement.scrollWidth <= innerWidth")
    while one.value(SHOWN):
      vote(one, lambda: one.press("ArrowLeft"))
    assert not one.value("document.getElementById('done').hidden")
    assert not [line for line in two.told if "ERR_CONNECTION" not in line]
  assert served.end(signal.SIGINT)[0] == 0
  store.close()


def test_hostile_names_and_texts_are_shown_as_they_are(tmp_path):
  store = Store(tmp_path / FILE)
  store.add([Pair(HOSTILE, Answer(f"{HOSTILE} a", HOSTILE), Answer(f"{HOSTILE} b", "plain"))])
  store.close()
  served = Served(tmp_path)
  with browser.Tab(tmp_path / "profile") as tab:
    sign_in(tab, served.address, "<b>x</b><img src=x>")
    shown = tab.value(
      "['prompt', 'left', 'right'].map((x) => document.getElementById(x).textContent)"
    )
    assert shown[0] == HOSTILE
    assert sorted(shown[1:]) == [f"{HOSTILE} a", f"{HOSTILE} b"]
    vote(tab, lambda: tab.press("ArrowLeft"))
    tab.click("#show-results")
    tab.until("document.querySelectorAll('#figures table').length === 2")
    assert HOSTILE in tab.value("document.getElementById('figures').textContent")
    assert tab.value("document.querySelectorAll('main img, main script, main b').length") == 0
    assert tab.value("document.title") == "Which is better?"
    assert not tab.told
  assert served.end(signal.SIGINT)[0] == 0

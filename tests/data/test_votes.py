"""The store of votes: one vote for each annotator and pair, balanced, and there after a kill."""

import collections
import itertools
import signal
import sqlite3
import subprocess
import sys
import threading

import pytest
from paths import ROOT
from voting import pairs

from nash_jax.data.votes import FILE, Answer, Conflict, Pair, Store


@pytest.fixture
def new(tmp_path):
  """Makes stores in files of their own, with pairs."""
  made = []

  def make(prompts=4, **options) -> Store:
    store = Store(tmp_path / f"{len(made)}.sqlite3", **options)
    store._db.execute("PRAGMA synchronous = OFF")  # no machine loses its power here
    made.append(store)
    store.add(pairs(prompts))
    return store

  yield make
  for store in made:
    store.close()


def test_a_second_vote_on_a_pair_does_not_count(new):
  store = new()
  me = store.sign_in("Ann")
  shown = store.question(me)
  store.vote(me, shown.pair, shown.left_id, "left")
  store.vote(me, shown.pair, shown.left_id, "left")
  with pytest.raises(Conflict, match="undo that first"):
    store.vote(me, shown.pair, shown.left_id, "right")
  assert [vote.left_won for vote in store.all_votes()] == [1.0]
  # Not by this program's care: the table itself refuses it.
  with sqlite3.connect(store.path) as other, pytest.raises(sqlite3.IntegrityError):
    other.execute("INSERT INTO votes SELECT NULL, annotator, pair, 'b', 'a', 0 FROM votes")
  assert store.progress(me) == {"pairs": 12, "judged": 1, "votes": 1, "mine": 1}


def test_undo_takes_the_last_vote_back_and_shows_its_pair_again(new):
  store = new()
  me, shown = store.sign_in("ann"), []
  for choice in ("left", "skip", "tie"):
    shown.append(store.question(me))
    store.vote(me, shown[-1].pair, shown[-1].left_id, choice)
  for question in reversed(shown):
    assert store.last(me) == question.pair
    store.undo(me, question.pair)
    store.undo(me, question.pair)
    assert store.question(me) == question
  assert store.last(me) is None
  assert store.progress(me)["votes"] == 0


def test_the_winner_does_not_depend_on_the_side_on_which_it_was_shown(new):
  """An annotator who always takes the same policy's answer wins it everything."""
  store = new(20, share=1)
  sides = collections.Counter()
  for name in ("ann", "bob"):
    me = store.sign_in(name)
    while shown := store.question(me):
      x_left = shown.left.startswith("x")
      sides[name, x_left] += "x" in shown.left + shown.right
      choice = "left" if shown.left < shown.right else "right"
      store.vote(me, shown.pair, shown.left_id, choice)
  by_response = store.policies()
  for vote in store.all_votes():
    (a,), (b,) = by_response[vote.a], by_response[vote.b]
    assert vote.wins == (a < b)
  # Forty pairs with x; 3 sigma of a fair coin is 9.5.
  assert all(10 < count < 30 for count in sides.values()), sides
  text = store.p_win("prompt 3", "x on 3", "y on 3"), store.p_win("prompt 3", "y on 3", "x on 3")
  assert text == ((1.0, 2), (0.0, 2))
  assert store.p_win("prompt 3", "x on 3", "nothing") == (0.5, 0)


def test_sides_are_drawn_for_each_annotator_and_by_the_seed(new):
  def sides(store, name):
    me, found = store.sign_in(name), {}
    while shown := store.question(me):
      found[shown.pair] = shown.left_id
      store.vote(me, shown.pair, shown.left_id, "tie")
    return found

  first, again, other = new(8, share=1), new(8, share=1), new(8, share=1, seed=1)
  assert sides(first, "ann") == sides(again, "ann")
  assert sides(first, "bob") != sides(first, "ann")
  assert sides(other, "ann") != sides(first, "ann")


def test_pairs_are_shared_out_and_a_share_is_shown_to_all(new):
  """Four annotators in turn: each pair has its one vote, and the shared ones have four."""
  store = new(50, share=0.2)
  everybody = [store.sign_in(name) for name in "abcd"]
  order: dict[int, list] = {me: [] for me in everybody}
  for me in itertools.cycle(everybody):
    if len(order[me]) == 20:
      break
    shown = store.question(me)
    store.vote(me, shown.pair, shown.left_id, "left")
    order[me].append(shown.pair)
  counts = collections.Counter(itertools.chain(*order.values()))
  # A fifth of what each one saw is what all the others saw, and nothing else was seen twice.
  assert collections.Counter(counts.values()) == {4: 4, 1: 64}
  policies = store.policies()
  cells = collections.Counter(
    tuple(sorted((*policies[vote.a], *policies[vote.b]))) for vote in store.all_votes()
  )
  # One shared pair more, which has four votes, and one more and less of the others.
  assert max(cells.values()) - min(cells.values()) <= 4 + 2
  for me in everybody:
    while shown := store.question(me):
      store.vote(me, shown.pair, shown.left_id, "tie")
  votes = collections.Counter(vote.pair for vote in store.all_votes())
  shared = {pair for pair, count in votes.items() if count == 4}
  assert {count for pair, count in votes.items() if pair not in shared} == {1}
  assert (len(votes), len(shared)) == (150, 30)


def test_two_annotators_never_look_at_one_pair_that_wants_one_vote(new, monkeypatch):
  store = new(4, share=0)
  everybody = [store.sign_in(name) for name in "abc"]
  shown = [store.question(me) for me in everybody]
  assert len({question.pair for question in shown}) == 3
  assert [store.question(me) for me in everybody] == shown
  # Who has left keeps nothing for long; a vote that comes late still counts.
  monkeypatch.setattr("nash_jax.data.votes.CLAIM", -1)
  late = store.sign_in("late")
  assert store.question(late).pair == shown[0].pair
  for me, question in ((late, shown[0]), (everybody[0], shown[0])):
    store.vote(me, question.pair, question.left_id, "left")
  assert store.progress()["votes"] == 2


def test_pairs_wanting_two_votes_get_the_second_only_once_all_have_one(new):
  store = new(3, share=0, votes=2)
  a, b = store.sign_in("a"), store.sign_in("b")
  for me, count in ((a, 3), (b, 9)):
    for _ in range(count):
      shown = store.question(me)
      store.vote(me, shown.pair, shown.left_id, "left")
  counts = collections.Counter(vote.pair for vote in store.all_votes())
  assert sorted(counts.values()) == [1] * 6 + [2] * 3
  assert store.question(b) is None


def test_a_skipped_pair_goes_to_somebody_else(new):
  store = new(1, share=0)
  a, b = store.sign_in("a"), store.sign_in("b")
  shown = store.question(a)
  store.vote(a, shown.pair, shown.left_id, "skip")
  seen = []
  for _ in range(3):
    question = store.question(b)
    seen.append(question.pair)
    store.vote(b, question.pair, question.left_id, "tie")
  assert shown.pair in seen
  assert store.question(a) is None


def test_pairs_are_added_once_and_later_ones_come_later(new):
  store = new(2)
  assert store.add(pairs(2)) == 0
  assert store.add(pairs(3)) == 3
  assert store.add([Pair("p", Answer("same"), Answer("same"))]) == 0
  both = Pair("p", Answer("one", "x", [7]), Answer("two"), [2, 5])
  assert store.add([both, both._replace(a=both.b, b=both.a)]) == 1
  kept = [*store.pairs().values()][-1]
  assert (kept.prompt, kept.ids, kept.a.ids, kept.b.ids) == ("p", [2, 5], [7], None)


@pytest.mark.parametrize("name", ["", "  ", "x" * 41, "a\nb\x07", "\u202eevil"])
def test_names_are_short_and_printable(new, name):
  with pytest.raises(ValueError, match="name: expected 1 to 40 characters"):
    new().sign_in(name)


def test_names_in_other_letters_are_the_same_annotator(new):
  store = new()
  assert store.sign_in(" Ann  B ") == store.sign_in("ann b", "experts")
  assert store.sign_in("Anne") != store.sign_in("Ann b")
  assert store.annotators() == [("Ann B", "experts", 0), ("Anne", "", 0)]


def test_a_file_of_something_else_is_refused(tmp_path):
  (tmp_path / "text").write_text("no database, and long enough to be seen as none " * 20)
  with pytest.raises(ValueError, match=r"text: not a file of votes that can be used: file is not"):
    Store(tmp_path / "text")
  with sqlite3.connect(tmp_path / "other") as other:
    other.execute("CREATE TABLE x (y)")
  with pytest.raises(ValueError, match="expected a file of votes, version 1, got 'version 0'"):
    Store(tmp_path / "other")
  with pytest.raises(ValueError, match=r"expected a file of votes, got .*none"):
    Store(tmp_path / "none", create=False)


def test_threads_share_a_store(new):
  store = new(30, share=0)

  def work(name):
    me = store.sign_in(name)
    while shown := store.question(me):
      store.vote(me, shown.pair, shown.left_id, "left")

  threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert sorted(vote.pair for vote in store.all_votes()) == sorted(store.pairs())


VOTER = """
import sys
sys.path.insert(0, {root!r})
from nash_jax.data.votes import Store
store = Store({path!r})
me = store.sign_in("ann")
while shown := store.question(me):
  store.vote(me, shown.pair, shown.left_id, "left")
  print(shown.pair, flush=True)
"""


def test_a_vote_that_was_acknowledged_outlives_a_kill(tmp_path):
  path = tmp_path / FILE
  store = Store(path)
  store.add(pairs(400))
  told: list[int] = []
  for kill in range(3):
    code = VOTER.format(root=str(ROOT), path=str(path))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as voter:
      for _ in range(10 + 7 * kill):
        told.append(int(voter.stdout.readline()))
      voter.send_signal(signal.SIGKILL)
      told += [int(line) for line in voter.stdout.read().split("\n")[:-1]]
  votes = [vote.pair for vote in store.all_votes()]
  assert len(told) == len({*told}) >= 50
  assert {*told} <= {*votes}
  assert len(votes) == len({*votes}) <= len(told) + 3  # one each may be recorded and not told
  store.close()

"""Files of games: what is loaded is a game, and what is refused is named in one line."""

import json
import pathlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nash_jax.games import preference, zoo
from nash_jax.judges import table

CSV = b'id,left,right,winner\n1,a,b,left\n2,b,c,tie\n3,c,a,right\n4,"d, e",a,left\n'
JSON = json.dumps(
  {
    "name": "rps",
    "labels": ["R", "P", "S"],
    "payoff_antisymmetric": [[0, -0.5, 1], [0.5, 0, -0.25], [-1, 0.25, 0]],
    "nash_example": [0.142857, 0.571429, 0.285714],
    "votes": [[0, 3, 4], [3, 0, 5], [4, 5, 0]],
    "notes": "biased",
    "stats": {"cyclic": 1},
  },
  indent=1,
).encode()
READERS = {"votes.csv": zoo.load_votes, "game.json": zoo.load_json, "game.npy": table.load}


def _write(folder, name, data):
  path = pathlib.Path(folder) / name
  path.write_bytes(data)
  return path


def _refused(folder, name, data, words):
  path = _write(folder, name, data)
  with pytest.raises(ValueError, match=words) as caught:
    READERS[name](str(path))
  assert str(path) in str(caught.value)
  assert len(str(caught.value).splitlines()) == 1
  return str(caught.value)


# Marks, encodings, damage.


@pytest.mark.parametrize(("name", "data"), [("votes.csv", CSV), ("game.json", JSON)])
def test_a_byte_order_mark_and_line_ends_of_windows_change_nothing(tmp_path, name, data):
  plain = READERS[name](_write(tmp_path, name, data))
  windows = READERS[name](_write(tmp_path, name, b"\xef\xbb\xbf" + data.replace(b"\n", b"\r\n")))
  assert plain.labels == windows.labels
  np.testing.assert_array_equal(plain.p_win, windows.p_win)
  np.testing.assert_array_equal(plain.votes, windows.votes)
  assert plain.labels[0] in ("a", "R")


@pytest.mark.parametrize(
  ("name", "line", "data", "words"),
  [
    ("votes.csv", 2, CSV.replace(b"1,a", b"1,caf\xe9"), "byte 0xe9 is not UTF-8"),
    ("votes.csv", None, CSV.decode().encode("utf-16"), "expected UTF-8"),
    ("votes.csv", None, b"\x1f\x8b" + CSV, "compressed"),
    ("votes.csv", 3, CSV.replace(b"b,c", b"b\0,c"), "NUL"),
    ("votes.csv", None, b"", "left, right, winner"),
    ("votes.csv", 1, CSV[CSV.index(b"\n") + 1 :], "left, right, winner"),
    ("votes.csv", 1, CSV.replace(b"id,", b"left,"), "left, right, winner"),
    ("votes.csv", None, b"left,right,winner\n", "at least one vote"),
    ("votes.csv", 3, CSV.replace(b"b,c,tie", b"b,c"), "4 cells"),
    ("votes.csv", 3, CSV.replace(b"tie", b"tie,x"), "4 cells"),
    ("votes.csv", 3, CSV.replace(b"b,c,tie", b"b,,tie"), "empty"),
    ("votes.csv", 3, CSV.replace(b"tie", b"draw"), "left, right, tie, got 'draw'"),
    ("votes.csv", None, CSV.replace(b"3,c", b'3,"c'), "no CSV"),
    ("game.json", 3, JSON.replace(b'"labels"', b"labels"), "no JSON"),
    ("game.json", None, JSON.replace(b" 0.25", b" NaN"), "NaN is no number"),
    ("game.json", None, JSON.replace(b"0.25", b"1e999"), "inf"),
    ("game.json", None, JSON.replace(b"0.25", b"9" * 400), "real numbers"),
    ("game.json", None, JSON.replace(b"0.25", b"9" * 5000), "digits"),
    ("game.json", None, JSON.replace(b"0.25", b"0.75", 1), "worst pair: payoff"),
    ("game.json", None, JSON.replace(b"payoff_antisymmetric", b"payoff"), "payoff_antisymmetric"),
    ("game.json", None, JSON.replace(b'"S"', b'"P"'), "labels"),
    ("game.json", None, JSON.replace(b'"S"', b"null"), "labels"),
    ("game.json", None, JSON.replace(b'"rps"', b"3"), "name"),
    ("game.json", None, JSON.replace(b"0.142857", b"0.9"), "nash_example"),
    (
      "game.json",
      None,
      JSON.replace(b"0.142857", b"0.342857").replace(b"0.571429", b"0.371429"),
      "an equilibrium, against which nobody gains",
    ),
    ("game.json", None, JSON.replace(b"   4,", b"   -4,"), "votes"),
    ("game.json", None, b"[" * 100_000, "nested"),
    ("game.json", None, b"null", "JSON object"),
    ("game.json", 1, b"", "no JSON"),
    ("game.json", None, b"[1]", "JSON object"),
  ],
)
def test_a_damaged_file_is_refused_by_name_and_line(tmp_path, name, line, data, words):
  message = _refused(tmp_path, name, data, words)
  if line:
    assert f"{tmp_path / name}:{line}" in message


def test_a_prior_that_is_no_number_is_refused(tmp_path):
  path = _write(tmp_path, "votes.csv", CSV)
  for prior in (-1.0, np.nan, np.inf, "2", True):
    with pytest.raises(ValueError, match="prior"):
      zoo.load_votes(path, prior)


# Tables.


def _table(contexts=2, actions=3):
  upper = np.triu(np.random.default_rng(0).uniform(size=(contexts, actions, actions)), 1)
  return upper + np.tril(1 - upper.swapaxes(1, 2), -1) + np.eye(actions)[None] / 2


def _npy(folder, array, **options):
  np.save(folder / "game.npy", array, **options)
  return (folder / "game.npy").read_bytes()


@pytest.mark.parametrize(
  ("array", "words"),
  [
    (np.full((2, 3, 3), True), "real numbers, got 'dtype bool'"),
    (np.full((2, 3, 3), None), "object"),
    (np.full((2, 3, 3), "a"), "real numbers"),
    (_table() + 0j, "real numbers"),
    (np.ones((2, 3, 3), int), "worst entry"),
    (_table().astype(np.float16), "worst entry"),
    (_table()[0], r"got shape \(3, 3\)"),
    (_table()[:, :2], "shape"),
    (np.zeros((0, 3, 3)), "."),
    (np.float64(0.5), "shape"),
    (np.where(np.eye(3) > 0, np.nan, _table()), "nan"),
    (_table() * np.inf, "nan|inf"),
    (_table() * 1e9, "worst entry"),
    (2 * _table() - 1, "worst entry"),
    (np.zeros(4, [("p", float)]), "real numbers"),
    (np.zeros((1, 2, 2), "M8[s]"), "real numbers"),
  ],
)
def test_an_array_that_is_no_table_is_refused_by_name(tmp_path, array, words):
  _refused(tmp_path, "game.npy", _npy(tmp_path, array, allow_pickle=True), words)


def test_a_file_that_is_no_array_is_refused_by_name(tmp_path):
  good = _npy(tmp_path, _table())
  np.savez(tmp_path / "game.npz", p=_table())
  for data in (
    b"",
    good[:60],
    good[:-8],
    good.replace(b"3, 3", b"3, 9"),
    b"\x80\x04K\x01.",
    good.replace(b"(2, 3, 3), }", b"(10**9,3), }"),
    good.replace(b"(2, 3", b"(-2,3"),
    good.replace(b"'<f8'", b"'|O8'"),
    (tmp_path / "game.npz").read_bytes(),
    good.replace(b"(2, 3, 3)", b"(9999999999999999, 3, 3)").replace(b" " * 15, b"", 1),
  ):
    _refused(tmp_path, "game.npy", data, "judge.table: expected an .npy file")
  with pytest.raises(ValueError, match=r"none\.npy"):
    table.load(str(tmp_path / "none.npy"))
  with pytest.raises(ValueError, match=r"judge\.table"):
    table.load(str(tmp_path))


@pytest.mark.parametrize(
  ("kind", "loaded"),
  [("<f8", "float64"), (">f8", "float64"), ("<f4", "float32"), (">f4", "float32")],
)
def test_a_table_of_any_byte_order_is_read_in_its_precision(tmp_path, kind, loaded):
  for order in "CF":
    np.save(tmp_path / "p.npy", np.asarray(_table().astype(kind), order=order))
    got = table.load(str(tmp_path / "p.npy"))
    assert got.dtype == np.dtype(loaded)
    np.testing.assert_allclose(got, _table(), atol=1e-7)
  halves = np.where(_table() > 0.5, 0.75, np.where(_table() < 0.5, 0.25, 0.5))
  np.save(tmp_path / "p.npy", halves.astype(np.float16))  # exact in float16
  np.testing.assert_array_equal(table.load(str(tmp_path / "p.npy")), halves)


def test_a_judge_is_made_of_a_table_alone():
  for make in (table.judge, table.reward_judge):
    for wrong in (_table() * 2, np.full((1, 3, 3), np.nan), -_table()):
      with pytest.raises(ValueError, match="worst entry"):
        make(wrong, 10, 3)
    for base in (0, -2):
      with pytest.raises(ValueError, match="table_tokens"):
        make(_table(actions=4), 10, base)  # (-2)² = 4


# Any mutation.


INSERTS = st.sampled_from(
  [
    b"\0",
    b"\xef\xbb\xbf",
    b"\xff",
    b"\n",
    b"\r",
    b",",
    b'"',
    b"null",
    b"NaN",
    b"-1",
    b"1e999",
    b"[",
    b"}",
    b"\xe2\x80\xa8",
    b"\\ud800",
    b"left",
  ]
)


@st.composite
def _mutated(draw, data):
  for _ in range(draw(st.integers(1, 3))):
    at, end = sorted(draw(st.tuples(*[st.integers(0, len(data))] * 2)))
    kind = draw(st.sampled_from(["cut", "insert", "drop", "swap", "bytes"]))
    if kind == "cut":
      data = data[:end]
    elif kind == "insert":
      data = data[:at] + draw(INSERTS) + data[at:]
    elif kind == "drop":
      data = data[:at] + data[min(end, at + 12) :]
    elif kind == "swap":
      data = data[:at] + draw(INSERTS) + data[min(end, at + 4) :]
    else:
      data = data[:at] + draw(st.binary(max_size=8)) + data[min(end, at + 8) :]
  return data


def _loaded_or_refused(folder, name, data):
  path = _write(folder, name, data)
  try:
    game = READERS[name](str(path))
  except ValueError as error:
    message = str(error)
    if str(path) not in message or len(message.splitlines()) != 1:
      raise AssertionError(f"not one line that names the file: {message}") from error
    return
  p_win = game if name.endswith("npy") else game.p_win
  assert np.all(np.isfinite(p_win))
  preference.validate(p_win)
  if not name.endswith("npy"):
    assert len(set(game.labels)) == len(game.labels) == len(p_win)
    assert game.nash is None or np.all(np.isfinite(game.nash))
    assert game.votes is None or np.all(np.isfinite(game.votes))


@pytest.mark.parametrize("examples", [60, pytest.param(1500, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", READERS)
def test_a_mutated_file_is_loaded_as_a_game_or_refused_in_one_line(tmp_path, name, examples):
  valid = {"votes.csv": CSV, "game.json": JSON}.get(name) or _npy(tmp_path, _table())

  @settings(max_examples=examples, suppress_health_check=list(HealthCheck))
  @given(st.one_of(_mutated(valid), st.binary(max_size=200)))
  def check(data):
    _loaded_or_refused(tmp_path, name, data)

  check()

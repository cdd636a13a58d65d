"""Any name is fine on screen and safe on disk: policies, judges, runs, labels, figures."""

import itertools
import json
import pathlib
import resource
import unicodedata

import pytest
from hypothesis import example, given, settings, strategies
from markdown_it import MarkdownIt

from nash_jax import keys, report
from nash_jax.config import comparison
from nash_jax.run import files
from nash_jax.validation import file_name, is_file_name, printable

# What has broken a path, a table, a picture or a terminal somewhere.
NASTY = (
  "a/b", "/etc/x", "../../x", "..", ".", ".hidden", "-rf", "--help", "~", "a\\b", "C:\\x",
  "con", "NUL.txt", "com1", "x" * 300, "é" * 300, "模" * 300, "x" * 299 + "y", "a|b", "a\nb",
  "a\r\nb", "**bold**", "`code`", "_x_", "_x", "__init__", "$\\frac{$ _x", "$x$", "\\alpha",
  "<b>&amp;</b>", "[a](b)", "# a", "\x1b[31mred\x1b[0m", "\x00", "\x07", "\u202egnp.exe",
  "\u2028", "\ud800", "模型", "🙂", "Base", "base", "é", "e\u0301", "ﬁ", "fi", "a b", "a  b",
  "ab", "a@b", "a:b", "a*b?", "%s", "{0}", "'", '"', " ", "a ", " a", "a.", "a|", "a\\",
  "a\\|b", "~~x~~", "1e-3", "0.1", "+", "=-x",
)  # fmt: skip
# Lone surrogates, control characters and unassigned code points too.
names = strategies.one_of(
  strategies.sampled_from(NASTY),
  strategies.text(strategies.characters(), min_size=1, max_size=300),
  strategies.text("aA.-_/ é\u0301", min_size=1, max_size=6),
)


def on_a_mac(name):
  """A file's name as file systems see it that know neither case nor composition."""
  return unicodedata.normalize("NFD", name).casefold()


def check_is_safe(name):
  folder = pathlib.Path("/folder")
  assert (folder / name).resolve().parent == folder
  assert 0 < len(name.encode()) <= 200, "room for what is put before and behind it"
  assert name[0] not in "-."
  assert name[-1] not in ". "
  assert not set(name) & set('/\\:*?"<>|@%$ \x00')
  assert name.partition(".")[0] not in ("con", "prn", "aux", "nul", "com1", "lpt9")


def test_nasty_names_have_files_of_their_own():
  found = [file_name(name) for name in NASTY]
  assert len({*map(on_a_mac, found)}) == len(NASTY)
  for name in found:
    check_is_safe(name)
    assert is_file_name(name)


@given(strategies.lists(names, unique=True, min_size=2, max_size=6))
@settings(max_examples=60)
def test_two_names_never_share_a_file_and_none_leaves_its_folder(given_names):
  # What a file is called is a name too: nothing else may be called so.
  with_files = {*given_names, *map(file_name, given_names)}
  twins = {form(name) for name in given_names for form in (str.upper, str.lower, on_a_mac)}
  every = with_files | twins
  assert len({on_a_mac(file_name(name)) for name in every}) == len(every)
  for name in every:
    check_is_safe(file_name(name))
    assert is_file_name(file_name(name))


def test_names_that_are_files_already_stay():
  for name in (
    "nash_mp",
    "kappa=0.1",
    "rate_1e-05",
    "seed_0",
    "best_of_4",
    "population",
    "a.b",
    "a",
  ):
    assert file_name(name) == name


def rendered(markdown):
  """Returns the texts of a table's cells, row by row, as a reader of the page sees them."""
  rows, cell, cells = [], None, []
  for token in MarkdownIt("commonmark").enable("table").parse(markdown):
    if token.type == "tr_open":
      cells = []
    elif token.type == "tr_close":
      rows.append(cells)
    elif token.type in ("th_open", "td_open"):
      cell = []
    elif token.type in ("th_close", "td_close"):
      cells.append("".join(cell))
    elif token.type == "inline":
      cell.extend(
        child.content if child.type == "text" else f"<{child.type}>" for child in token.children
      )
  return rows


@given(strategies.lists(names, unique=True, min_size=1, max_size=3))
@example(["a|b", "a\\|b", "a\\"])
@settings(max_examples=40)
def test_a_table_shows_every_name_as_it_is(given_names):
  cell = {"mean": 0.7, "sigma3": 0.1, "significant": False, "n": 9}
  table = report.win_rate_table({row: dict.fromkeys(given_names, cell) for row in given_names})
  assert table.isprintable() or set(table) - {"\n"} == {c for c in table if c.isprintable()}
  assert len(table.split("\n")) == 2 + len(given_names)
  header, *rows = rendered(table)
  shown = [printable(name).strip() for name in given_names]
  assert header[1:] == shown
  assert [row[0] for row in rows] == shown
  assert all(len(row) == 1 + len(given_names) for row in rows)


@given(names, names)
@settings(max_examples=40)
def test_no_cell_ends_its_row(header, cell):
  """Also one that did not go through `escaped`."""
  rows = rendered(report.markdown_table(["a" + header, "b"], [["c" + cell, "d"]]))
  assert [len(row) for row in rows] == [2, 2]


@given(strategies.lists(names, unique=True, min_size=1, max_size=6))
@settings(max_examples=40)
def test_labels_of_a_figure_are_short_and_no_two_alike(given_names):
  labels = report.figure_labels(given_names)
  assert len({*labels}) == len(given_names)
  assert all(len(label) < 10 * 41 for label in labels)


def check_heat_map(given_names, folder):
  cell = {"mean": 0.7, "sigma3": 0.1, "significant": True, "n": 9}
  cells = {row: dict.fromkeys(given_names, cell) for row in given_names}
  path = report.heat_map(cells, f"judge: {given_names[0]}", folder / "map.png")
  assert path.read_bytes().startswith(b"\x89PNG")
  assert [path.name for path in folder.iterdir()] == ["map.png"]


def test_a_heat_map_is_drawn_of_names_that_are_no_formulas(tmp_path):
  check_heat_map(["$\\frac{$ _x", "模型\n🙂\ud800", "x" * 300], tmp_path)


@pytest.mark.slow
@given(strategies.lists(names, unique=True, min_size=1, max_size=3))
@settings(max_examples=25)
def test_a_heat_map_is_drawn_of_every_name(tmp_path_factory, given_names):
  check_heat_map(given_names, tmp_path_factory.mktemp("map"))


def test_every_name_has_a_key():
  for name in ("\ud800", "模型"):
    keys.key(0, name)


@given(strategies.lists(names, unique=True, min_size=1, max_size=6))
@settings(max_examples=40)
def test_runs_of_any_labels_have_folders_of_their_own(labels):
  runs = comparison.name_runs([{"label": name} for name in labels])
  assert [run.name for run in runs] == labels
  assert len({on_a_mac(run.folder) for run in runs}) == len(labels)
  for run in runs:
    check_is_safe(run.folder)


def test_learning_rates_that_look_alike_have_folders_of_their_own():
  rates = (1e-4, 1.0000001e-4, 0.1, 0.1 + 1e-9, 3, 3.0000004, 1e30)
  shown = [comparison.rate_name(rate) for rate in rates]
  assert len({*shown}) == len(rates)
  assert shown[0] == "0.0001"
  assert [file_name(name) for name in shown] == shown


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
  path = tmp_path / "results.json"
  files.write_json(path, {"a": 1})
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
  try:
    with pytest.raises(ValueError, match=r"results.json: expected a file that can be written"):
      files.write_json(path, {"a": "x" * 10_000})
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert json.loads(path.read_text()) == {"a": 1}
  assert list(tmp_path.iterdir()) == [path], "nothing is left beside it"


def test_what_is_not_finite_is_null_in_json(tmp_path):
  files.write_json(tmp_path / "x.json", {"a": float("nan"), "b": [float("-inf"), 1.5]})
  assert json.loads((tmp_path / "x.json").read_text(), parse_constant=pytest.fail) == {
    "a": None,
    "b": [None, 1.5],
  }


def test_a_folder_is_on_this_machine(tmp_path):
  with pytest.raises(
    ValueError, match="workdir: expected a folder on this machine, got 'gs://a/b'"
  ):
    files.make_folder("gs://a/b")
  assert files.make_folder(tmp_path / "a" / "b").is_dir()


def test_pairs_of_nasty_names_are_two_runs_each():
  for one, two in itertools.combinations(NASTY[:40], 2):
    runs = comparison.name_runs([{"label": one}, {"label": two}])
    assert len({on_a_mac(run.folder) for run in runs}) == 2

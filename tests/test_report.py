"""Tables and figures from what a run left behind."""

import json
import math

import pytest

from nash_jax import report


def cell(mean, sigma3=0.081, significant=True, n=96):
  return {"mean": mean, "sigma3": sigma3, "significant": significant, "n": n}


CELLS = {
  "trained": {"trained": cell(0.5, 0.0, False), "base": cell(0.717)},
  "base": {"trained": cell(0.283), "base": cell(0.5, 0.0, False)},
}


def test_cells_are_printed_as_the_paper_prints_them():
  assert report.win_rate_cell(cell(0.7171)) == "**.717 ± .081**"
  assert report.win_rate_cell(cell(0.52, significant=False)) == ".520 ± .081"
  assert report.win_rate_cell(cell(0.5000001, 0.0, False), diagonal=True) == ".5 —"
  assert report.win_rate_cell(cell(0.7, n=12), with_n=True) == "**.700 ± .081** (12)"
  assert report.win_rate_cell(cell(None, None, False, 0)) == "—"
  assert report.number(-0.25, 2) == "-.25"
  assert report.number(10.5, 2) == "10.50"
  assert report.number(float("nan")) == "—"


def test_a_cell_of_too_few_prompts_says_so():
  few = cell(1.0, 0.728, False, 5)
  assert report.win_rate_cell(few) == "1.000 ± .728 (too few: 5)"
  assert report.win_rate_cell(few, with_n=True) == "1.000 ± .728 (too few: 5)"
  assert report.win_rate_cell(cell(0.6, None, False, 1)) == ".600 ± — (too few: 1)"
  assert report.win_rate_cell(few, diagonal=True) == "1. —"


def test_the_bootstrap_is_compared_where_it_has_a_width():
  def ends(low, high):
    return {"bootstrap_low": low, "bootstrap_high": high}

  own = {**cell(0.5, 0.3, False), **ends(0.5, 0.5)}
  table = {
    "a": {
      "a": own,
      "b": {**cell(0.7, 0.08), **ends(0.61, 0.79)},
      "c": {**cell(1.0, 0.3), **ends(1.0, 1.0)},
    },
    "b": {"b": own, "c": {**cell(1.0, 0.7, False, 5), **ends(None, None)}},
  }
  assert report._bootstrap_note(table) == [
    "the bootstrap's 99.7% intervals differ from ± 3σ by at most .010"
  ]
  assert report._bootstrap_note({"b": table["b"]}) == ["no bootstrap: it needs 10 prompts"]


def test_a_self_cell_that_is_not_one_half_shows():
  assert report.win_rate_cell(cell(0.51, 0.0, False), diagonal=True) == ".51 —"


def test_tables_line_up_and_rows_beat_columns():
  lines = report.win_rate_table(CELLS).split("\n")
  assert len(lines) == 4
  assert len({len(line) for line in lines}) == 1
  assert [part.strip() for part in lines[2].split("|")[1:-1]] == [
    "trained",
    ".5 —",
    "**.717 ± .081**",
  ]


def test_a_heat_map_has_a_colour_for_each_side_of_one_half(tmp_path):
  from matplotlib import image

  path = report.heat_map(CELLS, "Who beats whom", tmp_path / "map.png")
  pixels = image.imread(path)[..., :3]
  pixels = pixels[:, : int(0.7 * pixels.shape[1])]  # without the colour bar
  orange = (pixels[..., 0] > pixels[..., 2] + 0.2).sum()
  purple = (pixels[..., 2] > pixels[..., 1] + 0.1).sum()
  assert orange > 5000
  assert purple > 5000
  unknown = {r: {c: cell(None, None, False, 0) for c in CELLS} for r in CELLS}
  assert report.heat_map(unknown, "Nothing counted", tmp_path / "none.png").stat().st_size > 0


def test_curves_draw_what_the_run_measured(tmp_path):
  from matplotlib import image

  def write(names):
    rows = [{"step": n, **dict.fromkeys(names, n / 9)} for n in range(9)]
    rows.append({"step": 9, **dict.fromkeys(names)})
    text = "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 10, "lo'
    (tmp_path / "metrics.jsonl").write_text(text)
    path = report.curves(tmp_path)
    assert path == tmp_path / "curves.png"
    return image.imread(path).shape

  height, width, _ = write(["loss"])
  assert report.read_metrics(tmp_path)["loss"] == (list(range(9)), [n / 9 for n in range(9)])
  full = [name for panel in report.PANELS for name in panel[2]]
  taller, wider, _ = write(full)
  assert (taller, wider) == (2 * height, 3 * width)


def test_missing_and_broken_metrics_are_named(tmp_path):
  with pytest.raises(ValueError, match=r"metrics.jsonl: no such file"):
    report.curves(tmp_path)
  (tmp_path / "metrics.jsonl").write_text('{"step": 0, "loss": 1}\n{"st\n')
  with pytest.raises(ValueError, match=r"metrics.jsonl:2: not JSON"):
    report.curves(tmp_path)
  (tmp_path / "metrics.jsonl").write_text('{"step": 0, "other": 1}\n')
  with pytest.raises(ValueError, match="some of the metrics that are drawn, got none"):
    report.curves(tmp_path)


@pytest.mark.parametrize(
  "line",
  ['{"step": 1' + "0" * 5000 + "}", '{"step": true}', '{"step": 1, "loss": true}', "[" * 100_000,
   '{"step": 1.5}', '{"step": NaN}', '{"step": null}', "\x00", ""],
)  # fmt: skip
def test_any_damaged_line_is_named(tmp_path, line):
  (tmp_path / "metrics.jsonl").write_text('{"step": 0, "loss": 1}\n' + line + "\n")
  with pytest.raises(ValueError, match=r"metrics.jsonl:2: .* Restore the file"):
    report.curves(tmp_path)


def test_a_metric_too_great_for_a_float_is_infinite(tmp_path):
  (tmp_path / "metrics.jsonl").write_text('{"step": 0, "loss": 1' + "0" * 5000 + "}\n")
  assert report.read_metrics(tmp_path)["loss"] == ([0], [math.inf])


def test_the_panels_are_metrics_that_exist():
  from nash_jax.run import metrics

  assert {name for panel in report.PANELS for name in panel[2]} <= set(metrics.GLOSSARY)


def test_a_demo_without_a_verdict_or_a_kl_ends_with_a_dash():
  from nash_jax.jobs import demo

  nothing = {"mean": None, "sigma3": None, "n": 0}
  rates = {"trained": {"judge": nothing, "population": nothing}}
  summary = {"steps": 2, "seconds": 1.0, "kl_to_reference": None, "win_rate": rates}
  told = demo._epilogue({"texts": []}, summary, "runs/demo")
  assert "Trained beats base with — ± — under" in told
  assert "at KL — nats" in told


def test_a_length_controlled_rate_shows_its_overlap_or_why_there_is_none():
  def cell(mean=None, refused="", n=96, overlap=0.31):
    figures = {"mean": mean, "sigma3": mean and 0.05, "significant": bool(mean)}
    return {**figures, "n": n, "overlap": overlap, "refused": refused}

  cells = {
    "a": {"a": cell(0.5), "b": cell(0.7), "c": cell(None, "overlap")},
    "b": {"a": cell(0.3), "b": cell(None, "few", 0), "c": cell(None, "length")},
    "c": {"a": cell(None, "overlap"), "b": cell(None, "length"), "c": cell(None, "few", 0)},
  }
  _, table, notes = report._length_controlled(cells)
  rows = [[x.strip() for x in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
  assert rows == [
    ["a", ".5 —", "**.700 ± .050** (.31)", "— (overlap)"],
    ["b", "**.300 ± .050** (.31)", "—", "— (length)"],
    ["c", "— (overlap)", "— (length)", "—"],
  ]
  assert report.REFUSED["overlap"] in notes
  assert report.REFUSED["length"] in notes
  assert report.REFUSED["few"] not in notes
  (line,) = report._length_controlled({"a": {"b": cell(None, "few", 20)}})
  assert line == "No length-controlled win rates, LC (ours): fewer than 50 prompts."

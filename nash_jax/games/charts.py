"""Figures of a study's tables, as its config describes them."""

import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.image import AxesImage

Rows = list[dict[str, Any]]  # dicts with the same keys, a column each
Tables = dict[str, Rows]


def draw(
  path: pathlib.Path,
  tables: Tables,
  panels: Sequence[Sequence[Mapping[str, Any]]],
  size: tuple[float, float],
  colorbar: str | None = None,
) -> None:
  """Draws rows of panels, and writes them as PNG and SVG.

  A panel is a dict: `layers`, arguments of `legend`, and of matplotlib's Axes.set. A layer is a
  dict: `table`; `where`, the values of columns that select its rows; `x` and `y`, columns; and
  either `value`, a column shown as a heat map (its least where a cell has several rows), or
  settings of `lines`. A layer without rows is left out, and a line says so.

  Examples:
    >>> import pathlib, tempfile
    >>> from nash_jax.games import charts
    >>> tables = {"curve": [{"k": k, "gap": 2.0**-k, "method": "nash_mp"} for k in range(5)]}
    >>> layer = {"table": "curve", "x": "k", "y": "gap", "by": "method", "label": "{method}"}
    >>> panel = {"title": "one curve", "yscale": "log", "layers": (layer,)}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   charts.draw(pathlib.Path(folder) / "curve", tables, [[panel]], size=(3, 2))
    ...   sorted(file.name for file in pathlib.Path(folder).iterdir())
    ['curve.png', 'curve.svg']

  Args:
    path: without an ending.
    size: width and height of a panel in inches.
    colorbar: label of one colour bar for the whole figure; without, every heat map has its own.
  """
  from matplotlib import rc_context
  from matplotlib.figure import Figure

  drawing = Figure(layout="constrained", figsize=(size[0] * len(panels[0]), size[1] * len(panels)))
  axes = drawing.subplots(len(panels), len(panels[0]), squeeze=False)
  image = None
  for axis, panel in zip(axes.flat, itertools.chain(*panels), strict=True):
    heat = _panel(axis, panel, tables, path.name)
    image = heat or image
    if heat and not colorbar:
      drawing.colorbar(heat, ax=axis)
  if colorbar and image:
    drawing.colorbar(image, ax=axes, shrink=0.4, extend="both", label=colorbar)
  drawing.savefig(path.with_suffix(".png"), dpi=130)
  with rc_context({"svg.fonttype": "none"}):  # text stays text: smaller, and searchable
    drawing.savefig(path.with_suffix(".svg"), metadata={"Date": None})


def _panel(axis: "Axes", panel: Mapping[str, Any], tables: Tables, name: str) -> "AxesImage | None":
  """Draws a panel; returns its heat map, if it has one."""
  settings = dict(panel)
  legend = {"fontsize": 7, **settings.pop("legend", {})}
  image = None
  for layer in settings.pop("layers"):
    layer = dict(layer)
    table, where = tables[layer.pop("table")], layer.pop("where", {}).items()
    rows = [row for row in table if all(row[column] == value for column, value in where)]
    if not rows:
      print(f"{name}: nothing to draw, no rows with {dict(where)}; see config.figures")
    elif "value" in layer:
      image = heat_map(axis, rows, **layer)
    else:
      lines(axis, rows, **layer)
  axis.set_title(settings.pop("title"), fontsize=9)
  axis.set(**settings)
  axis.minorticks_off()  # their labels overlap where an axis spans a decade or two
  if axis.get_legend_handles_labels()[0]:
    axis.legend(**legend)
  return image


def lines(
  axis: "Axes",
  rows: Rows,
  x: str,
  y: str,
  by: str | None = None,
  style: str = "-",
  styles: Mapping[Any, str] | None = None,
  label: str = "_",
  band: tuple[str, str] | None = None,
) -> None:
  """Draws a line for each value of column `by`.

  Examples:
    >>> from matplotlib.figure import Figure
    >>> from nash_jax.games import charts
    >>> axis = Figure().subplots()
    >>> charts.lines(axis, [{"k": 0, "gap": 1.0}, {"k": 1, "gap": 0.5}], x="k", y="gap")
    >>> len(axis.get_lines())
    1

  Args:
    x: column of the horizontal axis.
    y: column of the vertical axis.
    by: column that tells lines apart; all rows are one line without.
    style: matplotlib's format string, after the next colour where there is `by`.
    styles: format strings by value of `by`, where they are not that.
    label: a format over the columns of a line's first row.
    band: two columns to shade between.
  """
  for c, key in enumerate(dict.fromkeys(row[by] if by else None for row in rows)):
    chosen = [row for row in rows if not by or row[by] == key]
    form = (styles or {}).get(key, f"C{c}{style}" if by else style)
    across = [row[x] for row in chosen]
    named = label.format(**chosen[0])
    (line,) = axis.plot(across, [row[y] for row in chosen], form, label=named, ms=3)
    if band:
      low, high = ([row[name] for row in chosen] for name in band)
      axis.fill_between(across, low, high, color=line.get_color(), alpha=0.2, lw=0)


def heat_map(axis: "Axes", rows: Rows, x: str, y: str, value: str, **settings: Any) -> "AxesImage":
  """Draws a heat map of column `value` over columns x and y: the least of each cell's rows.

  Examples:
    >>> from matplotlib.figure import Figure
    >>> from nash_jax.games import charts
    >>> rows = [{"a": a, "b": b, "gain": a * b} for a in (1, 2) for b in (3, 4)]
    >>> charts.heat_map(Figure().subplots(), rows, x="a", y="b", value="gain").get_array().tolist()
    [[3.0, 6.0], [4.0, 8.0]]

  Args:
    **settings: of matplotlib's Axes.imshow.
  """
  columns, levels = (list(dict.fromkeys(row[name] for row in rows)) for name in (x, y))
  values = np.full((len(levels), len(columns)), np.inf)
  for row in rows:
    cell = levels.index(row[y]), columns.index(row[x])
    values[cell] = min(values[cell], row[value])
  axis.set_xticks(range(len(columns)), columns, fontsize=6)
  axis.set_yticks(range(len(levels)), levels, fontsize=6)
  return axis.imshow(values, origin="lower", aspect="auto", **settings)

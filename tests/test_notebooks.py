"""Notebooks run from top to bottom, with fewer steps, and do nothing but import and call."""

import ast
import json

import pytest
from tiny import ROOT

SMALL = {
  "nash_mp_on_gemma": {
    "STEPS = 60": "STEPS = 2",
    '"runs/colab"': '"run"',
    "c.steps = STEPS": "c.steps = STEPS\nc.prompts.batch_size = 4\nc.evaluation.prompts = 8\n"
    "c.sampling.max_tokens = 16",
    "max_tokens=48": "max_tokens=8",
  },
  "ablations": {
    "STEPS = 1500": "STEPS = 20",
    '"runs/ablations"': '"run"',
    '"seeds": SEEDS': '"seeds": SEEDS, "base.prompts.batch_size": 16',
  },
}


def cells(name):
  nbformat = pytest.importorskip("nbformat")
  return nbformat.read(ROOT / "colab" / f"{name}.ipynb", as_version=4)


@pytest.mark.parametrize("name", SMALL)
def test_a_notebook_only_imports_assigns_and_calls_and_is_stored_with_pictures(name):
  code = [cell for cell in cells(name).cells if cell.cell_type == "code"]
  for cell in code:
    for statement in ast.parse(cell.source).body:
      assert isinstance(statement, ast.Import | ast.ImportFrom | ast.Assign | ast.Expr)
  assert any("image/png" in output.get("data", {}) for cell in code for output in cell.outputs)
  assert not any(output.output_type == "error" for cell in code for output in cell.outputs)


@pytest.fixture(scope="module")
def executed(request, tmp_path_factory):
  """Returns (what it printed, what it showed) of each code cell, and the folder that it ran in.

  In this process, where the libraries are imported already; a kernel of its own takes 20 s more.
  """
  shells = pytest.importorskip("IPython.core.interactiveshell")
  capture = pytest.importorskip("IPython.utils.capture").capture_output
  folder, left = tmp_path_factory.mktemp("notebook"), []
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("IPYTHONDIR", str(folder))
    patch.chdir(folder)
    shell = shells.InteractiveShell.instance()
    for cell in cells(request.param).cells:
      source = cell.source
      for old, new in SMALL[request.param].items():
        source = source.replace(old, new)
      if cell.cell_type == "code":
        with capture() as output:
          done = shell.run_cell(source)
        done.raise_error()
        shown = [shell.display_formatter.format(done.result)[0]]
        left.append((output.stdout, shown + [rich.data for rich in output.outputs]))
    shells.InteractiveShell.clear_instance()
  return left, folder


def pictures(cells) -> int:
  return sum("image/png" in data for _, shown in cells for data in shown)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize("executed", ["nash_mp_on_gemma"], indirect=True)
def test_the_gemma_notebook_trains_and_shows_texts_before_and_after(executed):
  cells, folder = executed
  steps = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
  assert [line["step"] for line in steps] == [0, 1, 2]
  (estimate,) = (data["text/markdown"] for data in cells[2][1] if "text/markdown" in data)
  assert "T4 has 15.0 GiB: fits" in estimate
  assert pictures(cells[4:5]) == 1
  for printed, _ in cells[5:8]:
    assert printed.count("Lily saw a red kite in the park. ▸") == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize("executed", ["ablations"], indirect=True)
def test_the_ablations_notebook_sweeps_and_its_two_ways_to_drop_the_target_agree(executed):
  cells, folder = executed
  found = {
    name: {
      run: value["seeds"][0]["exact/suboptimality"]
      for run, value in json.loads((folder / "run" / name / "results.json").read_text())[
        "tabular"
      ].items()
    }
    for name in ("kappa", "eta", "beta")
  }
  assert {name: len(runs) for name, runs in found.items()} == {"kappa": 7, "eta": 7, "beta": 5}
  assert all(len(curve) == 21 for runs in found.values() for curve in runs.values())
  following, none = found["kappa"]["kappa = 1.0"], found["eta"]["eta = 1000000.0"]
  assert following == pytest.approx(none, rel=1e-3)
  assert following != pytest.approx(found["kappa"]["kappa = 0.0"], rel=1e-3)
  starts = [curve[0] for curve in found["beta"].values()]
  assert starts == sorted(starts, reverse=True)  # the weaker the pull, the worse the reference
  assert pictures(cells) == 3

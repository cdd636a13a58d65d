"""Notebooks run from top to bottom, with fewer steps, and do nothing but import and call."""

import ast
import json
import os

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
  """Returns what each code cell of a notebook left, run in a folder of its own."""
  nbclient = pytest.importorskip("nbclient")
  pytest.importorskip("ipykernel")
  notebook, folder = cells(request.param), tmp_path_factory.mktemp("notebook")
  for cell in notebook.cells:
    for old, new in SMALL[request.param].items():
      cell.source = cell.source.replace(old, new)
    cell.update({"outputs": []} if cell.cell_type == "code" else {})
  paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
  changes = {"PYTHONPATH": os.pathsep.join(paths), "JAX_PLATFORMS": "cpu",
             "MPLBACKEND": "agg", "IPYTHONDIR": str(folder)}  # fmt: skip
  with pytest.MonkeyPatch.context() as patch:
    for variable, value in changes.items():
      patch.setenv(variable, value)
    client = nbclient.NotebookClient(
      notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    client.execute()
  return [cell for cell in notebook.cells if cell.cell_type == "code"], folder


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize("executed", ["nash_mp_on_gemma"], indirect=True)
def test_the_gemma_notebook_trains_and_shows_texts_before_and_after(executed):
  code, folder = executed
  steps = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
  assert [line["step"] for line in steps] == [0, 1, 2]
  shown = [
    "".join(o.get("text", "") or str(o.get("data", {}).keys()) for o in cell.outputs
            if o.get("name") != "stderr")
    for cell in code
  ]  # fmt: skip
  estimate = next(o.data["text/markdown"] for o in code[2].outputs if "data" in o)
  assert "T4 has 15.0 GiB: fits" in estimate
  assert "image/png" in shown[4]
  for text in shown[5:8]:
    assert text.count("Lily saw a red kite in the park. ▸") == 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize("executed", ["ablations"], indirect=True)
def test_the_ablations_notebook_sweeps_and_its_two_ways_to_drop_the_target_agree(executed):
  code, folder = executed
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
  assert sum("image/png" in o.get("data", {}) for cell in code for o in cell.outputs) == 3

import os

import pytest


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning")
def test_the_notebook_runs_and_its_last_cell_finds_the_equilibrium(request, monkeypatch, tmp_path):
  nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
  pytest.importorskip("ipykernel")
  root = request.config.rootpath
  monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]))
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  monkeypatch.setenv("MPLBACKEND", "agg")
  monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
  notebook = nbformat.read(root / "colab" / "games.ipynb", as_version=4)
  assert not any(cell.get("outputs") for cell in notebook.cells)  # stored without results
  nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
  printed = "".join(output.get("text", "") for output in notebook.cells[-1].outputs)
  distance, subopt = (float(line.split(": ")[1]) for line in printed.splitlines())
  assert distance < 1e-12
  assert subopt < 1e-20

"""Notebooks run from top to bottom, with fewer steps, and do nothing but import and call."""

import ast
import importlib.util
import json
import tomllib
from unittest import mock

import jax
import numpy
import pytest
from paths import ROOT

from nash_jax.configs import colab

_SPEC = importlib.util.spec_from_file_location("colab_install", ROOT / "colab" / "install.py")
INSTALL = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(INSTALL)

TRAINING = {
  "STEPS = 60": "STEPS = 2",
  '"runs/colab"': '"run"',
  '"/kaggle/working/run"': '"run"',
  "c.steps = STEPS": "c.steps = STEPS\nc.prompts.batch_size = 4\nc.evaluation.prompts = 8\n"
  "c.sampling.max_tokens = 16",
  "max_tokens=48": "max_tokens=8",
}
SMALL = {
  "nash_mp_on_gemma": TRAINING,
  "nash_mp_on_kaggle": TRAINING,
  "ablations": {
    "STEPS = 1500": "STEPS = 20",
    '"runs/ablations"': '"run"',
    '"seeds": SEEDS': '"seeds": SEEDS, "base.prompts.batch_size": 16',
  },
  "labels": {"SEEDS = 10": "SEEDS = 3", '"runs/labels"': '"run"'},
  "poker": {"EPISODES = 1_000_000": "EPISODES = 50_000", '"runs/poker"': '"run"'},
}


def cells(name):
  nbformat = pytest.importorskip("nbformat")
  return nbformat.read(ROOT / "colab" / f"{name}.ipynb", as_version=4)


@pytest.mark.parametrize("name", SMALL)
def test_a_notebook_only_imports_assigns_and_calls_and_is_stored_with_pictures(name):
  code = [cell for cell in cells(name).cells if cell.cell_type == "code"]
  transformer = pytest.importorskip("IPython.core.inputtransformer2").TransformerManager()
  for cell in code:
    for statement in ast.parse(transformer.transform_cell(cell.source)).body:
      assert isinstance(statement, ast.Import | ast.ImportFrom | ast.Assign | ast.Expr)
  assert any("image/png" in output.get("data", {}) for cell in code for output in cell.outputs)
  assert not any(output.output_type == "error" for cell in code for output in cell.outputs)


@pytest.mark.parametrize("name", ["nash_mp_on_gemma", "nash_mp_on_kaggle"])
def test_a_notebook_begins_with_its_own_installation(name):
  first, *others = (cell for cell in cells(name).cells if cell.cell_type == "code")
  assert "setup" in first.metadata.tags
  assert "git clone" in first.source
  assert first.source.endswith("%run $CHECKOUT/colab/install.py")
  # A checkout called nash_jax beside the notebook would be imported in place of the package.
  assert 'nash_jax_checkout"' in first.source
  assert not any("pip install" in cell.source for cell in others)


@pytest.mark.parametrize(
  ("driver", "tpu", "expected"),
  [
    ("", False, ""),
    ("580.65.06", False, "[cuda]"),
    ("550.54.15", False, "[cuda12]"),
    ("", True, "[tpu]"),
  ],
)
def test_the_installation_fits_the_accelerator(driver, tpu, expected):
  assert INSTALL.extra(driver, tpu) == expected
  extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
  assert not expected or expected.strip("[]") in extras


def test_a_notebook_restarts_for_a_library_of_another_version_alone():
  assert INSTALL.stale({"numpy": numpy, "jax": jax}) == []
  other = mock.Mock(__version__="0.0.1")
  assert INSTALL.stale({"numpy": numpy, "jax": other, "os": other}) == ["jax 0.0.1"]


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
      if "setup" in cell.metadata.get("tags", []):
        continue
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
@pytest.mark.parametrize("executed", ["nash_mp_on_gemma", "nash_mp_on_kaggle"], indirect=True)
def test_the_gemma_notebooks_find_their_device_train_and_show_curves_and_texts(executed):
  (overview, _, table, training, texts, *samples), folder = executed
  steps = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
  assert [line["step"] for line in steps] == [0, 1, 2]
  shown = [
    next(data["text/markdown"] for data in cell[1] if "text/markdown" in data)
    for cell in (overview, table, texts)
  ]
  assert all(model in shown[0] for model in colab.MODELS)
  assert shown[0].startswith("CPU: ")
  assert shown[1].endswith("GiB: fits")
  assert pictures([training]) >= 1
  assert shown[2].count("**before**") == shown[2].count("**after**") == 4
  for printed, _ in samples:
    assert printed.count("Lily saw a red kite in the park.") == 2


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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize("executed", ["labels"], indirect=True)
def test_the_labels_notebook_finds_the_design_and_compares_four(executed):
  cells, folder = executed
  world, best, regrets, table, _, own = (printed for printed, _ in cells[2:])
  assert world.split() == "3000 pairs, 150 of them of rare prompts".split()
  uniform, optimal = (float(word) for word in best.split("uniform,")[0].split()[1:2] + [
    best.split("uniform, ")[1].split()[0]])  # fmt: skip
  assert 12 <= optimal <= 1.01 * 12 + 0.005 < uniform
  worst = {line.split()[0]: float(line.split()[2]) for line in regrets.splitlines()}
  assert worst["odpo"] < worst["uniform"] / 2
  assert table.count("| isotropic") == 8
  assert "first round" in own
  assert pictures(cells) == 1
  assert (folder / "run" / "design.csv").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize("executed", ["poker"], indirect=True)
def test_the_poker_notebook_learns_and_openspiel_agrees_with_its_gap(executed):
  cells, folder = executed
  kuhn, learned, bets, _, _, leduc, own = (printed for printed, _ in cells[2:])
  assert "= -1/18" in kuhn
  average, value, last = (float(line.rsplit(" ", 1)[1]) for line in learned.splitlines())
  assert average < 0.03
  assert value == pytest.approx(-1 / 18, abs=0.02)
  assert average < last
  rates = {label: float(rate) for label, rate in (line.split() for line in bets.splitlines())}
  assert min(rates["2b"], rates["2pb"]) > 0.9  # with the highest card, both call
  assert max(rates["0b"], rates["0pb"]) < 0.1
  random, (ours, theirs) = leduc.splitlines()[0], leduc.splitlines()[1].split("by OpenSpiel:")
  assert float(ours.split()[1]) == float(theirs) < float(random.rsplit(" ", 1)[1])
  sets = ast.literal_eval(own.splitlines()[0].partition(":")[2].strip())
  assert sets["two fists"][1] == pytest.approx(1 / 3, abs=0.05)  # the value is -1/3
  assert (folder / "run" / "policies" / "kuhn_poker_ixomd_0.json").exists()
  assert pictures(cells) == 1

"""Imports point down, through layers that are written down here once; no file is private to a few.

Every import counts: those inside functions, by importlib, and modules named in strings.
"""

import ast
import functools
import re
import tomllib

import pytest
from paths import ROOT

PACKAGE = ROOT / "nash_jax"

# From bottom to top. A module imports only modules of the layers below its own.
LAYERS = (
  ("validation", "types", "keys"),
  ("design.optimal",),
  ("design.rounds",),
  ("design.simulation",),
  ("games.checks", "games.charts"),
  ("games.base", "games.equilibria", "games.rewards"),
  ("games.preference", "games.files"),
  ("games.zoo", "games.proximal", "games.trees"),
  ("games.gradients", "games.balance", "games.episodes", "games.exact"),
  ("games.regret",),
  ("games.methods",),
  ("games.solvers",),
  ("games.contextual",),
  ("games.convergence",),
  ("games.comparison", "games.tree_study"),
  ("games.study", "data.files", "run.advice", "run.files", "run.signals", "run.tracker"),
  ("run.checkpoint", "run.lock", "run.metrics", "report"),
  ("run.page", "data.chat_template", "models.sharding"),
  ("data.tokenizer", "models.lora", "objectives.losses"),
  ("data.corpus", "data.judge_template", "models.gemma", "objectives.algorithms"),
  ("data.forms", "data.answers"),
  ("data.prompts", "data.preferences", "data.votes", "models.decoding", "models.logprobs"),
  ("sampler", "weights.files", "data.pairs"),
  ("weights.names", "weights.hf_config", "run.card"),
  ("weights.safetensors",),
  ("weights.orbax", "weights.adapters"),
  ("weights",),
  ("judges.base", "judges.chat", "policy"),
  ("judges.gemma", "judges.table", "judges.population", "judges.http", "judges.human"),
  ("judges.text", "judges.bradley_terry", "judges.own"),
  ("judges.gpm", "judges.features"),
  ("judges", "exact", "run.inputs"),
  ("config.fields", "config.meanings"),
  ("config.comparison",),
  ("config.unread", "config.page", "config.files", "update"),
  ("config.checks",),
  ("config",),
  ("run.loop", "iteration"),
  ("train", "fit", "plan.topology", "plan.hlo_cost", "plan.memory"),
  ("plan",),
  ("jobs.rates", "jobs.outputs"),
  (
    "jobs.arena",
    "jobs.collect",
    "jobs.sample",
    "jobs.sweep",
    "jobs.short_game",
    "jobs.convert",
    "jobs.export",
  ),
  ("jobs.agreement", "jobs.compare", "jobs.demo", "jobs.design", "jobs.notebook"),
  ("jobs.vote_statistics",),
  ("jobs.vote_page",),
  ("jobs.vote",),
  ("", "main"),
)
HEIGHT = {module: height for height, layer in enumerate(LAYERS) for module in layer}
# Packages that only have a docstring: importing from them is importing their modules.
EMPTY = ("data", "design", "games", "jobs", "models", "objectives", "run")


@functools.cache
def modules() -> dict[str, ast.Module]:
  """Returns the syntax tree of every module by its dotted name within the package."""
  trees = {}
  for path in PACKAGE.rglob("*.py"):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    trees[name] = ast.parse(path.read_text(encoding="utf-8"))
  return trees


def named(text: str) -> set[str]:
  """Returns the module that a dotted text names, if it is one of ours."""
  name = text.removeprefix("nash_jax").removeprefix(".")
  return {name} if text.startswith("nash_jax") and name in modules() else set()


def imports(name: str) -> set[str]:
  """Returns the modules of ours that a module imports, wherever and however it does."""
  found = set()
  for node in ast.walk(modules()[name]):
    if isinstance(node, ast.Import):
      for alias in node.names:
        found |= named(alias.name)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{name}: relative import, line {node.lineno}"
      for alias in node.names:
        found |= named(f"{node.module}.{alias.name}") or named(node.module or "")
  if name == "":  # what it offers lazily
    tables = [node.value for node in modules()[""].body if isinstance(node, ast.Assign)]
    strings = [n.value for table in tables for n in ast.walk(table) if isinstance(n, ast.Constant)]
    found |= {text for text in strings if text in modules()}
    found |= {f"jobs.{text}" for text in strings if f"jobs.{text}" in modules()}
  if name == "main":
    strings = [n.value for n in ast.walk(modules()[name]) if isinstance(n, ast.Constant)]
    found |= {text for text in strings if isinstance(text, str) and text in modules()} - {""}
  return found - {name}


def test_every_module_has_its_layer_and_every_layer_its_modules():
  assert set(HEIGHT) == set(modules()) - set(EMPTY)
  assert sum(map(len, LAYERS)) == len(HEIGHT), "a module stands in two layers"


@pytest.mark.parametrize("name", sorted(HEIGHT))
def test_imports_point_down(name):
  for other in sorted(imports(name) - set(EMPTY)):
    assert HEIGHT[other] < HEIGHT[name], f"{name or 'nash_jax'} imports {other}, which lies higher"


def test_games_are_self_contained_and_objectives_know_no_model():
  for name in modules():
    if name.startswith("games."):
      assert {m.split(".")[0] for m in imports(name)} <= {"games", "validation"}, name
    if name.startswith("objectives."):
      assert {m.split(".")[0] for m in imports(name)} <= {"objectives", "types", "validation"}, name


def test_nothing_is_imported_but_by_name():
  """Only where jobs are named is a module looked up by importlib; none takes another name."""
  for name, tree in modules().items():
    for node in ast.walk(tree):
      if isinstance(node, ast.Attribute) and node.attr == "import_module":
        assert name in ("", "main"), f"{name}:{node.lineno}"
      if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nash_jax"):
        for alias in node.names:
          module = named(f"{node.module}.{alias.name}")
          assert not (module and alias.asname), f"{name}:{node.lineno} renames {alias.name}"


def test_every_package_is_installed():
  """Those of pyproject.toml, which a wheel is made of, are the folders that hold modules."""
  project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
  folders = {path.parent.relative_to(ROOT) for path in PACKAGE.rglob("*.py")}
  configs = {path.parent.relative_to(ROOT) for path in (ROOT / "configs").rglob("*.py")}
  packages = {".".join(folder.parts) for folder in folders}
  packages |= {".".join(("nash_jax", *folder.parts)) for folder in configs}
  assert set(project["tool"]["setuptools"]["packages"]) == packages


def test_few_files_lie_flat():
  assert len(list(PACKAGE.glob("*.py"))) <= 13


def test_functions_are_short():
  """At most 70 lines, but for the two that are one thing each: an update and a sampler."""
  for name, tree in modules().items():
    for node in ast.walk(tree):
      if isinstance(node, ast.FunctionDef) and node.name not in ("make_update", "make_sampler"):
        lines = (node.end_lineno or node.lineno) - node.lineno + 1
        assert lines <= 70, f"{name}.{node.name} has {lines} lines"


# Folders of tests that are not a folder of the package's.
OTHER_FOLDERS = {"train", "colab", "launch", "configs", "helpers", "programs", "fixtures"}


def test_tests_follow_the_package():
  """A folder for each of its folders; short files, of which none imports another's tests."""
  tests = ROOT / "tests"
  folders = {path.relative_to(tests).parts[0] for path in tests.rglob("*/*.py")}
  assert folders - OTHER_FOLDERS <= {path.parent.name for path in PACKAGE.glob("*/*.py")}
  for path in sorted(tests.rglob("*.py")):
    name, text = path.relative_to(tests), path.read_text(encoding="utf-8")
    if name.parts[0] != "games":  # equations, laid out by hand
      assert len(text.splitlines()) <= 400, f"{name} is long: split it by what is tested"
    found = re.search(r"^ *(?:from|import) (test_\w+)", text, re.MULTILINE)
    assert not found, f"{name} imports {found[1]}: move what they share to tests/helpers"


# Words that only insiders would know, as names of functions, parameters and variables.
PRIVATE_WORDS = {"it", "do", "against", "drawn", "moves", "rotate", "play", "told", "law", "of"}


def test_names_are_words_of_the_field():
  """In code, that is: an English sentence may hold any word."""
  for name, tree in modules().items():
    for node in ast.walk(tree):
      used = {
        ast.Name: lambda n: n.id,
        ast.arg: lambda n: n.arg,
        ast.FunctionDef: lambda n: n.name,
        ast.Attribute: lambda n: n.attr,
        ast.keyword: lambda n: n.arg or "",
      }.get(type(node), lambda n: "")(node)
      assert used.strip("_") not in PRIVATE_WORDS, f"{name}:{node.lineno}: {used}"

"""Pages name fields that exist, with their defaults; their code runs, their commands resolve."""

import ast
import math
import re
import sys

import doc_pages
import pytest
from paths import ROOT

from nash_jax import config, main
from nash_jax.config import checks, fields, files
from nash_jax.objectives import algorithms
from nash_jax.plan import topology
from nash_jax.run.metrics import GLOSSARY

FIELD = re.compile(r"`([a-z_0-9]+(?:\.[a-z_0-9]+)+)`(?: \(([^(),]+)[),])?")


@pytest.fixture(scope="module")
def page():
  return (ROOT / "docs" / "from_trl.md").read_text(encoding="utf-8")


def test_the_page_for_users_of_trl_names_fields_that_exist_with_their_defaults(page):
  train, stated = config.train(), 0
  for name, default in FIELD.findall(page):
    value = train
    if name.split(".")[0] not in train:
      continue
    for part in name.split("."):
      assert part in value, f"{name}: no field {part}"
      value = value[part]
    if default:
      stated += 1
      expected = default if isinstance(value, str) else ast.literal_eval(default)
      assert value == expected, f"{name} is {value!r}, the page says {expected!r}"
  assert stated > 10


def test_the_page_for_users_of_trl_names_methods_and_metrics_that_exist(page):
  methods = re.findall(r"`algorithm.name` = `([a-z_]+)`", page)
  assert set(methods) == {"nash_md", "online_dpo", "online_ipo", "gpo", "best_of_two", "grpo"}
  assert set(methods) <= set(algorithms.ALGORITHMS)
  for log, least in (("TRL's log", 4), ("GRPOTrainer's log", 7)):
    table = page[page.index(f"| {log} | here |") :].split("\n\n")[0].splitlines()[2:]
    shown = [line.split("|")[2] for line in table if "config.json" not in line]
    here = [name for cell in shown for name in re.findall(r"`([a-z_]+)`", cell)]
    assert set(here) <= set(GLOSSARY)
    assert len(here) >= least


def test_the_arenas_page_has_a_config_whose_fields_exist_and_are_read():
  page = (ROOT / "docs" / "arena.md").read_text(encoding="utf-8")
  blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
  (code,) = (block for block in blocks if "alpaca_eval" in block)
  exec(code, names := {})
  arena = names["get_config"]()
  given = ["policies.gpt.outputs", "prompts.path", "judges.judge.http.model", "model.template"]
  config.refuse_unread(arena, "arena", given)
  assert arena.prompts.task == "alpaca_eval"


def name_of(path):
  return path.relative_to(ROOT).as_posix()


pages = pytest.mark.parametrize("page", doc_pages.PAGES, ids=name_of)
SLOW = [
  page for page in doc_pages.PAGES if any(block.runs == "slow" for block in doc_pages.blocks(page))
]


@pages
def test_every_block_of_code_is_fenced_and_names_its_language(page):
  for block in doc_pages.blocks(page):
    assert block.language in doc_pages.LANGUAGES, f"{block}: language {block.language!r}"


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """An empty working directory, from which a page's own modules are imported."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
  known = {*sys.modules}
  yield tmp_path
  for name in {*sys.modules} - known:  # shorter.py of another page is another module
    if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
      del sys.modules[name]


@pages
def test_the_python_of_a_page_runs(page, folder):
  doc_pages.run_blocks(page, folder, slow=False)


@pytest.mark.slow
@pytest.mark.parametrize("page", SLOW, ids=name_of)
def test_all_that_a_page_says_can_be_run_here_runs(page, folder):
  doc_pages.run_blocks(page, folder, slow=True)


config_files = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


def resolve(command, monkeypatch):
  """Parses a command and resolves its config, as if every file and package were there."""
  job, c, given, values = doc_pages.parse(command)
  expected = main.CONFIG_OF.get(job, job)
  assert c.get("job", expected) == expected, f"the config is of the job {c.job}"
  devices = None
  if job == "plan" and (name := values["topology"].value) != topology.LOCAL:
    grid = topology.SLICES.get(name, name).partition(":")[2]
    devices = math.prod(map(int, grid.split("x")))
  if expected in fields.DECLARED:  # other jobs check their configs themselves
    config.refuse_unread(c, expected, given)
    monkeypatch.setattr(files, "require_present", lambda *_: None)
    monkeypatch.setattr(checks, "_is_installed", lambda _: True)
    config.resolve(c, expected, devices)


def check_commands(code, where, folder, monkeypatch):
  for command in doc_pages.commands(code, folder):
    try:
      resolve(command, monkeypatch)
    except Exception as error:
      pytest.fail(f"{where}: nash-jax {' '.join(command)}\n{type(error).__name__}: {error}")


@config_files
@pages
def test_the_commands_of_a_page_parse_and_their_configs_resolve(page, folder, monkeypatch):
  for block in doc_pages.blocks(page):
    if block.language == "python" and (file := doc_pages.FILE.match(block.code)):
      (folder / file[1]).write_text(block.code, encoding="utf-8")
    code = block.code if block.language == "bash" else doc_pages.shown(block)
    check_commands(code, block, folder, monkeypatch)


@config_files
@pytest.mark.parametrize("notebook", doc_pages.NOTEBOOKS, ids=name_of)
def test_the_commands_of_a_notebook_parse_and_their_configs_resolve(notebook, folder, monkeypatch):
  check_commands(doc_pages.of_notebook(notebook), name_of(notebook), folder, monkeypatch)

"""docs/guides/: what a reader types in does what the pages say."""

import importlib
import inspect
import json
import pathlib
import re
import runpy
import socket
import subprocess
import sys
import textwrap
import time

import enumeration
import jax
import numpy as np
import pytest
import tiny
from judge_examples import examples, prompts_of, responses_of, verdict_of
from paths import ROOT

import nash_jax
from nash_jax import judges
from nash_jax.config import comparison, fields, resolve
from nash_jax.data.tokenizer import BUNDLED, Tokenizer
from nash_jax.models import sharding
from nash_jax.objectives import algorithms, losses
from nash_jax.run import checkpoint

GUIDES = ROOT / "docs" / "guides"
FENCE = re.compile(r"^( *)```(\w+)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


def blocks(page, language="python"):
  text = (GUIDES / f"{page}.md").read_text(encoding="utf-8")
  return [textwrap.dedent(code) for _, found, code in FENCE.findall(text) if found == language]


def holding(page, text, language="python"):
  """Returns the one block of a page that has this text."""
  (code,) = (block for block in blocks(page, language) if text in block)
  return code


@pytest.fixture
def type_in(tmp_path, monkeypatch):
  """Returns a function that writes a page's files into a new working directory."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
  monkeypatch.setattr(algorithms, "ALGORITHMS", {**algorithms.ALGORITHMS})
  known = {*sys.modules}

  def write(page):
    for code in blocks(page):
      if name := re.match(r"# (\w+\.py)\n", code):
        (tmp_path / name[1]).write_text(code, encoding="utf-8")
    return tmp_path

  yield write
  for name in {*sys.modules} - known:
    if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
      del sys.modules[name]


def test_the_first_run_shows_how_another_config_is_refused(tmp_path):
  (tmp_path / "runs" / "mine").mkdir(parents=True)
  saved = {"algorithm": {"beta": 0.05}}
  (tmp_path / "runs" / "mine" / "config.json").write_text(json.dumps(saved))
  with pytest.raises(ValueError, match="another config") as error:
    checkpoint.check_config(tmp_path / "runs" / "mine", {"algorithm": {"beta": 0.1}})
  told = f"nash-jax train: {error.value}".replace(str(tmp_path), "...")
  assert holding("first_run", "made with another config", "text").strip() == told


def test_the_added_method_has_the_gradient_that_its_page_prints(type_in, capsys):
  checked = runpy.run_path(str(type_in("add_method") / "check.py"))
  assert np.abs(checked["expected"]).max() > 0.1
  printed = [np.array(re.findall(r"-?\d\.\d+", line), float) for line in _lines(capsys)[:2]]
  page = holding("add_method", "largest difference", "text").splitlines()[:2]
  for line, numbers in zip(page, printed, strict=True):
    np.testing.assert_allclose(np.array(re.findall(r"-?\d\.\d+", line), float), numbers, atol=2e-6)


def _lines(capsys):
  return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
  ("right", "wrong"),
  [
    ("0.5 - wins[..., None]", "wins[..., None] - 0.5"),
    ("arms=2", "arms=1"),
    ("+ chi[..., None]", "- chi[..., None]"),
  ],
)
def test_the_check_finds_what_its_page_warns_of(type_in, right, wrong):
  folder = type_in("add_method")
  code = (folder / "chi.py").read_text()
  assert right in code
  (folder / "chi.py").write_text(code.replace(right, wrong))
  with pytest.raises(AssertionError):
    runpy.run_path(str(folder / "check.py"))


def into_the_package(monkeypatch):
  """Moves the loss to losses, and the lines that state its objective to enumeration."""
  space = {**vars(losses), "jnp": jax.numpy}
  exec(inspect.getsource(sys.modules["chi"].chi_policy_gradient).replace("losses.", ""), space)
  monkeypatch.setattr(losses, "chi_policy_gradient", space["chi_policy_gradient"], raising=False)
  monkeypatch.setattr(sys.modules["chi"], "chi_policy_gradient", losses.chi_policy_gradient)
  lines = textwrap.indent(holding("add_method", "if method is"), "  ")
  code = inspect.getsource(enumeration.regularised)
  head, end, tail = code.rpartition("  return arms")
  assert head
  exec(head + lines + end + tail, space := dict(vars(enumeration)))
  monkeypatch.setattr(enumeration, "regularised", space["regularised"])


@pytest.mark.parametrize("length", enumeration.LENGTHS)
def test_the_added_method_passes_the_packages_own_test(type_in, monkeypatch, length):
  type_in("add_method")
  importlib.import_module("chi")
  into_the_package(monkeypatch)
  enumeration.compare("chi_self_play", enumeration.config(), length)


def test_the_added_methods_lines_fit_the_tables_that_they_go_to():
  page = (ROOT / "docs" / "algorithms.md").read_text(encoding="utf-8")
  lines = holding("add_method", "](#chi_self_play)", "text").splitlines()
  for line, part in zip(lines, page.split("### What a step costs"), strict=True):
    name = line.split("|")[1].split("](")[0].strip().replace("chi_self_play", "reg_self_play")
    other = next(x for x in part.splitlines() if x.startswith(f"| {name}"))
    assert line.count("|") == other.count("|")


@pytest.mark.slow
def test_the_added_method_is_compared_on_the_short_game(type_in):
  folder = type_in("add_method")
  code = (folder / "short.py").read_text()
  few = "base.steps, base.evaluation.every = 20, 10\nruns = ["
  (folder / "short.py").write_text(code.replace("runs = [", few))
  runpy.run_path(str(folder / "short.py"))
  results = json.loads((folder / "runs" / "chi" / "results.json").read_text())["tabular"]
  assert {*results} == {"reg_self_play", "chi_self_play"}


def test_the_text_judge_agrees_with_the_examples_of_its_page(type_in):
  sys.path.insert(0, str(type_in("add_judge")))
  on_topic = importlib.import_module("on_topic")
  records = re.findall(r"^\{.*\}$", "\n".join(blocks("add_judge", "bash")), re.MULTILINE)
  longer = 0
  for record in map(json.loads, records):
    told = on_topic.prefer(record["prompt"], record["chosen"], record["rejected"])
    turned = on_topic.prefer(record["prompt"], record["rejected"], record["chosen"])
    assert told > 0.5
    assert told + turned == pytest.approx(1)
    longer += len(record["chosen"]) > len(record["rejected"])
  assert (longer, len(records)) == (1, 3)


def test_the_judge_of_the_page_becomes_one_of_the_packages(type_in, monkeypatch):
  """With what the page says to add it is named in a config, and is fair and blind to padding."""
  type_in("add_judge")
  space = {**vars(importlib.import_module("varied")), **vars(judges.base), "sharding": sharding}
  exec(holding("add_judge", "sharding.shard"), space)
  monkeypatch.setitem(judges.JUDGES, "varied", space["make"])
  monkeypatch.setitem(fields.JUDGES, "varied", ("mesh",))
  config = resolve(tiny.train({"judge.name": "varied"}))
  judge = judges.make(config.judge, Tokenizer(BUNDLED, "plain"))
  prompts, rows = examples()
  rows[0][1] = [9, 9, 9, 9]
  prompts = prompts_of(prompts, 8)
  own = verdict_of(judge, prompts, responses_of(rows, 8), None)
  other = verdict_of(judge, prompts, responses_of(rows, 10, 9), responses_of(rows, 8))
  np.testing.assert_allclose(own.p_win + own.p_win.swapaxes(1, 2), 1, atol=1e-6)
  np.testing.assert_allclose(other.p_win, own.p_win, atol=1e-6)
  assert np.all(own.p_win[0, [0, 2], 1] > 0.9)  # over the one that repeats itself
  with pytest.raises(ValueError, match="expected one of"):
    resolve(tiny.train({"judge.name": "varied_not"}))


@pytest.mark.slow
def test_the_arena_asks_the_pages_stand_in(type_in):
  folder = type_in("add_judge")
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = str(probe.getsockname()[1])
  program = (folder / "stand_in.py").read_text().replace("8000", port)
  (folder / "stand_in.py").write_text(program)
  command = holding("add_judge", "runs/asked", "bash").replace("8000", port)
  command = command.replace("runs/demo", "assets:stories/policy.safetensors")
  arguments = [*command.replace("\\\n", " ").split(), "--config.sampling.max_tokens=8"]
  server = subprocess.Popen([sys.executable, "stand_in.py"], cwd=folder)
  try:
    for _ in range(300):
      with socket.socket() as client:
        if client.connect_ex(("127.0.0.1", int(port))) == 0:
          break
      time.sleep(0.1)
    subprocess.run([pathlib.Path(sys.executable).parent / arguments[0], *arguments[1:]], check=True)
  finally:
    server.terminate()
    server.wait()
  told = json.loads((folder / "runs" / "asked" / "arena.json").read_text())
  assert told["judges"]["judge"]["metrics"]["neither"] == 0


def test_the_table_of_methods_is_that_of_the_code_and_of_the_short_game():
  page = (GUIDES / "which_method.md").read_text(encoding="utf-8")
  rows = [
    line.split("|")[1:-1] for line in page.splitlines() if re.match(r"\| `\w+` \|.*[\d—] \|$", line)
  ]
  rows = {name.strip(" `"): [cell.strip() for cell in cells] for name, *cells in rows}
  ends = {strength: _ends(strength) for strength in ("Mild", "Strong")}
  assert {*rows} == {*ends["Mild"]} == {*ends["Strong"]}
  assert [*rows] == [name for name in algorithms.ALGORITHMS if name in rows]
  assert all(f"`{name}`" in page for name in algorithms.ALGORITHMS)
  for name, (_, who, pairs, copies, *shares) in rows.items():
    method, config = algorithms.get(name), nash_jax.config.train().algorithm
    config.name = name
    algorithms.fill_defaults(config)
    assert who == f"{method.player}, {method.opponent or 'own'}", name
    own, opponents = method.samples(config)
    judged = own * opponents or own * (own - 1) // 2
    assert pairs == ("none" if method.offline else f"{judged} ({config.samples})"), name
    held = {*method.copies} - {"start_opt_state"}
    assert int(copies) == len(held) + method.keeps_target(config), name
    assert shares == [ends["Mild"][name], ends["Strong"][name]], name


def _ends(strength):
  """Returns by method what docs/short_game.md says under tables of logits, "of reference's"."""
  page = (ROOT / "docs" / "short_game.md").read_text(encoding="utf-8")
  part = page.split(f"### {strength}\n")[1].split("\n![")[0]
  rows = [line.split("|")[1:-1] for line in part.splitlines() if line.startswith("|")]
  header, _, *cells = [[cell.strip(" `") for cell in row] for row in rows]
  share = header.index("of reference's")
  return {row[0]: row[share] for row in cells if row[0] in algorithms.ALGORITHMS}


def test_what_concerns_all_runs_of_an_ablation_is_said_once(caplog):
  c = tiny.train({"evaluation.every": 2, "steps": 60, "checkpoint.every": 37})
  runs = comparison.name_runs([{"algorithm.beta": b} for b in (0.1, 0.2, 0.3)])
  with caplog.at_level("INFO", logger="absl"):
    for run in runs:
      resolve(comparison.run_config(c, run.changes, None, 0), "train")
  assert sum("checkpoints every 37" in line for line in caplog.messages) == 1

"""Pages that name fields of the config name those that exist, with the defaults they have."""

import ast
import re

import pytest
from paths import ROOT

from nash_jax import config
from nash_jax.objectives import algorithms
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
  assert set(methods) == {"nash_md", "online_dpo", "online_ipo"}
  assert set(methods) <= set(algorithms.ALGORITHMS)
  table = page[page.index("| TRL's log | here |") :].split("\n\n")[0].splitlines()[2:]
  here = [re.findall(r"`([a-z_]+)`", line.split("|")[2]) for line in table[:-1]]
  assert {name for names in here for name in names} <= set(GLOSSARY)
  assert sum(map(len, here)) >= 4


def test_the_arenas_page_has_a_config_whose_fields_exist_and_are_read():
  page = (ROOT / "docs" / "arena.md").read_text(encoding="utf-8")
  blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
  (code,) = (block for block in blocks if "alpaca_eval" in block)
  exec(code, names := {})
  arena = names["get_config"]()
  given = ["policies.gpt.outputs", "prompts.path", "judges.judge.http.model", "model.template"]
  config.refuse_unread(arena, "arena", given)
  assert arena.prompts.task == "alpaca_eval"

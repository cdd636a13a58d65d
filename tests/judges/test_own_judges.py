"""A judge that a config names as "my_module:make": found, checked early, used by every job."""

import os
import re
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest
import tiny
from jax import numpy as jnp
from judge_examples import examples, prompts_of, responses_of, verdict_of
from paths import PYTHONPATH, ROOT

import nash_jax
from nash_jax import judges, train
from nash_jax.config import refuse_unread, resolve
from nash_jax.data.tokenizer import BUNDLED, Tokenizer
from nash_jax.judges import own
from nash_jax.models import sharding
from nash_jax.run import inputs

PAGE = (ROOT / "docs" / "judges.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n# (\w+)\.py\n(.*?)```", PAGE, re.DOTALL)
SHORTER = """
import jax
import jax.numpy as jnp
from nash_jax import judges

def read(params, prompts, answers):
  return answers.mask.sum(axis=1)

def compare(params, prompts, a, b):
  p = jax.nn.sigmoid(params["slope"] * (b - a))
  return p, jnp.ones(p.shape, bool), {}

def make(config, tokenizer):
  return judges.Judge({"slope": 0.1}, judges.pairwise(compare, read))
"""


@pytest.fixture(scope="module")
def tokenizer():
  return Tokenizer(BUNDLED, "plain")


@pytest.fixture
def write(tmp_path, monkeypatch):
  """Returns a function that writes a module into the working directory, a new one each time."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, "path", [*sys.path])
  before = {*sys.modules}

  def write(text, name="mine"):
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))
    return f"{name}:make"

  yield write
  for name in {*sys.modules} - before:
    if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
      del sys.modules[name]


def settings(name):
  config = nash_jax.config.train().judge
  config.name = name
  return config


def refused(call, *parts):
  with pytest.raises(ValueError, match="judge") as caught:
    call()
  message = str(caught.value)
  assert "\n" not in message
  for part in parts:
    assert part in message, message


def test_a_function_is_found_in_the_working_directory_or_on_the_path(write, tmp_path):
  assert own.find(write(SHORTER))(None, None).params == {"slope": 0.1}
  folder = tmp_path / "elsewhere" / "pack"
  folder.mkdir(parents=True)
  (folder / "deep.py").write_text(SHORTER.replace("make", "build"))
  sys.path.append(str(folder.parent))
  assert own.find("pack.deep:build").__module__ == "pack.deep"
  config = tiny.train({"judge.name": "pack.deep:build"})
  assert resolve(config).judge.name == "pack.deep:build"


def test_a_working_directory_without_the_module_is_not_put_on_the_path(write, tmp_path):
  refused(lambda: own.find("absent:make"), "a module in the working directory", "PYTHONPATH")
  assert str(tmp_path) not in sys.path


WRONG = {
  "no function": ("x = 1", ("mine.py", "nothing of that name")),
  "another name": ("def maker(config, tokenizer): 0", ("did you mean 'maker'",)),
  "no callable": ("make = 3", ("a function make", "int")),
  "one argument": ("def make(config): 0", ("make(config, tokenizer)", "too many positional")),
  "more arguments": ("def make(config, tokenizer, slope): 0", ("slope",)),
  "a bug": ("\n1 / 0", ("ZeroDivisionError: division by zero", "mine.py:2")),
  "no Python": ("def make(:", ("SyntaxError", "mine.py")),
  "a missing library": ("import no_such_library", ("mine cannot be imported", "no_such_library")),
  "an exit": ("raise SystemExit('bye')", ("SystemExit: bye",)),
}


@pytest.mark.parametrize(("text", "parts"), WRONG.values(), ids=[*WRONG])
def test_what_is_no_function_of_a_judge_is_refused_with_the_config(write, text, parts):
  config = tiny.train({"judge.name": write(text)})
  refused(lambda: resolve(config), "judge.name: ", *parts)
  contest = nash_jax.config.arena()
  contest.judges.mine = contest.judges.judge.copy_and_resolve_references()
  contest.judges.mine.name = "mine:make"
  refused(lambda: resolve(contest), "judges.mine.name: ", *parts)


@pytest.mark.parametrize(
  ("name", "part"),
  [("mine.py:make", "Leave .py out"), ("a/b:make", "dots"), ("mine:", "my_judge:make")],
)
def test_what_is_no_name_of_a_function_is_told_how_one_looks(name, part):
  config = tiny.train({"judge.name": name})
  refused(lambda: resolve(config), "judge.name: expected module:function", part)
  config.judge.name = "populaton"
  refused(lambda: resolve(config), "module:function", "did you mean 'population'")


def judge_of(params, fn):
  return f"""
import jax.numpy as jnp
from nash_jax import judges, types

def make(config, tokenizer):
  return judges.Judge({params}, {fn})

def compare(params, prompts, a, b):
  return jnp.zeros(len(a.tokens)), jnp.ones(len(a.tokens), bool), METRICS

def p_alone(params, prompts, responses, opponents):
  return jnp.full(responses.stopped.shape, 0.5)

def flat(params, prompts, responses, opponents=None):
  return types.Verdict(jnp.zeros(4), jnp.ones(4, bool))

METRICS = {{}}
"""


NO_JUDGE = {
  "nothing": ("def make(config, tokenizer): 0", ("what mine:make returns", "Judge", "NoneType")),
  "raises": ("def make(config, tokenizer):\n  return {}['x']", ("KeyError: 'x'", "mine.py:2")),
  "texts as params": (judge_of("{'x': 'text'}", "flat"), ("params", "arrays of numbers")),
  "no fn": (judge_of("{}", "3"), ("fn", "a function", "int")),
  "another fn": (
    judge_of("{}", "lambda x: x"),
    ("fn(params, prompts, responses, None)", "TypeErr"),
  ),
  "no Verdict": (judge_of("{}", "p_alone"), ("a Verdict",)),
  "wrong shape": (judge_of("{}", "flat"), ("p_win", "[2, 2, 2]", "float32[4]")),
  "unknown metric": (
    judge_of("{}", "judges.pairwise(compare)").replace("METRICS = {}", "METRICS = {'length': 1}"),
    ("metrics", "judge/", "length"),
  ),
}


@pytest.mark.parametrize(("text", "parts"), NO_JUDGE.values(), ids=[*NO_JUDGE])
def test_what_a_function_returns_is_checked_by_shapes_alone(write, tokenizer, text, parts):
  config = settings(write(text))
  refused(lambda: judges.make(config, tokenizer), "judge.name: ", *parts)


def test_a_wrong_judge_is_refused_before_weights_load(write, tmp_path, monkeypatch):
  monkeypatch.setattr(train, "load_weights", lambda *args, **options: pytest.fail("loaded"))
  config = tiny.train({"judge.name": write("def make(config, tokenizer): 0")})
  refused(lambda: train.run(config, tmp_path / "run", progress=False), "what mine:make returns")


def test_rewards_are_asked_for_where_the_method_needs_them(write, tokenizer, tmp_path):
  name = write(SHORTER)
  config = tiny.train({"judge.name": name, "algorithm.name": "rlhf"})
  refused(lambda: train.run(config, tmp_path / "run", progress=False), "rewards", "scalar=True")
  rewarding = SHORTER.replace(
    "pairwise(compare, read)", "pairwise(judges.compare_rewards, reward, True)"
  )
  rewarding += "\ndef reward(params, prompts, answers):\n  return -0.1 * answers.mask.sum(axis=1)\n"
  judge = judges.make(settings(write(rewarding, "rewarding")), tokenizer, rewards=True)
  prompts, rows = examples()
  verdict = verdict_of(judge, prompts_of(prompts, 8), responses_of(rows, 8), None)
  lengths = np.array([[len(y) for y in row] for row in rows])
  np.testing.assert_allclose(verdict.rewards, -0.1 * lengths, rtol=1e-6)


def test_parameters_are_held_by_every_device_unless_they_are_laid_out(write, tokenizer):
  mesh = sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": 1})
  text = SHORTER.replace("tokenizer):", "tokenizer, mesh):") + "\nimport numpy as np\n"
  text = text.replace('{"slope": 0.1}', '{"slope": 0.1, "table": np.eye(3), "mesh": mesh.size}')
  judge = judges.make(settings(write(text)), tokenizer, mesh=mesh)
  assert {x.sharding for x in jax.tree.leaves(judge.params)} == {sharding.replicated(mesh)}
  assert judge.params["mesh"] == mesh.size
  assert own.shardings(judge.params, mesh) == jax.tree.map(lambda x: x.sharding, judge.params)


def test_a_run_takes_its_judge_and_refuses_another_on_resume(write, tmp_path, assembled):
  config = tiny.train({"judge.name": write(SHORTER), "steps": 3})
  judge = judges.make(config.judge, assembled.tokenizer)

  def found(judge):
    parts = (config, judge.params, assembled.train_prompts, assembled.held_out)
    return inputs.of_training(*parts)["judge.name"]

  first = found(judge)
  assert [*first] == [str(tmp_path / "mine.py"), "its parameters"]
  assert first == found(judges.make(config.judge, assembled.tokenizer))
  other = found(judge.replace(params={"slope": jnp.float32(0.2)}))
  assert {name for name in first if first[name] != other[name]} == {"its parameters"}
  write(SHORTER + "# changed\n")
  assert {name for name in first if first[name] != found(judge)[name]} == {
    str(tmp_path / "mine.py")
  }


def test_every_field_of_the_config_may_be_read_by_it_and_a_comparison_checks_it_first(write):
  name = write(SHORTER)
  config = tiny.train({"judge.name": name, "judge.template": "gemma"})
  refuse_unread(config, "train", ["judge.template", "judge.table", "judge.name"])
  comparison = nash_jax.config.compare(tiny.train(), ({}, {"judge.name": name}))
  resolve(comparison)
  comparison.runs = ({}, {"judge.name": "absent:make", "label": "mine"})
  refused(lambda: resolve(comparison), "run 'mine': judge.name: expected a module")


DEVICES = """
import jax, numpy as np
from judge_examples import examples, prompts_of, responses_of
from nash_jax import judges
from nash_jax.data.tokenizer import BUNDLED, Tokenizer
from nash_jax.models import sharding

prompts, rows = examples()
batch = prompts_of(prompts, 8), responses_of(rows, 8)
tokenizer = Tokenizer(BUNDLED, "plain")
mesh = sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": 1})
prefer = lambda prompt, a, b: 1 / (1 + np.exp(len(b) - len(a)))
one = jax.jit(judges.from_texts(prefer, tokenizer).fn)({}, *batch, None)
judge = judges.from_texts(prefer, tokenizer, mesh)
place = lambda x: jax.device_put(x, sharding.batch_sharding(mesh))
two = sharding.jit(mesh, judge.fn)({}, *jax.tree.map(place, batch), None)
assert mesh.size == 2 and np.ptp(one.p_win) > 0.5
np.testing.assert_array_equal(one.p_win, two.p_win)
assert two.p_win.sharding.is_equivalent_to(sharding.batch_sharding(mesh), 3)
"""


@pytest.mark.slow  # a process of its own
def test_two_devices_ask_a_function_of_texts_what_one_does():
  flags = "--xla_force_host_platform_device_count=2"
  env = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": PYTHONPATH}
  subprocess.run([sys.executable, "-c", DEVICES], check=True, env=env)


@pytest.mark.slow  # compiles a run
def test_a_run_of_an_own_judge_trains_resumes_and_refuses_what_changed(write, tmp_path):
  name = write(SHORTER)
  whole = tiny.train({"judge.name": name, "algorithm.name": "nash_mp", "sampling.max_tokens": 12})
  first = tiny.train({"judge.name": name, "steps": 3})
  assert not train.run(first, tmp_path / "run", progress=False).stopped
  done = train.run(whole, tmp_path / "run", progress=False)
  assert int(done.state.step) == 6
  changed = tiny.train({"judge.name": "population"})
  with pytest.raises(ValueError, match=r"judge.name: 'mine:make' there, 'population' here"):
    train.run(changed, tmp_path / "run", progress=False)
  write(SHORTER.replace("0.1", "0.2"))
  with pytest.raises(ValueError, match=r"not those that it started with:\n  judge.name: .*mine.py"):
    train.run(whole, tmp_path / "run", progress=False)


def test_a_function_of_texts_is_asked_in_both_orders_and_once_a_pair(tokenizer):
  prompts, y = ["One day"], [[" ran home.", " sat.", " went to the park."]]
  asked = []

  def prefer(prompt, a, b):
    asked.append((prompt, a, b))
    return 0.9 if len(a) < len(b) else 0.3

  judge = judges.from_texts(prefer, tokenizer)
  rows = [[tokenizer.response(x) for x in row] for row in y]
  x = prompts_of([tokenizer.prompt(p) for p in prompts], 8)
  verdict = verdict_of(judge, x, responses_of(rows, 16), None)
  pairs = {("One day", a, b) for a in y[0] for b in y[0] if a != b}
  assert {*asked} == pairs
  assert len(asked) == len(pairs)
  p = np.asarray(verdict.p_win[0])
  np.testing.assert_allclose(p, [[0.5, 0.2, 0.8], [0.8, 0.5, 0.8], [0.2, 0.2, 0.5]], rtol=1e-6)
  assert verdict.metrics["flip_rate"].value() == 0
  always = judges.from_texts(lambda prompt, a, b: 1.0, tokenizer)
  verdict = verdict_of(always, x, responses_of(rows, 16), None)
  np.testing.assert_array_equal(verdict.p_win, 0.5)
  assert verdict.metrics["flip_rate"].value() == 1


def test_a_function_of_texts_that_fails_costs_its_pairs_and_is_told_once(tokenizer, caplog):
  def prefer(prompt, a, b):
    if "sat" in a + b:
      raise KeyError("sat")
    return 7 if "park" in a + b else 0.5

  rows = [[tokenizer.response(x) for x in (" ran.", " sat.", " the park.", " hid.")]]
  x = prompts_of([tokenizer.prompt("One day")], 8)
  verdict = verdict_of(judges.from_texts(prefer, tokenizer), x, responses_of(rows, 16), None)
  good = np.zeros((4, 4), bool)
  good[0, 3] = good[3, 0] = True
  np.testing.assert_array_equal(verdict.valid[0], good)
  assert len(caplog.records) == 1
  assert re.search(r"KeyError: 'sat' \(.*test_own_judges.py:\d+\)", caplog.text)


def test_a_function_of_texts_that_takes_others_is_refused_before_weights_load(write, tokenizer):
  text = """
    from nash_jax import judges
    def make(config, tokenizer):
      return judges.from_texts(lambda a, b: 1.0, tokenizer)
  """
  config = settings(write(text))
  refused(lambda: judges.make(config, tokenizer), "judge.name: ", "(prompt, a, b)", "mine.py:4")


def test_the_pages_examples_are_judges_and_prefer_what_the_page_says(write, tokenizer):
  assert [name for name, _ in EXAMPLES] == ["shorter", "polite"]
  mesh = sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": 1})
  texts = [" Give me that!", " Please give me that. Thank you, Tom."]
  x = prompts_of([tokenizer.prompt("Ann said")], 8)
  y = responses_of([[tokenizer.response(text) for text in texts]], 32)
  p = {}
  for name, text in EXAMPLES:
    judge = judges.make(settings(write(text, name)), tokenizer, mesh=mesh)
    p[name] = float(verdict_of(judge, x, y, None).p_win[0, 0, 1])
    assert f"--config.judge.name={name}:make" in PAGE
  assert p["shorter"] > 0.5
  assert p["polite"] == 0

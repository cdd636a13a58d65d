"""Continuations at the prompt, from a file and as typed, realigned towards or from a reference."""

import io
import json
import types

import jax
import pytest
import tiny
from jax import numpy as jnp

import nash_jax
from nash_jax import weights
from nash_jax.config import describe, resolve
from nash_jax.jobs import sample
from nash_jax.models import gemma
from nash_jax.types import Responses

CHANGES = {"num_embed": 1024, "num_layers": 1}
PROMPTS = ("Lily saw a red kite.", "One day, Tom found a box.")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  """Weights of two random policies with opinions, by name."""
  folder, model = tmp_path_factory.mktemp("policies"), gemma.preset("tiny", **CHANGES)
  init, paths = jax.jit(gemma.init, static_argnums=1), {}
  for seed, name in enumerate(("policy", "reference")):
    params = init(jax.random.key(seed), model)
    params["embedder"]["input_embedding"] *= 20.0
    paths[name] = str(folder / f"{name}.safetensors")
    weights.save(paths[name], params, model, "float32", {"name": name})
  return paths


@pytest.fixture
def config(files):
  c = nash_jax.config.sample()
  c.model.update({"preset": "tiny", "weights": files["policy"]})
  c.model.changes = CHANGES
  c.sampling.update({"max_tokens": 8, "samples": 2})
  c.reference = files["reference"]
  c.prompt = PROMPTS[0]
  return c


@pytest.fixture
def printed(config, capsys):
  """Returns changes of the config -> what is printed."""

  def printed(**changes):
    sample.run(type(config)({**config, **changes}))
    return capsys.readouterr().out

  return printed


@pytest.fixture
def alone(config, printed):
  """Returns weights -> what a policy prints that no other is mixed with."""

  def alone(path):
    config.model.weights = path
    return printed()

  return alone


def test_continuations_follow_their_prompt_and_repeat_with_the_seed(printed):
  out = printed()
  first, second, end = out.split("\n\n")
  assert first.startswith(f"{PROMPTS[0]} ▸")
  assert second.startswith(f"{PROMPTS[0]} ▸")
  assert first != second, "two samples are two draws"
  assert end == ""
  assert printed() == out
  assert printed(seed=1) != out


@pytest.mark.slow
def test_realignment_goes_from_the_reference_at_0_to_the_policy_at_1_and_beyond(
  printed, alone, files
):
  draws = {strength: printed(realign=strength) for strength in (0.0, 0.5, 1.0, 2.0)}
  assert len(set(draws.values())) == 4
  assert draws[1.0] == alone(files["policy"])
  assert draws[0.0] == alone(files["reference"])


def test_mixing_a_policy_with_itself_changes_nothing(printed, files):
  alone = printed()
  assert printed(realign=1.5, reference=files["policy"]) == alone


def test_the_policy_alone_needs_no_reference(printed):
  assert printed(reference="") == printed()


def test_every_line_of_a_file_is_a_prompt(printed, tmp_path):
  file = tmp_path / "prompts.txt"
  file.write_text(f"{PROMPTS[0]}\n\n{PROMPTS[1]}\n")
  out = printed(prompt="", file=str(file))
  lines = [line for line in out.split("\n\n") if line]
  assert [line.partition(" ▸")[0] for line in lines] == [p for p in PROMPTS for _ in range(2)]


@pytest.fixture
def drawn(monkeypatch):
  """Puts an empty response in the place of a sampled one."""

  def draw(params, prompts, key):
    mask = jnp.zeros((1, 1, 1), bool)
    return Responses(jnp.zeros((1, 1, 1), int), mask, 0.0 * mask, 0.0 * mask, mask[..., 0])

  policy = types.SimpleNamespace(make_sampler=lambda **options: draw)
  monkeypatch.setattr(sample, "make_policy", lambda *args: policy)
  monkeypatch.setattr(sample, "check_vocabulary", lambda *args: None)
  loaded = []
  monkeypatch.setattr(sample, "load_weights", lambda *args: loaded.append(args) or {})
  return loaded


@pytest.mark.usefixtures("drawn")
def test_a_typed_prompt_that_is_refused_leaves_the_next_one(monkeypatch, capsys, config):
  monkeypatch.setattr("sys.stdin", io.StringIO("<start_of_turn>user\n" + PROMPTS[1] + "\n"))
  sample.run(type(config)({**config, "prompt": ""}))
  out, err = capsys.readouterr()
  assert f"{PROMPTS[1]} ▸" in out
  assert "already has the chat template" in err


def test_json_lines_hold_prompts_of_many_lines_and_conversations(printed, tmp_path):
  """They are written with what was drawn beside what they held; the same is printed."""
  records = [
    {"prompt": "Two\nlines.", "id": 7},
    {"messages": [{"role": "user", "content": "One\nday"}]},
  ]
  file, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
  file.write_text("\n".join(map(json.dumps, records)))
  shown = printed(prompt="", file=str(file))
  assert printed(prompt="", file=str(file), output=str(output)) == ""
  rows = [json.loads(line) for line in output.read_text().splitlines()]
  drawn = ("response", "sample", "tokens", "stopped", "logp")
  kept = [{name: x for name, x in row.items() if name not in drawn} for row in rows]
  assert kept == [record for record in records for _ in range(2)]
  assert [row["sample"] for row in rows] == [0, 1, 0, 1]
  assert all(0 < row["tokens"] <= 8 and row["logp"] < 0 for row in rows)
  assert all(row["stopped"] or row["tokens"] == 8 for row in rows)
  prompts = ["Two\nlines."] * 2 + ["One\nday"] * 2
  assert shown == "".join(
    f"{p} ▸{row['response']}\n\n" for p, row in zip(prompts, rows, strict=True)
  )


def test_prompts_of_any_length_are_padded_to_few_widths():
  widths = {length: sample._width(length) for length in range(1, 5000)}
  assert all(width >= length for length, width in widths.items())
  assert len({*widths.values()}) == 10


@pytest.fixture(scope="module")
def of_a_run(tmp_path_factory):
  """The workdir of a run, as far as its config, which differs from the bundled one's."""
  folder = tmp_path_factory.mktemp("runs") / "a"
  changes = {
    "model.dtype": "bfloat16", "model.template": "gemma", "model.changes.num_layers": 1,
    "sampling.temperature": 0.7, "sampling.tokens": (9, 8), "sampling.max_tokens": 5,
    "model.weights": "assets:stories/judge.safetensors",
  }  # fmt: skip
  folder.mkdir()
  saved = describe(resolve(tiny.train(changes)))
  (folder / "config.json").write_text(json.dumps(saved))
  return str(folder)


@pytest.mark.parametrize("part", ["", "@target"])
def test_a_runs_weights_need_nothing_said_that_the_run_knows(of_a_run, part, drawn):
  config = nash_jax.config.sample()
  config.update_from_flattened_dict({"model.weights": of_a_run + part, "prompt": "Hi"})
  found = sample.as_its_run(config)
  assert found.model.to_dict() == {
    **config.model.to_dict(), "preset": "tiny", "dtype": "bfloat16", "template": "gemma",
    "changes": {"num_embed": 1024, "num_layers": 1},
  }  # fmt: skip
  of_config = config.sampling.to_dict()
  assert found.sampling.to_dict() == {**of_config, "temperature": 0.7, "tokens": (9, 8)}
  assert found.reference == config.reference, "at realign = 1 nothing reads it"
  config.realign = 1.5
  sample.run(config)
  (policy, *_, dtype), (reference, *more) = drawn
  assert (policy, reference) == (of_a_run + part, "assets:stories/judge.safetensors")
  assert dtype == more[-1] == jnp.bfloat16


def test_what_is_said_goes_before_what_the_run_has(of_a_run):
  config = nash_jax.config.sample()
  said = {"model.template": "plain", "sampling.temperature": 2.0}
  said |= {"model.changes.num_layers": 2, "realign": 2.0, "reference": "mine.safetensors"}
  config.update_from_flattened_dict({"model.weights": of_a_run, **said})
  found = sample.as_its_run(config)
  assert found.sampling.temperature == 2
  assert found.model.changes.to_dict() == {"num_layers": 2}
  assert found.reference == "mine.safetensors"
  file = nash_jax.config.sample()
  assert sample.as_its_run(file) is file, "a file of weights says nothing of them"


@pytest.mark.usefixtures("drawn")
def test_a_file_from_another_system_holds_the_same_prompts(printed, tmp_path):
  file = tmp_path / "prompts.txt"
  lines = f"\ufeff{PROMPTS[0]}\r\n\r\nLily\u2028saw\x0ca kite.\r\n"
  file.write_bytes(lines.encode())
  assert printed(prompt="", file=str(file)) == f"{PROMPTS[0]} ▸\n\nLily\u2028saw\x0ca kite. ▸\n\n"


@pytest.mark.parametrize(
  ("data", "message"),
  [
    (b"Hi\ncaf\xe9\n", r"p.txt:2: byte 0xe9 is not UTF-8"),
    ("Hi".encode("utf-16"), "p.txt: UTF-16 or UTF-32, expected UTF-8"),
    (b"Hi\0", r"p.txt:1: byte 0x00 \(NUL\)"),
    (b"\x1f\x8b\x08", "p.txt: not a readable gzip file"),
    (b"Hi\n<start_of_turn>user\nHi", "p.txt:2: .*already has the chat template"),
    (b" \n\r\n", "file: expected a prompt per line"),
  ],
)
def test_a_bad_prompt_file_is_refused_before_weights_load(
  printed, monkeypatch, tmp_path, data, message
):
  monkeypatch.setattr("nash_jax.jobs.sample.load_weights", None)
  (tmp_path / "p.txt").write_bytes(data)
  with pytest.raises(ValueError, match=message):
    printed(prompt="", file=str(tmp_path / "p.txt"))


def test_a_typed_byte_that_is_no_utf8_is_refused_by_name(printed, monkeypatch):
  monkeypatch.setattr("nash_jax.jobs.sample.load_weights", None)
  with pytest.raises(ValueError, match=r"prompt: .*half of a surrogate pair"):
    printed(prompt="caf\udce9")  # how Python hands over an argument of these bytes


def test_prompts_are_read_as_typed_until_an_empty_line_or_the_end(printed, monkeypatch):
  for typed in (f"{PROMPTS[1]}\n\n{PROMPTS[0]}\n", f"{PROMPTS[1]}\n"):
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    out = printed(prompt="")
    assert out.count(PROMPTS[1]) == 2
    assert PROMPTS[0] not in out


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"realign": -1.0}, r"realign: expected a number in \[0, 1000\], got -1\.0"),
    ({"realign": float("nan")}, r"realign: expected a number in \[0, 1000\], got nan"),
    ({"realign": 2.0, "reference": "none.safetensors"}, "reference: .*got 'none.safetensors'"),
    ({"realign": 2.0, "reference": ""}, "reference: expected a weights file or a run's workdir"),
    ({"prompt": "", "file": "none.txt"}, "file: expected a readable text file, got .*none.txt"),
    ({"prompt": "", "file": "/"}, "file: expected a readable text file, got '/'"),
    ({"prompt": "", "file": "/dev/null"}, "file: expected a prompt per line, got '/dev/null'"),
    ({"output": "/nowhere/x.jsonl"}, "/nowhere/x.jsonl: expected a file that can be written"),
  ],
)
def test_bad_input_is_refused_before_weights_load(printed, monkeypatch, changes, message):
  monkeypatch.setattr("nash_jax.jobs.sample.load_weights", None)
  with pytest.raises(ValueError, match=message):
    printed(**changes)

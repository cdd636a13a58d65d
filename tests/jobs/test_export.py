"""The job export: a run as a folder that other programs load, its card, what is not replaced."""

import json
import os
import pathlib
import re
import shutil

import jax
import numpy as np
import pytest
import transformers_values
from commands import command
from exported_runs import MODEL, STEP, make_run, write
from other_python import python_with
from real_gemma_texts import TEXTS, TURNS
from weight_files import random, same

from nash_jax import policy, weights
from nash_jax.config import describe, resolve
from nash_jax.data.chat_template import TEMPLATES
from nash_jax.data.tokenizer import BUNDLED, Tokenizer
from nash_jax.jobs import export
from nash_jax.models import gemma
from nash_jax.run import checkpoint


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  """A run, and its target exported: (folder of the run, folder of the export, state)."""
  folder = tmp_path_factory.mktemp("export")
  state = make_run(folder, {"model.template": "gemma"})
  write(f"{folder / 'run'}@target", str(folder / "out"))
  return folder / "run", folder / "out", state


def test_an_export_is_the_part_of_the_run_that_was_named(written):
  workdir, out, state = written
  same(weights.load(str(out), MODEL), state["target"])
  write(str(workdir), str(out.with_name("params")), dtype="float16")
  half = weights.load(str(out.with_name("params")), MODEL)
  same(half, jax.tree.map(lambda x: x.astype("float16").astype("float32"), state["params"]))
  config = json.loads((out.with_name("params") / "config.json").read_text())
  assert config["torch_dtype"] == "float16"


def test_a_folder_has_all_that_a_reader_needs_and_everybody_may_read_it(written):
  _, out, _ = written
  assert {path.name for path in out.iterdir()} == {
    "README.md", "chat_template.jinja", "config.json", "generation_config.json",
    "model.safetensors", "nash_jax.json", "tokenizer.model", "tokenizer_config.json",
  }  # fmt: skip
  umask = os.umask(0)
  os.umask(umask)
  assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o666 & ~umask}
  tokenizer = Tokenizer(BUNDLED, "gemma")
  ids = json.loads((out / "generation_config.json").read_text())
  assert ids["eos_token_id"] == list(tokenizer.stop_ids)
  assert (out / "chat_template.jinja").read_text() == TEMPLATES["gemma"].jinja
  assert not [path for path in out.parent.iterdir() if path.suffix in (".part", ".old")]


def test_a_card_tells_what_the_run_was_and_what_it_measured(written):
  workdir, out, _ = written
  card = (out / "README.md").read_text()
  front = dict(line.split(": ", 1) for line in card.split("---\n")[1].splitlines())
  assert json.loads(front["base_model"]) == "google/gemma-3-tiny"
  assert json.loads(front["base_model_relation"]) == "finetune"
  assert json.loads(front["library_name"]) == "transformers"
  assert json.loads(front["tags"]) == ["nash_jax", "nlhf", "nash-mp"]
  assert "license" not in front, "of an architecture that is not Gemma's own"
  rows = dict(re.findall(r"^\| (.+?) +\| (.+?) +\|$", card, re.MULTILINE))
  assert rows["method"].startswith("nash_mp: Nash Mirror Prox")
  assert (rows["β, weight of KL to the base"], rows["κ, rate of the target"]) == ("0.1", "0.1")
  assert rows["judge"] == "population"
  assert rows["steps"] == "6, of 8 prompts, 2 responses to each"
  assert f"{workdir}@target, after step {STEP} of 6" in card
  # 3 √(.75 · .25 / 16) bounds three standard errors of a mean of 16 numbers in [0, 1].
  assert "training judge: .750 ±.325 (3σ at most; n = 16" in card
  assert f"KL to the base: 2.5 nats a response, at step {STEP}, of the policy, which this" in card
  assert "99" not in card, "an evaluation after the step that was exported"
  assert f"    nash-jax export --run={workdir}@target --to={out} --dtype=float32\n" in card


def test_the_record_of_an_export_has_the_runs_config(written):
  import nash_jax

  workdir, out, _ = written
  saved, c = json.loads((out / "nash_jax.json").read_text()), nash_jax.config.train()
  c.update(saved["config"])
  assert json.loads(json.dumps(describe(resolve(c)))) == checkpoint.read_config(workdir)
  assert (saved["run"], saved["step"]) == (f"{workdir}@target", STEP)


def test_an_export_replaces_an_export_and_nothing_else(written, tmp_path):
  workdir, out, state = written
  spec, folder = str(workdir), tmp_path / "x" / "out"
  shutil.copytree(out, folder)
  weight_file = folder / "model.safetensors"
  weight_file.rename(folder / "model-00001-of-00002.safetensors")
  with pytest.raises(
    ValueError, match=r"to: .*model-00001-of-00002.safetensors, which has changed"
  ):
    write(spec, str(folder))
  (folder / "model-00001-of-00002.safetensors").rename(weight_file)
  write(spec, str(folder))
  same(weights.load(str(folder), MODEL), state["params"])
  assert [path.name for path in folder.parent.iterdir()] == ["out"]
  card = folder / "README.md"
  card.write_text(card.read_text() + "A word of mine.\n")
  with pytest.raises(ValueError, match=r"to: expected a folder that is new.*README.md, which"):
    write(spec, str(folder))
  assert "A word of mine." in card.read_text()
  for name in ("a/notes.txt", "b"):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match="to: expected a folder"):
      write(spec, str(tmp_path / name.split("/")[0]))
    assert (tmp_path / name).read_text() == "mine"


def test_an_export_that_fails_leaves_what_was_there(written, tmp_path, monkeypatch):
  workdir, out, state = written
  shutil.copytree(out, tmp_path / "out")

  def fail(*args, **kwargs):
    raise OSError("disk full")

  monkeypatch.setattr(weights, "export", fail)
  with pytest.raises(OSError, match="disk full"):
    write(str(workdir), str(tmp_path / "out"))
  same(weights.load(str(tmp_path / "out"), MODEL), state["target"])
  assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_type_keeps_of_a_change_is_measured_in_log_probabilities():
  """A thousandth is at most half a step of bfloat16's numbers, and a whole one of float16's."""
  base = jax.tree.map(lambda x: x.astype("bfloat16").astype("float32"), random(MODEL, 0, 0.5))
  params = jax.tree.map(lambda x: x * 1.001, base)
  tokens = np.random.default_rng(0).integers(5, 1000, (export.TEXTS, export.LENGTH))
  logp = export._make_logprobs(MODEL, tokens, np.ones(tokens.shape, bool))
  before = logp(base, "float32")
  said = {x: export._rounding(before, params, logp, x) for x in ("float32", "float16", "bfloat16")}
  kept = dict(re.findall(r"(\w+) keeps (\d+)% of that", said["bfloat16"]))
  assert int(kept["bfloat16"]) < 20
  assert abs(int(kept["float16"]) - 100) < 20
  assert "bfloat16 loses too much of it" in said["bfloat16"]
  assert "loses" not in said["float32"]
  assert "the run changed nothing" in export._rounding(before, base, logp, "float32")
  strong = jax.tree.map(lambda x: x * 1.2, base)
  assert "loses" not in export._rounding(before, strong, logp, "bfloat16")


def test_what_cannot_be_exported_is_said(written, tmp_path):
  workdir, *_ = written
  for arguments, message in (
    ({"run": str(tmp_path / "none")}, "run: expected a run's workdir, or a file that"),
    ({"run": str(tmp_path)}, "run: expected a run's workdir"),
    (
      {"run": str(workdir.with_name("gemma-3-tiny") / "model.safetensors")},
      "call weights.export from",
    ),
    ({"run": f"{workdir}@targets"}, "run, after @: got 'targets'"),
    ({"run": ""}, "run: expected a run's workdir, got ''"),
    ({"run": str(workdir), "to": ""}, "to: expected the folder to write"),
    ({"run": str(workdir), "dtype": "int8"}, "dtype: got 'int8', expected one of bfloat16"),
    ({"run": str(workdir), "tokenizer": "gone.model"}, "no tokenizer file 'gone.model'"),
    ({"run": str(workdir), "arena": str(tmp_path)}, "arena: expected an arena with the policy"),
  ):
    with pytest.raises(ValueError, match=message):
      write(**{"to": str(tmp_path / "out"), **arguments})
  assert not [*tmp_path.iterdir()]


def test_a_run_without_the_checkpoint_is_refused_before_a_weight_is_read(
  written, tmp_path, monkeypatch
):
  workdir, *_ = written
  monkeypatch.setattr(export, "_base_logprobs", None)  # would be called first
  early = tmp_path / "early"
  early.mkdir()
  shutil.copy(workdir / "config.json", early)
  for spec, found in ((f"{early}", "found none"), (f"{workdir}@params:3", rf"found \[{STEP}\]")):
    with pytest.raises(ValueError, match=f"run '{spec}': checkpoint in .*{found}") as error:
      write(spec, str(tmp_path / "out"))
    assert "\n" not in str(error.value)
  assert [*tmp_path.iterdir()] == [early]


def test_an_arenas_win_rates_come_into_the_card(written, tmp_path):
  workdir, _, _ = written
  cell = {"mean": 0.7, "sigma3": 0.05, "significant": True, "n": 96}
  result = {
    "policies": {
      "base": {"weights": "", "best_of": 1, "step": None},
      "ours": {"weights": f"{workdir}@target:{STEP}", "best_of": 1, "step": STEP},
    },
    "judges": {"a judge": {"win_rate": {"ours": {"ours": cell, "base": cell}}}},
  }
  (tmp_path / "arena.json").write_text(json.dumps(result))
  spec = f"{workdir}@target:{STEP}"
  write(spec, str(tmp_path / "out"), arena=str(tmp_path))
  card = (tmp_path / "out" / "README.md").read_text()
  line = (
    f"- beats base under the judge a judge: **.700 ± .050** (3σ; n = 96 prompts, at step {STEP})"
  )
  assert line in card
  assert "beats ours" not in card


def test_a_published_tokenizers_files_come_along_with_the_runs_template(tmp_path):
  source = tmp_path / "gemma"
  source.mkdir()
  model = source / "tokenizer.model"
  model.write_bytes(pathlib.Path(Tokenizer(BUNDLED, "plain").path).read_bytes())
  (source / "tokenizer.json").write_text('{"a": 1}')
  said = {"tokenizer_class": "GemmaTokenizer", "chat_template": "theirs", "extra": [1]}
  (source / "tokenizer_config.json").write_text(json.dumps(said))
  (source / "config.json").write_text("{}")
  params = random(gemma.preset("tiny", num_embed=1024))
  for template in ("plain", "gemma"):
    out = tmp_path / "out" / template
    out.parent.mkdir(exist_ok=True)
    weights.export(str(out), params, MODEL, tokenizer=Tokenizer(str(model), template))
    assert (out / "tokenizer.json").read_text() == '{"a": 1}'
    got = json.loads((out / "tokenizer_config.json").read_text())
    assert got["extra"] == [1]
    assert got.get("chat_template", "") == TEMPLATES[template].jinja
    assert (out / "chat_template.jinja").exists() == (template == "gemma")
    assert json.loads((out / "config.json").read_text())["hidden_size"] == MODEL.embed_dim


@pytest.mark.slow
def test_the_command_takes_flags_and_says_what_is_wrong_in_a_line(written):
  workdir, out, state = written
  to = out.with_name("by command")
  done = command("export", f"--run={workdir}", f"--to={to}")
  assert f"wrote {to}: {workdir}, step {STEP}, float32" in done.stdout, done.stderr
  same(weights.load(str(to), MODEL), state["params"])
  done = command("export", "--run=runs/none", f"--to={to}")
  assert done.returncode == 2
  assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_transformers_loads_an_export_and_stops(written, tmp_path):
  python = python_with()
  workdir, _, _ = written
  write(f"{workdir}@target", str(tmp_path / "out"))
  got = json.loads(transformers_values.run(python, "--reread", tmp_path / "out"))
  tokenizer = Tokenizer(BUNDLED, "gemma")
  assert got["english"] == [tokenizer.bos_id, *tokenizer.encode(TEXTS["english"])]
  assert got["turns"] == tokenizer.prompt(TURNS)
  assert got["lengths"] == transformers_values.LENGTHS
  logp = export._make_logprobs(MODEL, *export.pad([got["english"]], len(got["english"]), 0))
  wanted = logp(policy.load_weights(f"{workdir}@target", MODEL), "float32")
  assert np.ptp(wanted) > 1
  np.testing.assert_allclose(got["logp"], wanted, rtol=0, atol=1e-4)

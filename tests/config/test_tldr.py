"""configs/tldr.py: every section resolves; a smoke of all of them, from the published records."""

import contextlib
import io

import doc_pages
import jax
import numpy as np
import pytest
from bundled_configs import make_local_files
from paths import ROOT

from nash_jax import fit, policy, train
from nash_jax.config import resolve
from nash_jax.configs import tldr
from nash_jax.jobs import arena, convert
from nash_jax.objectives import algorithms

PAGE = ROOT / "docs" / "tldr.md"
SECTIONS = [*tldr.FITS, *tldr.RUNS, "arena", "arena,ipo,xsum_rlhf", "arena,md1,ema1*"]

ONE_EACH = [*{method: run for run, (method, _) in reversed(tldr.RUNS.items())}.values()]


@pytest.mark.parametrize("size", ["", ",1b", ",smoke"])
def test_every_section_resolves_and_reads_all_that_it_sets(size, tmp_path, monkeypatch, caplog):
  monkeypatch.chdir(tmp_path)
  for section in SECTIONS:
    c = tldr.get_config(section + size)
    make_local_files(c, tmp_path)
    resolve(c, c.job)
  assert "not read by this run" not in caplog.text


def test_the_runs_are_those_of_the_published_table():
  mixtures = [tldr.get_config(f"md{i}").algorithm.mixture for i in range(1, 7)]
  assert mixtures == [0.125, 0.25, 0.375, 0.5, 0.625, 0.75]
  for name in tldr.TLDR:
    c = tldr.get_config(name)
    assert c.steps == 10_000
    assert c.algorithm.beta == (0.05 if name == "rlhf" else 0.008)
    assert (c.judge.name == "bradley_terry") == algorithms.get(c.algorithm.name).needs_rewards(
      c.algorithm
    )
  averages = [1 - tldr.get_config(name).algorithm.kappa for name in ("ema1", "ema2")]
  np.testing.assert_allclose(averages, [0.999, 0.9995])
  for name in tldr.XSUM:
    c = tldr.get_config(name)
    assert (c.steps, c.prompts.path) == (30_000, "data/xsum/train.jsonl")
    assert bool(c.pairs.path) == algorithms.get(c.algorithm.name).offline
  offline = [tldr.get_config(name) for name in ("dpo", "slic")]
  assert [(c.algorithm.f, c.algorithm.beta) for c in offline] == [("logistic", 5), ("hinge", 10)]


def test_a_starred_column_is_the_average_that_its_run_keeps():
  policies = tldr.get_config("arena").policies
  assert {*policies} == {"SFT", *map(str.upper, (*tldr.TLDR, "ema1*", "ema2*"))}
  assert policies["EMA1*"].weights == f"{policies['EMA1'].weights}@target"
  for name in ("ema1", "ema2"):
    c = tldr.get_config(name)
    assert algorithms.get(c.algorithm.name).keeps_target(c.algorithm)


@pytest.mark.parametrize(
  ("section", "message"),
  [
    ("md7", "the word after the colon: got 'md7'"),
    ("md1,big", "a word after the section: got 'big'"),
    ("md1,rlhf", "a word after the section: got 'rlhf'"),
    ("arena,md1,ipo", "arena's columns: expected all on TL;DR or on XSum"),
  ],
)
def test_an_unknown_section_or_word_is_refused(section, message):
  with pytest.raises(ValueError, match=message):
    tldr.get_config(section)


def python_blocks():
  return [block.code for block in doc_pages.blocks(PAGE) if block.language == "python"]


@pytest.mark.slow
def test_a_smoke_of_every_stage_and_method_runs_from_published_records_to_the_table(
  tmp_path, monkeypatch
):
  """The page's own records and its own table, of which the column beats the row."""
  monkeypatch.chdir(tmp_path)
  records, table = python_blocks()
  exec(records, {})
  for part in ("train", "valid", "test", "pairs_train", "pairs_valid"):
    convert.convert(f"data/tldr/raw/{part}.jsonl", f"data/tldr/{part}.jsonl")
  for part in ("train", "valid", "test"):
    convert.convert(f"data/xsum/raw/{part}", f"data/xsum/{part}.jsonl")
  for section in tldr.FITS:
    fit.run(tldr.get_config(f"{section},smoke"), f"runs/tldr/fit_{section}", progress=False)
  for section in (*ONE_EACH, "slic"):
    done = train.run(tldr.get_config(f"{section},smoke"), f"runs/tldr/{section}", progress=False)
    assert int(done.state.step) == 2
  columns = [run for run in ONE_EACH if run in tldr.TLDR]
  c = tldr.get_config(",".join(["arena", *columns, "ema1*", "smoke"]))
  result = arena.run(c, "runs/tldr/arena_whole")
  assert [*result["policies"]] == [*c.policies]
  last, average = (
    jax.tree.leaves(policy.load_weights(spec, policy.tokenizer_and_model(c.model)[1]))
    for spec in (c.policies["EMA1"].weights, c.policies["EMA1*"].weights)
  )
  assert any((x != y).any() for x, y in zip(last, average, strict=True))
  arena.run(tldr.get_config("arena,ipo,ipo_md,smoke"), "runs/tldr/arena_xsum")

  sample_and_judge = arena._sample_and_judge

  def rigged(config, held_out, *args):
    judged = sample_and_judge(config, held_out, *args)
    assert [*config.policies] == ["MD1", "SFT"]
    wins = np.array([[0.5, 1.0], [0.0, 0.5]])  # MD1 wins
    wins = np.broadcast_to(wins, judged.verdicts["evaluation"].p_win.shape)
    verdicts = {name: x.replace(p_win=wins) for name, x in judged.verdicts.items()}
    return judged._replace(verdicts=verdicts)

  monkeypatch.setattr(arena, "_sample_and_judge", rigged)
  arena.run(tldr.get_config("arena,md1,smoke"), "runs/tldr/arena")
  with contextlib.redirect_stdout(io.StringIO()) as printed:
    exec(table, {})
  lines = [line.split() for line in printed.getvalue().splitlines()]
  assert lines == [["MD1", "SFT"], ["MD1", "-", "0.000"], ["SFT", "1.000", "-"]]

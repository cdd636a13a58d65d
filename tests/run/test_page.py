"""report.html: whole, of one file, of a bounded size, and no text in it is ever markup."""

import base64
import hashlib
import json
import logging
import subprocess

import browser
import jax
import pytest
from page_files import Parts, page_data

from nash_jax.run import page

HOSTILE = (
  "</script><script>document.title='got'</script><img src=x onerror=alert(1)>", "<!--<script>",
  "]]></SCRIPT >&lt;b&amp;", "\u2028\u2029\ud800\x00\x1b[31m", "{{data}} {{policy}}", "'\"`${1}\\",
)  # fmt: skip


def hostile_texts():
  responses = [[text, text, text] for text in HOSTILE]
  verdicts = [[[0, 1, 0.75, 0.9], [0, 2, 0.5, None]]]
  item = {"prompt": HOSTILE[0], "responses": responses, "verdicts": verdicts}
  note = {"note": HOSTILE[0], "whole_note": HOSTILE[0]}
  return {"title": HOSTILE[0], "names": [*HOSTILE], "judges": [HOSTILE[0]], "items": [item], **note}


def write_hostile(path):
  line = page.line(HOSTILE[0], [0, 1], [0.5, float("nan")])
  panel = {"title": HOSTILE[0], "label": HOSTILE[1], "baseline": None, "series": [line]}
  cell = {"mean": 0.5, "sigma3": 0.1, "low": 0.4, "high": 0.6, "n": 9, "significant": False}
  cells = {name: dict.fromkeys(HOSTILE, cell) for name in HOSTILE}
  tables = [page.rate_table(HOSTILE[0], cells), page.row_table("t", [*HOSTILE], [[*HOSTILE]])]
  config, facts = {"x": HOSTILE[0], "nan": float("nan")}, [(HOSTILE[0], HOSTILE[1])]
  return page.write(
    path, HOSTILE[0], facts=facts, config=config, curves=[panel], tables=tables,
    texts=[hostile_texts()],
  )  # fmt: skip


def test_no_text_is_markup_and_every_text_arrives(tmp_path):
  parts = Parts(write_hostile(tmp_path / page.NAME))
  assert [attributes for attributes, _ in parts.scripts] == [
    {"type": "application/json", "id": "data"}, {}, {},
  ]  # fmt: skip
  assert "img" not in parts.tags
  assert HOSTILE[0] in parts.text, "the title, as a text"
  shown = page_data(tmp_path)
  arrived = json.loads(json.dumps([hostile_texts()]).replace("\\ud800", "\\ufffd"))
  assert shown["texts"] == arrived, "all but a half of a character"
  assert shown["config"] == {"x": HOSTILE[0], "nan": None}
  assert shown["curves"][0]["series"][0]["y"] == [0.5, None]
  assert shown["tables"][1]["rows"] == [arrived[0]["names"]]


def test_a_page_needs_no_network_and_its_policy_allows_its_own_scripts_alone(tmp_path):
  parts = Parts(write_hostile(tmp_path / page.NAME))
  assert not {"iframe", "img"} & {*parts.tags}
  assert parts.links == ["data:,"], "no icon is asked for either"
  (policy,) = [meta["content"] for meta in parts.metas if "http-equiv" in meta]
  sums = [hashlib.sha256(text.encode()).digest() for _, text in parts.scripts[1:]]
  allowed = " ".join(f"'sha256-{base64.b64encode(x).decode()}'" for x in sums)
  assert policy == (
    f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {allowed}"
  )
  assert all("src" not in attributes for attributes, _ in parts.scripts)


def make_run(folder, steps=3, prompts=2, text="y"):
  metrics = [{"step": n, "loss": n / 7, "judge/own": None, "eval/loss": 1.0} for n in range(steps)]
  samples = [
    {"step": n, "prompt": f"p{k}", "response": f"{text}{n}", "reference": "r", "tokens": 2,
     "p_win": 0.25, "p_win_first": 0.4, "log_ratio": 1.5}
    for n in range(steps) for k in range(prompts)
  ]  # fmt: skip
  for name, rows in (("metrics.jsonl", metrics), ("samples.jsonl", samples)):
    (folder / name).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
  return folder


def test_a_run_shows_its_curves_and_each_prompt_over_steps(tmp_path):
  page.write_run(make_run(tmp_path))
  shown = page_data(tmp_path)
  (loss,) = shown["curves"]
  assert [line["name"] for line in loss["series"]] == ["held out", "training"]
  assert loss["series"][1]["y"] == [0, 0.14286, 0.28571]
  (texts,) = shown["texts"]
  first, second = texts["items"]
  assert (first["prompt"], second["prompt"]) == ("p0", "p1")
  assert [name for name, _, _ in first["responses"]] == ["reference", "step 0", "step 1", "step 2"]
  assert first["responses"][2][1:] == ["y1", "2 tokens · log π/π_ref 1.5"]
  assert first["verdicts"] == [[[k, 0, 0.25, 0.4] for k in (1, 2, 3)]]


def test_a_page_is_made_again_and_many_steps_are_thinned_with_both_ends(tmp_path):
  page.write_run(make_run(tmp_path))
  page.write_run(make_run(tmp_path, steps=3001, prompts=1))
  shown = page_data(tmp_path)
  (line,) = [line for line in shown["curves"][0]["series"] if line["name"] == "training"]
  assert (len(line["x"]), line["x"][0], line["x"][-1]) == (page.LINE_POINTS, 0, 3000)
  (texts,) = shown["texts"]
  assert len(texts["names"]) == page.MOST_STEPS + 1
  assert (texts["names"][1], texts["names"][-1]) == ("step 0", "step 3000")
  assert f"{page.MOST_STEPS} of 3001 evaluations" in texts["note"]


def test_a_page_stays_below_its_size_and_says_what_it_leaves_out(tmp_path):
  long = page.MOST_LETTERS * "ж" + "end"
  page.write_run(make_run(tmp_path, steps=1, prompts=100, text=long))
  assert (tmp_path / page.NAME).stat().st_size <= page.MOST_BYTES
  (texts,) = page_data(tmp_path)["texts"]
  assert 10 < len(texts["items"]) < 100
  assert f"Shown here: {len(texts['items'])} of 100 prompts" in texts["note"]
  assert "(4 more characters)" in texts["items"][0]["responses"][1][1]


def test_a_page_that_cannot_be_made_costs_a_warning(tmp_path, caplog):
  page.leave(page.write_run, tmp_path)
  assert "report.html is not made: ValueError" in caplog.text
  assert "metrics.jsonl: no such file" in caplog.text
  make_run(tmp_path)
  (tmp_path / page.NAME).mkdir()
  caplog.clear()
  page.leave(page.write_run, tmp_path)
  assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_process_0_alone_makes_it_and_no_bucket_has_one(tmp_path, monkeypatch, caplog):
  made = []
  page.leave(made.append, "gs://bucket/run")
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  page.leave(made.append, tmp_path)
  assert not made
  monkeypatch.setattr(jax, "process_index", lambda: 0)
  page.leave(made.append, tmp_path)
  assert made == [tmp_path]
  assert not caplog.records


@pytest.mark.slow
@browser.needed
def test_a_browser_shows_hostile_texts_as_texts_without_an_error(tmp_path):
  path = write_hostile(tmp_path / page.NAME)
  command = [
    browser.CHROMIUM, "--headless", "--no-sandbox", "--enable-logging=stderr",
    "--window-size=400,900",
    f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=2000", "--dump-dom",
    path.as_uri(),
  ]  # fmt: skip
  done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
  assert "CONSOLE" not in done.stderr
  (tmp_path / "dom.html").write_text(done.stdout)
  dom = Parts(tmp_path / "dom.html")
  assert "img" not in dom.tags
  assert len(dom.scripts) == 3
  assert {"canvas", "article", "table"} <= {*dom.tags}
  assert dom.text.count(HOSTILE[0]) > 5

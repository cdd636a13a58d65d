"""`nash-jax convert` writes ours of every form, says what it leaves out, and never reads itself."""

import gzip
import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pyarrow
import pytest
from commands import command
from form_records import GATHERED, POST, READ, TL_DR, answer, say, settings, written
from pyarrow import parquet

from nash_jax.data.preferences import load_preferences
from nash_jax.data.prompts import load_prompts
from nash_jax.data.tokenizer import BUNDLED, Tokenizer
from nash_jax.jobs import convert

CHAT = Tokenizer(BUNDLED, "gemma")
MARK = "\ufeff"
PAIR = {"chosen": "Hello.", "rejected": "No."}
PAIRS = [{"prompt": f"Tell {i}", **PAIR} for i in range(200)]


def lines_of(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def converted(folder, rows, **given):
  """Returns what was found in these rows, and what was written of them."""
  found = convert.convert(str(written(folder, "in.jsonl", rows)), f"{folder}/out.jsonl", **given)
  return found, lines_of(folder / "out.jsonl")


def examples(path, task="preferences"):
  config = settings(path, task)
  config.max_tokens = 64
  load = load_prompts if task == "json_lines" else load_preferences
  return load(config, CHAT, seed=0)[0].columns


def plain(ids):
  return [row.tolist() for row in ids]


@pytest.mark.parametrize("name", [*READ, *GATHERED])
def test_what_is_written_reads_as_what_was_read(name, tmp_path):
  """But for the order of the sides."""
  rows = [READ[name][0]] if name in READ else GATHERED[name][0]
  found, ours = converted(tmp_path, rows)
  fields = {"response_a", "response_b", "p_a"}
  assert all({*row} - {"prompt", "messages"} == fields and len(row) == 4 for row in ours)
  before, after = examples(tmp_path / "in.jsonl"), examples(tmp_path / "out.jsonl")
  assert plain(before["inputs"]) == plain(after["inputs"])
  assert found.written == len(before["inputs"])
  for i in range(found.written):
    shown = [(x["a"][i].tolist(), x["b"][i].tolist(), x["p_win"][i]) for x in (before, after)]
    (a, b, p), other = shown
    assert other in ((a, b, p), (b, a, pytest.approx(1 - p)))


@pytest.mark.parametrize(
  ("row", "ours"),
  [
    ({"prompt": "Hi", "completion": " Hello."}, {"prompt": "Hi", "response": " Hello."}),
    ({"messages": say("Hi", "Hello.")}, {"messages": say("Hi"), "response": "Hello."}),
    ({"text": "Once."}, {"text": "Once."}),
    ("Why?", {"prompt": "Why?"}),
    ({"prompt": [{"role": "prompter", "text": "Hi"}], "id": 3}, {"messages": say("Hi")}),
    (
      {"prompt": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], "id": 3},
      {"messages": say("Hi")},
    ),
    (
      {"prompt": "Hi", "prompt_id": "x", "messages": say("Hi", "Hello.")},
      {"messages": say("Hi"), "response": "Hello."},
    ),
    ({"instruction": "Add.", "input": "1", "output": "1"}, {"prompt": "Add.\n\n1"}),
    ({**POST, "summary": "Hello.\n"}, {"prompt": TL_DR, "response": " Hello."}),
    (POST, {"prompt": TL_DR}),
    (
      {"document": "Ho", "summary": "Hello.", "id": "1"},
      {"prompt": "POST: Ho\n\nTL;DR:", "response": " Hello."},
    ),
  ],
)
def test_responses_prompts_and_texts_are_written_for_their_tasks(row, ours, tmp_path):
  found, lines = converted(tmp_path, [row])
  assert lines == [ours]
  examples(tmp_path / "out.jsonl", "json_lines" if found.task == "prompts" else found.task)


def test_the_prompts_of_comparisons_alone_may_be_written(tmp_path):
  _, ours = converted(tmp_path, [{"prompt": "Hi", "messages": say("Hi", "x")}], task="prompts")
  assert ours == [{"messages": say("Hi")}]
  for name in ("a transcript", "OpenAssistant's trees", "ours", "summaries, the first better"):
    rows = [READ[name][0]] if name in READ else GATHERED[name][0]
    _, ours = converted(tmp_path, rows, task="prompts")
    read = examples(tmp_path / "in.jsonl", "json_lines")["inputs"]
    assert plain(examples(tmp_path / "out.jsonl", "json_lines")["inputs"]) == plain(read)
    assert all({*row} <= {"prompt", "messages"} for row in ours)


def test_the_winner_is_shown_first_as_often_as_not_by_seed(tmp_path):
  _, ours = converted(tmp_path, PAIRS)
  for row in ours:
    assert (row["response_a"], row["p_a"]) in (("Hello.", 1.0), ("No.", 0.0))
  first = sum(row["p_a"] for row in ours)
  assert 70 <= first <= 130  # four standard deviations
  assert converted(tmp_path, PAIRS)[1] == ours
  assert converted(tmp_path, PAIRS, seed=1)[1] != ours


def test_what_is_left_out_is_counted_by_reason(tmp_path):
  rows = [
    *(PAIRS[0], {"prompt": "Hi"}, {**PAIRS[1], "chosen": 3}, {**PAIRS[1], "chosen": None}),
    *({**PAIRS[1], "rejected": 4}, {"prompt": "Hi", "chosen": "x", "rejected": "x"}, {"x": 1}),
    {"prompt": "Hi", "response_a": "x", "response_b": "x", "p_a": 0.5},
  ]
  with pytest.raises(
    ValueError, match=r"in\.jsonl:2: is for the task prompts, and the .* before it"
  ):
    converted(tmp_path, rows)
  assert not (tmp_path / "out.jsonl").exists()
  path = written(tmp_path, "in.jsonl", rows)
  path.write_text(path.read_text() + "{\n")
  found = convert.convert(str(path), f"{tmp_path}/out.jsonl", bad="skip")
  assert (found.read, found.written, len(lines_of(tmp_path / "out.jsonl"))) == (9, 2, 2)
  reasons = sorted((reason.replace(str(path), "x"), n) for reason, n in found.left_out.items())
  assert [(reason[:45], count) for reason, count in reasons] == [
    ("comparisons of a response with itself", 1),
    ("x:2: is for the task prompts, and the records", 2),
    ("x:3: field 'chosen' is 3, expected str or lis", 2),
    ("x:7: fields are 'x', expected those of a form", 1),
    ("x:9: not JSON (Expecting property name enclos", 1),
  ]
  report = found.report("in", "out").splitlines()
  assert report[:2] == ["in: 9 records", "  4 chosen and rejected (TRL, HH, UltraFeedback)"]
  assert report[5:7] == ["out: 2 comparisons", "left out, by reason:"]


def test_the_command_says_what_it_found(tmp_path):
  path = written(tmp_path, "in.jsonl", [*PAIRS[:3], {"prompt": "Hi", "chosen": "x", "rejected": 3}])
  done = command("convert", f"--from={path}", f"--to={tmp_path}/new/out.jsonl", "--bad=skip")
  assert (done.returncode, done.stderr) == (0, "")
  report = done.stdout.splitlines()
  assert report[:4] == [
    *(f"{path}: 4 records", "  4 chosen and rejected (TRL, HH, UltraFeedback)"),
    *(f"{tmp_path}/new/out.jsonl: 3 comparisons", "left out, by reason:"),
  ]
  assert report[4].startswith(f"  1 {path}:4: field 'rejected' is 3, expected str or list")
  assert len(lines_of(tmp_path / "new" / "out.jsonl")) == 3


def test_anthropics_transcripts_are_converted(tmp_path, data_dir):
  path = str(data_dir / "hh_rlhf/helpful-base.test.jsonl.gz")
  found = convert.convert(path, f"{tmp_path}/out.jsonl", bad="skip")
  assert (found.read, found.written) == (2354, 2333)
  assert sorted(found.left_out.values()) == [2, 4, 15]
  with pytest.raises(
    ValueError, match=r"test\.jsonl\.gz:121: field 'chosen', turn 3: an empty turn"
  ):
    convert.convert(path, f"{tmp_path}/out.jsonl")


def test_rated_responses_of_several_files_are_brought_together(tmp_path):
  (tmp_path / "in").mkdir()
  rows = GATHERED["unpaired, of texts"][0]
  for i, row in enumerate(rows):
    written(tmp_path / "in", f"{i}.jsonl", [row])
  found = convert.convert(f"{tmp_path}/in", f"{tmp_path}/out.jsonl")
  assert [row["prompt"] for row in lines_of(tmp_path / "out.jsonl")] == ["Hi", "Hi"]
  assert dict(found.left_out) == GATHERED["unpaired, of texts"][2]


def test_rlhflow_collection_from_parquet_to_prompts(tmp_path, data_dir):
  ask = {"role": "user", "content": "How tall is it?"}
  answered = [ask, *answer("Very.")]
  table = pyarrow.Table.from_pylist(
    [
      {"dataset": "d", "context": "", "context_messages": row, "id": str(i)}
      for i, row in enumerate([[ask], [*answered, ask], answered, answered[::-1]])
    ]
  )
  (tmp_path / "in").mkdir()
  parquet.write_table(table, tmp_path / "in" / "train-00000.parquet")
  (tmp_path / "in" / "more.json").write_text(json.dumps([{"prompt": "Why?"}, {"prompt": [ask]}]))
  (tmp_path / "in" / "README.md").write_text("not rows")
  output = tmp_path / "out.jsonl"
  found = convert.convert(str(tmp_path / "in"), str(output), bad="skip")
  assert (found.written, found.left_out.total()) == (4, 2)
  gemma = Tokenizer(str(data_dir / "gemma_tokenizer" / "tokenizer.model"), "gemma")
  config = settings(output, "rlhflow")
  config.max_tokens = 64
  ids = plain(load_prompts(config, gemma, seed=0)[0].columns["inputs"])
  assert (ids[0], ids[3]) == (gemma.prompt("Why?"), gemma.prompt([*answered, ask]))


def test_converting_reads_null_columns_marks_and_never_its_own_output(tmp_path):
  folder = tmp_path / "in"
  folder.mkdir()
  rows = [{"context_messages": None, "prompt": "Why?"}, {"prompt": None}]
  rows += [{"context_messages": [], "prompt": "Why?"}, {"context_messages": "", "prompt": "Why?"}]
  (folder / "a.jsonl").write_text(MARK + "\n".join(map(json.dumps, rows)))
  (folder / "b.json").write_text(
    MARK + json.dumps([{"prompt": f"What is {i}?"} for i in range(400)])
  )
  output = folder / "prompts.jsonl"
  for _ in range(2):  # the second time the output is there from the start
    found = convert.convert(str(folder), str(output), bad="skip")
    assert (found.written, found.left_out.total(), len(lines_of(output))) == (403, 1, 403)
  assert lines_of(output)[0] == {"prompt": "Why?"}
  with pytest.raises(ValueError, match="expected a file other than those that are read"):
    convert.convert(str(output), str(output))
  assert len(lines_of(output)) == 403
  assert sorted(path.name for path in folder.iterdir()) == ["a.jsonl", "b.json", "prompts.jsonl"]


def test_an_output_by_any_name_is_not_read(tmp_path):
  """Links in the folder lead to it; but one to an input would lose that input."""
  folder, output = tmp_path / "in", tmp_path / "out.jsonl"
  folder.mkdir()
  written(folder, "a.jsonl", PAIRS)
  for _ in range(2):
    assert convert.convert(str(folder), str(output)).read == 200
    (folder / "soft.jsonl").unlink(missing_ok=True)
    (folder / "soft.jsonl").symlink_to(output)
    (folder / "hard.jsonl").unlink(missing_ok=True)
    os.link(output, folder / "hard.jsonl")
  link = tmp_path / "link.jsonl"
  link.symlink_to(folder / "a.jsonl")
  for source in (folder, folder / "a.jsonl"):
    with pytest.raises(ValueError, match="expected a file other than those that are read"):
      convert.convert(str(source), str(link))
  assert lines_of(folder / "a.jsonl") == PAIRS


@pytest.mark.parametrize(
  ("name", "data", "message"),
  [
    ("x.jsonl", b'{"prompt": "x"}\n{"prompt": ', r"x.jsonl:2: not JSON"),
    ("x.json", b'[{"prompt": "x"},\n{"prompt": ]', r"x.json:2: not JSON"),
    ("x.json", b"[" * 100_000, r"x.json: not readable JSON"),
    ("x.jsonl", b'{"prompt": "x"}\n{"prompt": "\xff"}', "x.jsonl:2: byte 0xff is not UTF-8"),
    ("x.jsonl", b'{"prompt": "x"}\n{"prompt": "\\ud83d"}', "x.jsonl:2: .*half of a surrogate"),
    ("x.json", b'[{"prompt": "a\\u0000"}]', "x.json, row 1: .*NUL"),
    ("x.parquet", b"PAR1 and no more", "x.parquet: not a readable parquet file"),
    ("x.jsonl.zst", b"\x28\xb5\x2f\xfd\x04", r"x.jsonl.zst: compressed \(zstd\): unpack it"),
    ("x.jsonl.gz", gzip.compress(b"[3", mtime=0), "x.jsonl.gz:1: not JSON"),
    ("x.csv", b"prompt\nx\n", "x.csv:1: not JSON"),
    ("x.parquet", b"version https://git-lfs.github.com/spec/v1", "x.parquet: a Git LFS pointer"),
    (
      "x.jsonl",
      b'{"y": "x"}',
      "x.jsonl:1: fields are 'y', expected those of a form in docs/data.md",
    ),
    (
      *("x.jsonl", b'{"prompt": "x", "completions": ["y"], "labels": [true]}'),
      "x.jsonl:1: fields are 'prompt', 'completions', 'labels', expected those of a form",
    ),
    (
      "x.jsonl",
      b'{"prompt": "x", "tools": [{"name": "y"}]}',
      "x.jsonl:1: field 'tools' is .*prompts cannot",
    ),
    ("x.jsonl", b"\n", "x.jsonl: expected records to write, got 'no records'"),
  ],
)
def test_a_bad_file_ends_a_conversion_in_one_line_and_leaves_the_output(
  tmp_path, name, data, message
):
  (tmp_path / name).write_bytes(data)
  output = tmp_path / "out.jsonl"
  output.write_text("from before")
  with pytest.raises(ValueError, match=message) as error:
    convert.convert(str(tmp_path / name), str(output))
  assert "\n" not in str(error.value)
  assert output.read_text() == "from before"
  assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "out.jsonl"])


@pytest.mark.parametrize(
  ("given", "message"),
  [
    ({"source": ""}, r"source \(--from\): expected files or folders, got ''"),
    ({"source": "nowhere"}, r"no data file 'nowhere': give source \(--from\) the file"),
    ({"source": "in.jsonl:2"}, r"source \(--from\): expected files without rates"),
    ({"output": ""}, r"output \(--to\): expected a \.jsonl file on this machine, got ''"),
    ({"output": "x.parquet"}, r"output \(--to\): expected a \.jsonl file on this machine"),
    ({"output": "gs://x/y.jsonl"}, r"output \(--to\): expected a \.jsonl file on this machine"),
    ({"output": "in.jsonl/out.jsonl"}, "expected a file that can be written"),
    ({"task": "prompt"}, "task: got 'prompt', expected one of .*; did you mean 'prompts'"),
    ({"bad": "drop"}, "bad: got 'drop', expected one of skip, stop"),
    ({"seed": -1}, "seed: expected a whole number from 0 on, got -1"),
  ],
)
def test_what_is_asked_wrongly_is_refused(given, message, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  written(tmp_path, "in.jsonl", PAIRS[:2])
  with pytest.raises(ValueError, match=message):
    convert.convert(**{"source": "in.jsonl", "output": "out.jsonl", **given})
  assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_files_that_are_packed_are_not_passed_over(tmp_path):
  (tmp_path / "in").mkdir()
  written(tmp_path / "in", "a.jsonl", PAIRS)
  (tmp_path / "in" / "b.jsonl.zst").write_bytes(b"x")
  with pytest.raises(
    ValueError, match=r"expected none with unsupported compression, got \['b\.jsonl\.zst'\]"
  ):
    convert.convert(f"{tmp_path}/in", f"{tmp_path}/out.jsonl")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc says how much memory is taken")
@pytest.mark.parametrize("kind", ["chosen and rejected", "unpaired"])
def test_two_hundred_thousand_records_take_seconds_and_less_than_a_gibibyte(kind, tmp_path):
  """Of one core, with all that the command imports."""
  words = np.array(["night", "is", "when", "the", "sun", "has", "set", "behind", "hills"])
  rng = np.random.default_rng(0)
  texts = [" ".join(rng.choice(words, n)) for n in rng.integers(20, 400, 2000)]

  def row(i):
    asked, *said = (f"{texts[j]} {i} {n}" for n, j in enumerate(rng.integers(len(texts), size=3)))
    if kind == "unpaired":
      asked = f"{texts[i // 2 % len(texts)]} {i // 2}"
      return {"prompt": asked, "completion": said[0], "label": bool(i % 2)}
    chosen, rejected = (say(asked, text) for text in said)
    return {"prompt": asked, "chosen": chosen, "rejected": rejected, "messages": chosen}

  path, writer = tmp_path / "in.parquet", None
  for part in itertools.batched(range(200_000), 20_000):
    table = pyarrow.Table.from_pylist([row(i) for i in part])
    writer = writer or parquet.ParquetWriter(path, table.schema)
    writer.write_table(table)
  writer.close()
  code = (
    f"import sys, time; sys.argv[1:] = 'convert', '--from={path}', '--to={tmp_path}/out.jsonl'\n"
    "from nash_jax import main\n"
    "try:\n  main.run()\n"
    "finally:\n  print(time.process_time(), open('/proc/self/status').read())"
  )
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  pairs = 100_000 if kind == "unpaired" else 200_000
  report, _, status = done.stdout.partition(f"out.jsonl: {pairs} comparisons\n")
  assert "in.parquet: 200000 records" in report
  seconds, gib = float(status.split()[0]), int(status.split("VmHWM:")[1].split()[0]) / 2**20
  print(f"{kind}: {seconds:.1f} s of a core, {gib:.2f} GiB")
  assert seconds < 20
  assert gib < 1

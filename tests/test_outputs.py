"""AlpacaEval's and Arena-Hard's files: prompts, answers written and read, and an arena of them."""

import json

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from ml_collections import ConfigDict

import nash_jax
from nash_jax import report
from nash_jax.config import describe, refuse_unread, resolve
from nash_jax.configs import arena as arena_config
from nash_jax.data import answers, corpus, prompts
from nash_jax.data.tokenizer import BUNDLED, Tokenizer
from nash_jax.jobs import arena, outputs
from nash_jax.policy import Policy
from nash_jax.run import checkpoint
from nash_jax.types import Responses

TOKENIZER = Tokenizer(BUNDLED, "plain")
WORDS = ("the", "cat", "saw", "a", "big", "dog", "and", "Tom", "was", "happy")
TASKS = ("alpaca_eval", "arena_hard")


def text_of(seed, most=12):
  rng = np.random.default_rng(seed)
  return " ".join(rng.choice(WORDS, rng.integers(2, most))) + "."


def questions(task, count=60):
  """A benchmark's records."""
  texts = [f"Tell a story {i}. {text_of(i)}" for i in range(count)]
  if task == "alpaca_eval":
    return [{"instruction": text, "dataset": f"set {i % 3}"} for i, text in enumerate(texts)]
  return [{"uid": f"u{i}", "category": "hard", "prompt": text} for i, text in enumerate(texts)]


def answers_of(task, records, model="gpt", seed=100):
  """A file of answers that another program wrote, as text."""
  said = [text_of(seed + i) for i in range(len(records))]
  if task == "alpaca_eval":
    rows = [
      {"dataset": "x", "instruction": r["instruction"], "output": text, "generator": model}
      for r, text in zip(records, said, strict=True)
    ]
    return json.dumps(rows)
  rows = [
    {
      "uid": r["uid"],
      "model": model,
      "messages": [
        {"role": "user", "content": r["prompt"]},
        {"role": "assistant", "content": {"answer": text}},
      ],
    }
    for r, text in zip(records, said, strict=True)
  ]
  return "\n".join(map(json.dumps, rows))


def write_questions(path, task, records):
  array = task == "alpaca_eval"
  path.write_text(json.dumps(records) if array else "\n".join(map(json.dumps, records)))
  return path


def read_rows(path):
  text = path.read_text(encoding="utf-8")
  return json.loads(text) if path.suffix == ".json" else list(map(json.loads, text.splitlines()))


def configure(path, task, **fields):
  config = nash_jax.config.arena().prompts
  config.update({"path": str(path), "task": task, "held_out": 5, "max_tokens": 60, **fields})
  return config


@pytest.mark.parametrize("task", TASKS)
def test_a_benchmarks_prompts_are_read_with_their_records(tmp_path, task):
  records = questions(task, 20)
  records[17] = {**records[17], answers.BENCHMARKS[task].key[0]: "long", "prompt": "cat " * 99}
  if task == "alpaca_eval":
    records[17]["instruction"] = "cat " * 99
  path = write_questions(tmp_path / "set", task, records)
  train, held_out = prompts.load_prompts(configure(path, task), TOKENIZER, 0)
  assert train.columns["record"] == records[:15]
  assert held_out.columns["record"] == [*records[15:17], *records[18:]], "with its own, if dropped"
  text = records[16]["instruction" if task == "alpaca_eval" else "prompt"]
  assert held_out.columns["inputs"][1].tolist() == TOKENIZER.prompt(text)
  assert held_out.all().tokens.shape == (4, 60)


def test_an_instructions_input_belongs_to_the_prompt(tmp_path):
  records = [
    {"instruction": "Sum up.", "input": "The cat sat."},
    {"instruction": "Hi", "input": ""},
  ]
  path = write_questions(tmp_path / "set.json", "alpaca_eval", records)
  config = configure(path, "alpaca_eval", held_out=1)
  train, held_out = prompts.load_prompts(config, TOKENIZER, 0)
  assert train.columns["inputs"][0].tolist() == TOKENIZER.prompt("Sum up.\n\nThe cat sat.")
  assert held_out.columns["inputs"][0].tolist() == TOKENIZER.prompt("Hi")


@pytest.mark.parametrize(
  ("task", "record", "message"),
  [
    ("alpaca_eval", {"prompt": "Hi"}, r"set:1: no field 'instruction', got 'prompt'"),
    ("alpaca_eval", {"instruction": ["Hi"]}, r"set:1: field 'instruction' is \['Hi'\]"),
    ("arena_hard", {"question_id": "1", "prompt": "Hi"}, r"set:1: no field 'uid'"),
    ("arena_hard", {"uid": "1", "turns": []}, r"set:1: no field 'prompt'"),
  ],
)
def test_a_record_of_another_form_is_named(tmp_path, task, record, message):
  (tmp_path / "set").write_text(json.dumps(record))
  with pytest.raises(ValueError, match=message):
    prompts.load_prompts(configure(tmp_path / "set", task), TOKENIZER, 0)


def test_a_benchmark_is_no_part_of_a_mixture(tmp_path):
  path = write_questions(tmp_path / "set", "arena_hard", questions("arena_hard", 3))
  with pytest.raises(ValueError, match=r"rates of prompts.path: expected none.*arena_hard"):
    prompts.load_prompts(configure(f"{path}:1", "arena_hard"), TOKENIZER, 0)


@pytest.mark.parametrize(
  ("text", "found"),
  [
    ("# One\n## Two\n## Two\n###### Six\n####### no\n#no", {"h1": 1, "h2": 2, "h6": 1}),
    ("1. a\n  22. b\n1) no\n3.no", {"ordered": 2}),
    ("- a\n * b\n+ c\n-no\n– no", {"unordered": 3}),
    ("**a** b\n**c d**\n**no\nline\n****", {"**": 2}),
    ("__a__ and _no_\n____\n__b__", {"__": 2}),
    ("# One\n```py\n# two\n- x\n**b**\n```\n- y", {"h1": 1, "unordered": 1}),
    ("```a `quoted` # x```\n# One", {"h1": 1}),  # a ` inside: no block
    ("- a\n```- a```", {}),  # what stands in a block goes wherever it stands
    ("```# open\n# One", {"h1": 1}),  # never closed
    ("", {}),
  ],
)
def test_markdown_is_counted_as_arena_hard_does(text, found):
  counts = answers.count_markdown(text)
  assert list(counts) == ["header_count", "list_count", "bold_count"]
  assert list(counts["header_count"]) == ["h1", "h2", "h3", "h4", "h5", "h6"]
  flat = {name: count for group in counts.values() for name, count in group.items()}
  assert {name: count for name, count in flat.items() if count} == found


def test_files_have_the_fields_that_the_benchmarks_tools_read(tmp_path):
  said = ["  **Yes**, “well”.\n", "No"]
  records = [
    {"dataset": "vicuna", "instruction": " Is it?\n\u2028é ", "id": 7, "input": ""},
    {"instruction": "Hm"},
  ]
  answers.write(tmp_path / "x.json", "alpaca_eval", records, said, "my model/1", len)
  assert read_rows(tmp_path / "x.json") == [
    {
      "instruction": " Is it?\n\u2028é ", "input": "", "output": "**Yes**, “well”.",
      "generator": "my model/1", "dataset": "vicuna",
    },
    {"instruction": "Hm", "output": "No", "generator": "my model/1"},
  ]  # fmt: skip
  records = [{"uid": "7a", "category": "c", "prompt": " Is it?\n"}, {"uid": "b", "prompt": "Hm"}]
  answers.write(tmp_path / "x.jsonl", "arena_hard", records, said, "x", len)
  first, second = read_rows(tmp_path / "x.jsonl")
  assert list(first) == ["uid", "ans_id", "model", "messages", "tstamp", "metadata"]
  assert (first["uid"], second["uid"], first["model"]) == ("7a", "b", "x")
  assert first["messages"] == [
    {"role": "user", "content": " Is it?\n"},
    {"role": "assistant", "content": {"answer": "**Yes**, “well”."}},
  ]
  assert next(iter(first["metadata"])) == "token_len"
  assert first["metadata"] == {"token_len": 16, **answers.count_markdown(said[0])}
  assert first["ans_id"] != second["ans_id"]
  assert isinstance(first["tstamp"], float)


def test_token_len_is_tiktokens_where_it_is_installed(monkeypatch, caplog):
  class Encoding:
    def encode(self, text, disallowed_special):
      assert disallowed_special == ()
      return text.split("-")

  class Tiktoken:
    def encoding_for_model(name):
      assert name == "gpt-4o"
      return Encoding()

  monkeypatch.setitem(__import__("sys").modules, "tiktoken", Tiktoken)
  assert answers.token_counter("arena_hard", len)("a-b-c") == 3
  assert answers.token_counter("alpaca_eval", len)("a-b-c") == 5
  assert not caplog.text
  monkeypatch.setitem(__import__("sys").modules, "tiktoken", None)  # as where it is not there
  assert answers.token_counter("arena_hard", len)("a-b-c") == 5
  assert "leave length out of Arena-Hard's style control, or install tiktoken" in caplog.text


@pytest.mark.parametrize("task", TASKS)
def test_answers_find_their_prompts_whatever_their_order(tmp_path, task, caplog):
  records, path = questions(task, 6), tmp_path / "a.json"
  rows = answers_of(task, records)
  rows = json.loads(rows) if task == "alpaca_eval" else list(map(json.loads, rows.splitlines()))
  more = json.loads(json.dumps(rows[0]))
  more[answers.BENCHMARKS[task].key[0]] = "of no prompt"
  path.write_text("\n".join(map(json.dumps, [*rows[::-1], more])))
  found = answers.read(path, task, records, 4)
  assert found == [(f"{path}:{6 - i}", text_of(100 + i)) for i in range(4)]
  assert "1 of 7 answers are to prompts that are not in this arena" in caplog.text


def test_equal_instructions_are_answered_in_their_order(tmp_path):
  records, path = [{"instruction": name} for name in "abca"], tmp_path / "a.json"
  rows = [{"instruction": r["instruction"], "output": str(i)} for i, r in enumerate(records)]
  path.write_text(json.dumps(rows))
  assert [text for _, text in answers.read(path, "alpaca_eval", records, 4)] == list("0123")
  path.write_text(json.dumps([*rows, {"instruction": "a", "output": "third"}]))
  with pytest.raises(ValueError, match=r"row 5: a second answer to instruction 'a', the first is"):
    answers.read(path, "alpaca_eval", records, 4)
  path.write_text(json.dumps(rows[:3]))
  with pytest.raises(
    ValueError, match=r"no answer to 1 of 4 prompts, the first with instruct.*'a'"
  ):
    answers.read(path, "alpaca_eval", records, 4)


def test_an_input_is_compared_where_both_files_have_one(tmp_path):
  records = [{"instruction": "Sum up.", "input": x} for x in ("one", "two")]
  rows = [{**r, "output": r["input"].upper()} for r in records]
  (tmp_path / "a.json").write_text(json.dumps(rows[::-1]))
  found = answers.read(tmp_path / "a.json", "alpaca_eval", records, 2)
  assert [text for _, text in found] == ["ONE", "TWO"]
  (tmp_path / "a.json").write_text(json.dumps([{"instruction": "Sum up.", "output": "x"}]))
  found = answers.read(tmp_path / "a.json", "alpaca_eval", records[:1], 1)
  assert [text for _, text in found] == ["x"]


def changed(task, place, **fields):
  """Answers to three prompts, one of them changed."""

  def make():
    rows = json.loads(answers_of(task, questions(task, 3))) if task == "alpaca_eval" else [
      json.loads(line) for line in answers_of(task, questions(task, 3)).splitlines()
    ]  # fmt: skip
    rows[place] = {name: x for name, x in {**rows[place], **fields}.items() if x is not None}
    return "\n".join(map(json.dumps, rows))

  return make


@pytest.mark.parametrize(
  ("task", "make", "message"),
  [
    ("alpaca_eval", changed("alpaca_eval", 1, output=None), r"a:2: no field 'output'"),
    ("alpaca_eval", changed("alpaca_eval", 1, output=3), r"a:2: field 'output' is 3"),
    ("alpaca_eval", changed("arena_hard", 0), r"a:1: no field 'instruction', got 'uid'"),
    ("alpaca_eval", changed("alpaca_eval", 2, generator="b"),
     r"a:3, generator: expected one model in a file, got \"'gpt' and 'b'\".*file of their own"),
    ("alpaca_eval", changed("alpaca_eval", 2, instruction="Tell a story 2."),
     r"no answer to 1 of 3 prompts, the first with instruction 'Tell a story 2\. .*; 1 of its 3"
     r" answers are to others\. Prompts are matched by instruction, letter by letter"),
    ("arena_hard", changed("arena_hard", 2, uid="u0"), r"a:3: a second answer to uid 'u0', .*a:1"),
    ("arena_hard", changed("arena_hard", 2, uid="x"), r"no answer to 1 of 3 .*'u2'; 1 of its 3"),
    ("arena_hard", changed("arena_hard", 0, messages=[{"role": "assistant", "content": "a"}]),
     r"a:1: the last of field 'messages' .* content is \{'answer': text\}"),
    ("arena_hard", changed("arena_hard", 0, messages=[]), r"a:1: the last of field 'messages'"),
    ("arena_hard", lambda: "", r"a: expected a model's answers, got 'none'"),
    ("arena_hard", lambda: "{", r"a:1: not JSON"),
    ("alpaca_eval", lambda: "[1]", r"a, row 1: no field 'instruction', got int"),
    ("alpaca_eval", changed("alpaca_eval", 1, input=[1]), r"a:2: field 'input' is \[1\]"),
  ],
)  # fmt: skip
def test_answers_that_are_none_or_not_these_are_named(tmp_path, task, make, message):
  (tmp_path / "a").write_text(make())
  with pytest.raises(ValueError, match=message):
    answers.read(tmp_path / "a", task, questions(task, 3), 3)


@pytest.fixture
def held(tmp_path, monkeypatch):
  """Holds arenas whose policies say canonical texts, without models; counts what is loaded."""
  said = [TOKENIZER.response(text_of(seed)) for seed in range(40)]
  unfinished = [TOKENIZER.encode(text_of(seed, 60))[:20] for seed in range(40)]
  texts = [TOKENIZER.decode(ids).strip() for ids in unfinished]
  pairs = zip(texts, unfinished, strict=True)
  said += [ids for text, ids in pairs if len(ids) == 20 and TOKENIZER.encode(text) == ids]
  tokens, mask = map(jnp.asarray, corpus.pad(said, 20, TOKENIZER.pad_id))
  stopped = jnp.array([ids[-1] in TOKENIZER.stop_ids for ids in said])
  assert 40 <= stopped.sum() < len(said)
  loads = []

  def make_sampler(*, samples):
    def sample(params, prompts, key):
      rows = jax.random.randint(key, (len(prompts.index), samples), 0, len(said))
      zeros = jnp.zeros((*rows.shape, 20))
      return Responses(tokens[rows], mask[rows], zeros, zeros, stopped[rows])

    return sample

  def logprobs(params, *, prompts, tokens, mask):
    logp = jnp.where(mask, params * tokens, 0.0)
    return logp, logp

  def load(spec, model_config):
    loads.append(spec)
    return jnp.float32(0.1 * len(spec)), None

  monkeypatch.setattr(arena, "make_policy", lambda *_: Policy(logprobs, make_sampler))
  monkeypatch.setattr(arena, "load_weights_and_step", load)
  monkeypatch.setattr(report, "heat_map", lambda *_: None)

  def hold(task, policies, folder="x", **fields):
    config = nash_jax.config.arena()
    path = tmp_path / f"{task}.json"
    write_questions(path, task, questions(task))
    config.prompts = configure(path, task)
    config.judges, config.select_judge = {"judge": config.judges.population}, "judge"
    config.policies, config.base = policies, next(iter(policies))
    config.sampling.max_tokens, config.samples, config.resamples = 20, 1, 20
    config.update_from_flattened_dict(fields)
    return arena.run(config, tmp_path / folder)

  hold.loads = loads
  return hold


WEIGHTS = "assets:stories/policy.safetensors"
MINE = {"weights": WEIGHTS, "best_of": 1}


@pytest.mark.parametrize("task", TASKS)
def test_answers_that_were_written_and_read_have_the_same_cells(held, tmp_path, task):
  """Bit for bit: key, order and text come back, and judges read the same tokens."""
  first = held(task, {"a": MINE, "B/2": MINE})
  ending, key = answers.BENCHMARKS[task].file, answers.BENCHMARKS[task].key[0]
  a, b = sorted((tmp_path / "x" / "outputs").iterdir())
  assert (a.name, b.suffix) == (f"a{ending}", ending)
  rows, more = read_rows(a), read_rows(b)
  assert [row[key] for row in rows] == [record[key] for record in questions(task)]
  named = [{row[answers.BENCHMARKS[task].model] for row in file} for file in (rows, more)]
  assert named == [{"a"}, {"B/2"} if task == "alpaca_eval" else {b.stem}]
  second = held(task, {"a": MINE, "B/2": {"outputs": str(b)}}, "y")
  third = held(task, {"a": {"outputs": str(a)}, "B/2": {"outputs": str(b)}}, "z")
  for again in (second, third):
    assert again["judges"] == first["judges"]
    assert again["texts"] == first["texts"]
  assert first["judges"]["judge"]["win_rate"]["a"]["B/2"]["n"] == 60
  assert first["judges"]["judge"]["length_controlled"]["a"]["B/2"]["refused"] == ""
  assert first["policies"]["B/2"]["kl_to_reference"] is not None
  assert 0 < first["policies"]["B/2"]["truncated"] == second["policies"]["B/2"]["truncated"]
  statistics = second["policies"]["B/2"]
  assert (statistics["kl_to_reference"], statistics["weights"]) == (None, None)
  assert statistics["no_kl"] == "no log-probabilities"
  assert third["policies"]["a"]["no_kl"] == "no log-probabilities"
  page = (tmp_path / "y" / "arena.md").read_text()
  assert "— (no log-probabilities)" in page
  assert "LC (ours)" in page
  assert [p.name for p in (tmp_path / "y" / "outputs").iterdir()] == [f"a{ending}"]
  assert len(held.loads) == 2, "one file for two policies, and none where all have answers"


def other(tmp_path, task="alpaca_eval", text=None):
  path = tmp_path / "gpt.json"
  path.write_text(answers_of(task, questions(task)) if text is None else text)
  return {"outputs": str(path)}


def test_answers_may_be_the_base_and_count_as_every_sample(held, tmp_path):
  policies = {"gpt": other(tmp_path), "mine": MINE}
  result = held("alpaca_eval", policies, samples=2, max_prompts=10)
  mine, gpt = result["policies"]["mine"], result["policies"]["gpt"]
  assert mine["no_kl"] == "base has no log-probabilities"
  assert mine["kl_to_reference"] is mine["log_ratio_to_reference"] is None
  assert gpt["distinct2"] is mine["distinct2_ratio"] is None
  assert mine["distinct2"] > 0
  assert mine["length_ratio"] == mine["length"] / gpt["length"]
  cell = result["judges"]["judge"]["win_rate"]["gpt"]["gpt"]
  assert (cell["mean"], cell["n"]) == (0.5, 10)
  page = (tmp_path / "x" / "arena.md").read_text()
  assert "— (base has no log-probabilities)" in page
  assert "No length-controlled win rates, LC (ours): fewer than 50 prompts." in page


def test_answers_are_cut_at_the_budget_and_that_is_told(held, tmp_path, caplog):
  rows = json.loads(answers_of("alpaca_eval", questions("alpaca_eval")))
  rows[3]["output"], rows[5]["output"] = "the cat saw a big dog " * 9, "“Hi”"
  policies = {"mine": MINE, "gpt": other(tmp_path, text=json.dumps(rows))}
  result = held("alpaca_eval", policies, max_prompts=12)
  assert result["policies"]["gpt"]["truncated"] == pytest.approx(1 / 12)
  assert "gpt.outputs: 1 of 12 answers are cut at sampling.max_tokens = 20" in caplog.text
  assert (
    "gpt.outputs: 1 of 12 answers hold what model.tokenizer spells in another way" in caplog.text
  )
  assert "outputs: answers to 12 of the benchmark's 60 prompts" in caplog.text
  page = (tmp_path / "x" / "arena.md").read_text()
  mine = result["policies"]["mine"]["truncated"]
  shares = f"gpt .08, mine {report.number(mine, 2)}" if mine else "gpt .08"
  assert f"Share of responses cut at the most tokens: {shares}." in page


def test_judges_that_read_text_get_the_answers_text(tmp_path):
  config = resolve(ConfigDict({
    **nash_jax.config.arena(), "policies": {"gpt": other(tmp_path), "b": MINE}, "base": "b",
    "prompts": configure(write_questions(tmp_path / "q", "alpaca_eval", questions("alpaca_eval")),
                         "alpaca_eval"),
  }), "arena")  # fmt: skip
  held_out = arena._load_held_out(config, TOKENIZER)
  found = outputs.read(config, held_out, 60, TOKENIZER)["gpt"]
  assert found.tokens.shape == (60, 2, config.sampling.max_tokens)
  for sample in range(2):
    texts = [
      TOKENIZER.decode(ids[mask])
      for ids, mask in zip(found.tokens[:, sample], found.mask[:, sample], strict=True)
    ]
    assert texts == [text_of(100 + i) for i in range(60)]
  assert found.stopped.all()


@pytest.mark.parametrize(
  ("policy", "fields", "message"),
  [
    ({"outputs": "none.json"}, {}, r"policies.gpt.outputs: expected a file, got 'none.json'"),
    ({"outputs": "here", "best_of": 2}, {}, r"policies.gpt.best_of: expected 1 where there are"),
    ({"outputs": "here"}, {"prompts.task": "stories"},
     r"policies.gpt.outputs: expected prompts.task = alpaca_eval or arena_hard, .*= stories"),
    ({"outputs": "here"}, {"prompts.task": "arena_hard"}, r"no field 'uid'"),
    ({"outputs": 3}, {}, r"policies.gpt.outputs: expected text, got 3"),
  ],
)  # fmt: skip
def test_answers_that_cannot_be_judged_are_refused_before_weights_load(
  held, tmp_path, policy, fields, message
):
  if policy["outputs"] == "here":
    policy = {**policy, **other(tmp_path)}
  with pytest.raises(ValueError, match=message):
    held("alpaca_eval", {"mine": MINE, "gpt": policy}, **fields)
  assert not held.loads


@pytest.mark.parametrize(
  ("rows", "message"),
  [
    (slice(0, 3), r"policies.gpt.outputs: .*no answer to 57 of 60 prompts"),
    ([*range(60), 0], r"policies.gpt.outputs: .*row 61: a second answer to instruction"),
  ],
)
def test_files_that_do_not_fit_the_prompts_are_refused_before_weights_load(
  held, tmp_path, rows, message
):
  given = np.array(json.loads(answers_of("alpaca_eval", questions("alpaca_eval"))))[rows].tolist()
  with pytest.raises(ValueError, match=message):
    held("alpaca_eval", {"mine": MINE, "gpt": other(tmp_path, text=json.dumps(given))})
  assert not held.loads


def test_an_answer_with_a_template_is_named_by_its_line(held, tmp_path):
  rows = json.loads(answers_of("alpaca_eval", questions("alpaca_eval")))
  rows[7]["output"] = "Yes.<end_of_turn>"
  with pytest.raises(ValueError, match=r"gpt.outputs: .*gpt.json, row 8: .*template already"):
    held("alpaca_eval", {"mine": MINE, "gpt": other(tmp_path, text=json.dumps(rows))})


def test_what_answers_make_useless_is_told(tmp_path):
  path = write_questions(tmp_path / "q", "alpaca_eval", questions("alpaca_eval"))
  config = nash_jax.config.arena()
  config.prompts = configure(path, "alpaca_eval")
  config.policies = {**config.policies, "gpt": other(tmp_path)}
  for field in ("policies.gpt.weights", "policies.gpt.best_of", "prompts.held_out"):
    with pytest.raises(ValueError, match=f"{field}: expected no value, for"):
      refuse_unread(config, "arena", [field])
  refuse_unread(config, "arena", ["policies.gpt.outputs", "policies.base.weights", "prompts.path"])
  config.prompts.held_out_path, config.prompts.path = str(path), "stories"
  with pytest.raises(ValueError, match=r"prompts.path: expected no value, for prompts.held_out_pa"):
    refuse_unread(config, "arena", ["prompts.path"])
  config.prompts.path = config.prompts.held_out_path
  assert len(arena._load_held_out(config, TOKENIZER)) == 60


def test_an_arena_from_before_outputs_is_the_same_arena():
  config = describe(resolve(nash_jax.config.arena()))
  older = json.loads(json.dumps(config))
  for policy in older["policies"].values():
    del policy["outputs"]
  assert checkpoint.differences(older, config) == {}
  config["policies"]["base"]["outputs"] = "x.json"
  assert [*checkpoint.differences(older, config)] == ["policies.base.outputs"]


def test_the_bundled_config_takes_weights_and_answers():
  policies = arena_config.get_config("mine=runs/x@target:50,gpt=a/gpt.json,o3=o3.jsonl").policies
  assert policies.mine.weights == "runs/x@target:50"
  assert (policies.gpt.outputs, policies.o3.outputs) == ("a/gpt.json", "o3.jsonl")

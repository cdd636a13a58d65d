"""Every number of every job's config has its range, and what passes it runs."""

import functools
import json
import math
import pathlib
import re
import sys

import fits
import jax
import numpy as np
import paths
import pytest
import tiny
from ml_collections import ConfigDict

from nash_jax import config as configs
from nash_jax import fit, train
from nash_jax.config import fields, meanings, page, resolve
from nash_jax.config.unread import unread
from nash_jax.configs import short_game
from nash_jax.data import votes
from nash_jax.jobs import agreement, arena, collect, compare, sample, vote

ODD = (0, -1, math.nan, math.inf, 1e30)


def base(job: str) -> ConfigDict:
  """Returns a config of the job in which all groups have an entry, as plain as can be."""
  c = getattr(configs, job)()
  if job == "compare":
    c.base, c.runs = configs.train(), ({"algorithm.name": "nash_mp"},)
    c.arena.judges = {"judge": fields.judge()}
    c.arena.policies = {}
  return c


def numbers(declared: ConfigDict, config: ConfigDict, prefix: str = "") -> dict[str, fields.Number]:
  """Returns the declared numbers of a config, those of its entries too, by dotted name."""
  found = {}
  for name in config:
    entry = prefix.rstrip(".").rpartition(".")[2]
    if entry == "changes":
      field = fields.CHANGES[name]
    else:
      field = fields.ENTRIES[entry]() if entry in fields.ENTRIES else declared[name]
    if isinstance(field, fields.Number):
      found[prefix + name] = field
    elif isinstance(config[name], ConfigDict):
      found |= numbers(field, config[name], f"{prefix}{name}.")
  return found


def with_value(config: ConfigDict, field: str, value) -> ConfigDict:
  """Returns a copy with a field of any type, as a config that is made of dictionaries may have."""
  values = config.to_dict()
  *groups, name = field.split(".")
  functools.reduce(lambda group, part: group[part], groups, values)[name] = value
  return ConfigDict(values)


@pytest.mark.parametrize("job", fields.DECLARED)
def test_every_number_of_a_job_is_declared_with_its_range(job):
  """No field holds a bare number, so that none is without a range."""

  def bare(declared, path=""):
    for name in declared:
      field = declared[name]
      if isinstance(field, ConfigDict):
        yield from bare(field, f"{path}{name}.")
      elif isinstance(field, int | float) and not isinstance(field, bool):
        yield path + name

  assert list(bare(fields.DECLARED[job]())) == []
  assert list(bare(fields._judge())) == []
  for path, field in numbers(fields.DECLARED[job](), base(job)).items():
    values = field.default if field.many else [field.default]
    good = all(field.holds(x) for x in values if x not in field.special)
    assert good, f"{path}: {field.default} is not in {field.interval}"


@pytest.mark.parametrize("job", fields.DECLARED)
def test_a_number_out_of_its_range_is_refused_by_name_whatever_else_is_chosen(job):
  config, tried, refused, passed = base(job), 0, 0, []
  resolve(config)
  found = numbers(fields.DECLARED[job](), config)
  assert len(found) >= {"fit": 25, "sample": 11, "agreement": 23, "vote": 7}.get(job, 28)
  for path, field in found.items():
    # The ranges of a comparison's base and arena are those of the jobs train and arena.
    for odd in ODD[2:3] if path.startswith(("base.", "arena.")) else ODD:
      tried += 1
      value = (odd,) if field.many else odd
      good = field.holds(odd) or odd in field.special
      good &= odd in field.special or field.kind is float or isinstance(odd, int)
      try:
        resolve(with_value(config, path, value))
        assert good, f"{path} = {odd} is resolved"
        passed.append((path, odd))
      except ValueError as error:
        refused += 1
        message = str(error)
        assert good or message.startswith(f"{path}: expected "), message
        assert good or f"got {odd!r}" in message, message
  infinite = {path.rpartition(".")[2] for path, odd in passed if odd == math.inf}
  assert infinite <= {"eta"}, "infinity passes where it means something"
  assert not [path for path, odd in passed if math.isnan(odd)]
  assert refused > 0.6 * tried


def test_the_page_of_fields_is_what_the_table_says():
  expected = "python -m nash_jax.config.page > docs/fields.md writes it anew"
  assert (paths.ROOT / "docs" / "fields.md").read_text(encoding="utf-8") == page.page(), expected


def test_every_meaning_is_of_a_field_of_its_job():
  sections = dict(re.findall(r"^## `(.+?)`\n(.*?)(?=^## |\Z)", page.page(), re.M | re.S))
  for job, texts in meanings.MEANINGS.items():
    for field, text in texts.items():
      assert f"| `{field}` | {text} |" in sections[job], f"{job} has no field {field}"


WRONG = (True, "1", 10**400, -(10**400), 2**63, (1,), b"1", 1j, np.bool_(True), np.float32(np.nan))


def test_what_is_no_number_or_too_large_for_one_is_refused():
  config = base("fit")
  for path, field in numbers(fields.DECLARED["fit"](), config).items():
    for wrong in [*WRONG, *((0.5, 2.0) if field.kind is int else ())]:
      if field.many and isinstance(wrong, tuple):
        continue
      with pytest.raises(ValueError, match=rf"^{path}: expected .*number.*, got "):
        resolve(with_value(config, path, wrong))
    if None not in field.special:
      with pytest.raises(ValueError, match=rf"^{path}: expected .*number.*, got None"):
        resolve(with_value(config, path, None))


def test_numbers_of_other_libraries_and_negative_zero_become_pythons_own():
  """What is recorded as JSON, and compared when a run goes on."""
  changes = {
    "seed": np.int64(3), "steps": np.int32(6), "algorithm.beta": np.float32(0.5),
    "optimizer.learning_rate": np.float64(0.25), "optimizer.weight_decay": -0.0,
    "optimizer.clip_norm": 0, "sampling.temperature": 2, "sampling.tokens": [np.int64(7), 8],
  }  # fmt: skip
  config = functools.reduce(lambda c, item: with_value(c, *item), changes.items(), tiny.train())
  c = resolve(config)
  for path, expected in {**changes, "sampling.tokens": (7, 8)}.items():
    value = functools.reduce(lambda c, part: c[part], path.split("."), c)
    assert (tuple(value) if path == "sampling.tokens" else value) == expected
    assert type(value) is {"seed": int, "steps": int, "sampling.tokens": list}.get(path, float)
  assert math.copysign(1, c.optimizer.weight_decay) == 1
  assert json.loads(json.dumps(configs.describe(c)))["seed"] == 3


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("profile", 1, "profile: expected True or False, got 1"),
    ("evaluation.exact", "no", "evaluation.exact: expected True or False, got 'no'"),
    ("model.weights", None, "model.weights: expected text, got None. The default is 'assets:"),
    ("checkpoint.allow", "steps", r"checkpoint.allow: expected a tuple, got 'steps'"),
    ("sampling.tokens", 7, r"sampling.tokens: expected whole numbers in \[0, 1e6\], got 7"),
    ("sampling.tokens", (7,), r"sampling.tokens: expected two ids or more .*, got \(7,\)"),
    ("sampling.tokens", (7, 7), r"sampling.tokens: expected different ids, got \(7, 7\)"),
    ("algorithm.labels", None, "algorithm.labels: got None, expected one of sampled, soft"),
    ("judge.http.timeout", math.inf, r"judge.http.timeout: expected a number in .*, got inf"),
    ("judge.http.backoff", 1e30, r"judge.http.backoff: expected a number in .*, got 1e\+30"),
    ("judge.answers", ("A", 1), r"judge.answers: expected two different pieces, got \('A', 1\)"),
    ("model.changes.num_layers", 3, "model.changes: expected at most 2 layers, got"),
    ("model.changes.num_layers", 0, r"model.changes.num_layers: expected a whole number in .* 0"),
    ("model.changes.head_dim", 7, "model.changes: expected an even head_dim, got .*head_dim: 7"),
    ("model.changes.num_kv_heads", 3, "model.changes: expected num_kv_heads to divide num_heads"),
    ("model.changes.final_logit_softcap", math.nan, "final_logit_softcap: expected a number"),
    ("model.changes.attention_types", (), "attention_types: expected a tuple of .*LOCAL"),
    ("sampling.top_k", 1025, "sampling.top_k: expected at most the model's 1024 rows, got 1025"),
    ("evaluation.texts", 17, "evaluation.texts: expected at most evaluation.prompts = 16, got 17"),
    (
      "optimizer.warmup_steps",
      7,
      "optimizer.warmup_steps: expected at most steps = 6, got 7. Lower it",
    ),
  ],
)
def test_other_values_that_cannot_work_are_refused(field, value, message):
  config = tiny.train({"judge.name": "gemma", "algorithm.name": "online_dpo"})
  with pytest.raises(ValueError, match=message):
    resolve(with_value(config, field, value))


def test_responses_too_short_for_an_action_of_the_table_are_refused():
  game = short_game.get_config()
  game.sampling.max_tokens = 2
  with pytest.raises(ValueError, match=r"sampling.max_tokens: expected at least 3, .*judge.table"):
    resolve(game)


def test_beta_is_one_whose_equilibrium_is_found_where_that_is_asked_for():
  game = short_game.get_config()
  game.algorithm.beta = 1e-5
  with pytest.raises(ValueError, match=r"algorithm.beta: expected at least 0.0001 .*got 1e-05"):
    resolve(game)
  game.evaluation.exact = False
  resolve(game)


# What makes a run read a field, by the beginning of its name; of what is left nothing reads it.
READ_WITH = {
  "algorithm.mixture": {"algorithm.name": "nash_md"},
  "algorithm.step": {"algorithm.name": "sppo"},
  "algorithm.kappa_offset": {"algorithm.kappa_schedule": "harmonic"},
  "algorithm.target_period": {"algorithm.target_update": "periodic"},
  "algorithm.behaviour_temperature": {"algorithm.name": "online_dpo"},
  "sampling.top": {"algorithm.name": "online_dpo", "sampling.top_k": 4},
  "optimizer.final_fraction": {"optimizer.schedule": "cosine"},
  "model.lora.alpha": {"model.lora.rank": 2},
  "model.changes": {"model.weights": ""},
  "judge.max_tokens": {"judge.name": "gemma"},
  "judge.micro_batches": {"judge.name": "gemma"},
  "judge.mesh": {"judge.name": "gemma"},
  "judges.judge.max_tokens": {"judges.judge.name": "gemma"},
  "realign": {"realign": 0.5},
  "features": {"design": "greedy", "budget": 2},
  "tuning_seed": {"learning_rates": (0.1, 0.2)},
  "tuning_steps": {"learning_rates": (0.1, 0.2)},
}
QUICKLY = {
  "jax_disable_most_optimizations": True,
  "jax_persistent_cache_min_compile_time_secs": 0.0,
}
RUNS = {
  "train": train.run, "fit": fit.run, "arena": arena.run, "collect": collect.run,
  "compare": compare.run, "sample": sample.run, "agreement": agreement.run,
  "vote": vote.run,
}  # fmt: skip


def judged(folder: pathlib.Path) -> pathlib.Path:
  """Returns a file of comparisons, beside a store that has a vote on another one."""
  store = votes.Store(folder / votes.FILE)
  store.add([votes.Pair("p", votes.Answer("x"), votes.Answer("y"))])
  me = store.sign_in("ann")
  if question := store.question(me):
    store.vote(me, question.pair, question.left_id, "tie")
  store.close()
  path = folder / "comparisons.jsonl"
  path.write_text(json.dumps({"prompt": "q", "response_a": "x", "response_b": "y"}))
  return path


def small(job: str, folder: pathlib.Path, field: str) -> ConfigDict:
  """Returns the short game as a run of two steps, one that reads the field if any does."""
  game = short_game.get_config()
  game.update_from_flattened_dict({
    "steps": 2, "prompts.batch_size": 2, "evaluation.every": 2, "checkpoint.every": 2,
    "evaluation.prompts": 2, "evaluation.texts": 2, "evaluation.exact": False,
  })  # fmt: skip
  c, weights = getattr(configs, job)(), game.model.weights
  if job == "train":
    c = game
    if field.startswith("pairs."):
      path, row = folder / "tokens.jsonl", {"inputs": [2, 11], "a": [7, 8, 9], "b": [8, 8, 8]}
      path.write_text("".join(json.dumps({**row, "p_a": i / 8}) + "\n" for i in range(4)))
      file = {"pairs.path": str(path), "pairs.task": "tokens"}
      c.update_from_flattened_dict({"algorithm.name": "gpo", **file})
  elif job == "compare":
    c.base, c.runs, c.seeds = game, ({"algorithm.name": "nash_mp"},), 1
    if field.startswith("arena."):
      c.arena = small("arena", folder, "")
  elif job == "fit":
    c = fits.settings(folder, "sft")
    c.steps = c.checkpoint.every = c.evaluation.every = 2
  elif job == "agreement":
    pairs = folder / "pairs.jsonl"
    rows = ({"inputs": [2, 6], "a": [7 + i, 1], "b": [8, 9, 1], "p_a": 0.25 * i} for i in range(4))
    pairs.write_text("\n".join(map(json.dumps, rows)))
    c.data.update(task="tokens", path=str(pairs), batch_size=2, max_tokens=4)
    c.data.max_response_tokens = 4
    c.model.update(tokenizer=game.model.tokenizer, changes=game.model.changes)
    c.judges = {"judge": {**game.judge.to_dict(), "name": "population"}}
  elif job == "vote":
    c.export, c.source = str(folder / "votes.jsonl"), str(judged(folder))
  else:
    for part in ("model", "prompts") if job != "sample" else ("model",):
      c[part] = game[part]
    c.model.weights = weights if job == "sample" else ""
    c.sampling.max_tokens, c.sampling.tokens = 3, game.sampling.tokens
  if job == "arena":
    c.policies = {"base": {"weights": weights, "best_of": 1}}
    c.judges = {"judge": game.judge}
  elif job == "collect":
    c.judge, c.steps = game.judge, 2
    c.sources = {"base": {"weights": weights, "temperature": 1.0}}
    c.features.model = game.model
  elif job == "sample":
    c.prompt, c.reference = "e", weights
  for start, changes in READ_WITH.items():
    if field.startswith(start):
      c.update_from_flattened_dict({k: v for k, v in changes.items() if k.split(".")[0] in c})
  if "gemma" in (judge.name for judge in (c.get("judge"), *c.get("judges", {}).values()) if judge):
    for judge in (c.get("judge"), *c.get("judges", {}).values()):
      if judge:
        judge.model.update(preset="tiny", weights="", tokenizer=game.model.tokenizer)
        judge.template, judge.model.changes = "gemma", game.model.changes
        judge.answers = ("a", "b")
  return c


def cases(job: str, folder: pathlib.Path) -> list[tuple[str, float]]:
  """Returns (field, value) of what is odd, or an interval's end in train, passes, and is read."""
  found = []
  for field, number in numbers(fields.DECLARED[job](), small(job, folder, "")).items():
    if number.many or field.startswith("base."):  # ids of one's own; as in train
      continue
    config = small(job, folder, field)
    low, high = map(float, number.interval[1:-1].split(","))
    ends = (number.kind(low), *((high,) if number.kind is float else ()))
    for value in dict.fromkeys([*ODD, *ends] if job == "train" else ODD):
      try:
        changed = resolve(with_value(config, field, value).lock())
      except ValueError:
        continue
      if field not in unread(changed, job):
        found.append((field, value))
  return sorted(found, key=lambda case: case[1] not in ODD)


@pytest.fixture
def compiled_quickly():
  """Compiles without optimisation, and programs that are the same but once."""
  before = {option: jax.config.values[option] for option in QUICKLY}
  for option, value in QUICKLY.items():
    jax.config.update(option, value)
  yield
  for option, value in before.items():
    jax.config.update(option, value)


@pytest.mark.slow
@pytest.mark.parametrize("job", fields.DECLARED)
def test_what_passes_runs_to_its_end(job, tmp_path, compiled_quickly, monkeypatch):
  """Or is refused once the data are read, by one line, before weights load.

  That none of the responses drawn can be read is known only then: a run goes on and says so, votes
  and an arena end with a line.
  """
  loaded, module = [], sys.modules[RUNS[job].__module__]
  if job not in ("compare", "vote"):
    name = "load_weights_and_step" if job == "arena" else "load_weights"
    load = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *a, **k: loaded.append(a) or load(*a, **k))
  done, failed = cases(job, tmp_path), {}
  for i, (field, value) in enumerate(done):
    folder = tmp_path / str(i)
    loaded.clear()
    try:
      config = with_value(small(job, tmp_path, field), field, value)
      RUNS[job](config, tmp_path if job == "vote" else folder)
      if job in ("train", "fit"):
        steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert steps[-1]["step"] >= config.steps - 1
        for name in ("loss", "gradient_norm"):
          read = [line for line in steps if line.get("valid") != 0]
          assert all(math.isfinite(line[name]) for line in read if name in line), name
    except Exception as error:
      unread = "expected a readable verdict on some of" in str(error)
      if isinstance(error, ValueError) and (not loaded or unread) and job != "compare":
        print("refused:", error)
        continue
      failed[field, value] = repr(error)[:300]
    print(job, f"{i + 1}/{len(done)}", field, value, failed.get((field, value), ""), flush=True)
  assert not failed

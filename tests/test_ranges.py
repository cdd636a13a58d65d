"""Every number of every job's config has its range, and what passes it runs."""

import functools
import json
import math

import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict

from nash_jax import config as configs
from nash_jax.config import fields, resolve

ODD = (0, -1, math.nan, math.inf, 1e30)


def base(job: str) -> ConfigDict:
  """Returns a config of the job in which all groups have an entry, as plain as can be."""
  c = getattr(configs, job)()
  if job == "compare":
    c.base, c.runs = tiny.train(), ({"algorithm.name": "nash_mp"},)
    c.arena.judges = {"judge": fields.judge()}
    c.arena.policies = {"base": fields.ENTRIES["policies"]().copy_and_resolve_references()}
    c.arena.policies.base = {"weights": "", "best_of": 1}
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
  config, refused, passed = base(job), 0, []
  resolve(config)
  found = numbers(fields.DECLARED[job](), config)
  assert len(found) >= {"fit": 25, "sample": 11}.get(job, 28)
  for path, field in found.items():
    for odd in ODD:
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
  assert refused > 3 * len(found)


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
    ("sampling.tokens", (7, 7), r"sampling.tokens: expected different ids, got \(7, 7\)"),
    ("algorithm.labels", None, "algorithm.labels: got None, expected one of sampled, soft"),
    ("judge.http.timeout", math.inf, r"judge.http.timeout: expected a number in .*, got inf"),
    ("judge.http.backoff", 1e30, r"judge.http.backoff: expected a number in .*, got 1e\+30"),
    ("judge.answers", ("A", 1), r"judge.answers: expected two different pieces, got \('A', 1\)"),
    ("model.changes.num_layers", 3, "model.changes: expected at most 2 layers, got"),
    ("model.changes.num_layers", 0, r"model.changes.num_layers: expected a whole number in .* 0"),
    ("model.changes.head_dim", 7, "model.changes: expected an even head_dim, .*head_dim: 7"),
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

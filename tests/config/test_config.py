"""Bad input is refused before weights load: what is wrong, what was expected, how to fix it."""

import re

import jax
import pytest
import tiny
import tiny_runs
from ml_collections import ConfigDict

import nash_jax
from nash_jax import train, update, weights
from nash_jax.config import describe, resolve
from nash_jax.config.unread import unread
from nash_jax.models import gemma, sharding
from nash_jax.objectives import algorithms


@pytest.fixture
def refuse(monkeypatch, tmp_path):
  """Returns (config, message) -> asserts that a run is refused so, and that no weights load."""
  monkeypatch.setattr(train, "load_weights", lambda *args: pytest.fail("weights are loaded"))

  def refuse(config, message):
    with pytest.raises(ValueError, match=message):
      train.run(config, tmp_path / "run")

  return refuse


@pytest.mark.parametrize("kind", ["train", "fit", "collect", "sample"])
def test_defaults_are_good_and_come_back_locked(kind):
  config = getattr(nash_jax.config, kind)()
  resolved = resolve(config)
  assert resolved.is_locked
  assert not config.is_locked
  own = {"step": 5.0, "reference_period": 0, "samples": 2} if kind == "train" else {}
  config.update({"algorithm": own} if own else {})
  assert describe(resolved) == describe(config)
  assert resolve(resolved) == resolved


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    (
      "model.preset",
      "storys",
      "model.preset: got 'storys', expected one of gemma2_2b, gemma2_9b, "
      "gemma3_12b, .*tiny; did you mean 'stories'",
    ),
    (
      "algorithm.name",
      "nash_pm",
      "algorithm.name: got 'nash_pm', expected one of agro, best_of_two, best_response, "
      "egpo, .*sppo.*; did you mean 'nash_mp'",
    ),
    (
      "judge.name",
      "popular",
      "judge.name: got 'popular', expected one of bradley_terry, gemma, gemma_text, gpm, http,"
      " human, module:function, none, population, table, table_reward; did you mean 'population'",
    ),
    ("model.dtype", "float64", "model.dtype: expected bfloat16 or float32, got 'float64'"),
    (
      "model.template",
      "chat",
      "model.template: got 'chat', expected one of gemma, gemma4, gemma4_large, plain",
    ),
    ("optimizer.name", "adam", "optimizer.name: got 'adam', expected one of adafactor, adamw"),
    ("optimizer.schedule", "step", "optimizer.schedule: got 'step', expected one of constant"),
    ("algorithm.kappa_schedule", "cosine", "kappa_schedule: got 'cosine', expected one of const"),
    ("algorithm.target_update", "copy", "target_update: got 'copy', expected one of ema, periodic"),
    ("prompts.overflow", "keep", "prompts.overflow: got 'keep', expected one of cut, drop"),
    ("prompts.task", "storys", "prompts.task: got 'storys', expected one of .*json_lines"),
    (
      "algorithm.beta",
      0.0,
      r"algorithm.beta: expected a number in \[1e-9, 1e6\], got 0.0. The default is 0.1",
    ),
    ("algorithm.beta", -0.1, "algorithm.beta: expected a number in .*, got -0.1"),
    ("algorithm.beta", float("nan"), "algorithm.beta: expected a number in .*, got nan"),
    (
      "algorithm.eta",
      0.0,
      r"algorithm.eta: expected a number in \[1e-6, 1e12\], or inf \(no KL to the target\), got 0",
    ),
    ("algorithm.eta", -1.0, "algorithm.eta: expected a number in .*, got -1.0"),
    ("algorithm.kappa", 1.5, r"algorithm.kappa: expected a number in \[0, 1\], got 1.5"),
    ("algorithm.kappa", -0.5, r"algorithm.kappa: expected a number in \[0, 1\], got -0.5"),
    ("algorithm.samples", 1, "algorithm.samples: expected at least 2 for nash_mp, got 1"),
    (
      "algorithm.name",
      "rlhf",
      "judge.name: expected a judge with scalar rewards, bradley_terry "
      "or table_reward, for rlhf, got 'population'. Fit one",
    ),
    ("algorithm.labels", "hard", "algorithm.labels: got 'hard', expected one of sampled, soft"),
    (
      "algorithm.reference_period",
      -1,
      r"reference_period: expected a whole number in .*, or 0 \(never\), .*got -1",
    ),
    ("algorithm.behaviour_temperature", 2.0, "behaviour_temperature = 1, because nash_mp follows"),
    (
      "sampling.top_k",
      5,
      "sampling: expected top_k = 0, top_p = 1 and behaviour_temperature = 1, "
      "because nash_mp follows the gradient of the distribution that it samples from, got .*k': 5",
    ),
    ("sampling.top_p", 0.9, "sampling: expected top_k = 0, top_p = 1 and .*, because nash_mp"),
    ("sampling.temperature", 0.0, "sampling.temperature: expected a number in .*, got 0.0"),
    ("sampling.max_tokens", 0, "sampling.max_tokens: expected a whole number in .*, got 0"),
    (
      "optimizer.micro_batches",
      3,
      "optimizer.micro_batches: expected a divisor of prompts.batch_size = 8, got 3",
    ),
    ("optimizer.micro_batches", 0, "optimizer.micro_batches: expected a whole number in .*, got 0"),
    ("mesh.data", 3, "mesh: expected sizes whose product is 1 devices, .*For example data=1"),
    ("mesh.fsdp", -1, "mesh: expected positive sizes and at most one -1"),
    ("prompts.batch_size", 0, "prompts.batch_size: expected a whole number in .*, got 0"),
    ("steps", 0, r"steps: expected a whole number in \[1, 1e9\], got 0"),
    ("evaluation.every", 0, "evaluation.every: expected a whole number in .*, got 0"),
    ("checkpoint.every", 0, "checkpoint.every: expected a whole number in .*, got 0"),
    ("checkpoint.keep", 0, "checkpoint.keep: expected a whole number in .*, got 0"),
    ("evaluation.prompts", 512, "evaluation.prompts: expected at most the 96 held-out prompts"),
    ("prompts.path", "none.jsonl", "no data file 'none.jsonl'"),
    ("model.tokenizer", "none.model", "model.tokenizer: expected a file that exists, got 'none"),
    ("model.weights", "none.safetensors", "model.weights: expected a file that exists, got 'none"),
  ],
)
def test_bad_fields_are_named(refuse, field, value, message):
  refuse(tiny.train({field: value}), message)


@pytest.mark.parametrize(
  ("name", "changes", "message"),
  [
    (
      "nash_mp",
      {"kappa_schedule": "harmonic", "kappa_offset": 0.0},
      "kappa_offset: expected a number in .*, got 0.0",
    ),
    (
      "nash_mp",
      {"target_update": "periodic", "target_period": 0},
      "target_period: expected a whole number in .*, got 0",
    ),
    ("mpo", {"target_period": 0}, "target_period: expected a whole number in .*, got 0"),
    ("egpo", {"samples": 2}, "algorithm.samples: expected at least 3 for egpo, got 2"),
    (
      "mpo",
      {"reference_period": 0},
      "algorithm.reference_period: expected at least 1 for mpo, got 0",
    ),
    ("inpo", {"step": 10.5}, r"algorithm.step: expected in \(0, 1 / beta = 10\], got 10.5"),
    (
      "mpo",
      {"step": 2.5, "beta": 0.5},
      r"algorithm.step: expected in \(0, 1 / beta = 2\], got 2.5",
    ),
    ("sppo", {"step": 0.0}, r"algorithm.step: expected a number in .*, got 0.0"),
    ("nash_md", {"mixture": 1.5}, r"algorithm.mixture: expected a number in \[0, 1\], got 1.5"),
    ("nash_ema", {"kappa": 1.5}, r"algorithm.kappa: expected a number in \[0, 1\], got 1.5"),
  ],
)
def test_bad_fields_of_a_method_are_named(refuse, name, changes, message):
  changes = {f"algorithm.{field}": value for field, value in changes.items()}
  refuse(tiny.train({"algorithm.name": name, **changes}), message)


# Values that no method takes, whether it uses the field or not.
BAD = {
  "beta": -1.0,
  "eta": -1.0,
  "kappa": 2.0,
  "kappa_offset": -1.0,
  "kappa_schedule": "none",
  "target_update": "none",
  "target_period": 0,
  "step": -1.0,
  "mixture": 2.0,
  "labels": "none",
}


@pytest.mark.parametrize("name", algorithms.ALGORITHMS)
def test_fields_that_a_method_does_not_use_are_unread_and_ask_nothing_of_others(name):
  """By what it reads: its functions and the update see no other field of the config."""
  needs = tiny_runs.needs(name)
  config = tiny.train({"algorithm.name": name, **needs})
  a = resolve(config).algorithm
  method, read = algorithms.get(name), set()

  class Recorder:
    def __getattr__(self, field):
      read.add(field)
      return a[field]

  recorder = Recorder()
  method.loss(recorder), method.role_weights(recorder), method.target_ema(recorder)
  method.copy_schedule(recorder, 1)
  if method.target_ema(a):
    update.make_kappa(recorder)
  if "mixture" in (method.player, method.opponent):
    read.add("mixture")
  method.needs_rewards(recorder), method.of_batch(recorder), method.updates(recorder)
  method.metrics(recorder)
  labels = set() if method.needs_rewards(a) or method.offline else {"labels"}
  assert method.uses(a) == read | labels
  unused = {field for field in BAD if field not in method.uses(a)}
  found = {field.rpartition(".")[2] for field in unread(config, "train") if "algorithm." in field}
  assert found & {*BAD} == unused
  config.algorithm.update({"beta": 0.5, "step": 2.5})
  if "step" not in unused and name != "sppo":
    with pytest.raises(ValueError, match=r"algorithm.step: expected in \(0, 1 / beta = 2\]"):
      resolve(config)
  else:
    resolve(config)
  for field, bad in BAD.items():
    with pytest.raises(ValueError, match=f"algorithm.{field}: "):
      resolve(tiny.train({"algorithm.name": name, **needs, f"algorithm.{field}": bad}))


@pytest.mark.parametrize("name", sorted({*algorithms.ALGORITHMS} - {"rlhf"}))
@pytest.mark.parametrize("beta", [0.01, 0.1, 0.5, 3.0])
def test_every_method_runs_by_its_name_alone(name, beta):
  """Whatever the game: what a method needs is its default, but for a file of pairs."""
  changes = {"algorithm.name": name, "algorithm.beta": beta, **tiny_runs.needs(name)}
  a = resolve(tiny.train(changes)).algorithm
  assert a.samples == (3 if name == "egpo" else 2)
  assert a.reference_period == (50 if name == "mpo" else 0)
  bounded = "beta" in algorithms.get(name).fields and 5.0 * beta > 1
  assert a.step == (0.5 / beta if bounded else 5.0)


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("sampling.samples", 1, r"sampling.samples: expected a whole number in \[2, 1024\], got 1"),
    ("sampling.top_k", -1, r"sampling.top_k: expected a whole number in .*, or 0 \(off\), got -1"),
    ("sources.base.temperature", 0.0, "sources.base.temperature: expected a number in .*, got 0.0"),
    ("sources.base.temprature", 1.0, "config field sources.base.temprature is unknown; fields"),
  ],
)
def test_a_collection_is_checked_before_weights_load(field, value, message):
  config = nash_jax.config.collect()
  config.update_from_flattened_dict({field: value})
  with pytest.raises(ValueError, match=message):
    resolve(config)


def test_a_config_of_another_job_is_refused():
  with pytest.raises(ValueError, match=r"config.job: expected fit, got 'train'. .*nash-jax train"):
    resolve(tiny.train(), "fit")
  config = tiny.train()
  config.job = "trian"
  with pytest.raises(ValueError, match=r"config.job: expected one of train, fit, .*got 'trian'"):
    resolve(config)
  del config.job  # as configs were before they named their job
  assert resolve(config, "train") == resolve(tiny.train())
  with pytest.raises(ValueError, match=r"config.job: expected one of .*got ''"):
    resolve(config)


def test_a_lone_sample_cannot_be_centred(refuse):
  """Of nash_md's two samples one is the opponent's: the mean of no others would be NaN."""
  lone = tiny.train({"algorithm.name": "nash_md", "algorithm.centre_log_ratios": True})
  refuse(lone, "algorithm.samples: expected two or more of nash_md's own, .*got 2. Set 4")
  lone.algorithm.samples = 4
  resolve(lone)


def test_unknown_fields_are_named_with_what_was_meant(refuse):
  config = tiny.train()
  config.algorithm.btea = 0.1
  refuse(
    config,
    "config field algorithm.btea is unknown; fields here: .*behaviour_temperature, beta, "
    ".*; did you mean 'beta'",
  )
  config = tiny.train()
  config.sampler = {"temperature": 1.0}
  refuse(config, "config field sampler is unknown; .*; did you mean 'sampling'")
  config = tiny.train()
  config.model.changes = {"num_embd": 1024}
  refuse(config, "model.changes: got 'num_embd', expected one of .*did you mean 'num_embed'")


def test_missing_fields_and_groups_are_named(refuse):
  config = tiny.train()
  del config.algorithm.beta
  refuse(config, "config field algorithm.beta is missing")
  fields = {name: tiny.train()[name] for name in tiny.train()}
  refuse(
    ConfigDict({**fields, "optimizer": "adamw"}),
    "config field optimizer: expected a group of fields, got 'adamw'",
  )
  refuse(ConfigDict({"steps": 3}), "config field algorithm is missing; start from nash_jax.config")


def test_batches_must_divide_over_devices(refuse, monkeypatch):
  monkeypatch.setattr(jax, "device_count", lambda: 8)
  mesh = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}
  refuse(
    tiny.train({**mesh, "prompts.batch_size": 6}),
    "prompts.batch_size: expected "
    "micro-batches that divide over data x fsdp = 4 devices, got 6. Use a "
    "prompts.batch_size that is a multiple of 4",
  )
  refuse(
    tiny.train({**mesh, "optimizer.micro_batches": 4}),
    "micro-batches that divide over "
    "data x fsdp = 4 devices, got 2. Use a prompts.batch_size that is a multiple of 16",
  )
  refuse(
    tiny.train({**mesh, "evaluation.prompts": 18}),
    "evaluation.prompts: expected a multiple of data x fsdp = 4 devices, got 18",
  )
  assert sharding.resolve_mesh({"data": -1, "fsdp": 2, "tensor": 2}, 8)["data"] == 2
  with pytest.raises(ValueError, match="mesh: expected sizes whose product is 8 devices"):
    sharding.resolve_mesh({"data": -1, "fsdp": 3, "tensor": 1}, 8)


def test_a_run_without_prompts_left_is_refused(refuse):
  refuse(
    tiny.train({"prompts.max_tokens": 1, "prompts.overflow": "drop"}),
    "no examples left: all .* are over max_tokens=1 .*; raise it, or set overflow=",
  )


def test_a_tokenizer_with_more_pieces_than_the_model_has_rows_is_refused(refuse):
  config = tiny.train()
  config.model.changes = {"num_embed": 512}
  refuse(config, r"1024 pieces.*512")


@pytest.mark.parametrize("name", ["gemma", "bradley_terry"])
def test_a_judge_without_its_file_is_refused(refuse, name):
  changes = {"judge.name": name, "judge.model.weights": "none.safetensors"}
  refuse(tiny.train(changes), "judge.model.weights: expected a file that exists, got 'none")


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"answers": ("A",)}, r"judge.answers: expected two different pieces, got \('A',\)"),
    ({"max_tokens": -1}, "judge.max_tokens: expected a whole number in .*, or 0 .*, got -1"),
    ({"name": "gemma_text"}, "judge.max_tokens: expected a limit.*got 0. Try 2048"),
    ({"name": "gemma_text", "max_tokens": 99, "mesh.fsdp": 8}, "judge.mesh: expected the policy's"),
    ({"micro_batches": 0}, "judge.micro_batches: expected a whole number in .*, got 0"),
    ({"micro_batches": 3}, "judge.micro_batches: expected a divisor of prompts.batch_size"),
    ({"name": "http"}, "judge.name: expected a judge on this machine's devices, got 'http'"),
    ({"template": "story"}, "got 'story', expected one of .*stories, .*; did you mean 'stories'"),
  ],
)
def test_a_judge_that_cannot_be_used_is_refused(refuse, changes, message):
  changes = {f"judge.{name}": value for name, value in changes.items()}
  refuse(tiny.train({"judge.name": "gemma", **changes}), message)


def test_a_judge_without_its_table_is_refused(refuse, tmp_path):
  refuse(
    tiny.train({"judge.name": "table", "judge.table": str(tmp_path / "none.npy")}),
    re.escape(str(tmp_path / "none.npy")),
  )


def test_a_workdir_that_cannot_be_written_is_refused(monkeypatch, tmp_path):
  monkeypatch.setattr(train, "set_up", lambda config: pytest.fail("weights are loaded"))
  (tmp_path / "file").write_text("")
  with pytest.raises(ValueError, match=r"workdir .*/file/run: expected a folder that can be"):
    train.run(tiny.train(), tmp_path / "file" / "run")


def test_weights_of_another_model_are_refused_with_the_first_difference(tmp_path):
  """Before anything is compiled."""
  config = gemma.preset("tiny", num_embed=1024, hidden_dim=48)
  params = jax.tree.map(lambda x: jax.numpy.zeros(x.shape), gemma.shapes(config))
  path = str(tmp_path / "w.safetensors")
  weights.save(path, params, config, "float16", {})
  with pytest.raises(
    ValueError,
    match=r"w.safetensors: leaf layer_0/mlp/gating_einsum expected "
    r"shape \(2, 16, 32\), got \(2, 16, 48\)",
  ):
    train.run(tiny.train({"model.weights": path}), tmp_path / "run")
  with pytest.raises(ValueError, match=r"tokenizer.model: expected a .safetensors file"):
    train.run(tiny.train({"model.weights": "assets:stories/tokenizer.model"}), tmp_path / "other")
  (tmp_path / "empty").mkdir()
  with pytest.raises(ValueError, match=r"checkpoint in .*empty.*: expected one, found none"):
    train.run(tiny.train({"model.weights": str(tmp_path / "empty")}), tmp_path / "third")

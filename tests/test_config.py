"""Bad input is told what is wrong, what was expected and how to mend it, before weights load."""

import re

import jax
import pytest
import tiny

from nash_jax import checkpoint, train
from nash_jax import config as configs
from nash_jax.models import gemma, weights


@pytest.fixture
def refuse(monkeypatch, tmp_path):
  """Returns (config, message) -> asserts that a run is refused so, and that no weights load."""
  monkeypatch.setattr(checkpoint, "load_weights", lambda *args: pytest.fail("weights are loaded"))

  def refuse(config, message):
    with pytest.raises(ValueError, match=message):
      train.run(config, tmp_path / "run")

  return refuse


@pytest.mark.parametrize("kind", ["train", "fit", "collect", "sample"])
def test_defaults_are_good_and_come_back_locked(kind):
  config = getattr(configs, kind)()
  resolved = configs.resolve(config)
  assert resolved.is_locked
  assert not config.is_locked
  assert configs.describe(resolved) == configs.describe(config)
  assert configs.resolve(resolved) == resolved


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("model.preset", "storys", "model.preset: got 'storys', expected one of gemma2_2b, gemma2_9b, "
     "gemma3_1b, .*tiny; did you mean 'stories'"),
    ("algorithm.name", "nash_pm", "algorithm.name: got 'nash_pm', expected one of best_response, "
     "egpo, .*sppo; did you mean 'nash_mp'"),
    ("judge.name", "popular", "judge.name: got 'popular', expected one of bradley_terry, gemma, "
     "gemma_text, http, population, table, table_reward; did you mean 'population'"),
    ("model.dtype", "float64", "model.dtype: got 'float64', expected one of bfloat16, float16"),
    ("model.template", "chat", "model.template: got 'chat', expected one of gemma, plain"),
    ("optimizer.name", "adam", "optimizer.name: got 'adam', expected one of adafactor, adamw"),
    ("optimizer.schedule", "step", "optimizer.schedule: got 'step', expected one of constant"),
    ("algorithm.kappa_schedule", "cosine", "kappa_schedule: got 'cosine', expected one of const"),
    ("algorithm.target_update", "copy", "target_update: got 'copy', expected one of ema, periodic"),
    ("prompts.overflow", "keep", "prompts.overflow: got 'keep', expected one of cut, drop"),
    ("prompts.task", "storys", "unknown task 'storys': choose one of json_lines"),
    ("algorithm.beta", 0.0, "algorithm.beta: expected a positive KL weight, got 0.0"),
    ("algorithm.beta", -0.1, "algorithm.beta: expected a positive KL weight, got -0.1"),
    ("algorithm.beta", float("nan"), "algorithm.beta: expected a positive KL weight, got nan"),
    ("algorithm.eta", 0.0, "algorithm.eta: expected a positive prox step, got 0.0. Try 1.0"),
    ("algorithm.eta", -1.0, "algorithm.eta: expected a positive prox step"),
    ("algorithm.kappa", 1.5, r"algorithm.kappa: expected a rate in \[0, 1\], got 1.5"),
    ("algorithm.kappa", -0.5, r"algorithm.kappa: expected a rate in \[0, 1\], got -0.5"),
    ("algorithm.kappa_offset", 0.0, "kappa_offset: expected a positive number"),
    ("algorithm.target_period", 0, "target_period: expected a positive number of steps"),
    ("algorithm.samples", 1, "algorithm.samples: expected at least 2 for nash_mp, got 1"),
    ("algorithm.name", "egpo", "algorithm.samples: expected at least 3 for egpo, got 2"),
    ("algorithm.name", "mpo", "algorithm.reference_period: expected at least 1 for mpo, got 0"),
    ("algorithm.name", "rlhf", "judge.name: expected a judge with scalar rewards, bradley_terry "
     "or table_reward, for rlhf, got 'population'. Fit one"),
    ("algorithm.step", 10.5, r"algorithm.step: expected in \(0, 1 / beta = 10\], got 10.5"),
    ("algorithm.mixture", 1.5, r"algorithm.mixture: expected a weight in \[0, 1\], got 1.5"),
    ("algorithm.labels", "hard", "algorithm.labels: got 'hard', expected one of sampled, soft"),
    ("algorithm.reference_period", -1, "reference_period: expected 0 .never. or a number"),
    ("algorithm.behaviour_temperature", 2.0, "behaviour_temperature = 1, for nash_mp follows"),
    ("sampling.top_k", 5, "sampling: expected top_k = 0, top_p = 1 and behaviour_temperature = 1, "
     "for nash_mp follows the gradient of the law it samples from, got .*'top_k': 5"),
    ("sampling.top_p", 0.9, "sampling: expected top_k = 0, top_p = 1 and .*, for nash_mp"),
    ("sampling.temperature", 0.0, "sampling.temperature: expected a positive number"),
    ("sampling.max_tokens", 0, "sampling.max_tokens: expected a positive number"),
    ("optimizer.micro_batches", 3, "optimizer.micro_batches: expected a divisor of "
     "prompts.batch_size = 8, got 3"),
    ("optimizer.micro_batches", 0, "optimizer.micro_batches: expected a divisor"),
    ("mesh.data", 3, "mesh: expected sizes whose product is 1 devices, .*For example data=1"),
    ("mesh.fsdp", -1, "mesh: expected positive sizes and at most one -1"),
    ("prompts.batch_size", 0, "prompts.batch_size: expected a positive number, got 0"),
    ("steps", 0, "steps: expected a positive number"),
    ("evaluation.every", 0, "evaluation.every: expected a positive number of steps"),
    ("checkpoint.every", 0, "checkpoint.every: expected a positive number of steps"),
    ("checkpoint.keep", 0, "checkpoint.keep: expected at least 1"),
    ("evaluation.prompts", 512, "evaluation.prompts: expected at most the 96 held-out prompts"),
    ("prompts.path", "none.jsonl", "no data file 'none.jsonl'"),
    ("model.tokenizer", "none.model", "model.tokenizer: expected a file that exists, got 'none"),
    ("model.weights", "none.safetensors", "model.weights: expected a file that exists, got 'none"),
  ],
)  # fmt: skip
def test_bad_fields_are_named(refuse, field, value, message):
  refuse(tiny.train({field: value}), message)


def test_a_lone_sample_cannot_be_centred(refuse):
  """Of nash_md's two samples one is the opponent's: the mean of no others would be NaN."""
  lone = tiny.train({"algorithm.name": "nash_md", "algorithm.centre_log_ratios": True})
  refuse(lone, "algorithm.samples: expected two or more of nash_md's own, .*got 2. Set 4")
  lone.algorithm.samples = 4
  configs.resolve(lone)


def test_unknown_fields_are_named_with_what_was_meant(refuse):
  config = tiny.train()
  config.algorithm.btea = 0.1
  refuse(config, "config field algorithm.btea is unknown. Did you mean algorithm.beta?.*Fields "
         "here: behaviour_temperature, beta, ")  # fmt: skip
  config = tiny.train()
  config.sampler = {"temperature": 1.0}
  refuse(config, "config field sampler is unknown. Did you mean sampling?")
  config = tiny.train()
  config.model.changes = {"num_embd": 1024}
  refuse(config, "model.changes: got 'num_embd', expected one of .*did you mean 'num_embed'")


def test_missing_fields_and_groups_are_named(refuse):
  config = tiny.train()
  del config.algorithm.beta
  refuse(config, "config field algorithm.beta is missing")
  fields = {name: tiny.train()[name] for name in tiny.train()}
  refuse(configs.ConfigDict({**fields, "optimizer": "adamw"}),
         "config field optimizer: expected a group of fields, got 'adamw'")  # fmt: skip
  refuse(configs.ConfigDict({"steps": 3}), "config: expected the fields of one job.*got steps")


def test_batches_must_divide_over_devices(refuse, monkeypatch):
  monkeypatch.setattr(jax, "device_count", lambda: 8)
  mesh = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}
  refuse(tiny.train({**mesh, "prompts.batch_size": 6}), "prompts.batch_size: expected "
         "micro-batches that divide over data x fsdp = 4 devices, got 6. Use a "
         "prompts.batch_size that is a multiple of 4")  # fmt: skip
  refuse(tiny.train({**mesh, "optimizer.micro_batches": 4}), "micro-batches that divide over "
         "data x fsdp = 4 devices, got 2. Use a prompts.batch_size that is a multiple of 16")
  refuse(tiny.train({**mesh, "evaluation.prompts": 18}),
         "evaluation.prompts: expected a multiple of data x fsdp = 4 devices, got 18")  # fmt: skip
  assert configs.resolve_mesh({"data": -1, "fsdp": 2, "tensor": 2}, 8)["data"] == 2
  with pytest.raises(ValueError, match="mesh: expected sizes whose product is 8 devices"):
    configs.resolve_mesh({"data": -1, "fsdp": 3, "tensor": 1}, 8)


def test_no_prompts_left(refuse):
  refuse(tiny.train({"prompts.max_tokens": 1, "prompts.overflow": "drop"}),
         "no prompts left: all .* are over max_tokens=1; raise it, or set overflow=")  # fmt: skip


def test_a_tokenizer_with_more_pieces_than_the_model_has_rows(refuse):
  config = tiny.train()
  config.model.changes = {"num_embed": 512}
  refuse(config, r"1024 pieces.*512")


@pytest.mark.parametrize("name", ["gemma", "bradley_terry"])
def test_a_judge_that_is_not_there(refuse, name):
  changes = {"judge.name": name, "judge.model.weights": "none.safetensors"}
  refuse(tiny.train(changes), "judge.model.weights: expected a file that exists, got 'none")


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"answers": ("A",)}, r"judge.answers: expected two different pieces, got \('A',\)"),
    ({"max_tokens": -1}, "judge.max_tokens: expected a budget in the judge's tokens"),
    ({"name": "gemma_text"}, "judge.max_tokens: expected a budget.*got 0. Try 2048"),
    ({"name": "gemma_text", "max_tokens": 99, "mesh.fsdp": 8}, "judge.mesh: expected the policy's"),
    ({"micro_batches": 0}, "judge.micro_batches: expected a positive number, got 0"),
    ({"micro_batches": 3}, "judge.micro_batches: expected a divisor of prompts.batch_size"),
    ({"name": "http"}, "judge.name: expected a judge on this machine's devices, got 'http'"),
    ({"template": "story"}, "got 'story', expected one of gemma, stories; did you mean 'stories'"),
  ],
)
def test_a_judge_that_cannot_be_asked(refuse, changes, message):
  changes = {f"judge.{name}": value for name, value in changes.items()}
  refuse(tiny.train({"judge.name": "gemma", **changes}), message)


def test_a_table_that_is_no_game(refuse, tmp_path):
  refuse(tiny.train({"judge.name": "table", "judge.table": str(tmp_path / "none.npy")}),
         re.escape(str(tmp_path / "none.npy")))  # fmt: skip


def test_a_workdir_that_cannot_be_written(monkeypatch, tmp_path):
  monkeypatch.setattr(train, "assemble", lambda config: pytest.fail("weights are loaded"))
  (tmp_path / "file").write_text("")
  with pytest.raises(ValueError, match=r"workdir .*/file/run: expected a folder that can be"):
    train.run(tiny.train(), tmp_path / "file" / "run")


def test_weights_of_another_model_are_refused_with_the_first_difference(tmp_path):
  """Before anything is compiled."""
  config = gemma.preset("tiny", num_embed=1024, hidden_dim=48)
  params = jax.tree.map(lambda x: jax.numpy.zeros(x.shape), gemma.shapes(config))
  path = str(tmp_path / "w.safetensors")
  weights.save(path, params, config, "float16", {})
  with pytest.raises(ValueError, match=r"w.safetensors: leaf layer_0/mlp/gating_einsum expected "
                     r"shape \(2, 16, 32\), got \(2, 16, 48\)"):  # fmt: skip
    train.run(tiny.train({"model.weights": path}), tmp_path / "run")
  with pytest.raises(ValueError, match=r"tokenizer.model: expected a .safetensors file"):
    train.run(tiny.train({"model.weights": "assets:stories/tokenizer.model"}), tmp_path / "other")
  (tmp_path / "empty").mkdir()
  with pytest.raises(ValueError, match=r"checkpoint in .*empty.*: expected one, found none"):
    train.run(tiny.train({"model.weights": str(tmp_path / "empty")}), tmp_path / "third")

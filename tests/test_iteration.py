"""One iteration's programs, from shapes alone."""

import re

import jax
import pytest
import tiny

from nash_jax import judges, policy
from nash_jax.config import resolve
from nash_jax.data.corpus import pad_prompts
from nash_jax.iteration import make_programs
from nash_jax.models import gemma, sharding
from nash_jax.run import metrics
from nash_jax.update import Batch


@pytest.mark.parametrize(
  ("sampling", "name"),
  [
    ({}, "eval/kl_to_reference"),
    ({"top_k": 5}, "eval/log_ratio_to_reference"),
    ({"top_k": 5, "top_p": 0.9}, "eval/log_ratio_to_reference"),
    ({"temperature": 0.5}, "eval/kl_to_reference"),
  ],
)
def test_an_evaluations_mean_log_ratio_is_kl_where_the_samples_are_the_policys(sampling, name):
  changes = {f"sampling.{field}": value for field, value in sampling.items()}
  config = resolve(tiny.train({"algorithm.name": "online_dpo", **changes}))
  tokenizer, model_config = policy.tokenizer_and_model(config.model)
  judge = judges.make(config.judge, tokenizer)
  programs, _ = make_programs(
    config, tokenizer, model_config, judge, sharding.make_mesh(config.mesh)
  )
  base = gemma.shapes(model_config)
  state = jax.eval_shape(programs.init, base)
  prompts = pad_prompts({"inputs": [[3], [4]], "index": [0, 1]}, 2, 0)
  values, _ = jax.eval_shape(
    programs.evaluate, state, base, judge.params, prompts, jax.random.key(0)
  )
  assert {x for x in values if "_to_" in x} == {name}
  assert set(values) <= set(metrics.GLOSSARY)


@pytest.mark.parametrize("rank", [0, pytest.param(4, marks=pytest.mark.slow)])
def test_a_policy_that_is_its_reference_has_no_kl_to_it_in_bfloat16(rank):
  """Its sampler rounds elsewhere, by far more than nothing."""
  changes = {"model.dtype": "bfloat16", "model.lora.rank": rank, "sampling.max_tokens": 6}
  config = resolve(tiny.train({**changes, "model.changes.num_layers": 1}))
  tokenizer, model_config = policy.tokenizer_and_model(config.model)
  judge = judges.make(config.judge, tokenizer)
  programs, _ = make_programs(
    config, tokenizer, model_config, judge, sharding.make_mesh(config.mesh)
  )
  base = jax.jit(gemma.init, static_argnums=1)(jax.random.key(0), model_config)
  base["embedder"]["input_embedding"] *= 20.0  # a policy with opinions
  state, reference = programs.init(base), gemma.cast(base, "bfloat16")
  prompts = pad_prompts({"inputs": [[2, 30], [2, 40, 50]], "index": [0, 1]}, 3, 0)
  key = jax.random.key(1)
  values, _ = programs.evaluate(state, reference, judge.params, prompts, key)
  assert float(values["eval/kl_to_reference"].total) == 0


def test_samples_have_the_order_that_a_judge_was_shown_and_training_does_without():
  single = {"model.changes.num_layers": 1, "judge.model.changes.num_layers": 1}
  config = resolve(tiny.train({"judge.name": "gemma", **single}))
  tokenizer, model_config = policy.tokenizer_and_model(config.model)
  judge = judges.make(config.judge, tokenizer)
  programs, _ = make_programs(
    config, tokenizer, model_config, judge, sharding.make_mesh(config.mesh)
  )
  base, key = gemma.shapes(model_config), jax.random.key(0)
  state = jax.eval_shape(programs.init, base)
  prompts = pad_prompts({"inputs": [[3], [4]], "index": [0, 1]}, 2, 0)
  _, samples = jax.eval_shape(programs.evaluate, state, base, judge.params, prompts, key)
  assert samples["p_win_first"].shape == samples["p_win"].shape
  responses, opponents, _ = jax.eval_shape(programs.sample, state, base, prompts, key)
  verdict = jax.eval_shape(programs.judge, judge.params, prompts, responses, opponents, key)
  assert verdict.p_win_first is None


@pytest.mark.parametrize("name", ["nash_mp", "egpo"])
def test_a_donated_buffer_becomes_its_own_field(name):
  """XLA on GPUs mixes up buffers that move from field to field."""
  config = resolve(tiny.train({"algorithm.name": name, "model.changes.num_layers": 1}))
  tokenizer, model_config = policy.tokenizer_and_model(config.model)
  judge = judges.make(config.judge, tokenizer)
  programs, _ = make_programs(
    config, tokenizer, model_config, judge, sharding.make_mesh(config.mesh)
  )
  base, key = gemma.shapes(model_config), jax.random.key(0)
  state = jax.eval_shape(programs.init, base)
  prompts = pad_prompts({"inputs": [[3], [4]], "index": [0, 1]}, 2, 0)
  responses, opponents, _ = jax.eval_shape(programs.sample, state, base, prompts, key)
  verdict = jax.eval_shape(programs.judge, judge.params, prompts, responses, opponents, key)
  batch = Batch.create(prompts, responses, verdict)
  text = programs.train_step.lower(state, base, batch).as_text(debug_info=True)
  signature = next(line for line in text.split("\n") if "@main" in line)
  arguments, results = signature.split(") -> (")
  fields = re.findall(r'jax.result_info = "result\[0\](.*?)", ', results)
  donated = re.findall(r'tf.aliasing_output = (\d+) : i32} loc\("state(.*?)"\)', arguments)
  assert [fields[int(i)] for i, _ in donated] == [field for _, field in donated]
  assert len(fields) == len(jax.tree.leaves(state))
  assert len(fields) - len(donated) <= 1  # the schedule's count goes by the state's step

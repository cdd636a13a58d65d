"""The online loop: prompts, responses, verdict, train step, copies."""

import dataclasses
import functools
import itertools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import numpy as jnp
from ml_collections import ConfigDict

from nash_jax import exact, judges, keys
from nash_jax.config import resolve
from nash_jax.config.checks import judged_by_reference
from nash_jax.data.corpus import Examples
from nash_jax.data.prompts import load_prompts
from nash_jax.data.tokenizer import Tokenizer
from nash_jax.iteration import Programs, Shardings, judge_mesh, make_programs
from nash_jax.models import gemma, sharding
from nash_jax.objectives import algorithms
from nash_jax.policy import load_weights, make_policy, read_start, tokenizer_and_model
from nash_jax.run import inputs
from nash_jax.run.loop import run_loop
from nash_jax.types import Params, TrainState
from nash_jax.update import Batch
from nash_jax.validation import require

PROGRESS_METRICS = (
  "kl_to_reference", "eval/win_rate_vs_reference", "response_length", "flip_rate", "seconds/sample",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Setup:
  """Everything that a run needs; made by `set_up`.

  Attributes:
    state_spec: shapes and shardings of the state.
    initial_state: returns the state of a new run.
  """

  config: ConfigDict
  tokenizer: Tokenizer
  train_prompts: Examples
  held_out: Examples
  judge: judges.Judge
  reference: Params
  state_spec: TrainState
  initial_state: Callable[[], TrainState]
  programs: Programs
  shardings: Shardings

  def inputs(self) -> inputs.Inputs:
    """Returns checksums of everything that the run has read."""
    return inputs.of_training(self.config, self.judge.params, self.train_prompts, self.held_out)


def set_up(config: ConfigDict) -> Setup:
  """Sets up a run from its resolved config: data first, then weights, then programs."""
  tokenizer, model_config = tokenizer_and_model(config.model)
  train_prompts, held_out = load_prompts(config.prompts, tokenizer, config.seed)
  size, expected = config.evaluation.prompts, f"at most the {len(held_out)} held-out prompts"
  fix = "Lower it, or raise prompts.held_out."
  require(size <= len(held_out), "evaluation.prompts", expected, size, fix)
  mesh, start = sharding.make_mesh(config.mesh), read_start(config.model, model_config)
  # A judge that is the reference shares its weights: here as shapes, until they are loaded.
  is_own = judged_by_reference(config, dict(mesh.shape))
  own = gemma.shapes(model_config) if is_own else None
  rewards = algorithms.get(config.algorithm.name).needs_rewards
  judge = judges.make(config.judge, tokenizer, own, judge_mesh(config, mesh), rewards)
  load = functools.partial(load_weights, config.model.weights, model_config, config.seed, mesh=mesh)
  # All computation with the reference is in this dtype, so storing it in this dtype loses nothing.
  reference, exact_metrics = load(dtype=jnp.dtype(config.model.dtype)), None
  judge = dataclasses.replace(judge, params=reference) if is_own else judge
  if config.evaluation.exact:
    policy = make_policy(config.model, config.sampling, tokenizer, model_config)
    exact_metrics = exact.make_metrics(config, policy.logprobs, train_prompts, held_out, reference)
  programs, shardings = make_programs(config, tokenizer, model_config, judge, mesh, exact_metrics)
  state_shapes = jax.eval_shape(programs.init, gemma.shapes(model_config))
  return Setup(
    config, tokenizer, train_prompts, held_out, judge, reference,
    sharding.abstract(state_shapes, shardings.state),
    # With adapters the reference is the base; a full policy is read again, in float32.
    initial_state=lambda: programs.init(start(reference) if config.model.lora.rank else load()),
    programs=programs, shardings=shardings,
  )  # fmt: skip


class Done(NamedTuple):
  """How a run ended: its last state, whether a signal stopped it, compilations of train_step."""

  state: TrainState
  stopped: bool
  compilations: int


def run(config: ConfigDict, workdir: str | os.PathLike[str], progress: bool = True) -> Done:
  """Trains a policy online, or resumes from the workdir's last checkpoint.

  Args:
    config: an ml_collections config, such as nash_jax.config.train() with changes.
    workdir: folder for config, checkpoints, metrics and samples.

  Raises:
    ValueError: a bad config, data, weights or workdir, before anything heavy loads.
    FloatingPointError: the loss is not finite; names the step and the last good checkpoint.
    OSError: the workdir cannot be read or written; names the last good checkpoint.
  """
  config = resolve(config, "train")
  advice = "Lower optimizer.learning_rate or raise algorithm.beta."
  setup, state = run_loop(config, workdir, set_up, _loop, PROGRESS_METRICS, progress, advice)
  stopped = int(state.step) < config.steps
  return Done(state, stopped, sharding.compilations(setup.programs.train_step))


def _loop(setup: Setup, state: TrainState, first_step: int, log, checkpoints, stop):
  config, programs, reference = setup.config, setup.programs, setup.reference
  size, evaluated = config.prompts.batch_size, range(config.evaluation.prompts)
  evaluated_prompts = sharding.global_batch(
    setup.shardings.batch, len(evaluated), lambda rows: setup.held_out.all(evaluated[rows])
  )
  # One key for all evaluations: shared noise makes them comparable.
  evaluation_key = keys.key(config.seed, "evaluate")
  for step in itertools.count(first_step):
    final = step >= config.steps
    stopping = stop.before(step) or final
    key = functools.partial(keys.key, config.seed, step=step)
    if evaluating := step % config.evaluation.every == 0 or final:
      metrics, samples = programs.evaluate(
        state, reference, setup.judge.params, evaluated_prompts, evaluation_key
      )
      log.push(step, metrics)
      log.text(step, "held out", samples, functools.partial(_texts, setup))
      log.clock(step, "evaluate", samples)
    if step > first_step and (step % config.checkpoint.every == 0 or stopping):
      log.flush(step)
      score = log.value(step, "eval/win_rate_vs_reference") if evaluating else None
      checkpoints.save(step, state, score)
      log.clock(step, "save", ())
    if stopping:
      return state

    read_rows = functools.partial(setup.train_prompts.batch, step, size)
    prompts = sharding.global_batch(setup.shardings.batch, size, read_rows)
    responses, opponents, num_tokens = programs.sample(state, reference, prompts, key("sample"))
    log.clock(step, "sample", responses.stopped, num_tokens)
    verdict = programs.judge(setup.judge.params, prompts, responses, opponents, key("labels"))
    log.clock(step, "judge", verdict.valid)
    batch = Batch.create(prompts, responses, verdict)
    state, metrics = programs.train_step(state, reference, batch)
    log.clock(step, "update", metrics["gradient_norm"], num_tokens)
    if copies := programs.copies_due(step + 1):
      state = programs.apply_copies(state, copies)
    log.push(step, {**metrics, **verdict.metrics})


def _texts(setup: Setup, samples: dict[str, Any]) -> list[dict[str, Any]]:
  """Returns the rows of samples.jsonl for the samples of an evaluation, which are on the host."""
  decode, count = setup.tokenizer.decode, len(samples["p_win"])
  prompts = setup.held_out.all(range(count)).tokens
  rows = []
  for i, prompt in enumerate(prompts):
    values = {name: x[i].item() for name, x in samples.items() if x.ndim == 1}
    texts = {name: decode(samples[name][i]) for name in ("response", "reference")}
    rows.append({"prompt": decode(prompt), **texts, **values})
  return rows

"""The online loop: prompts, responses, verdict, train step, copies."""

import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import numpy as jnp
from ml_collections import ConfigDict

from nash_jax import exact, judges, keys
from nash_jax.config import resolve
from nash_jax.config.checks import judged_by_reference
from nash_jax.data import corpus
from nash_jax.data.corpus import Examples
from nash_jax.data.preferences import load_pairs, token_pairs
from nash_jax.data.prompts import load_prompts
from nash_jax.data.tokenizer import Tokenizer
from nash_jax.iteration import Programs, Shardings, judge_mesh, make_programs
from nash_jax.models import gemma, sharding
from nash_jax.objectives import algorithms
from nash_jax.policy import forbidden, load_weights, make_policy, read_start, tokenizer_and_model
from nash_jax.run import inputs
from nash_jax.run.loop import run_loop
from nash_jax.types import Mean, Params, TrainState
from nash_jax.update import Batch
from nash_jax.validation import require

PROGRESS_METRICS = (
  "kl_to_reference", "eval/win_rate_vs_reference", "response_length", "flip_rate", "seconds/sample",
)  # fmt: skip


# A step's data, the metrics of its verdict, and how many tokens its responses have.
Drawn = tuple[Batch, dict[str, Any], Any]


@dataclasses.dataclass(frozen=True)
class Setup:
  """Everything that a run needs; made by `set_up`.

  Attributes:
    draw: (setup, state, step, log) -> the step's data; `_sample_and_judge` or `_read_pairs`.
    record: (setup, step, log, prompts, responses, opponents, verdict), of the pairs of a step.
    pairs: of a method that learns from a file: its pairs to train on.
    held_out_pairs: and batches of those that are evaluated alone.
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
  draw: Callable[..., Drawn]
  record: Callable[..., None]
  pairs: Examples | None = None
  held_out_pairs: tuple[Batch, ...] = ()

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
  method = algorithms.get(config.algorithm.name)
  pairs = read_pairs(config, tokenizer, model_config, held_out) if method.offline else None
  mesh, start = sharding.make_mesh(config.mesh), read_start(config.model, model_config)
  # A judge that is the reference shares its weights: here as shapes, until they are loaded.
  is_own = judged_by_reference(config, dict(mesh.shape))
  own = gemma.shapes(model_config) if is_own else None
  judge_devices = judge_mesh(config, mesh)
  rewards = method.needs_rewards(config.algorithm)
  judge = judges.make(config.judge, tokenizer, own, judge_devices, rewards)
  load = functools.partial(load_weights, config.model.weights, model_config, config.seed, mesh=mesh)
  # All computation with the reference is in this dtype, so storing it in this dtype loses nothing.
  reference, exact_metrics = load(dtype=jnp.dtype(config.model.dtype)), None
  judge = dataclasses.replace(judge, params=reference) if is_own else judge
  if config.evaluation.exact:
    policy = make_policy(config.model, config.sampling, tokenizer, model_config)
    exact_metrics = exact.make_metrics(config, policy.logprobs, train_prompts, held_out, reference)
  programs, shardings = make_programs(config, tokenizer, model_config, judge, mesh, exact_metrics)
  state_shapes = jax.eval_shape(programs.init, gemma.shapes(model_config))
  setup = Setup(
    config, tokenizer, train_prompts, held_out, judge, reference,
    sharding.abstract(state_shapes, shardings.state),
    # With adapters the reference is the base; a full policy is read again, in float32.
    initial_state=lambda: programs.init(start(reference) if config.model.lora.rank else load()),
    programs=programs, shardings=shardings, draw=_sample_and_judge,
    record=_record_pairs if config.record_pairs else lambda *_: None,
  )  # fmt: skip
  return _offline(setup, *pairs) if pairs else setup


def read_pairs(config, tokenizer: Tokenizer, model_config, held_out: Examples) -> corpus.Split:
  """Returns the pairs to learn from and those that are evaluated alone; see load_pairs."""
  pairs, held_out_pairs = load_pairs(config, tokenizer, config.sampling.max_tokens, config.seed)
  never = np.asarray(forbidden(config.sampling, tokenizer, model_config))
  expected = "responses that the policy may give: of sampling.tokens, without markers"
  for part in (pairs, held_out_pairs):
    for ids in itertools.chain(part.columns["a"], part.columns["b"]):
      ids = np.asarray(ids, int)
      wrong = ids[never[ids]].tolist()
      require(not wrong, "pairs.path", expected, f"token {wrong[:1]}", "Leave such pairs out.")
  return corpus.without_duplicates(pairs, held_out, config.prompts), held_out_pairs


def _offline(setup: Setup, pairs: Examples, held_out: Examples) -> Setup:
  """Returns the setup of a run that learns from a file: its steps read where others play."""
  size = setup.config.prompts.batch_size
  if setup.config.pairs.cache_reference:
    pairs, held_out = (_with_reference(setup, part) for part in (pairs, held_out))
  batches = tuple(
    _part(setup, held_out, range(first, first + size)) for first in range(0, len(held_out), size)
  )
  return dataclasses.replace(setup, draw=_read_pairs, pairs=pairs, held_out_pairs=batches)


def _with_reference(setup: Setup, pairs: Examples) -> Examples:
  """Returns pairs with the reference's log-probabilities of their responses, made once."""
  size, parts = setup.config.prompts.batch_size, []
  for first in range(0, len(pairs), size):
    batch = _part(setup, pairs, range(first, first + size))
    responses = (batch.responses.tokens, batch.responses.mask)
    parts.append(
      jax.device_get(setup.programs.logprobs(setup.reference, batch.prompts, *responses))
    )
  columns = {**pairs.columns, "reference": [row for part in parts for row in part][: len(pairs)]}
  return dataclasses.replace(pairs, columns=columns)


def _part(setup: Setup, pairs: Examples, places: range) -> Batch:
  """Returns the pairs at these places; those beyond the last do not count."""

  def rows(part: slice) -> Batch:
    chosen = np.array(places)[part]
    return Batch.of_pairs({**pairs.all(chosen % len(pairs)), "counted": chosen < len(pairs)})

  return sharding.global_batch(setup.shardings.batch, len(places), rows)


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
  evaluated = range(config.evaluation.prompts)
  evaluated_prompts = sharding.global_batch(
    setup.shardings.batch, len(evaluated), lambda rows: setup.held_out.all(evaluated[rows])
  )
  # One key for all evaluations: shared noise makes them comparable.
  evaluation_key = keys.key(config.seed, "evaluate")
  for step in itertools.count(first_step):
    final = step >= config.steps
    stopping = stop.before(step) or final
    if evaluating := step % config.evaluation.every == 0 or final:
      metrics, samples = programs.evaluate(
        state, reference, setup.judge.params, evaluated_prompts, evaluation_key
      )
      log.push(step, metrics | _on_pairs(setup, state))
      log.text(step, "held out", samples, functools.partial(_texts, setup))
      log.clock(step, "evaluate", samples)
    if step > first_step and (step % config.checkpoint.every == 0 or stopping):
      log.flush(step)
      score = log.value(step, "eval/win_rate_vs_reference") if evaluating else None
      checkpoints.save(step, state, score)
      log.clock(step, "save", ())
    if stopping:
      return state

    batch, verdict_metrics, num_tokens = setup.draw(setup, state, step, log)
    state, metrics = programs.train_step(state, reference, batch)
    log.clock(step, "update", metrics["gradient_norm"], num_tokens)
    if copies := programs.copies_due(step + 1):
      state = programs.apply_copies(state, copies)
    log.push(step, {**metrics, **verdict_metrics})


def _sample_and_judge(setup: Setup, state: TrainState, step: int, log) -> Drawn:
  """Has the players respond to the step's prompts, and the judge compare what they say."""
  programs, size = setup.programs, setup.config.prompts.batch_size
  key = functools.partial(keys.key, setup.config.seed, step=step)
  read_rows = functools.partial(setup.train_prompts.batch, step, size)
  prompts = sharding.global_batch(setup.shardings.batch, size, read_rows)
  responses, opponents, num_tokens = programs.sample(state, setup.reference, prompts, key("sample"))
  log.clock(step, "sample", responses.stopped, num_tokens)
  verdict = programs.judge(setup.judge.params, prompts, responses, opponents, key("labels"))
  log.clock(step, "judge", verdict.valid)
  setup.record(setup, step, log, prompts, responses, opponents, verdict)
  return Batch.create(prompts, responses, verdict), verdict.metrics, num_tokens


def _read_pairs(setup: Setup, state: TrainState, step: int, log) -> Drawn:
  """Reads the step's pairs, which somebody has compared already."""
  size, pairs = setup.config.prompts.batch_size, setup.pairs
  assert pairs is not None, "set_up has read them"

  def rows(part: slice) -> Batch:
    return Batch.of_pairs(pairs.batch(step, size, part))

  batch = sharding.global_batch(setup.shardings.batch, size, rows)
  return batch, {}, jnp.sum(batch.responses.mask)


def _record_pairs(setup: Setup, step: int, log, prompts, responses, opponents, verdict) -> None:
  """Records the pairs of a step that have a verdict, in order, as the task "tokens" reads them."""
  p_win = jnp.where(verdict.valid, verdict.p_win, jnp.nan)
  arrays = setup.programs.gather((prompts, responses, opponents, p_win))

  def decode(arrays) -> list[dict[str, Any]]:
    return [pair for pair in token_pairs(*arrays) if not math.isnan(pair["p_a"])]

  log.pairs(step, arrays, decode)


def _on_pairs(setup: Setup, state: TrainState) -> dict[str, Mean]:
  """Returns the metrics of the pairs that are held out, where there are such."""
  total: dict[str, Mean] = {}
  for batch in setup.held_out_pairs:
    means = setup.programs.measure(state, setup.reference, batch)
    means = {name: means[name] for name in ("loss", "pair_accuracy", "delta")}
    total = jax.tree.map(jnp.add, total, means) if total else means
  return {f"eval/{name}": mean for name, mean in total.items()}


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

"""The fields of each job's config, with their defaults, ranges and choices.

`train()`, `fit()` and so on return a config of plain values. DECLARED has the declarations of the
same fields: the range of every number and the choices of some names.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

DTYPES = ("float32", "bfloat16", "float16")  # of files
RECORD_ERRORS = ("stop", "continue")
TRACKERS = ("none", "wandb")  # beside TensorBoard, which is always there
COMPUTE_DTYPES = ("bfloat16", "float32")  # whose range Gemma's activations and masks fit
# The fields of a group that only some optimisers, schedules and judges read: {name: fields}.
OPTIMIZERS = {"adamw": ("b1", "b2", "eps", "weight_decay"), "adafactor": (), "sgd": ()}
SCHEDULES = {"constant": (), "linear": ("final_fraction",), "cosine": ("final_fraction",)}
# The losses of the method gpo: IPO, DPO and SLiC are the first three.
GPO = ("squared", "logistic", "hinge", "exponential", "truncated_quadratic", "savage")
STATES = ("preset", "changes", "weights", "tokenizer", "dtype")  # of `model`, of what reads states
_GEMMA = tuple(f"model.{name}" for name in STATES)
_QUESTION = ("template", "answers")
_TABLE = ("table", "first_token", "table_tokens")
JUDGES = {
  "gemma": (*_GEMMA, *_QUESTION, "max_tokens", "micro_batches", "mesh"),
  "gemma_text": (*_GEMMA, "model.template", *_QUESTION, "max_tokens", "micro_batches", "mesh"),
  "bradley_terry": (*_GEMMA, "mesh"), "population": ("mesh",),
  "table": (*_TABLE, "mesh"), "table_reward": (*_TABLE, "mesh"), "http": ("http", *_QUESTION),
  "human": ("votes",), "none": (), "gpm": (*_GEMMA, "gpm", "mesh"),
}  # fmt: skip
DESIGNS = ("uniform", "odpo", "greedy", "active")
FEATURES = ("bradley_terry", "gemma")  # judges whose states are features of pairs


@dataclasses.dataclass(frozen=True)
class Number:
  """Declares a field that holds a number, or a tuple of numbers if `many`.

  Attributes:
    interval: the range, such as "[0, 1)", which excludes 1.
    special: {value allowed besides the range: its meaning}.
    kind: int or float.
  """

  default: Any
  interval: str
  special: Mapping[Any, str]
  kind: type
  many: bool = False

  def holds(self, value: float) -> bool:
    """Returns whether the interval contains a number; False for NaN."""
    low, high = map(float, self.interval[1:-1].split(","))
    above = value > low if self.interval[0] == "(" else value >= low
    return above and (value < high if self.interval[-1] == ")" else value <= high)

  def describe(self) -> str:
    """Returns what the field may hold, in words."""
    kind = "whole number" if self.kind is int else "number"
    one = f"{kind}s in {self.interval}" if self.many else f"a {kind} in {self.interval}"
    return ", ".join([one, *(f"or {value} ({means})" for value, means in self.special.items())])


@dataclasses.dataclass(frozen=True)
class Choice:
  """Declares a field that holds one of a few names; `why` says why no other is allowed."""

  default: str
  choices: tuple[str, ...]
  why: str = ""

  def describe(self) -> str:
    """Returns what the field may hold, in words."""
    return " or ".join(self.choices)


def number(
  default: float | None, interval: str, special: Mapping[Any, str] = {}, kind: type | None = None
) -> Number:
  """Declares a number; give `kind` if the default is None."""
  return Number(default, interval, special, kind or type(default))


def _numbers(kind: type, interval: str) -> Number:
  return Number((), interval, {}, kind, many=True)


def _choice(default: str, choices: Iterable[str], why: str = "") -> Choice:
  return Choice(default, tuple(choices), why)


def _group(**fields) -> ConfigDict:
  return ConfigDict(fields)


def _set(group: ConfigDict, **defaults: Any) -> ConfigDict:
  """Changes defaults of declared fields in place."""
  for name, default in defaults.items():
    declared = isinstance(group[name], Number | Choice)
    group[name] = dataclasses.replace(group[name], default=default) if declared else default
  return group


def default(declared: Any) -> Any:
  """Returns a config with the defaults of declared fields; a default of None is a placeholder."""
  if isinstance(declared, ConfigDict):
    return ConfigDict({name: default(declared[name]) for name in declared})
  if isinstance(declared, Number) and declared.default is None:
    return placeholder(declared.kind)
  return declared.default if isinstance(declared, Number | Choice) else declared


# Single fields of an architecture that `model.changes` may replace; see models.gemma.GemmaConfig.
_SIZE, _CAP, _FREQUENCY = "[1, 1e6]", "[1e-3, 1e6]", "[1, 1e9]"
CHANGES = {
  **{name: number(1, _SIZE) for name in (
    "num_layers", "num_embed", "embed_dim", "hidden_dim", "num_heads", "num_kv_heads", "head_dim")},
  "sliding_window_size": number(1, "[1, 1e9]"),
  **{name: number(1.0, _CAP, {None: "no cap"})
     for name in ("final_logit_softcap", "attn_logits_soft_cap")},
  **{name: number(1, _FREQUENCY) for name in ("local_base_frequency", "global_base_frequency")},
  **{name: number(1.0, "[1, 1e6]") for name in ("local_scale_factor", "global_scale_factor")},
  "query_pre_attn_scalar": number(1, _SIZE, {None: "head_dim"}),
  "use_qk_norm": False, "transpose_gating_einsum": False, "value_norm": False,
  # Fields of blocks with value_norm.
  "global_key_size": number(2, _SIZE, {None: "head_dim"}),
  "num_global_kv_heads": number(1, _SIZE, {None: "num_kv_heads"}),
  "k_eq_v_global": False, "global_rope_proportion": number(1.0, "[0, 1]"),
  "per_layer_input_dim": number(1, _SIZE, {0: "none"}),
  "num_kv_shared_layers": number(1, _SIZE, {0: "none"}),
  "override_kv_shared_ffw_hidden": number(1, _SIZE, {None: "hidden_dim"}),
}  # fmt: skip


def _model(weights: str = "") -> ConfigDict:
  """A policy, judge or reward model: architecture, weights, tokenizer."""
  return _group(
    preset="stories",
    changes=ConfigDict(),
    weights=weights,
    tokenizer="assets:stories/tokenizer.model",
    template="plain",
    dtype=_choice("float32", COMPUTE_DTYPES, "float16 is only for files: Gemma overflows it."),
    remat=False,
    lora={
      "rank": number(0, "[1, 4096]", {0: "all parameters are trained"}),
      "alpha": number(32.0, "[1e-6, 1e6]"),
      "init": "",
    },
    logit_chunk=number(32, "[1, 1e6]"),
  )


def _optimizer(**defaults) -> ConfigDict:
  """An optax optimiser with schedule and clipping."""
  fields = _group(
    name=_choice("adamw", OPTIMIZERS),
    learning_rate=number(1e-4, "[1e-12, 1e6]"),
    schedule=_choice("constant", SCHEDULES),
    warmup_steps=number(0, "[0, 1e9]"),
    final_fraction=number(0.1, "[0, 1]"),
    b1=number(0.9, "[0, 0.999999]"),
    b2=number(0.99, "[0, 0.999999]"),
    eps=number(1e-8, "[1e-20, 1e6]"),
    weight_decay=number(0.0, "[0, 1000]"),
    clip_norm=number(1.0, "[1e-9, 1e12]", {0: "off"}),
    micro_batches=number(1, "[1, 1e6]"),
  )
  return _set(fields, **defaults)


def _run(job: str, **fields) -> ConfigDict:
  left = {-1: "all remaining devices"}
  return _group(
    job=job,
    seed=number(0, "[0, 2147483647]"),
    steps=number(100, "[1, 1e9]"),
    mesh={
      "data": number(-1, "[1, 1e6]", left),
      "fsdp": number(1, "[1, 1e6]", left),
      "tensor": number(1, "[1, 1e6]", left),
    },
    checkpoint={"every": number(50, "[1, 1e9]"), "keep": number(2, "[1, 1e6]"), "allow": ()},
    profile=False,
    on_record_error=_choice("stop", RECORD_ERRORS),
    tracker=_choice("none", TRACKERS),
    **fields,
  )


def _algorithm() -> ConfigDict:
  """A method and its numbers; for those that are None each method has a default."""
  method = "the method's own"
  return _group(
    name="nash_mp",
    f=_choice("squared", GPO),  # the loss of gpo
    # Of grpo.
    advantage=_choice("wins", ("wins", "scores")),
    normalise=_choice("none", ("none", "group", "batch")),
    kl=_choice("score", ("score", "k3")),
    updates=number(1, "[1, 1000]"),
    clip_low=number(0.2, "(0, 1]"),
    clip_high=number(0.2, "(0, 1e6]"),
    history=number(0.5, "[0, 1]"),  # of mnpo
    beta=number(0.1, "[1e-9, 1e6]"),
    eta=number(1.0, "[1e-6, 1e12]", {float("inf"): "no KL to the target"}),
    kappa=number(0.1, "[0, 1]"),
    kappa_schedule=_choice("constant", ("constant", "harmonic")),
    kappa_offset=number(10.0, "[1e-6, 1e9]"),
    target_update=_choice("ema", ("ema", "periodic")),
    target_period=number(10, "[1, 1e9]"),
    step=number(None, "[1e-9, 1e9]", {None: method}, float),
    mixture=number(0.25, "[0, 1]"),
    reference_period=number(None, "[1, 1e9]", {0: "never", None: method}, int),
    samples=number(None, "[1, 4096]", {None: method}, int),
    behaviour_temperature=number(1.0, "[0.01, 100]"),
    labels=_choice("soft", ("soft", "sampled")),
    centre_log_ratios=False,
    reward_to_go=False,
  )


def _judge(**defaults) -> ConfigDict:
  """A judge: the bundled one, or any other of judges.JUDGES."""
  sizes = {0: "as in `mesh`", -1: "all remaining devices"}
  fields = _group(
    name="gemma",
    model=_model("assets:stories/judge.safetensors"),
    template="stories",
    answers=("A", "B"),
    max_tokens=number(0, "[1, 1e6]", {0: "wide enough for the longest"}),
    micro_batches=number(1, "[1, 1e6]"),
    mesh={name: number(0, "[1, 1e6]", sizes) for name in ("data", "fsdp", "tensor")},
    # Of the judge "http", in the arena: an OpenAI-compatible server's chat completions.
    http={
      "url": "http://127.0.0.1:8000/v1/chat/completions",
      "model": "",
      "timeout": number(60.0, "[0.001, 86400]"),
      "retries": number(4, "[0, 20]"),
      "backoff": number(1.0, "[0, 60]"),
      "workers": number(8, "[1, 1024]"),
    },
    gpm=_gpm(),
    votes="",
    table="",
    first_token=number(6, "[0, 1e6]"),
    table_tokens=number(0, "[1, 1e6]", {0: "one token an action"}),
  )
  return _set(fields, **defaults)


def _gpm() -> ConfigDict:
  """The head of a general preference model."""
  return _group(blocks=number(4, "[1, 4096]"), prompt_scale=False)


def _train() -> ConfigDict:
  """The fields of an online run with their defaults: NashMP on the bundled storyteller."""
  return _run(
    "train",
    model=_model("assets:stories/policy.safetensors"),
    prompts={
      "task": "stories",
      "path": "assets:stories/prompts.jsonl",
      "held_out": number(96, "[0, 1e9]"),
      "held_out_path": "",
      "overflow": _choice("drop", ("drop", "cut")),
      "duplicates": _choice("keep", ("keep", "drop")),
      "bad": _choice("stop", ("stop", "skip")),
      "max_tokens": number(32, "[1, 1e6]"),
      "batch_size": number(32, "[1, 1e6]"),
    },
    # Of a method that learns from a file: two responses a prompt, and who won.
    pairs={
      "task": _choice("preferences", ("preferences", "tokens")),
      "path": "",
      "held_out": number(0, "[0, 1e9]"),  # so many pairs from the end are evaluated alone
      # So many consecutive pairs are shuffled among themselves; 1 keeps the order of the file.
      "window": number(0, "[1, 1e9]", {0: "all of them"}),
      # Compute the reference's log-probabilities once, before the first step.
      "cache_reference": False,
    },
    record_pairs=False,  # write the pairs that are trained on, in order, to WORKDIR/pairs.jsonl
    sampling={
      "max_tokens": number(64, "[1, 1e6]"),
      "temperature": number(1.0, "[0.01, 100]"),
      "top_k": number(0, "[1, 1e6]", {0: "off"}),
      "top_p": number(1.0, "[1e-6, 1]"),
      "tokens": _numbers(int, "[0, 1e6]"),
      "markers": (),
    },
    algorithm=_algorithm(),
    optimizer=_optimizer(),
    judge=_judge(),
    evaluation={
      "every": number(25, "[1, 1e9]"),
      "prompts": number(64, "[1, 1e6]"),
      "texts": number(4, "[0, 1e6]"),
      "exact": False,
    },
  )


def _fit() -> ConfigDict:
  """The fields of a supervised run with their defaults."""
  return _run(
    "fit",
    model=_model(),
    loss=_choice("sft", ("sft", "judge", "reward", "gpm")),
    data={
      "task": "text",
      "path": "",
      "held_out": number(600, "[0, 1e9]"),
      "held_out_path": "",
      "overflow": _choice("cut", ("drop", "cut")),
      "max_tokens": number(129, "[1, 1e6]"),
      "max_response_tokens": number(64, "[1, 1e6]"),
      "batch_size": number(32, "[1, 1e6]"),
      "duplicates": _choice("keep", ("keep", "drop")),
      "bad": _choice("stop", ("stop", "skip")),
    },
    template="stories",
    gpm=_gpm(),
    export="",
    export_dtype=_choice("float16", DTYPES),
    optimizer=_optimizer(learning_rate=3e-3, schedule="cosine", warmup_steps=100),
    evaluation={"every": number(500, "[1, 1e9]"), "batches": number(1000, "[1, 1e9]")},
  )


def _arena() -> ConfigDict:
  """The fields of an arena with their defaults: the bundled storyteller and its best of 4."""
  online = _train()
  return _group(
    job="arena",
    seed=online.seed,
    model=_model(),
    prompts=_set(online.prompts, batch_size=16),
    sampling=online.sampling,
    policies={"base": _policy(), "best_of_4": _policy(4)},
    base="base",
    judges={"judge": _judge(), "population": _judge(name="population")},
    select_judge="judge",
    samples=number(2, "[1, 1024]"),
    max_prompts=number(0, "[2, 1e9]", {0: "every held-out prompt"}),
    resamples=number(2000, "[1, 1e6]"),
    texts=number(3, "[0, 1e6]"),
  )


STRENGTH = number(1.0, "[0, 1000]")  # λ of decoding-time realignment


def _policy(best_of: int = 1) -> ConfigDict:
  """An arena's policy: weights are a file, or a run's "runs/x", "runs/x@params:50", "…:best"."""
  weights = "assets:stories/policy.safetensors"
  # outputs, in place of weights: any model's answers, in a file of AlpacaEval's or Arena-Hard's.
  # realign: λ by the name of another policy, towards which these weights are realigned.
  return _group(weights=weights, best_of=number(best_of, "[1, 1024]"), outputs="", realign={})


def complete_policy(policy: ConfigDict) -> None:
  """Fills in what an arena's policy may leave out: outputs and realign, or all but outputs."""
  for name, value in default(_policy()).items():
    if name not in policy and (name in ("outputs", "realign") or policy.get("outputs")):
      policy[name] = value


def _collect() -> ConfigDict:
  """The fields of a collection of votes, with their defaults."""
  online = _train()
  return _group(
    job="collect",
    seed=online.seed,
    steps=online.steps,
    model=online.model,
    prompts=online.prompts,
    sampling={
      **{
        name: online.sampling[name]
        for name in ("max_tokens", "top_k", "top_p", "tokens", "markers")
      },
      "samples": number(4, "[2, 1024]"),
    },
    sources={"base": _source()},
    judge=_judge(name="population"),
    # Which pairs to have judged, of all that are drawn.
    design=_choice("uniform", DESIGNS),
    budget=number(0, "[1, 1e9]", {0: "every pair"}),
    labels=_choice("soft", ("soft", "sampled")),
    features=_features(),
  )


def _features() -> ConfigDict:
  """Features of pairs that a design reads: a model's states; see judges.features."""
  return _group(
    name=_choice("bradley_terry", FEATURES),
    model=_model("assets:stories/policy.safetensors"),
    template="stories",
    max_tokens=number(0, "[1, 1e6]", {0: "wide enough for the longest"}),
    dimension=number(256, "[1, 256]"),
  )


def _source() -> ConfigDict:
  """A policy that responds: weights as in an arena, temperature of the samples."""
  weights = "assets:stories/policy.safetensors"
  return _group(weights=weights, temperature=number(1.0, "[0.01, 100]"))


def _compare() -> ConfigDict:
  contest = _arena()
  contest.judges, contest.policies = {}, {}
  return _group(
    job="compare",
    base=_train(),
    runs=(),
    learning_rates=_numbers(float, _optimizer().learning_rate.interval),
    tuning_metric=_choice("regularised", ("regularised", "gap")),
    tuning_seed=number(100, "[0, 2147483647]"),
    tuning_steps=number(0, "[1, 1e9]", {0: "as many as the run's"}),
    seeds=number(3, "[1, 10000]"),
    kinds=("network",),
    arena=contest,
  )


def _agreement() -> ConfigDict:
  """The fields of judges beside people's comparisons, with their defaults: the bundled judge."""
  data = _set(_fit().data, task="preferences", held_out=0, max_tokens=512)
  return _group(
    job="agreement",
    seed=_train().seed,
    model=_model(),
    data=_set(data, max_response_tokens=256),
    judges={"judge": _judge()},
    responses=number(8, "[2, 1000]"),
  )


def _sample() -> ConfigDict:
  """The fields of sampling from a policy at a prompt, with their defaults."""
  online = _train()
  return _group(
    job="sample",
    seed=online.seed,
    model=online.model,
    sampling={**_set(online.sampling, max_tokens=128), "samples": number(1, "[1, 1024]")},
    prompt="",
    file="",
    output="",
    realign=STRENGTH,
    reference=online.model.weights,
  )


def _vote() -> ConfigDict:
  """The fields of a page on which people judge, with their defaults."""
  return _group(
    job="vote",
    seed=_train().seed,
    source="",
    model=_model(),
    votes=number(1, "[1, 1000]"),
    shared=number(0.1, "[0, 1]"),
    host="127.0.0.1",
    port=number(8080, "[1, 65535]", {0: "a free one"}),
    export="",
    by=_choice("all", ("all", "annotator", "group")),
  )


# Groups whose entries the user names: how an entry is declared.
ENTRIES: dict[str, Callable[[], ConfigDict]] = {
  "policies": functools.cache(_policy), "judges": functools.cache(_judge),
  "sources": functools.cache(_source),
}  # fmt: skip
# By job: its fields as they are declared.
DECLARED: dict[str, Callable[[], ConfigDict]] = {
  "train": functools.cache(_train), "fit": functools.cache(_fit),
  "arena": functools.cache(_arena), "collect": functools.cache(_collect),
  "compare": functools.cache(_compare), "sample": functools.cache(_sample),
  "agreement": functools.cache(_agreement), "vote": functools.cache(_vote),
}  # fmt: skip


def _config[**P](declare: Callable[P, ConfigDict]) -> Callable[P, ConfigDict]:
  """Returns a function that makes a config with the defaults of what `declare` declares."""

  @functools.wraps(declare)
  def make(*args: P.args, **kwargs: P.kwargs) -> ConfigDict:
    return default(declare(*args, **kwargs))

  return make


model, optimizer, algorithm, judge = map(_config, (_model, _optimizer, _algorithm, _judge))
train, fit, arena = map(_config, (_train, _fit, _arena))
collect, sample, agreement, vote = map(_config, (_collect, _sample, _agreement, _vote))


def compare(base: ConfigDict | None = None, runs: Iterable[dict] = (), **fields) -> ConfigDict:
  """The fields of a comparison or an ablation, with their defaults.

  Args:
    base: the config that all runs share, such as train().
    runs: the changes of each run, such as {"algorithm.name": "egpo", "algorithm.samples": 3}; its
      "label" is the run's name.
  """
  config = default(_compare())
  return ConfigDict({**config, "base": base or config.base, "runs": tuple(runs), **fields})

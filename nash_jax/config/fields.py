"""The fields that the config of each job holds, with their defaults and what else they may be.

`train()` and its like make a config of plain values; DECLARED has the same fields as they are
declared here: the range of every number, the choices of some names.
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
# What only some optimisers, schedules and judges read of their group: the first dots of its fields.
OPTIMIZERS = {"adamw": ("b1", "b2", "eps", "weight_decay"), "adafactor": (), "sgd": ()}
SCHEDULES = {"constant": (), "linear": ("final_fraction",), "cosine": ("final_fraction",)}
_GEMMA = tuple(f"model.{name}" for name in ("preset", "changes", "weights", "tokenizer", "dtype"))
_QUESTION = ("template", "answers")
_TABLE = ("table", "first_token", "table_tokens")
JUDGES = {
  "gemma": (*_GEMMA, *_QUESTION, "max_tokens", "micro_batches", "mesh"),
  "gemma_text": (*_GEMMA, "model.template", *_QUESTION, "max_tokens", "micro_batches", "mesh"),
  "bradley_terry": (*_GEMMA, "mesh"), "population": ("mesh",),
  "table": (*_TABLE, "mesh"), "table_reward": (*_TABLE, "mesh"), "http": ("http", *_QUESTION),
  "human": ("votes",), "gpm": (*_GEMMA, "gpm", "mesh"),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Number:
  """A declared field that holds a number, or with `many` a tuple of them.

  Attributes:
    interval: its range, such as "[0, 1)", which is without its upper end.
    special: further values, with what they mean.
    kind: int or float.
  """

  default: Any
  interval: str
  special: Mapping[Any, str]
  kind: type
  many: bool = False

  def holds(self, value: float) -> bool:
    """Returns whether a number is in the interval; NaN is in none."""
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
  """A declared field that holds one of a few names; `why` says why no others."""

  default: str
  choices: tuple[str, ...]
  why: str = ""

  def describe(self) -> str:
    """Returns what the field may hold, in words."""
    return " or ".join(self.choices)


def number(
  default: float | None, interval: str, special: Mapping[Any, str] = {}, kind: type | None = None
) -> Number:
  """Declares a number; where the default is None, `kind` says which."""
  return Number(default, interval, special, kind or type(default))


def _numbers(kind: type, interval: str) -> Number:
  return Number((), interval, {}, kind, many=True)


def _choice(default: str, choices: Iterable[str], why: str = "") -> Choice:
  return Choice(default, tuple(choices), why)


def _group(**fields) -> ConfigDict:
  return ConfigDict(fields)


def _set(group: ConfigDict, **defaults: Any) -> ConfigDict:
  """Changes the defaults of declared fields, in place."""
  for name, default in defaults.items():
    declared = isinstance(group[name], Number | Choice)
    group[name] = dataclasses.replace(group[name], default=default) if declared else default
  return group


def default(declared: Any) -> Any:
  """Returns a config of the defaults of declared fields; one that is None is a placeholder."""
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
  "use_qk_norm": False, "transpose_gating_einsum": False,
}  # fmt: skip


def _model(weights: str = "") -> ConfigDict:
  """A policy, judge or reward model: architecture, weights, tokenizer."""
  return _group(
    preset="stories",
    # Single fields of the architecture to replace, such as {"num_embed": 256}.
    changes=ConfigDict(),
    # A weights file, a run's workdir ("runs/x", "runs/x@target"), or "" for random weights.
    weights=weights,
    tokenizer="assets:stories/tokenizer.model",
    template="plain",
    # Of compute; the master parameters are float32.
    dtype=_choice("float32", COMPUTE_DTYPES, "float16 is for files: Gemma leaves its range."),
    remat=False,
    # Rank of the adapters, times alpha / rank, that train and fit train instead of the parameters.
    lora={
      "rank": number(0, "[1, 4096]", {0: "all parameters are trained"}),
      "alpha": number(32.0, "[1e-6, 1e6]"),
      "init": "",  # a folder of PEFT's whose adapters a run starts from
    },
    logit_chunk=number(32, "[1, 1e6]"),  # response columns whose logits exist at one time
  )


def _optimizer(**defaults) -> ConfigDict:
  """An optax optimiser with schedule and clipping."""
  fields = _group(
    name=_choice("adamw", OPTIMIZERS),
    learning_rate=number(1e-4, "[1e-12, 1e6]"),
    schedule=_choice("constant", SCHEDULES),
    warmup_steps=number(0, "[0, 1e9]"),
    final_fraction=number(0.1, "[0, 1]"),  # of the learning rate, where linear and cosine end
    b1=number(0.9, "[0, 0.999999]"),
    b2=number(0.99, "[0, 0.999999]"),
    eps=number(1e-8, "[1e-20, 1e6]"),
    weight_decay=number(0.0, "[0, 1000]"),  # towards zero, not towards the reference
    clip_norm=number(1.0, "[1e-9, 1e12]", {0: "off"}),  # of the gradient, over all parameters
    micro_batches=number(1, "[1, 1e6]"),
  )
  return _set(fields, **defaults)


def _run(job: str, **fields) -> ConfigDict:
  left = {-1: "all devices that are left"}
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
    # Continue: go on without a part of the record (metrics, samples, TensorBoard) that cannot be
    # written, such as on a full disk.
    on_record_error=_choice("stop", RECORD_ERRORS),
    tracker=_choice("none", TRACKERS),  # wandb: Weights & Biases
    **fields,
  )


def _algorithm() -> ConfigDict:
  """A method and its numbers; for those that are None each method has a default."""
  method = "as the method has it"
  return _group(
    name="nash_mp",
    beta=number(0.1, "[1e-9, 1e6]"),
    # beta / eta is the weight of KL to the target.
    eta=number(1.0, "[1e-6, 1e12]", {float("inf"): "no KL to the target"}),
    kappa=number(0.1, "[0, 1]"),
    # Harmonic: kappa_offset / (k + kappa_offset).
    kappa_schedule=_choice("constant", ("constant", "harmonic")),
    kappa_offset=number(10.0, "[1e-6, 1e9]"),
    target_update=_choice("ema", ("ema", "periodic")),  # periodic: a copy every target_period steps
    target_period=number(10, "[1, 1e9]"),
    # s of sppo, mpo and inpo, of the last two at most 1 / beta. None: 5, or half of that if less.
    step=number(None, "[1e-9, 1e9]", {None: method}, float),
    mixture=number(0.25, "[0, 1]"),  # weight of the reference in nash_md and ipo_md
    # The reference becomes the policy every so many steps. None: 50 for mpo, else 0.
    reference_period=number(None, "[1, 1e9]", {0: "never", None: method}, int),
    # Responses to a prompt in all; half are the opponent's, if there is one. None: as few as the
    # method can use, 3 for egpo, else 2.
    samples=number(None, "[1, 4096]", {None: method}, int),
    # Times sampling.temperature, for y, where a loss allows it.
    behaviour_temperature=number(1.0, "[0.01, 100]"),
    # P(y beats y'), or "sampled": 1 with that probability, else 0.
    labels=_choice("soft", ("soft", "sampled")),
    centre_log_ratios=False,
    reward_to_go=False,  # a token's KL coefficient counts only this and later tokens
  )


def _judge(**defaults) -> ConfigDict:
  """A judge: the bundled one, or any other of judges.JUDGES."""
  sizes = {0: "as in `mesh`", -1: "all devices that are left"}
  fields = _group(
    name="gemma",
    model=_model("assets:stories/judge.safetensors"),
    template="stories",  # a name, or a text file with {prompt}, {a} and {b}
    answers=("A", "B"),  # the pieces that say "the first" and "the second"
    # Of the judge's whole prompt.
    max_tokens=number(0, "[1, 1e6]", {0: "as wide as the longest could be"}),
    # Parts of a batch that a Gemma judge evaluates one after another.
    micro_batches=number(1, "[1, 1e6]"),
    mesh={name: number(0, "[1, 1e6]", sizes) for name in ("data", "fsdp", "tensor")},
    # Of the judge "http", in the arena: an OpenAI-compatible server's chat completions.
    http={
      "url": "http://127.0.0.1:8000/v1/chat/completions",
      "model": "",
      # Seconds a request, to its reply's last byte; also the longest wait.
      "timeout": number(60.0, "[0.001, 86400]"),
      "retries": number(4, "[0, 20]"),
      # Seconds before the first retry, doubled each time; or Retry-After.
      "backoff": number(1.0, "[0, 60]"),
      "workers": number(8, "[1, 1024]"),  # requests at a time
    },
    gpm=_gpm(),  # of the judge "gpm", as it was fitted
    votes="",  # of the judge "human", in the arena: a workdir of `nash-jax vote`
    table="",  # of the table judge: .npy [X A A], contexts by prompt index
    # A response's first tokens are its action: digits, token - first_token, in base table_tokens.
    first_token=number(6, "[0, 1e6]"),
    table_tokens=number(0, "[1, 1e6]", {0: "one token an action"}),
  )
  return _set(fields, **defaults)


def _gpm() -> ConfigDict:
  """The head of a general preference model."""
  return _group(
    # A response's vector has two numbers a block: so many cycles are learned independently.
    blocks=number(4, "[1, 4096]"),
    prompt_scale=False,  # blocks are weighted by the prompt
  )


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
      # Drop: no training on a prompt that is held out.
      "duplicates": _choice("keep", ("keep", "drop")),
      "bad": _choice("stop", ("stop", "skip")),  # a record that cannot be read
      "max_tokens": number(32, "[1, 1e6]"),
      "batch_size": number(32, "[1, 1e6]"),
    },
    sampling={
      "max_tokens": number(64, "[1, 1e6]"),
      "temperature": number(1.0, "[0.01, 100]"),
      "top_k": number(0, "[1, 1e6]", {0: "off"}),
      "top_p": number(1.0, "[1e-6, 1]"),
      "tokens": _numbers(int, "[0, 1e6]"),  # the only ids that may be sampled; () for every piece
    },
    algorithm=_algorithm(),
    optimizer=_optimizer(),
    judge=_judge(),
    # exact: evaluate over every response, where a game of the table judge allows it.
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
    # Next token, pairwise cross-entropy, Bradley-Terry, general preference model.
    loss=_choice("sft", ("sft", "judge", "reward", "gpm")),
    data={
      "task": "text",
      "path": "",
      "held_out": number(600, "[0, 1e9]"),
      "held_out_path": "",
      "overflow": _choice("cut", ("drop", "cut")),
      # Of a text's windows, of prompt + response, of a preference's prompt.
      "max_tokens": number(129, "[1, 1e6]"),
      "max_response_tokens": number(64, "[1, 1e6]"),  # of preferences
      "batch_size": number(32, "[1, 1e6]"),
      # Drop: no training on a prompt or text that is held out.
      "duplicates": _choice("keep", ("keep", "drop")),
      "bad": _choice("stop", ("stop", "skip")),  # a record that cannot be read
    },
    template="stories",  # of the pairwise judge
    gpm=_gpm(),  # of the loss gpm
    export="",  # where the best weights go, as .safetensors in export_dtype
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
    # The architecture and tokenizer of every policy, each of which names its own weights.
    model=_model(),
    prompts=_set(online.prompts, batch_size=16),  # of which the held-out part is used
    sampling=online.sampling,
    policies={"base": _policy(), "best_of_4": _policy(4)},
    base="base",  # the policy that KL, length and distinct bigrams are compared with
    judges={"judge": _judge(), "population": _judge(name="population")},
    select_judge="judge",  # picks the best of n
    samples=number(2, "[1, 1024]"),  # of each policy to a prompt; of a single policy at least 2
    max_prompts=number(0, "[2, 1e9]", {0: "every held-out prompt"}),
    resamples=number(2000, "[1, 1e6]"),  # of the bootstrap
    texts=number(3, "[0, 1e6]"),  # prompts shown with every policy's continuation
  )


def _policy(best_of: int = 1) -> ConfigDict:
  """An arena's policy: weights are a file, or a run's "runs/x", "runs/x@params:50", "…:best"."""
  weights = "assets:stories/policy.safetensors"
  # In place of weights: any model's answers, in a file of AlpacaEval's or Arena-Hard's.
  return _group(weights=weights, best_of=number(best_of, "[1, 1024]"), outputs="")


def complete_policy(policy: ConfigDict) -> None:
  """Fills in what an arena's policy may leave out: outputs, or all but outputs."""
  for name, value in default(_policy()).items():
    if name not in policy and (name == "outputs" or policy.get("outputs")):
      policy[name] = value


def _collect() -> ConfigDict:
  """The fields of a collection of votes, with their defaults."""
  online = _train()
  return _group(
    job="collect",
    seed=online.seed,
    steps=online.steps,  # batches of prompts
    model=online.model,
    prompts=online.prompts,
    # All pairs of the samples of a prompt are judged; each source has its own temperature.
    sampling={
      **{name: online.sampling[name] for name in ("max_tokens", "top_k", "top_p", "tokens")},
      "samples": number(4, "[2, 1024]"),
    },
    sources={"base": _source()},  # policies that respond in turn
    judge=_judge(name="population"),
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
    # Tried with tuning_seed, the best is taken; () for the base's.
    learning_rates=_numbers(float, _optimizer().learning_rate.interval),
    tuning_seed=number(100, "[0, 2147483647]"),
    tuning_steps=number(0, "[1, 1e9]", {0: "as many as the run's"}),
    seeds=number(3, "[1, 10000]"),
    kinds=("network",),  # of policy; and "tabular", where evaluation.exact
    arena=contest,  # of all runs and the reference; none without judges
  )


def _agreement() -> ConfigDict:
  """The fields of judges beside people's comparisons, with their defaults: the bundled judge."""
  data = _set(_fit().data, task="preferences", held_out=0, max_tokens=512)
  return _group(
    job="agreement",
    seed=_train().seed,
    model=_model(),  # whose tokenizer and template the judges read
    # The held-out part is compared; where none is held out, all.
    data=_set(data, max_response_tokens=256),
    judges={"judge": _judge()},
    # Of a prompt, that meet in pairs which nobody compared, to look for cycles.
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
    prompt="",  # "": ask for prompts until an empty line
    file="",  # prompts of a file, one a line, instead; of .jsonl and its like, records
    output="",  # a file for the continuations, as JSON lines; "": they are printed
    # λ: logits are (1 - λ)·reference + λ·policy, so 1 is the policy and 0 the reference.
    realign=number(1.0, "[0, 1000]"),
    reference=online.model.weights,  # as model.weights; read where λ is not 1
  )


def _vote() -> ConfigDict:
  """The fields of a page on which people judge, with their defaults."""
  return _group(
    job="vote",
    seed=_train().seed,  # of the sides and the order in which responses are shown
    source="",  # files or folders to take pairs from, separated by commas; "": those there are
    model=_model(),  # whose tokenizer the token ids of a source are of
    votes=number(1, "[1, 1000]"),  # that each pair is to have, of as many annotators
    shared=number(0.1, "[0, 1]"),  # of the pairs, which all annotators judge
    host="127.0.0.1",  # another than this machine's own: with a token
    port=number(8080, "[1, 65535]", {0: "a free one"}),
    export="",  # a file for the votes, .jsonl, as preferences for fit; no page is served then
    by=_choice("all", ("all", "annotator", "group")),  # a file of votes for each
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
  """Returns the function that makes a config of the defaults of what `declare` declares."""

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
    base: the config that all runs share, of train().
    runs: what each changes, {"algorithm.name": "egpo", "algorithm.samples": 3}; "label" names it.
  """
  config = default(_compare())
  return ConfigDict({**config, "base": base or config.base, "runs": tuple(runs), **fields})

"""The fields that the config of each job holds, with their defaults."""

from collections.abc import Iterable

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

DTYPES = ("float32", "bfloat16", "float16")
OPTIMIZERS = ("adamw", "adafactor", "sgd")
SCHEDULES = ("constant", "linear", "cosine")
RECORD_ERRORS = ("stop", "continue")
# Groups whose entries the user names.
OPEN_GROUPS = ("changes", "policies", "judges", "sources")


def _group(**fields) -> ConfigDict:
  return ConfigDict(fields)


def model(weights: str = "") -> ConfigDict:
  """A policy, judge or reward model: architecture, weights, tokenizer."""
  return _group(
    preset="stories",
    # Single fields of the architecture to replace, such as {"num_embed": 256}.
    changes=ConfigDict(),
    # A weights file, a run's workdir ("runs/x", "runs/x@target"), or "" for random weights.
    weights=weights,
    tokenizer="assets:stories/tokenizer.model",
    template="plain",
    dtype="float32",  # of compute; the master parameters are float32
    remat=False,
    # Rank of the adapters, times alpha / rank, that train and fit train instead of the parameters;
    # 0 for none.
    lora={"rank": 0, "alpha": 32.0},
    logit_chunk=32,  # response columns whose logits exist at one time
  )


def optimizer(**changes) -> ConfigDict:
  """An optax optimiser with schedule and clipping."""
  defaults = {
    "name": "adamw", "learning_rate": 1e-4, "schedule": "constant", "warmup_steps": 0,
    "final_fraction": 0.1,  # of the learning rate, where linear and cosine end
    "b1": 0.9, "b2": 0.99, "eps": 1e-8,
    "weight_decay": 0.0,  # towards zero, not towards the reference
    "clip_norm": 1.0, "micro_batches": 1,
  }  # fmt: skip
  return ConfigDict({**defaults, **changes})


def _run(job: str, **fields) -> ConfigDict:
  return _group(
    job=job, seed=0, steps=100,
    mesh={"data": -1, "fsdp": 1, "tensor": 1},  # -1: all devices that are left
    checkpoint={"every": 50, "keep": 2, "allow": ()}, profile=False,
    # "continue": go on without a part of the record (metrics, samples, TensorBoard) that cannot be
    # written, such as on a full disk.
    on_record_error="stop", **fields,
  )  # fmt: skip


def algorithm() -> ConfigDict:
  """A method and its numbers; for those that are None each method has a default."""
  return _group(
    name="nash_mp",
    beta=0.1,
    eta=1.0,  # beta / eta is the weight of KL to the target
    kappa=0.1,
    kappa_schedule="constant",  # or "harmonic": kappa_offset / (k + kappa_offset)
    kappa_offset=10.0,
    target_update="ema",  # or "periodic": a copy every target_period steps
    target_period=10,
    # s of sppo, mpo and inpo, of the last two at most 1 / beta. None: 5, or half of that if less.
    step=placeholder(float),
    mixture=0.25,  # weight of the reference in nash_md and ipo_md
    # The reference becomes the policy every so many steps, 0: never. None: 50 for mpo, else 0.
    reference_period=placeholder(int),
    # Responses to a prompt in all; half are the opponent's, if there is one. None: as few as the
    # method can use, 3 for egpo, else 2.
    samples=placeholder(int),
    behaviour_temperature=1.0,  # times sampling.temperature, for y, where a loss allows it
    labels="soft",  # P(y beats y'), or "sampled": 1 with that probability, else 0
    centre_log_ratios=False,
    reward_to_go=False,  # a token's KL coefficient counts only this and later tokens
  )


def judge() -> ConfigDict:
  """A judge: the bundled one, or any other of judges.JUDGES."""
  return _group(
    name="gemma",
    model=model("assets:stories/judge.safetensors"),
    template="stories",  # a name, or a text file with {prompt}, {a} and {b}
    answers=("A", "B"),  # the pieces that say "the first" and "the second"
    max_tokens=0,  # of the judge's whole prompt; 0: as wide as the longest could be
    micro_batches=1,  # parts of a batch that a Gemma judge evaluates one after another
    mesh={"data": 0, "fsdp": 0, "tensor": 0},  # 0: as in `mesh`
    # Of the judge "http", in the arena: an OpenAI-compatible server's chat completions.
    http={
      "url": "http://127.0.0.1:8000/v1/chat/completions",
      "model": "",
      "timeout": 60.0,  # seconds a request
      "retries": 4,
      "backoff": 1.0,  # seconds before the first retry, doubled before each further one
      "workers": 8,  # requests at a time
    },
    table="",  # of the table judge: .npy [X A A], contexts by prompt index
    # A response's first tokens are its action: digits, token - first_token, in base table_tokens;
    # 0 for one token an action.
    first_token=6,
    table_tokens=0,
  )


def train() -> ConfigDict:
  """The fields of an online run with their defaults: NashMP on the bundled storyteller."""
  return _run(
    "train", model=model("assets:stories/policy.safetensors"),
    prompts={
      "task": "stories", "path": "assets:stories/prompts.jsonl", "held_out": 96,
      "held_out_path": "", "overflow": "drop", "max_tokens": 32, "batch_size": 32,
    },
    sampling={
      "max_tokens": 64, "temperature": 1.0, "top_k": 0, "top_p": 1.0,
      "tokens": (),  # the only ids that may be sampled; () for every piece
    },
    algorithm=algorithm(), optimizer=optimizer(), judge=judge(),
    # exact: evaluate over every response, where a game of the table judge allows it.
    evaluation={"every": 25, "prompts": 64, "texts": 4, "exact": False},
  )  # fmt: skip


def fit() -> ConfigDict:
  """The fields of a supervised run with their defaults."""
  return _run(
    "fit", model=model(),
    loss="sft",  # next token; "judge": pairwise cross-entropy; "reward": Bradley-Terry
    data={
      "task": "text", "path": "", "held_out": 600, "held_out_path": "", "overflow": "cut",
      "max_tokens": 129,  # of a text's windows, of prompt + response, of a preference's prompt
      "max_response_tokens": 64,  # of preferences
      "batch_size": 32,
    },
    template="stories",  # of the pairwise judge
    export="",  # where the best weights go, as .safetensors in export_dtype
    export_dtype="float16",
    optimizer=optimizer(learning_rate=3e-3, schedule="cosine", warmup_steps=100),
    evaluation={"every": 500, "batches": 1000},
  )  # fmt: skip


def arena() -> ConfigDict:
  """The fields of an arena with their defaults: the bundled storyteller and its best of 4."""
  online = train()
  base = online.model.weights
  online.model.weights = ""  # each policy names its own
  online.prompts.batch_size = 16
  return _group(
    job="arena",
    seed=0,
    model=online.model,  # the architecture and tokenizer of every policy
    prompts=online.prompts,  # of which the held-out part is used
    sampling=online.sampling,
    # Weights: a file, or a run's "runs/x", "runs/x@target", "runs/x@params:50", "…:best".
    policies={
      "base": {"weights": base, "best_of": 1},
      "best_of_4": {"weights": base, "best_of": 4},
    },
    base="base",  # the policy that KL, length and distinct bigrams are compared with
    judges={"judge": online.judge, "population": {**online.judge, "name": "population"}},
    select_judge="judge",  # picks the best of n
    samples=2,  # of each policy to a prompt
    max_prompts=0,  # 0: every held-out prompt
    resamples=2000,  # of the bootstrap
    texts=3,  # prompts shown with every policy's continuation
  )


def collect() -> ConfigDict:
  """The fields of a collection of votes, with their defaults."""
  online = train()
  online.prompts.batch_size = 32
  return _group(
    job="collect",
    seed=0,
    steps=100,  # batches of prompts
    model=online.model,
    prompts=online.prompts,
    # All pairs of the samples of a prompt are judged; each source has its own temperature.
    sampling={
      **{name: online.sampling[name] for name in ("max_tokens", "top_k", "top_p", "tokens")},
      "samples": 4,
    },
    # Policies that respond in turn: weights as in an arena, temperature of the samples.
    sources={"base": {"weights": online.model.weights, "temperature": 1.0}},
    judge={**online.judge, "name": "population"},
  )


def compare(base: ConfigDict | None = None, runs: Iterable[dict] = (), **fields) -> ConfigDict:
  """The fields of a comparison or an ablation, with their defaults.

  Args:
    base: the config that all runs share, of train().
    runs: what each changes, {"algorithm.name": "egpo", "algorithm.samples": 3}; "label" names it.
  """
  contest = arena()
  contest.judges, contest.policies = {}, {}
  defaults = {
    "job": "compare",
    "base": base or train(),
    "runs": tuple(runs),
    "learning_rates": (),  # tried with tuning_seed, the best is taken; () for the base's
    "tuning_seed": 100,
    "seeds": 3,
    "kinds": ("network",),  # of policy; and "tabular", where evaluation.exact
    "arena": contest,  # of all runs and the reference; none without judges
  }
  return ConfigDict({**defaults, **fields})


def sample() -> ConfigDict:
  """The fields of sampling from a policy at a prompt, with their defaults."""
  online = train()
  return _group(
    job="sample",
    seed=0,
    model=online.model,
    sampling={**online.sampling, "max_tokens": 128, "samples": 1},
    prompt="",  # "": ask for prompts until an empty line
    file="",  # prompts of a file, one a line, instead
    # λ: logits are (1 - λ)·reference + λ·policy, so 1 is the policy and 0 the reference.
    realign=1.0,
    reference=online.model.weights,  # as model.weights; read where λ is not 1
  )

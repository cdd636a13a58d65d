"""The TL;DR experiment of Nash learning from human feedback, and that of Online IPO and IPO-MD.

Question: does Nash-MD with a mixture between 0 and 1 beat self-play, best response and RLHF at
          summarising Reddit posts?
Command:  nash-jax fit --config=tldr:sft --workdir=runs/tldr/fit_sft, likewise :judge and :reward;
          nash-jax train --config=tldr:md1 --workdir=runs/tldr/md1, likewise each run of RUNS;
          nash-jax arena --config=tldr:arena --workdir=runs/tldr/arena. Add ,1b for a larger policy
          and judge, or ,smoke for tiny random models on a CPU (tldr:md1,smoke). docs/tldr.md has
          every command from an empty machine on.
Data:     data/tldr/*.jsonl and data/xsum/*.jsonl, made as in docs/tldr.md.
Cost:     time is not measured: ask `nash-jax plan --config=tldr:md1 --topology=v5e-4` first. On one
          device a run takes 20 GiB, 33 on XSum; with ,1b 48 and 68 (estimated from shapes).
Expected: the published table is in docs/tldr.md (Munos et al. 2312.00886, Table 1; Calandriello et
          al. 2403.08635). Not run here yet.

Published: the order of the stages, the data, 10,000 steps for each run, beta = .05 for RLHF and
.008 for all others, the mixtures, the rates of EMA, the judge's question, and 2,000 comparisons a
cell. Of the second paper: XSum's prompts, 30,000 steps, beta (DPO's 5, SLiC's 10), the mixture,
Adafactor without warm-up, batches of 32, the rates 1e-4 and, for Nash-MD, 3e-5.

Our choices: Gemma 3 in place of T5X and PaLM 2 (decoder-only, one tokenizer); both orders of a
pair, and the answers A and B for 1 and 2; in the first experiment the optimiser, its rate and the
batch, for which the second paper's stand in; in the second one RLHF's rate, DPO's and SLiC's, and
that these two take as many steps, on the comparisons of TL;DR but the last 512, evaluated on XSum
with the judge; SLiC as the hinge alone, without its term of likelihood; clipping at norm 1;
temperature 1; 512 + 64 tokens (1,024 + 64 on XSum), longer examples are left out; AdamW, its rate
and one epoch in the three fits; high confidence as a confidence of at most 2 or at least 8; for
RLHF the leave-one-out baseline.
"""

from nash_jax import config
from nash_jax.validation import one_of, require

FOLDERS = {
  "270m": "gemma-3-270m", "1b": "gemma-3-1b-pt", "4b": "gemma-3-4b-pt", "12b": "gemma-3-12b-it",
}  # fmt: skip
SIZES = {"270m": ("270m", "1b"), "1b": ("1b", "4b"), "smoke": ("smoke", "smoke")}
LENGTHS = {"tldr": 512, "xsum": 1024}  # tokens of a prompt
FITS = ("sft", "judge", "reward")  # sections, by their loss
EXPORT = "runs/tldr/{}.safetensors"
# {run: (method, its numbers)}; on TL;DR, and on XSum.
TLDR = {
  "rlhf": ("rlhf", {"beta": 0.05}),
  "sp": ("self_play", {"beta": 0.008}),
  **{f"md{i}": ("nash_md", {"beta": 0.008, "mixture": i / 8}) for i in range(1, 7)},
  "br": ("best_response", {"beta": 0.008}),
  "ema1": ("nash_ema", {"beta": 0.008, "kappa": 0.001}),
  "ema2": ("nash_ema", {"beta": 0.008, "kappa": 0.0005}),
}
XSUM = {
  "ipo": ("online_ipo", {"beta": 1.0}),
  "ipo_md": ("ipo_md", {"beta": 1.0, "mixture": 0.125}),
  "dpo": ("gpo", {"beta": 5.0, "f": "logistic"}),
  "slic": ("gpo", {"beta": 10.0, "f": "hinge"}),
  "xsum_md": ("nash_md", {"beta": 0.008, "mixture": 0.125}),
  "xsum_rlhf": ("rlhf", {"beta": 0.05}),
}
RUNS = TLDR | XSUM
# {column of the table: its weights}; the starred ones are the average that the run's target keeps.
COLUMNS = {run: f"runs/tldr/{run}" for run in RUNS}
COLUMNS |= {f"{run}*": f"runs/tldr/{run}@target" for run in ("ema1", "ema2")}


def get_config(section="md1"):
  """Returns a stage's config.

  Args:
    section: one of FITS or RUNS, or "arena" with any of COLUMNS, such as "arena,md1,ema1*"
      (without any: those of TL;DR); then "1b" or "smoke".
  """
  name, *words = section.split(",")
  one_of("the word after the colon", name, (*FITS, *RUNS, "arena"))
  size = next((word for word in words if word in SIZES), "270m")
  columns = [word for word in words if word not in SIZES]
  for column in columns:
    one_of("a word after the section", column, (*SIZES, *(COLUMNS if name == "arena" else ())))
  if name in FITS:
    c = fit(name, *SIZES[size])
  elif name in RUNS:
    c = train(name, *SIZES[size])
  else:
    c = arena(columns or [x for x in COLUMNS if x not in XSUM], *SIZES[size])
  return smoke(c) if size == "smoke" else c


def model(c, size, weights=None):
  """Sets a `model` group to a Gemma 3; by default with its published weights."""
  tokenizer = f"weights/{FOLDERS['270m']}/tokenizer.model"  # all sizes have the same one
  if size == "smoke":
    c.update(preset="tiny", weights=weights or "", changes={"num_embed": 1024})
    return
  c.update(preset=f"gemma3_{size}", weights=f"weights/{FOLDERS[size]}", tokenizer=tokenizer)
  c.dtype = "bfloat16"
  if weights is not None:
    c.weights = weights


def judge(c, loss, size, weights=None):
  """Sets a `judge` group to the preference model or the reward model."""
  c.name = "bradley_terry" if loss == "reward" else "gemma"
  model(c.model, size, EXPORT.format(loss) if weights is None else weights)
  if loss == "judge":
    c.template = "summaries"


def fit(name, policy, judge_size):
  """Returns the config of the first policy, the preference model or the reward model."""
  c = config.fit()
  c.loss = name
  model(c.model, policy if name == "sft" else judge_size)
  c.model.remat = True
  records = "" if name == "sft" else "pairs_"
  c.data.update(path=f"data/tldr/{records}train.jsonl", max_tokens=512, batch_size=32)
  c.data.update(held_out_path=f"data/tldr/{records}valid.jsonl", overflow="drop")
  if name == "sft":
    c.data.task, c.model.logit_chunk, c.steps = "responses", 16, 3600
  else:
    c.data.task, c.steps = "preferences", 2900
  if name == "judge":
    c.template = "summaries"
  c.optimizer.learning_rate = 1e-5
  c.evaluation.update(every=500, batches=60)
  c.checkpoint.every = 500
  c.export, c.export_dtype = EXPORT.format(name), "float32"
  return c


def train(name, policy, judge_size):
  """Returns the config of a run."""
  c, (method, numbers) = config.train(), RUNS[name]
  model(c.model, policy, EXPORT.format("sft"))
  c.model.update(remat=True, logit_chunk=16)
  judge(c.judge, "reward" if method == "rlhf" else "judge", judge_size)
  c.algorithm.update(name=method, **numbers)
  folder = "xsum" if name in XSUM else "tldr"
  c.prompts.update(task="json_lines", max_tokens=LENGTHS[folder], batch_size=32)
  c.prompts.update(path=f"data/{folder}/train.jsonl", held_out_path=f"data/{folder}/valid.jsonl")
  c.mesh.update(data=1, fsdp=-1, tensor=1)
  c.optimizer.update(name="adafactor", learning_rate=3e-5)
  c.steps, c.checkpoint.every, c.evaluation.every = 10_000, 1000, 1000
  if name in XSUM:
    c.steps, c.checkpoint.every, c.evaluation.every = 30_000, 2000, 2000
    c.checkpoint.keep = 15  # each of them meets one checkpoint of RLHF
    c.optimizer.learning_rate = 3e-5 if method == "nash_md" else 1e-4
  if method == "gpo":
    c.pairs.update(task="preferences", path="data/tldr/pairs_train.jsonl", held_out=512)
  c.evaluation.prompts = 128
  return c


def arena(columns, policy, judge_size):
  """Returns the config in which columns meet each other and the first policy."""
  folders = {"xsum" if column in XSUM else "tldr" for column in columns}
  fix = "Give columns of one data set."
  require(len(folders) == 1, "the arena's columns", "all on TL;DR or on XSum", columns, fix)
  (folder,) = folders
  c = config.arena()
  model(c.model, policy, "")
  c.model.update(remat=True, logit_chunk=16)
  c.policies = {"SFT": {"weights": EXPORT.format("sft"), "best_of": 1}}
  for column in columns:
    c.policies[column.upper()] = {"weights": COLUMNS[column], "best_of": 1}
  c.base = "SFT"
  c.prompts.update(task="json_lines", max_tokens=LENGTHS[folder], batch_size=16)
  c.prompts.update(path=f"data/{folder}/valid.jsonl", held_out_path=f"data/{folder}/test.jsonl")
  c.samples, c.max_prompts = 1, 2000
  c.judges = {name: config.train().judge for name in ("evaluation", "training")}
  judge(c.judges.training, "judge", judge_size)
  if policy == "smoke":
    judge(c.judges.evaluation, "judge", "smoke")
  else:
    judge(c.judges.evaluation, "judge", "12b", f"weights/{FOLDERS['12b']}")
  c.select_judge = "training"
  return c


def smoke(c):
  """Shrinks a stage so that a CPU runs its code within a minute."""
  data = c.data if c.job == "fit" else c.prompts
  data.update(max_tokens=64, batch_size=4, overflow="cut")
  if c.job == "fit":
    data.max_response_tokens = 16
    c.optimizer.warmup_steps = 0
  else:
    c.sampling.max_tokens = 16
  if c.job == "arena":
    c.max_prompts = 4
    return c
  c.steps, c.checkpoint.every, c.evaluation.every = 2, 2, 2
  if c.job == "train":
    c.evaluation.update(prompts=4, texts=2)
    c.pairs.held_out = min(c.pairs.held_out, 4)
  return c

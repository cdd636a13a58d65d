"""Exports a run's policy as a Hugging Face folder, or only its adapters as a PEFT folder.

The export measures and reports how much of the run the files' dtype rounds away. The folder appears
only when complete. Its README.md is the model card. Its nash_jax.json has the run's config and the
checksums of the files, by which a later export recognises and may replace the folder.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import pathlib
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import numpy as jnp
from ml_collections import ConfigDict

from nash_jax import judges, weights
from nash_jax.config import describe
from nash_jax.config.fields import DECLARED, DTYPES, default
from nash_jax.data.chat_template import TURN
from nash_jax.data.corpus import pad
from nash_jax.data.files import read_records
from nash_jax.data.tokenizer import Tokenizer
from nash_jax.models import gemma, logprobs
from nash_jax.policy import (
  check_saved,
  config_of_run,
  load_adapters,
  load_weights,
  load_weights_and_step,
  parse_weights,
  tokenizer_and_model,
)  # fmt: skip
from nash_jax.report import escaped, win_rate_cell
from nash_jax.run import card, checkpoint
from nash_jax.run.files import read_json
from nash_jax.types import Params
from nash_jax.validation import asset_path, one_of, require
from nash_jax.weights import adapters

RECORD = "nash_jax.json"
PROMPTS = "assets:stories/prompts.jsonl"  # texts for a run that recorded none
TEXTS, LENGTH = 8, 128  # number of texts that rounding is measured on, and tokens of each
FAITHFUL = 0.1  # the largest share of a run's change that a good dtype may lose or add
_MARKUP = re.compile(
  rf"{TURN.pattern}|<(?:bos|eos|start_of_turn|end_of_turn|\|turn|turn\||\|channel|channel\|)>"
)


class Source(NamedTuple):
  """What is exported.

  Attributes:
    workdir: the run's; None for a file that `fit` exported.
    field: the field of the run's state; "" for a file.
    config: the run's, with all fields of its job.
    step: the step in a file's card; None for a run.
  """

  spec: str
  workdir: pathlib.Path | None
  field: str
  config: ConfigDict
  step: int | None = None


def run(config: ConfigDict) -> None:
  """Writes a folder for transformers or PEFT, and prints what is in it.

  Args:
    config: as in configs/export.py.

  Raises:
    ValueError: no such run, a folder with other content, a reward model without adapters, or no
      adapters if they are asked for.
  """
  require(config.run != "", "run", "a run's workdir", config.run, "Give --run=runs/x@target.")
  require(config.to != "", "to", "the folder to write", config.to, "Give --to=FOLDER.")
  one_of("dtype", config.dtype, DTYPES)
  for field, value in {"dtype": "float32", "tokenizer": ""}.items() if config.adapter else ():
    fix = "Leave it out: adapters are float32, and have no tokenizer."
    require(config[field] == value, field, "no value with --adapter", config[field], fix)
  folder = pathlib.Path(config.to)
  _check_replaceable(folder)
  source = _read_source(config.run, config.tokenizer)
  contests = [*_contests(config.arena, source)] if config.arena else []
  base = config.base_model or _hub_name(source.config.model.weights)
  model = card.Model(
    config.run, source.field, source.step, describe(source.config), base, adapter=config.adapter,
    dtype="float32" if config.adapter else config.dtype, contests=contests,
  )  # fmt: skip
  write_files, model = (_adapters if config.adapter else _plain_model)(config, source, model)
  with _replacing(folder, model) as part:
    write_files(part)
    (part / "README.md").write_text(card.text(model, source.workdir, _command(config)), "utf-8")
  what = "adapters" if config.adapter else model.dtype
  print(f"wrote {config.to}: {config.run}, step {model.step}, {what}\n{model.note}".strip())


Written = tuple[Callable[[pathlib.Path], None], card.Model]  # (writes the files, complete card)


def _plain_model(config: ConfigDict, source: Source, model: card.Model) -> Written:
  """Loads base and policy, never both at the same time, and measures what the dtype keeps."""
  fix = (
    "Use the .safetensors file that `fit` exported; --adapter writes the adapters of a LoRA run."
  )
  loss = source.config.get("loss")
  got = f"a judge, fitted with loss = {loss}"
  require(loss not in judges.FITTED, "run", "a language model", got, fix)
  pieces, model_config = tokenizer_and_model(source.config.model)
  logp = _make_logprobs(model_config, *_texts(source, pieces))
  before = _base_logprobs(source, model_config, logp)
  params, step = load_weights_and_step(config.run, model_config, source.config.seed)
  note = _rounding(before, params, logp, config.dtype)
  step = source.step if step is None else step

  def write(folder: pathlib.Path) -> None:
    weights.export(str(folder), params, model_config, config.dtype, tokenizer=pieces)

  return write, dataclasses.replace(model, step=step, note=note)


def _adapters(config: ConfigDict, source: Source, model: card.Model) -> Written:
  """Loads a run's adapters without their base."""
  where, start = source.config.model, source.config.model.weights
  model_config = gemma.preset(where.preset, **where.changes)
  judge = judges.FITTED.get(source.config.get("loss"))
  head = judges.shapes(judge, source.config, model_config)["head"] if judge else None
  trained, alpha, step = load_adapters(config.run, model_config, head)
  is_multimodal = _is_multimodal(asset_path(start), model_config)
  advice = (
    f"PEFT needs the base as a Hugging Face folder, which {start or 'a random model'} is not:"
    " `nash-jax export` makes one from a run, and --base_model names a published one."
  )
  ready = config.base_model or (pathlib.Path(start) / "config.json").is_file()

  def write(folder: pathlib.Path) -> None:
    folder.mkdir()
    name = config.base_model or start
    adapters.write(folder, trained, model_config, alpha, name, is_multimodal)

  return write, dataclasses.replace(model, step=step, note="" if ready else advice)


def _is_multimodal(path: str, model_config: gemma.GemmaConfig) -> bool:
  """Returns whether a base has a vision model, at Hugging Face if its folder here does not say."""
  file = pathlib.Path(path) / "config.json"
  if file.is_file():
    return "vision_config" in read_json(file)
  # Gemma 3 4B and larger, and all of Gemma 4.
  return model_config.global_scale_factor > 1 or model_config.value_norm


def _read_source(spec: str, tokenizer: str) -> Source:
  """Reads the source from a run's workdir, or from the card in a file that `fit` exported."""
  path, field, _ = parse_weights(spec, "run")
  expected = "a run's workdir, or a file that `nash-jax fit` exported"
  require(os.path.exists(path), "run", expected, spec, "Nothing has that name.")
  step = workdir = saved = None
  if os.path.isdir(path) and not weights.kind(path):
    workdir, saved, field = pathlib.Path(path), checkpoint.read_config(path), field or "params"
  else:
    found = _card_in(path)
    saved, step = found.get("config"), found.get("step")
  fix = "For other weights, call weights.export from Python (docs/weights.md)."
  saved = saved if isinstance(saved, dict) else {}
  require(isinstance(saved.get("model"), dict), "run", expected, spec, fix)
  check_saved(spec, "run")
  config = _as_its_job_has_it(path, saved)
  if tokenizer:
    config.model.tokenizer = tokenizer
  return Source(spec, workdir, field, config, step)


def _card_in(path: str) -> dict[str, Any]:
  """Returns the card that `weights.save` wrote to a file; {} if there is none."""
  from safetensors import SafetensorError, safe_open

  if os.path.isdir(path):
    return {}
  try:
    with safe_open(path, "np") as file:
      return json.loads((file.metadata() or {}).get("card", "{}"))
  except (OSError, ValueError, SafetensorError) as error:
    raise ValueError(f"run {path}: expected a .safetensors file, got {error}") from error


def _as_its_job_has_it(path: str, saved: dict[str, Any]) -> ConfigDict:
  """Returns a recorded config, completed with the defaults of fields that it lacks."""
  job = saved.get("job", "fit" if "loss" in saved else "train")
  one_of(f"run {path}: job", job, ("train", "fit"))
  config = default(DECLARED[job]()).unlock()
  try:
    config.update(config_of_run(saved))
  except (TypeError, ValueError, AttributeError, KeyError) as error:
    raise ValueError(f"run {path}: expected a run's config, got {error!r:.80}") from error
  return config


def _hub_name(path: str) -> str:
  """Returns the Hugging Face name of a folder that is named like a published Gemma, or ""."""
  pure = pathlib.PurePath(path)
  folder = pure.parent if pure.suffix == ".safetensors" else pure
  return f"google/{folder.name}" if re.fullmatch(r"gemma-[\w.-]+", folder.name) else ""


def _command(config: ConfigDict) -> str:
  names = ("run", "to", *(() if config.adapter else ("dtype",)), "arena")
  flags = [f"--{name}={shlex.quote(config[name])}" for name in names if config[name]]
  flags += ["--adapter"] * config.adapter
  return f"nash-jax export {' '.join(flags)}"


def _contests(arena: str, source: Source) -> Iterator[str]:
  """Yields a line per judge and policy that this one met in an arena."""
  result = read_json(os.path.join(arena, "arena.json"))
  ours = _place(source.spec)
  names = [
    name
    for name, policy in result.get("policies", {}).items()
    if policy["best_of"] == 1 and _place(policy["weights"]) == ours
  ]
  expected, listed = f"an arena with the policy {source.spec}", [*result.get("policies", {})]
  require(len(names) > 0, "arena", expected, listed, "Name its workdir, and --run as it does.")
  step = result["policies"][names[0]].get("step")
  at = "" if step is None else f", at step {step}"
  for judge, tables in result["judges"].items():
    for other, cell in tables["win_rate"][names[0]].items():
      if other != names[0]:
        n = f"(3σ; n = {cell['n']} prompts{at})"
        rate = win_rate_cell(cell)
        yield f"beats {escaped(other)} under the judge {escaped(judge)}: {rate} {n}"


def _place(spec: str) -> tuple[str, str, str]:
  path, field, step = parse_weights(spec)
  return os.path.realpath(path), field or "params", step


def _texts(source: Source, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
  """Returns tokens and mask of the last texts that a run recorded, or of bundled ones."""
  recorded = source.workdir / "samples.jsonl" if source.workdir else None
  if recorded and recorded.exists():
    rows = [row for _, row in read_records(recorded)][-TEXTS:]
    texts = [f"{row.get('prompt', '')}{row.get('response', '')}" for row in rows]
  else:
    texts = []
  texts = texts or [row["prompt"] for _, row in read_records(asset_path(PROMPTS))][:TEXTS]
  ids = [[tokenizer.bos_id, *tokenizer.encode(_MARKUP.sub("", text))] for text in texts]
  return pad([row[:LENGTH] for row in ids], LENGTH, tokenizer.pad_id)


_token_logprobs = jax.jit(logprobs.token_logprobs, static_argnums=1)


def _make_logprobs(model_config: gemma.GemmaConfig, tokens: np.ndarray, mask: np.ndarray):
  """Returns (params, dtype) -> log-probability of every token, with parameters rounded to dtype."""

  def run(params: Params, dtype: str) -> np.ndarray:
    # Not in one program, because XLA may cancel the two casts.
    rounded = gemma.cast(gemma.cast(params, dtype), jnp.float32)
    found, _ = _token_logprobs(rounded, model_config, tokens, mask)
    return np.asarray(found, np.float64)[mask[:, 1:]]

  return run


def _base_logprobs(source: Source, model_config: gemma.GemmaConfig, logp) -> np.ndarray | str:
  """Returns log-probabilities under the run's start, or a text on why there are none."""
  start = source.config.model.weights
  try:
    return logp(load_weights(start, model_config, source.config.seed), "float32")
  except ValueError as error:
    return f"{error}"


def _rounding(before: np.ndarray | str, params: Params, logp, dtype: str) -> str:
  """Returns a sentence on what the files' dtype keeps of the run, with advice."""
  if isinstance(before, str):
    return f"What {dtype} keeps of the run was not measured: {before}"
  change = logp(params, "float32") - before
  size = np.abs(change).mean()
  if not size > 0:
    return "On the texts measured, the run changed nothing."
  said, faithful = [], {"float32": True}
  for other in ("bfloat16", "float16"):
    left = logp(params, other) - before
    kept = float(left @ change / (change @ change))
    strays = float(np.abs(left - change).mean() / size)
    faithful[other] = max(abs(1 - kept), strays) <= FAITHFUL
    said.append(f"{other} keeps {kept:.0%} of that and deviates from it by {strays:.0%}")
  text = f"The run changed log-probabilities by {size:.2g} nats a token ({change.size} tokens):"
  text = f"{text} {', '.join(said)}; float32 keeps all."
  if not faithful[dtype]:
    others = " or ".join(f"--dtype={name}" for name in faithful if faithful[name])
    return f"{text} Use {others}: {dtype} loses too much of it."
  return text


def _sum(path: pathlib.Path) -> str:
  """Returns a file's checksum, or for weights, which may be large, the size."""
  if path.suffix == ".safetensors":
    return f"bytes:{path.stat().st_size}"
  return f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"


def _check_replaceable(folder: pathlib.Path) -> None:
  """Raises ValueError if a folder has anything except the unchanged files of an export."""
  fix = "Name another folder, or move it away."
  require(not folder.is_file(), "to", "a folder", str(folder), fix)
  there = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
  if not there:
    return
  expected = "a folder that is new, empty, or an export of nash-jax"
  require(RECORD in there, "to", expected, f"{folder} with {', '.join(there)}"[:120], fix)
  sums = read_json(folder / RECORD).get("files", {})
  for name in there:
    path = folder / name
    same = name == RECORD or (name in sums and path.is_file() and _sum(path) == sums[name])
    require(same, "to", expected, f"{path}, which has changed since", fix)


@contextlib.contextmanager
def _replacing(folder: pathlib.Path, model: card.Model) -> Iterator[pathlib.Path]:
  """Yields a temporary folder, which replaces an earlier export of ours once complete."""
  folder = pathlib.Path(os.path.realpath(folder))
  part, old = (folder.with_name(f"{folder.name}.{os.getpid()}.{end}") for end in ("part", "old"))
  folder.parent.mkdir(parents=True, exist_ok=True)
  try:
    yield part
    sums = {path.name: _sum(path) for path in sorted(part.iterdir())}
    version = importlib.metadata.version("nash_jax")
    made = {"nash_jax": version, "run": model.spec, "step": model.step, "dtype": model.dtype}
    record = {**made, "config": model.config, "files": sums}
    (part / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    _check_replaceable(folder)  # again, since writing takes a while
    if folder.exists():
      folder.replace(old)
    part.replace(folder)
  finally:
    for left in (part, old):
      shutil.rmtree(left, ignore_errors=True)

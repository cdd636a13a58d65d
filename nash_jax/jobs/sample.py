"""Prints or writes continuations of prompts, typed or from a file; optionally realigned.

Decoding-time realignment (Liu et al. 2402.02992) draws from the token-wise geometric mixture
π_ref^(1-λ)·π_θ^λ, which approximates a policy trained with β/λ instead of β.
"""

import contextlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from absl import logging
from flax import traverse_util
from jax import numpy as jnp
from ml_collections import ConfigDict

from nash_jax import keys, weights
from nash_jax.config import resolve
from nash_jax.config.fields import DECLARED, default
from nash_jax.data.chat_template import turns
from nash_jax.data.corpus import Texts, pad
from nash_jax.data.files import SUFFIXES, read_records
from nash_jax.data.tokenizer import Tokenizer
from nash_jax.models import gemma
from nash_jax.policy import (
  check_vocabulary,
  load_weights,
  make_policy,
  parse_weights,
  tokenizer_and_model,
)
from nash_jax.run import checkpoint
from nash_jax.run.files import replacing
from nash_jax.types import Prompts
from nash_jax.validation import require

Prompt = tuple[dict[str, Any], list[int]]  # (record with "prompt" or "messages", its ids)
Write = Callable[[dict[str, Any]], None]
# Fields that are taken from the config of a run, besides all of model.changes.
OF_RUN = (
  *(f"model.{name}" for name in ("preset", "tokenizer", "template", "dtype")),
  *(f"sampling.{name}" for name in ("temperature", "top_k", "top_p", "tokens", "markers")),
)  # fmt: skip
LEAST_WIDTH = 16


def run(config: ConfigDict, workdir: str | os.PathLike[str] = "") -> None:
  """Continues `prompt`, each record of `file`, or typed text; prints it, or writes `output`.

  Args:
    config: from nash_jax.config.sample(). model.weights and reference may be runs, such as
      "runs/x@target"; the reference is loaded only if realign is not 1. These fields, if at their
      defaults, come from the run: architecture, tokenizer, template, compute dtype, sampling,
      reference.
    workdir: unused; nothing is written there.

  Raises:
    ValueError: a bad config or weights, a file without prompts, an output that cannot be written.
  """
  config = resolve(as_its_run(config), "sample")
  tokenizer, model_config = tokenizer_and_model(config.model)
  prompts = _prompts(config, tokenizer)
  if config.realign != 1:
    mixed = [spec for spec in (config.model.weights, config.reference) if spec]
    check_vocabulary(mixed, tokenizer, model_config)
  with _writer(config.output) as write:
    dtype = jnp.dtype(config.model.dtype)  # sampling computes in it
    params = load_weights(config.model.weights, model_config, config.seed, dtype)
    mixture = None
    if config.realign != 1:
      reference = load_weights(config.reference, model_config, config.seed, dtype)
      params, mixture = (params, reference), 1 - config.realign
    policy = make_policy(config.model, config.sampling, tokenizer, model_config)
    sample = jax.jit(policy.make_sampler(samples=config.sampling.samples, mixture=mixture))
    for number, (record, ids) in enumerate(prompts):
      tokens, mask = map(jnp.asarray, pad([ids], _width(len(ids)), tokenizer.pad_id, left=True))
      batch = Prompts(tokens, mask, jnp.zeros(1, jnp.int32))
      responses = jax.device_get(sample(params, batch, keys.key(config.seed, "sample", number)))
      for k, row in enumerate(responses.mask[0]):
        write({
          **record, "response": tokenizer.decode(responses.tokens[0, k][row]), "sample": k,
          "tokens": int(row.sum()), "stopped": bool(responses.stopped[0, k]),
          "logp": float(np.sum(responses.logp[0, k], dtype=np.float64)),
        })  # fmt: skip


def as_its_run(config: ConfigDict) -> ConfigDict:
  """Returns a config whose fields at defaults are replaced by those of the run in model.weights."""
  given, defaults = (_flat(c.to_dict()) for c in (config, default(DECLARED["sample"]())))
  spec = given.get("model.weights")
  path = parse_weights(spec, "model.weights").path if isinstance(spec, str) else ""
  if not os.path.isdir(path) or weights.kind(path):
    return config
  saved = _flat(checkpoint.read_config(path))
  fields = {field: field for field in OF_RUN}
  if not any(field.startswith("model.changes.") for field in given):
    fields |= {field: field for field in saved if field.startswith("model.changes.")}
  if given.get("realign") != 1:
    fields["reference"] = "model.weights"
  taken = {
    field: _plain(field, saved[source])
    for field, source in fields.items()
    if source in saved and given.get(field) == defaults.get(field)
  }
  taken = {field: value for field, value in taken.items() if value != given.get(field)}
  if taken:
    listed = ", ".join(f"{field}={value!r}" for field, value in taken.items())
    logging.info("as in %s: %s", path, listed)
  config = config.copy_and_resolve_references().unlock()
  with config.ignore_type():  # values of a damaged file are checked with the rest
    config.update_from_flattened_dict(taken)
  return config


def _flat(tree: dict[str, Any]) -> dict[str, Any]:
  return traverse_util.flatten_dict(tree, sep=".")


def _plain(field: str, value: Any) -> Any:
  """Returns a JSON value as a config holds it."""
  if field == "model.changes.attention_types":
    kinds = {kind.name: kind for kind in (gemma.LOCAL, gemma.GLOBAL)}
    return tuple(kinds.get(name, name) for name in value)
  return tuple(value) if isinstance(value, list) else value


def _width(length: int) -> int:
  """Returns the width that a prompt is padded to; few widths mean few compiled programs."""
  return max(LEAST_WIDTH, 1 << (length - 1).bit_length())


@contextlib.contextmanager
def _writer(output: str) -> Iterator[Write]:
  """Yields a function that prints a continuation, or writes it to `output` atomically."""
  if not output:
    yield lambda row: print(f"{_shown(row)} ▸{row['response']}\n", flush=True)
    return
  with replacing(output) as part, part.open("w", encoding="utf-8") as lines:
    yield lambda row: print(json.dumps(row, ensure_ascii=False), file=lines)


def _shown(record: dict[str, Any]) -> str:
  """Returns the text of a prompt; for a conversation the user's last message."""
  prompt = record.get("prompt") or record["messages"]
  return prompt if isinstance(prompt, str) else turns(prompt)[-1].text


def _prompts(config, tokenizer: Tokenizer) -> Iterable[Prompt]:
  """Returns prompts and their ids; all but typed ones are checked first."""

  def encode(place: str, record: Any) -> Prompt:
    try:
      return record, Texts(tokenizer).prompt(record)
    except ValueError as error:
      raise ValueError(f"{place}: {error}") from None

  def typed() -> Iterator[Prompt]:
    for text in itertools.takewhile(bool, _typed()):
      try:
        yield encode("prompt", {"prompt": text})
      except ValueError as error:  # ask for the next one
        print(error, file=sys.stderr)

  if config.prompt:
    return [encode("prompt", {"prompt": config.prompt})]
  if config.file:
    readable = os.access(config.file, os.R_OK) and not os.path.isdir(config.file)
    require(readable, "file", "a readable text file", config.file, "Give its path.")
    parse = json.loads if config.file.endswith(SUFFIXES) else lambda line: {"prompt": line}
    pairs = list(itertools.starmap(encode, read_records(config.file, parse)))
    require(len(pairs) > 0, "file", "a prompt per line", config.file, "Write some.")
    return pairs
  return typed()


def _typed() -> Iterator[str]:
  while True:
    try:
      yield input("prompt (empty line to stop): ")
    except EOFError:
      return
    except UnicodeDecodeError as error:
      raise ValueError(f"prompt: expected UTF-8 ({error})") from None

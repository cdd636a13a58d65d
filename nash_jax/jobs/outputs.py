"""A benchmark's files in an arena: other models' answers, and those of the arena's policies."""

import pathlib
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from absl import logging
from jax import numpy as jnp

from nash_jax.data import answers
from nash_jax.data.corpus import Examples, Texts, pad
from nash_jax.data.tokenizer import Tokenizer
from nash_jax.run import files
from nash_jax.types import Responses
from nash_jax.validation import file_name, printable


def read(config, held_out: Examples, count: int, tokenizer: Tokenizer) -> dict[str, Responses]:
  """Returns the responses [N S L] of policies that are files of answers, each answer S times.

  Raises:
    ValueError: a file does not answer the first `count` prompts, or cannot be read.
  """
  given, most = {}, config.sampling.max_tokens
  for name, entry in config.policies.items():
    if not entry.outputs:
      continue
    what, records = f"policies.{printable(name)}.outputs", held_out.columns["record"]
    try:
      rows = answers.read(entry.outputs, config.prompts.task, records, count)
      ids = [_encode(tokenizer, *row) for row in rows]
    except ValueError as error:
      raise ValueError(f"{what}: {error}") from None
    _tell_changes(tokenizer, [text for _, text in rows], ids, most, what)
    tokens, mask = pad([row[:most] for row in ids], most, tokenizer.pad_id)
    stopped, logp = jnp.array([len(row) <= most for row in ids]), jnp.zeros(tokens.shape)
    responses = Responses(tokens, mask, logp, logp, stopped)
    given[name] = jax.tree.map(lambda x: np.repeat(x[:, None], config.samples, axis=1), responses)
  return given


def _encode(tokenizer: Tokenizer, place: str, text: str) -> list[int]:
  try:
    return Texts(tokenizer).response({"answer": text}, "answer")
  except ValueError as error:
    raise ValueError(f"{place}: {error}") from None


def _tell_changes(
  tokenizer: Tokenizer, texts: Sequence[str], ids: Sequence[list[int]], most: int, what: str
) -> None:
  """Warns how many answers are not judged as they were written."""
  cut = sum(len(row) > most for row in ids)
  pairs = zip(ids, texts, strict=True)
  respelled = sum(tokenizer.decode(row).strip() != text.strip() for row, text in pairs)
  if cut:
    advice = "raise it to judge them in full"
    message = "%s: %d of %d answers are cut at sampling.max_tokens = %d: %s"
    logging.warning(message, what, cut, len(texts), most, advice)
  if respelled:
    message = "%s: %d of %d answers have text that model.tokenizer spells differently: %s"
    logging.warning(message, what, respelled, len(texts), "judges read its spelling")


def write(
  config,
  held_out: Examples,
  texts: Mapping[str, Sequence[str]],
  tokenizer: Tokenizer,
  folder: pathlib.Path,
) -> None:
  """Writes the policies' answers to `folder`/outputs, in the format of the benchmark's tools.

  Skips policies that came from such a file.

  Args:
    texts: {policy: an answer to each of the first prompts}.
  """
  task, folder = config.prompts.task, files.make_folder(folder / "outputs")
  count, total = len(next(iter(texts.values()))), len(held_out) + held_out.report["dropped"]
  if count < total:
    message = "%s: answers to %d of the benchmark's %d prompts: see max_prompts, prompts.max_tokens"
    logging.warning(message, folder, count, total)
  number = answers.token_counter(task, lambda text: len(tokenizer.encode(text)))
  for name, answered in texts.items():
    if not config.policies[name].outputs:
      path = folder / f"{file_name(name)}{answers.BENCHMARKS[task].file}"
      model = path.stem if task == "arena_hard" else name  # its tools use the file's name
      answers.write(path, task, held_out.columns["record"][:count], answered, model, number)

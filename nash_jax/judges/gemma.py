"""A Gemma that is shown two responses and answers A or B.

Its prompt is put together from token arrays on the device. Both orders of presentation are asked
and averaged, so the verdict is antisymmetric by construction.
"""

import pathlib
import re
from typing import NamedTuple

import jax
from jax import numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from nash_jax import config as configs
from nash_jax import judges, keys
from nash_jax.judges import Answers, Judge
from nash_jax.models import gemma, weights
from nash_jax.types import Mean, Params, Prompts

SLOTS = ("{prompt}", "{a}", "{b}")
_CONTROL = ("<start_of_turn>", "<end_of_turn>")


# Prompts as text, slots, markers and literals; <bos> goes before them by itself.
TEMPLATES = {
  "gemma": (
    "<start_of_turn>user\n"
    "Below is a conversation and two candidate replies to its last message. Decide which reply a"
    " careful reader would prefer: the one that is more helpful, more correct and better written."
    " Neither the order of the replies nor their length is a reason by itself.\n\n"
    "Conversation:\n{prompt}\n\nReply A:\n{a}\n\nReply B:\n{b}\n\n"
    "Which reply is better? Answer with a single letter, A or B.<end_of_turn>\n"
    "<start_of_turn>model\n"
  ),
  "stories": "{prompt}<start_of_turn>{a}<start_of_turn>{b}<end_of_turn>",
}
# Those that leave its stop token on a response, so that a judge fitted to them sees whether it was
# finished or cut.
SHOW_STOP = ("stories",)
ANSWERS = ("A", "B")  # the pieces that say "the first" and "the second"


class Layout(NamedTuple):
  """A template in a tokenizer's ids.

  Attributes:
    parts: ids of literals, and slots.
    answers: ids of the two answers.
    markers: ids left out of prompts: bos, pad, stop tokens, turn markers. Role names stay as
      text, so a chat reads as a transcript.
    hidden: ids left out of responses.
  """

  parts: list[list[int] | str]
  answers: list[int]
  markers: list[int]
  hidden: list[int]
  pad_id: int


def layout(name: str, tokenizer) -> Layout:
  """Tokenises the template called `name`, once.

  Raises:
    ValueError: an unknown template; a marker or answer that is no single piece of the tokenizer.
  """
  configs.choose("judge template", name, TEMPLATES)
  control = {piece: tokenizer.id_of(piece) for piece in _CONTROL}
  parts: list[list[int] | str] = [[tokenizer.bos_id]]
  for part in re.split("(" + "|".join(map(re.escape, SLOTS + _CONTROL)) + ")", TEMPLATES[name]):
    if part in SLOTS:
      parts.append(part)
    elif part:
      parts.append([control[part]] if part in control else tokenizer.encode(part))
  stops = tokenizer.stop_ids if name in SHOW_STOP else ()
  markers = {tokenizer.pad_id, tokenizer.bos_id, *tokenizer.stop_ids, *control.values()}
  answers = [tokenizer.id_of(piece) for piece in ANSWERS]
  return Layout(parts, answers, sorted(markers), sorted(markers - {*stops}), tokenizer.pad_id)


def assemble(
  layout: Layout, prompts: Prompts, a: Answers, b: Answers
) -> tuple[Int[Array, "N T"], Bool[Array, "N T"]]:
  """Returns the judge's prompts, left-padded, and their mask; T is fixed by the inputs' widths."""
  rows = len(prompts.tokens)

  def without(ids, tokens, mask):
    return tokens, mask & ~jnp.isin(tokens, jnp.asarray(ids))

  def literal(ids):
    tokens = jnp.broadcast_to(jnp.asarray(ids, jnp.int32)[None], (rows, len(ids)))
    return tokens, jnp.ones_like(tokens, bool)

  slots = {
    "{prompt}": without(layout.markers, prompts.tokens, prompts.mask),
    "{a}": without(layout.hidden, a.tokens, a.mask),
    "{b}": without(layout.hidden, b.tokens, b.mask),
  }
  parts = [slots[part] if isinstance(part, str) else literal(part) for part in layout.parts]
  tokens, mask = (jnp.concatenate(arrays, axis=1) for arrays in zip(*parts, strict=True))
  order = jnp.argsort(mask, axis=1, stable=True)  # gaps first: they become the left padding
  tokens, mask = (jnp.take_along_axis(x, order, axis=1) for x in (tokens, mask))
  return jnp.where(mask, tokens, layout.pad_id), mask


def answer_logits(
  params: Params,
  model: gemma.GemmaConfig,
  layout: Layout,
  prompts: Prompts,
  a: Answers,
  b: Answers,
  **options,
) -> Float[Array, "N 2 2"]:
  """Returns soft-capped float32 logits of the answers (first, second), in both orders.

  [:, 0] was shown a then b, [:, 1] b then a; `options` are gemma.forward's (dtype, remat).
  """
  # Interleaved, so that both orders of a pair stay on the device that holds its row.
  both = [assemble(layout, prompts, a, b), assemble(layout, prompts, b, a)]
  tokens, mask = (
    jnp.stack(x, 1).reshape(2 * len(a.tokens), -1) for x in zip(*both, strict=True)
  )
  x, _ = gemma.forward(
    params, model, tokens, gemma.positions_of(mask), gemma.causal_mask(mask), **options
  )
  rows = params["embedder"]["input_embedding"][jnp.asarray(layout.answers)]
  logits = gemma.logits({"embedder": {"input_embedding": rows}}, model, x[:, -1])
  return logits.reshape(-1, 2, 2)


def _margins(*args, **options) -> tuple[Float[Array, "N"], Float[Array, "N"]]:
  """Log-odds of a over b, by order of presentation."""
  logits = answer_logits(*args, **options)
  margin = logits[..., 0] - logits[..., 1]
  return margin[:, 0], -margin[:, 1]


def _average(first, second):
  """P(a ≻ b) over both orders; exchanging a and b gives 1 - p to the last bit."""
  gap = jax.nn.sigmoid(first) - jax.nn.sigmoid(-second)
  winner = 0.5 + 0.5 * jnp.abs(gap)  # 1 minus a float of [1/2, 1] is exact
  return jnp.where(gap < 0, 1 - winner, winner)


def pairwise_loss(
  params: Params, batch: dict, *, model: gemma.GemmaConfig, template: Layout, options: dict
) -> dict[str, Mean]:
  """Returns cross-entropy (nats) against p_win, both orders, and the averaged verdict's accuracy.

  Args:
    batch: as from preferences.Pairs.all.
    options: gemma.forward's (dtype, remat).
  """
  a, b = Answers(batch["a_tokens"], batch["a_mask"]), Answers(batch["b_tokens"], batch["b_mask"])
  first, second = _margins(params, model, template, batch["prompts"], a, b, **options)
  margins, p_win = jnp.stack([first, second], 1), batch["p_win"]
  soft = p_win[:, None] * jax.nn.log_sigmoid(margins)
  soft += (1 - p_win[:, None]) * jax.nn.log_sigmoid(-margins)
  right = (_average(first, second) > 0.5) == (p_win > 0.5)
  return {"loss": Mean.of(-soft), "accuracy": Mean.of(right, p_win != 0.5)}


def make(config, tokenizer, params: Params | None = None) -> Judge:
  """Builds the judge; see judges.make."""
  model, options = architecture(config.model, tokenizer)
  lay = layout(config.template, tokenizer)

  def compare(params, prompts, a, b):
    first, second = _margins(params, model, lay, prompts, a, b, **options)
    flipped = Mean.of((first > 0) != (second > 0))
    return _average(first, second), jnp.ones(first.shape, bool), {"flip_rate": flipped}

  if params is None:
    params = load(config.model, model, gemma.init)
  return Judge(params, judges.pairwise(compare))


def architecture(config, tokenizer) -> tuple[gemma.GemmaConfig, dict]:
  """Returns a judge's architecture and gemma.forward's options from a `model` config.

  Raises:
    ValueError: a tokenizer other than the policy's, or with more pieces than the model has rows.
  """
  own = configs.path(config.tokenizer)
  if own != tokenizer.path and (
    pathlib.Path(own).read_bytes() != pathlib.Path(tokenizer.path).read_bytes()
  ):
    raise ValueError(
      f"judge.model.tokenizer is {own!r}, but responses come in tokens of {tokenizer.path!r}: the "
      "judge reads these tokens, so choose a judge with the policy's tokenizer"
    )
  model = gemma.preset(config.preset, **config.changes)
  tokenizer.check_rows(model.num_embed)
  return model, {"dtype": jnp.dtype(config.dtype)}


def load(config, model: gemma.GemmaConfig, init) -> Params:
  """Returns parameters held in `config.dtype`: of `config.weights`, or random where it is ""."""
  dtype = jnp.dtype(config.dtype)
  if config.weights:
    return weights.load(configs.path(config.weights), model, dtype)
  return gemma.cast(init(keys.key(0, "judge"), model), dtype)

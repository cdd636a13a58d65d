"""The prompt of a Gemma judge: a text with slots that are filled with tokens on the device."""

import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from jax import numpy as jnp
from jaxtyping import Array, Bool, Int

from nash_jax.data import files
from nash_jax.data.tokenizer import Tokenizer
from nash_jax.types import Answers, Prompts
from nash_jax.validation import asset_path, one_of, require

SLOTS = ("{prompt}", "{a}", "{b}")
_SLOT = "|".join(map(re.escape, SLOTS))
# Markers that a template may hold; those of a chat template that are left out stay text.
_CONTROL = (
  "<start_of_turn>", "<end_of_turn>", "<|turn>", "<turn|>", "<|channel>", "<channel|>"
)  # fmt: skip
_MARKUP = "|".join(map(re.escape, _CONTROL))
_CUT = "…"  # marks the cut of a slot

_REPLIES = (
  "Below is a conversation and two candidate replies to its last message. Decide which reply a"
  " careful reader would prefer: the one that is more helpful, more correct and better written."
  " Neither the order of the replies nor their length is a reason by itself.\n\n"
  "Conversation:\n{prompt}\n\nReply A:\n{a}\n\nReply B:\n{b}\n\n"
  "Which reply is better? Answer with a single letter, A or B."
)
_GEMMA4 = f"<|turn>user\n{_REPLIES}<turn|>\n<|turn>model\n"

# Prompts as text with slots and markers, without <bos>, which is added.
TEMPLATES = {
  "gemma": f"<start_of_turn>user\n{_REPLIES}<end_of_turn>\n<start_of_turn>model\n",
  "gemma4": _GEMMA4,
  "gemma4_large": f"{_GEMMA4}<|channel>thought\n<channel|>",
  "summaries": (
    "<start_of_turn>user\n"
    "You are an expert summary rater. Given a piece of text and two of its possible summaries,"
    " output A or B to indicate which summary is better.\n\n"
    "Text:\n{prompt}\n\nSummary A:\n{a}\n\nSummary B:\n{b}\n\n"
    "Preferred summary:<end_of_turn>\n"
    "<start_of_turn>model\n"
  ),
  "stories": "{prompt}<start_of_turn>{a}<start_of_turn>{b}<end_of_turn>",
}
# Templates that keep a response's stop token, so that a judge fitted to them sees whether the
# response was finished or cut.
SHOW_STOP = ("stories",)
ANSWERS = ("A", "B")  # the pieces that mean "the first" and "the second"


Tokens = tuple[Int[Array, "N W"], Bool[Array, "N W"]]  # (tokens, mask)


class Layout(NamedTuple):
  """A template in a tokenizer's ids.

  Attributes:
    parts: the ids of the texts between slots, and the slots.
    answers: the ids of the two answers.
    markers: ids removed from prompts: bos, pad, stop tokens, turn markers. Role names stay, so a
      chat reads as a transcript.
    thought: ids of the two markers around a thought, which is removed from all slots; or none.
    hidden: ids removed from responses.
    newlines: ids removed at both ends of a slot, because they would merge with the template's.
    cut: ids of the ellipsis that marks a cut.
    max_tokens: the most tokens of a whole prompt; 0 for no limit.
  """

  parts: list[list[int] | str]
  answers: list[int]
  markers: list[int]
  thought: list[int]
  hidden: list[int]
  newlines: list[int]
  pad_id: int
  cut: list[int]
  max_tokens: int

  @property
  def room(self) -> int:
    """Returns how many tokens the limit leaves to the three slots."""
    return self.max_tokens - sum(len(ids) for ids in self.parts if not isinstance(ids, str))


def read(name: str) -> str:
  """Returns the text of a template, given its name or a file's path.

  Raises:
    ValueError: an unknown name; a file that is not UTF-8 text, or whose slots or markers break the
      rules.
  """
  path, field = asset_path(name), f"judge template {name!r}"
  if name in TEMPLATES or not os.path.isfile(path):
    one_of("judge.template (a name or a text file)", name, TEMPLATES)
    return TEMPLATES[name]
  text = files.read_text(path)
  counts = {slot: text.count(slot) for slot in SLOTS}
  require(set(counts.values()) == {1}, field, "each slot once", counts, "Fix the file.")
  require("<bos>" not in text, field, "a text without <bos>", "<bos>", "Remove it: <bos> is added.")
  between = f"\n|{_MARKUP}"
  separate = re.findall(f"(?:^|{between})({_SLOT})(?={between})", text)
  require(
    len(separate) == 3,
    field,
    "a newline or turn marker before and after each slot",
    f"that only around {', '.join(separate) or 'none'}",
    "Otherwise a token could join a slot's text with its neighbours, which token arrays cannot do."
    " The answer is read at the end of the text, so ask for it after the last slot.",
  )
  return text


def layout(
  name: str, tokenizer: Tokenizer, answers: tuple[str, ...] = ANSWERS, max_tokens: int = 0
) -> Layout:
  """Tokenises a template, given its name or a file's path.

  Args:
    answers: the pieces that mean "the first" and "the second".
    max_tokens: the most tokens of a whole prompt; 0 for no limit. See `shown`.

  Raises:
    ValueError: an unknown template; a marker or answer that is not a single piece of the
      tokenizer; a limit that leaves no room for the slots.
  """
  text, known = read(name), tokenizer.known(_CONTROL)
  parts: list[list[int] | str] = [[tokenizer.bos_id]]
  for part in re.split(f"({_SLOT}|{_MARKUP})", text):
    fix = "Choose a template in the form of the model's chat template (docs/judges.md: templates)."
    good, expected = part not in _CONTROL or part in known, "markers that the tokenizer has"
    require(good, f"judge template {name!r}", expected, part, fix)
    if part in SLOTS:
      parts.append(part)
    elif part:
      parts.append([known[part]] if part in known else tokenizer.encode(part))
  stops = tokenizer.stop_ids if name in SHOW_STOP else ()
  markers, thought = hidden_ids(tokenizer)
  merges = re.search(f"\n(?:{_SLOT})|(?:{_SLOT})\n", text)
  newlines = {i for k in range(1, 33) for i in tokenizer.encode("\n" * k)} if merges else ()
  answer_ids, cut = [tokenizer.id_of(piece) for piece in answers], tokenizer.encode(_CUT)
  hidden, pad_id = sorted({*markers} - {*stops}), tokenizer.pad_id
  template = Layout(
    parts, answer_ids, markers, thought, hidden, sorted(newlines), pad_id, cut, max_tokens
  )
  least = max_tokens - template.room + 3 * (len(cut) + 1)
  good, expected = max_tokens == 0 or max_tokens >= least, f"0 or at least {least}"
  fix = "Raise it: the slots share what the template leaves."
  require(good, "judge.max_tokens", f"{expected} for the template {name!r}", max_tokens, fix)
  return template


def hidden_ids(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
  """Returns the ids of markers, which no judge is shown, and of the two around a thought."""
  known = tokenizer.known(_CONTROL)
  markers = {tokenizer.pad_id, tokenizer.bos_id, *tokenizer.stop_ids, *known.values()}
  return sorted(markers), [known[x] for x in ("<|channel>", "<channel|>") if x in known]


def question(name: str) -> str:
  """Returns a template's text without markers, roles of turns and what it thinks."""
  opens, thought = r"(?:<start_of_turn>|<\|turn>)\w+\n", r"<\|channel>.*?<channel\|>"
  return re.sub(rf"{opens}|{thought}|(?:<end_of_turn>|<turn\|>)\n?", "", read(name), flags=re.S)


def without_thoughts(thought: Sequence[int], tokens, mask) -> Bool[Any, "... W"]:
  """Returns a mask without what is thought; see Layout.thought. Takes and returns any arrays."""
  if not thought:
    return mask
  opened, closed = ((mask & (tokens == i)).cumsum(axis=-1) for i in thought)
  return mask & (opened <= closed)


def shown(
  layout: Layout, prompts: Prompts, a: Answers, b: Answers
) -> tuple[dict[str, Tokens], Int[Array, "N"]]:
  """Returns the tokens of each slot, and how many tokens were cut.

  If the three do not fit, whatever exceeds a common length is cut, so both responses are cut to the
  same length in either order. That length is the largest at which all fit. As in
  corpus.load_examples, a response keeps its start and a prompt its end.
  """
  slots, room = {}, layout.room
  for slot, source in (("{prompt}", prompts), ("{a}", a), ("{b}", b)):
    hidden = layout.markers if slot == "{prompt}" else layout.hidden
    slots[slot] = source.tokens, _visible(layout, hidden, source.tokens, source.mask)
  if not layout.max_tokens or sum(mask.shape[1] for _, mask in slots.values()) <= room:
    return slots, jnp.zeros(len(prompts.tokens), jnp.int32)

  lengths = [mask.sum(axis=1, keepdims=True) for _, mask in slots.values()]
  least, middle, _ = jnp.split(jnp.sort(jnp.concatenate(lengths, axis=1), axis=1), 3, axis=1)
  limit = jnp.maximum(jnp.maximum(room // 3, (room - least) // 2), room - least - middle)
  num_cut = []
  for (slot, (tokens, mask)), length in zip(slots.items(), lengths, strict=True):
    over, place = length > limit, jnp.cumsum(mask, axis=1) - 1
    if slot == "{prompt}":
      place -= jnp.maximum(length - limit, 0)
    first = 0 if slot == "{prompt}" else limit - len(layout.cut)
    for i, ellipsis in enumerate(layout.cut):
      tokens = jnp.where(over & (place == first + i), ellipsis, tokens)
    slots[slot] = tokens, mask & (place >= 0) & (place < limit)
    num_cut.append(jnp.where(over, length - limit + len(layout.cut), 0))
  return slots, jnp.concatenate(num_cut, axis=1).sum(axis=1)


def _visible(layout: Layout, hidden: list[int], tokens, mask) -> Bool[Array, "N W"]:
  """Returns a slot's mask without hidden ids, and without newlines at both ends."""
  mask = without_thoughts(layout.thought, tokens, mask) & ~jnp.isin(tokens, jnp.asarray(hidden))
  if not layout.newlines:
    return mask
  text = mask & ~jnp.isin(tokens, jnp.asarray(layout.newlines))
  seen = jnp.cumsum(text, axis=1)
  return mask & (seen > 0) & (text | (seen < seen[:, -1:]))


def assemble(layout: Layout, prompts: Prompts, a: Answers, b: Answers) -> Tokens:
  """Returns the judge's left-padded prompts and their mask.

  Their width is fixed: the sum of the inputs' widths and the template's, at most layout.max_tokens.
  """
  rows = len(prompts.tokens)

  def literal(ids: list[int]) -> Tokens:
    tokens = jnp.broadcast_to(jnp.asarray(ids, jnp.int32)[None], (rows, len(ids)))
    return tokens, jnp.ones_like(tokens, bool)

  slots, _ = shown(layout, prompts, a, b)
  parts = [slots[part] if isinstance(part, str) else literal(part) for part in layout.parts]
  tokens, mask = (jnp.concatenate(arrays, axis=1) for arrays in zip(*parts, strict=True))
  order = jnp.argsort(mask, axis=1, stable=True)  # moves gaps to the left as padding
  order = order[:, -layout.max_tokens :]  # slots are already cut to fit; -0 keeps everything
  tokens, mask = (jnp.take_along_axis(array, order, axis=1) for array in (tokens, mask))
  return jnp.where(mask, tokens, layout.pad_id), mask

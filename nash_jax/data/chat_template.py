"""Chat templates, which turn a conversation that waits for an answer into text and marker pieces.

To add a template, add an entry to TEMPLATES.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from nash_jax.data.files import shorten


class Turn(NamedTuple):
  """One turn of a conversation; `system` is what a system message before the first turn says."""

  role: str  # "user" or "model"
  text: str
  system: str | None = None


class Marker(NamedTuple):
  """A special piece of the tokenizer, identified by its spelling."""

  piece: str


class Template(NamedTuple):
  """A chat template.

  Attributes:
    render: turns -> texts and markers after <bos>, up to the start of a response.
    response: a response's text -> the form it has in the template.
    markers: all markers of the template; the tokenizer must have them.
    stops: the markers that end a response, besides <eos>. Data use the last one, and of them only
      it may be sampled unless another is asked for.
    opening: what starts a turn of the user; None if the template has no turns.
    thought: the markers around what a model thinks, which no judge is shown; () if there are none.
    jinja: the same template with <bos>, for programs that read a Hugging Face folder.
  """

  render: Callable[[list[Turn]], list[str | Marker]]
  response: Callable[[str], str] = str
  markers: tuple[Marker, ...] = ()
  stops: tuple[Marker, ...] = ()
  opening: tuple[Marker, str] | None = None
  thought: tuple[Marker, Marker] | tuple[()] = ()
  jinja: str = ""


def with_system(turn: Turn) -> str:
  """Returns a turn's text after the system message, if there is one, and a blank line."""
  return turn.text if turn.system is None else f"{turn.system}\n\n{turn.text}"


def _plain(turns: list[Turn]) -> list[str | Marker]:
  if len(turns) > 1:
    raise ValueError(f"the plain template has no turns, got {len(turns)}: use template 'gemma'")
  return [with_system(turns[0]).removeprefix("<bos>")]


_START, _END = Marker("<start_of_turn>"), Marker("<end_of_turn>")


def _gemma(turns: list[Turn]) -> list[str | Marker]:
  parts: list[str | Marker] = []
  for turn in turns:
    text, system = turn.text.removeprefix("<bos>").strip(), turn.system
    text = with_system(Turn(turn.role, text, system and system.removeprefix("<bos>")))
    parts += [_START, f"{turn.role}\n{text}", _END, "\n"]
  return [*parts, _START, "model\n"]


_GEMMA_JINJA = """\
{%- macro text(message) -%}
  {%- if message.content is string -%}{{ message.content }}
  {%- else -%}{%- for part in message.content -%}{{ part.text | trim }}{%- endfor -%}{%- endif -%}
{%- endmacro -%}
{%- set with_system = messages[0].role == "system" -%}
{{ bos_token }}
{%- for message in (messages[1:] if with_system else messages) -%}
  {%- set role = "model" if loop.index0 % 2 else "user" -%}
  {%- if message.role not in (role, "assistant" if role == "model" else role) -%}
    {{ raise_exception("turns must alternate: user, assistant, user, ...") }}
  {%- endif -%}
  {{ "<start_of_turn>" + role + "\n" }}
  {%- if loop.first and with_system -%}{{ text(messages[0]) + "\n\n" }}{%- endif -%}
  {{ text(message) | trim + "<end_of_turn>\n" }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ "<start_of_turn>model\n" }}{%- endif -%}
"""

_TURN, _TURN_END = Marker("<|turn>"), Marker("<turn|>")
_CHANNEL, _CHANNEL_END = Marker("<|channel>"), Marker("<channel|>")
_TOOL_RESPONSE = Marker("<|tool_response>")  # where a model waits for a tool


def _answer(text: str) -> str:
  """Returns what a model said without what it thought, as in Gemma 4's template."""
  said = text.split(_CHANNEL_END.piece)
  return "".join(part.split(_CHANNEL.piece)[0] for part in said).strip()


def _gemma4(turns: list[Turn]) -> list[str | Marker]:
  said = [(turn.role, turn.text.removeprefix("<bos>")) for turn in turns]
  if turns[0].system is not None:
    said.insert(0, ("system", turns[0].system.removeprefix("<bos>")))
  parts: list[str | Marker] = []
  for role, text in said:
    text = _answer(text) if role == "model" else text.strip()
    parts += [_TURN, f"{role}\n{text}", _TURN_END, "\n"]
  return [*parts, _TURN, "model\n"]


def _without_thinking(turns: list[Turn]) -> list[str | Marker]:
  return [*_gemma4(turns), _CHANNEL, "thought\n", _CHANNEL_END]


_GEMMA4_JINJA = """\
{%- macro text(message) -%}
  {%- if message.content is string -%}{{ message.content }}
  {%- else -%}{%- for part in message.content -%}{{ part.text | trim }}{%- endfor -%}{%- endif -%}
{%- endmacro -%}
{%- macro answer(text) -%}
  {%- for part in text.split("<channel|>") -%}{{ part.split("<|channel>")[0] }}{%- endfor -%}
{%- endmacro -%}
{{ bos_token }}
{%- set with_system = messages[0].role == "system" -%}
{%- if with_system -%}
  {{ "<|turn>system\n" + text(messages[0]) | trim + "<turn|>\n" }}
{%- endif -%}
{%- for message in (messages[1:] if with_system else messages) -%}
  {%- set role = "model" if loop.index0 % 2 else "user" -%}
  {%- if message.role not in (role, "assistant" if role == "model" else role) -%}
    {{ raise_exception("turns must alternate: user, assistant, user, ...") }}
  {%- endif -%}
  {%- set said = answer(text(message)) if role == "model" else text(message) -%}
  {{ "<|turn>" + role + "\n" + said | trim + "<turn|>\n" }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ "<|turn>model\n" }}{%- endif -%}
"""
_GEMMA4 = Template(
  _gemma4, _answer, (_TURN, _TURN_END, _CHANNEL, _CHANNEL_END, _TOOL_RESPONSE),
  stops=(_TOOL_RESPONSE, _TURN_END), opening=(_TURN, "user\n"),
  thought=(_CHANNEL, _CHANNEL_END), jinja=_GEMMA4_JINJA,
)  # fmt: skip
_NO_THOUGHT = "<|turn>model\n<|channel>thought\n<channel|>"

TEMPLATES = {
  "plain": Template(_plain),
  "gemma": Template(
    _gemma, str.strip, (_START, _END), (_END,), opening=(_START, "user\n"), jinja=_GEMMA_JINJA
  ),
  "gemma4": _GEMMA4,
  # The larger models of this form are asked with a thought that is empty and closed.
  "gemma4_large": _GEMMA4._replace(
    render=_without_thinking, jinja=_GEMMA4_JINJA.replace("<|turn>model\n", _NO_THOUGHT)
  ),
}

_OPENS = r"(?:<start_of_turn>|<\|turn>)"
TURN = re.compile(rf"{_OPENS}(system|user|model)\n")  # how a turn starts, in any template
# A text with a template already applied: it opens a turn, or ends like a response.
_TEMPLATED = re.compile(
  rf"\A\s*(?:<bos>\s*)?{_OPENS}|{TURN.pattern}|<(?:end_of_turn|turn\||eos)>\s*\Z"
)


def check_untemplated(text: str) -> None:
  """Raises ValueError if a text already has the template."""
  if "<" in text and (found := _TEMPLATED.search(text)):
    raise ValueError(
      f"{shorten(text)} already has the chat template ({found[0].strip()!r}), which is added here:"
      " give plain text, or a conversation as 'messages'"
    )


def turns(messages: list[dict]) -> list[Turn]:
  """Checks a conversation that waits for an answer, and returns its turns.

  Roles are "system", "user", and "assistant" or "model". A system message may only come first; it
  belongs to the first turn. User and model alternate, and the
  user speaks last. A content is text or a list of parts, {"type": "text", "text": ...}.

  Raises:
    ValueError: names the message that breaks the rules.
  """
  names = {"system": "system", "user": "user", "assistant": "model", "model": "model"}
  conversation: list[Turn] = []
  system: str | None = None
  for i, message in enumerate(messages):
    fields = message if isinstance(message, dict) else {}
    role, text = fields.get("role"), text_of(fields.get("content"))
    if not isinstance(role, str) or role not in names or text is None:
      expected = f"a text 'content' and a 'role' of {', '.join(names)}"
      raise ValueError(f"message {i} is {shorten(message)}: expected {expected}")
    if role == "system" and i == 0:
      system = text
      continue
    expected = "model" if len(conversation) % 2 else "user"
    if names[role] != expected:
      raise ValueError(f"message {i} has role {role!r}, expected {expected!r}: turns alternate")
    conversation.append(Turn(expected, text, None if conversation else system))
  if not conversation or conversation[-1].role != "user":
    raise ValueError("a conversation must end with a user's message")
  return conversation


def text_of(content: Any) -> str | None:
  """Returns a message's text, with parts joined as in Gemma's template; None if it is not text."""
  if not isinstance(content, list):
    return content if isinstance(content, str) else None
  parts = [part.get("text") if isinstance(part, dict) else None for part in content]
  texts = [part.strip() for part in parts if isinstance(part, str)]
  return "".join(texts) if 0 < len(texts) == len(parts) else None

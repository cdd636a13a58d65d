"""Chat templates, which turn a conversation that waits for an answer into text and marker pieces.

To add a template, add an entry to TEMPLATES.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from nash_jax.data.files import shorten


class Turn(NamedTuple):
  """One turn of a conversation; `system` goes before the user's first text."""

  role: str  # "user" or "model"
  text: str
  system: str = ""


class Marker(NamedTuple):
  """A special piece of the tokenizer, identified by its spelling."""

  piece: str


class Template(NamedTuple):
  """A chat template.

  Attributes:
    render: turns -> texts and markers after <bos>, up to the start of a response.
    response: a response's text -> the form it has in the template.
    markers: all markers of the template; the tokenizer must have them.
    stops: the markers that end a response, besides <eos>; data use the last one.
    opening: what starts a turn of the user; None if the template has no turns.
    jinja: the same template with <bos>, for programs that read a Hugging Face folder.
  """

  render: Callable[[list[Turn]], list[str | Marker]]
  response: Callable[[str], str] = str
  markers: tuple[Marker, ...] = ()
  stops: tuple[Marker, ...] = ()
  opening: tuple[Marker, str] | None = None
  jinja: str = ""


def _plain(turns: list[Turn]) -> list[str | Marker]:
  if len(turns) > 1:
    raise ValueError(f"the plain template has no turns, got {len(turns)}: use template 'gemma'")
  return [(turns[0].system + turns[0].text).removeprefix("<bos>")]


_START, _END = Marker("<start_of_turn>"), Marker("<end_of_turn>")


def _gemma(turns: list[Turn]) -> list[str | Marker]:
  parts: list[str | Marker] = []
  for turn in turns:
    text = turn.system.removeprefix("<bos>") + turn.text.removeprefix("<bos>").strip()
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

TEMPLATES = {
  "plain": Template(_plain),
  "gemma": Template(
    _gemma, str.strip, (_START, _END), (_END,), opening=(_START, "user\n"), jinja=_GEMMA_JINJA
  ),
}

# A text with a template already applied: it opens a turn, or ends like a response.
_TEMPLATED = re.compile(
  r"\A\s*(?:<bos>\s*)?<start_of_turn>|<start_of_turn>(?:user|model)\n|<(?:end_of_turn|eos)>\s*\Z"
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

  Roles are "system", "user", and "assistant" or "model". A system message may only come first; a
  blank line joins it to the first user turn, as Gemma expects. User and model alternate, and the
  user speaks last. A content is text or a list of parts, {"type": "text", "text": ...}.

  Raises:
    ValueError: names the message that breaks the rules.
  """
  names = {"system": "system", "user": "user", "assistant": "model", "model": "model"}
  conversation: list[Turn] = []
  system = ""
  for i, message in enumerate(messages):
    fields = message if isinstance(message, dict) else {}
    role, text = fields.get("role"), text_of(fields.get("content"))
    if not isinstance(role, str) or role not in names or text is None:
      expected = f"a text 'content' and a 'role' of {', '.join(names)}"
      raise ValueError(f"message {i} is {shorten(message)}: expected {expected}")
    if role == "system" and i == 0:
      system = text + "\n\n"
      continue
    expected = "model" if len(conversation) % 2 else "user"
    if names[role] != expected:
      raise ValueError(f"message {i} has role {role!r}, expected {expected!r}: turns alternate")
    conversation.append(Turn(expected, text, "" if conversation else system))
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

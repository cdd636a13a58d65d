"""Chat templates: how a conversation that waits for an answer becomes text and marker pieces.

A new template is an entry of TEMPLATES.
"""

from collections.abc import Callable
from typing import NamedTuple

Turn = tuple[str, str]  # (role, "user" or "model"; text)


class Marker(NamedTuple):
  """A special piece of the tokenizer, looked up by its spelling."""

  piece: str


class Template(NamedTuple):
  """A chat template.

  Attributes:
    render: from turns to the texts and markers that follow <bos>, up to where a response begins.
    markers: all markers that it uses; the tokenizer must have them.
    stops: the markers that end a response, besides <eos>; the last one ends a response in data.
  """

  render: Callable[[list[Turn]], list[str | Marker]]
  markers: tuple[Marker, ...] = ()
  stops: tuple[Marker, ...] = ()


def _plain(turns: list[Turn]) -> list[str | Marker]:
  if len(turns) > 1:
    raise ValueError(f"the plain template has no turns, got {len(turns)}: use template 'gemma'")
  return [turns[0][1].removeprefix("<bos>")]


_START, _END = Marker("<start_of_turn>"), Marker("<end_of_turn>")


def _gemma(turns: list[Turn]) -> list[str | Marker]:
  parts: list[str | Marker] = []
  for role, content in turns:
    parts += [_START, f"{role}\n{content.removeprefix('<bos>').strip()}", _END, "\n"]
  return [*parts, _START, "model\n"]


TEMPLATES = {"plain": Template(_plain), "gemma": Template(_gemma, (_START, _END), stops=(_END,))}


def turns(messages: list[dict]) -> list[Turn]:
  """Checks a conversation that waits for an answer, and returns its turns.

  Roles are "system" (first only, joined to the first user turn by a blank line, as Gemma expects),
  "user", and "assistant" or "model"; user and model alternate, and the user speaks last.

  Raises:
    ValueError: naming the message that breaks the rules.
  """
  names = {"system": "system", "user": "user", "assistant": "model", "model": "model"}
  conversation: list[Turn] = []
  system = ""
  for i, message in enumerate(messages):
    fields = message if isinstance(message, dict) else {}
    role, content = fields.get("role"), fields.get("content")
    if role not in names or not isinstance(content, str):
      expected = f"a text 'content' and a 'role' of {', '.join(names)}"
      raise ValueError(f"message {i} is {message!r}: expected {expected}")
    if role == "system" and i == 0:
      system = content.strip() + "\n\n"
      continue
    expected = "model" if len(conversation) % 2 else "user"
    if names[role] != expected:
      raise ValueError(f"message {i} has role {role!r}, expected {expected!r}: turns alternate")
    conversation.append((expected, content if conversation else system + content))
  if not conversation or conversation[-1][0] != "user":
    raise ValueError("a conversation must end with a message of the user")
  return conversation

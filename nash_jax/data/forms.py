"""Records as other programs and data sets have them, told by their fields, turned into ours.

docs/data.md lists the forms. What is in no form is left as it is, for the reader of our own to
refuse.
"""

import itertools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from nash_jax.data.chat_template import text_of
from nash_jax.data.corpus import field, has, number
from nash_jax.data.files import shorten

Record = dict[str, Any]
# What OpenAssistant and ShareGPT call the two; ShareGPT has "from" and "value" in a message.
_ROLES = {"prompter": "user", "human": "user", "gpt": "assistant", "model": "assistant"}


class Form(NamedTuple):
  """A form of comparisons.

  Attributes:
    fields: what a record of it has, and no other form's before it in FORMS.
    turn: from such a record to one of ours: "prompt" or "messages", and two responses with who won.
  """

  fields: tuple[str, ...]
  turn: Callable[[Record], Record]


def comparison(record: Any) -> Any:
  """Returns a comparison of any form in FORMS as one of ours; others as they are.

  Raises:
    ValueError: a record that has a form's fields, and values that the form does not have.
  """
  for form in FORMS.values() if isinstance(record, dict) else ():
    if all(has(record, name) for name in form.fields):
      return form.turn(record)
  return record


def demonstration(record: Any) -> Any:
  """Returns a prompt and its completion, or a whole conversation, as "messages" and "response".

  Raises:
    ValueError: a completion that is labelled as bad.
  """
  if has(record, "response"):
    return record
  if has(record, "completion"):
    if record.get("label") is False:
      raise ValueError("field 'label' is false, expected a completion to learn from; skip it")
    return {**record, "response": record["completion"]}
  messages = record.get("messages") if isinstance(record, dict) else None
  if not has(record, "prompt") and isinstance(messages, list) and messages:
    *asked, last = _renamed(messages)
    if isinstance(last, dict) and last["role"] == "assistant":
      return {**record, "messages": asked, "response": [last]}
  return record


def with_prompt(record: Any) -> Any:
  """Returns a record as it is, or, where it has no prompt of its own, that of its comparison."""
  return record if has(record, "prompt") or has(record, "messages") else comparison(record)


def _chosen(record: Record) -> Record:
  """TRL's preferences; Anthropic's transcripts; conversations that repeat their prompt."""
  chosen, rejected = (field(record, name, (str, list)) for name in ("chosen", "rejected"))
  if isinstance(chosen, str) != isinstance(rejected, str):
    raise ValueError("of 'chosen' and 'rejected' one is a text and one a list: expected two alike")
  given = has(record, "prompt") or has(record, "messages")
  if isinstance(chosen, str):
    if given:
      prompt = record.get("prompt")
      return {**record, "prompt": _renamed(prompt)} if isinstance(prompt, list) else record
    chosen, rejected = (_transcript(field(record, name), name) for name in ("chosen", "rejected"))
  else:
    chosen, rejected = _messages(chosen), _messages(rejected)
  pairs = enumerate(zip(chosen, rejected, strict=False))
  # Where they are the same conversation, or one goes on, its last message is the response.
  last = min(len(chosen), len(rejected)) - 1
  shared = chosen[: next((i for i, (a, b) in pairs if a != b or i == last), 0)]
  ends = {"chosen": chosen[len(shared) :], "rejected": rejected[len(shared) :]}
  for name, end in ends.items():
    if len(end) != 1 or end[0].get("role") != "assistant":
      roles = ", ".join(str(message.get("role")) for message in end) or "nothing"
      raise ValueError(
        f"field {name!r}: expected one message of the assistant behind what 'chosen' and"
        f" 'rejected' share, got {roles}; docs/data.md has the forms"
      )
  rest = {k: v for k, v in record.items() if k not in ("prompt", "messages", "chosen", "rejected")}
  return {**rest, "messages": _joined(record, shared), **ends}


def _joined(record: Record, shared: list[Record]) -> list[Record]:
  """Returns the conversation before the responses: the given prompt, then what they share."""
  if has(record, "prompt"):
    prompt = field(record, "prompt", (str, list))
  else:
    prompt = field(record, "messages", list) if has(record, "messages") else []
  if isinstance(prompt, list):
    given = _messages(prompt)
    # UltraFeedback's `messages` are the chosen conversation.
    if not shared:
      return given
    if shared == given[: len(shared)] and given[-1]["role"] == "assistant":
      return shared
    return shared if shared[: len(given)] == given else [*given, *shared]
  users = [text_of(message.get("content")) for message in shared if message.get("role") == "user"]
  if not shared:
    return [{"role": "user", "content": prompt}]
  if prompt not in users:
    raise ValueError(
      f"field 'prompt' is {shorten(prompt)}, and no turn of the user in 'chosen': expected one of"
      " its turns, or responses alone in 'chosen' and 'rejected'"
    )
  return shared


def _renamed(values: list[Any]) -> list[Any]:
  """Returns messages with our names of fields and roles; what is no message is left to `turns`."""
  messages = []
  for value in values:
    if isinstance(value, dict):
      role = value.get("role", value.get("from"))
      content = next((value[name] for name in ("content", "value", "text") if name in value), None)
      role = _ROLES.get(role, role) if isinstance(role, str) else role
      messages.append({"role": role, "content": content})
    else:
      messages.append(value)
  return messages


def _messages(values: list[Any]) -> list[Record]:
  """Returns messages as _renamed does.

  Raises:
    ValueError: something else among them.
  """
  messages = _renamed(values)
  for i, message in enumerate(messages):
    good = isinstance(message, dict) and isinstance(message["role"], str)
    if not good or text_of(message["content"]) is None:
      got = shorten(values[i])
      raise ValueError(f"message {i} is {got}: expected a 'role' and a text 'content'")
  return messages


_TURN = re.compile(r"\n\n(Human|Assistant):")


def _transcript(text: str, name: str) -> list[Record]:
  """Returns the messages of Anthropic's "\\n\\nHuman: ...\\n\\nAssistant: ..."."""
  before, *parts = _TURN.split(text)
  if before.strip() or not parts:
    raise ValueError(
      f"field {name!r} is {shorten(text)}, and there is no 'prompt': expected a transcript that"
      " begins with '\\n\\nHuman:', a list of messages, or the prompt in a field of its own"
    )
  roles = {"Human": "user", "Assistant": "assistant"}
  messages = [
    {"role": roles[who], "content": said.strip()} for who, said in itertools.batched(parts, 2)
  ]
  for i, message in enumerate(messages):
    if message["role"] != ("assistant" if i % 2 else "user"):
      raise ValueError(f"field {name!r}, turn {i}: two turns of the {message['role']} in a row")
    if not message["content"]:
      raise ValueError(f"field {name!r}, turn {i}: an empty turn of the {message['role']}")
  return messages


def _strength(first: str, second: str, name: str) -> Callable[[Record], Record]:
  """Returns a form's `turn`: two responses, and a number above 0 where the second is better."""

  def turn(record: Record) -> Record:
    score = number(record, name)
    return _pair(record, first, second, 0.5 if score == 0 else float(score < 0))

  return turn


def _pair(record: Record, first: str, second: str, p_a: float) -> Record:
  name = "context" if has(record, "context") else "prompt"
  prompt = field(record, name, (str, list))
  if isinstance(prompt, str) and "<extra_id_1>" in prompt:
    raise ValueError(f"field {name!r} holds '<extra_id_1>': several turns in one text are not read")
  asked = {"prompt": prompt} if isinstance(prompt, str) else {"messages": _messages(prompt)}
  sides = {"response_a": field(record, first), "response_b": field(record, second)}
  return {**asked, **sides, "p_a": p_a}


def _annotated(record: Record) -> Record:
  """PandaLM's: annotators say 1, 2, or 0 for a tie."""
  votes = [number(record, name) for name in record if re.fullmatch(r"annotator\d+", name)]
  for vote in votes:
    if vote not in (0, 1, 2):
      raise ValueError(f"an annotator says {vote:g}: expected 1, 2, or 0 for a tie")
  given = record["input"] if has(record, "input") else ""
  if not isinstance(given, str):
    raise ValueError(f"field 'input' is {shorten(given)}, expected a text")
  prompt = "\n\n".join(text for text in (field(record, "instruction"), given) if text.strip())
  sides = {"response_a": field(record, "response1"), "response_b": field(record, "response2")}
  counts = {"votes_a": votes.count(1), "votes_b": votes.count(2), "ties": votes.count(0)}
  return {"prompt": prompt, **sides, **counts}


# By data set or program; the first whose fields a record has.
FORMS = {
  "chosen and rejected (TRL, HH, UltraFeedback)": Form(("chosen", "rejected"), _chosen),
  "HelpSteer3": Form(
    ("context", "response1", "response2", "overall_preference"),
    _strength("response1", "response2", "overall_preference"),
  ),
  "HelpSteer2": Form(
    ("prompt", "response_1", "response_2", "preference_strength"),
    _strength("response_1", "response_2", "preference_strength"),
  ),
  "PandaLM": Form(("instruction", "response1", "response2", "annotator1"), _annotated),
}

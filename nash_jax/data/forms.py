"""Recognises records of other programs and data sets by their fields, and turns them into ours.

docs/data.md lists the forms. Other records stay as they are; the reader of our own form then
refuses them.
"""

import collections
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from nash_jax.data.chat_template import text_of
from nash_jax.data.corpus import field, has, number
from nash_jax.data.files import Placed, Skip, placed, shorten

Record = dict[str, Any]
Counts = collections.Counter[str]  # {reason: number left out}
# Names of the roles in OpenAssistant and ShareGPT, whose messages have "from" and "value".
_ROLES = {"prompter": "user", "human": "user", "gpt": "assistant", "model": "assistant"}


class Form(NamedTuple):
  """A form of comparisons.

  Attributes:
    fields: the fields that identify it; the first form of FORMS and RATED with all fields counts.
    turn: such a record -> one of ours: "prompt" or "messages", two responses and the winner.
  """

  fields: tuple[str, ...]
  turn: Callable[[Record], Record]


class Rated(NamedTuple):
  """A form of responses that are rated one by one; two responses to a prompt make a comparison.

  Attributes:
    fields: as in Form.
    read: a record -> the parts that `groups` needs.
    groups: (those parts of all records with their places, counts to update) -> the responses to
      each prompt.
    ties: whether two equal ratings are a tie; otherwise they make no comparison.
  """

  fields: tuple[str, ...]
  read: Callable[[Record], Any]
  groups: Callable[[Iterable[Placed], Counts], Iterator["Group"]]
  ties: bool = True


class Group(NamedTuple):
  """A prompt, as "prompt" or "messages", and the responses to it.

  Attributes:
    place: the prompt's place.
    responses: (place, text or message, rating) of each response.
  """

  place: str
  asked: Record
  responses: list[tuple[str, Any, float]]


def name_of(record: Any) -> str:
  """Returns the name of a record's form of comparisons, or ""."""
  found = (name for name, fields in _FIELDS if all(has(record, field) for field in fields))
  return next(found, "")


def comparison(record: Any) -> Any:
  """Returns a comparison of any form in FORMS as one of ours; other records are unchanged.

  Raises:
    ValueError: a record with a form's fields but invalid values.
  """
  form = FORMS.get(name_of(record))
  return form.turn(record) if form else record


def comparisons(rows: Iterable[Placed], skip: Skip | None, left_out: Counts) -> Iterator[Placed]:
  """Yields records, with rated responses replaced by their comparisons.

  Args:
    skip: called with the reason for each record that cannot be read, which is then left out; None
      raises it.
    left_out: counts prompts without a comparison.
  """
  for form, run in _runs(rows, name_of):
    if form is None:
      yield from run
      continue
    for _, asked, responses in form.groups(_read(form, run, skip), left_out):
      count = 0
      for (place, a, rating), (other, b, lower) in itertools.combinations(responses, 2):
        if rating != lower or form.ties:
          p_a = 0.5 if rating == lower else float(rating > lower)
          where = place if place == other else f"{place} and {other}"
          yield where, {**asked, "response_a": a, "response_b": b, "p_a": p_a}
          count += 1
      if not count:
        left_out["prompts without two responses of which one is better"] += 1


def prompts(rows: Iterable[Placed], skip: Skip | None, left_out: Counts) -> Iterator[Placed]:
  """Yields records, with rated responses that have no field for their prompt replaced by prompts.

  Args:
    skip, left_out: as in `comparisons`.
  """

  def name(record: Any) -> str:
    task, form = described(record)
    own = form in RATED and any(
      isinstance(record.get(x), str | list) for x in ("prompt", "messages")
    )
    return form if task and not own else task

  for form, run in _runs(rows, name):
    groups = form.groups(_read(form, run, skip), left_out) if form else ()
    yield from run if form is None else ((place, asked) for place, asked, _ in groups)


def _runs(
  rows: Iterable[Placed], name: Callable[[Any], str]
) -> Iterator[tuple[Rated | None, Iterator[Placed]]]:
  """Yields consecutive records of one form of rated responses, or of none."""
  last: Rated | None = None

  def form_of(row: Placed) -> Rated | None:
    nonlocal last
    found = name(row[1])
    # A record of no form counts to the previous form, whose error names the missing field.
    last = RATED.get(found) if found else last
    return last

  yield from itertools.groupby(rows, form_of)


def _read(form: Rated, rows: Iterable[Placed], skip: Skip | None) -> Iterator[Placed]:
  """Yields the parts of each record that a form needs."""
  for place, record in rows:
    try:
      yield place, form.read(record)
    except ValueError as error:
      if skip is None:
        raise placed(place, error) from None
      skip(placed(place, error))


def described(record: Any) -> tuple[str, str]:
  """Returns the task that a record is for ("" for none), and the name of its form."""
  if name := name_of(record):
    return "preferences", name
  if document := _document(record):
    return "responses" if has(record, "summary") else "prompts", _DOCUMENTS[document]
  if has(record, "completions") and has(record, "labels"):
    return "", "labelled steps (TRL, stepwise), which are not supported"
  if has(record, "response") or has(record, "completion"):
    return "responses", "prompts with a response"
  if _answered(record):
    return "responses", "conversations that end with an answer"
  if isinstance(record, dict) and record.get("context_messages"):
    return "prompts", "context_messages (RLHFlow)"
  if isinstance(record, str):
    return "prompts", "texts as prompts"
  for names, task, form in (
    (("prompt", "messages"), "prompts", "prompts"),
    (("instruction",), "prompts", "instructions"),
    (("text",), "text", "texts"),
  ):
    if any(has(record, name) for name in names):
      return task, form
  return "", "of no known form"


def demonstration(record: Any) -> Any:
  """Returns a demonstration with the text to learn in "response".

  It may be a prompt with its completion, a conversation, an instruction with its output as in
  Alpaca, or a document with its summary.

  Raises:
    ValueError: a completion that is labelled as bad; a prompt that is not the conversation's.
  """
  if _document(record) and has(record, "summary"):
    return {"prompt": _to_summarise(record), "response": _summary(record, "summary")}
  if has(record, "response"):
    return _our_names(record)
  if has(record, "completion"):
    if record.get("label") is False:
      raise ValueError("field 'label' is false, expected a completion to learn from; skip it")
    return {**_our_names(record), "response": record["completion"]}
  if messages := _answered(record):
    *asked, last = messages
    said = [text_of(x.get("content")) for x in asked if isinstance(x, dict)]
    if has(record, "prompt") and record["prompt"] not in (*said, "", asked):
      got = shorten(record["prompt"])
      raise ValueError(f"field 'prompt' is {got}, expected what 'messages' say before the answer")
    return {**record, "prompt": None, "messages": asked, "response": [last]}
  if has(record, "instruction") and has(record, "output"):
    return {**_instruction(record), "response": record["output"]}
  return record


def _answered(record: Any) -> list[Any] | None:
  """Returns the messages of a record if the last one is the assistant's."""
  messages = record.get("messages") if isinstance(record, dict) else None
  renamed = _renamed(messages) if isinstance(messages, list) else []
  last = renamed[-1] if renamed else None
  return renamed if isinstance(last, dict) and last.get("role") == "assistant" else None


def with_prompt(record: Any) -> Any:
  """Returns a record with its prompt in "prompt" or "messages"; unchanged if it has none.

  Besides comparisons, this covers RLHFlow's "context_messages", instructions of self-instruct
  (taking the first of "instances") and Alpaca, documents to summarise, and a mere text.

  Raises:
    ValueError: as for `comparison`.
  """
  if isinstance(record, str):
    return {"prompt": record}
  if not isinstance(record, dict):
    return record
  if context := record.get("context_messages"):
    record = {"prompt": context}
  if _document(record):
    return {"prompt": _to_summarise(record)}
  if not has(record, "prompt") and not has(record, "messages"):
    record = comparison(record)
  if not has(record, "prompt") and not has(record, "messages"):
    return _instruction(record) if isinstance(record.get("instruction"), str) else record
  return _our_names(record)


def _our_names(record: Record) -> Record:
  """Returns a record with our names of roles and fields in its prompt's messages."""
  conversations = [x for x in ("prompt", "messages") if isinstance(record.get(x), list)]
  return {**record, **{name: _renamed(record[name]) for name in conversations}}


def _instruction(record: Record) -> Record:
  instances = record.get("instances")
  source = instances[0] if isinstance(instances, list) and instances else record
  given = source.get("input") if isinstance(source, dict) else ""
  parts = (field(record, "instruction"), given if isinstance(given, str) else "")
  return {"prompt": "\n\n".join(part for part in parts if part.strip())}


def _chosen(record: Record) -> Record:
  """TRL's preferences; Anthropic's transcripts; conversations that repeat their prompt."""
  chosen, rejected = (field(record, name, (str, list)) for name in ("chosen", "rejected"))
  if isinstance(chosen, str) != isinstance(rejected, str):
    raise ValueError(
      "of 'chosen' and 'rejected' one is a text and one a list: expected the same kind"
    )
  given = has(record, "prompt") or has(record, "messages")
  if isinstance(chosen, str):
    if given:
      return _our_names(record)
    chosen, rejected = (_transcript(field(record, name), name) for name in ("chosen", "rejected"))
  else:
    chosen, rejected = _messages(chosen), _messages(rejected)
  pairs = enumerate(zip(chosen, rejected, strict=False))
  # If they are the same conversation, or one continues the other, the last message responds.
  last = min(len(chosen), len(rejected)) - 1
  shared = chosen[: next((i for i, (a, b) in pairs if a != b or i == last), 0)]
  ends = {"chosen": chosen[len(shared) :], "rejected": rejected[len(shared) :]}
  for name, end in ends.items():
    if len(end) != 1 or end[0].get("role") != "assistant":
      roles = ", ".join(str(message.get("role")) for message in end) or "nothing"
      raise ValueError(
        f"field {name!r}: expected one message of the assistant after what 'chosen' and"
        f" 'rejected' share, got {roles}; docs/data.md has the forms"
      )
  rest = {k: v for k, v in record.items() if k not in ("prompt", "messages", "chosen", "rejected")}
  return {**rest, "messages": _joined(record, shared), **ends}


def _joined(record: Record, shared: list[Record]) -> list[Record]:
  """Returns the conversation before the responses: the given prompt, then their common start."""
  if has(record, "prompt"):
    prompt = field(record, "prompt", (str, list))
  else:
    prompt = field(record, "messages", list) if has(record, "messages") else []
  if isinstance(prompt, list):
    given = _messages(prompt)
    # In UltraFeedback `messages` is the chosen conversation.
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
      " its turns, or only responses in 'chosen' and 'rejected'"
    )
  return shared


def _renamed(values: list[Any]) -> list[Any]:
  """Returns messages with our names of fields and roles; `turns` refuses other values."""
  messages = []
  for value in values:
    if isinstance(value, dict):
      role = value.get("role", value.get("from"))
      content = next((value[name] for name in ("content", "value", "text") if name in value), None)
      role = _ROLES.get(role, role) if isinstance(role, str) else role
      good = role is not None and content is not None
      messages.append({"role": role, "content": content} if good else value)
    else:
      messages.append(value)
  return messages


def _messages(values: list[Any]) -> list[Record]:
  """Returns messages as _renamed does.

  Raises:
    ValueError: a value that is no message.
  """
  messages = _renamed(values)
  for i, message in enumerate(messages):
    good = isinstance(message, dict) and isinstance(message.get("role"), str)
    if not good or text_of(message.get("content")) is None:
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
  """Returns the `turn` of a form whose number `name` is positive if the second response won."""

  def turn(record: Record) -> Record:
    score = number(record, name)
    return _pair(record, first, second, 0.5 if score == 0 else float(score < 0))

  return turn


def _pair(record: Record, first: str, second: str, p_a: float) -> Record:
  name = "context" if has(record, "context") else "prompt"
  asked = _asked(record, name)
  sides = {"response_a": field(record, first), "response_b": field(record, second)}
  return {**asked, **sides, "p_a": p_a}


def _asked(record: Record, name: str) -> Record:
  """Returns a field that is a prompt as "prompt" or "messages"."""
  prompt = field(record, name, (str, list))
  if isinstance(prompt, str) and "<extra_id_1>" in prompt:
    raise ValueError(
      f"field {name!r} has '<extra_id_1>': several turns in a text are not supported"
    )
  return {"prompt": prompt} if isinstance(prompt, str) else {"messages": _messages(prompt)}


def _annotated(record: Record) -> Record:
  """PandaLM's form: annotators say 1, 2, or 0 for a tie."""
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


# {field with a document to summarise: form}; docs/tldr.md says where the files come from.
_DOCUMENTS = {"post": "Reddit posts (TL;DR)", "document": "articles (XSum)"}


def _document(record: Any) -> str:
  """Returns the field with a record's document to summarise, or ""."""
  known = {"post": has(record, "subreddit"), "document": has(record, "summary")}
  own = has(record, "prompt") or has(record, "messages")
  return next((x for x in _DOCUMENTS if has(record, x) and known[x] and not own), "")


def _to_summarise(record: Record) -> str:
  """Returns the prompt for a summary, in the form of Stiennon et al. (2009.01325)."""
  document = field(record, _document(record)).strip()
  heads = (("SUBREDDIT: r/", "subreddit"), ("TITLE: ", "title"))
  parts = [f"{head}{field(record, name)}" for head, name in heads if has(record, name)]
  return "\n\n".join([*parts, f"POST: {document}", "TL;DR:"])


def _summary(record: Record, name: str) -> str:
  """Returns a summary as it continues "TL;DR:", after a space."""
  return f" {field(record, name).strip()}".rstrip()


def _summaries(record: Record) -> Record:
  """OpenAI's summarize_from_feedback: a post, two summaries, and the number of the better one."""
  post, texts, choice = (
    field(record, "info", dict),
    field(record, "summaries", list),
    record["choice"],
  )
  if not _document(post):
    raise ValueError("field 'info' has no post of a subreddit, as articles of CNN/DM have none")
  if len(texts) != 2 or choice not in (0, 1):
    raise ValueError(f"choice is {shorten(choice)} of {len(texts)} summaries: expected 0 or 1 of 2")
  a, b = (_summary(text, "text") for text in texts)
  return {"prompt": _to_summarise(post), "response_a": a, "response_b": b, "p_a": 1.0 - choice}


def _labelled(record: Record) -> tuple[Record, Any, float]:
  asked, completion = _asked(record, "prompt"), field(record, "completion", (str, list))
  if (label := record.get("label")) not in (False, True):
    raise ValueError(f"field 'label' is {shorten(label)}, expected true or false")
  return asked, completion, float(label)


def _helpful(record: Record) -> tuple[Record, Any, float]:
  return _asked(record, "prompt"), field(record, "response"), _finite(record, "helpfulness")


def _finite(record: Record, name: str) -> float:
  if math.isfinite(value := number(record, name)):
    return value
  raise ValueError(f"field {name!r} is {value:g}, expected a number")


def _by_prompt(rows: Iterable[Placed], left_out: Counts) -> Iterator[Group]:
  """Yields the responses to each prompt, from any of the records."""
  del left_out
  groups: dict[Any, Group] = {}
  for place, (asked, response, rating) in rows:
    key = asked.get("prompt") or (json.dumps(asked, default=str),)
    groups.setdefault(key, Group(place, asked, [])).responses.append((place, response, rating))
  yield from groups.values()


def _completions(record: Record) -> tuple[Record, list[tuple[str, float]]]:
  """UltraFeedback's form: several annotated completions, rated by the mean over aspects."""
  rated = []
  for completion in field(record, "completions", list):
    aspects = [x for x in field(completion, "annotations", dict).values() if isinstance(x, dict)]
    ratings = [float(x["Rating"]) for x in aspects if str(x.get("Rating")).isdecimal()]
    if ratings:
      rated.append((field(completion, "response"), sum(ratings) / len(ratings)))
  return _asked(record, "instruction"), rated


def _in_one(rows: Iterable[Placed], left_out: Counts) -> Iterator[Group]:
  """Yields the responses within one record."""
  del left_out
  for place, (asked, rated) in rows:
    yield Group(place, asked, [(place, response, rating) for response, rating in rated])


class _Message(NamedTuple):
  """A message of OpenAssistant; `name` is its id, and the first message has no `parent`."""

  name: Any
  parent: Any
  role: str
  text: str
  rank: float | None


def _message(record: Record, name: Any, parent: Any) -> _Message | None:
  """Returns a message; None if it is deleted."""
  role, text = _ROLES.get(field(record, "role"), record["role"]), field(record, "text")
  if role not in ("user", "assistant"):
    raise ValueError(f"field 'role' is {shorten(role)}, expected 'prompter' or 'assistant'")
  rank = number(record, "rank") if has(record, "rank") else math.nan
  message = _Message(name, parent, role, text, None if math.isnan(rank) else rank)
  return None if record.get("deleted") else message


def _row(record: Record) -> _Message | None:
  parent = field(record, "parent_id", (str, int)) if has(record, "parent_id") else None
  return _message(record, field(record, "message_id", (str, int)), parent)


def _tree(record: Record) -> list[_Message]:
  """Returns the messages of a tree, without deleted ones and their replies."""
  found: list[_Message] = []
  waiting: list[tuple[Any, Any]] = [(field(record, "prompt", dict), None)]
  for i, (node, parent) in enumerate(waiting):  # the list grows meanwhile
    if message := _message(node, i, parent):
      found.append(message)
      replies = field(node, "replies", list) if has(node, "replies") else []
      waiting += [(reply, i) for reply in replies]
  return found


def _trees(rows: Iterable[Placed], left_out: Counts) -> Iterator[Group]:
  for place, messages in rows:
    yield from _threads([(place, message) for message in messages], left_out)


def _threads(rows: Iterable[Placed], left_out: Counts) -> Iterator[Group]:
  """Yields each user's message, with the messages before it and its ranked replies."""
  messages = {message.name: (place, message) for place, message in rows if message}
  replies = collections.defaultdict(list)
  for place, message in messages.values():
    if message.role == "assistant" and message.rank is not None:
      replies[message.parent].append((place, message.text, -message.rank))
  for place, message in messages.values():
    thread = [message]
    while thread[0].parent in messages and len(thread) <= len(messages):
      thread.insert(0, messages[thread[0].parent][1])
    if thread[0].parent is not None:
      left_out["messages after a deleted or missing one"] += 1
    elif message.role == "user":
      asked = [{"role": earlier.role, "content": earlier.text} for earlier in thread]
      yield Group(place, {"messages": asked}, replies[message.name])


# {data set or program: form}; the first form whose fields a record has counts.
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
  "summaries (OpenAI, TL;DR)": Form(("info", "summaries", "choice"), _summaries),
  "ours": Form(("response_a", "response_b"), _our_names),
}
RATED = {
  "completions with a label (TRL, unpaired)": Rated(
    ("prompt", "completion", "label"), _labelled, _by_prompt, ties=False
  ),
  "rated responses (HelpSteer2)": Rated(
    ("prompt", "response", "helpfulness"), _helpful, _by_prompt
  ),
  "rated completions (UltraFeedback)": Rated(("instruction", "completions"), _completions, _in_one),
  "OpenAssistant's trees": Rated(("message_tree_id", "prompt"), _tree, _trees, ties=False),
  "OpenAssistant's messages": Rated(("message_id", "role", "text"), _row, _threads, ties=False),
}
_FIELDS = [(name, form.fields) for name, form in (FORMS | RATED).items()]

"""Records of every form, and the comparisons that they mean."""

import gzip
import json
import pathlib

import pyarrow
from ml_collections import ConfigDict
from pyarrow import parquet

from nash_jax.data.tokenizer import BUNDLED, Tokenizer


def say(*texts):
  """Returns a conversation: the user's text, the assistant's, and so on."""
  roles = ("user", "assistant")
  return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def answer(text):
  return [{"role": "assistant", "content": text}]


ASKED, PAIR = say("Hi"), {"chosen": answer("Hello."), "rejected": answer("No.")}


OURS = {"messages": ASKED, **PAIR}


LONG = say("Hi", "Hello.", "Sing")


HUMAN = "\n\nHuman: Hi\n\nAssistant: "


JUDGED = {"prompt": "Hi", "response_a": "Hello.", "response_b": "No."}


# Of each form, a record and what it means.
READ = {
  "texts": ({"prompt": "Hi", "chosen": "Hello.", "rejected": "No."},) * 2,
  "ours": ({**JUDGED, "p_a": 0.6},) * 2,
  "conversations": ({"prompt": ASKED, **PAIR}, OURS),
  "an implicit prompt": ({"chosen": say("Hi", "Hello."), "rejected": say("Hi", "No.")}, OURS),
  "a long implicit prompt": (
    {"chosen": [*LONG, *answer("La.")], "rejected": [*LONG, *answer("No.")]},
    {"messages": LONG, "chosen": answer("La."), "rejected": answer("No.")},
  ),
  "UltraFeedback": (
    {
      **{"prompt": "Hi", "prompt_id": "x", "messages": say("Hi", "Hello.")},
      **{"chosen": say("Hi", "Hello."), "rejected": say("Hi", "No."), "score_chosen": 8.0},
    },
    OURS,
  ),
  "a prompt of which the answers go on": (
    {
      "prompt": ASKED,
      "chosen": [*say("Hi", "Hello.", "Sing")[1:], *answer("La.")],
      "rejected": [*say("Hi", "Hello.", "Sing")[1:], *answer("No.")],
    },
    {"messages": LONG, "chosen": answer("La."), "rejected": answer("No.")},
  ),
  "a transcript": ({"chosen": f"{HUMAN}Hello.", "rejected": f"{HUMAN}No. "}, OURS),
  "ShareGPT's messages": (
    {
      "chosen": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}],
      "rejected": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "No."}],
    },
    OURS,
  ),
  "a pair set of RLHFlow": (
    {
      **{"chosen": say("Hi", "Hello."), "rejected": say("Hi", "No.")},
      **{"chosen_score": 4.0, "rejected_score": 1.0},
    },
    OURS,
  ),
  "OpenAssistant's roles": (
    {"prompt": [{"role": "prompter", "text": "Hi"}], "chosen": "Hello.", "rejected": "No."},
    {"prompt": ASKED, "chosen": "Hello.", "rejected": "No."},
  ),
  "HelpSteer3, the first better": (
    {"context": ASKED, "response1": "Hello.", "response2": "No.", "overall_preference": -2},
    {"messages": ASKED, "response_a": "Hello.", "response_b": "No.", "p_a": 1.0},
  ),
  "HelpSteer2, the second better": (
    {"prompt": "Hi", "response_1": "Hello.", "response_2": "No.", "preference_strength": 3},
    {**JUDGED, "p_a": 0.0},
  ),
  "HelpSteer2, a tie": (
    {"prompt": "Hi", "response_1": "Hello.", "response_2": "No.", "preference_strength": 0},
    {**JUDGED, "p_a": 0.5},
  ),
  "PandaLM": (
    {
      **{"instruction": "Repeat", "input": "Hi", "response1": "Hello.", "response2": "No."},
      **{"annotator1": 1, "annotator2": 0, "annotator3": 1, "cmp_key": "x_y"},
    },
    {
      **{"prompt": "Repeat\n\nHi", "response_a": "Hello.", "response_b": "No."},
      **{"votes_a": 2, "votes_b": 0, "ties": 1},
    },
  ),
}  # fmt: skip


# As in the README of openai/summarize-from-feedback.
POST = {"id": "t3_2vwp1w", "subreddit": "cats", "title": "Hi", "post": "Ho \n\nHo\n"}
TL_DR = "SUBREDDIT: r/cats\n\nTITLE: Hi\n\nPOST: Ho \n\nHo\n\nTL;DR:"


def summaries(choice, info=POST, texts=(" Hello.", "No.\n"), confidence=8):
  """Returns a comparison of summaries in OpenAI's form."""
  return {
    **{"info": info, "choice": choice, "worker": "x", "batch": "batch9", "split": "train"},
    "summaries": [{"text": text, "policy": "ref", "note": None} for text in texts],
    "extra": {"confidence": confidence},
  }


for choice, better in enumerate(("first", "second")):
  READ[f"summaries, the {better} better"] = (
    summaries(choice),
    {"prompt": TL_DR, "response_a": " Hello.", "response_b": " No.", "p_a": 1.0 - choice},
  )


TOKENIZER = Tokenizer(BUNDLED, "plain")


def written(folder: pathlib.Path, name: str, rows: list) -> pathlib.Path:
  path, lines = folder / name, "".join(json.dumps(row) + "\n" for row in rows).encode()
  if name.endswith(".parquet"):
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
  else:
    data = json.dumps(rows).encode() if ".json" in path.suffixes else lines
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
  return path


def settings(path, task):
  return ConfigDict(
    {
      **{"task": task, "path": str(path), "max_tokens": 32, "max_response_tokens": 16},
      **{"overflow": "drop", "held_out": 0, "held_out_path": "", "duplicates": "keep"},
      "bad": "stop",
    }
  )


def labelled(prompt, completion, label):
  return {"prompt": prompt, "completion": completion, "label": label}


def message(name, parent, text, **fields):
  role = "prompter" if name[-1] in "02" else "assistant"
  return {"message_id": name, "parent_id": parent, "text": text, "role": role, **fields}


TREE = [
  message("a0", None, "Hi", rank=None),
  message("a1", "a0", "Hello.", rank=1),
  message("b1", "a0", "Yes?", rank=0, deleted=False),
  message("c1", "a0", "gone", rank=2, deleted=True),
  message("d1", "a0", "unranked"),
  message("a2", "b1", "Sing"),
  message("e1", "a2", "La.", rank=2),
  message("f1", "a2", "Lala.", rank=0),
  message("b2", "c1", "Why?"),
]


SANG = say("Hi", "Yes?", "Sing")


def tree(name="a0"):
  """Returns the messages of TREE as one that holds its replies."""
  ours = next(m for m in TREE if m["message_id"] == name)
  replies = [tree(m["message_id"]) for m in TREE if m["parent_id"] == name]
  return {**ours, "replies": replies}


def annotated(text, *ratings):
  return {"response": text, "annotations": {str(i): {"Rating": x} for i, x in enumerate(ratings)}}


# Of each form whose responses are rated one by one: records, the comparisons that they mean as
# (prompt, a, b, P(a is better)), and how often what is left out.
FEW = "prompts without two responses of which one is better"


MISSING = "messages after a deleted or missing one"


RANKED = [(ASKED, "Hello.", "Yes?", 0.0), (SANG, "La.", "Lala.", 0.0)]


GATHERED = {
  "unpaired, of texts": (
    [
      *(labelled("Hi", "Hello.", True), labelled("Ho", "x", True), labelled("Hi", "No.", False)),
      *(labelled("Hi", "Hey.", True), labelled("Ho", "y", True)),
    ],
    [("Hi", "Hello.", "No.", 1.0), ("Hi", "No.", "Hey.", 0.0)],
    {FEW: 1},
  ),
  "unpaired, of messages": (
    [labelled(ASKED, answer("No."), False), labelled(ASKED, answer("Hello."), True)],
    [(ASKED, answer("No."), answer("Hello."), 0.0)],
    {},
  ),
  "HelpSteer2": (
    [
      {"prompt": prompt, "response": response, "helpfulness": rating, "verbosity": 2}
      for prompt, response, rating in (
        *(("Hi", "Hello.", 4), ("Hi", "No.", 0), ("Ho", "x", 3), ("Ho", "y", 3), ("Hm", "z", 1)),
      )
    ],
    [("Hi", "Hello.", "No.", 1.0), ("Ho", "x", "y", 0.5)],
    {FEW: 1},
  ),
  "UltraFeedback": (
    [
      {
        "instruction": "Hi",
        "completions": [
          *(annotated("Hello.", "5", "4"), annotated("No.", "1", "N/A"), annotated("?", "N/A")),
          annotated("Hey.", "4", "5"),
        ],
      }
    ],
    [("Hi", "Hello.", "No.", 1.0), ("Hi", "Hello.", "Hey.", 0.5), ("Hi", "No.", "Hey.", 0.0)],
    {},
  ),
  "OpenAssistant's trees": ([{"message_tree_id": "a0", "prompt": tree()}], RANKED, {}),
  "OpenAssistant's messages": (TREE[::-1], [
    (prompt, b, a, 1 - p) for prompt, a, b, p in reversed(RANKED)], {MISSING: 1}),
}  # fmt: skip

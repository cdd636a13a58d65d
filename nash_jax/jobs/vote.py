"""Serves a page on which people judge pairs of responses; their votes train or are a judge.

All data are in votes.sqlite3 in the workdir, which may be read, exported and added to while the
page is served.
"""

import collections
import json
import os
import pathlib
import secrets
import socket
from collections.abc import Iterable
from typing import Any

from absl import logging
from ml_collections import ConfigDict

from nash_jax.config import resolve
from nash_jax.data import pairs
from nash_jax.data.tokenizer import Tokenizer
from nash_jax.data.votes import FILE, Pair, Store, Vote
from nash_jax.jobs import vote_statistics
from nash_jax.run import files, lock
from nash_jax.validation import file_name, require

TOKEN = "token.txt"  # in the workdir if the page was served to other machines


def run(config: ConfigDict, workdir: str | os.PathLike[str]) -> dict[str, Any]:
  """Serves the page until Ctrl-C, or exports votes; prints and returns the votes' statistics.

  Args:
    config: from nash_jax.config.vote().

  Raises:
    ValueError: a bad config or source, nothing to judge or export, a port in use, a workdir whose
      page is already served.
  """
  config = resolve(config, "vote")
  folder = pathlib.Path(workdir)
  if not config.export:
    folder = files.make_folder(folder)
  options = {"share": config.shared, "votes": config.votes, "seed": config.seed}
  store = Store(folder / FILE, create=not config.export, **options)
  try:
    if config.source:
      tokenizer = Tokenizer(config.model.tokenizer, config.model.template)
      new = store.add(pairs.read(config.source, tokenizer))
      logging.info("%s: %d new pairs", config.source, new)
    if config.export:
      export(store, config.export, config.by)
    else:
      with lock.hold(folder):
        _serve(config, store, folder)
    result = vote_statistics.statistics(store)
  finally:
    store.close()
  print(vote_statistics.text(result))
  return result


def _serve(config: ConfigDict, store: Store, folder: pathlib.Path) -> None:
  from nash_jax.jobs import vote_page  # here, because an export does not need its packages

  number, fix = store.progress()["pairs"], "Give files or folders: nash-jax vote --from=..."
  require(number > 0, str(store.path), "pairs to judge", "none", fix)
  local = config.host in vote_page.LOOPBACK
  token = "" if local else _token(folder)

  def announce(port: int) -> None:
    name = socket.gethostname() if config.host in ("0.0.0.0", "::") else config.host
    address = f"http://{f'[{name}]' if ':' in name else name}:{port}/"
    address += f"?token={token}" if token else ""
    print(f"{number} pairs to judge at\n\n  {address}\n\nCtrl-C stops the server.", flush=True)

  vote_page.serve(vote_page.make_app(store, token), config.host, config.port, announce)


def _token(folder: pathlib.Path) -> str:
  """Returns the token of a workdir, which is created once and readable only by its owner."""
  path = folder / TOKEN
  if not path.exists():
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
      file.write(secrets.token_urlsafe(18) + "\n")
  token = path.read_text(encoding="utf-8").strip()
  require(
    len(token) >= 16, f"{path}", "a token of 16 characters or more", "less", "Delete the file."
  )
  return token


def export(store: Store, output: str, by: str = "all") -> list[pathlib.Path]:
  """Writes votes as preferences for `fit`, with counts and ties, and returns the files.

  A record has the prompt, the responses, `votes_a`, `votes_b` and `ties`. If tokens are known, it
  also has `inputs`, `a`, `b` and `p_a`, so that data.task = tokens can read it. A prompt's records
  are consecutive, so held-out records at the end share at most one prompt with the rest.

  Args:
    output: a .jsonl file.
    by: "all" writes all votes to `output`; "annotator" and "group" write a FILE-NAME.jsonl for
      each.

  Raises:
    ValueError: another kind of file, or no votes.
  """
  fix = "Give --export=FILE.jsonl."
  require(output.endswith(".jsonl"), "export", "a .jsonl file on this machine", output, fix)
  votes, known = store.all_votes(), store.pairs()
  require(bool(votes), str(store.path), "votes to export", "none", "Judge some first.")
  groups: dict[str, list[Vote]] = collections.defaultdict(list)
  for vote in votes:
    groups[{"all": "", "annotator": vote.annotator, "group": vote.kind}[by]].append(vote)
  path, written = pathlib.Path(output), []
  path.parent.mkdir(parents=True, exist_ok=True)
  for name, chosen in sorted(groups.items()):
    ending = "" if by == "all" else f"-{file_name(name or 'none')}"
    written.append(path.with_name(f"{path.stem}{ending}.jsonl"))
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in _records(chosen, known)]
    files.write_text(written[-1], "".join(lines))
    logging.info("%s: %d votes on %d pairs", written[-1], len(chosen), len(lines))
  return written


def _records(votes: Iterable[Vote], known: dict[int, Pair]) -> list[dict[str, Any]]:
  counts: dict[int, collections.Counter[float]] = collections.defaultdict(collections.Counter)
  prompts = {}
  for vote in votes:
    counts[vote.pair][vote.wins] += 1
    prompts[vote.pair] = vote.prompt
  records = []
  for number in sorted(counts, key=lambda number: (prompts[number], number)):
    pair, count = known[number], counts[number]
    record: dict[str, Any] = {
      "prompt" if isinstance(pair.prompt, str) else "messages": pair.prompt,
      "response_a": pair.a.text, "response_b": pair.b.text,
      "votes_a": count[1.0], "votes_b": count[0.0], "ties": count[0.5],
    }  # fmt: skip
    if None not in (pair.ids, pair.a.ids, pair.b.ids):
      p_a = (count[1.0] + count[0.5] / 2) / count.total()
      record |= {"inputs": pair.ids, "a": pair.a.ids, "b": pair.b.ids, "p_a": p_a}
    records.append(record)
  return records

"""People as a judge for the arena, by their votes.

The votes are in a workdir of `nash-jax vote`. Pairs without votes are added there for people to
judge. The same arena then finds their votes, since it draws the same responses again.
"""

import pathlib
import shlex
from collections.abc import Sequence

import numpy as np
from absl import logging
from jax import numpy as jnp

from nash_jax.data import pairs
from nash_jax.data.tokenizer import Tokenizer
from nash_jax.data.votes import FILE, Pair, Store
from nash_jax.judges.base import Judge, pairwise
from nash_jax.run import files
from nash_jax.types import Mean


def make(config, tokenizer: Tokenizer, params=None, mesh=None) -> Judge:
  """Builds the judge of the votes in `config.votes`; see judges.make.

  P is the share of votes, with ties as halves. Two equal texts are a tie that nobody is asked
  about; any other pair without votes is invalid.
  """
  survey = _Survey(config.votes)

  def compare(params, prompts, a, b):
    rows = [
      [ids[shown].tolist() for ids, shown in zip(*map(np.asarray, side), strict=True)]
      for side in ((prompts.tokens, prompts.mask), (a.tokens, a.mask), (b.tokens, b.mask))
    ]
    read = [pairs.of_tokens(tokenizer, *ids) for ids in zip(*rows, strict=True)]
    p, votes = survey.ask(read)
    return p, votes > 0, {"votes": Mean.from_values(jnp.asarray(votes, jnp.float32))}

  return Judge(None, pairwise(compare), survey)


class _Survey:
  """The questions to people during an arena."""

  def __init__(self, workdir: str):
    self._workdir = files.make_folder(workdir)
    self._store = Store(self._workdir / FILE)
    self._missing, self._asked = 0, 0

  def ask(self, read: Sequence[Pair]) -> tuple[np.ndarray, np.ndarray]:
    """Returns P(a ≻ b) and the number of votes; adds pairs without votes to the page."""
    found, missing = [], []
    for pair in read:
      same = pair.a.text == pair.b.text
      found.append((0.5, 1) if same else self._store.p_win(pair.prompt, pair.a.text, pair.b.text))
      if not found[-1][1]:
        missing.append(pair)
    self._store.add(missing)
    self._missing += len(missing)
    self._asked += len(read)
    p, votes = zip(*found, strict=True)
    return np.array(p, np.float32), np.array(votes, np.int32)

  def keep_answers(self, folder: pathlib.Path) -> None:
    """Does nothing: votes are already stored."""

  def finish(self) -> None:
    """Logs how many pairs people still have to judge, and where."""
    self._store.close()
    if not self._missing:
      return
    todo = (
      f"{self._missing} of {self._asked} pairs have no vote yet. Let people judge them with"
      f" `nash-jax vote --workdir={shlex.quote(str(self._workdir))}`; then run this command again"
    )
    if self._missing == self._asked:
      raise ValueError(f"judge human: {todo}.")
    logging.warning("judge human: %s", todo)

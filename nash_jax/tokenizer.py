"""SentencePiece: Gemma's own model or the bundled small one, chat template, stop tokens."""

import json
import pathlib
import re
import tempfile

import numpy as np

from nash_jax import config as configs

BUNDLED = "assets:stories/tokenizer.model"
# Typographic marks are spelled in ASCII by the tokenizer itself, so that a quote is one thing.
_SPELLINGS = {"“": '"', "”": '"', "‘": "'", "’": "'", "–": "-", "—": "-", "…": "..."}
# Pieces that steer a model. What a user types is split inside them, so that it stays text.
_MARKER = r"(?:pad|eos|bos|unk|mask|unused\d+|image_soft_token|(?:start|end)_of_\w+)>"


class Tokenizer:
  """A SentencePiece model with a template for prompts.

  Attributes:
    size: number of pieces; a model may have more rows.
    pad_id, bos_id, eos_id: of <pad>, <bos>, <eos>.
    stop_ids: what ends a response: <eos>, and <end_of_turn> with the gemma template.
  """

  def __init__(self, path: str, template: str):
    """Loads the model; `template` is "gemma" (chat turns) or "plain" (text goes on).

    `path` may be "assets:…", a bundled file.

    Raises:
      ValueError: no such file, a file that is no SentencePiece model, an unknown template, or a
        special piece that the template needs and the model lacks.
    """
    import sentencepiece

    configs.choose("template", template, ("gemma", "plain"))
    path = configs.path(path)
    if not pathlib.Path(path).is_file():
      raise ValueError(f"no tokenizer file {path!r}: give the path of a SentencePiece .model file")
    try:
      self._model = sentencepiece.SentencePieceProcessor(model_file=path)
    except RuntimeError as error:
      raise ValueError(f"{path!r} is not a SentencePiece model: {error}") from error
    self.path, self.template = path, template
    self.size = self._model.get_piece_size()
    self.pad_id, self.eos_id, self.bos_id = map(self.id_of, ("<pad>", "<eos>", "<bos>"))
    self.stop_ids = (self.eos_id,)
    if template == "gemma":
      self._start, self._end = self.id_of("<start_of_turn>"), self.id_of("<end_of_turn>")
      self.stop_ids = (self.eos_id, self._end)

  def id_of(self, piece: str) -> int:
    """Returns the id of a piece, or raises ValueError where the model has no such piece."""
    i = self._model.piece_to_id(piece)
    if self._model.id_to_piece(i) != piece:
      raise ValueError(f"the tokenizer {self.path!r} has no piece {piece!r}")
    return i

  def check_rows(self, rows: int) -> None:
    """Raises ValueError where a model with `rows` vocabulary rows cannot hold every piece."""
    if self.size > rows:
      raise ValueError(
        f"the tokenizer {self.path!r} has {self.size} pieces, the model only {rows} vocabulary "
        "rows: use the tokenizer that the model was trained with"
      )

  def forbidden(self, rows: int) -> np.ndarray:
    """Returns bool[rows], true for ids never to sample: markers, unused pieces, rows of no piece.

    Stop tokens are allowed.
    """
    self.check_rows(rows)
    banned, of = np.ones(rows, bool), self._model
    for i in range(self.size):
      marker = re.fullmatch("<" + _MARKER, of.id_to_piece(i)) is not None
      banned[i] = marker or of.is_control(i) or of.is_unused(i) or of.is_unknown(i)
    banned[list(self.stop_ids)] = False
    return banned

  def encode(self, text: str) -> list[int]:
    """Returns the ids of a text as written: nothing added, and no marker read out of it."""
    return [i for part in re.split(f"(?<=<)(?={_MARKER})", text) for i in self._model.encode(part)]

  def decode(self, ids) -> str:
    """Returns the text of ids, without pad, <bos> and stop tokens."""
    skipped = {self.pad_id, self.bos_id, *self.stop_ids}
    return self._model.decode([int(i) for i in ids if int(i) not in skipped])

  def prompt(self, text: str | list[dict]) -> list[int]:
    """Returns the ids of a prompt: one <bos>, the template, and where a response would begin.

    Args:
      text: one user's text, or messages {"role", "content"} (see the function `turns`). A <bos>
        spelled out at a head is dropped, since one is added.

    Raises:
      ValueError: a conversation that breaks the rules, or several turns with the plain template.
    """
    said = turns(text) if isinstance(text, list) else [("user", text)]
    if self.template == "plain":
      if len(said) > 1:
        raise ValueError(f"the plain template has no turns, got {len(said)}: use template 'gemma'")
      return [self.bos_id, *self.encode(said[0][1].removeprefix("<bos>"))]
    ids = [self.bos_id]
    for role, content in said:
      content = content.removeprefix("<bos>").strip()
      ids += [self._start, *self.encode(f"{role}\n{content}"), self._end, *self.encode("\n")]
    return [*ids, self._start, *self.encode("model\n")]

  def response(self, text: str) -> list[int]:
    """Returns the ids of a response and the token that stops it."""
    return [*self.encode(text), self.stop_ids[-1]]


def turns(messages: list[dict]) -> list[tuple[str, str]]:
  """Checks a conversation that waits for an answer, and returns its (role, text) turns.

  Roles are "system" (first only, joined to the first user turn by a blank line, as Gemma expects),
  "user", and "assistant" or "model"; user and model alternate, and the user speaks last.

  Raises:
    ValueError: naming the message that breaks the rules.
  """
  names = {"system": "system", "user": "user", "assistant": "model", "model": "model"}
  said, system = [], ""
  for i, message in enumerate(messages):
    known = message if isinstance(message, dict) else {}
    role, content = known.get("role"), known.get("content")
    if role not in names or not isinstance(content, str):
      raise ValueError(
        f"message {i} is {message!r}: expected a text 'content' and a 'role' of {', '.join(names)}"
      )
    if role == "system" and i == 0:
      system = content.strip() + "\n\n"
      continue
    expected = "model" if len(said) % 2 else "user"
    if names[role] != expected:
      raise ValueError(f"message {i} has role {role!r}, expected {expected!r}: turns alternate")
    said.append((expected, content if said else system + content))
  if not said or said[-1][0] != "user":
    raise ValueError("a conversation must end with a message of the user")
  return said


def train(corpus: str, output: str, vocab_size: int = 1024, held_out: int = 600) -> None:
  """Trains a small BPE model with Gemma's special pieces on the `text` field of a JSON-lines file.

  Args:
    corpus: JSON lines, one {"text": ...} each.
    output: path of the `.model` file to write.
    vocab_size: pieces, special ones included.
    held_out: the last lines of the corpus, which are not read.
  """
  import sentencepiece
  from sentencepiece import sentencepiece_model_pb2

  lines = pathlib.Path(corpus).read_text(encoding="utf-8").splitlines()
  texts = [json.loads(line)["text"] for line in lines[: len(lines) - held_out]]
  with tempfile.TemporaryDirectory() as folder:
    rules = pathlib.Path(folder) / "rules.tsv"
    with rules.open("w") as lines:
      for mark, spelling in sorted(_SPELLINGS.items()):
        print(f"{ord(mark):X}", " ".join(f"{ord(c):X}" for c in spelling), sep="\t", file=lines)
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=(line for text in texts for line in text.split("\n")),
      model_prefix=output.removesuffix(".model"),
      model_type="bpe",
      vocab_size=vocab_size,
      normalization_rule_tsv=str(rules),
      remove_extra_whitespaces=False,
      add_dummy_prefix=False,
      character_coverage=0.9999,
      split_digits=True,
      pad_id=0,
      eos_id=1,
      bos_id=2,
      unk_id=3,
      pad_piece="<pad>",
      eos_piece="<eos>",
      bos_piece="<bos>",
      user_defined_symbols=["<start_of_turn>", "<end_of_turn>", "\n"],
      minloglevel=1,
    )
  pathlib.Path(output).with_suffix(".vocab").unlink()
  # The model notes where it was made: without that, the same text gives the same bytes anywhere.
  model = sentencepiece_model_pb2.ModelProto.FromString(pathlib.Path(output).read_bytes())
  model.trainer_spec.ClearField("model_prefix")
  model.normalizer_spec.ClearField("normalization_rule_tsv")
  pathlib.Path(output).write_bytes(model.SerializeToString(deterministic=True))


if __name__ == "__main__":
  import argparse

  parser = argparse.ArgumentParser(description=train.__doc__.splitlines()[0])
  parser.add_argument("corpus")
  parser.add_argument("output")
  parser.add_argument("--vocab_size", type=int, default=1024)
  train(**vars(parser.parse_args()))

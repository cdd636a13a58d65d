"""SentencePiece: Gemma's own model or the bundled small one, chat template, stop tokens."""

import json
import pathlib
import re
import tempfile
from collections.abc import Iterable

import numpy as np
from jaxtyping import Bool

from nash_jax.data.chat_template import TEMPLATES, Marker, turns
from nash_jax.validation import asset_path, one_of

BUNDLED = "assets:stories/tokenizer.model"
# The tokenizer itself spells typographic marks in ASCII, so that every quote is the same piece.
_SPELLINGS = {"“": '"', "”": '"', "‘": "'", "’": "'", "–": "-", "—": "-", "…": "..."}
# Pieces that steer a model. They are split where a user types them, so that they stay text.
_MARKER = r"(?:pad|eos|bos|unk|mask|unused\d+|image_soft_token|(?:start|end)_of_\w+)>"


class Tokenizer:
  """A SentencePiece model with a template for prompts.

  Attributes:
    size: number of pieces; a model may have more rows.
    pad_id, bos_id, eos_id: ids of <pad>, <bos>, <eos>.
    stop_ids: ids that end a response: <eos>, and the template's (<end_of_turn> for gemma).
  """

  def __init__(self, path: str, template: str):
    """Loads the model of `path`, which may be "assets:…", a bundled file.

    Raises:
      ValueError: no such file, a file that is no SentencePiece model, a template that is not in
        chat_template.TEMPLATES, or a special piece that it needs and the model lacks.
    """
    import sentencepiece

    one_of("template", template, TEMPLATES)
    path = asset_path(path)
    if not pathlib.Path(path).is_file():
      raise ValueError(f"no tokenizer file {path!r}: give the path of a SentencePiece .model file")
    try:
      self._model = sentencepiece.SentencePieceProcessor(model_file=path)
    except RuntimeError as error:
      raise ValueError(f"{path!r} is not a SentencePiece model: {error}") from error
    self.path, self.template = path, template
    self.size = self._model.get_piece_size()
    self.pad_id, self.eos_id, self.bos_id = map(self.id_of, ("<pad>", "<eos>", "<bos>"))
    ids = {marker: self.id_of(marker.piece) for marker in TEMPLATES[template].markers}
    self.stop_ids = (self.eos_id, *(ids[marker] for marker in TEMPLATES[template].stops))

  def id_of(self, piece: str) -> int:
    """Returns the id of a piece, or raises ValueError where the model has no such piece."""
    piece_id = self._model.piece_to_id(piece)
    if self._model.id_to_piece(piece_id) != piece:
      raise ValueError(f"the tokenizer {self.path!r} has no piece {piece!r}")
    return piece_id

  def check_rows(self, rows: int) -> None:
    """Raises ValueError where a model with `rows` vocabulary rows cannot hold every piece."""
    if self.size > rows:
      raise ValueError(
        f"the tokenizer {self.path!r} has {self.size} pieces, the model only {rows} vocabulary "
        "rows: use the tokenizer that the model was trained with"
      )

  def forbidden(self, rows: int) -> Bool[np.ndarray, "V"]:
    """Returns bool[rows], true for ids never to sample: markers, unused pieces, rows of no piece.

    Stop tokens are allowed.
    """
    self.check_rows(rows)
    forbidden, model = np.ones(rows, bool), self._model
    for i in range(self.size):
      marker = re.fullmatch("<" + _MARKER, model.id_to_piece(i)) is not None
      forbidden[i] = marker or model.is_control(i) or model.is_unused(i) or model.is_unknown(i)
    forbidden[list(self.stop_ids)] = False
    return forbidden

  def encode(self, text: str) -> list[int]:
    """Returns the ids of a text as written: nothing is added, and no part becomes a marker."""
    return [i for part in re.split(f"(?<=<)(?={_MARKER})", text) for i in self._model.encode(part)]

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text of ids, without pad, <bos> and stop tokens."""
    skipped = {self.pad_id, self.bos_id, *self.stop_ids}
    return self._model.decode([int(i) for i in ids if int(i) not in skipped])

  def prompt(self, text: str | list[dict]) -> list[int]:
    """Returns the ids of a prompt: one <bos>, the template, and where a response would begin.

    Args:
      text: one user's text, or messages {"role", "content"} (see chat_template.turns). A <bos>
        spelled out at a head is dropped, since one is added.

    Raises:
      ValueError: a conversation that breaks the rules, or several turns with the plain template.
    """
    conversation = turns(text) if isinstance(text, list) else [("user", text)]
    ids = [self.bos_id]
    for part in TEMPLATES[self.template].render(conversation):
      ids += [self.id_of(part.piece)] if isinstance(part, Marker) else self.encode(part)
    return ids

  def response(self, text: str) -> list[int]:
    """Returns the ids of a response and the token that stops it."""
    return [*self.encode(text), self.stop_ids[-1]]


def train_tokenizer(corpus: str, output: str, vocab_size: int = 1024, held_out: int = 600) -> None:
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
    with rules.open("w") as file:
      for mark, spelling in sorted(_SPELLINGS.items()):
        print(f"{ord(mark):X}", " ".join(f"{ord(c):X}" for c in spelling), sep="\t", file=file)
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=(line for text in texts for line in text.split("\n")),
      model_prefix=output.removesuffix(".model"), model_type="bpe", vocab_size=vocab_size,
      normalization_rule_tsv=str(rules), remove_extra_whitespaces=False, add_dummy_prefix=False,
      character_coverage=0.9999, split_digits=True, pad_id=0, eos_id=1, bos_id=2, unk_id=3,
      pad_piece="<pad>", eos_piece="<eos>", bos_piece="<bos>",
      user_defined_symbols=["<start_of_turn>", "<end_of_turn>", "\n"], minloglevel=1,
    )  # fmt: skip
  pathlib.Path(output).with_suffix(".vocab").unlink()
  # The model notes where it was made: without that, the same text gives the same bytes anywhere.
  model = sentencepiece_model_pb2.ModelProto.FromString(pathlib.Path(output).read_bytes())
  model.trainer_spec.ClearField("model_prefix")
  model.normalizer_spec.ClearField("normalization_rule_tsv")
  pathlib.Path(output).write_bytes(model.SerializeToString(deterministic=True))


if __name__ == "__main__":
  import argparse

  parser = argparse.ArgumentParser(description="Trains a small BPE model on a JSON-lines file.")
  parser.add_argument("corpus")
  parser.add_argument("output")
  parser.add_argument("--vocab_size", type=int, default=1024)
  train_tokenizer(**vars(parser.parse_args()))

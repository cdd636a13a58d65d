"""SentencePiece tokenizers (Gemma's or the bundled small one), chat template and stop tokens."""

import os
import pathlib
import re
import tempfile
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Bool

from nash_jax.data import files
from nash_jax.data.chat_template import TEMPLATES, Marker, Turn, turns
from nash_jax.validation import asset_path, one_of, require

BUNDLED = "assets:stories/tokenizer.model"
# The trained tokenizer normalises typographic marks to ASCII, so that all quotes are one piece.
_SPELLINGS = {"“": '"', "”": '"', "‘": "'", "’": "'", "–": "-", "—": "-", "…": "..."}
# Pieces that steer a model. If a user types them, they are split so that they stay text.
_MARKER = r"(?:pad|eos|bos|unk|mask|unused\d+|image_soft_token|(?:start|end)_of_\w+)>"
# Further ones where a tokenizer has them: <|x>, <x|> and <|x|>.
_BARRED = r"<(?:\|(?:\w+|\")\|?|\w+\|)>"


# A model's rows are its pieces, padded to a multiple of this; Gemma 2 has 256,128 for 256,000.
SPARE_ROWS = 256


class Tokenizer:
  """A SentencePiece model with a template for prompts.

  Attributes:
    size: number of pieces; a model may have more rows.
    pad_id, bos_id, eos_id: ids of <pad>, <bos>, <eos>.
    stop_ids: ids that end a response: <eos> and the template's (<end_of_turn> for gemma). The last
      one ends responses in data.
  """

  def __init__(self, path: str, template: str):
    """Loads the SentencePiece model at `path`, which may be a bundled file "assets:…".

    Raises:
      ValueError: no such file, no SentencePiece model, a template that is not in
        chat_template.TEMPLATES, or a model that lacks one of its special pieces.
    """
    import sentencepiece

    one_of("template", template, TEMPLATES)
    path = asset_path(path)
    if not os.path.isfile(path):
      raise ValueError(f"no tokenizer file {path!r}: give the path of a SentencePiece .model file")
    data = files.read_bytes(path)
    try:
      if not data:
        raise RuntimeError("the file is empty")
      self._model = sentencepiece.SentencePieceProcessor(model_proto=data)
      self._pieces = [self._model.id_to_piece(i) for i in range(self._model.get_piece_size())]
    except (RuntimeError, UnicodeDecodeError) as error:
      fix = "Give tokenizer.model, not tokenizer.json." if data.lstrip().startswith(b"{") else ""
      reason = " ".join(str(error).split())
      raise ValueError(f"{path!r} is not a SentencePiece model: {reason}. {fix}".strip()) from error
    self.path, self.template, self.size = path, template, len(self._pieces)
    self.pad_id, self.eos_id, self.bos_id = map(self.id_of, ("<pad>", "<eos>", "<bos>"))
    ids = {marker: self.id_of(marker.piece) for marker in TEMPLATES[template].markers}
    self.stop_ids = (self.eos_id, *(ids[marker] for marker in TEMPLATES[template].stops))
    barred = [piece[1:] for piece in self._pieces if re.fullmatch(_BARRED, piece)]
    self._marker = "|".join((_MARKER, *map(re.escape, barred)))

  def id_of(self, piece: str) -> int:
    """Returns the id of a piece; raises ValueError if the model has no such piece."""
    piece_id = self._model.piece_to_id(piece)
    if self._pieces[piece_id] != piece:
      raise ValueError(f"the tokenizer {self.path!r} has no piece {piece!r}")
    return piece_id

  def known(self, pieces: Iterable[str]) -> dict[str, int]:
    """Returns {piece: id} of those that the model has."""
    found = {piece: self._model.piece_to_id(piece) for piece in pieces}
    return {piece: i for piece, i in found.items() if self._pieces[i] == piece}

  def check_rows(self, rows: int) -> None:
    """Raises ValueError unless this can be the tokenizer of a model with `rows` vocabulary rows.

    Every piece needs a row, and padding adds fewer than SPARE_ROWS rows.
    """
    if not self.size <= rows < self.size + SPARE_ROWS:
      few = "only " if rows < self.size else ""
      raise ValueError(
        f"the tokenizer {self.path!r} has {self.size} pieces, the model {few}{rows} vocabulary "
        "rows: use the tokenizer that the model was trained with"
      )

  def forbidden(self, rows: int, markers: Iterable[str] = ()) -> Bool[np.ndarray, "V"]:
    """Returns a mask of the ids never to sample: markers, unused pieces, rows without a piece.

    <eos> may be sampled, and so may the last of the stop tokens.

    Args:
      markers: pieces that may be sampled all the same, such as those around a thought; not <pad>
        and <bos>.
    """
    self.check_rows(min(rows, self.size))
    forbidden, model = np.ones(rows, bool), self._model
    marker = re.compile(f"<(?:{self._marker})")
    for i in range(self.size):
      steers = marker.fullmatch(self._pieces[i]) is not None
      forbidden[i] = steers or model.is_control(i) or model.is_unused(i) or model.is_unknown(i)
    forbidden[[self.eos_id, self.stop_ids[-1], *map(self.id_of, markers)]] = False
    forbidden[[self.pad_id, self.bos_id]] = True
    return forbidden

  def encode(self, text: str) -> list[int]:
    """Returns the ids of a text: nothing is added, and no part becomes a marker.

    Raises:
      ValueError: a text with a lone surrogate.
    """
    parts = re.split(f"(?<=<)(?={self._marker})", text)
    try:
      return [i for part in parts for i in self._model.encode(part)]
    except RuntimeError:  # its message names neither the text nor the problem
      files.check_text(text)
      raise

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text of ids, without pad, <bos> and stop tokens; ids of no piece are unknown."""
    skipped, unknown = {self.pad_id, self.bos_id, *self.stop_ids}, self._model.unk_id()
    kept = [int(i) for i in ids if int(i) not in skipped]
    return self._model.decode([i if 0 <= i < self.size else unknown for i in kept])

  def prompt(self, text: str | list[dict]) -> list[int]:
    """Returns the ids of a prompt: <bos> and the template, up to the start of a response.

    Args:
      text: a user's text, or messages {"role", "content"} (see chat_template.turns). A <bos>
        spelled out at its start is dropped, since one is added.

    Raises:
      ValueError: a conversation that breaks the rules, or several turns with the plain template.
    """
    conversation = turns(text) if isinstance(text, list) else [Turn("user", text)]
    ids = [self.bos_id]
    for part in TEMPLATES[self.template].render(conversation):
      ids += self._part(part)
    return ids

  def _part(self, part: str | Marker) -> list[int]:
    return [self.id_of(part.piece)] if isinstance(part, Marker) else self.encode(part)

  def cut_prompt(self, ids: Sequence[int], most: int) -> list[int]:
    """Returns at most `most` ids of a prompt: its end, still in the template's form.

    The oldest turns are dropped first: the system's, then a user's turn together with its answer.
    If the last turn is too long by itself, it keeps its opening and the end of its text.

    Raises:
      ValueError: `most` is too small for the template and a token of text.
    """
    ids, opening = list(ids), TEMPLATES[self.template].opening
    if len(ids) <= most:
      return ids
    starts = [i for i, x in enumerate(ids) if opening and x == self.id_of(opening[0].piece)]
    if opening is None or len(starts) < 2 or starts[0] != 1:  # not this template's ids
      return ids[:1] + ids[len(ids) - most + 1 :]
    for start in starts[len(starts) % 2 : -1 : 2]:  # an odd one out is the system's turn
      if 1 + len(ids) - start <= most:
        return ids[:1] + ids[start:]
    head = ids[:1] + [i for part in opening for i in self._part(part)]
    closing = len(ids) - max(i for i, x in enumerate(ids) if x == self.stop_ids[-1])
    least = len(head) + closing + 1
    fix = "Raise it, or set overflow='drop'."
    require(most >= least, "max_tokens", f"at least {least} for this template", most, fix)
    tail = ids[len(ids) - most + len(head) :]
    while len(tail) > closing + 1 and not self.decode(tail[:1]).strip():
      tail = tail[1:]  # a turn does not start with white space
    return head + tail

  def response(self, text: str) -> list[int]:
    """Returns the ids of a response and its stop token."""
    return [*self.encode(text), self.stop_ids[-1]]


def train_tokenizer(corpus: str, output: str, vocab_size: int = 1024, held_out: int = 600) -> None:
  """Trains a small BPE model with Gemma's special pieces on the `text` field of a JSON-lines file.

  Args:
    corpus: JSON lines {"text": ...}.
    output: path of the `.model` file to write.
    vocab_size: number of pieces, including special ones.
    held_out: number of last lines to leave out.
  """
  import sentencepiece
  from sentencepiece import sentencepiece_model_pb2

  records = list(files.read_records(corpus))
  texts = []
  for place, record in records[: len(records) - held_out]:
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
      raise ValueError(
        f"{place}: expected an object with a text 'text', got {files.shorten(record)}"
      )
    texts.append(files.check_text(text))
  require(len(texts) > 0, corpus, f"more than the {held_out} lines held out", 0, "Write more.")
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
  # The model records its path; without it, the same text gives the same bytes anywhere.
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

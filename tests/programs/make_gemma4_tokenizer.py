"""Writes tests/fixtures/gemma4_tokenizer.model, which stands in for Gemma 4's tokenizer in tests.

  python tests/programs/make_gemma4_tokenizer.py

The special pieces have the ids that the gemma library and transformers name; `<unusedN>` fill the
ids between them. The other pieces are those of the bundled tokenizer, so the file is small: pieces
that the published tokenizer has above id 255,998, the multimodal ones, are at the end.
"""

import pathlib

from sentencepiece import sentencepiece_model_pb2 as sentencepiece

ROOT = pathlib.Path(__file__).parents[2]
PATH = ROOT / "tests" / "fixtures" / "gemma4_tokenizer.model"
IDS = {
  4: "<mask>", 5: "[multimodal]",
  46: "<|tool>", 47: "<tool|>", 48: "<|tool_call>", 49: "<tool_call|>",
  50: "<|tool_response>", 51: "<tool_response|>", 52: '<|"|>',
  98: "<|think|>", 100: "<|channel>", 101: "<channel|>", 105: "<|turn>", 106: "<turn|>",
}  # fmt: skip
MULTIMODAL = ("<|image>", "<|audio>", "<|image|>", "<|audio|>", "<image|>", "<audio|>", "<|video|>")
CONTROL, UNKNOWN, USER_DEFINED, BYTE, NORMAL = 3, 2, 4, 6, 1


def model(markers: int = USER_DEFINED) -> sentencepiece.ModelProto:
  """Returns the tokenizer; `markers` is the type of the markers in IDS and MULTIMODAL."""
  bundled = (ROOT / "nash_jax" / "assets" / "stories" / "tokenizer.model").read_bytes()
  ordinary = [x for x in sentencepiece.ModelProto.FromString(bundled).pieces if x.type == NORMAL]
  made = sentencepiece.ModelProto()

  def add(piece: str, kind: int, score: float = 0.0) -> None:
    made.pieces.add(piece=piece, type=kind, score=score)

  for piece in ("<pad>", "<eos>", "<bos>"):
    add(piece, CONTROL)
  add("<unk>", UNKNOWN)
  unused = 0
  for i in range(4, 107):
    piece = IDS.get(i, f"<unused{unused}>")
    add(piece, markers if i in IDS and piece != "[multimodal]" else USER_DEFINED)
    unused += i not in IDS
  for count in range(1, 32):
    add("\n" * count, USER_DEFINED)
  for count in range(2, 32):
    add("▁" * count, USER_DEFINED)
  for byte in range(256):
    add(f"<0x{byte:02X}>", BYTE)
  for x in ordinary:
    add(x.piece, NORMAL, x.score)
  for piece in MULTIMODAL:
    add(piece, markers)
  made.trainer_spec.model_type, made.trainer_spec.byte_fallback = 2, True  # BPE
  made.trainer_spec.vocab_size = len(made.pieces)
  made.trainer_spec.pad_id, made.trainer_spec.eos_id = 0, 1
  made.trainer_spec.bos_id, made.trainer_spec.unk_id = 2, 3
  made.trainer_spec.pad_piece, made.trainer_spec.eos_piece = "<pad>", "<eos>"
  made.trainer_spec.bos_piece = "<bos>"
  made.normalizer_spec.name = "identity"
  made.normalizer_spec.add_dummy_prefix = made.normalizer_spec.remove_extra_whitespaces = False
  return made


if __name__ == "__main__":
  PATH.write_bytes(model().SerializeToString(deterministic=True))

"""Tokenizers: text to token ids and back. There is one, over bytes."""
from __future__ import annotations

import dataclasses

import numpy as np

BOS = 256  # begins every document
EOS = 257  # ends every document
PAD = 258  # fills what a row has left; never predicted


@dataclasses.dataclass(frozen=True)
class Bytes:
  """Ids 0..255 are the bytes themselves, then BOS, EOS and PAD: lossless for any input."""
  name: str = "bytes"
  vocab_size: int = 259  # ids in use; a model may pad its table beyond that
  bos: int = BOS
  eos: int = EOS
  pad: int = PAD

  def encode(self, text: str | bytes) -> np.ndarray:
    """Text (UTF-8) or raw bytes to uint16[length] ids, without BOS or EOS."""
    if isinstance(text, str):
      text = text.encode("utf-8")
    return np.frombuffer(text, np.uint8).astype(np.uint16)

  def decode(self, tokens) -> str:
    """Ids to text. Special ids vanish; bytes that are no UTF-8 become U+FFFD."""
    return self.decode_bytes(tokens).decode("utf-8", errors="replace")

  def decode_bytes(self, tokens) -> bytes:
    """Ids to the exact bytes; special ids vanish."""
    tokens = np.asarray(tokens)
    return tokens[(tokens >= 0) & (tokens < 256)].astype(np.uint8).tobytes()


def get(name: str) -> Bytes:
  """The tokenizer called `name`. Raises ValueError for a name that is unknown."""
  if name != "bytes":
    raise ValueError(f'data.tokenizer = {name!r}: unknown; the tokenizers are "bytes"')
  return Bytes()

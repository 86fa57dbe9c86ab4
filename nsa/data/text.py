"""One corpus as rows of text: documents packed epoch after epoch, row by number."""
from __future__ import annotations

import bisect
import functools

import numpy as np

from nsa.data import packing
from nsa.data.sources import Document


class Text:
  """Rows of `context` tokens by their number, for any context: keeps documents and index arrays, never a position."""

  def __init__(self, source: str, documents: list[Document], tokenizer, align: int, seed: int):
    self.source, self.documents, self.tokenizer, self.align, self.seed = source, documents, tokenizer, align, seed
    self._lengths = np.array([len(d.tokens) for d in documents], np.int64)
    self._edges: dict[int, tuple[int, ...]] = {}  # context -> number of the first row of each epoch so far
    self._index = functools.lru_cache(maxsize=4)(
        lambda context, epoch: packing.epoch_index(self._lengths, context, align, seed, epoch))

  def _locate(self, number, context):
    """Row number -> (epoch, row of the epoch). Epochs have slightly different numbers of rows."""
    edges = self._edges.get(context, (0,))
    while edges[-1] <= number:
      rows = packing.count_rows(self._lengths, context, self.align, self.seed, len(edges) - 1)
      edges += (edges[-1] + rows,)
      self._edges[context] = edges  # a whole tuple at once: safe when threads read ahead
    epoch = bisect.bisect_right(edges, number) - 1
    return epoch, number - edges[epoch]

  def row(self, number: int, inputs, targets, weights, segment_ids) -> None:
    """Writes row `number` into the four arrays of `context` elements."""
    context = len(inputs)
    epoch, row = self._locate(number, context)
    index = self._index(context, epoch)
    for segment, piece in enumerate(range(index.first[row], index.first[row + 1]), start=1):
      begin, length = index.offset[piece], index.length[piece]
      at = slice(begin, begin + length)
      read(self.tokenizer, self.documents[index.document[piece]].tokens, index.start[piece], inputs[at], targets[at])
      weights[at] = 1
      segment_ids[at] = segment

  def describe(self, number: int, context: int) -> str:
    """What row `number` holds, in words."""
    epoch, row = self._locate(number, context)
    index = self._index(context, epoch)
    pieces = []
    for piece in range(index.first[row], index.first[row + 1]):
      start = index.start[piece]
      name = self.documents[index.document[piece]].name
      pieces.append(f"{name} tokens {start}..{start + index.length[piece]}")
    return f"epoch {epoch}, {self.source}: {'; '.join(pieces)}"


def read(kind, tokens, start, inputs, targets):
  """Copies [start, start + n) of BOS, tokens, EOS to the n inputs, and what follows each to the targets."""
  n = len(inputs)
  if start:
    inputs[:] = tokens[start - 1:start - 1 + n]
  else:
    inputs[0] = kind.bos
    inputs[1:] = tokens[:n - 1]
  if start + n <= len(tokens):
    targets[:] = tokens[start:start + n]
  else:
    targets[:-1] = tokens[start:]
    targets[-1] = kind.eos

"""Passages of text planted in training a known number of times, drawn by seed: familiarity that is randomised, not
observed.

Documents are set aside for it by a hash of their names and nowhere else in training. Passages of 2,048 tokens come in
sets of five, planted 0, 1, 4, 16 and 64 times; which passage gets which number is drawn by seed. `SETS` sets are
planted together, their plantings shuffled, and then the next ones: a deck. (Design: is a network's state denser for
what it knows? Claims on hidden states of arXiv 2603.03415 compare familiar with unfamiliar *kinds* of text.)
"""
from __future__ import annotations

import dataclasses
import zlib

import numpy as np

from nsa.data import counter
from nsa.data.sources import Document

SIZE = 2048                   # tokens of a passage
TIMES = (0, 1, 4, 16, 64)     # plantings of the passages of a set
SETS = 4                      # in a deck
ASIDE = 64                    # one of so many documents is set aside
_DECK = SETS * sum(TIMES)     # plantings of a deck


@dataclasses.dataclass(frozen=True)
class Passage:
  """A passage: its document's corpus and name, its first token there, how often a deck plants it, how often it was so
  far."""
  corpus: str
  document: str
  start: int
  times: int
  planted: int


def set_aside(documents: list[Document]) -> tuple[list[Document], list[Document]]:
  """(documents to train on, documents for passages): by the CRC-32 of the name, that of the smallest where none
  qualifies."""
  aside = [d for d in documents if zlib.crc32(d.name.encode()) % ASIDE == 0 and len(d.tokens) > SIZE]
  if not aside:
    long = [d for d in documents if len(d.tokens) > SIZE]
    aside = [min(long, key=lambda d: zlib.crc32(d.name.encode()))] if len(long) > 1 else []
  names = {d.name for d in aside}
  return [d for d in documents if d.name not in names], aside


class Planting:
  """Which rows of text hold a passage, which and where.

  Args:
    aside: corpus -> documents set aside.
    share: of the tokens of text rows that are passages.
    align: passages begin at multiples of this many tokens of a row.
    seed: draws passages, their numbers, order and places.

  Raises ValueError without a passage to plant.
  """

  def __init__(self, aside: dict[str, list[Document]], share: float, align: int, seed: int):
    self.share, self.align, self.seed = share, align, seed
    # A token behind each is the last one's target.
    pool = [(corpus, document, start) for corpus, documents in aside.items() for document in documents
            for start in range(0, len(document.tokens) - SIZE, SIZE)]
    if len(pool) < SETS * len(TIMES):
      raise ValueError(f"data.planted = {share}: one document in {ASIDE} is set aside for passages, which gives "
                       f"{len(pool)} of {SIZE} tokens; {SETS * len(TIMES)} are needed: take a larger corpus, or 0 "
                       "for none")
    self._pool = [pool[i] for i in counter.permutation(counter.key("passages", seed), len(pool))]
    self._entries = np.repeat(np.arange(SETS * len(TIMES)), np.tile(TIMES, SETS))  # of a deck, before it is shuffled

  def plantings(self, rows: int, context: int) -> int:
    """How many of the first `rows` rows of text hold a passage."""
    return int(rows * self.share * context / SIZE + 1e-9)

  def tokens(self, passage: Passage) -> np.ndarray:
    """uint[SIZE + 1]: the passage and its last token's target."""
    document = next(d for corpus, d, _ in self._pool if (corpus, d.name) == (passage.corpus, passage.document))
    return document.tokens[passage.start:passage.start + SIZE + 1]

  def _passage(self, planting):
    """The pool's number of the passage of a planting."""
    deck, turn = divmod(planting, _DECK)
    entry = self._entries[counter.permutation(counter.key("deck", self.seed, deck), _DECK)[turn]]
    return self._numbers(deck)[entry]

  def _numbers(self, deck):
    number = deck * SETS * len(TIMES) + np.arange(SETS * len(TIMES))
    if number[-1] >= len(self._pool):
      raise ValueError(f"data.planted = {self.share}: {len(self._pool)} passages are set aside, and the run needs "
                       "more; take a smaller share")
    return number

  def of_row(self, row: int, context: int) -> tuple[str, Document, int, int] | None:
    """(corpus, document, first token in it, first token in the row) of what a row of text holds; None for most rows.

    In rows shorter than a passage it goes on over the next ones.
    """
    for piece in range(max(1, SIZE // context)):
      before = self.plantings(row - piece, context)
      if row >= piece and self.plantings(row - piece + 1, context) > before:
        corpus, document, start = self._pool[self._passage(before)]
        places = max(0, context - SIZE) // self.align + 1
        at = self.align * int(counter.integers(counter.key("place", self.seed, context), [row], places)[0])
        return corpus, document, start + piece * context, at
    return None

  def plant(self, row: int, inputs, targets, weights, segment_ids) -> None:
    """Writes the passage of a row of text over it, as a document of its own; what follows it in the row is another
    one."""
    found = self.of_row(row, len(inputs))
    if found is None:
      return
    _, document, start, first = found
    size = min(SIZE, len(inputs))
    at, last = slice(first, first + size), int(segment_ids.max())
    inputs[at], targets[at], weights[at] = (document.tokens[start:start + size],
                                            document.tokens[start + 1:start + size + 1], 1)
    behind = segment_ids[first + size:]
    behind[behind > 0] += last + 1
    segment_ids[at] = last + 1

  def passages(self, rows: int, context: int) -> list[Passage]:
    """Every passage of the decks begun within the first `rows` rows of text, and how often it was planted there."""
    count = self.plantings(rows, context)
    out = []
    for deck in range(-(-count // _DECK)):
      shuffled = self._entries[counter.permutation(counter.key("deck", self.seed, deck), _DECK)]
      planted = np.bincount(shuffled[:max(0, count - deck * _DECK)], minlength=SETS * len(TIMES))
      for entry, number in enumerate(self._numbers(deck)):
        corpus, document, start = self._pool[number]
        out.append(Passage(corpus, document.name, start, TIMES[entry % len(TIMES)], int(planted[entry])))
    return out

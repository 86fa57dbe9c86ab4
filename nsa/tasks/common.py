"""Aggregation: which of a few words occurs most often in the whole text?

After RULER's "cwe" (Hsieh et al. 2024, arXiv:2404.06654), with one answer. No single place holds it, and the end of the
text misleads: there another word is the most common one.
"""
from __future__ import annotations

import collections
import dataclasses
import re
from typing import ClassVar

import numpy as np

from nsa.tasks import frame, scattered
from nsa.tasks.needle import NOUNS
from nsa.tasks.scattered import Entry

QUESTION = b"The most common one: {value}. "
TAIL = 3  # the last third of the words misleads


@dataclasses.dataclass(frozen=True)
class Common(frame.Task):
  """`words` words in brackets, scattered: one of them `often` times, the others `seldom` times each."""
  family: ClassVar[str] = "common"
  sizes: ClassVar[tuple[str, ...]] = ("words", "often", "seldom")
  words: int = 6
  often: int = 24
  seldom: int = 8

  def __post_init__(self):
    frame.check(2 <= self.words <= 10, self, "words", "between 2 and 10")
    frame.check(self.seldom >= 2, self, "seldom", "at least 2")
    frame.check(self.often > self.seldom, self, "often", f"above seldom = {self.seldom}")

  @property
  def min_length(self):
    word = max(map(len, NOUNS)) + len(b"[] ")
    return 2 + word * (self.often + (self.words - 1) * self.seldom) + len(QUESTION) + word

  def example(self, seed, index, length, split="train", haystack=None):
    draws = self.begin(seed, index, length, split)
    answer, decoy, *others = frame.draw_strings(draws, lambda n: NOUNS[n], len(NOUNS), self.words, split,
                                                 f"task common: words = {self.words}")
    late = (3 * self.seldom + 3) // 4  # of the misleading word lie in the last part: most, and more than of the answer
    places = {answer: self._places(draws, self.often, min(late // 2, self.often // TAIL)),
              decoy: self._places(draws, self.seldom, late), **{word: draws.uniform(self.seldom) for word in others}}
    words = [word for _, word in sorted((place, word) for word, mine in places.items() for place in mine)]
    entries = [Entry(0, f"[{word}] ".encode(), (1, 1 + len(word))) for word in words]
    reads = tuple(i for i, word in enumerate(words) if word == answer)
    entries.append(Entry(0, *scattered.fill(QUESTION, value=answer), reads=reads))
    return scattered.lay_out(draws, entries, length, haystack, order=range(len(entries)))

  def _places(self, draws, count, late):
    """`count` places from 0 to 1, `late` of them in the last part."""
    return [*(draws.uniform(count - late) * (1 - 1 / TAIL)), *(1 - draws.uniform(late) / TAIL)]

  def answerable(self, example, answer, visible):
    """Whether the answer is the most common word among those that are visible."""
    text = np.where(visible & (example.tokens < 256), example.tokens, 0).astype(np.uint8).tobytes()
    counts = collections.Counter(word for word in re.findall(rb"\[([a-z]+)\] ", text) if word.decode() in NOUNS)
    right = example.tokens[example.answer_mask].astype(np.uint8).tobytes()
    return counts[right] > max((n for word, n in counts.items() if word != right), default=0)

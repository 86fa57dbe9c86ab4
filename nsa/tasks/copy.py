"""Copying a string, and completing an n-gram seen before (induction).

After Jelassi et al. 2024, "Repeat After Me" (arXiv:2402.01032), sections 3 and
4.2 (n-gram lookup), and Olsson et al. 2022, "In-context learning and induction
heads" (arXiv:2209.11895).
"""
from __future__ import annotations

import dataclasses
from typing import ClassVar

from nsa.tasks import frame

MARK, REPEAT = b"\nCopy: ", b"\nAgain: "


@dataclasses.dataclass(frozen=True)
class Copy(frame.Task):
  """A random string of letters somewhere in text, to be repeated at the end."""
  family: ClassVar[str] = "copy"
  sizes: ClassVar[tuple[str, ...]] = ("length",)
  length: int = 32          # letters a-z to copy; log2(26) = 4.7 bits each

  def __post_init__(self):
    frame.check(self.length >= 4, self, "length", "at least 4 letters")

  @property
  def min_length(self):
    return 2 + len(MARK) + self.length + len(REPEAT) + self.length + 3  # ".\n" and "."

  def example(self, seed, index, length, split="train", haystack=None):
    draws = self.begin(seed, index, length, split)
    answer = _letters(draws, self.length, split)
    evidence, query, end = MARK + answer + b".\n", REPEAT, b"."
    free = length - 2 - len(evidence) - len(query) - len(answer) - len(end)
    text = frame.filler(draws, free, haystack)
    cut = frame.word_start(text, draws.integer(free + 1))
    before = text[:cut] + evidence + text[cut:]
    evidence_end = cut + len(MARK) + len(answer)
    return frame.finish(before, query, answer, end, evidence_end)


@dataclasses.dataclass(frozen=True)
class Induction(frame.Task):
  """A random string of letters fills the context; an n-gram that occurs once in it is to be continued."""
  family: ClassVar[str] = "induction"
  sizes: ClassVar[tuple[str, ...]] = ("ngram", "answer")
  ngram: int = 6            # letters of the question
  answer: int = 4           # letters to complete

  def __post_init__(self):
    frame.check(2 <= self.ngram <= 64, self, "ngram", "between 2 and 64 letters")
    frame.check(self.answer >= 1, self, "answer", "at least 1 letter")

  @property
  def min_length(self):
    return 2 + 2 * (self.ngram + self.answer) + 2  # the line's end before the question and "."

  def example(self, seed, index, length, split="train", haystack=None):
    draws = self.begin(seed, index, length, split)
    query_mark, end = b"\n", b"."
    planted = self.ngram + self.answer
    room = length - 2 - len(query_mark) - planted - len(end)
    gram = _letters(draws, self.ngram, split)
    answer = _letters(draws, self.answer, split)
    while (gram + answer).rfind(gram):  # such as "aa" + "ab": the n-gram would occur twice
      gram, answer = _letters(draws, self.ngram, split), _letters(draws, self.answer, split)
    text = bytearray(frame.letters(draws, room))
    at = draws.integer(room - planted + 1)
    text[at:at + planted] = gram + answer
    # The n-gram may occur elsewhere by chance: change a letter of it there, outside the planted one.
    found = text.find(gram)
    while found >= 0:
      if found != at:
        place = found if found < at else found + self.ngram - 1
        text[place] = ord("a") + (text[place] - ord("a") + 1 + draws.integer(25)) % 26
        found = max(-1, found - self.ngram)  # the new letter may complete another one
      found = text.find(gram, found + 1)
    evidence_end = at + planted
    return frame.finish(bytes(text), query_mark + gram, answer, end, evidence_end)


def _letters(draws, count, split):
  """A string of `split`."""
  text = frame.letters(draws, count)
  while not frame.in_bucket(text.decode(), split):
    text = frame.letters(draws, count)
  return text

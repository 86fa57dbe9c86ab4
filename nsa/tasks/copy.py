"""Copying a string, after Jelassi et al. 2024, "Repeat After Me" (arXiv:2402.01032), section 3."""
from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

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


def _letters(draws, count, split):
  """`count` random letters a-z, a string of `split`."""
  while True:
    text = (draws.integers(26, count) + ord("a")).astype(np.uint8).tobytes()
    if frame.in_bucket(text.decode(), split):
      return text

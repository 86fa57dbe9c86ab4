"""Recall in words: facts scattered over a text, each asked for once behind it, among others almost alike.

The words of MQAR (Arora et al. 2023, arXiv:2312.04927) with the near duplicates of RULER's harder needles (Hsieh et al.
2024, arXiv:2404.06654). `ledger` has another format and is never trained on: does recall carry over to it?
"""
from __future__ import annotations

import dataclasses
from typing import ClassVar

from nsa.tasks import frame, scattered
from nsa.tasks.needle import ADJECTIVES, NOUNS
from nsa.tasks.scattered import Entry, fill

TEMPLATES = (  # (statement, question)
    (b"The {key} is kept in box {value}. ", b"Where is the {key}? It is in box {value}. "),
    (b"They weighed the {key}: {value} grams. ", b"How heavy is the {key}? It has {value} grams. "),
    (b"Somebody paid {value} coins for the {key}. ", b"The price of the {key}? It was {value} coins. "),
    (b"On page {value} one finds the {key}. ", b"Which page has the {key}? That is page {value}. "),
    (b"To the {key} belongs number {value}. ", b"What number has the {key}? Number {value}. "),
)


@dataclasses.dataclass(frozen=True)
class Recall(scattered.Templated):
  """`pairs` facts about things ("quiet harbor") and a number each; every one is asked for, answered by its latest
  number."""
  family: ClassVar[str] = "recall"
  sizes: ClassVar[tuple[str, ...]] = ("pairs", "updates", "distractors")
  pairs: int = 8            # things that are asked for
  updates: int = 0          # of these get another number behind the first
  distractors: int = 0      # per thing: facts about things that share one of its two words, never asked for
  digits: int = 3           # of a number
  template: str = "known"   # known: one of four ways to say it | held_out: a fifth, never trained on

  def __post_init__(self):
    frame.check(self.pairs >= 1, self, "pairs", "at least 1")
    frame.check(0 <= self.updates <= self.pairs, self, "updates", "between 0 and pairs")
    frame.check(0 <= self.distractors <= 8, self, "distractors", "between 0 and 8")
    frame.check(2 <= self.digits <= 15, self, "digits", "between 2 and 15")
    self.check_template()

  @property
  def min_length(self):
    room = max(map(len, ADJECTIVES)) + max(map(len, NOUNS)) + 1 + self.digits
    statement, question = (max(len(pair[i]) for pair in TEMPLATES) + room for i in (0, 1))
    return 2 + self.pairs * (statement * (1 + self.distractors) + question) + self.updates * statement

  def example(self, seed, index, length, split="train", haystack=None):
    draws = self.begin(seed, index, length, split)
    statement, question = self.pick(draws, TEMPLATES)
    keys = frame.draw_strings(draws, _key, len(ADJECTIVES) * len(NOUNS), self.pairs, split,
                              f"task recall: pairs = {self.pairs}")
    used, entries = set(keys), []
    number = lambda: frame.draw_numbers(draws, self.digits, 1, split, "task recall: digits")[0]
    for owner, key in enumerate(keys):
      value = number()
      entries.append(Entry(owner, *fill(statement, key=key, value=value)))
      if owner < self.updates:
        old = value
        while value == old:
          value = number()
        entries.append(Entry(owner, *fill(statement, key=key, value=value)))
      entries.append(Entry(owner, *fill(question, key=key, value=value), reads=(len(entries) - 1,)))
      for i in range(self.distractors):
        other = _relative(draws, key, i, used, split)
        used.add(other)
        entries.append(Entry(self.pairs + len(used), *fill(statement, key=other, value=number())))
    return scattered.lay_out(draws, entries, length, haystack)


@dataclasses.dataclass(frozen=True)
class Ledger(frame.Task):
  """`entries` lines `"key": "value",` of a dictionary, scattered; every key is asked for. Held out of training."""
  family: ClassVar[str] = "ledger"
  sizes: ClassVar[tuple[str, ...]] = ("entries", "letters")
  trainable: ClassVar[bool] = False
  entries: int = 8
  letters: int = 4          # of a key and of a value

  def __post_init__(self):
    frame.check(self.entries >= 1, self, "entries", "at least 1")
    frame.check(3 <= self.letters <= 32, self, "letters", "between 3 and 32")

  @property
  def min_length(self):
    return 2 + self.entries * 2 * (2 * self.letters + len(b'"": "", '))

  def example(self, seed, index, length, split="train", haystack=None):
    draws = self.begin(seed, index, length, split)
    words = frame.draw_strings(draws, lambda n: frame.word(n, self.letters), 26 ** min(self.letters, 10),
                               2 * self.entries,
                               split, f"task ledger: entries = {self.entries}")
    entries = []
    for owner, (key, value) in enumerate(zip(words[::2], words[1::2])):
      line = fill(b'"{key}": "{value}", ', key=key, value=value)
      entries += [Entry(owner, *line), Entry(owner, *line, reads=(2 * owner,))]
    return scattered.lay_out(draws, entries, length, haystack)


def _key(number: int) -> str:
  return f"{ADJECTIVES[number // len(NOUNS)]} {NOUNS[number % len(NOUNS)]}"


def _relative(draws, key, turn, used, split):
  """A new thing of the split with the same adjective (even turns) or noun (odd ones) as `key`."""
  adjective, noun = key.split()
  while True:
    words = ((ADJECTIVES[draws.integer(len(ADJECTIVES))], noun) if turn % 2
             else (adjective, NOUNS[draws.integer(len(NOUNS))]))
    other = " ".join(words)
    if other not in used and frame.in_bucket(other, split):
      return other

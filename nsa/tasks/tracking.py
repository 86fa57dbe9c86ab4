"""Variable tracking: names that stand for a number, or for a name that stands for it.

After RULER's "vt" (Hsieh et al. 2024, arXiv:2404.06654), with one question per chain and few hops, which is what small
models can learn.
"""
from __future__ import annotations

import dataclasses
from typing import ClassVar

from nsa.tasks import frame, scattered
from nsa.tasks.scattered import Entry, fill

TEMPLATES = (  # (statement, question)
    (b"let {name} = {value}; ", b"show {name}: {value}; "),
    (b"{name} is now {value}. ", b"so what is {name}? {value}. "),
    (b"put {value} into {name}. ", b"take from {name}: {value}. "),
    (b"set {name} to {value}, ", b"print {name} -> {value}, "),
)
LETTERS = 3  # of a name


@dataclasses.dataclass(frozen=True)
class Tracking(scattered.Templated):
  """`chains` of `hops` statements: a name gets a number, the next name gets the name before. The last names are asked
  for."""
  family: ClassVar[str] = "tracking"
  sizes: ClassVar[tuple[str, ...]] = ("chains", "hops")
  chains: int = 8
  hops: int = 2             # statements that an answer has to be read through
  digits: int = 3           # of a number
  template: str = "known"   # known: one of three ways to say it | held_out: a fourth, never trained on

  def __post_init__(self):
    frame.check(self.chains >= 1, self, "chains", "at least 1")
    frame.check(1 <= self.hops <= 8, self, "hops", "between 1 and 8")
    frame.check(2 <= self.digits <= 15, self, "digits", "between 2 and 15")
    self.check_template()

  @property
  def min_length(self):
    statement, question = (max(len(pair[i]) for pair in TEMPLATES) + LETTERS + max(LETTERS, self.digits)
                           for i in (0, 1))
    return 2 + self.chains * (self.hops * statement + question)

  def example(self, seed, index, length, split="train", haystack=None):
    draws = self.begin(seed, index, length, split)
    statement, question = self.pick(draws, TEMPLATES)
    names = frame.draw_strings(draws, lambda n: frame.word(n, LETTERS), 26 ** LETTERS, self.chains * self.hops, split,
                               f"task tracking: chains = {self.chains}")
    numbers = frame.draw_numbers(draws, self.digits, self.chains, split, f"task tracking: digits = {self.digits}")
    entries = []
    for chain, number in enumerate(numbers):
      value, first = number, len(entries)
      for name in names[chain * self.hops:(chain + 1) * self.hops]:
        entries.append(Entry(chain, *fill(statement, name=name, value=value)))
        value = name
      entries.append(Entry(chain, *fill(question, name=value, value=number), reads=tuple(range(first, len(entries)))))
    return scattered.lay_out(draws, entries, length, haystack)

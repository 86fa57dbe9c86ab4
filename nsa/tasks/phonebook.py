"""Phone book: many lines that look alike, one number to look up.

After Jelassi et al. 2024, "Repeat After Me" (arXiv:2402.01032), section 4.
"""
from __future__ import annotations

import dataclasses
from typing import ClassVar

from nsa.tasks import frame

FIRST = """
Ada Adam Agnes Alan Alice Amos Anna Arthur Basil Bella Bruno Cecil Clara Conrad Cora Daisy David
Dora Edgar Edith Edwin Ella Emil Emma Ernest Esther Felix Flora Frank Fred George Grace Harold
Harriet Hazel Helen Henry Hugo Ida Iris Ivan Jacob James Jane Julia Karl Laura Leo Lewis Louisa Lucy
Martha Maud Max Nora Oscar Otto Paul Ralph Rose Ruth Simon Stella Walter
""".split()
# A last name is one of the first list and one of the second.
LAST = ("""
Al As Bar Ben Black Bly Brad Bur Cal Chat Clif Cran Dal Dun East Els Fair Far Gar Glen Gold Had Hal
Hart Hol Ives Ken Kirk Lang Long Mar Mil Nor Oak Pem Rad Ray Red Rock Sel Shel Stan Stock Tal Thorn
Wal Wes Whit Win Wood
""".split(), """
beck bourne bridge brook burn bury by combe cott croft dale den field ford gate ham hill hurst land
leigh ley man mere more mouth ridge shaw stead stone ton vale ville ward well wick wood worth yard
""".split())
SHOTS = 2  # looked-up lines before the question


@dataclasses.dataclass(frozen=True)
class Phonebook(frame.Task):
  """`entries` lines "{First Last}: {digits}", two lines looked up as examples, then a name to complete."""
  family: ClassVar[str] = "phonebook"
  sizes: ClassVar[tuple[str, ...]] = ("entries", "digits")
  entries: int = 20         # lines of the book; text of the haystack fills the rest of the context
  digits: int = 10          # length of a number

  def __post_init__(self):
    frame.check(self.entries > SHOTS, self, "entries", f"more than the {SHOTS} lines that serve as examples")
    frame.check(4 <= self.digits <= 15, self, "digits", "between 4 and 15")

  @property
  def min_length(self):
    line = max(map(len, FIRST)) + 1 + sum(max(map(len, part)) for part in LAST) + 2 + self.digits + 1
    return 2 + 2 + self.entries * line + 2 + (SHOTS + 1) * line

  def example(self, seed, index, length, split="train", haystack=None):
    draws = self.begin(seed, index, length, split)
    space = len(FIRST) * len(LAST[0]) * len(LAST[1])
    names = frame.draw_strings(draws, _name, space, self.entries, split, f"task phonebook: entries = {self.entries}")
    numbers = frame.draw_numbers(draws, self.digits, self.entries, split, f"task phonebook: digits = {self.digits}")
    lines = [f"{name}: {number}\n".encode() for name, number in zip(names, numbers)]
    asked, *shots = draws.permutation(self.entries)[:1 + SHOTS].tolist()
    query = b"\n\n" + b"".join(lines[i] for i in shots) + f"{names[asked]}: ".encode()
    answer, end = numbers[asked].encode(), b"\n"
    book = b"\n\n" + b"".join(lines)
    free = length - 2 - len(book) - len(query) - len(answer) - len(end)
    text = frame.filler(draws, free, haystack)
    cut = frame.word_start(text, draws.integer(free + 1))
    before = text[:cut] + book + text[cut:]
    evidence_end = cut + 2 + sum(len(line) for line in lines[:asked + 1]) - 1  # without the line's end
    return frame.finish(before, query, answer, end, evidence_end)


def _name(number: int) -> str:
  number, first = divmod(number, len(FIRST))
  begin, end = divmod(number, len(LAST[1]))
  return f"{FIRST[first]} {LAST[0][begin]}{LAST[1][end]}"

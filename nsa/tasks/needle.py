"""Needle in a haystack: one sentence to find, or one among others like it.

After RULER (Hsieh et al. 2024, arXiv:2404.06654): "niah_single" with keys=1,
"niah_multikey_1" with keys=4, "niah_multikey_2" with haystack=needles.
"""
from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from nsa.tasks import frame

ADJECTIVES = """
able bold brave brief bright broad calm cheap clean clear clever cold cool crisp curious damp dark
deep dense dry dull eager early empty even faint fair famous fast fine firm flat fond frank fresh
full gentle glad golden grand green happy hard hollow honest huge humble idle jolly keen kind large
late lean light little lively lone long loose loud lucky mild narrow neat noble odd old open pale
plain polite proud quick quiet rapid rare ready rich rough round royal rusty sharp shy silent simple
sleepy slim slow smooth soft solid sour steady
""".split()
NOUNS = """
acorn anchor apple arrow badge banjo barrel basket beacon bell bench berry blanket bonnet bottle
branch bridge broom bucket button cabin candle canoe carpet castle cedar chalk chimney cider clock
cloud comet copper coral cradle crown curtain dagger drum engine falcon feather fence fiddle flask
forest fountain garden glove goblet hammer harbor helmet hinge island jacket kettle ladder lantern
lemon lizard magnet maple marble meadow mirror needle orchard otter paddle palace parrot pebble
pencil piano pillow pocket puddle quill rabbit ribbon river rocket saddle sailor salmon shovel spoon
stable thimble tiger tunnel turnip valley velvet violin wagon
""".split()
DEPTHS = 40  # even steps of the depth from 0 to 1, as in RULER
END = b"."


@dataclasses.dataclass(frozen=True)
class Needle(frame.Task):
  """`keys` sentences "One of the special magic numbers for {key} is: {value}."; one of them is asked for."""
  family: ClassVar[str] = "needle"
  sizes: ClassVar[tuple[str, ...]] = ("keys", "digits")
  keys: int = 1             # sentences, one of them the answer
  digits: int = 7           # length of a value
  depth: float = -1.0       # of the answer's sentence, 0 to 1; -1 = drawn from 40 even steps
  haystack: str = "text"    # text: documents | noise: sentences repeated | needles: more sentences with keys
  question: str = "last"    # last: after the haystack | first: also before it

  def __post_init__(self):
    frame.check(self.keys >= 1, self, "keys", "at least 1")
    frame.check(3 <= self.digits <= 15, self, "digits", "between 3 and 15")
    frame.check(self.depth == -1 or 0 <= self.depth <= 1, self, "depth", "between 0 and 1, or -1 to draw it")
    frame.check(self.haystack in ("text", "noise", "needles"), self, "haystack", "text, noise or needles")
    frame.check(self.question in ("last", "first"), self, "question", "last or first")

  @property
  def min_length(self):
    key = "-" * (max(map(len, ADJECTIVES)) + 1 + max(map(len, NOUNS)))
    preface, query = self._question(key)
    sentence = _sentence(key, "0" * self.digits)
    return 2 + len(preface + query) + self.digits + len(END) + self.keys * len(sentence)

  def _question(self, key):
    """What stands before the haystack and what behind it."""
    asked = f"What is the special magic number for {key}? ".encode()
    query = b" " + asked + f"The special magic number for {key} is: ".encode()
    return asked if self.question == "first" else b"", query

  def example(self, seed, index, length, split="train", haystack=None):
    draws = self.begin(seed, index, length, split)
    count = self.keys
    if self.haystack == "needles":  # as many as fit; a sentence with its shortest key is the yardstick
      count = max(count, length // (len(_sentence("-" * 8, "0" * self.digits)) + 1) + 1)
    step = draws.integer(DEPTHS)
    depth = step / (DEPTHS - 1) if self.depth == -1 else self.depth
    keys = frame.draw_strings(draws, _key, len(ADJECTIVES) * len(NOUNS), count, split, f"task needle: keys = {count}")
    values = frame.draw_numbers(draws, self.digits, count, split, f"task needle: digits = {self.digits}")
    sentences = [_sentence(k, v) for k, v in zip(keys, values)]  # number 0 is the one asked for
    preface, query = self._question(keys[0])
    answer = values[0].encode()
    room = length - 2 - len(preface) - len(query) - len(answer) - len(END)
    if self.haystack == "needles":
      while len(sentences) > self.keys and sum(map(len, sentences)) > room:
        sentences.pop()
    free = room - sum(map(len, sentences))
    text = frame.filler(draws, free, haystack if self.haystack == "text" else None)
    places = draws.uniform(len(sentences))
    places[0] = depth
    if self.haystack == "needles":  # the text is only what is left over; spread the sentences by rank
      order = np.argsort(places[1:]).tolist()
      order.insert(round(depth * len(order)), -1)
      order = [i + 1 for i in order]
      cuts = [0] * len(order)
    else:
      order = np.argsort(places, kind="stable").tolist()
      cuts = [frame.word_start(text, round(float(places[i]) * free)) for i in order]
    parts, at, evidence_end = [preface], 0, 0
    for i, cut in zip(order, cuts):
      parts += [text[at:cut], sentences[i]]
      at = cut
      if i == 0:
        evidence_end = sum(map(len, parts)) - len(". ")
    before = b"".join(parts) + text[at:]
    return frame.finish(before, query, answer, END, evidence_end)


def _key(number: int) -> str:
  return f"{ADJECTIVES[number // len(NOUNS)]}-{NOUNS[number % len(NOUNS)]}"


def _sentence(key: str, value: str) -> bytes:
  return f"One of the special magic numbers for {key} is: {value}. ".encode()

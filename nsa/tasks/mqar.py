"""Multi-query associative recall, in its own tokens.

Arora et al. 2023, "Zoology: Measuring and Improving Recall in Efficient
Language Models" (arXiv:2312.04927), section 4 and appendix: key-value pairs,
then each key once more at gaps drawn from a power law, to be followed by its
value. There all bindings lie at the very beginning, which is one block that
every sparse method sees: `layout=paper`. By default bindings and queries are
scattered over the whole example, so that the evidence can be anywhere. (Runs
of before there were layouts, the two pilots among them, had the paper's.)
"""
from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from nsa.tasks import frame, scattered


@dataclasses.dataclass(frozen=True)
class MQAR(frame.Task):
  """`pairs` bindings K V, and every key once more, answered by its latest value; the rest is filler.

  Keys are the ids 1 .. vocab/2 - 1, values vocab/2 .. vocab - 1. So few ids
  cannot be split between train and test: the (key, value) pairs are. Filler
  are random values; a value behind no key binds nothing.

  Scattered: bindings and queries are random pairs of tokens, each query behind
  its bindings. With distances in lengths of the example, p(d) = 2 (1 - d)
  without updates: a window of an eighth of the length holds 23 % of the
  evidence.
  """
  family: ClassVar[str] = "mqar"
  in_words: ClassVar[bool] = False
  sizes: ClassVar[tuple[str, ...]] = ("pairs", "updates")
  pairs: int = 16           # different keys
  updates: int = 0          # keys that are bound again, to another value, before the queries
  vocab: int = 256          # token ids; 256 fits a byte model, the paper has 8192
  layout: str = "scattered" # scattered | paper: bindings first, then queries at gaps of a power law
  power: float = 0.01       # paper only: a of the gaps' law p(gap) ~ a gap^(a - 1), in units of 2 tokens

  def __post_init__(self):
    frame.check(self.pairs >= 1, self, "pairs", "at least 1")
    # With fewer values some keys might have none in the small splits.
    frame.check(self.vocab >= 256 and self.vocab % 2 == 0, self, "vocab", "an even number, at least 256")
    frame.check(self.pairs < self.vocab // 2, self, "pairs",
                f"there are only vocab / 2 - 1 = {self.vocab // 2 - 1} keys")
    frame.check(0 <= self.updates <= self.pairs, self, "updates", "between 0 and pairs")
    frame.check(self.layout in ("scattered", "paper"), self, "layout", "scattered or paper")
    frame.check(self.power > 0, self, "power", "above 0")
    frame.check(self.layout == "paper" or self.power == 0.01, self, "power", "belongs to layout=paper")

  @property
  def vocab_size(self) -> int:
    return max(self.vocab, frame.Task.vocab_size)

  @property
  def min_length(self):
    return 2 * (self.pairs + self.updates) + 2 * self.pairs

  @property
  def identity(self):
    if self.layout == "paper":  # the same examples as before there were layouts
      return f"MQAR(pairs={self.pairs}, updates={self.updates}, vocab={self.vocab}, power={self.power})"
    return super().identity

  def example(self, seed, index, length, split="train", haystack=None):
    draws = self.begin(seed, index, length, split)
    half, n, u = self.vocab // 2, self.pairs, self.updates
    keys = 1 + draws.permutation(half - 1)[:n]
    bound = np.concatenate([keys, keys[draws.permutation(n)[:u]]])
    values = self._values(draws, bound, split)
    tokens = half + draws.integers(half, length)
    latest = {int(k): place for place, k in enumerate(bound)}
    place = np.array([latest[int(k)] for k in keys])
    binding, query = (self._paper if self.layout == "paper" else self._scattered)(draws, length, keys, bound)
    tokens[binding], tokens[binding + 1] = bound, values
    tokens[query], tokens[query + 1] = keys, values[place]
    group = np.full(length, -1, np.int32)
    group[query + 1] = np.arange(n)
    value = (binding[place] + 1).astype(np.int32)
    return frame.Example(tokens.astype(np.int32), group, query.astype(np.int32),
                         np.stack([value, value], axis=-1)[:, None])

  def _paper(self, draws, length, keys, bound):
    """First token of every binding and of every query."""
    bindings, n = len(bound), len(keys)
    slots = (length - 2 * bindings) // 2  # pairs of tokens behind the bindings
    # Gaps without replacement: the n smallest of an exponential race with rates p(gap).
    gap = np.arange(1, slots + 1, dtype=np.float64)
    race = -np.log1p(-draws.uniform(slots)) / gap ** (self.power - 1)
    return 2 * np.arange(bindings), 2 * bindings + 2 * np.argsort(race, kind="stable")[:n]

  def _scattered(self, draws, length, keys, bound):
    """Every key takes random slots of 2 tokens: its bindings the first of them, in order, its query the last."""
    placed = 2 * scattered.interleave(draws, np.concatenate([bound, keys]), length // 2)
    return placed[:len(bound)], placed[len(bound):]

  def _values(self, draws, bound, split):
    """A value for every binding, so that the pair belongs to the split and an update changes the value."""
    half, values = self.vocab // 2, []
    latest: dict[int, int] = {}
    # One draw for all: enough candidates that a binding seldom needs a second look.
    width = 3 * 10 // len(frame.BUCKETS[split])
    candidates = (half + draws.integers(half, len(bound) * width)).reshape(len(bound), width).tolist()
    for key, row in zip(bound.tolist(), candidates):
      old = value = latest.get(key, 0)
      while value == old:
        for candidate in row:
          if candidate != old and frame.in_bucket(f"{key}:{candidate}", split):
            value = candidate
            break
        else:
          row = (half + draws.integers(half, width)).tolist()
      latest[key] = value
      values.append(value)
    return np.array(values)

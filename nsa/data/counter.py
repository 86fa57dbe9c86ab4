"""Random numbers without state: a hash of (key, counter).

Every draw of the data pipeline is a pure function of integers, so there is no
generator to save, to seek or to split over processes. The hash is SplitMix64
(Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014)
written out here, because NumPy does not promise that its own streams stay the
same from release to release and a run must see the same rows after an upgrade.
"""
from __future__ import annotations

import zlib

import numpy as np

_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLY_1 = 0xBF58476D1CE4E5B9
_MULTIPLY_2 = 0x94D049BB133111EB
_MASK = (1 << 64) - 1


def key(*parts: int | str) -> int:
  """Folds integers and strings into one 64-bit key; the order of the parts matters."""
  h = 0
  for part in parts:
    if isinstance(part, str):
      part = zlib.crc32(part.encode()) + (1 << 40)  # apart from the small integers
    x = (h + _GOLDEN + (int(part) & _MASK)) & _MASK
    x = ((x ^ (x >> 30)) * _MULTIPLY_1) & _MASK
    x = ((x ^ (x >> 27)) * _MULTIPLY_2) & _MASK
    h = x ^ (x >> 31)
  return h


def bits(key: int, counters) -> np.ndarray:
  """64 random bits for every counter: uint64, the shape of `counters` (at least 1-d)."""
  x = np.atleast_1d(np.asarray(counters)).astype(np.uint64)
  x = (x + np.uint64(1)) * np.uint64(_GOLDEN) + np.uint64(key)  # arrays wrap around without a warning
  x = (x ^ (x >> np.uint64(30))) * np.uint64(_MULTIPLY_1)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(_MULTIPLY_2)
  return x ^ (x >> np.uint64(31))


def uniform(key: int, counters) -> np.ndarray:
  """float64 in [0, 1) for every counter."""
  return (bits(key, counters) >> np.uint64(11)) * 2.0**-53


def integers(key: int, counters, high: int) -> np.ndarray:
  """int64 in [0, high) for every counter; `high` stays far below 2^53."""
  return (uniform(key, counters) * high).astype(np.int64)


def permutation(key: int, size: int) -> np.ndarray:
  """A permutation of 0..size-1, int64[size]."""
  return np.argsort(bits(key, np.arange(size)), kind="stable")


class Draws:
  """The draws of one example, taken one after another; lives no longer than the call that makes it."""

  def __init__(self, *parts: int | str):
    self._key = key(*parts)
    self._next = 0

  def _counters(self, size):
    first, self._next = self._next, self._next + size
    return np.arange(first, self._next)

  def uniform(self, size: int) -> np.ndarray:
    """float64[size] in [0, 1)."""
    return uniform(self._key, self._counters(size))

  def integers(self, high: int, size: int) -> np.ndarray:
    """int64[size] in [0, high)."""
    return integers(self._key, self._counters(size), high)

  def integer(self, high: int) -> int:
    """One integer in [0, high)."""
    return int(self.integers(high, 1)[0])

  def permutation(self, size: int) -> np.ndarray:
    """A permutation of 0..size-1, int64[size]."""
    return np.argsort(bits(self._key, self._counters(size)), kind="stable")

"""Sources mixed by weight: which corpus a row of text comes from, and which row of that corpus it is."""
from __future__ import annotations

import numpy as np

PERIOD = 1000  # rows after which the pattern repeats: weights count in steps of 1/1000


class Mixture:
  """Row number -> (corpus, row of the corpus), a fixed pattern: of any rows 0 .. n each corpus has its share to within
  one row.

  Raises ValueError unless all weights are above 0 (at least 1/1000 of their sum).
  """

  def __init__(self, weights: dict[str, float]):
    total = sum(weights.values())
    for name, weight in weights.items():
      if not weight > 0 or weight / total < 1 / PERIOD:
        raise ValueError(f"data.weights[{name!r}] = {weight}: above 0, and at least 1/{PERIOD} of the sum {total:g}")
    share = np.array(list(weights.values())) / total
    self._corpus = np.zeros(PERIOD, np.int64)
    self._before = np.zeros((PERIOD + 1, len(share)), np.int64)  # rows of each corpus before a place of the pattern
    for place in range(PERIOD):
      self._corpus[place] = np.argmax(share * (place + 1) - self._before[place])
      self._before[place + 1] = self._before[place]
      self._before[place + 1, self._corpus[place]] += 1

  def locate(self, number: int) -> tuple[int, int]:
    """The corpus of row `number` and its number there."""
    period, place = divmod(number, PERIOD)
    corpus = int(self._corpus[place])
    return corpus, int(period * self._before[PERIOD, corpus] + self._before[place, corpus])

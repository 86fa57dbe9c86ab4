"""Median times of device work."""
from __future__ import annotations

import statistics
import time

import jax


def milliseconds(function, argument_sets, calls, repeats):
  """Median time of a call, in ms, over inputs that take turns; compilation excluded."""
  for arguments in argument_sets:
    jax.block_until_ready(function(*arguments))
  times = []
  for _ in range(repeats):
    start = time.perf_counter()
    for i in range(calls):
      out = function(*argument_sets[i % len(argument_sets)])
    jax.block_until_ready(out)
    times.append((time.perf_counter() - start) / calls * 1e3)
  return statistics.median(times)

"""Median times of device work, and what devices reach at best."""
from __future__ import annotations

import statistics
import time

import jax

CEILINGS = {  # device -> bfloat16 FLOP/s of a large product and bytes/s of a large copy, both measured
    "NVIDIA H200": (790e12, 4.3e12),
    "NVIDIA H100 80GB HBM3": (778e12, 3.0e12),
}


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

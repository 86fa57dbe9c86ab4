"""A profiler trace as a table: where the device's time went, by operation of the program or by named scope.

`jax.profiler.trace(directory)` or the config's `profile` writes the trace; `xprof` or Perfetto show it whole. The
table here is for a first look without either.
"""
from __future__ import annotations

import collections
import os
import re
import warnings

from etils import epath
import jax

_CONTAINERS = ("while", "call", "conditional", "async")  # their time is that of what they hold


def operations(directory: str | os.PathLike, *, kernels: bool = False) -> dict[str, float]:
  """Milliseconds per operation of the compiled programs, all devices and steps added up, longest first.

  `kernels`: per kernel on the device, by the name that its code has, not per operation of the program.

  Raises ValueError if `directory` holds no trace.
  """
  files = sorted(epath.Path(directory).glob("plugins/profile/*/*.xplane.pb"))
  if not files:
    raise ValueError(f"directory = {os.fspath(directory)!r}: holds no trace (*.xplane.pb); "
                     "take --config.profile='(first, last)' or jax.profiler.trace")
  total = collections.Counter()
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of the reader's own bindings
    for plane in jax.profiler.ProfileData.from_serialized_xspace(files[-1].read_bytes()).planes:
      for line in plane.lines:
        for event in line.events:
          name = next((value for key, value in event.stats if key == "hlo_op"), None)
          if name is not None and not str(name).startswith(_CONTAINERS) and not event.name.startswith("end: "):
            total[event.name if kernels else str(name)] += event.duration_ns / 1e6
  return dict(total.most_common())


def by_scope(times: dict[str, float], program: str, scopes: tuple[str, ...]) -> dict[str, float]:
  """The same milliseconds gathered by named scope; the rest is split into forward, backward and neither.

  Args:
    times: of `operations`.
    program: text of the compiled program, `compiled.as_text()`, which knows the scopes of its operations.
    scopes: parts of scope names, e.g. ("selected_attention", "index_top_k"); the longest that fits counts. A backward
      operation counts with the forward one that it belongs to.
  """
  where = dict(re.findall(r"^\s*(?:ROOT )?%?([\w.\-]+) = .*?op_name=\"([^\"]*)\"", program, re.MULTILINE))
  scopes = sorted(scopes, key=len, reverse=True)  # "attention" is a part of "selected_attention"
  total = collections.Counter()
  for name, milliseconds in times.items():
    path = where.get(name, "")
    rest = ("other, backward" if "transpose(jvp" in path else "other, forward" if "jvp(" in path
            else "optimizer and the rest")
    total[next((scope for scope in scopes if scope in path), rest)] += milliseconds
  return dict(total.most_common())

"""What a run waits for until its first step: one line on the screen, and a part of DONE."""
from __future__ import annotations

from collections.abc import Mapping
import contextlib
import os
import time

from nsa import lock

_process: Start | None = None  # of a command, until its first run takes it


class Start:
  """Seconds by what they went to, in order, from `began` (of time.monotonic; None = now) on."""

  def __init__(self, began: float | None = None):
    self.seconds: dict[str, float] = {}
    self._at = time.monotonic() if began is None else began

  def lap(self, name: str) -> None:
    """What has passed since the last lap went to `name`."""
    now = time.monotonic()
    self.seconds[name] = self.seconds.get(name, 0.0) + now - self._at
    self._at = now

  def line(self, program: Mapping[str, float]) -> str:
    """program: what the first step's program took, by stage (`programs.took`), which other parts may have hidden."""
    listed = lambda parts: ", ".join(f"{name} {seconds:.1f}" for name, seconds in parts.items())
    return (f"first step after {sum(self.seconds.values()):.1f} s: {listed(self.seconds)}"
            + (f"; its program: {listed(program)}" if program else ""))


def of_process() -> None:
  """For commands, once they have imported: the first run counts from the beginning of the process."""
  global _process
  _process = Start(time.monotonic() - _age())
  _process.lap("imports")


def lap(name: str) -> None:
  """`Start.lap` of a command's clock that no run has taken yet."""
  if _process is not None:
    _process.lap(name)


def take() -> Start:
  """The clock of a run that begins now."""
  global _process
  mine, _process = _process or Start(), None
  return mine


def _age() -> float:
  """Seconds since this process began; 0 where the system does not say."""
  with contextlib.suppress(ValueError, AttributeError):
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(lock.start_of(os.getpid())) / os.sysconf("SC_CLK_TCK")
  return 0.0

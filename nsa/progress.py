"""One line that says how far a run is, how fast it goes and when it ends."""
from __future__ import annotations

import collections
import contextlib
import shutil
import sys
import time

WINDOW = 60.0  # seconds of training that speed looks back on


class Progress:
  """One line that says how far a run is, e.g.

      native_msa s0 [sparse] 120/400 loss 2.134 (3.08 bpb) 35.2k tok/s ETA 0:42

  On a terminal the line is rewritten in place, otherwise a plain line appears every `every` seconds. Speed
  and ETA come from the last `window` seconds of training; time inside `pause` (compilation, evaluation)
  counts for neither.

  Args:
    name: what runs, e.g. "native_msa s0".
    steps: steps of the whole run.
    start_step: steps that are done already (a resumed run).
    every: seconds between plain lines; a terminal is rewritten up to ten times a second.
    window: seconds of training that speed and ETA look back on.
    stream: where to write; None = standard error.
    clock: seconds, monotonic; a test passes its own.
  """

  def __init__(self, name: str, steps: int, *, start_step: int = 0, every: float = 10.0, window: float = WINDOW,
               stream=None, clock=time.monotonic):
    self.name, self.steps = name, steps
    self._stream = sys.stderr if stream is None else stream
    self._tty = bool(getattr(self._stream, "isatty", lambda: False)())
    self._every, self._window, self._clock = 0.1 if self._tty else every, window, clock
    self.paused = collections.Counter()  # label -> seconds, for the summary of a run
    self._depth = 0
    self._shown_at, self._dirty = None, False
    self._points = collections.deque([(self._active(), start_step, 0)])  # seconds of training, step, tokens

  def update(self, step: int, *, tokens: int, loss: float | None = None, bpb: float | None = None,
             mode: str = "") -> None:
    """Notes the progress and shows it if it is time.

    Args:
      step: steps done.
      tokens: tokens trained on since this object was made.
      loss: nats per token.
      bpb: bits per byte.
      mode: of the current stage, e.g. "sparse".
    """
    now = self._active()
    self._points.append((now, step, tokens))
    while len(self._points) > 2 and now - self._points[1][0] >= self._window:
      self._points.popleft()
    last = step >= self.steps
    if self._shown_at is not None and self._clock() - self._shown_at < self._every and not last:
      return
    parts = [self.name, f"[{mode}]" if mode else "", f"{step}/{self.steps}"]
    if loss is not None:
      parts.append(f"loss {loss:.3f}")
    if bpb is not None:
      parts.append(f"({bpb:.2f} bpb)")
    rate = self.tokens_per_second
    parts += [f"{_short(rate)} tok/s" if rate else "", f"ETA {_duration(self.eta)}"]
    self._show(" ".join(p for p in parts if p))

  @property
  def tokens_per_second(self) -> float | None:
    """Over all devices, in the window; None before two updates at different times."""
    (t0, _, n0), (t1, _, n1) = self._points[0], self._points[-1]
    return (n1 - n0) / (t1 - t0) if t1 > t0 else None

  @property
  def eta(self) -> float | None:
    """Seconds of training that are left; None if not yet known."""
    (t0, s0, _), (t1, s1, _) = self._points[0], self._points[-1]
    if s1 >= self.steps:
      return 0.0
    return (self.steps - s1) * (t1 - t0) / (s1 - s0) if s1 > s0 and t1 > t0 else None

  @contextlib.contextmanager
  def pause(self, label: str):
    """Time inside counts neither for speed nor ETA; it is added to `paused[label]`, in seconds."""
    began = self._clock()
    if self._tty and not self._depth:
      self._show(f"{self.name} {label} ...")
    self._depth += 1
    try:
      yield
    finally:
      self._depth -= 1
      if not self._depth:  # inside another pause the time is counted there
        self.paused[label] += self._clock() - began

  def say(self, what: str) -> None:
    """A line of its own, which stays."""
    self.close()
    self._stream.write(f"{self.name} {what}\n")
    self._stream.flush()

  def close(self) -> None:
    """Ends the line on a terminal."""
    if self._tty and self._dirty:
      self._stream.write("\n")
      self._stream.flush()
      self._dirty = False

  def _active(self):
    return self._clock() - sum(self.paused.values())

  def _show(self, line):
    self._shown_at = self._clock()
    if self._tty:
      width = shutil.get_terminal_size().columns
      self._stream.write("\r" + line[:width - 1] + "\x1b[K")  # a wrapped line could not be rewritten
      self._dirty = True
    else:
      self._stream.write(line + "\n")
    self._stream.flush()


def _short(value):
  for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
    if value >= size:
      return f"{value / size:.1f}{unit}"
  return f"{value:.0f}"


def _duration(seconds):
  if seconds is None:
    return "?"
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"

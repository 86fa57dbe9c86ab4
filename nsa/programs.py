"""The compiled programs of this process: each is compiled once, by whoever needs it first or by threads ahead of need.

A program is named by a key that says all that it depends on, so that runs of a study share it. `ahead` compiles what is
coming while the device trains: the same text goes to the same compiler, so who compiled a program changes no bit of a
run. One thread traces, as Python has one lock, and hands what it has traced to others that compile: XLA needs no
Python.
"""
from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
import concurrent.futures
import contextlib
import os
import queue
import sys
import threading
import time
from typing import Any

from absl import logging
import jax

from nsa import autotune, kept

# Of Python's lock, while two threads want it: the default of 5 ms would be a quarter of a small model's step.
_SWITCH_SECONDS = 5e-4

_GRACE_SECONDS = 10.0

_CORES_OF_A_COMPILER = 4  # XLA compiles the parts of a program side by side itself
_MAX_COMPILERS = 4

_lock = threading.Lock()
_programs: dict[Hashable, concurrent.futures.Future] = {}
_ahead: _Ahead | None = None  # the threads of `ahead`
_begun = threading.Event()  # see `begun`
_kept: kept.Kept | None = None
_took: dict[Hashable, dict[str, float]] = {}
_threads: list[threading.Thread] = []  # those that an exception did not wait for


def get(key: Hashable, build: Callable[[], Any]) -> Any:
  """build(), called once per key; whoever comes while another thread builds waits for it. Raises what build raises."""
  future, mine = _claim(key)
  if mine:
    _settle(future, build)
  return future.result()


def keep(directory: str | os.PathLike | None) -> None:
  """Keeps what `compiled` makes in a directory, for later processes, and looks there first; None ends that.

  For commands, which trace what the source says: not for a process that changes this project's modules, as tests do.
  """
  global _kept
  _kept = kept.Kept(directory) if directory else None


def compiled(key: Hashable, lower: Callable[[], jax.stages.Lowered]) -> Any:
  """lower().compile() as `get` would give it, or the same from an earlier process (`keep`).

  In the thread that traces ahead it returns None as soon as the program is traced: another thread compiles it.
  """
  future, mine = _claim(key)
  threads = _ahead if _ahead is not None and threading.current_thread() is _ahead.tracer else None
  if mine:
    try:
      began = time.monotonic()
      if found := _kept and _kept.load(key):
        _took[key] = {"kept": time.monotonic() - began}
      compile_ = None if found else lower().compile
      if not found:
        _took[key] = {"traced": time.monotonic() - began}
    except BaseException as error:
      future.set_exception(error)
      raise
    if found:
      future.set_result(found)
    elif threads:
      threads.todo.put((key, future, compile_))
    else:
      _finish(key, future, compile_)
  return None if threads else future.result()


def took(key: Hashable) -> dict[str, float]:
  """Seconds that `compiled` took for a program, by stage: traced (and lowered), then compiled or read from JAX's cache
  ("cached"), or "kept" alone; {} for one that is not there."""
  return dict(_took.get(key, {}))


def _finish(key, future, compile_) -> None:
  here = []

  def build():
    with autotune.alone():
      began = time.monotonic()
      made, fresh = kept.compile_here(compile_)
      _took[key]["compiled" if fresh else "cached"] = time.monotonic() - began
    here.append(fresh)
    return made

  _settle(future, build)
  if _kept and (here[0] or jax.default_backend() == "gpu"):
    _kept.save(key, future.result())


def _claim(key) -> tuple[concurrent.futures.Future, bool]:
  """The future of a key, and whether the caller has to settle it."""
  with _lock:
    future = _programs.get(key)
    # failed ahead of need: the caller shall see it
    mine = future is None or future.done() and future.exception() is not None
    if mine:
      future = _programs[key] = concurrent.futures.Future()
  return future, mine


def _settle(future, build) -> None:
  try:
    future.set_result(build())
  except BaseException as error:
    future.set_exception(error)
    raise


def check(keys: Iterable[Hashable]) -> None:
  """Raises what building one of the keys raised, in whichever thread that was; nothing if none was built or is
  being."""
  for key in keys:
    future = _programs.get(key)
    if future is not None and future.done() and future.exception() is not None:
      raise future.exception()


def begun() -> None:
  """Says that a run has all that it makes in Python before its first step: until then `when_begun` waits."""
  _begun.set()


def when_begun() -> None:
  """For `ahead`, between what a first step needs and what it does not: one thread at a time runs Python, and the run
  that reads its data is to be it."""
  while not _begun.wait(0.1):
    if _ahead is None or _ahead.stop.is_set():
      return


def busy() -> bool:
  """Whether a compilation goes on that an exception did not wait for: an interpreter that ends would abort in the midst
  of it."""
  return any(thread.is_alive() for thread in _threads)


class _Ahead:
  """The threads of `ahead`: one that traces, and some that compile what it has traced, in its order."""

  def __init__(self, compilations: Iterable[Callable[[], Any]]):
    self.stop, self.todo = threading.Event(), queue.SimpleQueue()
    self.tracer = threading.Thread(target=self._trace, args=(compilations,), name="compile ahead", daemon=True)
    self.compilers = [threading.Thread(target=self._compile, name=f"compile ahead, {i}", daemon=True)
                      for i in range(min(_MAX_COMPILERS, max(1, _cores() // _CORES_OF_A_COMPILER)))]
    self.threads = [self.tracer, *self.compilers]

  def _trace(self, compilations):
    try:
      for compilation in compilations:
        if self.stop.is_set():
          return
        with contextlib.suppress(Exception):  # its future keeps it for who needs the program
          compilation()
    except Exception as error:  # a run that cannot even say what it needs: it will say so when its turn comes
      logging.info("nothing more is compiled ahead: %s: %s", type(error).__name__, error)
    finally:
      for _ in self.compilers:
        self.todo.put(None)

  def _compile(self):
    while (one := self.todo.get()) is not None:
      key, future, compile_ = one
      if self.stop.is_set():  # as if it had never been traced
        with _lock:
          if _programs.get(key) is future:
            del _programs[key]
        future.set_exception(concurrent.futures.CancelledError())
        continue
      with contextlib.suppress(Exception):
        _finish(key, future, compile_)

  def end(self, grace: float | None) -> None:
    """Waits until what is in hand is compiled, at most `grace` seconds where that is a number; the rest is dropped."""
    self.stop.set()
    until = None if grace is None else time.monotonic() + grace
    for thread in self.threads:
      thread.join(None if until is None else max(0.0, until - time.monotonic()))
    _threads.extend(thread for thread in self.threads if thread.is_alive())


def _cores() -> int:
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def ahead(compilations: Iterable[Callable[[], Any]]) -> Iterator[None]:
  """Inside the block a thread calls each of `compilations`, in their order; each calls `compiled` in the end.

  What fails there fails again for who needs it, see `check`. Inside another such block nothing happens: the outer one
  knows what is coming. With several processes, too: they have to compile in the same order. The block ends once the
  compilations in hand do, but an exception (a preemption) waits no longer than some `_GRACE_SECONDS` for them.
  """
  global _ahead
  if _ahead is not None or jax.process_count() > 1:
    yield
    return
  _ahead = _Ahead(compilations)
  old = sys.getswitchinterval()
  sys.setswitchinterval(min(old, _SWITCH_SECONDS))
  for thread in _ahead.threads:
    thread.start()
  grace = _GRACE_SECONDS
  try:
    yield
    grace = None
  finally:
    _ahead.end(grace)
    sys.setswitchinterval(old)
    _ahead = None

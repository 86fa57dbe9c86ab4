"""The compiled programs of this process: each is compiled once, by whoever needs it first or by a thread ahead of need.

A program is named by a key that says all that it depends on, so that runs of a study share it. `ahead` compiles what is
coming while the device trains: the same text goes to the same compiler, so who compiled a program changes no bit of a
run.
"""
from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
import concurrent.futures
import contextlib
import sys
import threading
from typing import Any

from absl import logging
import jax

# Of Python's lock, while two threads want it: the default of 5 ms would be a quarter of a small model's step.
_SWITCH_SECONDS = 5e-4

_GRACE_SECONDS = 10.0

_lock = threading.Lock()
_programs: dict[Hashable, concurrent.futures.Future] = {}
_working = False  # whether a thread of `ahead` is there
_threads: list[threading.Thread] = []  # those that an exception did not wait for


def get(key: Hashable, build: Callable[[], Any]) -> Any:
  """build(), called once per key; whoever comes while another thread builds waits for it. Raises what build raises."""
  with _lock:
    future = _programs.get(key)
    # failed ahead of need: the caller shall see it
    mine = future is None or future.done() and future.exception() is not None
    if mine:
      future = _programs[key] = concurrent.futures.Future()
  if mine:
    try:
      future.set_result(build())
    except BaseException as error:
      future.set_exception(error)
      raise
  return future.result()


def check(keys: Iterable[Hashable]) -> None:
  """Raises what building one of the keys raised, in whichever thread that was; nothing if none was built or is
  being."""
  for key in keys:
    future = _programs.get(key)
    if future is not None and future.done() and future.exception() is not None:
      raise future.exception()


def busy() -> bool:
  """Whether a compilation goes on that an exception did not wait for: an interpreter that ends would abort in the midst
  of it."""
  return any(thread.is_alive() for thread in _threads)


@contextlib.contextmanager
def ahead(compilations: Iterable[Callable[[], Any]]) -> Iterator[None]:
  """Inside the block a thread calls each of `compilations`, in their order; each calls `get` in the end.

  What fails there fails again for who needs it, see `check`. Inside another such block nothing happens: the outer one
  knows what is coming. With several processes, too: they have to compile in the same order. The block ends once the
  compilation in hand does, but an exception (a preemption) waits no longer than `_GRACE_SECONDS` for it.
  """
  global _working
  if _working or jax.process_count() > 1:
    yield
    return
  stop = threading.Event()

  def work():
    try:
      for compilation in compilations:
        if stop.is_set():
          return
        with contextlib.suppress(Exception):  # `get` keeps it for who needs the program
          compilation()
    except Exception as error:  # a run that cannot even say what it needs: it will say so when its turn comes
      logging.info("nothing more is compiled ahead: %s: %s", type(error).__name__, error)

  thread = threading.Thread(target=work, name="compile ahead", daemon=True)
  old = sys.getswitchinterval()
  _working = True
  sys.setswitchinterval(min(old, _SWITCH_SECONDS))
  thread.start()
  grace = _GRACE_SECONDS
  try:
    yield
    grace = None
  finally:
    stop.set()
    thread.join(grace)
    if thread.is_alive():
      _threads.append(thread)
    sys.setswitchinterval(old)
    _working = False

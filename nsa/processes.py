"""What the processes of one run have to agree on, and how a hang becomes an error.

A run of several processes is one program that all of them call in step: they own different devices, read
different rows and write one set of files, by process 0. With one process everything here is trivial.
"""
from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import os
import signal
import sys
import threading
import time

import jax
from jax.experimental import multihost_utils
import numpy as np

HUNG = 6  # exit code of a process that waited in vain


class ProcessError(Exception):
  """The processes of a run cannot start, disagree, or one of them failed; the message says which."""


def first() -> bool:
  """Whether this process is the one that writes files and speaks to the terminal."""
  return jax.process_index() == 0


def initialize(coordinator: str | None = None, count: int | None = None, index: int | None = None, *,
               timeout: int = 300, heartbeat: int = 100) -> None:
  """Connects the processes. To be called by each, before anything touches a device.

  Args:
    coordinator: host:port of process 0; None = jax asks the cluster (Slurm, GKE, Cloud TPU, Open MPI).
    count, index: processes, and which of them this is; None = likewise.
    timeout: seconds to wait for the others.
    heartbeat: seconds of silence after which a process counts as dead and all others end.

  Raises ProcessError if that fails; if not all of them come in time, says so and ends the process (exit code HUNG).
  """
  # Accelerators have a queue per device; the devices of a CPU share threads and run independent programs in any
  # order. Where programs wait for other processes, both can end in a deadlock: so in order, with threads for all.
  jax.config.update("jax_cpu_enable_async_dispatch", False)
  for pool in ("NPROC", "PJRT_NPROC"):
    os.environ.setdefault(pool, str(max(16, os.cpu_count() or 1)))
  who = f"process {'?' if index is None else index} of {'?' if count is None else count}"
  hint = (f"{who} could not join the others at {coordinator or 'the address that the cluster names'} within {timeout} "
          "s. Are all processes started, with one address and different indices, and may they reach that port?")

  def give_up():
    print(f"error: {hint}", file=sys.stderr, flush=True)
    os._exit(HUNG)

  # jax ends the process by itself, with its own words, and a TPU host whose neighbours do not run waits for ever.
  late = threading.Timer(timeout, give_up)
  late.daemon = True
  late.start()
  try:
    jax.distributed.initialize(coordinator, count, index, initialization_timeout=timeout + 60,
                               heartbeat_timeout_seconds=heartbeat, shutdown_timeout_seconds=60)
    jax.device_count()
  except Exception as error:
    raise ProcessError(f"{hint} ({type(error).__name__}: {' '.join(str(error).split())[:300]})") from error
  finally:
    late.cancel()


def barrier(name: str) -> None:
  """Returns when all processes have come here."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def _gather(value: np.ndarray) -> np.ndarray:
  """[processes, ...]: what each process has."""
  return np.asarray(multihost_utils.process_allgather(value)).reshape(jax.process_count(), *value.shape)


@contextlib.contextmanager
def together(what: str):
  """If the block raises in one process, it raises in all: its own error there, ProcessError in the others.

  Otherwise those would wait for the failed one in their next common computation.
  """
  if jax.process_count() == 1:
    yield
    return
  failure = None
  try:
    yield
  except Exception as error:
    failure = error
  failed = np.flatnonzero(_gather(np.array(failure is not None)))
  if failure is not None:
    raise failure
  if len(failed):
    raise ProcessError(f"{what}: process {', '.join(map(str, failed))} failed; its own message says why")


def agree(**values: str) -> None:
  """Raises ProcessError unless all processes have the same values; e.g. agree(config=..., corpus=...)."""
  if jax.process_count() == 1:
    return
  for name, value in values.items():
    digests = _gather(np.frombuffer(hashlib.sha256(value.encode()).digest(), np.uint8))
    other = np.flatnonzero((digests != digests[0]).any(axis=-1))
    if len(other):
      raise ProcessError(f"{name} differs between processes: process {', '.join(map(str, other))} has another one than "
                         f"process 0 (here, process {jax.process_index()}: {value[:200]}). Give all hosts the same "
                         "command, code and files")


@contextlib.contextmanager
def preemption():
  """Yields step -> bool: has SIGTERM come, and is this the step after which to save and stop?

  With several processes the signal may reach one of them: jax's preemption service tells the others and names
  one step for all. Ask after every step.
  """
  if jax.process_count() > 1:
    yield multihost_utils.reached_preemption_sync_point
    return
  seen = []
  try:
    old = signal.signal(signal.SIGTERM, lambda *_: seen.append(True))
  except ValueError:                    # not the main thread (a notebook, a test): nothing to catch
    yield lambda step: False
    return
  try:
    yield lambda step: bool(seen)
  finally:
    signal.signal(signal.SIGTERM, old)


class Watchdog:
  """Ends this process, with a message and the stack of every thread, if what is under way takes too long.

  A process that died is found by the heartbeat; one that lives but waits for the others (another program, a
  stuck disk, a lost network) beats on, and all would wait for ever. So each phase gets a deadline.

  Args:
    seconds: that a phase may take; 0 = no watchdog. One process alone has nobody to wait for: none either.
  """

  def __init__(self, seconds: float):
    self._seconds = seconds if jax.process_count() > 1 else 0
    self._changed = threading.Condition()
    self._phase, self._deadline = "", None
    if self._seconds:
      threading.Thread(target=self._watch, daemon=True, name="watchdog").start()

  def expect(self, phase: str) -> None:
    """From here on `phase` is under way, e.g. "step 12"; the clock starts anew."""
    with self._changed:
      self._phase, self._deadline = phase, time.monotonic() + self._seconds
      self._changed.notify()

  def __enter__(self):
    return self

  def __exit__(self, *_):
    """Nothing is expected any more."""
    with self._changed:
      self._deadline = None
      self._changed.notify()

  def _watch(self):
    with self._changed:
      while True:
        left = None if self._deadline is None else self._deadline - time.monotonic()
        if left is not None and left <= 0:
          break
        self._changed.wait(left)
    print(f"error: process {jax.process_index()} of {jax.process_count()}: {self._phase} did not end within "
          f"{self._seconds:g} s; some process is stuck or runs another program. The stacks of this one follow; "
          "the same command goes on from the newest checkpoint.", file=sys.stderr, flush=True)
    faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
    sys.stderr.flush()
    os._exit(HUNG)

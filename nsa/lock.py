"""One process at a time trains in a run directory: `workdir/LOCK`, held while it runs. `held` is for shorter work.

On a file system with locks (flock) the operating system frees it with the process, however that ends. Where there are
none (object stores, some cluster file systems), or where they do not reach other hosts, the file speaks: its owner
changes it every BEAT seconds, and one that was silent for SILENCE seconds is dead. Clocks of different hosts are not
compared.
"""
from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pathlib
import platform
import threading
import time
import uuid

from absl import logging
from etils import epath

from nsa.processes import ProcessError

BEAT = 10.0      # seconds between two signs of life
SILENCE = 60.0   # seconds without one after which an owner elsewhere is dead
_BYTES = 512     # of the file: it is changed in place, and never cut


class Busy(ProcessError):
  """Another process trains in the directory; the message names host, process and age."""


class Lock:
  """`with Lock(workdir):` nobody else is in there. The directory must exist.

  Raises Busy if another process has it. A dead owner on this host is found at once, one on another host after SILENCE
  seconds at most; what it leaves is taken over.
  """

  def __init__(self, workdir: str | os.PathLike):
    self.path = epath.Path(workdir) / "LOCK"
    self._local = "://" not in os.fspath(workdir)
    self._me = {"host": platform.node(), "process": os.getpid(), "began": time.time(), "place": _place(),
                "token": uuid.uuid4().hex,
                "started": start_of(os.getpid())}
    self._file, self._taken, self._over = None, "", threading.Event()

  def __enter__(self):
    self._acquire()
    self._thread = threading.Thread(target=self._beat, daemon=True, name="lock")
    self._thread.start()
    return self

  def __exit__(self, *_):
    self._over.set()
    self._thread.join(timeout=BEAT)
    with contextlib.suppress(OSError):
      if self._owner().get("token") == self._me["token"]:
        self.path.unlink()
    if self._file is not None:
      os.close(self._file)

  def check(self) -> None:
    """Raises Busy if another process has taken the directory since (this one slept, or lost its disk, for long)."""
    if self._taken:
      raise Busy(f"{self.path.parent} was taken over by {self._taken} while this process was silent: it ends here and "
                 "saves nothing")

  # --- taking it ---

  def _acquire(self):
    end = time.monotonic() + BEAT
    while self._file is None and self._local:
      file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        locked = True
      except BlockingIOError:
        os.close(file)
        owner = self._owner()
        if time.monotonic() < end and (not owner or owner.get("place") == self._me["place"] and self._dead(owner)):
          time.sleep(0.05)                 # it is just beginning, or ending: its last threads hold the file
          continue
        raise self._busy(owner) from None
      except OSError:
        locked = False                     # no locks there
      try:
        gone = not os.path.samestat(os.fstat(file), os.stat(self.path))
      except FileNotFoundError:
        gone = True                        # its owner has just ended
      if gone:
        os.close(file)
        continue
      self._file = file
      try:
        self._inherit(locked)
      except BaseException:
        os.close(file)
        self._file = None
        raise
    if not self._local:
      self._inherit(False)
    self._write(0)

  def _inherit(self, locked):
    """Returns if the owner that the file names is dead, or if it names none; raises Busy otherwise."""
    owner = self._owner()
    if not owner:
      return
    if owner.get("place") == self._me["place"]:
      dead = locked or self._dead(owner)
    else:
      dead = self._silent(owner)
    if not dead:
      raise self._busy(owner)
    logging.warning("%s: %s ended without a word; this process goes on", self.path.parent, _words(owner))

  def _dead(self, owner):
    """Whether an owner in this place has ended."""
    return owner.get("started") != start_of(owner.get("process"))

  def _silent(self, owner):
    """Whether an owner on another host says nothing for SILENCE seconds."""
    if time.time() - owner.get("at", 0) > 10 * SILENCE:
      return True
    logging.warning("%s: waiting up to %.0f s for a sign of life of %s", self.path.parent, SILENCE, _words(owner))
    end = time.monotonic() + SILENCE
    while time.monotonic() < end:
      time.sleep(min(BEAT / 4, SILENCE / 10))
      if self._owner() != owner:
        return not self._owner()           # it has ended, or it lives
    return True

  def _busy(self, owner) -> Busy:
    return Busy(
        f"{self.path.parent}: {_words(owner)} trains there; wait for its end, end it, or take another --workdir")

  # --- the file ---

  def _owner(self) -> dict:
    """What the file says; {} where there is none or it says nothing."""
    try:
      found = json.loads(self.path.read_text())
    except (OSError, ValueError):
      return {}
    return found if isinstance(found, dict) else {}

  def _write(self, beats):
    text = json.dumps({**self._me, "at": time.time(), "beats": beats})
    if self._file is None:
      self.path.write_text(text)
    else:
      os.pwrite(self._file, text.ljust(_BYTES).encode(), 0)

  def _beat(self):
    beats = 0
    while not self._over.wait(BEAT):
      beats += 1
      try:
        owner = self._owner()
        if owner and owner.get("token") != self._me["token"]:
          self._taken = _words(owner)
          return
        self._write(beats)
      except OSError as error:             # a full disk, a network that is away: not the end of a run
        logging.warning("%s could not be written: %s", self.path, error)


@contextlib.contextmanager
def waiting(workdir: str | os.PathLike, every: float = 2.0):
  """Holds the directory, and waits as long as another process has it."""
  said = False
  while True:
    with contextlib.ExitStack() as stack:
      try:
        held = stack.enter_context(Lock(workdir))
      except Busy as error:
        if not said:
          logging.warning("waiting: %s", error)
        said = True
        time.sleep(every)
        continue
      yield held
      return


@contextlib.contextmanager
def held(path: str | os.PathLike, doing: str, patience: float = 10.0):
  """Holds a local file, made if it is not there, and waits as long as another process has it, which may be stopped:
  after `patience` seconds, and ever more rarely, the log says which one, since when, and that it is `doing` something.

  Raises OSError where there are no locks.
  """
  file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
  try:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      with _told(file, path, doing, patience):
        fcntl.flock(file, fcntl.LOCK_EX)
    with contextlib.suppress(OSError):  # a full disk: held all the same
      text = json.dumps({"host": platform.node(), "process": os.getpid(), "began": time.time()})
      os.pwrite(file, text.ljust(_BYTES).encode(), 0)
    yield
  finally:
    os.close(file)


@contextlib.contextmanager
def _told(file, path, doing, patience):
  over = threading.Event()

  def tell():
    wait = patience
    while not over.wait(wait):
      try:
        owner = json.loads(os.pread(file, _BYTES, 0))
      except ValueError:
        owner = {}                           # it has only just begun
      logging.warning("waiting for %s, %s: it holds %s", _words(owner), doing, path)
      wait *= 2

  thread = threading.Thread(target=tell, daemon=True, name="waiting")
  thread.start()
  try:
    yield
  finally:
    over.set()
    thread.join()


def _words(owner) -> str:
  age = time.time() - owner.get("began", time.time())
  since = f"{age:.0f} s" if age < 120 else f"{age / 60:.0f} min" if age < 7200 else f"{age / 3600:.0f} h"
  return f"process {owner.get('process', '?')} on {owner.get('host', 'an unknown host')} (for {since})"


def _place() -> str:
  """Where process numbers mean the same: this host, since it was started, in this container."""
  boot = pathlib.Path("/proc/sys/kernel/random/boot_id")
  try:
    return f"{platform.node()} {boot.read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
  except OSError:
    return platform.node()


def start_of(process) -> str:
  """When a process of this place began, in ticks since the start of the host; "" if it is dead, "?" where nobody says
  when."""
  try:
    fields = pathlib.Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return "" if fields[0] in "ZX" else fields[19]  # a zombie waits for its parent alone
  except OSError:
    pass
  try:
    os.kill(process, 0)
    return "?"
  except (OSError, TypeError):
    return ""
